"""Pools of real Ray actors that die, raise and hang on demand; real target stores; both sides."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, cast

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from distillm_ray.cluster.actors import BufferLost
from distillm_ray.cluster.buffer import BufferActor
from distillm_ray.cluster.learner import LearnerGroup, Links, Wires
from distillm_ray.cluster.log import LogActor
from distillm_ray.cluster.orchestrator import OrchestratorActor, TrainingPeers
from distillm_ray.cluster.pool import MAX_FAILURES, ActorLost
from distillm_ray.cluster.rollout import GeneratorPool
from distillm_ray.cluster.targets import ScorerPool, TargetStoreActor, store_index
from distillm_ray.config import Config, GeneratorPoolConfig, SamplingConfig
from distillm_ray.errors import ClusterError, ModelError, RunDirectoryError, RunFailed
from distillm_ray.log.records import EventRecord, Record
from distillm_ray.teacher.target_key import TargetIdentity, target_key
from distillm_ray.types import (
    DrawFacts,
    HiddenTargets,
    Prompt,
    Rollout,
    TeacherTargets,
    TrainStep,
    Validation,
    Weights,
)
from tests.integration.fakes import (
    HIDDEN_SIZE,
    FakeGenerator,
    FakeScorer,
    Publisher,
    demand,
    prompt,
    rollout,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

Actor: TypeAlias = Any  # fakes and real actors alike
IDENTITY = TargetIdentity(teacher="t", kind="hidden", dtype="float32")
GREEDY = SamplingConfig(temperature=0.0)


_ACTORS: list[Actor] = []


def remote(role: type, *arguments: Any, settings: Any = None, **options: Any) -> Actor:
    """An actor with the options of a pool's, killed after the test."""
    defaults = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": 0, "max_concurrency": 100}
    make: Any = ray.remote  # its annotations know only some of its options
    _ACTORS.append(make(**defaults | options)(role).remote(*arguments, **settings or {}))
    return _ACTORS[-1]


def kill_and_await_restart(handle: Any) -> None:
    """`ray.kill` returns before the actor is dead, and calls may still reach it."""

    def process() -> int | None:
        try:
            return ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=60)
        except RayActorError:
            return None

    before = process()
    ray.kill(handle, no_restart=False)
    while process() in (before, None):
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _no_actor_is_left() -> Iterator[None]:
    yield
    while _ACTORS:
        ray.kill(_ACTORS.pop())


class Events:
    def __init__(self) -> None:
        self.names: list[str] = []
        self.details: list[str] = []

    async def add(self, record: Record) -> None:
        assert isinstance(record, EventRecord)
        self.names.append(record.name)
        self.details.append(record.detail)


def pool_of(
    *handles: Actor,
    log: Events | None = None,
    max_in_flight: int = 4,
    call_timeout_s: float = 60.0,
    startup_timeout_s: float = 120.0,
) -> GeneratorPool:
    # A call may take two time-outs: one for the weights, one for the response.
    config = GeneratorPoolConfig(max_in_flight=max_in_flight, timeout_s=call_timeout_s / 2)
    return GeneratorPool(
        handles,
        config,
        keep_in_flight=True,
        startup_timeout_s=startup_timeout_s,
        log=cast(Any, log or Events()),
    )


def weights(version: int) -> Weights:
    return Weights(version=version, buckets=(), nbytes=0)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


# ---- what fails is replaced ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("die", "ActorUnavailableError"), ("raise", "RuntimeError: out of memory, says the engine")],
)
async def test_an_actor_that_fails_is_replaced_and_gets_the_newest_weights(
    trouble: str, said: str
) -> None:
    log = Events()
    pool = pool_of(remote(FakeGenerator), log=log)
    await pool.start()
    await pool.update(weights(3))
    before = await pool.generate(demand())
    assert before.version == 3
    with pytest.raises(ActorLost, match=f"generator 0: {said}"):
        await pool.generate(demand(trouble))
    after = await pool.generate(demand())
    assert (after.version, after.text != before.text) == (3, True)
    await until(lambda: len(log.names) == 2)
    assert log.names == ["generator 0 failed", "generator 0 is back"]
    assert log.details[0].startswith(said)


async def test_an_actor_that_hangs_is_killed_and_replaced() -> None:
    pool = pool_of(remote(FakeGenerator), call_timeout_s=4.0)
    await pool.start()
    before = await pool.generate(demand())
    with pytest.raises(ActorLost, match="generator 0: TimeoutError"):
        await pool.generate(demand("hang"))
    after = await pool.generate(demand())
    assert after.text != before.text


