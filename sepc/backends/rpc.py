"""Devices that run TVM's RPC server: connections, with what goes wrong told clearly, libraries, and commands.

A server has one session at a time. Everything that is sent is waited for in a thread of its own, so that a device that
is lost without a word is noticed.
"""

from __future__ import annotations

import shlex
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import tvm
from tvm import rpc

from sepc.backends.packed import Packed, TensorType, packed_object
from sepc.c_compiler import cross_compiler, run_compiler
from sepc.cost_model.detect import HostCpu, describe_host, read_host_cpu
from sepc.cost_model.machine import Machine
from sepc.errors import DeviceError, TargetError
from sepc.runtime.manifest import digest
from sepc.target import TRIPLES, Target

PROBE: Final = Path(__file__).with_name("probe.c")
COMMAND_BYTES, OUTPUT_BYTES = 4096, 1 << 20
BASELINES: Final = {"x86-64": "x86-64", "aarch64": "generic"}
DESCRIBE: Final = """uname -m
d=/sys/devices/system/cpu
for f in /proc/cpuinfo $d/online $d/cpu*/topology/thread_siblings_list $d/cpu0/cache/index*/* $d/cpu0/cpufreq/*max_freq
do if [ -f $f ] && [ -r $f ]; then echo "=== $f"; cat $f 2>/dev/null; echo; fi; done
"""
# How TVM begins the message of an error that was raised over there: the connection is as good as before.
_RAISED_THERE: Final = "Error caught from RPC call"
_Result = TypeVar("_Result")


