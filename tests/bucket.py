"""A local Cloud Storage for tests: gcp-storage-emulator, extended by guarantees that runs need and by failures on request.

The emulator ignores the generation of an object. Here a read returns it and conditions on it hold, without which
TensorStore cannot write. The contents of a bucket at a moment, as a kill leaves them, can be saved and restored.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage

NAME = "bucket"


class Bucket:
    """gs://bucket, empty.

    `kept` has a copy of `storage` as it was when an object of this name had been written, once that is so; `away` the seconds for
    which every request is answered with 503 from then on, and `refused` counts them. Every answer comes `slow` seconds late; the
    next `cut` answers with the content of an object end in the middle.
    """

    def __init__(self) -> None:
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(NAME, self.storage)
        self.kept: dict[str, Storage | None] = {}
        self.away: dict[str, float] = {}
        self.down_until, self.refused = 0.0, 0
        self.slow, self.cut = 0.0, 0

    def written(self, name: str) -> None:
        """An object has been written."""
        if self.kept.get(name, name) is None:
            self.kept[name] = copy.deepcopy(self.storage)
        self.down_until = max(self.down_until, time.monotonic() + self.away.pop(name, 0.0))

    def objects(self) -> dict[str, Any]:
        """All objects by name."""
        return self.storage.objects.get(NAME, {})


class _Handler(RequestHandler):
    def __init__(self, bucket: Bucket, *arguments: Any):
        self._bucket, self._generation = bucket, None
        super().__init__(bucket.storage, *arguments)

    def _answer(self, method: str) -> None:
        where = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(where.query).items()}
        name = query.get("name") or unquote(where.path.rpartition("/o/")[2])
        found = self._bucket.objects().get(name, {}).get("generation", "0")
        if time.monotonic() < self._bucket.down_until:
            self._bucket.refused += 1
            self._refuse(503)
        elif query.get("ifGenerationMatch", found) != found:
            self._refuse(412)
        elif query.get("ifGenerationNotMatch", "0") == found != "0":
            self._refuse(304)
        else:
            self._generation = found if query.get("alt") == "media" else None
            time.sleep(self._bucket.slow)
            if self._generation is not None and self._bucket.cut:
                self._cut_short(method)
            else:
                Router(self).handle(method)
            if method == "POST":
                self._bucket.written(name)

    def _cut_short(self, method: str) -> None:
        """Answer with half of the content, and hang up."""
        self._bucket.cut -= 1
        whole, self.wfile = self.wfile, io.BytesIO()
        Router(self).handle(method)
        answer, self.wfile = self.wfile.getvalue(), whole
        headers = answer.find(b"\r\n\r\n") + 4
        self.wfile.write(answer[: (headers + len(answer)) // 2])
        self.close_connection = True

    def _refuse(self, status: int) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        if self._generation is not None:
            self.send_header("X-Goog-Generation", self._generation)
        super().end_headers()

    do_GET, do_POST, do_PUT, do_PATCH, do_DELETE = map(
        functools.partial(functools.partialmethod, _answer), ("GET", "POST", "PUT", "PATCH", "DELETE")
    )


class _Server(HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected, for example after a late or cut answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket that this process and its children reach as gs://bucket."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    bucket = Bucket()
    server = _Server(("localhost", 0), functools.partial(_Handler, bucket))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://localhost:{server.server_port}"
    mine = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"), address)
    mine |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # no one to sign in with
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    try:
        yield bucket
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        server.shutdown()
        server.server_close()
        thread.join()
