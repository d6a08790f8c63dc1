"""Running what was compiled on a device that runs TVM's RPC server."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sepc.backends.library import MAIN, shared_library
from sepc.bundle.bundle import Bundle
from sepc.bundle.emulation import NAME, ForeignExecutable, memory
from sepc.bundle.library import dtype_name, shapes
from sepc.errors import DeviceError
from sepc.runtime.executable import view
from sepc.runtime.exported import PROFILE, dtype_of, median_times

if TYPE_CHECKING:
    from sepc._remote import Remote
    from sepc.backends.rpc import Board


@dataclass(frozen=True)
class RemoteExecutable(ForeignExecutable):
    """A program that a device runs; `remote` says which. Its library is uploaded once per session."""

    remote: Remote
    _resident: list[Resident] = field(default_factory=list)

    def run(self, inputs: Sequence[torch.Tensor], threads: int, stamps: Array[Any] | None = None) -> list[torch.Tensor]:
        """As `Executable.run`. Raises DeviceError if the device is lost, TargetError if it cannot run the target."""
        board = self.remote.board()
        with board.lock:
            resident = self._on(board)
            resident.give(inputs)
            if stamps is None:
                resident.call(MAIN)
            else:
                stamps[:] = resident.times().tolist()
            storages = resident.take()
        blocks = [torch.empty(0, dtype=torch.uint8), self.constants, *inputs, *storages]
        return [view(reference, blocks) for reference in self.program.results]

    def profile(self, inputs: Sequence[torch.Tensor], threads: int, repeats: int) -> dict[str, float]:
        """As `Executable.profile`: the times are taken on the device."""
        board = self.remote.board()
        with board.lock:
            resident = self._on(board)
            resident.give(inputs)
            resident.call(MAIN)
            return median_times(np.stack([resident.times() for _ in range(repeats)]), self.program.calls)

    @cached_property
    def _bundle(self) -> Bundle:
        return Bundle(
            NAME, self.target.name, self.threads, self.program, self.constants, self.objects, leaves=(), shared=True
        )

    @cached_property
    def _linked(self) -> bytes:
        return shared_library(self._bundle, self.target)

    def _on(self, board: Board) -> Resident:
        """What of this is on that device, put there if need be."""
        if not self._resident or self._resident[0].board is not board:
            board.require(self.target)
            module = board.module(self._linked, NAME)
            self._resident[:] = [Resident(board, module, self._bundle)]
        return self._resident[0]


class Resident:
    """A library that is loaded on a device, and the memory there that it reads and writes."""

    def __init__(self, board: Board, module: Any, bundle: Bundle) -> None:
        self.board, self._module = board, module
        self._inputs, self._outputs = bundle.program.inputs, bundle.program.storages
        own, written = shapes(bundle)
        self._tensors = [
            board.tensor(shape, dtype_name(one.dtype))
            for shape, one in zip((*own, *written), (*self._inputs, *self._outputs), strict=True)
        ]
        self._times = board.tensor((bundle.program.number_of_calls + 1,), "float64")
        self._functions = {name: module[name] for name in (MAIN, PROFILE)}

    def give(self, inputs: Sequence[torch.Tensor]) -> None:
        """Send the inputs."""
        for given, storage, tensor in zip(inputs, self._inputs, self._tensors[: len(inputs)], strict=True):
            if storage.elements:
                array = np.frombuffer(memory(given, storage), dtype_of(dtype_name(storage.dtype)))
                self.board.do("receiving an input", partial(tensor.copyfrom, array))

    def call(self, name: str, *more: Any) -> None:
        """Run a function of the library on its memory, and `more`."""
        function = self._functions[name]
        status = self.board.do("running the model", lambda: function(*self._tensors, *more))
        if status:
            why = f"{name} returns {status}: its threads could not be started"
            raise DeviceError("The model did not run on the device", where=self.board.address, why=why)

    def times(self) -> Any:
        """Run the model; the seconds before and after each of its calls."""
        self.call(PROFILE, self._times)
        return self.board.do("answering", self._times.numpy)

    def take(self) -> list[torch.Tensor]:
        """The outputs."""
        found = []
        for storage, tensor in zip(self._outputs, self._tensors[len(self._inputs) :], strict=True):
            own = torch.empty(storage.elements, dtype=storage.dtype)
            if storage.elements:
                content = bytearray(self.board.do("sending an output", tensor.numpy).tobytes())
                own.copy_(torch.frombuffer(content, dtype=storage.dtype, count=storage.elements))
            found.append(own)
        return found