async def test_a_kill_from_outside_loses_all_its_calls_but_counts_once() -> None:
    log = Events()
    handle = remote(FakeGenerator)
    pool = pool_of(handle, log=log)
    await pool.start()
    calls = [asyncio.create_task(pool.generate(demand("hang"))) for _ in range(4)]
    await asyncio.sleep(0.3)
    ray.kill(handle, no_restart=False)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(result) for result in results] == [ActorLost] * 4
    assert (await pool.generate(demand())).version == 0
    await until(lambda: "generator 0 is back" in log.names)
    assert log.names.count("generator 0 failed") == 1


async def test_the_others_work_on_while_one_is_replaced() -> None:
    log = Events()
    pool = pool_of(remote(FakeGenerator, 3.0), remote(FakeGenerator, 3.0), log=log)
    await pool.start()
    with pytest.raises(ActorLost):
        await pool.generate(demand("raise"))
    answers = await asyncio.gather(*(pool.generate(demand()) for _ in range(4)))
    assert log.names == ["generator 0 failed"], "it is not back yet"
    assert len({answer.text for answer in answers}) == 1


async def test_a_response_is_tried_again_until_an_actor_gives_it(tmp_path: Path) -> None:
    pool = pool_of(remote(FakeGenerator))
    await pool.start()
    name = str(tmp_path / "raised")
    assert (await pool.respond(prompt(f"raise once {name}"), GREEDY, 0)).rollout_id == "student-0"
    assert Path(name).exists()


async def test_a_users_error_passes_as_itself_and_replaces_nothing() -> None:
    log = Events()
    pool = pool_of(remote(FakeGenerator), log=log)
    await pool.start()
    before = await pool.generate(demand())
    with pytest.raises(ModelError, match=r"^teacher\.model: no good$"):
        await pool.generate(demand("refuse"))
    assert (await pool.generate(demand())).text == before.text
    assert log.names == []


async def test_too_many_failures_in_a_row_end_every_call_with_a_message() -> None:
    pool = pool_of(remote(FakeGenerator), max_in_flight=1)
    await pool.start()
    for _ in range(MAX_FAILURES - 1):
        with pytest.raises(ActorLost):
            await pool.generate(demand("raise"))
    await pool.generate(demand())  # a success in between: counted anew
    for _ in range(MAX_FAILURES - 1):
        with pytest.raises(ActorLost):
            await pool.generate(demand("raise"))
    last = asyncio.create_task(pool.generate(demand("raise")))
    waiting = asyncio.create_task(pool.respond(prompt(), GREEDY, 0))
    message = r"^generator 0 failed 3 times in a row, the last time with: RuntimeError: out of mem"
    for call in (last, waiting):
        with pytest.raises(ClusterError, match=message):
            await asyncio.wait_for(call, 30)


async def test_calls_go_to_the_least_busy_and_wait_where_all_are_full() -> None:
    pool = pool_of(remote(FakeGenerator), remote(FakeGenerator), max_in_flight=2)
    await pool.start()
    hanging = [asyncio.create_task(pool.generate(demand("hang"))) for _ in range(4)]
    await asyncio.sleep(0.3)
    assert [member.in_flight for member in pool._members] == [2, 2]
    waiting = asyncio.create_task(pool.generate(demand()))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    hanging[1].cancel()
    await asyncio.wait_for(waiting, 10)
    for call in hanging:
        call.cancel()


# ---- starting -----------------------------------------------------------------------------------


async def test_an_actor_that_cannot_start_says_why() -> None:
    pool = pool_of(remote(FakeGenerator, 0.0, "raise"))
    with pytest.raises(
        ClusterError, match=r"^generator 0 did not start: RuntimeError: out of memory"
    ):
        await pool.start()
    with pytest.raises(ModelError, match=r"^teacher\.model: no good$"):
        await pool_of(remote(FakeGenerator, 0.0, "refuse")).start()


async def test_an_actor_that_hangs_at_the_start_names_the_limit() -> None:
    pool = pool_of(remote(FakeGenerator, 0.0, "hang"), startup_timeout_s=10.0)
    with pytest.raises(
        ClusterError, match=r"not ready after run\.startup_timeout_s = 10 s: its process is up, but"
    ):
        await pool.start()