class Board:
    """A session with a device."""

    def __init__(self, session: Any, address: str, timeout_s: float) -> None:
        self.session, self.address, self.timeout_s = session, address, timeout_s
        self.is_lost = False
        self.lock = threading.RLock()
        self._modules: dict[str, Any] = {}
        self._checked: set[Target] = set()

    def do(self, what: str, action: Callable[[], _Result], timeout_s: float | None = None) -> _Result:
        """What `action`, which talks to the device, returns.

        Raises DeviceError: the device was lost, or what it did has failed there; `what` says what that was.
        """
        try:
            return bounded(action, timeout_s or self.timeout_s)
        except TimeoutError as error:
            self.is_lost = True
            why = f"it has not answered for {timeout_s or self.timeout_s:g} s"
            fix = "look after the device; for work that takes long, give sepc.remote a longer timeout_s"
            raise DeviceError(f"The device was lost while {what}", where=self.address, why=why, fix=fix) from error
        except Exception as error:
            if _RAISED_THERE in str(error):
                why = _reason(error)
                raise DeviceError(f"The device failed while {what}", where=self.address, why=why) from error
            self.is_lost = True
            fix = "see what its RPC server printed; the next call connects anew"
            why = f"the connection has ended ({_reason(error)})"
            raise DeviceError(f"The device was lost while {what}", where=self.address, why=why, fix=fix) from error

    def close(self) -> None:
        """End the session, whatever still refers to memory over there.

        One that is lost ends with the last reference to it: a thread may still wait for its answer.
        """
        if self.is_lost:
            return
        self.is_lost = True
        with suppress(Exception):  # It is to be gone, and so it is.
            bounded(self.session.get_function("CloseRPCConnection"), self.timeout_s)

    def module(self, library: bytes, name: str) -> Any:
        """A shared library loaded on the device, uploaded once per session. Raises DeviceError."""
        key = digest(library)
        with self.lock:
            if key not in self._modules:
                file = f"{name}-{key[:16]}.so"
                self.upload(library, file)
                self._modules[key] = self.do("loading a library", lambda: self.session.load_module(file))
            return self._modules[key]

    def upload(self, content: bytes, file: str) -> None:
        """Put a file into the session's directory on the device. Raises DeviceError."""
        self.do("receiving a file", lambda: self.session.upload(bytearray(content), file))

    def tensor(self, shape: Sequence[int], dtype: str) -> Any:
        """Memory on the device."""
        return self.do("allocating memory", lambda: tvm.runtime.empty(tuple(shape), dtype, self.session.cpu(0)))

    def require(self, target: Target) -> None:
        """Nothing, if the device can run code for `target`; raises TargetError otherwise, DeviceError if it is lost."""
        if target in self._checked:
            return
        with self.lock:
            if missing := target.missing_features(self.cpu(target)):
                raise TargetError(
                    f"The device cannot run code compiled for '{target.name}'",
                    where=self.address,
                    why=f"it lacks {', '.join(missing)}",
                    fix=f"compile for what it is, target='{_target_of(self.cpu(target))}'",
                )
            self._checked.add(target)

    def shell(self, command: str, target: Target, timeout_s: float | None = None) -> str:
        """What a command of the device's shell prints; `target` tells its architecture.

        Raises DeviceError, or TargetError if it is of another architecture.
        """
        with self.lock:
            given, printed = self._texts
            given.copyfrom(np.frombuffer(command.encode().ljust(COMMAND_BYTES, b"\0"), np.uint8))
            shell = self._probe(target)["shell"]
            status = self.do("running a command", lambda: shell(given, printed), timeout_s)
            text = str(self.do("answering", printed.numpy).tobytes().split(b"\0", 1)[0], errors="replace")
        if status:
            why = f"status {status}: {text[-200:]}"
            raise DeviceError("A command failed on the device", where=f"{self.address}: {command[:80]}", why=why)
        return text

    def execute(self, program: bytes, arguments: Sequence[str], environment: Mapping[str, str], target: Target) -> str:
        """What a program prints that is linked statically; it has a minute beside the usual time. Raises as `shell`."""
        file = f"program-{digest(program)[:16]}"
        with self.lock:
            self.upload(program, file)
            workpath = self.session.get_function("tvm.rpc.server.workpath")
            path = shlex.quote(str(self.do("receiving a program", lambda: workpath(file))))
            setting = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
            command = f"chmod +x {path} && {setting} {path} {shlex.join(arguments)} 2>&1"
            return self.shell(command, target, self.timeout_s + 60)

    def cpu(self, target: Target) -> HostCpu:
        """The device's processor."""
        architecture, root = self._description(target)
        with root:
            return read_host_cpu(Path(root.name), architecture)

    def machine(self, target: Target) -> Machine:
        """The device's description for the cost model, with what its system reports. Raises TargetError."""
        architecture, root = self._description(target)
        with root:
            return describe_host(read_host_cpu(Path(root.name), architecture), Path(root.name))

    def _description(self, target: Target) -> tuple[str, tempfile.TemporaryDirectory[str]]:
        """The architecture as the device's system names it, and those of its files that describe it, under a root."""
        architecture, *files = self._described(target).split("\n=== ")
        root = tempfile.TemporaryDirectory(prefix="sepc-")
        for text in files:
            name, _, content = text.partition("\n")
            path = Path(root.name) / name.lstrip("/")
            if ".." not in path.parts:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
        return architecture.strip(), root

    def _described(self, target: Target) -> str:
        if not hasattr(self, "_text"):
            self._text = self.shell(DESCRIBE, target)
        return self._text

    @cached_property
    def _texts(self) -> tuple[Any, Any]:
        return self.tensor((COMMAND_BYTES,), "uint8"), self.tensor((OUTPUT_BYTES,), "uint8")

    def _probe(self, target: Target) -> Any:
        try:
            return self.module(probe(target), "probe")
        except DeviceError as error:
            if self.is_lost:
                raise
            raise TargetError(
                f"The device cannot load code for '{target.name}'",
                where=self.address,
                why=error.why,
                fix=f"it is no {target.machine.architecture}, or its C library is too old: compile for what it is",
            ) from error


def connect(host: str, port: int, timeout_s: float) -> Board:
    """A session with the server at that address. Raises DeviceError."""
    address = f"{host}:{port}"
    _require_listener(host, port, "RPC server")
    try:
        session = bounded(lambda: rpc.connect(host, port), timeout_s)
    except TimeoutError as error:
        why = f"it has not answered for {timeout_s:g} s; a server has one session at a time"
        fix = "wait for who uses it, close() what of yours does, or put several devices behind a tracker"
        raise DeviceError("The device is busy, or no RPC server", where=address, why=why, fix=fix) from error
    except Exception as error:
        raise _unreachable(address, _reason(error), "RPC server") from error
    return Board(session, address, timeout_s)


