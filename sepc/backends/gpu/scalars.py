"""Vectors of the emitters as scalars: a thread of a GPU has no vector registers, only loads and stores of 16 bytes.

Every vector expression becomes one scalar expression per lane. What stays a vector is an access to memory of up to 16
bytes of neighbours that is known to be aligned, through a small local array, which compilers keep in registers. On the
way, memory that the emitters allocate becomes the thread's own, what they call of LLVM's becomes what CUDA C and OpenCL
C call it, and what they compute in float16 is computed in float32: only memory holds halves (`storage.py`), and an
explicit conversion to float16 rounds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, Final

import tvm
from tvm import tirx
from tvm.ir import Call
from tvm.target import codegen

from sepc.backends.gpu.languages import FUSED, Language
from sepc.backends.gpu.storage import FLOATS, HALVES, VECTOR_BYTES, Buffer, Stmt, Storage
from sepc.backends.stages.vector import Expr, element_bytes
from sepc.errors import BuildError
from sepc.ir.element import FLOAT16, FLOAT32

_WIDTHS: Final = (8, 4, 2)
"""Lanes that may stay together in memory, as far as they are no more than `VECTOR_BYTES`."""
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
    body = scalars.sequence(function.body)
    parameters = [
        one
        for parameter in function.params
        for one in (scalars.pointers.get(parameter, parameter), offsets.get(parameter))
        if one is not None
    ]
    result = tirx.PrimFunc(parameters, body)
    for key, value in function.attrs.items():
        result = result.with_attr(key, value)
    return result


@cache
def _intrinsic(name: str) -> int:
    """LLVM's number of an intrinsic of its, as TVM's calls have it."""
    return int(codegen.llvm_lookup_intrinsic_id(name))


def _declared(value: Expr) -> str:
    """The type of each lane, as the emitters have it."""
    return str(value.ty.dtype).partition("x")[0]


def _element(value: Expr) -> str:
    """The type of each lane in registers, which hold no halves."""
    declared = _declared(value)
    return FLOAT32.name if declared == FLOAT16.name else declared


class _Scalars:
    """One run of `scalar_function`."""

    def __init__(self, language: Language, aligned: Collection[str], offsets: Mapping[Expr, Expr]) -> None:
        self.language: Language = language
        self.aligned = set(aligned)
        self.offsets = dict(offsets)  # of parameters, then also of the buffers there
        self.analyzer = tvm.sym.Analyzer()
        self.variables: dict[Expr, list[Expr]] = {}  # of a vector: one for each lane
        self.pointers: dict[Expr, Expr] = {}  # parameters, and what stands for them
        self.buffers: dict[Buffer, Buffer] = {}  # what the emitters allocated or declared, and what stands for it
        self.halves: set[Buffer] = set()  # those that hold halves
        self.wide: set[Buffer] = set()  # buffers that are known to be aligned
        self.guarded = False  # whether what is loaded now may be there under a condition only
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
        if len(values) == 1 and _declared(statement.var) != FLOAT16.name:
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
        storage = self._storage(buffer)
        if width := self._width(buffer, index):
            array = self._array(len(places), storage)
            for lane, value in enumerate(values):
                self.statements.append(tirx.BufferStore(array, storage.held(value), [lane]))
            for lane in range(0, len(places), width):
                self.statements.append(storage.store_vector(buffer, places[lane], array, lane, width))
            return
        if len(places) > 1:  # All are read before any is written.
            values = self._named(values, "lane")
        for place, value in zip(places, values, strict=True):
            self.statements.append(storage.store(buffer, place, value))

    def _for(self, statement: Stmt) -> None:
        low, extent = self.scalar(statement.min), self.scalar(statement.extent)
        body = self.sequence(statement.body)
        self.statements.append(
            tirx.For(statement.loop_var, low, extent, statement.kind, body, None, statement.annotations, statement.step)
        )

    def _allocate(self, statement: Stmt) -> None:
        buffer = statement.buffer
        scope, element = str(buffer.ty.storage_scope), _element(buffer)
        is_shared = scope.startswith("shared")
        holds_halves = is_shared and _declared(buffer) == FLOAT16.name
        if holds_halves:
            element = HALVES[self.language].element
        if self.language == "opencl" or not is_shared:  # In OpenCL, shared memory of any size is declared.
            scope = "shared" if is_shared else "local"
        own = self.buffers[buffer] = tirx.decl_buffer(buffer.ty.shape, element, str(buffer.name), scope=scope)
        self.wide |= {own} if is_shared else set()
        self.halves |= {own} if holds_halves else set()
        self.statements.append(tirx.AllocBuffer(own))

    def _declare(self, statement: Stmt) -> None:
        pointer = statement.data if isinstance(statement.data, tirx.Var) else statement.data.args[0]
        own = buffer = statement.buffer
        if _declared(buffer) == FLOAT16.name:
            own = self._declare_halves(statement, pointer)
        else:
            self.statements.append(statement)
        if pointer in self.offsets:
            self.offsets[own] = self.offsets[pointer]
        if str(pointer.name) in self.aligned:
            self.wide.add(own)

    def _declare_halves(self, statement: Stmt, pointer: Expr) -> Buffer:
        """Declare a parameter that points to halves as what they are in the language."""
        buffer, element = statement.buffer, HALVES[self.language].element
        kind = tvm.ir.PointerType(tvm.ir.PrimType(element), pointer.ty.storage_scope)
        own_pointer = self.pointers[pointer] = tirx.Var(str(pointer.name), kind)
        own = tirx.decl_buffer(buffer.ty.shape, element, str(buffer.name), data=own_pointer)
        self.buffers[buffer] = own
        self.halves.add(own)
        self.statements.append(tirx.DeclBuffer(own, data=own_pointer))
        return own

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

    def _storage(self, buffer: Buffer) -> Storage:
        """How the numbers of a buffer lie there."""
        return HALVES[self.language] if buffer in self.halves else FLOATS

    def _array(self, lanes: int, storage: Storage) -> Buffer:
        """A new array of the thread's own."""
        buffer = tirx.decl_buffer((lanes,), storage.array, "vector", scope="local")
        self.statements.append(tirx.AllocBuffer(buffer))
        return buffer

    def _width(self, buffer: Buffer, index: Expr) -> int:
        """How many neighbours of an access are known to be an aligned vector of memory; 0 for none."""
        if self.guarded or not isinstance(index, tirx.Ramp) or not self._is_one(index.stride):
            return 0
        if buffer not in self.wide or not (buffer in self.halves or _declared(buffer) == FLOAT32.name):
            return 0
        known = self.analyzer.modular_set(self.scalar(index.base))
        numbers = int(index.lanes), int(known.coeff), int(known.base)
        widths = (one for one in _WIDTHS if one * element_bytes(buffer) <= VECTOR_BYTES)
        return next((one for one in widths if not any(number % one for number in numbers)), 0)

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
            "Cast": self._cast,
            "Not": lambda value: [tirx.Not(one) for one in self.lanes(value.a)],
            "Call": self._call,
            "Let": self._let,
        }

    def _let(self, value: Expr) -> list[Expr]:
        values = self.lanes(value.value)
        self.variables[value.var] = values if self.guarded else self._named(values, str(value.var.name))
        return self.lanes(value.body)

    def _cast(self, value: Expr) -> list[Expr]:
        result, given = _element(value), _element(value.value)
        values = [one if result == given else tirx.Cast(result, one) for one in self.lanes(value.value)]
        if _declared(value) != FLOAT16.name or _declared(value.value) == FLOAT16.name:
            return values
        return [HALVES[self.language].rounded(one) for one in values]

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
        if _declared(value) == FLOAT16.name:
            value = tirx.const(number, FLOAT32.name)
        if self.language != "opencl" or _declared(value) != FLOAT32.name:
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
        storage = self._storage(buffer)
        if not (width := self._width(buffer, index)):
            return [storage.load(buffer, place) for place in places]
        array = self._array(len(places), storage)
        for lane in range(0, len(places), width):
            self.statements.append(storage.load_vector(buffer, places[lane], array, lane, width))
        return [storage.taken(array[lane]) for lane in range(len(places))]

    def _call(self, value: Expr) -> list[Expr]:
        name, arguments = str(value.op.name), list(value.args)
        outer, self.guarded = self.guarded, self.guarded or name == "tirx.if_then_else"
        try:
            return self._called(value, name, arguments)
        finally:
            self.guarded = outer

    def _called(self, value: Expr, name: str, arguments: list[Expr]) -> list[Expr]:
        if name == "tirx.call_llvm_pure_intrin":
            return self._llvm(int(arguments[0]), [self.lanes(one) for one in arguments[1:]], _element(value))
        if not isinstance(value.ty, tvm.ir.PrimType):
            return [value]
        if name == "tirx.reinterpret" and FLOAT16.name in (_declared(value), _declared(arguments[0])):
            raise _no_form("the bits of a float16")
        element = _element(value)

        def call(*of_lane: Expr) -> Expr:
            return Call(value.op, list(of_lane), value.attrs, ret_ty=element)

        return self._each(call, *(self.lanes(one) for one in arguments))

    def _llvm(self, number: int, operands: Sequence[list[Expr]], element: str) -> list[Expr]:
        """A call of an intrinsic of LLVM's, whose operands are given lane by lane."""
        if number == _intrinsic("llvm.fma"):
            name = FUSED[self.language]
            return self._each(lambda *of_lane: tirx.call_pure_extern(element, name, *of_lane), *operands)
        for name in ("maximum", "minimum"):
            if number == _intrinsic(f"llvm.{name}") and element == "float32":
                return self._helper(f"sepc_{name}", *operands)
        raise _no_form("a call of LLVM's own")


def _no_form(what: str) -> BuildError:
    """A kernel holds what there is no form of in CUDA C and OpenCL C."""
    why = f"it has {what}, which these languages lack"
    return BuildError("A kernel cannot be written for a GPU", why=why, fix="name a CPU as the target")
