"""A proxy in front of PostgreSQL that passes a COMMIT on, and cuts the connection before its answer comes back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class CommitProxy:
    """Runs inside `running`. `cut` is how many of the next COMMITs lose their answer; `lost` counts those that did."""

    def __init__(self, port: int) -> None:
        self.cut = self.lost = 0
        self._server_port, self._lock = port, threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    @contextmanager
    def running(self) -> Iterator[CommitProxy]:
        self._start(self._accept)
        try:
            yield self
        finally:
            for each in (self._listening, *self._sockets):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            for thread in self._threads:
                thread.join(timeout=10)
            for each in (self._listening, *self._sockets):
                each.close()

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [client, server]
                cutting = threading.Event()
                self._start(self._pass, client, server, cutting, True)
                self._start(self._pass, server, client, cutting, False)

    def _pass(self, source: socket.socket, target: socket.socket, cutting: threading.Event, watched: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if watched and b"COMMIT" in data and self._takes_one():
                    cutting.set()
                elif not watched and cutting.is_set():  # the server has done it, and says so: nobody hears that
                    break
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _takes_one(self) -> bool:
        with self._lock:
            taken = self.cut > 0
            self.cut -= taken
            self.lost += taken
            return taken
