"""ATen operators as TVM tensor expressions: the table of what the generic lowering accepts, and what each entry means.

`CONVERTERS` is the allowlist: its keys are the ATen overloads that have been tested against PyTorch, and nothing else
is lowered. Each converter takes the `Emitter` and the arguments of the operator in the order of its schema (defaults
filled in, tensors as `te.Tensor`), and returns the result as a `te.Tensor`, or a tuple of them. Shapes and dtypes of
results are those that PyTorch inferred (`Emitter.out`), so broadcasting and type promotion follow PyTorch by
construction.

We write these expressions ourselves instead of using Relax's PyTorch importer: its converters misread positional
arguments of several operators without a word (hardtanh, clamp_max, elu with a scale; celu is wrong), and there is no
amax, logsumexp or var_mean.

Contractions (convolution, matmul, linear, attention) must never be added: TVM's unscheduled products are 30 to 100
times slower than a library's. Known differences: max and min do not propagate NaN; exp is inexact between 88.38 and
88.72.
"""

from __future__ import annotations

from sepc.backends.generic_ops.emitter import DTYPES, HALVES, Converter, Emitter, UnsupportedError
from sepc.backends.generic_ops.movement import MOVEMENT
from sepc.backends.generic_ops.pointwise import CONVERSIONS, POINTWISE
from sepc.backends.generic_ops.reductions import REDUCTIONS
from sepc.backends.generic_ops.resampling import RESAMPLING

CONVERTERS: dict[str, Converter] = {**POINTWISE, **MOVEMENT, **REDUCTIONS, **RESAMPLING}

__all__ = ["CONVERSIONS", "CONVERTERS", "DTYPES", "HALVES", "Converter", "Emitter", "UnsupportedError"]
