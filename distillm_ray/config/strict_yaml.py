"""YAML read strictly: what a reader would take for something else is refused with its line.

Refused are tags, keys that are no words or stand twice, numbers of base 8 and 60, deep nesting.
"""

from __future__ import annotations

import re
from typing import Any, TypeGuard

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

MOST_LEVELS = 32
"""Of mappings and lists inside each other; libyaml overflows the stack at some ten thousand."""
MOST_DIGITS = 100
"""Of a number. Python refuses to write integers of some thousand digits, as messages do."""
MOST_SHOWN = 200
"""Characters of a value in a message."""

REFUSALS = (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError)
"""What PyYAML and OmegaConf raise for text that they do not accept."""


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text, with `${…}` as written.

    The key `on` is a word, not the true of YAML 1.1.

    Raises:
        One of REFUSALS: the text is not YAML, or has a tag, a key that is no word, or a key twice.
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
        if _is_number(node) and len(node.value) > MOST_DIGITS:
            raise ValueError(
                f"{_line(node)}: a number must have at most {MOST_DIGITS} characters, got"
                f" {len(node.value):,}; write a text in quotes"
            )
        if _is_number(node) and _is_odd(node.value):
            raise ValueError(
                f"{_line(node)}: a number must have no leading zeros and no colons, got"
                f" {shown(node.value)}: YAML reads it with base 8 or 60; write it with base 10, or"
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


def _is_number(node: yaml.Node) -> TypeGuard[yaml.ScalarNode]:
    return isinstance(node, yaml.ScalarNode) and node.tag in (f"{_TAG}int", f"{_TAG}float")


def _is_odd(number: str) -> bool:
    return ":" in number or re.fullmatch(r"[-+]?0[0-9_]+", number) is not None


def _is_word(key: yaml.Node) -> bool:
    if not isinstance(key, yaml.ScalarNode) or set(key.value) & set(".[]") or not key.value:
        return False
    return key.tag in (f"{_TAG}str", f"{_TAG}merge") or key.value == "on"


def _written(key: yaml.Node) -> str:
    if isinstance(key, yaml.ScalarNode):
        return shown(key.value)
    return "a list" if isinstance(key, yaml.SequenceNode) else "a mapping"


def _line(at: yaml.Node | yaml.Event) -> str:
    assert at.start_mark is not None
    return f"line {at.start_mark.line + 1}"


def _with_word_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {"on" if key is True else key: _with_word_keys(one) for key, one in value.items()}
    return [_with_word_keys(one) for one in value] if isinstance(value, list) else value


def message_of(error: Exception) -> str:
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


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


# ---- writing -------------------------------------------------------------------------------------


def dump_yaml(values: Any) -> str:
    """The values as YAML that `parse_yaml` and OmegaConf read back as they are."""
    return yaml.dump(_escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
