"""How many processes of each role balance: a search over simulations, under a budget. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from distillm_ray.cluster import placement
from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.config import Config
from distillm_ray.plan.simulation import Counts, Outcome
from distillm_ray.types import Device

GAIN = 0.03
"""More processes must shorten a step by at least this share, or they are not worth their cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the processes of a run may ask for together."""

    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The counts to use, and what a step then takes."""

    counts: Counts
    outcome: Outcome
    cpus: float  # that the processes ask for
    gpus: float


def resources(config: Config, counts: Counts, device: Device) -> tuple[float, float]:
    """CPUs and GPUs that so many processes ask for."""
    asked = _roles(config, counts, device)
    return (
        sum(role.count * role.cpus for role in asked),
        sum(role.count * role.gpus for role in asked),
    )


def advise(
    config: Config, device: Device, budget: Budget, simulate: Callable[[Counts], Outcome]
) -> Advice | None:
    """The counts with the shortest step; of those within `GAIN` of it, the cheapest.

    For each number of learners the role that limits the run grows until the learners no longer
    wait, until it helps no more or until the budget is spent. None: the budget holds no run at all.

    Args:
        simulate: a step's outcome with so many processes.
    """

    def fits(counts: Counts) -> bool:
        cpus, gpus = resources(config, counts, device)
        return cpus <= budget.cpus and gpus <= budget.gpus

    found: list[tuple[tuple[float, float], Counts, Outcome]] = []
    for start in _starts(config):
        counts, last = start, float("inf")
        while fits(counts):
            outcome = simulate(counts)
            cpus, gpus = resources(config, counts, device)
            found.append(((gpus, cpus), counts, outcome))
            if outcome.seconds > (1.0 - GAIN) * last or outcome.limiting == "learner":
                break
            last = outcome.seconds
            counts = _grown(counts, outcome)
    if not found:
        return None
    shortest = min(outcome.seconds for _, _, outcome in found)
    good = [one for one in found if one[2].seconds <= shortest * (1.0 + GAIN)]
    (gpus, cpus), counts, outcome = min(good, key=lambda one: (one[0], one[2].seconds))
    return Advice(counts=counts, outcome=outcome, cpus=cpus, gpus=gpus)


def settled(config: Config, own: Counts, simulate: Callable[[Counts], Outcome]) -> Outcome:
    """The outcome at the size to which elastic pools grow: the learners' wait is what they follow.

    With pools of a fixed size it is that of `own`, the config's counts.
    """
    most = replace(
        own,
        generators=config.rollout.most if own.generators else 0,
        scorers=config.teacher.most if config.teacher is not None and own.scorers else 0,
    )
    counts = own
    while True:
        outcome = simulate(counts)
        grown = _grown(outcome.counts, outcome)
        wanted = replace(
            counts,
            generators=min(grown.generators, most.generators),
            scorers=min(grown.scorers, most.scorers),
        )
        if outcome.limiting == "learner" or wanted == counts:
            return outcome
        counts = wanted


def overrides(config: Config, counts: Counts) -> list[str]:
    """The counts as overrides of the config; empty where they are the config's own.

    A count within the config's range is its own.
    """
    own = Counts.of(config)
    teacher = config.teacher
    found = (
        ("learner.workers", counts.learners, own.learners, own.learners),
        ("rollout.actors", counts.generators, own.generators, config.rollout.most),
        ("teacher.actors", counts.scorers, own.scorers, teacher.most if teacher else 0),
    )
    if all(least <= count <= most for _, count, least, most in found if count):
        return []
    return [
        f"{key}={count}"
        for key, count, least, most in found
        if count and not (least < most and least <= count <= most)
    ]


def _starts(config: Config) -> Iterator[Counts]:
    """One process of each role that the run has; learners by powers of two."""
    own = Counts.of(config)
    learners = 1
    while learners <= config.learner.batch_size:
        yield Counts(
            learners=learners, generators=min(own.generators, 1), scorers=min(own.scorers, 1)
        )
        learners *= 2


def _grown(counts: Counts, outcome: Outcome) -> Counts:
    """Half as many again of the role that limits the run, at least one more."""
    if outcome.limiting == "generator":
        return replace(counts, generators=counts.generators + max(1, counts.generators // 2))
    return replace(counts, scorers=counts.scorers + max(1, counts.scorers // 2))


def _roles(config: Config, counts: Counts, device: Device) -> list[RoleSpec]:
    found = [replace(placement.learners(config, device), count=counts.learners)]
    if counts.generators:
        found.append(replace(placement.generators(config, device), count=counts.generators))
    if counts.scorers:
        found.append(replace(placement.scorers(config, device), count=counts.scorers))
    return found
