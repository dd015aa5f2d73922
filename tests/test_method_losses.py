"""The loss of every method on one hand-made batch, against formulas written out with `math`.

Two tokens of the data (or of the teacher) and two of the student, in a vocabulary of three ids. The
output heads are identities, so that hidden states are logits and those the logarithms of the
distributions below.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

import numpy as np
import pytest
import torch

from distillm_ray.batching import pack, plan_step
from distillm_ray.config import Config
from distillm_ray.learner.student_model import training_request
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import plain_loss
from distillm_ray.methods import METHODS
from distillm_ray.models.heads import PLAIN_RULE, FrozenHead
from distillm_ray.types import HiddenTargets, Rollout, Source
from tests import make

Distribution = tuple[float, float, float]

# Two tokens of the data, then two of the student; p is the teacher, q the student.
P: list[Distribution] = [(0.7, 0.2, 0.1), (0.1, 0.1, 0.8), (0.3, 0.6, 0.1), (0.5, 0.25, 0.25)]
Q: list[Distribution] = [(0.5, 0.3, 0.2), (0.6, 0.1, 0.3), (0.2, 0.5, 0.3), (0.4, 0.4, 0.2)]
LABELS = (0, 2, 1, 0)
BEHAVIOUR = (0.4, 0.5)  # probability with which each of the student's tokens was sampled
DATA, STUDENT = (0, 1), (2, 3)


def kl(p: Distribution, q: Distribution) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mixed(p: Distribution, q: Distribution, share: float) -> Distribution:
    a, b, c = (share * x + (1 - share) * y for x, y in zip(p, q, strict=True))
    return a, b, c


def skew(alpha: float) -> Callable[[int], float]:
    return lambda i: kl(P[i], mixed(P[i], Q[i], alpha))


def skew_reverse(alpha: float) -> Callable[[int], float]:
    return lambda i: kl(Q[i], mixed(Q[i], P[i], alpha))


def jensen_shannon(i: int) -> float:
    middle = mixed(P[i], Q[i], 0.5)
    return 0.5 * kl(P[i], middle) + 0.5 * kl(Q[i], middle)


def mean(tokens: tuple[int, ...], value: Callable[[int], float]) -> float:
    return fmean(value(i) for i in tokens)


def surprise(i: int) -> float:
    return -math.log(Q[i][LABELS[i]])


def minillm() -> float:
    ratio = [Q[i][LABELS[i]] / b for i, b in zip(STUDENT, BEHAVIOUR, strict=True)]  # 1.25, 0.8
    single = fmean(min(r, 1.2) * kl(Q[i], P[i]) for r, i in zip(ratio, STUDENT, strict=True))
    # The first token is rewarded with log p - log q of the second, the last with nothing.
    reward = math.log(P[3][0] / Q[3][0])
    long = -min(ratio[0] * reward, 1.2 * reward) / 2
    return single + long


EXPECTED: dict[str, tuple[tuple[int, ...], float]] = {
    "sft": (DATA, mean(DATA, surprise)),
    "kd": (DATA, mean(DATA, lambda i: kl(P[i], Q[i]))),
    "seqkd": (DATA, mean(DATA, surprise)),
    "imitkd": (STUDENT, mean(STUDENT, lambda i: kl(P[i], Q[i]))),
    "gkd": ((*DATA, *STUDENT), mean((*DATA, *STUDENT), jensen_shannon)),
    "opd": (STUDENT, mean(STUDENT, lambda i: kl(Q[i], P[i]))),
    "minillm": (STUDENT, minillm()),
    "distillm": ((*DATA, *STUDENT), mean((*DATA, *STUDENT), skew(0.1))),
    "distillm2": (
        (*DATA, *STUDENT),
        0.5 * mean(DATA, skew(0.1)) + 0.5 * mean(STUDENT, skew_reverse(0.1)),
    ),
}
"""The tokens of the batch, and the loss."""


def batch_of(tokens: tuple[int, ...], writer: Source) -> list[Rollout]:
    rollouts = []
    if DATA[0] in tokens:
        rollouts.append(make.rollout("data", response=[LABELS[i] for i in DATA], source=writer))
    if STUDENT[0] in tokens:
        rollouts.append(
            make.rollout(
                "student",
                response=[LABELS[i] for i in STUDENT],
                logprobs=np.log(BEHAVIOUR),
                ordinal=0,
            )
        )
    return rollouts


@pytest.mark.parametrize("loss_of", [fused_loss, plain_loss])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_hand_made_batch(method: str, loss_of: Callable[..., object]) -> None:
    tokens, expected = EXPECTED[method]
    config = Config.model_validate(make.tree(method=method, **METHODS[method]))
    rollouts = batch_of(tokens, Source(config.data.responses))
    plan = plan_step(make.draw(rollouts), num_ranks=1, max_micro_batch_tokens=100, loss=config.loss)
    ((micro_batch,),) = plan.ranks
    distributions = dict(zip(("data", "student"), (P[:2], P[2:]), strict=True))
    targets = {
        name: HiddenTargets(values_TD=np.log(np.array(values, dtype=np.float32)))
        for name, values in distributions.items()
    }
    batch = pack(micro_batch, targets)
    # Rows in the order of the packed sequences.
    order = {"data": Q[:2], "student": Q[2:]}
    hidden_ND = torch.tensor([q for name in batch.rollout_ids for q in order[name]]).log()
    request = training_request(
        batch, config.loss, FrozenHead(weight_VD=torch.eye(3)), torch.device("cpu")
    )
    result = loss_of(
        hidden_ND, torch.eye(3), None, rule=PLAIN_RULE, vocabulary_size=3, request=request
    )
    assert float(result.loss) == pytest.approx(expected, rel=1e-5)  # pyright: ignore[reportAttributeAccessIssue]
