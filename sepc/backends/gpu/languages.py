"""The two languages that kernels are written in, and what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from sepc.backends.gpu.storage import OPENCL_HELPERS

Language = Literal["cuda", "opencl"]
LANGUAGES: Final[tuple[Language, ...]] = ("cuda", "opencl")
FUSED: Final = {"cuda": "fmaf", "opencl": "fma"}
"""A multiply-add that rounds once."""

_LIMITS: Final = "\n".join(
    f"{{prefix}} float sepc_{name}(float a, float b) {{{{ return {condition} ? a : b; }}}}"
    for name, condition in (
        ("max", "a > b"),  # Where either is NaN, the second: what emitters clamp comes second.
        ("min", "a < b"),
        ("maximum", "a > b || a != a"),  # Where either is NaN, that.
        ("minimum", "a < b || a != a"),
    )
)
"""Functions for what as an expression would name its operands twice: TVM's `LowerIntrin`, which puts values in place of
their names, would take exponentially long.
"""
HELPERS: Final[Mapping[Language, str]] = {
    "cuda": _LIMITS.format(prefix="static __device__ __forceinline__"),
    "opencl": _LIMITS.format(prefix="static inline") + OPENCL_HELPERS,
}
"""What kernels call, in front of them."""