async def test_an_actor_without_room_says_so_instead_of_waiting_for_ever() -> None:
    handle = remote(FakeGenerator, num_gpus=1)
    with pytest.raises(ClusterError, match="its process did not come up; is there room for it"):
        await pool_of(handle, startup_timeout_s=1.0).start()


async def test_an_actor_that_dies_once_while_starting_is_started_again(tmp_path: Path) -> None:
    pool = pool_of(remote(FakeGenerator, 0.0, f"die once {tmp_path / 'died'}"))
    await pool.start()
    assert (await pool.generate(demand())).version == 0


async def test_an_actor_that_always_dies_while_starting_ends_the_run() -> None:
    with pytest.raises(ClusterError, match="generator 0 did not start: Actor"):
        await pool_of(remote(FakeGenerator, 0.0, "die")).start()


async def test_a_replacement_that_cannot_start_ends_waiting_calls_as_well() -> None:
    handle = remote(FakeGenerator, 0.0, "refuse")
    good = remote(FakeGenerator)
    pool = pool_of(good, max_in_flight=1)
    await pool.start()
    pool._members[0].handle = handle  # what comes back in its place is no good
    with pytest.raises(ActorLost):
        await pool.generate(demand("die"))
    with pytest.raises(ModelError, match=r"teacher\.model: no good"):
        await asyncio.wait_for(pool.generate(demand()), 30)


# ---- weights ------------------------------------------------------------------------------------


async def test_weights_that_come_while_a_new_actor_takes_older_ones_reach_it() -> None:
    handle = remote(FakeGenerator, 1.0)
    pool = pool_of(handle)
    await pool.start()
    await pool.update(weights(1))
    with pytest.raises(ActorLost):
        await pool.generate(demand("raise"))
    async with asyncio.timeout(60):
        while not await takes_weights(handle):
            await asyncio.sleep(0.02)
    assert await pool.update(weights(2)) == 0.0, "nobody is ready"
    assert (await pool.generate(demand())).version == 2


async def takes_weights(handle: Actor) -> bool:
    try:
        return await handle.takes_weights.remote()
    except RayError:  # its process is being replaced
        return False


async def test_an_update_brings_every_actor_and_tells_the_slowest_seconds() -> None:
    pool = pool_of(remote(FakeGenerator), remote(FakeGenerator))
    await pool.start()
    assert await pool.update(weights(5)) == 0.25
    answers = await asyncio.gather(*(pool.generate(demand()) for _ in range(8)))
    assert {answer.version for answer in answers} == {5}
    assert len({answer.text for answer in answers}) == 2


async def test_a_generator_and_the_learner_that_published_may_die_together() -> None:
    """The weights are gone with the learner; its successor publishes them again."""
    learner, successor = remote(Publisher), remote(Publisher)
    pool = pool_of(remote(FakeGenerator))
    await pool.start()
    await pool.update(await learner.publish.remote(4))
    assert (await pool.generate(demand())).version == 4
    ray.kill(learner)
    with pytest.raises(ActorLost):
        await pool.generate(demand("die"))
    assert (await pool.generate(demand())).version == 0
    await pool.update(await successor.publish.remote(4))
    assert (await pool.generate(demand())).version == 4


async def test_going_back_restarts_every_actor_even_one_that_is_being_replaced() -> None:
    pool = pool_of(remote(FakeGenerator, 0.5), remote(FakeGenerator, 0.5))
    await pool.start()
    await pool.update(weights(7))
    before = {(await pool.generate(demand())).text for _ in range(2)}
    with pytest.raises(ActorLost):
        await pool.generate(demand("raise"))
    await asyncio.wait_for(pool.rewind(), 60)
    answers = await asyncio.gather(*(pool.generate(demand()) for _ in range(8)))
    assert {answer.version for answer in answers} == {0}
    assert not before & {answer.text for answer in answers}


# ---- targets ------------------------------------------------------------------------------------


def make_stores(count: int, max_bytes: int = 20_000_000) -> list[Actor]:
    options = {"max_task_retries": 5, "max_concurrency": 1}
    return [remote(TargetStoreActor, max_bytes, **options) for _ in range(count)]


def targets_of(scorers: list[Actor], stores: list[Actor], log: Events | None = None) -> ScorerPool:
    return ScorerPool(
        scorers,
        stores,
        IDENTITY,
        call_timeout_s=60.0,
        startup_timeout_s=120.0,
        log=cast(Any, log or Events()),
    )


