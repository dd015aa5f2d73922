"""Random files, trees and overrides: a config that reads back as it was, or a refusal.

`HYPOTHESIS_PROFILE=random pytest tests/test_fuzz_configs.py` tries 20,000 of each with a random
seed.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given
from hypothesis import strategies as st

from distillm_ray.config.files import dump_config, load_config, parse_config
from distillm_ray.errors import ConfigError
from tests import make

VALID = make.tree(
    loss={
        "terms": [
            {"type": "skew_kl", "alpha": 0.2, "on": "all"},
            {"type": "reverse_kl"},
            {"type": "cross_entropy", "on": "corpus"},
        ]
    },
    student={"model": "/models/student", "lora": {"rank": 4, "target_modules": ["q", "v"]}},
    schedule={"type": "fixed", "phi": 0.5},
    rollout={"sampling": {"top_p": 0.9}, "engine": {"type": "transformers"}},
    data={
        "train": ["/a.jsonl", "/b.jsonl"],
        "template": {"type": "chat", "system": "Be brief."},
        "corpus": ["/c.jsonl"],
    },
)


def keys_of(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a tree: of its sections, lists, items and values."""
    items = enumerate(value) if isinstance(value, list) else value.items()
    for part, one in items:
        key = f"{prefix}{part}"
        yield key
        if isinstance(one, dict | list):
            yield from keys_of(one, f"{key}.")


FULL = yaml.safe_load(dump_config(parse_config(VALID, name="x")))
KEYS = sorted(keys_of(FULL))

pytestmark = pytest.mark.timeout(3600)  # 20,000 random examples take minutes

# ---- strategies ----------------------------------------------------------------------------------

MARKS = [": ", "- ", "? ", "|\n", ">\n", "---\n", "...\n", "\n", "\t", "  ", *"[]{},\"'#%@`~=.$&*!"]
TOKENS = [
    *MARKS,
    *("!!python/object:os.system x", "!!int x", "!!timestamp x", "!a", "&a ", "*a", "<<: *a"),
    *("\0", "\x85", "\u2028", "\ufeff", "\ud83d", "==", "..", "???", "on", "yes", "null", "type"),
    *("${", "${run}", "${run.seed}", "${oc.env:HOME}", "${oc.env:NOPE_}", "${x:y}", "${.}"),
    *("$HOME", "$NOPE_", "~nobody_", "type: fixed", "0", "-1", "0b_", "010", "1:30", "1e999"),
    *(".nan", "-.inf", "0x" + "f" * 5000, "9" * 5000, "[" * 40),
]
ALIAS_BOMB = b"a: &a [x, x, x]\n" + b"".join(
    b"%c: &%c [*%c, *%c, *%c]\n" % (one + 1, one + 1, one, one, one) for one in range(97, 117)
)
NUMBERS = st.sampled_from([0, 1, -1, 2**53 + 1, 10**400, 0.5, 1e300, math.inf, -math.inf, math.nan])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.integers(),
    st.floats(),
    st.sampled_from(TOKENS),
    st.text(st.characters(), max_size=8),
)
WORDS = st.sampled_from(["type", "on", "model", "train", "terms", "0", "x", "", "a.b", "a[0]", "é"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=5).map("".join)


def written(value: Any) -> str:
    """A value as YAML."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        return text.replace("Infinity", ".inf").replace("NaN", ".nan")
    except ValueError:  # an integer of more than 4,300 digits
        return "9" * 5000


PLACES = st.sampled_from(KEYS) | st.builds(
    lambda key, end: f"{key}{end}",
    st.sampled_from(KEYS),
    st.sampled_from([".x", ".0", ".7", ".-1", ".type", "[0]", ".", "..x", "x", " ", ".\u00b2"]),
)
OVERRIDES = st.builds(
    lambda key, equals, value: f"{key}{equals}{value}",
    PLACES | TEXTS,
    st.sampled_from(["=", "=", "=", "==", "", " = "]),
    VALUES.map(written) | TEXTS,
)

# ---- the property --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def loads_or_is_refused(folder: Path, content: bytes, overrides: Sequence[str] = ()) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        assert str(path) in str(error) or str(error).startswith("override "), "names its origin"
        str(error).encode()  # can be printed
    else:
        saved = folder / "saved.yaml"
        saved.write_text(dump_config(config), encoding="utf-8")
        assert load_config(saved) == config


@given(content=st.binary(max_size=60) | TEXTS.map(lambda text: text.encode(errors="replace")))
@example(content=b"3")
@example(content=b"true")
@example(content=b"hello")
@example(content=b"\xff\xfe\x80")
@example(content=b"[" * 200_000)
@example(content=b"- " * 100_000)
@example(content=b"&a [*a]")
@example(content=ALIAS_BOMB)
def test_any_bytes_are_refused(folder: Path, content: bytes) -> None:
    loads_or_is_refused(folder, content)


@given(data=st.data())
def test_a_config_with_anything_inserted_loads_or_is_refused(
    folder: Path, data: st.DataObject
) -> None:
    text = yaml.safe_dump(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(len(text), begin + 8)))
        text = text[:begin] + data.draw(TEXTS) + text[end:]
    loads_or_is_refused(folder, text.encode(errors="surrogatepass"))


@given(place=st.sampled_from(KEYS), value=VALUES)
def test_a_tree_with_any_value_at_any_key_loads_or_is_refused(
    folder: Path, place: str, value: Any
) -> None:
    tree = copy.deepcopy(VALID)
    *ahead, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    owner: Any = tree
    for part in ahead:
        owner = owner[part] if isinstance(part, int) else owner.setdefault(part, {})
    owner[last] = value
    loads_or_is_refused(folder, written(tree).encode(errors="surrogatepass"))


@given(
    text=st.text()
    | TEXTS.filter(str.isprintable)
    | st.text("\\\\${}x.", max_size=8)
    | st.from_regex(r"[-+.0-9:_eE]{1,8}", fullmatch=True)
)
@example(text="1e999")
@example(text="\\\\${run}")
def test_a_saved_config_reads_back_with_every_text(folder: Path, text: str) -> None:
    assume(text != "???")  # OmegaConf's word for a value that is missing
    tree = VALID | {"data": VALID["data"] | {"template": {"type": "chat", "system": text}}}
    config = parse_config(tree, name="x")
    saved = folder / "saved.yaml"
    saved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(saved) == config


@given(overrides=st.lists(OVERRIDES, min_size=1, max_size=3))
@example(overrides=["student.model[0]=1"])
@example(overrides=["data.test.0==1"])
@example(overrides=["data.train[0]=x"])
@example(overrides=["run.directory=\ud83d"])
@example(overrides=["a..b=1"])
@example(overrides=["="])
def test_any_override_is_applied_or_refused(folder: Path, overrides: list[str]) -> None:
    loads_or_is_refused(folder, yaml.safe_dump(VALID).encode(), overrides)


@pytest.mark.parametrize("key", KEYS)
def test_an_override_with_the_value_that_is_there_changes_nothing(folder: Path, key: str) -> None:
    path = folder / "full.yaml"
    path.write_text(yaml.safe_dump(FULL))
    value: Any = FULL
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    assert load_config(path, [f"{key}={json.dumps(value)}"]) == parse_config(VALID, name="x")
