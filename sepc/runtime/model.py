"""Compiled models as a user calls them: one specialisation per set of argument shapes and number of threads."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sepc.bundle.emulation import require_runner
from sepc.errors import InputError, SepcError
from sepc.runtime import artifact
from sepc.runtime.report import Profile, RegionReport
from sepc.runtime.signature import Signature, TensorCall, call_key, dense, flatten
from sepc.runtime.specialization import Specialization
from sepc.target import Target

Key = tuple[int, tuple[Any, ...]]


class Model(ABC):
    """A function that runs by compiled kernels. Calls may come from several Python threads. Results never require
    gradients. Attributes describe what was compiled last.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._runnable = False  # Not known yet.
        self._specializations: dict[Key, Specialization] = {}
        self._latest: Specialization | None = None
        self._usual: tuple[TensorCall, Specialization] | None = None  # The last call of tensors alone.

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's result for these arguments.

        What is for another architecture runs under emulation, where the tools for that are installed. Raises
        InputError for arguments that do not fit, TargetError where this host cannot run the target, and what
        `sepc.compile` raises when the shapes are new and the model may compile.
        """
        usual = self._usual
        if usual is not None and not kwargs and usual[0].fits(self.threads, args):
            return usual[1].run(args)
        if not self._runnable:
            self._require_runnable()
            self._runnable = True
        specialization, tensors = self._resolve(args, kwargs)
        if not kwargs and (call := TensorCall.of(self.threads, args, tensors)) is not None:
            self._usual = call, specialization
        return specialization.run(tensors)

    @property
    @abstractmethod
    def threads(self) -> int:
        """How many threads a call uses."""

    @property
    def regions(self) -> list[RegionReport]:
        """The regions, in execution order."""
        return list(self._current().description.regions)

    @property
    def arena_bytes(self) -> int:
        """Bytes of memory for intermediate values and the kernels' scratch, the peak of a call beside its results."""
        return self._current().executable.program.arena_bytes

    def profile(self, *args: Any, repeats: int = 50, **kwargs: Any) -> Profile:
        """Measured time of each region for these arguments, median of so many runs, beside its prediction."""
        self._require_runnable(timed=True)
        specialization, tensors = self._resolve(args, kwargs)
        specialization.run(tensors)
        return Profile.of(specialization.description.regions, specialization.profile(tensors, repeats))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything compiled so far to a file that `sepc.load` reads; an existing file is replaced.

        Raises SepcError if nothing is compiled yet, ArtifactError if a part of the model cannot be written.
        """
        self._current()
        different = {id(one): one for one in self._specializations.values()}
        artifact.save(Path(path), self.target, different.values())

    def _require_runnable(self, *, timed: bool = False) -> None:
        """Nothing, if it can run, and with `timed` tell how long that takes; raises TargetError otherwise."""
        if timed:
            self.target.require_runnable()
        else:
            require_runner(self.target)

    def _current(self) -> Specialization:
        if self._latest is None:
            raise SepcError(
                "Nothing is compiled yet",
                why="compilation happens at the first call, when the input shapes are known",
                fix="call the model once, or pass example_inputs to sepc.compile",
            )
        return self._latest

    def _resolve(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Specialization, list[torch.Tensor]]:
        """The specialisation for these arguments, made if it is new, and their tensors as it takes them."""
        key, leaves, spec = self._key(args, kwargs)
        known = self._known(key)
        return known or self._missing(key, leaves, spec), [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def _key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Key, list[Any], pytree.TreeSpec]:
        """What these arguments are looked up by, their leaves as specialisations take them, and their structure."""
        leaves, spec = flatten(tuple(args), kwargs)
        leaves = [dense(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        # Work is divided when the kernels are generated, so the number of threads is part of the key.
        return (self.threads, call_key(spec, leaves, self.target.device)), leaves, spec

    def _known(self, key: Key) -> Specialization | None:
        """The specialisation of that key, if there is one."""
        try:
            return self._specializations.get(key)
        except TypeError as error:
            raise InputError(
                "An argument is neither a tensor nor a plain value", why=str(error), fix="pass tensors and numbers only"
            ) from error

    @abstractmethod
    def _missing(self, key: Key, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Specialization:
        """The specialisation for a key that is in no table yet, or InputError."""


class LoadedModel(Model):
    """A model from a file; see `sepc.load`. It runs for the shapes that it was saved with.

    It runs with the number of threads that it was compiled for: that of ``torch.get_num_threads()`` if the file has
    kernels for so many, else the most that it has.
    """

    def __init__(self, path: Path, target: Target, specializations: Sequence[Specialization]) -> None:
        super().__init__(target)
        self._runnable = True  # Else there would be no such file to load.
        self._path = path
        self._specializations = {one.key: one for one in specializations}
        self._latest = specializations[-1]
        self._counts = sorted({one.description.threads for one in specializations})

    @property
    def threads(self) -> int:
        """How many threads a call uses."""
        wanted = torch.get_num_threads()
        return wanted if wanted in self._counts else self._counts[-1]

    @property
    def graph_module(self) -> fx.GraphModule:
        """Raises SepcError, as a file does not hold the graph."""
        self._refuse("the optimised graph")

    @property
    def compile_times(self) -> Mapping[str, float]:
        """Raises SepcError, as a file does not hold these."""
        self._refuse("the times of its compilation")

    def source(self, region: RegionReport | str, form: str = "tirx") -> str:
        """Raises SepcError, as a file does not hold sources."""
        self._refuse("the source of its kernels")

    def explain(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises SepcError, as a file does not hold what was decided."""
        self._refuse("why it became what it is")

    def _refuse(self, what: str) -> NoReturn:
        raise SepcError(
            f"A loaded model does not know {what}",
            where=str(self._path),
            why="the file holds what it takes to run the model, and nothing of the compiler",
            fix="compile the model by sepc.compile, and look there",
        )

    def _missing(self, key: Key, leaves: Sequence[Any], spec: pytree.TreeSpec) -> Specialization:
        # Of these shapes there may be kernels for another number of threads.
        fitting = [one for one in self._specializations.values() if one.key[1] == key[1]]
        if fitting:
            self._specializations[key] = max(fitting, key=lambda one: one.description.threads)
            return self._specializations[key]
        signatures = [one.description.signature for one in self._specializations.values()]
        there = dict.fromkeys(f"({one})" for one in signatures)
        why = f"the file holds kernels for {', '.join(there)}"
        if all(one.spec != spec for one in signatures):
            why = f"the file holds kernels for calls like {signatures[-1].spec}, this one is {spec}"
        raise InputError(
            f"There are no kernels for arguments ({Signature.of(spec, leaves)})",
            where=str(self._path),
            why=why,
            fix="give arguments of these shapes, or compile and save the model for yours as well",
        )


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """The model that `CompiledModel.save` wrote to `path`, ready to run; TVM is not needed.

    A file holds machine code, which cannot be checked: load only what you would run.

    Raises:
        ArtifactError: the file is damaged, not of sepc, of another format, or for a processor that this host lacks.
    """
    target, specializations = artifact.load(Path(path))
    return LoadedModel(Path(path), target, specializations)
