"""sepc: a compiler for convolutional PyTorch models.

``fast = sepc.compile(model)`` gives a callable: ``y = fast(x)`` is ``y = model(x)``, and compiles at the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sepc.errors import (
    ArtifactError,
    BuildError,
    DeviceError,
    InputError,
    ModelError,
    OutOfMemoryError,
    PassError,
    SepcError,
    TargetError,
    VerificationError,
)

if TYPE_CHECKING:
    from sepc._compile import compile, explain  # noqa: A004 -- the public name, as PyTorch's own
    from sepc._load import load
    from sepc._remote import Remote, remote
    from sepc._separate import separate
    from sepc.compiled import CompiledModel
    from sepc.cost_model.calibrate import calibrate
    from sepc.report.explanation import Explanation, RegionExplanation
    from sepc.report.tradeoff import plot_separations
    from sepc.report.visualize import visualize
    from sepc.runtime.exported import ExportedModel
    from sepc.runtime.model import LoadedModel
    from sepc.runtime.report import Profile, RegionProfile, RegionReport
    from sepc.separable.plan import Plan
    from sepc.separable.result import Separation
    from sepc.target import Target

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "BuildError",
    "CompiledModel",
    "DeviceError",
    "Explanation",
    "ExportedModel",
    "InputError",
    "LoadedModel",
    "ModelError",
    "OutOfMemoryError",
    "PassError",
    "Plan",
    "Profile",
    "RegionExplanation",
    "RegionProfile",
    "RegionReport",
    "Remote",
    "Separation",
    "SepcError",
    "Target",
    "TargetError",
    "VerificationError",
    "__version__",
    "calibrate",
    "compile",
    "explain",
    "load",
    "plot_separations",
    "remote",
    "separate",
    "visualize",
]

# Imported at first use, so that `import sepc` stays fast.
_LAZY = {
    "calibrate": "sepc.cost_model.calibrate",
    "compile": "sepc._compile",
    "CompiledModel": "sepc.compiled",
    "Explanation": "sepc.report.explanation",
    "ExportedModel": "sepc.runtime.exported",
    "explain": "sepc._compile",
    "LoadedModel": "sepc.runtime.model",
    "Plan": "sepc.separable.plan",
    "Profile": "sepc.runtime.report",
    "RegionExplanation": "sepc.report.explanation",
    "RegionProfile": "sepc.runtime.report",
    "RegionReport": "sepc.runtime.report",
    "Remote": "sepc._remote",
    "remote": "sepc._remote",
    "separate": "sepc._separate",
    "Separation": "sepc.separable.result",
    "Target": "sepc.target",
    "load": "sepc._load",
    "plot_separations": "sepc.report.tradeoff",
    "visualize": "sepc.report.visualize",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sepc' has no attribute {name!r}")
