"""How numbers lie in memory: a thread computes in float32 what they are, and converts halves as it loads and stores.

In CUDA C a half is converted by a cast. OpenCL C has types of halves only where a device computes in them, but loads
and stores them everywhere, by functions; a buffer of halves is one of 16-bit integers there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tvm import tirx

from sepc.backends.stages.vector import Expr
from sepc.ir.element import FLOAT16, FLOAT32

Stmt = Any
Buffer = Any

VECTOR_BYTES: Final = 16
"""The most that a thread loads or stores at once."""

_OPENCL_MACROS: Final = """
#define sepc_load_{space}(p) vload_half(0, (__{space} half*)(p))
#define sepc_store_{space}(p, value) vstore_half(value, 0, (__{space} half*)(p))
#define sepc_load_vector_{space}(p, array, n) vstore##n(vload_half##n(0, (__{space} half*)(p)), 0, array)
#define sepc_store_vector_{space}(p, array, n) vstore_half##n(vload##n(0, array), 0, (__{space} half*)(p))"""
_OPENCL_ROUNDING: Final = """
static inline float sepc_half(float value) {
  ushort bits;
  vstore_half(value, 0, (half*)&bits);
  return vload_half(0, (const half*)&bits);
}
"""
OPENCL_HELPERS: Final = "".join([*(_OPENCL_MACROS.format(space=one) for one in ("global", "local")), _OPENCL_ROUNDING])
"""Loads and stores of halves by the space that a pointer is of, and rounding to them.

These are macros, as what TVM prints of a call inside of a call has a type of its own choice.
"""


@dataclass(frozen=True)
class Storage:
    """Numbers that lie in memory in the type that they have in registers.

    Attributes:
        element: the type of the buffers. array: that of a thread's array through which whole vectors go.
    """

    element: str
    array: str

    def held(self, value: Expr) -> Expr:
        """A number of a register, as such an array holds it."""
        return value

    def taken(self, value: Expr) -> Expr:
        """A number of such an array, as a register has it."""
        return value

    def load(self, buffer: Buffer, place: Expr) -> Expr:
        """One number."""
        return self.taken(buffer[place])

    def store(self, buffer: Buffer, place: Expr, value: Expr) -> Stmt:
        """The same the other way."""
        return tirx.BufferStore(buffer, self.held(value), [place])

    def load_vector(self, buffer: Buffer, place: Expr, array: Buffer, first: int, lanes: int) -> Stmt:
        """`lanes` neighbours, from `place` on, to an array, from its element `first` on."""
        return tirx.BufferStore(array, buffer[tirx.Ramp(place, 1, lanes)], [tirx.Ramp(first, 1, lanes)])

    def store_vector(self, buffer: Buffer, place: Expr, array: Buffer, first: int, lanes: int) -> Stmt:
        """The same the other way."""
        return tirx.BufferStore(buffer, array[tirx.Ramp(first, 1, lanes)], [tirx.Ramp(place, 1, lanes)])

    def rounded(self, value: Expr) -> Expr:
        """What a register has of `value` after memory had it."""
        return self.taken(self.held(value))


@dataclass(frozen=True)
class CastHalves(Storage):
    """Halves in CUDA C."""

    def held(self, value: Expr) -> Expr:
        """See `Storage`."""
        return tirx.Cast(FLOAT16.name, value)

    def taken(self, value: Expr) -> Expr:
        """See `Storage`."""
        return tirx.Cast(FLOAT32.name, value)


@dataclass(frozen=True)
class CalledHalves(Storage):
    """Halves in OpenCL C."""

    def load(self, buffer: Buffer, place: Expr) -> Expr:
        """See `Storage`."""
        return tirx.call_pure_extern(FLOAT32.name, f"sepc_load_{_space(buffer)}", tirx.address_of(buffer[place]))

    def store(self, buffer: Buffer, place: Expr, value: Expr) -> Stmt:
        """See `Storage`."""
        return _call(f"sepc_store_{_space(buffer)}", tirx.address_of(buffer[place]), value)

    def load_vector(self, buffer: Buffer, place: Expr, array: Buffer, first: int, lanes: int) -> Stmt:
        """See `Storage`."""
        pointers = tirx.address_of(buffer[place]), tirx.address_of(array[first])
        return _call(f"sepc_load_vector_{_space(buffer)}", *pointers, lanes)

    def store_vector(self, buffer: Buffer, place: Expr, array: Buffer, first: int, lanes: int) -> Stmt:
        """See `Storage`."""
        pointers = tirx.address_of(buffer[place]), tirx.address_of(array[first])
        return _call(f"sepc_store_vector_{_space(buffer)}", *pointers, lanes)

    def rounded(self, value: Expr) -> Expr:
        """See `Storage`."""
        return tirx.call_pure_extern(FLOAT32.name, "sepc_half", value)


FLOATS: Final = Storage(FLOAT32.name, FLOAT32.name)
HALVES: Final = {"cuda": CastHalves(FLOAT16.name, FLOAT16.name), "opencl": CalledHalves("uint16", FLOAT32.name)}
"""Halves, by language."""


def _space(buffer: Buffer) -> str:
    """What OpenCL calls the memory that a buffer is in."""
    return "local" if str(buffer.ty.storage_scope).startswith("shared") else "global"


def _call(name: str, *arguments: Any) -> Stmt:
    return tirx.Evaluate(tirx.call_extern("int32", name, *arguments))
