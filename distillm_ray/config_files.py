"""Reads YAML files and `key=value` overrides into a checked `Config`."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from distillm_ray.config import Config
from distillm_ray.errors import ConfigError

MOST_BYTES = 2**18
"""Of a config file. A larger one is another kind of file, named by mistake."""
MOST_LEVELS = 32
"""Of mappings and lists inside each other; libyaml overflows the stack at some ten thousand."""
MOST_SHOWN = 200
"""Characters of a value in a message."""

_SURROGATE = re.compile("[\ud800-\udfff]")

_REFUSALS = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What PyYAML and OmegaConf raise for text that they do not accept."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply dotted `key=value` overrides in order, and check the result.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, a value has the wrong type,
            or values contradict each other. Lists all problems; for an unknown key it suggests the
            nearest known one.
    """
    file = f"config file {path}"
    text = _read(path)
    try:
        tree = _parse(text)
    except _REFUSALS as error:
        raise ConfigError(f"{file} is not valid YAML: {_message(error)}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{file} must hold a mapping of sections at its top level, as in `run: {{…}}`, got"
            f" {_shown(tree)}"
        )
    for override in overrides:
        try:
            _override(tree, override)
        except _REFUSALS as error:
            raise ConfigError(f"override {_shown(override)}: {_message(error)}") from error
    try:
        values = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except _REFUSALS as error:
        raise ConfigError(f"{file} with its overrides: {_message(error)}") from error
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
            _explain(item)
            for item in items
            # A list that loses its wrong items is too short for pydantic.
            if not (item["type"] == "too_short" and item["loc"] in wrong)
        ]
        raise ConfigError(f"{name}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def dump_config(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal config."""
    values = _escaped(config.model_dump(mode="json"))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that PyYAML writes plainly and reads back as others.

    1e3 is a number for OmegaConf and not for PyYAML; \\x85 is a line break to fold.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+.0-9][-+.0-9_eE]*$"), list("-+.0123456789")
)


def _escaped(value: Any) -> Any:
    """The value with each `${` in a text written so that OmegaConf reads it as text."""
    if isinstance(value, dict):
        return {key: _escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_escaped(one) for one in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


# ---- YAML ----------------------------------------------------------------------------------------


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


def _parse(text: str) -> Any:
    """The plain values of a YAML text, with `${…}` as written.

    The key `on` is a word, not the true of YAML 1.1.

    Raises:
        One of _REFUSALS: the text is not YAML, or has a tag, a key that is no word, or a key twice.
    """
    _check_events(text)
    if (root := yaml.compose(text, Loader=_Loader)) is not None:
        _check_nodes(root)
    # OmegaConf reads 1e-4 as a number, leaves dates as strings and limits how far aliases expand.
    parsed = OmegaConf.from_dotlist([f"text={text}"])
    return _with_word_keys(OmegaConf.to_container(parsed, resolve=False))["text"]


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's parser, which a PyYAML that was built without libyaml lacks."""


def _check_events(text: str) -> None:
    """Refuse tags and deep nesting before anything recursive sees the text."""
    level = 0
    for event in yaml.parse(text, Loader=_Loader):
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if level > MOST_LEVELS:
            raise ValueError(
                f"{_line(event)}: mappings and lists must be nested at most {MOST_LEVELS} deep"
            )
        if tag := getattr(event, "tag", None):
            raise ValueError(f"{_line(event)}: a value must have no tag, got {tag}; remove it")


def _check_nodes(root: yaml.Node) -> None:
    """Refuse keys that are no words or stand twice, and numbers that YAML 1.1 reads as others."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode) and _is_odd_number(node):
            raise ValueError(
                f"{_line(node)}: a number must have no leading zeros and no colons, got"
                f" {_shown(node.value)}: YAML reads it with base 8 or 60; write it with base 10, or"
                " a text in quotes"
            )
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, str] = {}
            for key, value in node.value:
                if not _is_word(key):
                    raise ValueError(
                        f"{_line(key)}: a key must be a word without dots and brackets, got"
                        f" {_written(key)}: no key of a config is a number or a boolean; the keys"
                        " of a section are written in it, as in `learner: {steps: 100}`"
                    )
                if key.value in lines:
                    raise ValueError(
                        f"{_line(key)}: a key may stand once, got {key.value} again after"
                        f" {lines[key.value]}: one of the values would be lost; remove one"
                    )
                lines[key.value] = _line(key)
                waiting.append(value)


_TAG = "tag:yaml.org,2002:"


def _is_odd_number(node: yaml.ScalarNode) -> bool:
    if node.tag not in (f"{_TAG}int", f"{_TAG}float"):
        return False
    return ":" in node.value or re.fullmatch(r"[-+]?0[0-9_]+", node.value) is not None


def _is_word(key: yaml.Node) -> bool:
    if not isinstance(key, yaml.ScalarNode) or set(key.value) & set(".[]") or not key.value:
        return False
    return key.tag in (f"{_TAG}str", f"{_TAG}merge") or key.value == "on"


def _written(key: yaml.Node) -> str:
    if isinstance(key, yaml.ScalarNode):
        return _shown(key.value)
    return "a list" if isinstance(key, yaml.SequenceNode) else "a mapping"


def _line(at: yaml.Node | yaml.Event) -> str:
    assert at.start_mark is not None
    return f"line {at.start_mark.line + 1}"


def _with_word_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {"on" if key is True else key: _with_word_keys(one) for key, one in value.items()}
    return [_with_word_keys(one) for one in value] if isinstance(value, list) else value


def _broken_texts(value: Any, key: str = "") -> Iterator[str]:
    """A line for each text with half of a surrogate pair, as from an environment variable."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for part, one in items:
            yield from _broken_texts(one, f"{key}.{part}" if key else str(part))
    elif isinstance(value, str) and _SURROGATE.search(value):
        yield f"  {key}: must be UTF-8 text, got {_shown(value)}"


def _message(error: Exception) -> str:
    """The text of an error on one line, with the key that OmegaConf keeps apart."""
    if isinstance(error, RecursionError):
        return "interpolations lead back to themselves or are too long"
    text = str(error).partition("\n    full_key:")[0]
    text = text.replace('in "<unicode string>", ', "at ")
    key = (getattr(error, "full_key", None) or "").removeprefix("text").removeprefix(".")
    hint = ""
    if isinstance(error, InterpolationKeyError):
        hint = "; an environment variable is written ${oc.env:NAME}, in a path also $NAME"
    return (f"{key}: " if key else "") + " ".join(text.split()) + hint


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


# ---- overrides -----------------------------------------------------------------------------------


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one key. A number in the key is the index of a list's item, as in `loss.terms.0.alpha`.

    A mapping is merged into the one that is there; another `type` in a union replaces the old one
    together with its keys.

    Raises:
        One of _REFUSALS: the override has another form, or no place in the tree.
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
    value = _parse(text)
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
        raise ValueError(f"{name} is a value, {_shown(owner)}, and has no key {part}")
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
    return ".".join(part for part in parts if not part.isdigit()) in _choices(Config)


# ---- messages ------------------------------------------------------------------------------------


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
    value = "a mapping" if isinstance(item["input"], dict) else _shown(item["input"])
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