def request(host: str, port: int, key: str, timeout_s: float) -> Board:
    """A session with a free device of that key behind the tracker at that address. Raises DeviceError."""
    address = f"{host}:{port} (key '{key}')"
    tracker = _tracker(host, port, timeout_s)
    try:
        session = bounded(lambda: tracker.request(key, max_retry=1), timeout_s)
    except TimeoutError as error:
        known = ", ".join(sorted({one["key"].removeprefix("server:") for one in _servers(host, port, timeout_s)}))
        why = f"none has come free for {timeout_s:g} s; the tracker has devices of these keys: {known or 'none'}"
        fix = f"start `python -m tvm.exec.rpc_server --tracker {host}:{port} --key {key}` on a device, or wait"
        raise DeviceError(f"There is no free device of the key '{key}'", where=address, why=why, fix=fix) from error
    except Exception as error:
        raise _unreachable(address, _reason(error), "tracker") from error
    return Board(session, address, timeout_s)


def count(host: str, port: int, key: str, timeout_s: float) -> int:
    """How many devices of that key the tracker at that address has, busy ones included. Raises DeviceError."""
    return sum(one["key"] == f"server:{key}" for one in _servers(host, port, timeout_s))


def probe(target: Target) -> bytes:
    """The library that runs commands on a device of the target's architecture, whatever else that lacks."""
    architecture = target.machine.architecture
    llvm = {"kind": "llvm", "mtriple": TRIPLES[architecture], "mcpu": BASELINES[architecture]}
    texts = [TensorType("command", (COMMAND_BYTES,), "uint8", 1), TensorType("output", (OUTPUT_BYTES,), "uint8", 1)]
    with tempfile.TemporaryDirectory(prefix="sepc-") as name:
        directory = Path(name)
        (directory / "packed.o").write_bytes(packed_object({"shell": Packed("sepc_shell", texts)}, llvm))
        flags = ["-shared", "-fPIC", "-O1", f"-DOUTPUT_BYTES={OUTPUT_BYTES}"]
        run_compiler([cross_compiler(target), *flags, "-o", "probe.so", str(PROBE), "packed.o"], directory)
        return (directory / "probe.so").read_bytes()


def bounded(action: Callable[[], _Result], timeout_s: float) -> _Result:
    """What `action` returns or raises; TimeoutError if it takes longer, and then it goes on without anybody waiting."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="sepc-rpc", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _tracker(host: str, port: int, timeout_s: float) -> Any:
    # TVM's own client tries again for a minute where nothing listens.
    _require_listener(host, port, "tracker", connect=True)
    try:
        return bounded(lambda: rpc.connect_tracker(host, port), timeout_s)
    except Exception as error:
        raise _unreachable(f"{host}:{port}", _reason(error), "tracker") from error


def _servers(host: str, port: int, timeout_s: float) -> list[dict[str, Any]]:
    tracker = _tracker(host, port, timeout_s)
    try:
        found: list[dict[str, Any]] = bounded(tracker.summary, timeout_s)["server_info"]
    except Exception as error:
        raise _unreachable(f"{host}:{port}", _reason(error), "tracker") from error
    return found


def _require_listener(host: str, port: int, what: str, *, connect: bool = False) -> None:
    try:
        socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
        if connect:
            socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise _unreachable(f"{host}:{port}", error.strerror or str(error), what) from error


def _unreachable(address: str, why: str, what: str) -> DeviceError:
    module = "rpc_tracker --host 0.0.0.0 --port 9190" if what == "tracker" else "rpc_server --host 0.0.0.0 --port 9090"
    fix = (
        f"start `python -m tvm.exec.{module}` there (pip install apache-tvm cloudpickle tornado), and check the address"
    )
    return DeviceError(f"There is no {what} of TVM's at {address}", where="sepc.remote", why=why, fix=fix)


def _target_of(cpu: HostCpu) -> str:
    family = {"x86-64": "x86", "aarch64": "arm64"}.get(cpu.architecture, cpu.architecture)
    return cpu.llvm_cpu if cpu.llvm_cpu.startswith("x86-64") else f"{family}:{cpu.llvm_cpu}"


def _reason(error: BaseException) -> str:
    """A message on one line, without how TVM begins it."""
    text = " ".join(str(error).rpartition(_RAISED_THERE)[2].split()).lstrip(": ")
    return text[:300] or type(error).__name__
