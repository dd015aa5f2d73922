"""A real S3 server, moto's, in a thread and on a free port of the loopback interface."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

BUCKET = "shelf"
SECRET = "a-secret-that-nothing-may-print"


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A bucket, and what a test does with it besides the code under test."""

    url: str

    @property
    def filesystem(self) -> fs.S3FileSystem:
        """With rights to make buckets, which the code under test does not have."""
        host = self.url.removeprefix("http://")
        return fs.S3FileSystem(
            access_key="test",
            secret_key=SECRET,
            endpoint_override=host,
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
            allow_bucket_deletion=True,
        )

    def empty(self) -> None:
        """Make the bucket, or remove all objects from it."""
        self.filesystem.create_dir(BUCKET)
        self.filesystem.delete_dir_contents(BUCKET)

    def environment(self) -> dict[str, str]:
        """What names the store to the code under test."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def put(self, key: str, content: bytes | str) -> None:
        """Write an object."""
        data = content.encode() if isinstance(content, str) else content
        with self.filesystem.open_output_stream(f"{BUCKET}/{key}") as stream:
            stream.write(data)

    def put_directory(self, key: str, directory: Path) -> None:
        """Write all files of a directory."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(directory).as_posix()}", path.read_bytes())

    def get(self, key: str) -> bytes:
        """Read an object."""
        with self.filesystem.open_input_stream(f"{BUCKET}/{key}") as stream:
            return stream.read()

    def keys(self, under: str = "") -> list[str]:
        """All objects, by key."""
        base = f"{BUCKET}/{under}".rstrip("/")
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        files = (info.path for info in infos if info.type == fs.FileType.File)
        return sorted(path.removeprefix(f"{BUCKET}/") for path in files)

    @contextmanager
    def refusing_credentials(self) -> Iterator[None]:
        """The server knows no user meanwhile."""
        self._check_signatures_after("0")
        try:
            yield
        finally:
            self._check_signatures_after("inf")

    def _check_signatures_after(self, num_requests: str) -> None:
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=num_requests.encode(),
            method="POST",
            headers={"Content-Type": "text/plain"},
        )
        with urllib.request.urlopen(request):
            pass


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """The server, without a bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield ObjectStore(f"http://{host}:{port}")
    finally:
        server.stop()