def store_of(one: Rollout, stores: list[Actor]) -> int:
    return store_index(target_key(IDENTITY, one), len(stores))


async def stored(stores: list[Actor], one: Rollout) -> np.ndarray:
    key = target_key(IDENTITY, one)
    references = await stores[store_of(one, stores)].get.remote([key])
    return (await references[key]).values_TD


async def test_targets_survive_the_death_of_their_scorer() -> None:
    scorers, stores = [remote(FakeScorer)], make_stores(2)
    targets = targets_of(scorers, stores)
    await targets.start()
    assert await targets.ensure(rollout("a", 3)) == 5
    ray.kill(scorers[0])
    values_TD = await stored(stores, rollout("a", 3))
    assert values_TD.shape == (3, HIDDEN_SIZE) and (values_TD == 5).all()
    assert not values_TD.flags.writeable


async def test_a_sequence_is_scored_once_however_many_ask_at_once() -> None:
    scorer = remote(FakeScorer)
    targets = targets_of([scorer], make_stores(1))
    await targets.start()
    assert sorted(await asyncio.gather(*(targets.ensure(rollout("a")) for _ in range(5)))) == [
        0,
        0,
        0,
        0,
        3,
    ]
    assert await scorer.count.remote() == 1


async def test_a_scorer_that_dies_in_the_middle_is_asked_again() -> None:
    scorer = remote(FakeScorer)
    log = Events()
    targets = targets_of([scorer], make_stores(1), log)
    await targets.start()
    calls = [asyncio.create_task(targets.ensure(rollout(f"a{i}", 1 + i))) for i in range(4)]
    await asyncio.sleep(0.02)
    ray.kill(scorer, no_restart=False)
    assert await asyncio.wait_for(asyncio.gather(*calls), 60) == [3, 4, 5, 6]


async def test_another_text_under_the_same_id_has_targets_of_its_own() -> None:
    stores = make_stores(1)
    targets = targets_of([remote(FakeScorer)], stores)
    await targets.start()
    old, new = rollout("student-0", 2), rollout("student-0", 4)
    assert (await targets.ensure(old), await targets.ensure(new)) == (4, 6)
    assert (await stored(stores, old)).shape == (2, HIDDEN_SIZE)
    assert (await stored(stores, new)).shape == (4, HIDDEN_SIZE)


async def test_equal_text_is_scored_once_whatever_its_id_and_whoever_asks() -> None:
    """Two rows with the same text, and a second run over the same stores."""
    scorer, stores = remote(FakeScorer), make_stores(2)
    first = targets_of([scorer], stores)
    await first.start()
    assert await first.ensure(rollout("dataset-a", 3)) == 5
    assert await first.ensure(rollout("dataset-b", 3, version=7)) == 0
    second = targets_of([scorer], stores)
    await second.start()
    assert await second.ensure(rollout("dataset-c", 3)) == 0
    assert await scorer.count.remote() == 1


# ---- the learner's side -------------------------------------------------------------------------


def make_config(directory: Path, **sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"directory": directory / "run", "startup_timeout_s": 60},
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "data": {"train": ["train.jsonl"]},
        "learner": {"steps": 4, "batch_size": 2, "data_timeout_s": 60},
        "rollout": {"timeout_s": 30},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Config.model_validate(tree)


def make_links(
    config: Config,
    scorers: list[Actor],
    stores: list[Actor],
    *,
    buffer: Actor = None,
    data: tuple[Any, Any] = (None, None),
    log: Actor = None,
) -> tuple[Links, Actor]:
    """A learner's clients, and the orchestrator behind them."""
    peers = TrainingPeers(
        buffer=buffer,
        prompts=data[0],
        demonstrations=data[1],
        log=log or remote(LogActor, config.run.directory, settings=LOG),
        scorers=scorers,
        stores=stores,
        identity=IDENTITY,
    )
    orchestrator = remote(OrchestratorActor, config, config.rollout, (), peers)
    ray.get(orchestrator.start.remote(), timeout=60)
    wires = Wires(
        buffer=buffer,
        orchestrator=orchestrator,
        log=peers.log,
        control=cast(Any, None),
        stores=stores,
        identity=IDENTITY,
    )
    return Links.over(wires, config), orchestrator


LOG = {"resume_step": None, "commit": "", "command": ""}


