"""The replay buffer's actor without Ray: whom a change wakes, and what a rank is sent.

What happens when the actor dies is in tests/integration/test_buffer_actor.py.
"""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest
import ray

from distillm_ray.cluster import buffer as module
from distillm_ray.cluster.buffer import BufferActor
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.demand import Ordinals
from distillm_ray.types import RankPlan, TrainingData, Validation, Work
from tests import make

NUM_RANKS = 16
NUM_SLOTS = 64


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often these were called since the test began."""
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(Ordinals, "missing")
    count(ReplayBuffer, "ready")
    count(module, "draw_facts")
    context = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    return counts


Actor: TypeAlias = Any  # a `BufferActor`, whose annotations are those of a handle


async def started() -> tuple[Actor, Work]:
    """An actor whose slots are all fresh, and its first work."""
    actor: Actor = BufferActor(
        make.config(
            learner={
                "steps": 4,
                "batch_size": NUM_SLOTS,
                "workers": NUM_RANKS,
                "max_micro_batch_tokens": 2048,
            },
            rollout={"lookahead": 2},
            schedule={"type": "fixed", "phi": 1.0},
        )
    )
    prompts = [make.prompt(f"p{index}") for index in range(8)]
    await actor.restore(1, None, TrainingData(prompts=prompts, demonstrations=[]))
    await actor.report(Validation(step=0, loss=1.0, tokens=1))
    return actor, await actor.work(60.0)


def draws(actor: Actor, step: int) -> list[asyncio.Task[RankPlan | None]]:
    """Every rank asks for its share of a step."""
    return [
        asyncio.create_task(actor.draw(step, rank, timeout_s=60.0)) for rank in range(NUM_RANKS)
    ]


async def add(actor: Actor, work: Work, ordinals: range) -> None:
    """Add the rollouts of these ordinals, and let everyone who was woken run."""
    for demand in work.demand[ordinals.start : ordinals.stop]:
        name, prompt_id = f"student-{demand.ordinal}", demand.prompt_id
        await actor.add(1, make.rollout(name, prompt_id=prompt_id, ordinal=demand.ordinal))
        for _ in range(4):
            await asyncio.sleep(0)


async def test_a_rollout_wakes_no_rank_until_it_completes_the_step(counts: Counter[str]) -> None:
    actor, work = await started()
    waiting = draws(actor, 0)
    await asyncio.sleep(0)
    counts.clear()
    await add(actor, work, range(NUM_SLOTS - 1))
    assert counts == {"ready": 2 * (NUM_SLOTS - 1)}, "before and after each, none by a rank"
    await add(actor, work, range(NUM_SLOTS - 1, NUM_SLOTS))
    shares = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert all(share is not None for share in shares)
    assert counts["missing"] == 0, "ordinals are listed for messages only"
    assert counts["ready"] <= 2 * NUM_SLOTS + NUM_RANKS + 1


async def test_rollouts_that_arrived_early_make_the_step_after_a_draw_ready(
    counts: Counter[str],
) -> None:
    actor, work = await started()
    await add(actor, work, range(NUM_SLOTS, 2 * NUM_SLOTS))
    early = draws(actor, 1)
    await asyncio.sleep(0)
    assert await actor.waiting_for(1) == "step 1 waits for the draw of step 0"
    await add(actor, work, range(NUM_SLOTS))
    await asyncio.wait_for(asyncio.gather(*draws(actor, 0)), 10)
    await asyncio.wait_for(asyncio.gather(*early), 10)


async def test_a_lost_ordinal_wakes_the_orchestrator_and_no_rank(counts: Counter[str]) -> None:
    actor, _ = await started()
    waiting = draws(actor, 0)
    working = asyncio.create_task(actor.work(60.0))
    for _ in range(4):
        await asyncio.sleep(0)
    counts.clear()
    await actor.lose(1, 3)
    work = await asyncio.wait_for(working, 10)
    assert [(one.ordinal, one.attempt) for one in work.demand] == [(3, 1)]
    assert counts["ready"] == 0
    for call in waiting:
        call.cancel()


@pytest.mark.usefixtures("counts")
async def test_a_wait_for_work_ends_at_its_limit_and_takes_nothing_along() -> None:
    actor, _ = await started()
    nothing = await actor.work(0.01)
    assert (nothing.incarnation, nothing.demand, nothing.dataset) == (1, (), ())
    await actor.lose(1, 3)
    assert [one.ordinal for one in (await actor.work(0.01)).demand] == [3]


async def test_the_facts_of_a_step_are_collected_once_and_sent_to_the_rank_that_reports_it(
    counts: Counter[str],
) -> None:
    actor, work = await started()
    await add(actor, work, range(NUM_SLOTS))
    first, *others = await asyncio.wait_for(asyncio.gather(*draws(actor, 0)), 10)
    assert counts["draw_facts"] == 1
    assert first is not None
    assert first.facts is not None
    assert first.facts.mix.fresh == len(first.facts.fresh_ages) == NUM_SLOTS
    assert first.facts.rollout_ids == {}, "only the digest of the ids is sent, unless asked for"
    for share in others:
        assert share is not None
        assert (share.phi, share.facts) == (1.0, None)
        assert len(pickle.dumps(share)) < len(pickle.dumps(first))


async def test_a_demand_has_the_size_of_its_token_ids(counts: Counter[str]) -> None:
    """Texts and references of a prompt are not sent to generators, which read neither."""

    async def size_of(text: str) -> int:
        actor: Actor = BufferActor(make.config(schedule={"type": "fixed", "phi": 1.0}))
        prompts = [make.prompt(text=text, references=[text])]
        await actor.restore(1, None, TrainingData(prompts=prompts, demonstrations=[]))
        return len(pickle.dumps(await actor.work(60.0)))

    assert await size_of("why " * 1000) == await size_of("")
