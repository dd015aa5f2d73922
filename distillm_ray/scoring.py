"""`distillm-ray score`: fills the target library ahead of runs, with scorers and stores alone.

data ──► in the library? ── no ──► ScorerPool ──► TargetStoreActor ──► shard
             └─ yes: skipped

wait                     ends when                                limit
---------------------    -------------------------------------    ------------------------------
for scorers to start     all teachers are loaded                  `run.startup_timeout_s`
for the targets          every sequence is in the library, or     none: follows from the data
                         a library stopped writing
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from distillm_ray.cluster import placement
from distillm_ray.cluster.actors import release
from distillm_ray.cluster.connection import available, connect, resolve_device
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.targets import ScorerPool, ScorerStarter, flush_stores, start_stores
from distillm_ray.config import Config
from distillm_ray.data import ray_data
from distillm_ray.data.files import check_files
from distillm_ray.data.splits import Splits, splits_of
from distillm_ray.data.templates import Renderer
from distillm_ray.data.token_table import RowSequence
from distillm_ray.errors import DataError, RunDirectoryError
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.preflight import check_library, check_models
from distillm_ray.remote.inputs import fetched
from distillm_ray.report.console import ConsoleView, duration
from distillm_ray.teacher.target_key import TargetIdentity, target_key
from distillm_ray.teacher.target_library import library_settings
from distillm_ray.types import Rollout, ScoreReport, Source

CALLS_PER_SCORER = 128  # sequences under way: those that are looked up, and full batches
_POLL_S = 1.0  # between two looks at the stores


def score(config: Config, view: ConsoleView) -> list[str]:
    """Have the targets of all training data in the library; returns a summary.

    What is there is not scored again, so the same command goes on where it was interrupted.

    Raises:
        UserError: the models, the data or the library cannot be used, or the library is full.
    """
    check_library(config)
    found = check_models(config)
    check_files(config.data, require_responses=config.draws_data)
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    renderer = Renderer(tokenizer, config.data, vocabulary_size=found.vocabulary_size)
    if renderer.writes_date and config.data.time is None:
        raise DataError(
            f"data.time is required, because the chat template of {config.student.model} writes the"
            " date into every prompt, and a run on another day would find none of the targets: set"
            " it in the config, as in data.time=2026-11-25"
        )
    view.start("connecting to Ray")
    connect(config)
    device = resolve_device(config)
    placement.check(placement.score_phases(config, device), available())
    view.start("reading data")
    splits = splits_of(
        config,
        tokenizer,
        map_files=ray_data.mapper(stall_timeout_s=config.run.startup_timeout_s),
        vocabulary_size=found.vocabulary_size,
    )
    for line in splits.describe():
        view.note(line)
    view.start("starting scorers")
    identity = found.target_identity(config, device)
    assert config.teacher is not None
    assert identity is not None
    starter = ScorerStarter(
        spec=placement.scorers(config, device),
        teacher=config.teacher,
        targets=config.targets,
        vocabulary_size=found.vocabulary_size,
        device=device,
    )
    scorers = starter.start()
    parts = distinct(training_sequences(config, splits), identity)
    # Nothing reads the targets here: a byte for each store keeps none of them in memory.
    small = config.targets.model_copy(update={"max_bytes": config.targets.stores})
    stores = start_stores(small, library_settings(config, identity), max_fetched=None)
    try:
        pool = ScorerPool(
            scorers,
            stores,
            identity,
            stall_timeout_s=config.teacher.timeout_s,
            startup_timeout_s=config.run.startup_timeout_s,
            log=AsyncLog(None),
            min_actors=config.teacher.min_actors,
            starter=starter,
        )
        count = CALLS_PER_SCORER * config.teacher.most
        tally = asyncio.run(_keep_all(pool, parts, view, num_calls=count))
    finally:
        for warning in flush_stores(stores):
            view.note(f"warning: {warning}")
        release([*scorers, *stores])
    return summary_lines(config, tally)


def training_sequences(config: Config, splits: Splits) -> list[RowSequence[Rollout]]:
    """What a run of this config compares with the teacher, whatever its seed.

    These are the responses of the data and the pieces of the corpus, if a term holds on them. The
    loss on held-out rows needs no teacher.
    """
    parts: list[RowSequence[Rollout]] = []
    data, corpus = splits.train.demonstrations, splits.corpus
    if config.draws_data and config.loss.compares(data.source):
        parts.append(data)
    if corpus is not None and config.loss.compares(Source.CORPUS):
        parts.append(corpus.pieces)
    return parts


def distinct(
    parts: Iterable[RowSequence[Rollout]], identity: TargetIdentity
) -> list[RowSequence[Rollout]]:
    """The same without the sequences that have the targets of an earlier one."""
    seen: set[str] = set()
    kept: list[RowSequence[Rollout]] = []
    for part in parts:
        is_new = np.zeros(len(part), dtype=np.bool_)
        for number, one in enumerate(part):
            key = target_key(identity, one)
            is_new[number] = key not in seen
            seen.add(key)
        kept.append(part.among(part.rows[is_new]))
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What was done so far."""

    there: int = 0  # sequences whose targets the library had
    scored: int = 0
    tokens: int = 0  # positions that the teacher computed, prompts included
    loss_tokens: int = 0  # of the sequences scored
    nbytes: int = 0
    scorer_seconds: float = 0.0
    seconds: float = 0.0  # wall-clock, without the start of the scorers

    def plus(self, rollout: Rollout, report: ScoreReport | None) -> Tally:
        """With one more sequence; no report: it was there."""
        return Tally(
            there=self.there + (report is None),
            scored=self.scored + (report is not None),
            tokens=self.tokens + (report.num_tokens if report else 0),
            loss_tokens=self.loss_tokens + (rollout.num_loss_tokens if report else 0),
            nbytes=self.nbytes + (report.nbytes if report else 0),
            scorer_seconds=self.scorer_seconds + (report.seconds if report else 0.0),
        )


