"""Types of values: numbers, paths, dates, and what may change when a run is resumed."""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
)

from distillm_ray.config.remote_path import RemotePath, is_address, parse_remote_path

T = TypeVar("T")

RESUMABLE = "may change on resume"
MayChange: TypeAlias = Annotated[T, RESUMABLE]


def _no_flag(value: Any) -> Any:
    """Refuse booleans, which pydantic would read as 0 and 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


LARGEST_INTEGER = 2**53
"""Up to here, NumPy, torch and JSON readers hold every integer exactly."""

Integer = Annotated[int, BeforeValidator(_no_flag), Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Number = Annotated[float, BeforeValidator(_no_flag)]
Positive = Annotated[Integer, Field(ge=1)]
NonNegative = Annotated[Integer, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Open01 = Annotated[Number, Field(gt=0.0, lt=1.0)]
Amount = Annotated[Number, Field(ge=0.0)]
Above0 = Annotated[Number, Field(gt=0.0)]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float32"]
"""`auto` is bfloat16 where the processor computes it natively, else float32."""

_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_LABEL_PREFIX = re.compile(r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?")


def _label_key(text: str) -> str:
    _label(_LABEL_PREFIX.sub("", text, count=1))
    return text


def _label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise ValueError(
            "must be at most 63 letters, digits, -, _ and ., the first and last of them a letter or"
            f" digit, got {text!r}: Ray and Kubernetes take no other labels"
        )
    return text


LabelKey = Annotated[str, AfterValidator(_label_key)]
LabelValue = Annotated[str, AfterValidator(_label)]
"""Labels of nodes, as Ray and Kubernetes write them. A key may begin with a domain and a slash."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)


def expanded_path(value: Any) -> Path:
    """The path that a user wrote, with `$NAME` and a leading `~` expanded. A `Path` stays as it is.

    Raises:
        ValueError: the value is empty or no path, a variable is not set, or a user does not exist.
    """
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a path, got {value!r}: write a file or directory, in quotes")
    text = os.path.expanduser(_VARIABLE.sub(_variable, value))
    if is_address(text):
        parse_remote_path(text)  # one with credentials must not be repeated in a message
        raise ValueError(f"must be a path on a disk, got {text!r}: copy it there first")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"must be UTF-8 text without null characters, got {text!r}")
    if text.startswith("~"):
        raise ValueError(
            f"must begin with the home directory of a user, got {text!r}: there is no such user;"
            " for a name that begins with ~ write ./~"
        )
    return Path(text)


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    if name not in os.environ:
        raise ValueError(
            f"must name variables that are set, got {match[0]} in {match.string!r}: the environment"
            f" has no {name}; set it, or write the path out"
        )
    return os.environ[name]


def _absolute(path: Path) -> Path:
    """The path from the root. It expands to itself, so a saved config reads back as it was."""
    absolute = path.absolute()
    if again := _VARIABLE.search(str(absolute)):
        raise ValueError(
            f"must not lead to a path with {again[0]} in it, got {str(absolute)!r}: a job that"
            f" reads the saved config would expand {again[0]}; use a directory of another name"
        )
    return absolute


AbsolutePath = Annotated[Path, BeforeValidator(expanded_path), AfterValidator(_absolute)]
"""Relative paths are resolved where the job starts: Ray's workers run in other directories."""


def _location(value: Any) -> Path | RemotePath:
    """A path, or the address that a user wrote, with `$NAME` expanded.

    Raises:
        ValueError: as `expanded_path` and `parse_remote_path` do.
    """
    if isinstance(value, RemotePath):
        return value
    if isinstance(value, str):
        text = _VARIABLE.sub(_variable, value)
        if is_address(text):
            return parse_remote_path(text)
    return _absolute(expanded_path(value))


Location: TypeAlias = Annotated[
    Path | RemotePath,
    PlainValidator(_location),
    PlainSerializer(str, return_type=str, when_used="json"),
]
"""A path, or an address in an object store. `remote/inputs.py` brings it to a node."""


def type_unless_given(name: str) -> BeforeValidator:
    """A choice of several sections that may leave out its `type`, as in `template: {system: x}`."""

    def add(value: Any) -> Any:
        return {"type": name, **value} if isinstance(value, dict) and "type" not in value else value

    return BeforeValidator(add)


def moment(value: Any) -> Any:
    """ISO 8601 only: pydantic would read 20261125 as seconds since 1970."""
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value)
        except ValueError:
            pass
    if isinstance(value, datetime):
        return value
    raise ValueError(f"must be a date, as in 2026-11-25 or 2026-11-25T12:00:00, got {value!r}")


def shown_range(value: dict[str, Any]) -> str:
    """A small mapping as a config file spells it."""
    return f"{{{', '.join(f'{key}: {one}' for key, one in value.items())}}}"


class Section(BaseModel):
    """Frozen. Unknown keys, infinite numbers and NaN are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )
