"""TVM's RPC servers and trackers on this host, in processes that end with the test, or after some minutes."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

# Continuous integration installs them.
needs_rpc = pytest.mark.skipif(
    not os.environ.get("CI") and not all(map(importlib.util.find_spec, ("cloudpickle", "tornado"))),
    reason="TVM's RPC server and tracker need cloudpickle and tornado",
)
HOST = "127.0.0.1"
LIMIT_S = 300
_PROGRAM = """
import os, sys, threading
from tvm.rpc.{module} import {kind}
threading.Timer({limit}, lambda: os._exit(1)).start()
one = {kind}({host!r}, {port}, {port} + 100, silent=True, {options})
print(one.port, flush=True)
sys.stdin.read()
one.terminate()
os._exit(0)
"""


@dataclass(frozen=True)
class Service:
    """A server or tracker that runs."""

    process: subprocess.Popen[str]
    port: int

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def kill(self) -> None:
        """End it and its sessions at once, as a device that loses its power does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def _service(kind: str, options: str = "") -> Iterator[Service]:
    names = {"kind": kind, "module": kind.lower(), "host": HOST, "port": unused_port(), "limit": LIMIT_S}
    code = _PROGRAM.format(**names, options=options)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    service = Service(process, int(process.stdout.readline()))
    try:
        yield service
    finally:
        service.kill()


@contextmanager
def server(tracker: Service | None = None, key: str = "") -> Iterator[Service]:
    """An RPC server, known to the tracker by its key."""
    options = f"key={key!r}" + (f", tracker_addr=({HOST!r}, {tracker.port})" if tracker else "")
    with _service("Server", options) as one:
        if tracker:
            _wait_until_registered(tracker, one)
        yield one


def _wait_until_registered(tracker: Service, one: Service) -> None:
    """A server registers in a thread of its own, after it has told its port."""
    from tvm.rpc import connect_tracker

    end = time.monotonic() + LIMIT_S / 10
    while all(known["addr"][1] != one.port for known in connect_tracker(HOST, tracker.port).summary()["server_info"]):
        assert one.process.poll() is None, f"the server at {one.address} has ended"
        assert time.monotonic() < end, f"the tracker does not know the server at {one.address}"
        time.sleep(0.05)


@contextmanager
def tracker() -> Iterator[Service]:
    """A tracker."""
    with _service("Tracker") as one:
        yield one


def unused_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as one:
        one.bind((HOST, 0))
        port: int = one.getsockname()[1]
        return port