async def _keep_all(
    pool: ScorerPool, parts: Sequence[Sequence[Rollout]], view: ConsoleView, *, num_calls: int
) -> Tally:
    """Look every sequence up and score what is missing, `num_calls` of them at a time.

    Raises:
        UserError: what a scorer or a store raised.
        RunDirectoryError: a library stopped writing.
    """
    await pool.start()
    total = sum(map(len, parts))
    view.start(f"scoring {total:,} sequences")
    started, tally = time.monotonic(), Tally()
    rest = chain.from_iterable(parts)

    async def work() -> None:
        nonlocal tally
        for rollout in rest:
            report = await pool.keep(rollout)
            tally = tally.plus(rollout, report)

    async def watch() -> None:
        while True:
            view.progress(tally.there + tally.scored, total, "sequences")
            await check()
            await asyncio.sleep(_POLL_S)

    async def waited() -> float:
        return time.monotonic()  # nothing else goes on: all time is spent waiting for scorers

    async def check() -> None:
        for store in await pool.counters():
            for warning in store.warnings:
                view.note(f"warning: {warning}")
            if store.library.stopped:
                raise RunDirectoryError(store.library.stopped)

    watching = asyncio.gather(watch(), pool.follow(waited))
    working = asyncio.gather(*(work() for _ in range(num_calls)))
    await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
    if watching.done():
        working.cancel()
        watching.result()
    watching.cancel()
    try:
        await working
    finally:
        pool.release_added()
    await pool.flush()
    await check()
    view.progress(tally.there + tally.scored, total, "sequences")
    return replace(tally, seconds=time.monotonic() - started)


def summary_lines(config: Config, tally: Tally) -> list[str]:
    """What was done, for the user."""
    lines = [
        f"{config.targets.library}: {tally.scored:,} sequences scored, {tally.there:,} were there"
    ]
    if tally.scored:
        each = tally.nbytes / max(tally.loss_tokens, 1)
        lines.append(
            f"{tally.tokens:,} tokens computed in {duration(tally.seconds)}"
            f" ({tally.scorer_seconds:.1f} seconds of scorers); {tally.nbytes:,} bytes,"
            f" {each:,.0f} for each of {tally.loss_tokens:,} loss tokens"
        )
    return lines
