"""The target library: what it returns is what was scored, and no fault of a file ends a run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from distillm_ray.teacher import target_library
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.teacher.target_library import (
    ABOUT_FILE,
    LibraryCounters,
    LibrarySettings,
    TargetLibrary,
    is_shared,
)
from distillm_ray.types import (
    HiddenTargets,
    LogitTargets,
    Rollout,
    ScoreReport,
    Source,
    TeacherTargets,
    TopKTargets,
)
from tests import make

IDENTITY = TargetIdentity(teacher="digest", kind="hidden", dtype="bfloat16")
ROWS, WIDTH = 3, 4
PAYLOAD = ROWS * WIDTH * 2  # bytes of `hidden`
Open = Callable[..., TargetLibrary]


@pytest.fixture
def open_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the library as a new process would; it looks for new shards at every miss."""
    monkeypatch.setattr(target_library, "REFRESH_S", 0.0)

    def open_library(
        identity: TargetIdentity = IDENTITY, *, max_bytes: int = 10**6, **options: Any
    ) -> TargetLibrary:
        settings = LibrarySettings(
            directory=tmp_path / "library",
            max_bytes=max_bytes,
            identity=identity,
            teacher="models/teacher",
        )
        return TargetLibrary(settings, **options)

    return open_library


def hidden(seed: int = 0) -> HiddenTargets:
    """Every bit pattern is possible: NaN, infinities and subnormals included."""
    bits = np.random.default_rng(seed).integers(0, 2**16, (ROWS, WIDTH), np.uint16)
    return HiddenTargets(values_TD=bits)


def report(targets: TeacherTargets, *, tokens: int = 7, seconds: float = 0.25) -> ScoreReport:
    return ScoreReport(num_tokens=tokens, nbytes=targets.nbytes, seconds=seconds)


def keep(library: TargetLibrary, *keys: str, seed: int = 0) -> None:
    for key in keys:
        library.put(key, hidden(seed), report(hidden(seed)))
    library.flush()


def shards(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "library").glob("*/shard-*.safetensors"))


def found(library: TargetLibrary, key: str, num_rows: int = ROWS) -> NDArray[Any] | None:
    scored = library.get(key, num_rows)
    if scored is None:
        return None
    assert isinstance(scored[1], HiddenTargets)
    return scored[1].values_TD


def arrays(targets: TeacherTargets) -> list[NDArray[Any]]:
    return [getattr(targets, field.name) for field in dataclasses.fields(targets)]


# ---- what is read is what was written -----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("hidden", hidden()),
        ("hidden", HiddenTargets(values_TD=np.linspace(-1, 1, 12, dtype=np.float32)[None, :])),
        ("logits", LogitTargets(values_TV=hidden(1).values_TD)),
        ("logits", LogitTargets(values_TV=np.array([[np.nan, -np.inf, 1e-40]], np.float32))),
        (
            "top_k",
            TopKTargets(
                ids_TK=np.array([[2**31 - 1, 0], [5, 6]], np.int32),
                log_probs_TK=np.array([[-0.0, -np.inf], [-1e-30, -3]], np.float32),
            ),
        ),
        ("hidden", HiddenTargets(values_TD=np.zeros((0, WIDTH), np.uint16))),
    ],
    ids=["hidden bf16", "hidden f32", "logits bf16", "logits f32", "top_k", "no loss token"],
)
def test_targets_come_back_bit_for_bit(
    open_library: Open, kind: Any, targets: TeacherTargets
) -> None:
    identity = dataclasses.replace(IDENTITY, kind=kind, k=2 if kind == "top_k" else None)
    first = open_library(identity)
    first.put("key", targets, report(targets))
    first.flush()
    scored = open_library(identity).get("key", len(arrays(targets)[0]))
    assert scored is not None
    assert scored[0] == report(targets)
    assert type(scored[1]) is type(targets)
    for before, after in zip(arrays(targets), arrays(scored[1]), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert before.tobytes() == after.tobytes()
        assert not after.flags.writeable


def test_a_shard_is_a_safetensors_file_that_others_can_read(
    open_library: Open, tmp_path: Path
) -> None:
    keep(open_library(), "a")
    (shard,) = shards(tmp_path)
    tensors = safetensors.numpy.load_file(shard)
    assert {name: one.tolist() for name, one in tensors.items()} == {
        "a/values": hidden().values_TD.tolist()
    }
    about = json.loads((shard.parent / ABOUT_FILE).read_text())
    assert about == {
        "teacher_directory": "models/teacher",
        "teacher": "digest",
        "kind": "hidden",
        "k": None,
        "dtype": "bfloat16",
    }
    assert {path.name for path in shard.parent.iterdir()} == {ABOUT_FILE, shard.name}


def test_what_it_had_is_counted_with_the_seconds_that_it_once_cost(open_library: Open) -> None:
    first = open_library()
    first.put("a", hidden(), report(hidden(), tokens=10, seconds=0.5))
    first.put("b", hidden(), report(hidden(), tokens=3, seconds=0.25))
    first.flush()
    second = open_library()
    assert second.holds("a", ROWS)
    assert second.counters == LibraryCounters()
    for key in ("a", "b", "a", "never"):
        second.get(key, ROWS)
    assert second.counters == LibraryCounters(sequences=3, tokens=23, seconds=1.25)


def test_another_identity_finds_nothing(open_library: Open) -> None:
    keep(open_library(), "a")
    for other in (
        dataclasses.replace(IDENTITY, teacher="another"),
        dataclasses.replace(IDENTITY, dtype="float32"),
        dataclasses.replace(IDENTITY, kind="logits"),
    ):
        assert open_library(other).get("a", ROWS) is None
    assert found(open_library(), "a") is not None


def test_what_is_not_written_yet_is_found_by_its_own_process_and_lost_with_it(
    open_library: Open, tmp_path: Path
) -> None:
    first = open_library()
    first.put("a", hidden(), report(hidden()))
    assert found(first, "a") is not None
    assert shards(tmp_path) == []
    assert found(open_library(), "a") is None


def test_a_shard_is_written_when_enough_is_collected(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_library, "SHARD_BYTES", 2 * PAYLOAD)
    library = open_library()
    for number in range(5):
        library.put(str(number), hidden(number), report(hidden(number)))
    library._settle(wait=True)
    assert len(shards(tmp_path)) == 2
    library.close()
    assert len(shards(tmp_path)) == 3
    again = open_library()
    for number in range(5):
        assert found(again, str(number)) is not None


def test_a_target_that_is_there_is_not_written_again(open_library: Open, tmp_path: Path) -> None:
    keep(open_library(), "a", "b")
    keep(open_library(), "a", "b")
    assert len(shards(tmp_path)) == 1


# ---- several processes ---------------------------------------------------------------------------


def test_two_writers_share_a_directory_and_duplicates_are_harmless(
    open_library: Open, tmp_path: Path
) -> None:
    one, two = open_library(), open_library()
    one.put("same", hidden(), report(hidden()))
    two.put("same", hidden(), report(hidden()))
    keep(one, "first")
    keep(two, "second")
    assert len(shards(tmp_path)) == 2
    for library in (one, two, open_library()):
        assert all(found(library, key) is not None for key in ("same", "first", "second"))


def test_writers_that_begin_at_the_same_moment_do_not_disturb_each_other(
    open_library: Open, tmp_path: Path
) -> None:
    """Each of them finds no about.json and writes it."""
    for _ in range(10):
        writers = [open_library() for _ in range(4)]
        for number, writer in enumerate(writers):
            writer.put(f"{number}", hidden(number), report(hidden(number)))
            writer._write_collected()  # in a thread of its own
        for writer in writers:
            writer.close()
            assert writer.take_warnings() == ()
        assert len(shards(tmp_path)) == len(writers)
        shutil.rmtree(tmp_path / "library")


def test_shards_of_others_are_looked_for_after_a_while_only(
    open_library: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = open_library()
    monkeypatch.setattr(target_library, "REFRESH_S", 1000.0)
    keep(open_library(), "a")
    assert found(reader, "a") is None
    monkeypatch.setattr(target_library, "REFRESH_S", 0.0)
    assert found(reader, "a") is not None


def test_a_store_reads_only_the_keys_that_it_is_asked_for(open_library: Open) -> None:
    keep(open_library(), "a", "b")
    library = open_library(owns=lambda key: key == "b")
    assert (library.holds("a", ROWS), library.holds("b", ROWS)) == (False, True)


# ---- faults of files -----------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(500))


def foreign(path: Path) -> None:
    path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3, np.float32)}))


def no_dictionary(path: Path) -> None:
    path.write_bytes(len(b"[1, 2]  ").to_bytes(8, "little") + b"[1, 2]  ")


