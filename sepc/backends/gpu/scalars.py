"""Vectors of the emitters as scalars: a thread of a GPU has no vector registers, only loads and stores of 4 numbers.

Every vector expression becomes one scalar expression per lane. What stays a vector is an access to memory of 2 or 4
neighbours of float32 that is known to be aligned, through a small local array, which compilers keep in registers. On
the way, memory that the emitters allocate becomes the thread's own, and what they call of LLVM's becomes what CUDA C
and OpenCL C call it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, Final, Literal

import tvm
from tvm import tirx
from tvm.ir import Call
from tvm.target import codegen

from sepc.backends.stages.vector import Expr
from sepc.errors import BuildError

Language = Literal["cuda", "opencl"]
Stmt = Any
Buffer = Any

HELPERS: Final = "\n".join(
    f"{{prefix}} float sepc_{name}(float a, float b) {{{{ return {condition} ? a : b; }}}}"
    for name, condition in (
        ("max", "a > b"),  # Where either is NaN, the second: what emitters clamp comes second.
        ("min", "a < b"),
        ("maximum", "a > b || a != a"),  # Where either is NaN, that.
        ("minimum", "a < b || a != a"),
    )
)
"""Functions that kernels call, in front of them. (As expressions these would name their operands twice, and TVM's
`LowerIntrin`, which puts values in place of their names, would take exponentially long.)
"""
PREFIXES: Final[Mapping[Language, str]] = {"cuda": "static __device__ __forceinline__", "opencl": "static inline"}
LANGUAGES: Final[tuple[Language, ...]] = ("cuda", "opencl")
_WIDTHS: Final = (2, 4)
"""Lanes that may stay together in memory."""
_FUSED: Final = {"cuda": "fmaf", "opencl": "fma"}
_BINARY: Final = {
    kind.__name__: kind
    for kind in (
        *(tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max),
        *(tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or),
        *(tirx.LShift, tirx.RShift, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor),
    )
}


def scalar_function(function: Expr, language: Language, aligned: Collection[str]) -> Expr:
    """`function` without vectors; `aligned` names the parameters that point to multiples of 16 bytes.

    OpenCL has no pointers into its buffers, so that each pointer is followed by the number of elements to skip.
    """
    offsets = {}
    if language == "opencl":
        offsets = {parameter: tirx.Var(f"{parameter.name}_offset", "int32") for parameter in function.params}
    scalars = _Scalars(language, aligned, offsets)
    parameters = [
        one for parameter in function.params for one in (parameter, offsets.get(parameter)) if one is not None
    ]
    body = scalars.sequence(function.body)
    result = tirx.PrimFunc(parameters, body)
    for key, value in function.attrs.items():
        result = result.with_attr(key, value)
    return result


@cache
def _intrinsic(name: str) -> int:
    """LLVM's number of an intrinsic of its, as TVM's calls have it."""
    return int(codegen.llvm_lookup_intrinsic_id(name))


def _element(value: Expr) -> str:
    """The type of each lane."""
    return str(value.ty.dtype).partition("x")[0]


class _Scalars:
    """One run of `scalar_function`."""

    def __init__(self, language: Language, aligned: Collection[str], offsets: Mapping[Expr, Expr]) -> None:
        self.language: Language = language
        self.aligned = set(aligned)
        self.offsets = dict(offsets)  # of parameters, then also of the buffers there
        self.analyzer = tvm.sym.Analyzer()
        self.variables: dict[Expr, list[Expr]] = {}  # of a vector: one for each lane
        self.buffers: dict[Buffer, Buffer] = {}  # what the emitters allocated, and what stands for it
        self.wide: set[Buffer] = set()  # buffers that are known to be aligned
        self.statements: list[Stmt] = []

    # ---- statements

    def sequence(self, statement: Stmt) -> Stmt:
        """What `statement` becomes, as one statement."""
        outer, self.statements = self.statements, []
        self.statement(statement)
        found, self.statements = self.statements, outer
        return found[0] if len(found) == 1 else tirx.SeqStmt(found)

    def statement(self, statement: Stmt) -> None:
        """Append what `statement` becomes."""
        kind = type(statement).__name__
        if (rule := self._statements.get(kind)) is None:
            raise _no_form(f"a statement of kind {kind}")
        rule(statement)

    @cached_property
    def _statements(self) -> dict[str, Callable[[Stmt], None]]:
        """What is done with each kind of statement."""
        return {
            "SeqStmt": self._sequence,
            "Bind": self._bind,
            "BufferStore": self._store,
            "For": self._for,
            "AllocBuffer": self._allocate,
            "DeclBuffer": self._declare,
            "IfThenElse": self._if,
            "AttrStmt": self._attribute,
            "Evaluate": self._evaluate,
        }

    def _sequence(self, statement: Stmt) -> None:
        for one in statement.seq:
            self.statement(one)

    def _if(self, statement: Stmt) -> None:
        condition = self.scalar(statement.condition)
        then = self.sequence(statement.then_case)
        other = None if statement.else_case is None else self.sequence(statement.else_case)
        self.statements.append(tirx.IfThenElse(condition, then, other))

    def _attribute(self, statement: Stmt) -> None:
        body = self.sequence(statement.body)
        self.statements.append(tirx.AttrStmt(statement.node, statement.attr_key, statement.value, body))

    def _bind(self, statement: Stmt) -> None:
        values = self.lanes(statement.value)
        if len(values) == 1:
            if _element(statement.var) in ("int32", "int64"):
                self.analyzer.bind(statement.var, values[0])
            self.statements.append(tirx.Bind(statement.var, values[0]))
            return
        self.variables[statement.var] = self._named(values, str(statement.var.name))

    def _named(self, values: Sequence[Expr], name: str) -> list[Expr]:
        """A variable for each value that is more than a name or a constant."""
        named = []
        for lane, value in enumerate(values):
            if isinstance(value, tirx.Var | tirx.FloatImm | tirx.IntImm):
                named.append(value)
                continue
            variable = tirx.Var(f"{name}_{lane}", _element(value))
            self.statements.append(tirx.Bind(variable, value))
            named.append(variable)
        return named

    def _store(self, statement: Stmt) -> None:
        buffer = self.buffers.get(statement.buffer, statement.buffer)
        (index,) = statement.indices
        places = self._places(buffer, index)
        values = self.lanes(statement.value)
        values = values * len(places) if len(values) == 1 else values
        if len(places) > 1 and self._stays(buffer, index):
            local = self._local(len(places))
            for lane, value in enumerate(values):
                self.statements.append(tirx.BufferStore(local, value, [lane]))
            whole = local[tirx.Ramp(0, 1, len(places))]
            self.statements.append(tirx.BufferStore(buffer, whole, [tirx.Ramp(places[0], 1, len(places))]))
            return
        if len(places) > 1:  # All are read before any is written.
            values = self._named(values, "lane")
        for place, value in zip(places, values, strict=True):
            self.statements.append(tirx.BufferStore(buffer, value, [place]))

    def _for(self, statement: Stmt) -> None:
        low, extent = self.scalar(statement.min), self.scalar(statement.extent)
        body = self.sequence(statement.body)
        self.statements.append(
            tirx.For(statement.loop_var, low, extent, statement.kind, body, None, statement.annotations, statement.step)
        )

    def _allocate(self, statement: Stmt) -> None:
        buffer = statement.buffer
        if (scope := str(buffer.ty.storage_scope)).startswith("shared"):
            if scope == "shared.dyn" and self.language == "opencl":  # There, any size is declared.
                own = tirx.decl_buffer(buffer.ty.shape, str(buffer.ty.dtype), str(buffer.name), scope="shared")
                self.buffers[buffer] = buffer = own
            self.wide.add(buffer)
            self.statements.append(tirx.AllocBuffer(buffer))
            return
        own = tirx.decl_buffer(buffer.ty.shape, str(buffer.ty.dtype), str(buffer.name), scope="local")
        self.buffers[buffer] = own
        self.statements.append(tirx.AllocBuffer(own))

    def _declare(self, statement: Stmt) -> None:
        pointer = statement.data if isinstance(statement.data, tirx.Var) else statement.data.args[0]
        if pointer in self.offsets:
            self.offsets[statement.buffer] = self.offsets[pointer]
        if str(pointer.name) in self.aligned:
            self.wide.add(statement.buffer)
        self.statements.append(statement)

    def _evaluate(self, statement: Stmt) -> None:
        value = statement.value
        if isinstance(value, Call) and str(value.op.name) == "tirx.call_llvm_intrin":
            if int(value.args[0]) == _intrinsic("llvm.prefetch"):
                return  # Threads that wait are what hides latency here.
            raise _no_form("a call of LLVM's own")
        self.statements.append(statement)

    def _places(self, buffer: Buffer, index: Expr) -> list[Expr]:
        """The element of each lane of an index into `buffer`."""
        offset = self.offsets.get(buffer)
        return [place if offset is None else place + offset for place in self.lanes(index)]

    def _local(self, lanes: int) -> Buffer:
        """A new array of the thread's own."""
        buffer = tirx.decl_buffer((lanes,), "float32", "vector", scope="local")
        self.statements.append(tirx.AllocBuffer(buffer))
        return buffer

    def _stays(self, buffer: Buffer, index: Expr) -> bool:
        """Whether the access to neighbours is one to an aligned vector of memory."""
        if not isinstance(index, tirx.Ramp) or int(index.lanes) not in _WIDTHS or buffer not in self.wide:
            return False
        if str(buffer.ty.dtype) != "float32" or not self._is_one(index.stride):
            return False
        known = self.analyzer.modular_set(self.scalar(index.base))
        return int(known.coeff) % int(index.lanes) == 0 and int(known.base) % int(index.lanes) == 0

    @staticmethod
    def _is_one(stride: Expr) -> bool:
        return isinstance(stride, tirx.IntImm) and int(stride) == 1

    # ---- expressions

    def scalar(self, value: Expr) -> Expr:
        """What a scalar expression becomes."""
        (only,) = self.lanes(value)
        return only

    def lanes(self, value: Expr) -> list[Expr]:
        """What each lane of an expression becomes."""
        kind = type(value).__name__
        if kind in _BINARY:
            return self._binary(kind, value)
        if (rule := self._expressions.get(kind)) is None:
            raise _no_form(f"an expression of kind {kind}")
        return rule(value)

    @cached_property
    def _expressions(self) -> dict[str, Callable[[Expr], list[Expr]]]:
        """What becomes of each kind of expression that is no binary operator."""
        return {
            "IntImm": lambda value: [value],
            "StringImm": lambda value: [value],
            "FloatImm": lambda value: [self._number(value)],
            "Var": lambda value: self.variables.get(value, [value]),
            "Broadcast": lambda value: [self.scalar(value.value)] * int(value.lanes),
            "Ramp": self._ramp,
            "TensorLoad": self._load,
            "Shuffle": self._shuffle,
            "Select": lambda value: self._each(
                tirx.Select, *map(self.lanes, (value.condition, value.true_value, value.false_value))
            ),
            "Cast": lambda value: [tirx.Cast(_element(value), one) for one in self.lanes(value.value)],
            "Not": lambda value: [tirx.Not(one) for one in self.lanes(value.a)],
            "Call": self._call,
        }

    def _binary(self, kind: str, value: Expr) -> list[Expr]:
        left, right = self.lanes(value.a), self.lanes(value.b)
        if kind in ("Max", "Min") and _element(value) == "float32":
            return self._helper(f"sepc_{kind.lower()}", left, right)
        return self._each(_BINARY[kind], left, right)

    def _helper(self, name: str, *operands: list[Expr]) -> list[Expr]:
        """A call of one of `HELPERS` on each lane."""
        return self._each(lambda *of_lane: tirx.call_pure_extern("float32", name, *of_lane), *operands)

    def _ramp(self, value: Expr) -> list[Expr]:
        base, stride = self.scalar(value.base), self.scalar(value.stride)
        return [base if lane == 0 else base + stride * lane for lane in range(int(value.lanes))]

    def _shuffle(self, value: Expr) -> list[Expr]:
        given = [lane for vector in value.vectors for lane in self.lanes(vector)]
        return [given[int(index)] for index in value.indices]

    @staticmethod
    def _each(make: Any, *operands: list[Expr]) -> list[Expr]:
        """`make` on each lane; operands of one lane are those of all."""
        lanes = max(map(len, operands))
        spread = [one * lanes if len(one) == 1 else one for one in operands]
        return [make(*of_lane) for of_lane in zip(*spread, strict=True)]

    def _number(self, value: Expr) -> Expr:
        """A constant; OpenCL's are printed with 7 digits, which is one or two too few for some."""
        number = float(value.value)
        if self.language != "opencl" or str(value.ty.dtype) != "float32":
            return value
        with suppress(OverflowError):
            (bits,) = struct.unpack("<i", struct.pack("<f", number))
            if struct.pack("<f", float(f"{number:e}")) != struct.pack("<f", number):
                return tirx.call_pure_extern("float32", "as_float", tirx.const(bits, "int32"))
        return value

    def _load(self, value: Expr) -> list[Expr]:
        source = value.source
        buffer = self.buffers.get(source, source)
        (index,) = value.indices
        places = self._places(buffer, index)
        if len(places) == 1 or not self._stays(buffer, index):
            return [buffer[place] for place in places]
        local, ramp = self._local(len(places)), tirx.Ramp(0, 1, len(places))
        self.statements.append(tirx.BufferStore(local, buffer[tirx.Ramp(places[0], 1, len(places))], [ramp]))
        return [local[lane] for lane in range(len(places))]

    def _call(self, value: Expr) -> list[Expr]:
        name, arguments = str(value.op.name), list(value.args)
        if name == "tirx.call_llvm_pure_intrin":
            return self._llvm(int(arguments[0]), [self.lanes(one) for one in arguments[1:]], _element(value))
        if not isinstance(value.ty, tvm.ir.PrimType):
            return [value]
        element = _element(value)

        def call(*of_lane: Expr) -> Expr:
            return Call(value.op, list(of_lane), value.attrs, ret_ty=element)

        return self._each(call, *(self.lanes(one) for one in arguments))

    def _llvm(self, number: int, operands: Sequence[list[Expr]], element: str) -> list[Expr]:
        """A call of an intrinsic of LLVM's, whose operands are given lane by lane."""
        if number == _intrinsic("llvm.fma"):
            name = _FUSED[self.language]
            return self._each(lambda *of_lane: tirx.call_pure_extern(element, name, *of_lane), *operands)
        for name in ("maximum", "minimum"):
            if number == _intrinsic(f"llvm.{name}") and element == "float32":
                return self._helper(f"sepc_{name}", *operands)
        raise _no_form("a call of LLVM's own")


def _no_form(what: str) -> BuildError:
    """A kernel holds what there is no form of in CUDA C and OpenCL C."""
    why = f"it has {what}, which these languages lack"
    return BuildError("A kernel cannot be written for a GPU", why=why, fix="name a CPU as the target")
