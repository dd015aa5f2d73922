"""Addresses in an object store, as a config writes them: `s3://BUCKET/KEY`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, urlsplit

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_OPTIONS = ("endpoint_override", "region", "scheme")


@dataclass(frozen=True, slots=True)
class RemotePath:
    """An object, or all objects below a prefix. The options are those of pyarrow's addresses.

    Example:
        >>> path = parse_remote_path("s3://models/llama/1b/?region=eu-west-1")
        >>> path.bucket, path.key, path.name, path.options
        ('models', 'llama/1b', '1b', {'region': 'eu-west-1'})
        >>> str(path.child("config.json"))
        's3://models/llama/1b/config.json?region=eu-west-1'
    """

    bucket: str
    key: str  # without slashes at its ends
    query: str = ""
    # Of the objects as they were found at the start, so that all nodes get the same ones.
    version: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}{f'?{self.query}' if self.query else ''}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def options(self) -> dict[str, str]:
        """`endpoint_override`, `region` and `scheme`, where the address has them."""
        return dict(parse_qsl(self.query))

    def child(self, name: str) -> RemotePath:
        """What lies below this prefix under a name with `/` between its parts."""
        return replace(self, key=f"{self.key}/{name}", version=None)

    def at(self, version: str) -> RemotePath:
        """The same address, fixed to the objects that it has now."""
        return replace(self, version=version)


def is_address(text: str) -> bool:
    """Whether a text is an address with a scheme, and no path."""
    return _SCHEME.match(text) is not None


def parse_remote_path(text: str) -> RemotePath:
    """The address of a bucket's object or prefix.

    Raises:
        ValueError: another scheme, no bucket or key, credentials or an unknown option. The message
            never repeats a credential.
    """
    parts = urlsplit(text)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if "@" in parts.netloc or any("key" in name or "token" in name for name in options):
        raise ValueError(
            "must hold no credentials, because configs are written to the run directory: set"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )
    if parts.scheme.lower() != "s3":
        raise ValueError(
            f"must be a path or an address s3://BUCKET/KEY, got {text!r}: other stores are not"
            " supported"
        )
    key = parts.path.strip("/")
    if not parts.netloc or not key:
        raise ValueError(f"must name a bucket and a key, as in s3://BUCKET/KEY, got {text!r}")
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"must have no empty parts, . or .. in its key, got {text!r}")
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown or parts.fragment:
        raise ValueError(
            f"may have the options {', '.join(_OPTIONS)} only, got {text!r}: the key of an object"
            " cannot have ? or #"
        )
    if options.get("scheme", "https") not in ("http", "https"):
        raise ValueError(f"must have the option scheme=http or scheme=https, got {text!r}")
    return RemotePath(bucket=parts.netloc, key=key, query=parts.query)
