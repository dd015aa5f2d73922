"""An object store through pyarrow, with errors that a user can act on.

Credentials come from the environment or from what AWS's libraries find by themselves. They are
neither read nor logged here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from distillm_ray.config import RemotePath
from distillm_ray.errors import StoreError

CONNECT_TIMEOUT_S = 5.0
MAX_ATTEMPTS = 4  # of a request, with growing pauses: some seconds together
CHUNK_BYTES = 8 * 2**20  # in memory for each transfer
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
PLACE_VARIABLES = (*_ENDPOINT_VARIABLES, *_REGION_VARIABLES)
"""What says where a store is. None of them is a secret."""
_DENIED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID"
    "|UNRECOGNIZED_CLIENT|EXPIRED_TOKEN|INVALID_SIGNATURE|MISSING_AUTHENTICATION|HTTP Status 40[13]"
)
_UNREACHABLE = re.compile("NETWORK_CONNECTION|REQUEST_TIMEOUT|curlCode")
_DETAIL = re.compile(r"Details: (.*)", re.DOTALL)
_AWS_ERROR = re.compile(r"AWS Error (.*)", re.DOTALL)
_REQUEST_ID = re.compile(r"\s*\(Request ID: [^)]*\)")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a listing says about an object."""

    size: int  # in bytes
    modified_ns: int  # since the epoch, by the store's clock; most stores count whole seconds


class RemoteDirectory:
    """The objects below an address, by their names relative to it.

    Every method raises StoreError where the store refuses, fails or cannot be reached.
    """

    def __init__(self, address: RemotePath) -> None:
        """Does not access the store."""
        self.address = address
        self._root = f"{address.bucket}/{address.key}"

    def files(self, under: str = "") -> dict[str, StoredObject]:
        """All objects below the address, or below a name in it; empty if there are none."""
        base = f"{self._root}/{under}" if under else self._root
        with self._explained() as filesystem:
            try:
                infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
            except FileNotFoundError:  # a bucket that does not exist is another error
                return {}
        found = {
            info.path.removeprefix(f"{self._root}/"): _stored(info)
            for info in infos
            if info.type == fs.FileType.File
        }
        if strange := next((name for name in found if ".." in name.split("/")), None):
            raise StoreError(f"{self.address}: the key {strange} cannot be a path; rename it")
        return found

    def itself(self) -> StoredObject | None:
        """The object at the address itself; None if there is none."""
        with self._explained() as filesystem:
            info = filesystem.get_file_info(self._root)
        return _stored(info) if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes | None:
        """The content of a small object; None if there is none."""
        with self._explained() as filesystem:
            path = self._path(name)
            if filesystem.get_file_info(path).type != fs.FileType.File:
                return None
            with filesystem.open_input_stream(path) as stream:
                return stream.read()

    def write(self, name: str, content: bytes) -> None:
        """Write or replace an object. It appears complete or not at all."""
        with (
            self._explained() as filesystem,
            filesystem.open_output_stream(self._path(name)) as out,
        ):
            out.write(content)

    def upload(self, source: Path, name: str) -> None:
        """Write or replace an object with a file's content.

        A process that is killed leaves no object. After an error of the local disk it may be short:
        whoever relies on it compares its size.
        """
        with (
            source.open("rb") as file,
            self._explained() as filesystem,
            filesystem.open_output_stream(self._path(name)) as out,
        ):
            while chunk := file.read(CHUNK_BYTES):
                out.write(chunk)

    def download(self, name: str, target: Path, progress: Callable[[int], None]) -> None:
        """Write an object to a file, whose folder is made; `name` may be empty: the address itself.

        `progress` gets the number of bytes of each part; what it raises ends the download.

        Raises:
            OSError: the disk is full, for example; `filename` is set.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._explained() as filesystem:
            stream = filesystem.open_input_stream(self._path(name))
        with stream, target.open("wb") as file:
            while True:
                with self._explained():
                    chunk = stream.read(CHUNK_BYTES)
                if not chunk:
                    return
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    error.filename = error.filename or str(target)
                    raise
                progress(len(chunk))

    def delete(self, name: str) -> None:
        """Delete an object, or all below a name. What does not exist is deleted already."""
        path = self._path(name)
        with self._explained() as filesystem:
            match filesystem.get_file_info(path).type:
                case fs.FileType.File:
                    filesystem.delete_file(path)
                case fs.FileType.Directory:
                    filesystem.delete_dir(path)

    def filesystem_and_path(self, name: str) -> tuple[fs.FileSystem, str]:
        """What a library needs that writes by itself."""
        with self._explained() as filesystem:
            return filesystem, self._path(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _explained(self) -> Iterator[fs.FileSystem]:
        """The filesystem; errors of pyarrow in the block become a user's."""
        where = endpoint(self.address)
        try:
            yield _filesystem(where, self.address.options.get("region") or _region())
        except StoreError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise StoreError(_explanation(self.address, where, str(error))) from error


def endpoint(address: RemotePath) -> str | None:
    """`SCHEME://HOST[:PORT]` of the store; None: AWS."""
    options = address.options
    given = options.get("endpoint_override")
    if given is None:
        given = next((os.environ[name] for name in _ENDPOINT_VARIABLES if os.environ.get(name)), "")
    if not given:
        return None
    scheme, _, host = given.rpartition("://")
    return f"{options.get('scheme') or scheme or 'https'}://{host.rstrip('/')}"


def _region() -> str | None:
    return next((os.environ[name] for name in _REGION_VARIABLES if os.environ.get(name)), None)


@lru_cache
def _filesystem(where: str | None, region: str | None) -> fs.S3FileSystem:
    """Clients are reused: each has connections and credentials of its own."""
    scheme, _, host = (where or "https://").partition("://")
    return fs.S3FileSystem(
        endpoint_override=host or None,
        scheme=scheme,
        # With an endpoint of its own a store has no regions: any will do.
        region=region or ("us-east-1" if where else None),
        connect_timeout=CONNECT_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=MAX_ATTEMPTS),
    )


def _stored(info: fs.FileInfo) -> StoredObject:
    return StoredObject(size=info.size, modified_ns=info.mtime_ns or 0)


def _explanation(address: RemotePath, where: str | None, error: str) -> str:
    """Rule, value and remedy for what pyarrow said."""
    place = where or "AWS"
    match = _DETAIL.search(error) or _AWS_ERROR.search(error)
    said = _REQUEST_ID.sub("", (match[1] if match else error).strip().splitlines()[0])
    if "NO_SUCH_BUCKET" in error:
        return f"{address}: there is no bucket {address.bucket} at {place}"
    if _UNREACHABLE.search(error):
        return (
            f"{address}: {place} cannot be reached ({said}); set AWS_ENDPOINT_URL to the store's"
            " address, or start it"
        )
    if _DENIED.search(error):
        known = "AWS_ACCESS_KEY_ID" in os.environ
        return (
            f"{address}: {place} refuses {'the credentials' if known else 'access'} ({said}); set"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of a user who may"
            f" access this bucket{'' if known else ', they are not set'}"
        )
    return f"{address}: {place} failed: {said}"
