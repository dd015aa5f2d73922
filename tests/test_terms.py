"""The weight of each token in each term, and the loss of several terms in one walk.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from distillm_ray.batching import pack, plan_step
from distillm_ray.config import (
    AdaptiveKL,
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    LossConfig,
    ReverseKL,
    SkewKL,
    Term,
    Text,
)
from distillm_ray.config.files import parse_config
from distillm_ray.errors import ConfigError
from distillm_ray.loss import fused
from distillm_ray.loss.divergences import define, divergence_of_log_probabilities, log_probabilities
from distillm_ray.loss.fused import fused_loss
from distillm_ray.loss.head_loss import LossRequest, WeightedTerm, plain_loss
from distillm_ray.loss.teacher_tensors import TeacherHidden
from distillm_ray.loss.terms import Normalize, term_names, term_weights, token_weights
from distillm_ray.loss.token_losses import Recipe, RowLosses, Rows, token_losses_in_place
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule
from distillm_ray.types import (
    Draw,
    DrawnSequence,
    FinishReason,
    LearnerBatch,
    Mix,
    Rollout,
    Shelf,
    Source,
)
from tests import make

FIXTURE = Path(__file__).parent / "fixtures" / "loss_of_two_weights.npz"
SOURCES = list(Source)
RESPONSES = [one for one in Source if one is not Source.CORPUS]


def rollout(name: str, source: Source, num_response: int, *, num_prompt: int = 2) -> Rollout:
    return make.rollout(
        name,
        prompt=[7] * num_prompt,
        response=[9] * num_response,
        source=source,
        finish=FinishReason.LENGTH,
    )


# Two data-set responses with 1 and 3 loss tokens, two student ones with 2 and 10.
MIXED = [
    rollout("d1", Source.DATASET, 1),
    rollout("d3", Source.DATASET, 3),
    rollout("s2", Source.STUDENT, 2),
    rollout("s10", Source.STUDENT, 10),
]


# ---- the weight of a token before any term -------------------------------------------------------


def test_source_weighs_each_source_by_its_slots_and_its_tokens_evenly() -> None:
    # Half of the slots each; 4 data-set tokens, 12 student tokens.
    weights = token_weights(MIXED, "source")
    expected = [1 / 2 / 4, 1 / 2 / 4, 1 / 2 / 12, 1 / 2 / 12]
    for one, weight in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(one, np.full(len(one), weight, dtype=np.float32))


def test_source_with_unequal_slots_agrees_with_a_computation_by_hand() -> None:
    weights = token_weights(MIXED[:3], "source")
    # 2 of 3 slots over 4 tokens, 1 of 3 over 2.
    assert weights[1].tolist() == [np.float32(2 / 3 / 4)] * 3
    assert weights[2].tolist() == [np.float32(1 / 3 / 2)] * 2


def test_tokens_weighs_every_token_alike() -> None:
    for one in token_weights(MIXED, "tokens"):
        np.testing.assert_array_equal(one, np.full(len(one), 1 / 16, dtype=np.float32))


def test_sequence_is_the_mean_of_the_sequences_means() -> None:
    for one in token_weights(MIXED, "sequence"):
        np.testing.assert_array_equal(one, np.full(len(one), 1 / 4 / len(one), dtype=np.float32))


def test_a_sequence_without_a_loss_token_does_not_count_as_a_slot() -> None:
    silent = make.rollout(response=[1], mask=[False], source=Source.DATASET)
    for normalize in get_args(Normalize):
        weights = token_weights([*MIXED, silent], normalize)
        assert len(weights[-1]) == 0
        for one, same in zip(weights, token_weights(MIXED, normalize), strict=False):
            np.testing.assert_array_equal(one, same)
    with pytest.raises(ValueError, match="must have a token under the loss, got 1 sequences"):
        token_weights([silent], "source")


@pytest.mark.parametrize("normalize", get_args(Normalize))
def test_a_corpus_changes_no_weight_of_a_response_and_its_own_sum_to_one(
    normalize: Normalize,
) -> None:
    corpus = [rollout("c6", Source.CORPUS, 6), rollout("c2", Source.CORPUS, 2)]
    *responses, six, two = token_weights([*MIXED, *corpus], normalize)
    for one, same in zip(responses, token_weights(MIXED, normalize), strict=True):
        np.testing.assert_array_equal(one, same)
    by_token = ([1 / 8] * 6, [1 / 8] * 2)
    expected = ([1 / 12] * 6, [1 / 4] * 2) if normalize == "sequence" else by_token
    assert six.tolist() == pytest.approx(expected[0], rel=1e-6)
    assert two.tolist() == pytest.approx(expected[1], rel=1e-6)


# ---- the weights of a term -----------------------------------------------------------------------


def weights_of(
    terms: Sequence[Term], rollouts: list[Rollout] = MIXED, normalize: Normalize = "source"
) -> list[list[list[float]]]:
    """The weights of all tokens, by term and rollout."""
    loss = LossConfig(terms=tuple(terms), normalize=normalize)
    by_rollout = term_weights(rollouts, loss)
    return [[weights.tolist() for weights in of_term] for of_term in zip(*by_rollout, strict=True)]


def test_a_divergence_scales_the_token_weights_and_is_zero_outside_its_text() -> None:
    [on_all, on_data] = weights_of([SkewKL(weight=2.0), ReverseKL(on="dataset", weight=0.5)])
    twelfth = float(np.float32(1 / 12))
    assert on_all == [[0.25], [0.25] * 3, [twelfth] * 2, [twelfth] * 10]
    assert on_data == [[0.0625], [0.0625] * 3, [0.0] * 2, [0.0] * 10]


def test_cross_entropy_is_a_mean_over_the_tokens_that_it_covers() -> None:
    [data, student, everything] = weights_of(
        [CrossEntropy(), CrossEntropy(on="student", weight=3.0), CrossEntropy(on="all")]
    )
    assert data == [[0.25], [0.25] * 3, [0.0] * 2, [0.0] * 10]
    assert student == [[0.0], [0.0] * 3, [0.25] * 2, [0.25] * 10]
    twenty_fourth = float(np.float32(1 / 24))
    assert everything == [[0.125], [0.125] * 3, [twenty_fourth] * 2, [twenty_fourth] * 10]


@pytest.mark.parametrize("on_corpus", [CrossEntropy, SkewKL])
def test_a_term_on_the_corpus_is_the_mean_over_its_tokens_times_its_weight(on_corpus: Any) -> None:
    corpus = [rollout("c3", Source.CORPUS, 3), rollout("c1", Source.CORPUS, 1)]
    others = [SkewKL(weight=2.0), CrossEntropy(on="all")]
    [skew, entropy, plain] = weights_of(
        [*others, on_corpus(on="corpus", weight=0.5)], [*MIXED, *corpus]
    )
    assert plain == [[0.0], [0.0] * 3, [0.0] * 2, [0.0] * 10, [0.125] * 3, [0.125]]
    # Terms on all text hold on responses, with the weights of a batch without a corpus.
    without = weights_of(others)
    assert [skew[:4], entropy[:4]] == without
    assert skew[4:] == entropy[4:] == [[0.0] * 3, [0.0]]


def test_a_batch_of_corpus_alone_has_weights() -> None:
    [[weights]] = weights_of([CrossEntropy(on="corpus")], [rollout("c", Source.CORPUS, 4)])
    assert weights == [0.25] * 4


def test_cross_entropy_with_sequence_normalization_is_the_mean_of_the_covered_means() -> None:
    [[one, three, *_]] = weights_of([CrossEntropy()], normalize="sequence")
    assert one == [0.5]
    assert three == pytest.approx([1 / 6] * 3, rel=1e-6)


def test_a_batch_without_covered_text_gives_weights_of_zero() -> None:
    [entropy, divergence] = weights_of([CrossEntropy(), SkewKL(on="dataset")], MIXED[2:])
    assert entropy == divergence == [[0.0] * 2, [0.0] * 10]


def test_the_source_decides_and_not_the_shelf() -> None:
    def plan_on(shelf: Shelf) -> list[list[float]]:
        sequences = tuple(DrawnSequence(rollout=one, shelf=shelf, age=0) for one in MIXED)
        draw = Draw(step=0, phi=0.5, psi=0.5, mix=Mix(), sequences=sequences)
        loss = LossConfig(terms=(CrossEntropy(),))
        plan = plan_step(draw, num_ranks=1, max_micro_batch_tokens=100, loss=loss)
        [[row]] = plan.ranks
        return [one.term_weights[0].tolist() for one in row.sequences]

    assert plan_on(Shelf.REPLAY) == plan_on(Shelf.DATASET)
    assert plan_on(Shelf.REPLAY) == [[0.25], [0.25] * 3, [0.0] * 2, [0.0] * 10]


batches = st.lists(
    st.tuples(st.sampled_from(SOURCES), st.integers(1, 30)), min_size=1, max_size=16
).map(lambda shapes: [rollout(str(i), source, n) for i, (source, n) in enumerate(shapes)])


@settings(max_examples=100, deadline=None)
@given(
    rollouts=batches,
    normalize=st.sampled_from(get_args(Normalize)),
    weight=st.floats(0.01, 100.0),
    divergence=st.sampled_from([SkewKL, ReverseKL, JensenShannon]),
)
def test_a_divergence_split_by_source_adds_up_to_the_one_on_all_exactly(
    rollouts: list[Rollout], normalize: Normalize, weight: float, divergence: Any
) -> None:
    split = [divergence(on=source.value, weight=weight) for source in RESPONSES]
    loss = LossConfig(terms=(divergence(weight=weight), *split), normalize=normalize)
    for whole, *parts in term_weights(rollouts, loss):
        np.testing.assert_array_equal(np.sum(parts, axis=0, dtype=np.float32), whole)
        assert whole.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(
    rollouts=batches,
    normalize=st.sampled_from(get_args(Normalize)),
    on=st.sampled_from(get_args(Text)),
    weight=st.floats(0.01, 100.0),
)
def test_the_weights_of_a_language_model_term_sum_to_its_own_weight(
    rollouts: list[Rollout], normalize: Normalize, on: Text, weight: float
) -> None:
    loss = LossConfig(terms=(CrossEntropy(on=on, weight=weight),), normalize=normalize)
    weights = np.concatenate([one for [one] in term_weights(rollouts, loss)])
    covered = any(CrossEntropy(on=on).covers(one.source) for one in rollouts)
    total = weights.astype(np.float64).sum()
    assert total == pytest.approx(weight if covered else 0.0, rel=1e-5)


# ---- names ---------------------------------------------------------------------------------------


def test_terms_are_named_by_type_and_text_and_by_parameters_where_that_is_not_unique() -> None:
    assert term_names((SkewKL(), CrossEntropy())) == ("skew_kl on all", "cross_entropy on dataset")
    assert term_names(
        (SkewKL(weight=0.5), SkewKL(alpha=0.3), SkewKL(on="student"), AdaptiveKL(mu=0.4))
    ) == (
        "skew_kl(alpha=0.1) on all",
        "skew_kl(alpha=0.3) on all",
        "skew_kl on student",
        "adaptive_kl on all",
    )


# ---- refusals ------------------------------------------------------------------------------------


def refusal(terms: list[dict[str, Any]], schedule: dict[str, Any] | None = None) -> str:
    values = make.tree(loss={"terms": terms}, schedule=schedule or {"type": "adaptive"})
    with pytest.raises(ConfigError) as caught:
        parse_config(values, name="x.yaml")
    return str(caught.value).removeprefix("x.yaml:\n").strip()


NEVER = {"type": "fixed", "phi": 0.0}
ALWAYS = {"type": "fixed", "phi": 1.0}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            [],
            "loss.terms must hold at least one term, got an empty list: there is nothing to learn",
        ),
        (
            [{"type": "skew_kl"}, {"type": "cross_entropy"}, {"type": "skew_kl", "weight": 3.0}],
            "loss.terms must differ in type, parameters or on, got skew_kl on all as terms 0 and",
        ),
    ],
)
def test_no_term_and_equal_terms_are_refused(terms: list[dict[str, Any]], message: str) -> None:
    assert refusal(terms).startswith(message)


def test_terms_that_differ_in_one_parameter_or_the_text_are_two_terms() -> None:
    terms = (SkewKL(), SkewKL(alpha=0.2), SkewKL(on="student"))
    assert LossConfig(terms=terms).terms == terms


@pytest.mark.parametrize(
    ("terms", "schedule", "message"),
    [
        (
            [{"type": "cross_entropy"}, {"type": "skew_kl", "on": "student"}],
            NEVER,
            "loss.terms.1.on must name text that the run draws (dataset) or be all, got student:"
            " phi is always 0, so skew_kl would hold nowhere; raise schedule.phi or set"
            " schedule.type=adaptive, or remove the term",
        ),
        (
            [{"type": "skew_kl"}, {"type": "cross_entropy"}],
            ALWAYS,
            "loss.terms.1.on must name text that the run draws (student) or be all, got dataset:"
            " phi is always 1,",
        ),
        (
            [{"type": "skew_kl"}, {"type": "cross_entropy"}],
            {"type": "adaptive", "start": 1.0},
            "loss.terms.1.on must name text that the run draws (student) or be all, got dataset:",
        ),
        (
            [{"type": "skew_kl"}, {"type": "cross_entropy", "on": "teacher"}],
            None,
            "loss.terms.1.on must name text that the run draws (dataset or student) or be all, got"
            " teacher: data.responses says that the data set wrote the responses of data.train,",
        ),
    ],
)
def test_a_term_on_text_that_the_run_never_draws_is_refused(
    terms: list[dict[str, Any]], schedule: dict[str, Any] | None, message: str
) -> None:
    assert refusal(terms, schedule).startswith(message)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            [{"type": "cross_entropy"}],
            "loss.terms must cover all text that the run draws (dataset and student), got terms on"
            " dataset only: student outputs would be generated and thrown away; add a term with on:"
            " student or on: all, or set schedule={type: fixed, phi: 0}",
        ),
        (
            [{"type": "reverse_kl", "on": "student"}],
            "loss.terms must cover all text that the run draws (dataset and student), got terms on"
            " student only: data-set slots would teach nothing; add a term with on: dataset or on:"
            " all, or set schedule={type: fixed, phi: 1}",
        ),
    ],
)
def test_text_that_is_drawn_and_covered_by_no_term_is_refused(
    terms: list[dict[str, Any]], message: str
) -> None:
    assert refusal(terms) == message


# ---- the walk over several terms -----------------------------------------------------------------

V, D, TEACHER_D = 29, 4, 6
LENGTHS = ((3, 2), (5, 7), (2, 4), (4, 1), (6, 5), (2, 3))  # prompt, response; odd ones: student
CASES = [
    (normalize, divergence_weight, cross_entropy_weight)
    for normalize in get_args(Normalize)
    for divergence_weight, cross_entropy_weight in ((1.0, 0.7), (0.7, 1.0))
]
PLAIN = LogitRule()
CHUNK = 8  # tokens


class Problem:
    """A batch of data-set and student text with heads of both models; all values are exact."""

    def __init__(self) -> None:
        rng = np.random.default_rng(4)
        self.rollouts = [
            make.rollout(
                str(index),
                prompt=rng.integers(0, V, prompt),
                response=rng.integers(0, V, response),
                source=Source.STUDENT if index % 2 else Source.DATASET,
                finish=FinishReason.LENGTH,
            )
            for index, (prompt, response) in enumerate(LENGTHS)
        ]

        def grid(*shape: int) -> Tensor:
            return torch.from_numpy((rng.integers(-192, 193, shape) / 128).astype(np.float32))

        num_tokens = sum(response for _, response in LENGTHS)
        self.hidden_ND, self.weight_VD = grid(num_tokens, D), grid(V, D)
        self.teacher_ND, self.teacher_VD = grid(num_tokens, TEACHER_D), grid(V, TEACHER_D)

    @property
    def teacher(self) -> TeacherHidden:
        return TeacherHidden(values_ND=self.teacher_ND, head=FrozenHead(weight_VD=self.teacher_VD))

    def batch(self, loss: LossConfig) -> LearnerBatch:
        draw = make.draw(self.rollouts)
        [[row]] = plan_step(draw, num_ranks=1, max_micro_batch_tokens=100, loss=loss).ranks
        return pack(row, None)

    def request(self, loss: LossConfig) -> LossRequest:
        batch = self.batch(loss)
        return LossRequest(
            terms=tuple(
                WeightedTerm(term=term, weights_N=torch.from_numpy(weights_N))
                for term, weights_N in zip(loss.terms, batch.term_weights_N, strict=True)
            ),
            teacher=self.teacher if loss.needs_teacher else None,
            labels_N=torch.from_numpy(batch.labels_N).long(),
        )

    def run(self, implementation: str, loss: LossConfig) -> dict[str, Tensor]:
        """Loss, values of the terms, log-probabilities and gradients."""
        hidden_ND = self.hidden_ND.clone().requires_grad_()
        weight_VD = self.weight_VD.clone().requires_grad_()
        request = self.request(loss)
        if implementation == "plain":
            result = plain_loss(
                hidden_ND, weight_VD, None, rule=PLAIN, vocabulary_size=V, request=request
            )
        else:
            result = fused_loss(
                hidden_ND,
                weight_VD,
                None,
                rule=PLAIN,
                vocabulary_size=V,
                request=request,
                memory_bytes=CHUNK * 2 * 4 * V,
            )
        result.loss.backward()
        assert hidden_ND.grad is not None and weight_VD.grad is not None
        assert result.log_probs_N is not None
        return {
            "loss": result.loss.detach(),
            "divergence": result.values[0],
            "log_probs": result.log_probs_N,
            "hidden gradient": hidden_ND.grad,
            "head gradient": weight_VD.grad,
        }


def two_terms(normalize: Normalize, divergence: float, cross_entropy: float) -> LossConfig:
    terms = (SkewKL(alpha=0.1, weight=divergence), CrossEntropy(weight=cross_entropy))
    return LossConfig(terms=terms, normalize=normalize)


@pytest.fixture(scope="module")
def recorded() -> dict[str, NDArray[np.float32]]:
    """Results of the loss before it had terms, for one divergence and one cross-entropy.

    Recorded at commit 4fff51c on a CPU in float32, with the inputs of `Problem`: `plan_step` with
    the normalization of the key gave `token_weights_N` and `cross_entropy_weights_N`; the request
    had the divergence with `divergence_weight * token_weights_N` and the cross-entropy with
    `cross_entropy_weight * cross_entropy_weights_N`; the fused walk had chunks of `CHUNK` tokens.
    """
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(("normalize", "divergence", "cross_entropy"), CASES)
def test_the_weights_of_two_terms_are_bit_for_bit_the_recorded_ones(
    normalize: Normalize,
    divergence: float,
    cross_entropy: float,
    recorded: dict[str, NDArray[np.float32]],
) -> None:
    batch = Problem().batch(two_terms(normalize, divergence, cross_entropy))
    for name, weights_N in zip(("divergence", "cross_entropy"), batch.term_weights_N, strict=True):
        expected_N = recorded[f"{normalize} {divergence} {cross_entropy} {name} weights"]
        assert weights_N.dtype == expected_N.dtype == np.float32
        np.testing.assert_array_equal(weights_N, expected_N)


@pytest.mark.parametrize("implementation", ["fused", "plain"])
@pytest.mark.parametrize(("normalize", "divergence", "cross_entropy"), CASES)
def test_the_loss_of_two_terms_is_the_recorded_one_up_to_the_processors_matrix_product(
    normalize: Normalize,
    divergence: float,
    cross_entropy: float,
    implementation: str,
    recorded: dict[str, NDArray[np.float32]],
) -> None:
    loss = two_terms(normalize, divergence, cross_entropy)
    for name, value in Problem().run(implementation, loss).items():
        key = f"{normalize} {divergence} {cross_entropy} {implementation} {name}"
        expected = recorded.get(key, recorded.get(f"{implementation} {name}"))
        assert expected is not None, key
        np.testing.assert_allclose(value.numpy(), expected, rtol=2e-6, atol=1e-7, err_msg=key)


@pytest.mark.parametrize(("normalize", "divergence", "cross_entropy"), CASES)
def test_the_fused_walk_of_two_terms_is_bit_for_bit_the_one_of_a_divergence_and_an_entropy(
    normalize: Normalize,
    divergence: float,
    cross_entropy: float,
    recorded: dict[str, NDArray[np.float32]],
) -> None:
    """The walk written out for one divergence and one cross-entropy, with the recorded weights."""
    problem = Problem()
    key = f"{normalize} {divergence} {cross_entropy}"
    divergence_N = torch.from_numpy(recorded[f"{key} divergence weights"])
    entropy_N = torch.from_numpy(recorded[f"{key} cross_entropy weights"])
    labels_N = problem.request(two_terms(normalize, 1.0, 1.0)).labels_N
    assert labels_N is not None
    recipe = Recipe(
        divergences=(SkewKL(alpha=0.1),),
        student_rule=PLAIN,
        teacher_rule=PLAIN,
        temperature=1.0,
        with_gradient=True,
    )
    num_tokens = len(labels_N)
    chunk = math.ceil(num_tokens / math.ceil(num_tokens / CHUNK))
    hidden_ND = torch.empty_like(problem.hidden_ND)
    weight_VD = torch.empty_like(problem.weight_VD)
    values, log_probs = [], []
    buffers = torch.empty(2, chunk, V)
    for start in range(0, num_tokens, chunk):
        part = slice(start, min(start + chunk, num_tokens))
        size = part.stop - part.start
        products_CV, teacher_CV = buffers[0, :size], buffers[1, :size]
        torch.mm(problem.hidden_ND[part], problem.weight_VD.T, out=products_CV)
        torch.mm(problem.teacher_ND[part], problem.teacher_VD.T, out=teacher_CV)
        rows = Rows(
            products_RV=products_CV,
            teacher=teacher_CV,
            teacher_ids_RK=None,
            weights=(divergence_N[part],),
            alphas=(None,),
            labels_R=labels_N[part],
            cross_entropy_weights_R=entropy_N[part],
        )
        for block in token_losses_in_place(recipe, rows, None, None):
            values += block.values
            assert block.log_probs_R is not None
            log_probs.append(block.log_probs_R)
        torch.mm(products_CV, problem.weight_VD, out=hidden_ND[part])
        beta = 0 if start == 0 else 1
        weight_VD.addmm_(products_CV.T, problem.hidden_ND[part], beta=beta)
    values_N, log_probs_N = torch.cat(values), torch.cat(log_probs)
    loss = torch.stack([(divergence_N * values_N).sum(), (entropy_N * -log_probs_N).sum()]).sum()

    actual = problem.run("fused", two_terms(normalize, divergence, cross_entropy))
    assert torch.equal(actual["divergence"], values_N)
    assert torch.equal(actual["log_probs"], log_probs_N)
    assert torch.equal(actual["loss"], loss)
    assert torch.equal(actual["hidden gradient"], hidden_ND)
    assert torch.equal(actual["head gradient"], weight_VD)


@pytest.mark.parametrize(("normalize", "divergence", "cross_entropy"), CASES)
def test_the_plain_loss_of_two_terms_is_bit_for_bit_the_one_of_a_divergence_and_an_entropy(
    normalize: Normalize,
    divergence: float,
    cross_entropy: float,
    recorded: dict[str, NDArray[np.float32]],
) -> None:
    problem = Problem()
    key = f"{normalize} {divergence} {cross_entropy}"
    divergence_N = torch.from_numpy(recorded[f"{key} divergence weights"])
    entropy_N = torch.from_numpy(recorded[f"{key} cross_entropy weights"])
    hidden_ND = problem.hidden_ND.clone().requires_grad_()
    weight_VD = problem.weight_VD.clone().requires_grad_()
    labels_N = problem.request(two_terms(normalize, 1.0, 1.0)).labels_N
    assert labels_N is not None
    logits_NV = hidden_ND @ weight_VD.T
    log_p_NV = log_probabilities(problem.teacher.head.logits(problem.teacher_ND))
    values_N = divergence_of_log_probabilities(
        define(SkewKL(alpha=0.1)), log_p_NV, log_probabilities(logits_NV)
    )
    log_probs_N = log_probabilities(logits_NV).gather(-1, labels_N.unsqueeze(-1)).squeeze(-1)
    loss = torch.stack([(divergence_N * values_N).sum(), (entropy_N * -log_probs_N).sum()]).sum()
    loss.backward()

    actual = problem.run("plain", two_terms(normalize, divergence, cross_entropy))
    assert torch.equal(actual["loss"], loss.detach())
    assert hidden_ND.grad is not None and weight_VD.grad is not None
    assert torch.equal(actual["hidden gradient"], hidden_ND.grad)
    assert torch.equal(actual["head gradient"], weight_VD.grad)


@pytest.mark.parametrize("implementation", ["fused", "plain"])
def test_terms_split_by_source_are_the_terms_on_all(implementation: str) -> None:
    problem = Problem()
    whole = problem.run(implementation, LossConfig(terms=(ForwardKL(),)))
    split = LossConfig(terms=(ForwardKL(on="dataset"), ForwardKL(on="student")))
    parts = problem.run(implementation, split)
    for name in ("loss", "hidden gradient", "head gradient"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", [fused_loss, plain_loss])
def test_the_values_come_in_the_order_of_the_terms_and_entropies_add_up(
    implementation: Any,
) -> None:
    problem = Problem()
    terms = (
        CrossEntropy(weight=0.5),
        ReverseKL(on="student"),
        CrossEntropy(on="student", weight=0.25),
        SkewKL(weight=2.0),
    )
    request = problem.request(LossConfig(terms=terms))
    hidden_ND = problem.hidden_ND.clone().requires_grad_()
    result = implementation(
        hidden_ND, problem.weight_VD, None, rule=PLAIN, vocabulary_size=V, request=request
    )
    result.loss.backward()

    other_ND = problem.hidden_ND.clone().requires_grad_()
    log_q_NV = torch.log_softmax(other_ND @ problem.weight_VD.T, -1)
    log_p_NV = torch.log_softmax(problem.teacher_ND @ problem.teacher_VD.T, -1)
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    assert request.labels_N is not None
    entropy_N = -log_q_NV.gather(-1, request.labels_N[:, None])[:, 0]
    reverse_N = (q_NV * (log_q_NV - log_p_NV)).sum(-1)
    skew_N = (p_NV * (log_p_NV - (0.1 * p_NV + 0.9 * q_NV).log())).sum(-1)
    expected = [entropy_N, reverse_N, entropy_N, skew_N]
    sums = [
        (one.weights_N * values_N).sum()
        for one, values_N in zip(request.terms, expected, strict=True)
    ]
    torch.stack(sums).sum().backward()
    for actual_N, values_N in zip(result.values, expected, strict=True):
        torch.testing.assert_close(actual_N, values_N.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.losses_M, torch.stack(sums).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.loss, result.losses_M.sum(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(hidden_ND.grad, other_ND.grad, rtol=1e-4, atol=1e-6)


def test_the_kernel_of_a_divergence_does_not_depend_on_its_text_and_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipes: list[Recipe] = []

    def record(recipe: Recipe, *arguments: Any) -> list[RowLosses]:
        recipes.append(recipe)
        return token_losses_in_place(recipe, *arguments)

    monkeypatch.setattr(fused, "token_losses_in_place", record)
    problem = Problem()
    for term in (SkewKL(), SkewKL(on="student", weight=0.3)):
        problem.run("fused", LossConfig(terms=(term,)))
    assert len(recipes) > 2 and len(set(recipes)) == 1
    problem.run("fused", LossConfig(terms=(SkewKL(alpha=0.2),)))
    assert len(set(recipes)) == 2
