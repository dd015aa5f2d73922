"""Says what is wrong with a config in the words of its keys, where pydantic speaks of types."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from distillm_ray.config import Config
from distillm_ray.config.strict_yaml import shown


def explain(item: Any) -> str:
    """One line for one pydantic error: key, rule, value."""
    keys: list[str | int] = []  # an integer is the index of a list's item
    tag = ""  # of the innermost union on the way
    choices = choices_in(Config)
    for part in item["loc"]:
        # pydantic puts the chosen union member into the location, by its tag or its annotation
        if part in choices.get(_dotted_without_indices(keys), ()):
            tag = part
        elif isinstance(part, int) or "[" not in part:
            keys.append(part)
    dotted = _dotted(keys) or "the config"
    tags = choices.get(_dotted_without_indices(keys), ())
    value = "a mapping" if isinstance(item["input"], dict) else shown(item["input"])
    value = f", got {value}"
    message = str(item["msg"]).removeprefix("Value error, ")
    match item["type"]:
        case "extra_forbidden":
            known = {_with_indices(key, keys) for key in _known_keys(Config)}
            if dotted in known:
                return f"{dotted}: no key of type: {tag}, only of another type"
            nearest = difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            return f"{dotted}: unknown key{hint}"
        case "missing":
            return f"{dotted}: this key is required"
        case "union_tag_not_found":
            return f"{dotted}.type: this key is required, one of {', '.join(tags)}"
        case "union_tag_invalid":
            nearest = difflib.get_close_matches(str(item["ctx"]["tag"]), tags, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            return (
                f"{dotted}.type: must be one of {', '.join(tags)}, got {item['ctx']['tag']}{hint}"
            )
        case "tuple_type":
            return f"{dotted}: must be a list, as in [a, b]{value}"
        case "model_type" | "model_attributes_type":
            return f"{dotted}: must be a mapping of keys to values{value}"
        case "value_error":
            named = not keys or message.startswith(dotted)
            return message if named else f"{dotted}: {message}"
        case _:
            return f"{dotted}: {message}{value}"


def _dotted(keys: Sequence[str | int]) -> str:
    return ".".join(str(key) for key in keys)


def _dotted_without_indices(keys: Sequence[str | int]) -> str:
    """The key as the schema knows it: `loss.terms.0.alpha` is `loss.terms.alpha`."""
    return _dotted([key for key in keys if isinstance(key, str)])


def _with_indices(known: str, keys: Sequence[str | int]) -> str:
    """A key of the schema with the indices of a location, where the two share the list."""
    for end, key in enumerate(keys):
        if isinstance(key, int):
            prefix = _dotted([*(k for k in keys[:end] if isinstance(k, str)), ""])
            if known.startswith(prefix):
                return f"{_dotted(keys[: end + 1])}.{known.removeprefix(prefix)}"
    return known


def choices_in(section: type[BaseModel], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """The tags of each union of sections, by its dotted key."""
    found: dict[str, tuple[str, ...]] = {}
    for name, info in section.model_fields.items():
        members = tuple(_sections_in(info.annotation))
        tags = tuple(
            member.model_fields["type"].default
            for member in members
            if info.discriminator or len(members) > 1
        )
        if tags:
            found[f"{prefix}{name}"] = tags
        for member in members:
            found |= choices_in(member, f"{prefix}{name}.")
    return found


def _known_keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for member in _sections_in(info.annotation):
            yield from _known_keys(member, f"{key}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        for part in typing.get_args(annotation):
            yield from _sections_in(part)
