"""How large a run's teacher targets are, and how much of them its stores will hold.

An estimate before the start: the student's responses are taken to be as long as the data's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from distillm_ray.config import Config, PairedSchedule, TargetsConfig
from distillm_ray.errors import ConfigError
from distillm_ray.types import Rollout, Source

_MIB = 2**20


def bytes_per_token(
    targets: TargetsConfig, *, dtype: str, hidden_size: int, vocabulary_size: int
) -> int:
    """Bytes of the targets of one loss token. `auto` counts as float32, the larger one.

    Example:
        >>> targets = TargetsConfig(type="top_k", k=64)
        >>> bytes_per_token(targets, dtype="auto", hidden_size=576, vocabulary_size=50000)
        512
    """
    width = 2 if dtype == "bfloat16" else 4
    match targets.type:
        case "hidden":
            return hidden_size * width
        case "logits":
            return vocabulary_size * width
        case "top_k":
            return targets.k * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSizes:
    """Bytes, where everything that is compared with the teacher is stored."""

    token: int
    step: int  # of a global batch
    open_steps: int
    replay: int  # of a full replay shelf
    data: int  # of all sequences of data set and corpus
    is_known: bool = True  # False: no row has a response that says how long the student's will be
    num_data: int  # of these sequences

    def hits(self, max_bytes: int) -> float:
        """The share of the data that stays in stores of this size, and so of its later draws."""
        room = max_bytes - self.open_steps - self.replay
        return min(max(room / self.data, 0.0), 1.0) if self.data else 1.0


def target_sizes(
    config: Config, data: Sequence[Rollout], corpus: Sequence[Rollout], token_bytes: int
) -> TargetSizes:
    """The sizes for sequences of the data set and the corpus."""
    compares = config.loss.compares
    known = _Total.of(data)
    drawn = known.where(lambda source: config.draws_data and compares(source))
    pieces = _Total.of(corpus).where(compares)
    each = known.mean_bytes(token_bytes)
    responses = config.learner.batch_size
    if isinstance(config.schedule, PairedSchedule):
        responses *= 2
    step = responses * each if drawn.counts or compares("student") else 0.0
    step += (config.data.corpus_batch or 0) * pieces.mean_bytes(token_bytes)
    replayed = 0
    if config.wants_rollouts and compares("student"):
        replayed = min(config.replay.capacity, config.learner.num_steps * config.learner.batch_size)
    return TargetSizes(
        token=token_bytes,
        step=round(step),
        open_steps=round(step * min(config.rollout.open_steps, config.learner.num_steps)),
        replay=round(replayed * each),
        data=token_bytes * (drawn.tokens + pieces.tokens).total(),
        is_known=bool(data) or not compares("student"),
        num_data=(drawn.counts + pieces.counts).total(),
    )


UNKNOWN_ROOM = 2 * 2**30
"""Bytes for the targets where nothing says how much memory there is for them."""


def with_room(config: Config, sizes: TargetSizes, room: int | None) -> Config:
    """The config with a number in place of `targets.max_bytes: auto`.

    Twice what is expected, since responses may turn out longer than the data's. Where nothing can
    be expected, all that there is.

    Args:
        room: bytes that all stores can have together; None if that is not known.

    Raises:
        ConfigError: there is no room for a step.
    """
    if config.targets.max_bytes != "auto":
        return config
    expected = sizes.data + sizes.replay + sizes.open_steps
    least = max(sizes.step, sizes.token)
    if room is not None and room < least:
        raise ConfigError(
            f"targets.max_bytes=auto must find room for the targets of a step, about {least:,}"
            f" bytes, got {max(room, 0):,}: the nodes' object stores hold no more beside weights"
            " and batches in transit; start Ray with a larger --object-store-memory, lower"
            " learner.batch_size, or use targets.type=top_k"
        )
    limit = UNKNOWN_ROOM if room is None else room
    if sizes.is_known:
        limit = min(limit, 2 * expected)
    targets = config.targets.model_copy(update={"max_bytes": max(limit, config.targets.stores)})
    return config.model_copy(update={"targets": targets})


def check_room(config: Config, sizes: TargetSizes) -> str:
    """What the stores will hold, in a line.

    Raises:
        ConfigError: they cannot hold a step, whose targets must be there at the same time.
    """
    room = config.targets.limit
    if not sizes.is_known:
        return (
            f"teacher targets: {sizes.token:,} bytes a loss token; no row has a response, so how"
            " many tokens a step has is not known before it. targets.max_bytes holds"
            f" {room // sizes.token:,} of them"
        )
    if room < sizes.step:
        raise ConfigError(
            f"targets.max_bytes must hold the targets of a step, about {sizes.step:,} bytes"
            f" ({sizes.token:,} for each loss token), got {room:,}: they would be evicted before"
            " the step is trained; raise it, lower learner.batch_size, or use targets.type=top_k"
        )
    head = (
        f"teacher targets: {sizes.token:,} bytes a loss token, {sizes.data / _MIB:,.1f} MiB for"
        f" the {sizes.num_data:,} sequences of the data, about {sizes.replay / _MIB:,.1f} for the"
        f" replay shelf and {sizes.open_steps / _MIB:,.1f} for the open steps; targets.max_bytes"
        f" holds {room / _MIB:,.1f}"
    )
    share = sizes.hits(room)
    if share == 1.0:
        return f"{head}, all of them"
    again = "scored again" if config.targets.library is None else "read from targets.library"
    return (
        f"{head}: from the second epoch on about {100 * share:.0f} % of the data's draws will find"
        f" theirs, the others are {again}"
    )


@dataclass(frozen=True, slots=True)
class _Total:
    """Sequences and their loss tokens, by source."""

    counts: Counter[Source]
    tokens: Counter[Source]

    @classmethod
    def of(cls, rollouts: Iterable[Rollout]) -> _Total:
        """The total of sequences, of which one at a time is in memory."""
        counts, tokens = Counter[Source](), Counter[Source]()
        for one in rollouts:
            counts[one.source] += 1
            tokens[one.source] += one.num_loss_tokens
        return cls(counts, tokens)

    def where(self, holds: Callable[[Source], bool]) -> _Total:
        """Of these sources only."""
        parts = (self.counts, self.tokens)
        return _Total(*(Counter({key: n for key, n in one.items() if holds(key)}) for one in parts))

    def mean_bytes(self, token_bytes: int) -> float:
        """Bytes of the targets of a sequence; 0 without any."""
        count = self.counts.total()
        return token_bytes * self.tokens.total() / count if count else 0.0