def fetch(links: Links, rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
    assert links.targets is not None
    return links.targets.fetch(rollouts)


def make_buffer(config: Config) -> Actor:
    return remote(BufferActor, config, max_task_retries=-1)


def data_of(names: Sequence[str]) -> tuple[Any, Any]:
    """References to a prompt and a response for every name."""
    prompts = [
        Prompt(
            prompt_id=name,
            token_ids=np.array([1], dtype=np.int32),
            reference_ids=(),
            text="",
            references=(),
        )
        for name in names
    ]
    return ray.put(prompts), ray.put([rollout(f"dataset-{name}") for name in names])


def lengths(targets: dict[str, TeacherTargets]) -> dict[str, int]:
    found = {}
    for name, one in targets.items():
        assert isinstance(one, HiddenTargets)
        found[name] = len(one.values_TD)
    return found


def test_targets_that_went_with_their_store_are_scored_again(tmp_path: Path) -> None:
    scorer, stores = remote(FakeScorer), make_stores(2)
    links, _ = make_links(make_config(tmp_path), [scorer], stores)
    rollouts = [rollout(f"r{index}", 1 + index) for index in range(12)]
    assert {store_of(one, stores) for one in rollouts} == {0, 1}
    expected = {f"r{index}": 1 + index for index in range(12)}
    assert lengths(fetch(links, rollouts)) == expected
    assert lengths(fetch(links, rollouts)) == expected
    assert ray.get(scorer.count.remote()) == 12, "the second time everything is there"
    kill_and_await_restart(stores[1])
    assert lengths(fetch(links, rollouts)) == expected
    lost = sum(store_of(one, stores) == 1 for one in rollouts)
    assert ray.get(scorer.count.remote()) == 12 + lost


def test_stores_that_cannot_hold_a_step_are_named_with_their_key(tmp_path: Path) -> None:
    stores = make_stores(1, max_bytes=1000)
    links, _ = make_links(make_config(tmp_path), [remote(FakeScorer)], stores)
    with pytest.raises(
        ClusterError, match=r"1 teacher targets were gone again .* targets\.max_bytes"
    ):
        fetch(links, [rollout("r0")])


def test_a_roles_user_error_reaches_the_learner_as_itself(tmp_path: Path) -> None:
    links, _ = make_links(make_config(tmp_path), [remote(FakeScorer)], make_stores(1))
    with pytest.raises(ModelError) as caught:
        fetch(links, [rollout("r0", text="refuse")])
    assert str(caught.value) == "teacher.model: no good"


def test_a_role_that_does_not_reply_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path, learner={"data_timeout_s": 0.5})
    links, _ = make_links(config, [remote(FakeScorer)], make_stores(1))
    with pytest.raises(ClusterError, match=r"no reply within 0\.5 s: scoring 1 sequences"):
        fetch(links, [rollout("r0", text="hang")])


def test_a_checkpoint_of_other_data_is_refused_with_a_message(tmp_path: Path) -> None:
    config = make_config(tmp_path)

    def links_over(names: list[str]) -> Links:
        links, _ = make_links(config, [], [], buffer=make_buffer(config), data=data_of(names))
        return links

    saved = links_over(["a", "b"])
    saved.orchestrator.restore(None, 0)
    state = saved.buffer.state(0)
    other = links_over(["a", "b", "c"])
    with pytest.raises(RunDirectoryError, match="must be that of the saved buffer"):
        other.orchestrator.restore(state, 0)
    other.orchestrator.restore(None, 0)


# ---- the buffer dies -----------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d")


def test_a_buffer_that_died_answers_learners_with_an_error_and_goes_on_when_it_is_restored(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path)
    buffer = make_buffer(config)
    log = remote(LogActor, tmp_path / "log", settings=LOG)
    scorers, stores = [remote(FakeScorer)], make_stores(1)
    links, orchestrator = make_links(
        config, scorers, stores, buffer=buffer, data=data_of(NAMES), log=log
    )
    running = orchestrator.run.remote()
    links.orchestrator.restore(None, 0)
    links.buffer.report(Validation(step=0, loss=1.0, tokens=1))
    draw(links, 0)
    links.buffer.advance(1)
    state = links.buffer.state(1)
    second = draw(links, 1)

    waiting = buffer.draw.remote(3, 0, 100.0)  # no learner has advanced that far
    kill_and_await_restart(buffer)
    with pytest.raises(BufferLost, match="have to go back to the last checkpoint"):
        get(waiting)
    calls: list[Callable[[], object]] = [
        lambda: links.buffer.draw(1, 0, 10.0),
        lambda: links.buffer.waiting_for(1),
        lambda: links.buffer.advance(2),
        lambda: links.buffer.state(2),
        lambda: links.buffer.report(Validation(step=2, loss=1.0, tokens=1)),
        lambda: get(orchestrator.report_step.remote(TrainStep(step=2, loss=1.0), second)),
    ]
    for call in calls:
        with pytest.raises(BufferLost):
            call()
    assert not ray.wait([running], timeout=0.5)[0], "the orchestrator waits for the restore"

    links.orchestrator.restore(state, 1)
    assert draw(links, 1) == second, "the buffer is open again, at the same place"
    links.orchestrator.restore(state, 1)  # a learner died: the buffer did not
    records, _ = get(log.since.remote(0))
    events = [record.name for record in records if isinstance(record, EventRecord)]
    assert events == ["rewound", "replay buffer died", "rewound"]
    get(orchestrator.finish.remote())
    get(running)