def scalar(path: Path) -> None:
    costs = {"a": {"tokens": 1, "seconds": 0.0, "checksums": {"values": 0}}}
    metadata = {"targets": json.dumps(costs)}
    path.write_bytes(
        safetensors.numpy.save({"a/values": np.ones((), np.float32)}, metadata=metadata)
    )


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, garbage, foreign, no_dictionary, scalar],
    ids=lambda one: one.__name__,
)
def test_a_shard_that_cannot_be_read_is_a_miss_with_a_warning(
    open_library: Open, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    keep(open_library(), "a")
    keep(open_library(), "good")
    (bad,) = [path for path in shards(tmp_path) if b"good/" not in path.read_bytes()]
    damage(bad)
    library = open_library()
    assert found(library, "a") is None
    assert found(library, "good") is not None
    (warning,) = library.take_warnings()
    assert str(bad) in warning
    assert "scored again" in warning
    assert library.take_warnings() == ()
    keep(library, "a")
    assert found(open_library(), "a") is not None, "it is written anew, beside the damaged one"


def test_a_flipped_bit_is_a_miss_and_an_intact_copy_is_found(
    open_library: Open, tmp_path: Path
) -> None:
    one, two = open_library(), open_library()
    one.put("a", hidden(), report(hidden()))
    two.put("a", hidden(), report(hidden()))
    one.flush()
    (first,) = shards(tmp_path)
    two.flush()
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    library = open_library()
    values = found(library, "a")
    assert values is not None
    assert values.tobytes() == hidden().values_TD.tobytes()
    (second,) = set(shards(tmp_path)) - {first}
    second.unlink()
    library = open_library()
    assert found(library, "a") is None
    assert "a checksum is wrong" in library.take_warnings()[0]
    assert library.counters == LibraryCounters()


def test_a_target_of_other_rows_is_a_miss_with_a_warning(open_library: Open) -> None:
    keep(open_library(), "a")
    library = open_library()
    assert not library.holds("a", ROWS + 1)
    assert found(library, "a", ROWS + 1) is None
    assert "3 rows for 4 loss tokens" in library.take_warnings()[0]


def test_a_shard_that_another_process_removed_is_a_miss_without_a_warning(
    open_library: Open, tmp_path: Path
) -> None:
    keep(open_library(), "a")
    library = open_library()
    shards(tmp_path)[0].unlink()
    assert found(library, "a") is None
    assert library.take_warnings() == ()


def test_a_full_disk_ends_the_writing_with_one_warning_and_nothing_else(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(open_library(), "before")
    calls: list[Path] = []

    def full(path: Path, content: bytes) -> None:
        calls.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(target_library, "write_atomically", full)
    library = open_library()
    keep(library, "a")
    keep(library, "b")
    (warning,) = library.take_warnings()
    assert "No space left on device" in warning
    assert library.counters.stopped == warning
    assert len(calls) == 1
    assert found(library, "before") is not None
    assert found(library, "a") is None


# ---- the bound -----------------------------------------------------------------------------------


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def test_the_least_recently_used_shards_make_room_whoever_wrote_them(
    open_library: Open, tmp_path: Path
) -> None:
    other = dataclasses.replace(IDENTITY, teacher="another")
    writers = {"a": open_library(), "b": open_library(other), "c": open_library()}
    paths: dict[str, Path] = {}
    for name, library in writers.items():
        keep(library, name)
        (paths[name],) = set(shards(tmp_path)) - set(paths.values())
    size = paths["a"].stat().st_size
    for hours, path in zip((2, 3, 1), paths.values(), strict=True):
        age(path, hours)
    library = open_library(max_bytes=3 * size)
    assert found(library, "a") is not None  # it is the most recently used one from here on
    keep(library, "d")
    assert [path.exists() for path in paths.values()] == [True, False, True]
    keep(library, "e")
    assert [path.exists() for path in paths.values()] == [True, False, False]
    assert sum(path.stat().st_size for path in shards(tmp_path)) <= 3 * size


def test_a_data_set_larger_than_the_library_keeps_a_fixed_part_of_it(
    open_library: Open, tmp_path: Path
) -> None:
    """Half of the data fits: over three epochs half of the visits are hits, after the first."""
    keep(open_library(), "probe")
    (probe,) = shards(tmp_path)
    size = probe.stat().st_size
    probe.unlink()
    library = open_library(max_bytes=8 * size)
    hits = 0
    for _ in range(4):
        for number in range(16):
            key = f"{number:05}"
            if found(library, key) is None:
                keep(library, key)
            else:
                hits += 1
    assert hits == 3 * 8
    assert len(shards(tmp_path)) == 8
    (warning,) = library.take_warnings()
    assert "targets.library_max_bytes" in warning


def test_what_killed_writers_left_is_removed_after_an_hour(
    open_library: Open, tmp_path: Path
) -> None:
    keep(open_library(), "a")
    folder = shards(tmp_path)[0].parent
    old, new = folder / "shard-1.safetensors.tmp", folder / "shard-2.safetensors.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    age(old, 2)
    keep(open_library(), "b")
    assert (old.exists(), new.exists()) == (False, True)


# ---- what belongs in it --------------------------------------------------------------------------


def rollout(source: Source) -> Rollout:
    return dataclasses.replace(make.rollout("r"), source=source)


def test_only_text_that_another_run_may_see_is_shared() -> None:
    assert {source.value: is_shared(rollout(source)) for source in Source} == {
        "dataset": True,
        "student": False,
        "teacher": True,
        "corpus": True,
    }
