"""The generator pool over real Ray actors that die, raise and hang on demand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from ray.exceptions import RayError

from distillm_ray.cluster.member import MAX_FAILURES
from distillm_ray.cluster.pool import ActorLost
from distillm_ray.cluster.rollout import GeneratorPool
from distillm_ray.config import GeneratorPoolConfig, SamplingConfig
from distillm_ray.errors import ClusterError, ModelError
from distillm_ray.rollout.generator import SlowRequest
from tests import make
from tests.integration.actors import Actor, Events, remote, until
from tests.integration.fakes import FakeGenerator, Publisher, demand

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

GREEDY = SamplingConfig(temperature=0.0)


def pool_of(
    *handles: Actor,
    log: Events | None = None,
    max_in_flight: int = 4,
    stall_timeout_s: float = 60.0,
    startup_timeout_s: float = 120.0,
) -> GeneratorPool:
    config = GeneratorPoolConfig(max_in_flight=max_in_flight, stall_timeout_s=stall_timeout_s)
    return GeneratorPool(
        handles,
        config,
        keep_in_flight=True,
        startup_timeout_s=startup_timeout_s,
        log=cast(Any, log or Events()),
    )


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("die", "ActorUnavailableError"), ("raise", "RuntimeError: out of memory")],
)
async def test_an_actor_that_fails_is_replaced_and_gets_the_newest_weights(
    trouble: str, said: str
) -> None:
    log = Events()
    pool = pool_of(remote(FakeGenerator), log=log)
    await pool.start()
    await pool.update(make.weights(3))
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
    pool = pool_of(remote(FakeGenerator), stall_timeout_s=2.0)
    await pool.start()
    before = await pool.generate(demand())
    with pytest.raises(ActorLost, match="generator 0: TimeoutError"):
        await pool.generate(demand("hang"))
    after = await pool.generate(demand())
    assert after.text != before.text


async def test_a_call_that_its_actor_gave_up_is_the_only_thing_that_is_lost() -> None:
    log = Events()
    pool = pool_of(remote(FakeGenerator), log=log)
    await pool.start()
    before = await pool.generate(demand())
    beside = asyncio.create_task(pool.generate(demand("hang")))
    for _ in range(MAX_FAILURES + 1):
        with pytest.raises(SlowRequest, match=r"^too long$"):
            await pool.generate(demand("abort"))
    assert (await pool.generate(demand())).text == before.text
    assert (log.names, beside.done()) == ([], False)
    beside.cancel()


async def test_a_response_that_is_aborted_everywhere_ends_the_run_by_key() -> None:
    pool = pool_of(remote(FakeGenerator))
    await pool.start()
    with pytest.raises(ClusterError, match=r"^too long, 3 times; raise timeout_s, or lower"):
        await pool.respond(make.prompt(text="abort"), GREEDY, 0)


async def test_a_kill_from_outside_loses_all_calls_but_counts_as_one_failure() -> None:
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


async def test_the_other_actors_keep_working_while_one_is_replaced() -> None:
    log = Events()
    pool = pool_of(remote(FakeGenerator, 3.0), remote(FakeGenerator, 3.0), log=log)
    await pool.start()
    with pytest.raises(ActorLost):
        await pool.generate(demand("raise"))
    responses = await asyncio.gather(*(pool.generate(demand()) for _ in range(4)))
    assert log.names == ["generator 0 failed"], "it is not back yet"
    assert len({one.text for one in responses}) == 1


async def test_a_response_is_requested_again_until_an_actor_returns_it(tmp_path: Path) -> None:
    pool = pool_of(remote(FakeGenerator))
    await pool.start()
    raised = tmp_path / "raised"
    response = await pool.respond(make.prompt(text=f"raise once {raised}"), GREEDY, 0)
    assert response.rollout_id == "student-0"
    assert raised.exists()


async def test_a_user_error_is_raised_unchanged_and_replaces_no_actor() -> None:
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
    for index in range(MAX_FAILURES - 1):
        with pytest.raises(ActorLost):
            await pool.generate(demand(f"raise {index}"))
    await pool.generate(demand())  # a success resets the count
    for index in range(MAX_FAILURES - 1):
        with pytest.raises(ActorLost):
            await pool.generate(demand(f"raise {index} again"))
    last = asyncio.create_task(pool.generate(demand("raise")))
    waiting = asyncio.create_task(pool.respond(make.prompt(), GREEDY, 0))
    message = r"^generator 0 failed 3 times in a row, the last time with: RuntimeError: out of mem"
    for call in (last, waiting):
        with pytest.raises(ClusterError, match=message):
            await asyncio.wait_for(call, 30)


async def test_calls_go_to_the_least_busy_actor_and_wait_if_all_are_full() -> None:
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


async def test_an_actor_that_cannot_start_is_reported_with_its_error() -> None:
    pool = pool_of(remote(FakeGenerator, 0.0, "raise"))
    with pytest.raises(
        ClusterError, match=r"^generator 0 did not start: RuntimeError: out of memory"
    ):
        await pool.start()
    with pytest.raises(ModelError, match=r"^teacher\.model: no good$"):
        await pool_of(remote(FakeGenerator, 0.0, "refuse")).start()


async def test_a_start_that_hangs_is_reported_with_its_limit() -> None:
    pool = pool_of(remote(FakeGenerator, 0.0, "hang"), startup_timeout_s=10.0)
    with pytest.raises(
        ClusterError, match=r"not ready after run\.startup_timeout_s = 10 s: its process is up, but"
    ):
        await pool.start()


async def test_an_actor_that_does_not_fit_the_cluster_is_reported() -> None:
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
    pool._members[0].handle = handle  # its replacement does not start
    with pytest.raises(ActorLost):
        await pool.generate(demand("die"))
    with pytest.raises(ModelError, match=r"teacher\.model: no good"):
        await asyncio.wait_for(pool.generate(demand()), 30)


# ---- weights ------------------------------------------------------------------------------------


async def test_an_update_reaches_a_new_actor_that_is_still_loading_older_weights() -> None:
    handle = remote(FakeGenerator, 1.0)
    pool = pool_of(handle)
    await pool.start()
    await pool.update(make.weights(1))
    with pytest.raises(ActorLost):
        await pool.generate(demand("raise"))
    async with asyncio.timeout(240):
        while not await takes_weights(handle):
            await asyncio.sleep(0.02)
    assert await pool.update(make.weights(2)) == 0.0, "no actor is ready"
    assert (await pool.generate(demand())).version == 2


async def takes_weights(handle: Actor) -> bool:
    try:
        return await handle.takes_weights.remote()
    except RayError:  # its process is being replaced
        return False


async def test_an_update_reaches_every_actor_and_returns_the_slowest_time() -> None:
    pool = pool_of(remote(FakeGenerator), remote(FakeGenerator))
    await pool.start()
    assert await pool.update(make.weights(5)) == 0.25
    responses = await asyncio.gather(*(pool.generate(demand()) for _ in range(8)))
    assert {one.version for one in responses} == {5}
    assert len({one.text for one in responses}) == 2


async def test_a_generator_and_the_learner_that_published_may_die_together() -> None:
    """The weights are lost with the learner. Its successor publishes them again."""
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


async def test_a_rewind_restarts_every_actor_even_one_that_is_being_replaced() -> None:
    pool = pool_of(remote(FakeGenerator, 0.5), remote(FakeGenerator, 0.5))
    await pool.start()
    await pool.update(make.weights(7))
    before = {(await pool.generate(demand())).text for _ in range(2)}
    with pytest.raises(ActorLost):
        await pool.generate(demand("raise"))
    await asyncio.wait_for(pool.rewind(), 240)
    responses = await asyncio.gather(*(pool.generate(demand()) for _ in range(8)))
    assert {one.version for one in responses} == {0}
    assert not before & {one.text for one in responses}