def draw(links: Links, step: int) -> DrawFacts:
    plan = links.buffer.draw(step, 0, 60.0)
    assert plan is not None, links.buffer.waiting_for(step)
    return plan.facts


def get(call: Any) -> Any:
    return ray.get(call, timeout=60)


def test_what_was_done_for_a_buffer_that_died_is_nothing_to_the_restored_one(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, schedule={"type": "fixed", "phi": 1.0})
    buffer = make_buffer(config)

    def restore(incarnation: int) -> bool:
        call = buffer.restore.remote(incarnation, None, *data_of(NAMES))
        return get(call)

    assert not restore(1)
    before = get(buffer.work.remote())
    kill_and_await_restart(buffer)
    prompt_id = before.demand[0].prompt.prompt_id
    answer = dataclasses.replace(rollout("student-0"), ordinal=0, prompt_id=prompt_id)
    get([buffer.add.remote(1, answer), buffer.lose.remote(1, 1)])
    work = buffer.work.remote()
    assert not ray.wait([work], timeout=0.5)[0]
    assert restore(2)
    after = get(work)
    assert (before.incarnation, after.incarnation) == (1, 2)
    demands = [[(one.ordinal, one.attempt) for one in work.demand] for work in (before, after)]
    assert demands[0] == demands[1] != []
    get([buffer.add.remote(1, answer), buffer.lose.remote(1, 1)])
    counters = get(buffer.counters.remote(2))
    assert (counters.finished, counters.lost, counters.duplicates) == (0, 0, 0)
    with pytest.raises(BufferLost):
        get(buffer.counters.remote(1))
    get(buffer.add.remote(2, answer))
    assert get(buffer.counters.remote(2)).finished == 1


def group(config: Config, fit: Callable[[], None]) -> LearnerGroup:
    """Learners whose Ray Train is a plain function."""
    learners = LearnerGroup(cast(Any, None), cast(Any, SimpleNamespace(config=config)), print)
    trainer = SimpleNamespace(fit=fit)
    cast(Any, learners)._trainer = lambda: trainer
    return learners


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            WorkerGroupError("all", {0: BufferLost("died"), 1: RuntimeError("peer gone")}),
            r"^the replay buffer died, .* learner\.max_restarts = 3 times, .*failure\.txt",
        ),
        (
            WorkerGroupError("all", {1: RuntimeError("no memory\nat all")}),
            r"^rank 1 of the learners failed: RuntimeError: no memory\. The learners",
        ),
        (ControllerError(RuntimeError("lost")), r"^the controller of the learners failed: "),
    ],
)
def test_what_restarts_could_not_mend_ends_the_run_with_a_message(
    tmp_path: Path, failure: Exception, said: str
) -> None:
    def fit() -> None:
        raise failure

    config = make_config(tmp_path, run={"directory": str(tmp_path)})
    learners = group(config, fit)
    learners.start()
    learners.join(60)
    with pytest.raises(RunFailed, match=said):
        learners.raise_failure()
    assert (tmp_path / "failure.txt").read_text() == str(failure)


def test_what_a_rank_says_to_the_user_arrives_as_itself(tmp_path: Path) -> None:
    def fit() -> None:
        raise WorkerGroupError("all", {0: RuntimeError("peer gone"), 1: ModelError("student: no")})

    learners = group(make_config(tmp_path), fit)
    learners.start()
    learners.join(60)
    with pytest.raises(ModelError, match=r"^student: no$"):
        learners.raise_failure()
