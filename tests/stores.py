# SPDX-License-Identifier: Apache-2.0
"""An S3 server of this machine that can be told to fail, to wait, or to be gone."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import requests
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from offsite_ray.storage import place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

SECRET = "hush-hush"


class Store:
    """A bucket on a real server, with what goes wrong between it and its clients."""

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        self.options = (
            f"endpoint_override=127.0.0.1:{self._server.server_port}&scheme=http&region=us-east-1"
        )
        self.failing: Callable[[str, str], bool] = lambda method, path: False
        """Of a method and a path, whether it is answered by :attr:`status`."""
        self.status = "503 Slow Down"
        self.refused = 0
        """Requests that were."""
        self.held = threading.Event()
        """Set when a request is held."""
        self.holding = ""
        """Part of the path of the uploads that are answered only after :attr:`go_on`."""
        self.go_on = threading.Event()

    def __enter__(self) -> Store:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        # All servers of a process hold the same buckets.
        url = f"http://127.0.0.1:{self._server.server_port}/moto-api/reset"
        requests.post(url, timeout=60).raise_for_status()
        place = place_of(f"{self.uri('')}&allow_bucket_creation=true")
        place.filesystem.create_dir("bucket")
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()

    @contextlib.contextmanager
    def fails(self, failing: Callable[[str, str], bool], status: str) -> Iterator[None]:
        """Answer some requests by a status while the block runs."""
        self.failing, self.status, self.refused = failing, status, 0
        try:
            yield
        finally:
            self.failing = lambda method, path: False

    def uri(self, path: str) -> str:
        """Return the whole URI of something in the bucket, key and secret in it."""
        return f"s3://key:{SECRET}@bucket/{path}?{self.options}"

    def names(self, path: str) -> list[str]:
        """Return what lies below a path, by names from there on."""
        place = place_of(self.uri(path))
        return [file.path.removeprefix(f"bucket/{path}/") for file, _ in place.files()]

    def write(self, path: str, content: bytes) -> None:
        place = place_of(self.uri(path))
        with place.filesystem.open_output_stream(place.path) as stream:
            stream.write(content)

    def read(self, path: str) -> bytes:
        place = place_of(self.uri(path))
        with place.filesystem.open_input_stream(place.path) as stream:
            content: bytes = stream.read()
        return content

    def upload(self, folder: Path, path: str) -> str:
        """Copy a directory as any tool would, and return its URI."""
        for file in sorted(folder.iterdir()):
            self.write(f"{path}/{file.name}", file.read_bytes())
        return self.uri(path)

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.failing(method, path):
            self.refused += 1
            start_response(self.status, [("Content-Length", "0"), ("Connection", "close")])
            return [b""]
        if self.holding and self.holding in path and method in ("PUT", "POST"):
            self.held.set()
            self.go_on.wait(60)
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return answer
