"""`sepc.remote`: devices that run what is compiled here, through TVM's RPC."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from sepc.errors import InputError

if TYPE_CHECKING:
    from sepc.backends.rpc import Board

# A server has one session at a time, which all of a process shares.
_known: WeakValueDictionary[tuple[str, int, str], Remote] = WeakValueDictionary()
_lock = threading.Lock()


class Remote:
    """A device, or several of one kind behind a tracker; see `sepc.remote`. Models share its one connection."""

    def __init__(self, host: str, port: int, key: str, timeout_s: float) -> None:
        self.host, self.port, self.key, self.timeout_s = host, port, key, timeout_s
        self._board: Board | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        """As it was made."""
        key = f", key={self.key!r}" if self.key else ""
        return f"sepc.remote('{self.host}:{self.port}'{key})"

    def board(self) -> Board:
        """The device that models run on, connected now if need be. Raises DeviceError."""
        with self._lock:
            if self._board is None or self._board.is_lost:
                self._board = None  # Its session ends before the next one begins.
                self._board = self._connect()
            return self._board

    @contextmanager
    def boards(self) -> Iterator[list[Board]]:
        """All devices of the key behind the tracker, or the one that there is; for the time of a ``with``.

        Waits for those that are in use. Raises DeviceError.
        """
        if not self.key:
            yield [self.board()]
            return
        more = max(0, self.count() - 1)
        own = self.board()
        with ThreadPoolExecutor(max(1, more)) as pool:
            others = list(pool.map(lambda _: self._connect(), range(more)))
        try:
            yield [own, *others]
        finally:
            for one in others:
                one.close()

    def count(self) -> int:
        """How many devices there are, busy ones included. Raises DeviceError."""
        from sepc.backends import rpc

        return rpc.count(self.host, self.port, self.key, self.timeout_s) if self.key else 1

    def another(self) -> Remote:
        """The same address with a connection of its own: to another device, if there are several behind a tracker."""
        return Remote(self.host, self.port, self.key, self.timeout_s)

    def close(self) -> None:
        """End the connection: others may use the device. The next call connects anew."""
        with self._lock:
            if self._board is not None:
                self._board.close()
            self._board = None

    def _connect(self) -> Board:
        from sepc.backends import rpc

        if self.key:
            return rpc.request(self.host, self.port, self.key, self.timeout_s)
        return rpc.connect(self.host, self.port, self.timeout_s)


def remote(address: str, key: str = "", *, timeout_s: float = 60.0) -> Remote:
    """A device that runs compiled models: ``sepc.compile(model, target=…, runner=sepc.remote("host:9090"))``.

    On the device TVM's RPC server runs: ``python -m tvm.exec.rpc_server --host 0.0.0.0 --port 9090``. It does whatever
    it is told by anybody who reaches it: keep it inside of a network that you trust.

    Args:
        address: ``host:port`` of the device's server, or with a key of a tracker.
        key: what devices of one kind are registered by at the tracker.
        timeout_s: how long to wait for a device, and for each of its answers.

    Nothing is connected yet. Raises InputError for an address that is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"{address!r} is no address", where="sepc.remote", fix='give "host:port", such as "rpi:9090"')
    with _lock:
        found = _known.get((host, int(port), key))
        if found is None:
            found = _known[host, int(port), key] = Remote(host, int(port), key, timeout_s)
        found.timeout_s = timeout_s
        return found
