"""Reads YAML files and `key=value` overrides into a checked `Config`."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from distillm_ray.config import Config, expanded_path
from distillm_ray.config.errors import choices_in, explain
from distillm_ray.config.strict_yaml import REFUSALS, dump_yaml, message_of, parse_yaml, shown
from distillm_ray.errors import ConfigError
from distillm_ray.methods import METHODS

MOST_BYTES = 2**18
"""Of a config file. A larger one is another kind of file, named by mistake."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply dotted `key=value` overrides in order, and check the result.

    What is named later wins: the file in `extends`, then the file itself, then the overrides. The
    settings of a `method` win over what was named before it, and lose against keys beside it.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type,
            or values contradict each other. Lists all problems; for an unknown key it suggests the
            nearest known one.
    """
    tree = _tree_of(path, ())
    methods = [one.partition("=")[2] for one in overrides if one.partition("=")[0] == "method"]
    if methods:
        tree = _layered(tree, {"method": methods[-1]})
    for override in overrides:
        try:
            _override(tree, override)
        except REFUSALS as error:
            raise ConfigError(f"override {shown(override)}: {message_of(error)}") from error
    try:
        values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except REFUSALS as error:
        raise ConfigError(f"config file {path} with its overrides: {message_of(error)}") from error
    if wrong := list(_broken_texts(values)):
        raise ConfigError(f"{path}:\n" + "\n".join(wrong))
    return parse_config(values, name=str(path))


def parse_config(values: Any, *, name: str) -> Config:
    """Check a plain tree of values; error messages call it `name`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        items = error.errors()
        wrong = {item["loc"][:-1] for item in items}
        lines = [
            explain(item)
            for item in items
            # A list that loses its wrong items is too short for pydantic.
            if not (item["type"] == "too_short" and item["loc"] in wrong)
        ]
        raise ConfigError(f"{name}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal config."""
    return dump_yaml(config.model_dump(mode="json"))


def _tree_of(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file, on top of those of the file that it extends."""
    file = f"config file {path}"
    text = _read(path)
    try:
        tree = parse_yaml(text)
    except REFUSALS as error:
        raise ConfigError(f"{file} is not valid YAML: {message_of(error)}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} must hold a mapping of sections at its top level, as in `run: {{…}}`, got"
            f" {shown(tree)}"
        )
    below: dict[str, Any] = {}
    if "extends" in tree:
        try:
            base = path.parent / expanded_path(tree.pop("extends"))
        except ValueError as error:
            raise ConfigError(f"{path}:\n  extends: {error}") from error
        if base.resolve() in (one.resolve() for one in (*extending, path)):
            raise ConfigError(f"{file} extends {base}, which leads back to itself: remove one")
        below = _tree_of(base, (*extending, path))
    return _layered(below, tree)


def _layered(below: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` on top of the settings of its method, on top of what was named before."""
    method = tree.get("method")
    if isinstance(method, str) and method in METHODS:
        below = _merged(below, copy.deepcopy(METHODS[method]), [])
    return _merged(below, tree, [])


def _read(path: Path) -> str:
    if os.path.isdir(path):
        raise ConfigError(f"config file {path} is a directory: name a YAML file in it")
    if not os.path.exists(path):
        raise ConfigError(f"config file {path} does not exist")
    if not os.path.isfile(path):
        raise ConfigError(f"config file {path} is a device or a pipe: write a file and name it")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"config file {path} must hold at most {MOST_BYTES:,} bytes, it holds more: name a"
            " YAML file of sections; data files can be listed as one directory"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file {path} must be UTF-8 text, got byte {content[error.start]:#04x} at offset"
            f" {error.start}: it is no text file, or has another encoding; save it as UTF-8"
        ) from error


def _broken_texts(value: Any, key: str = "") -> Iterator[str]:
    """A line for each text with half of a surrogate pair, as from an environment variable."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for part, one in items:
            yield from _broken_texts(one, f"{key}.{part}" if key else str(part))
    elif isinstance(value, str) and _SURROGATE.search(value):
        yield f"  {key}: must be UTF-8 text, got {shown(value)}"


# ---- overrides -----------------------------------------------------------------------------------


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one key. A number in the key is the index of a list's item, as in `loss.terms.0.alpha`.

    A mapping is merged into the one that is there; another `type` in a union replaces the old one
    together with its keys.

    Raises:
        One of REFUSALS: the override has another form, or no place in the tree.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError("must have the form key=value, as in learner.steps=100")
    if _SURROGATE.search(override):
        raise ValueError("must be UTF-8 text")
    if "[" in key or "]" in key:
        raise ValueError("the index of an item follows a dot, as in data.train.0=a.jsonl")
    *ahead, last = parts = key.split(".")
    if "" in parts:
        raise ValueError("a key has a word or a number on each side of a dot")
    value = parse_yaml(text)
    owner: Any = tree
    for end in range(1, len(parts)):
        owner = _opened(tree, owner, parts[:end], following=parts[end])
    old, place = _child(tree, owner, parts), _place(owner, parts)
    if last == "type" and _is_union(ahead) and old not in (None, value):
        owner.clear()
    owner[place] = _merged(old, value, parts)


def _opened(tree: dict[str, Any], owner: Any, parts: list[str], following: str) -> Any:
    """The value at `parts`, whose last one is in `owner`. What is not set becomes a mapping."""
    value = _child(tree, owner, parts)
    if value is None:
        if following.isdigit():
            dotted = ".".join(parts)
            raise ValueError(
                f"{dotted} has no items in the file, so none can be changed: write the whole list,"
                f" as in {dotted}=[…]"
            )
        value = {}
    owner[_place(owner, parts)] = value
    return value


def _child(tree: dict[str, Any], owner: Any, parts: list[str]) -> Any:
    """The value at `parts`; a copy of the section that it is an interpolation of."""
    place = _place(owner, parts)
    value = owner[place] if isinstance(owner, list) else owner.get(place)
    if isinstance(value, str) and "${" in value:
        section = OmegaConf.select(OmegaConf.create(tree), ".".join(parts))
        if OmegaConf.is_config(section):
            return OmegaConf.to_container(section, resolve=True)
    return value


def _place(owner: Any, parts: list[str]) -> Any:
    """The key or index that the last part is in `owner`."""
    name, part = ".".join(parts[:-1]), parts[-1]
    if isinstance(owner, dict):
        return part
    if not isinstance(owner, list):
        raise ValueError(f"{name} is a value, {shown(owner)}, and has no key {part}")
    if part not in map(str, range(len(owner))):
        raise ValueError(
            f"{name} is a list of length {len(owner)} whose first item is {name}.0, and has no item"
            f" {part}; to add one, write the whole list, as in {name}=[…]"
        )
    return int(part)


def _merged(old: Any, new: Any, parts: list[str]) -> Any:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if _is_union(parts) and "type" in new and old.get("type", new["type"]) != new["type"]:
        return new
    return old | {key: _merged(old.get(key), one, [*parts, key]) for key, one in new.items()}


def _is_union(parts: list[str]) -> bool:
    return ".".join(part for part in parts if not part.isdigit()) in choices_in(Config)
