"""The check of what TVM lowered: each such region runs once on random inputs, and is compared with PyTorch.

Our own stages are tested over all shapes; TVM's simplifier is not ours, and has been seen to get an index wrong. A
region that differs is handed to PyTorch, with the difference as the reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sepc.backends.program import RegionCheck
from sepc.errors import DeviceError
from sepc.ir.verify import relative_difference
from sepc.runtime.executable import AnyExecutable, KernelRunner, view
from sepc.runtime.program import CONSTANTS

TOLERANCE = 1e-4


def wrong_regions(checks: Sequence[RegionCheck], executable: AnyExecutable) -> dict[str, str]:
    """The regions of `checks` whose results differ from PyTorch's, by name, with by how much.

    None where they cannot run here.
    """
    if not checks or not isinstance(executable, KernelRunner):
        return {}
    generator = torch.Generator().manual_seed(0)
    blocks = executable.scratch_blocks()
    try:
        differences = {check.name: _difference(check, executable, blocks, generator) for check in checks}
    except DeviceError:  # So will a call, if there is one.
        return {}
    return {
        name: f"TVM's kernel differs from PyTorch by {difference:.2g} of the largest result"
        for name, difference in differences.items()
        if not difference <= TOLERANCE
    }


def _difference(
    check: RegionCheck, executable: KernelRunner, blocks: Sequence[torch.Tensor], generator: torch.Generator
) -> float:
    """Run one region on random inputs in `blocks`, by its kernels and by PyTorch."""
    inputs = [view(reference, blocks) for reference in check.inputs]
    for tensor, reference in zip(inputs, check.inputs, strict=True):
        if reference.block == CONSTANTS:
            continue
        if tensor.dtype.is_floating_point:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:  # Small enough for an index, and for a boolean.
            tensor.copy_(torch.randint(0, 2, tensor.shape, generator=generator))
    with torch.no_grad():
        expected = check.graph(*inputs).clone()
    executable.run_kernels(check.calls, blocks)
    return relative_difference(expected, view(check.result, blocks))
