"""Loading the student with its adapters, and settings that are refused."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distillm_ray.batching import pack
from distillm_ray.config import LoraConfig, LossConfig, StudentConfig
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.learner.student_model import (
    build_student,
    load_student,
    run_row,
    training_request,
)
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule
from distillm_ray.types import (
    HiddenTargets,
    LogitTargets,
    MicroBatchPlan,
    PlannedSequence,
    Source,
    TeacherTargets,
    TopKTargets,
)
from tests import make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    make.llama().save_pretrained(path)
    return path


def test_bfloat16_under_zero_0_is_refused_with_the_remedy(directory: Path) -> None:
    student = StudentConfig(model=directory, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"set learner\.zero_stage=1"):
        load_student(student, device=CPU, zero_stage=0)


def test_lora_trains_only_its_adapters_on_every_linear_layer_of_the_backbone(
    directory: Path,
) -> None:
    student = StudentConfig(model=directory, dtype="float32", lora=LoraConfig(rank=2))
    model = load_student(student, device=CPU, zero_stage=1).model
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B, layers, projections of a layer
    assert all("lora_" in name for name in trained)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_a_lora_target_that_is_no_linear_layer_is_refused(directory: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj", "embed_tokens"))
    student = StudentConfig(model=directory, dtype="float32", lora=lora)
    with pytest.raises(ModelError, match=r"student\.lora\.target_modules must name linear layers"):
        load_student(student, device=torch.device("cpu"), zero_stage=1)


def test_the_output_head_as_a_lora_target_is_refused(directory: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj", "lm_head"))
    student = StudentConfig(model=directory, dtype="float32", lora=lora)
    with pytest.raises(ModelError, match=r"student\.lora\.target_modules must not name the output"):
        load_student(student, device=CPU, zero_stage=1)


def test_a_lora_target_that_the_model_lacks_is_named(directory: Path) -> None:
    lora = LoraConfig(target_modules=("no_such_layer",))
    student = StudentConfig(model=directory, dtype="float32", lora=lora)
    with pytest.raises(ModelError, match="no_such_layer"):
        load_student(student, device=CPU, zero_stage=1)


# ---- rows with sequences that no term compares with the teacher ----------------------------------

MINILLM_TERMS = [
    {"on": "student", "type": "reverse_kl", "max_importance": 1.2},
    {"on": "student", "type": "policy_gradient", "horizon": "rest"},
    {"on": "corpus", "type": "cross_entropy", "weight": 0.5},
]
KL_TERMS = [{"on": "student", "type": "forward_kl"}, *MINILLM_TERMS[2:]]


def targets_of(kind: str, num_tokens: int) -> TeacherTargets:
    rng = np.random.default_rng(7)
    match kind:
        case "hidden":
            return HiddenTargets(values_TD=rng.normal(size=(num_tokens, 6)).astype(np.float32))
        case "logits":
            return LogitTargets(values_TV=rng.normal(size=(num_tokens, 64)).astype(np.float32))
    return TopKTargets(
        ids_TK=np.tile(np.array([3, 9, 4], dtype=np.int32), (num_tokens, 1)),
        log_probs_TK=np.log(np.tile([0.5, 0.2, 0.1], (num_tokens, 1))).astype(np.float32),
    )


@pytest.mark.parametrize("implementation", ["fused", "plain"])
@pytest.mark.parametrize(
    ("kind", "terms"),
    [("hidden", MINILLM_TERMS), ("logits", MINILLM_TERMS), ("top_k", KL_TERMS)],
)
def test_a_piece_of_the_corpus_adds_the_same_beside_a_response_and_in_a_row_of_its_own(
    directory: Path, kind: str, terms: list[dict[str, object]], implementation: str
) -> None:
    loss = LossConfig.model_validate({"terms": terms, "implementation": implementation})
    config = StudentConfig(model=directory, dtype="float32")
    student = build_student(config, loss, vocabulary_size=64, device=CPU, zero_stage=0)
    rng = torch.Generator().manual_seed(1)
    weight_VD = torch.randn(64, 6, generator=rng)
    head = FrozenHead(weight_VD=weight_VD, bias_V=None, rule=LogitRule())
    response = make.rollout("s", prompt=[5, 6], response=[7, 8, 9], logprobs=[-4.0, -4.2, -3.9])
    piece = make.rollout("c", prompt=[3], response=[10, 11, 12, 13], source=Source.CORPUS)
    num_student = len(terms) - 1
    scored = make.planned(response, term_weights=(*[0.5] * num_student, 0.0))
    plain = make.planned(piece, term_weights=(*[0.0] * num_student, 0.25))
    plain = replace(plain, needs_targets=False)
    targets = {"s": targets_of(kind, 3)}

    def losses(*rows: Sequence[PlannedSequence]) -> tuple[list[float], list[torch.Tensor]]:
        student.zero_grad()
        by_term = torch.zeros(len(terms))
        for row in rows:
            batch = pack(MicroBatchPlan(sequences=tuple(row)), targets)
            request = training_request(batch, loss, head, CPU)
            result = run_row(student, batch, request, CPU)
            result.loss.backward()
            by_term += result.losses_M
            assert result.num_infinite == 0
        return by_term.tolist(), [
            one.grad.clone() for one in student.parameters() if one.grad is not None
        ]

    together, gradients = losses((scored, plain))
    apart, same_gradients = losses((scored,), (plain,))
    alone, _ = losses((plain,))
    assert together == pytest.approx(apart, rel=1e-5, abs=1e-7)
    for one, other in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert alone[:-1] == [0.0] * num_student
    assert alone[-1] == pytest.approx(together[-1], rel=1e-5)
    assert alone[-1] > 0.0


def test_a_row_that_lacks_the_targets_of_a_weighted_token_is_refused() -> None:
    batch = pack(MicroBatchPlan(sequences=(make.planned(make.rollout("s")),)), None)
    with pytest.raises(AssertionError, match="no teacher targets for"):
        training_request(batch, LossConfig(), None, CPU)
