# SPDX-License-Identifier: Apache-2.0
"""A website that answers by a status and headers alone."""

from __future__ import annotations

import contextlib
import http.server
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Answer = tuple[int, dict[str, str]]


@contextlib.contextmanager
def website(answer: Callable[[str], Answer]) -> Iterator[str]:
    """Answer GET on loopback while the block runs.

    Args:
        answer: Given a path, returns the status and the headers of its answer.

    Yields:
        The website's URL.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
