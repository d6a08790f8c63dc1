"""Device functions as CUDA C and OpenCL C, by TVM's code generators."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import tvm
from tvm import tirx

from sepc.backends.gpu.languages import HELPERS, Language
from sepc.backends.gpu.scalars import scalar_function
from sepc.backends.stages.vector import Expr


def source_of(functions: Mapping[str, Expr], language: Language) -> str:
    """The source of device functions, by symbol, as one file."""
    named = {name: _lowered(one.with_attr("global_symbol", name), language) for name, one in functions.items()}
    # An architecture must be given, and nothing of the source depends on which.
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80"} if language == "cuda" else {"kind": "opencl"})
    module = tvm.IRModule({name: one.with_attr("target", target) for name, one in named.items()})
    module = tirx.transform.LowerIntrin()(module)
    text = str(tvm.get_global_func(f"target.build.{language}")(module, target).inspect_source())
    return f"{HELPERS[language]}\n{text}"


def _lowered(function: Expr, language: Language) -> Expr:
    """A device function, whose buffers are flat, in the form of which code is generated."""
    passes = tirx.transform
    steps = [passes.NarrowDataType(32), passes.VectorizeLoop(True), passes.UnrollLoop()]
    module = tvm.transform.Sequential(steps)(tvm.IRModule({"kernel": function}))
    return scalar_function(module["kernel"], language, aligned_of(function))


ALIGNED = "sepc.aligned"
"""Attribute of a device function: names of the parameters that point to multiples of 16 bytes."""


def aligned_of(function: Expr) -> Collection[str]:
    """The names of the parameters that `ALIGNED` lists."""
    return [str(name) for name in function.attrs[ALIGNED]]
