"""Reads YAML files and `key=value` overrides into a checked `Config`."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from distillm_ray.config import Config
from distillm_ray.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply dotted `key=value` overrides in order, and check the result.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type,
            or values contradict each other. Lists all problems; for an unknown key it suggests the
            nearest known one.
    """
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"config file {path} must hold a mapping of sections at its top level")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(
                f"override {override!r} must have the form key=value, as in learner.steps=100"
            )
    try:
        tree = _with_word_keys(tree)
        for override in overrides:
            tree = _with_override(tree, override)
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} with its overrides: {error}") from error
    return parse_config(values, name=str(path))


def parse_config(values: Any, *, name: str) -> Config:
    """Check a plain tree of values; error messages call it `name`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{name}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _with_override(tree: DictConfig, override: str) -> DictConfig:
    """The tree with one key set; another `type` replaces the old one together with its keys.

    A number in the key is the index of a list's item, as in `loss.terms.0.alpha=0.1`.
    """
    patch = _with_word_keys(OmegaConf.from_dotlist([override]))
    key = override.partition("=")[0]
    owner = key.removesuffix(".type")
    old, new = OmegaConf.select(tree, owner), OmegaConf.select(patch, owner)
    both = isinstance(old, DictConfig) and isinstance(new, DictConfig)
    if both and "type" in new and old.get("type") != new["type"]:
        OmegaConf.update(tree, owner, {}, merge=False)
    parts = key.split(".")
    on_the_way = [".".join(parts[: end + 1]) for end in range(len(parts))]
    if any(isinstance(OmegaConf.select(tree, one), ListConfig) for one in on_the_way):
        # OmegaConf.merge replaces a list by a mapping of its indices.
        value = OmegaConf.select(patch, key)
        both = OmegaConf.is_dict(value) and OmegaConf.is_dict(OmegaConf.select(tree, key))
        OmegaConf.update(tree, key, value, merge=both)
        return tree
    merged = OmegaConf.merge(tree, patch)
    assert isinstance(merged, DictConfig)
    return merged


def _with_word_keys(tree: DictConfig) -> DictConfig:
    """The tree with the key `on`, which YAML 1.1 reads as true, as the word it is in a config."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {"on" if key is True else key: convert(one) for key, one in value.items()}
        return [convert(one) for one in value] if isinstance(value, list) else value

    return OmegaConf.create(convert(OmegaConf.to_container(tree, resolve=False)))


def _explain(item: Any) -> str:
    """One line for one pydantic error: key, rule, value."""
    keys: list[str | int] = []  # an integer is the index of a list's item
    tag = ""  # of the innermost union on the way
    choices = _choices(Config)
    for part in item["loc"]:
        # pydantic puts the chosen union member into the location, by its tag or its annotation
        if part in choices.get(_dotted_without_indices(keys), ()):
            tag = part
        elif isinstance(part, int) or "[" not in part:
            keys.append(part)
    dotted = _dotted(keys) or "the config"
    tags = choices.get(_dotted_without_indices(keys), ())
    value = "" if isinstance(item["input"], dict) else f", got {item['input']!r}"
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
        case "model_type":
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


def _choices(section: type[BaseModel], prefix: str = "") -> dict[str, tuple[str, ...]]:
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
            found |= _choices(member, f"{prefix}{name}.")
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
