# SPDX-License-Identifier: Apache-2.0
"""A connection that can be cut: what stands between a client and a server of the tests."""

from __future__ import annotations

import contextlib
import socket
import threading
from urllib.parse import urlsplit

from cluster.local import free_port


class Proxy:
    """Passes bytes on while it is up; down, it ends its connections and takes no new ones."""

    def __init__(self, to: str) -> None:
        target = urlsplit(to)
        self._to = (target.hostname, target.port)
        self._port = free_port()
        self._ends: list[socket.socket] = []
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Proxy:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._ends.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._to)
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
