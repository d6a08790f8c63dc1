"""Global loads and stores of a device function, counted exactly: a walk of its statements, for all threads at once.

Addresses and conditions are numbers of (block, thread, lane); what is loaded does not matter, as no address depends on
it. What a block touches more than once counts once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import tirx

Numbers = NDArray[Any]
ARITHMETIC = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Min": np.minimum,
    "Max": np.maximum,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "LShift": np.left_shift,
    # Of numbers that are not negative, as blocks, threads and loops are.
    "Div": np.floor_divide,
    "FloorDiv": np.floor_divide,
    "Mod": np.mod,
    "FloorMod": np.mod,
}


@dataclass(frozen=True)
class Accesses:
    """What the blocks of a device function touch.

    Attributes:
        loads, stores: by parameter, elements that blocks touch, each block's counted once.
    """

    loads: dict[str, int]
    stores: dict[str, int]

    @staticmethod
    def of(function: Any) -> Accesses:
        """Those of `function`."""
        walk = _Walk(function)
        walk.statement(function.body, np.full((1, 1, 1), True))
        loads, stores = (
            {name: len(np.unique(np.concatenate(found))) for name, found in kind.items()} for kind in walk.touched
        )
        return Accesses(loads, stores)


class _Walk:
    """One pass over the statements. Numbers are arrays over (block, thread, lane), with 1 for what does not matter.

    Attributes:
        touched: loads and stores, by parameter: numbers that stand for a block and an element.
    """

    def __init__(self, function: Any) -> None:
        self.parameters = set(function.params)
        self.names: dict[Any, str] = {}
        self.blocks = np.zeros((1, 1, 1), np.int64)
        self.values: dict[Any, Numbers | None] = {}
        self.touched: tuple[dict[str, list[Numbers]], dict[str, list[Numbers]]] = (defaultdict(list), defaultdict(list))

    # ---- statements

    def statement(self, statement: Any, active: Numbers) -> None:
        """Go through `statement`, executed by the threads that are `active`."""
        kind = type(statement).__name__
        if kind != "AllocBuffer":  # Those are a thread's, or a block's.
            getattr(self, f"_{kind.lower()}")(statement, active)

    def _declbuffer(self, statement: Any, active: Numbers) -> None:
        if statement.data in self.parameters:
            self.names[statement.buffer] = str(statement.data.name)

    def _seqstmt(self, statement: Any, active: Numbers) -> None:
        for one in statement.seq:
            self.statement(one, active)

    def _bind(self, statement: Any, active: Numbers) -> None:
        self.values[statement.var] = self.value(statement.value, active)

    def _for(self, statement: Any, active: Numbers) -> None:
        first, extent = int(statement.min), int(statement.extent)
        for index in range(first, first + extent):
            self.values[statement.loop_var] = np.full((1, 1, 1), index)
            self.statement(statement.body, active)

    def _ifthenelse(self, statement: Any, active: Numbers) -> None:
        condition = self.number(statement.condition, active)
        self.statement(statement.then_case, active & condition)
        if statement.else_case is not None:
            self.statement(statement.else_case, active & ~condition)

    def _bufferstore(self, statement: Any, active: Numbers) -> None:
        self.value(statement.value, active)
        self._touch(1, statement.buffer, statement.indices, active)

    def _evaluate(self, statement: Any, active: Numbers) -> None:
        self.value(statement.value, active)

    def _attrstmt(self, statement: Any, active: Numbers) -> None:
        if statement.attr_key == "thread_extent":
            numbers = np.arange(int(statement.value))
            if statement.node.thread_tag == "blockIdx.x":
                numbers = self.blocks = numbers[:, None, None]
            self.values[statement.node.var] = numbers if numbers.ndim > 1 else numbers[None, :, None]
        self.statement(statement.body, active)

    # ---- expressions

    def number(self, value: Any, active: Numbers) -> Numbers:
        """The numbers of an expression on which addresses depend."""
        found = self.value(value, active)
        assert found is not None, value
        return found

    def value(self, value: Any, active: Numbers) -> Numbers | None:
        """The numbers of an expression; None if they do not matter. What it loads is noted."""
        kind = type(value).__name__
        if isinstance(value, tirx.Var):
            return self.values[value]
        if kind in ("IntImm", "FloatImm"):
            return np.full((1, 1, 1), value.value)
        if kind in ARITHMETIC:
            left, right = self.value(value.a, active), self.value(value.b, active)
            return None if left is None or right is None else np.asarray(ARITHMETIC[kind](left, right))
        if kind == "TensorLoad":
            self._touch(0, value.source, value.indices, active)
            return None
        if kind == "Ramp":
            return self.number(value.base, active) + np.arange(int(value.lanes)) * int(value.stride)
        parts = {
            "Select": lambda: (value.condition, value.true_value, value.false_value),
            "Shuffle": lambda: value.vectors,
            "Call": lambda: value.args,
            "Broadcast": lambda: (value.value,),
            "Cast": lambda: (value.value,),
        }
        for part in parts[kind]():
            if type(part).__name__ != "StringImm":
                self.value(part, active)
        return None

    def _touch(self, kind: int, buffer: Any, indices: Any, active: Numbers) -> None:
        name = self.names.get(buffer)
        if name is None:
            return
        index, size = self.number(indices[0], active), int(buffer.shape[0])
        numbers, mask = np.broadcast_arrays(index + size * self.blocks, active)
        elements = np.broadcast_to(index, numbers.shape)[mask]
        assert ((elements >= 0) & (elements < size)).all(), f"{name} has {size} elements"
        self.touched[kind][name].append(np.unique(numbers[mask]))
