"""Functions of C as functions of TVM's runtime: one argument per tensor, of a type and shape that calls check."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from sepc.backends.stages.vector import Expr


@dataclass(frozen=True)
class TensorType:
    """A dense tensor. `name`: what messages call it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class Packed:
    """A function of C that takes a pointer per tensor and returns a status, which is 0 if all is well."""

    symbol: str
    tensors: Sequence[TensorType]


def packed_object(functions: Mapping[str, Packed], llvm_target: Mapping[str, Any]) -> bytes:
    """An object file with functions of TVM's runtime by these names, which return the status of those of C."""
    module = tvm.IRModule({name: _function(name, packed) for name, packed in functions.items()})
    with tempfile.TemporaryDirectory(prefix="sepc-") as directory:
        path = Path(directory) / "packed.o"
        executable = tvm.compile(module, target=tvm.target.Target(dict(llvm_target)), tir_pipeline="tirx")
        executable.mod.write_to_file(str(path), "o")
        return path.read_bytes()


def _function(name: str, packed: Packed) -> Expr:
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_ret(tvm.ir.PrimType("int32"))
        buffers = [T.arg(one.name, T.buffer(one.shape, one.dtype, align=one.itemsize)) for one in packed.tensors]
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        T.Return(T.Bind(tirx.call_extern("int32", packed.symbol, *[buffer.data for buffer in buffers])))
    return builder.get()
