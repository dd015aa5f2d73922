"""The DeepSpeed engine on real gloo ranks, against plain torch without packing, ranks or DeepSpeed.

One group of two processes and one of a single process run everything, for all ZeRO stages; the
tests read what they wrote.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_parameter_registration_hook,
)
from transformers import AutoModelForCausalLM

from distillm_ray.batching import pack, plan_step, plan_validation
from distillm_ray.checkpoint_export import write_model
from distillm_ray.config import (
    CrossEntropy,
    LearnerConfig,
    LoraConfig,
    LossConfig,
    SkewKL,
    SkewReverseKL,
    StudentConfig,
)
from distillm_ray.errors import RunDirectoryError
from distillm_ray.learner.checkpoint import LEARNER_FOLDER, Checkpoint, CheckpointMeta
from distillm_ray.learner.deepspeed_engine import engine_config
from distillm_ray.learner.learner import Learner
from distillm_ray.learner.optimizer import learning_rate_at
from distillm_ray.learner.student_model import build_student
from distillm_ray.loss.divergences import skew_kl
from distillm_ray.loss.terms import loss_at
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.partitioned import is_partitioned, whole_shape
from distillm_ray.remote.inputs import fetched
from distillm_ray.types import (
    HiddenTargets,
    LearnerBatch,
    Rollout,
    Source,
)
from distillm_ray.weights.adapters import with_adapters
from distillm_ray.weights.buckets import to_tensors
from tests import make

pytestmark = pytest.mark.integration

VOCABULARY = 41  # ids of the tokenizer; the head has three padding rows more
TEACHER_WIDTH = 12
STAGES = (0, 1, 2, 3)
LENGTHS = ((3, 2), (5, 9), (2, 4), (4, 1), (6, 7), (2, 12))  # prompt, response
OFFLOADED_STAGES = (2, 3)
STEPS = 3
DEEP = {"vocab_size": VOCABULARY + 3, "num_hidden_layers": 6, "tie_word_embeddings": True}
LOSS = LossConfig(terms=(SkewKL(alpha=0.1, weight=0.8), CrossEntropy(weight=0.3)))
CURRICULUM = LossConfig(
    terms=(
        SkewKL(on="dataset", curriculum=True, anchor_steps=2, final_weight=0.5),
        SkewReverseKL(on="student", curriculum=True, anchor_steps=2, final_weight=1.5),
    )
)


def learner_config(stage: int, **changes: Any) -> LearnerConfig:
    settings: dict[str, Any] = {
        "steps": 10,
        "batch_size": len(LENGTHS),
        "learning_rate": 0.5,
        "weight_decay": 0.05,
        "max_gradient_norm": 0.8,
        "optimizer": "sgd",
        "zero_stage": stage,
        "num_threads": 1,
    }
    return LearnerConfig(**(settings | changes))


def rollouts(step: int) -> list[Rollout]:
    rng = np.random.default_rng(100 + step)
    made = []
    for index, (num_prompt, num_response) in enumerate(LENGTHS):
        student = index % 2 == 1
        made.append(
            make.rollout(
                f"{step}-{index}",
                prompt=rng.integers(0, VOCABULARY, num_prompt, dtype=np.int32),
                response=rng.integers(0, VOCABULARY, num_response, dtype=np.int32),
                source=Source.STUDENT if student else Source.DATASET,
                version=step,
                ordinal=index if student else None,
                logprobs=np.full(num_response, -3.0) if student else None,
            )
        )
    return made


def hidden_targets(rollout: Rollout) -> HiddenTargets:
    seed = int(rollout.rollout_id.replace("-", ""))
    values = np.random.default_rng(seed).standard_normal((rollout.num_loss_tokens, TEACHER_WIDTH))
    return HiddenTargets(values_TD=values.astype(np.float32))


def teacher_head() -> FrozenHead:
    generator = torch.Generator().manual_seed(5)
    return FrozenHead(weight_VD=torch.randn(VOCABULARY, TEACHER_WIDTH, generator=generator))


def plans(step: int, num_ranks: int, loss: LossConfig = LOSS):
    draw = make.draw(rollouts(step), step=step)
    loss = loss_at(loss, step, num_steps=10)
    plan = plan_step(draw, num_ranks=num_ranks, max_micro_batch_tokens=16, loss=loss)
    return plan.ranks


def batches(step: int, rank: int, num_ranks: int, loss: LossConfig = LOSS) -> list[LearnerBatch]:
    targets = {rollout.rollout_id: hidden_targets(rollout) for rollout in rollouts(step)}
    return [pack(micro_batch, targets) for micro_batch in plans(step, num_ranks, loss)[rank]]


def validation_batches(rank: int, num_ranks: int) -> list[LearnerBatch]:
    ranks = plan_validation(rollouts(50), num_ranks=num_ranks, max_micro_batch_tokens=16)
    return [pack(micro_batch, None) for micro_batch in ranks[rank]]


def tiny_student(directory: Path) -> None:
    make.llama(
        vocab_size=VOCABULARY + 3,
        intermediate_size=24,
        tie_word_embeddings=True,
        initializer_range=0.3,
        eos_token_id=3,
    ).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"a": "tokenizer"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')


# ---- what the processes do ---------------------------------------------------------------------


def build(
    directory: Path,
    config: LearnerConfig,
    student: StudentConfig | None = None,
    loss: LossConfig = LOSS,
) -> Learner:
    return Learner(
        config,
        student or StudentConfig(model=directory / "student", dtype="float32"),
        loss,
        teacher_head=teacher_head(),
        vocabulary_size=VOCABULARY,
        device=torch.device("cpu"),
        seed=0,
        persistence_threshold=0,
    )


def gathered(learner: Learner, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for bucket in learner.gather_weights(dtype):
        found.update(to_tensors(bucket))
    return found


def train(learner: Learner, first: int, last: int, loss: LossConfig = LOSS) -> list[dict[str, Any]]:
    return [
        dataclasses.asdict(
            learner.train_step(
                batches(step, learner.rank, learner.num_ranks, loss),
                step,
                wait_seconds=learner.rank,
            )
        )
        for step in range(first, last)
    ]


def run_rank(rank: int, num_ranks: int, directory: Path) -> None:
    torch.set_num_threads(1)
    path = str(directory / f"store-{num_ranks}")
    store = dist.FileStore(path, num_ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    for stage in STAGES:
        run_stage(directory, stage, directory / f"{num_ranks}-{stage}")
    run_bfloat16(directory, directory / f"{num_ranks}-bfloat16")
    run_lora(directory, directory / f"{num_ranks}-lora")
    run_curriculum(directory, directory / f"{num_ranks}-curriculum")
    if num_ranks == 2:
        for stage in OFFLOADED_STAGES:
            run_offloaded(directory, stage, directory / f"offloaded-{stage}")
        run_loading(directory, directory / f"loading-{rank}.json")
    dist.destroy_process_group()


def run_stage(directory: Path, stage: int, out: Path) -> None:
    learner = build(directory, learner_config(stage))
    facts: dict[str, Any] = {
        "validation": learner.validation_loss(validation_batches(learner.rank, learner.num_ranks))
    }
    facts["steps"] = train(learner, 0, STEPS)
    trained = gathered(learner)
    bad = batches(STEPS, learner.rank, learner.num_ranks)
    if learner.rank == learner.num_ranks - 1:
        skew_kl_N, cross_entropy_N = bad[0].term_weights_N
        bad[0] = dataclasses.replace(bad[0], term_weights_N=(np.inf * skew_kl_N, cross_entropy_N))
    facts["bad"] = dataclasses.asdict(learner.train_step(bad, STEPS))
    after_bad = gathered(learner)
    learner.save(out / "checkpoint" / LEARNER_FOLDER)
    facts["next"] = train(learner, STEPS, STEPS + 1)
    continued = gathered(learner)
    learner.export(out / "model", [3, 4])
    restored = build(directory, learner_config(2 if stage == 1 else stage))
    restored.load(out / "checkpoint" / LEARNER_FOLDER)
    train(restored, STEPS, STEPS + 1)
    resumed = gathered(restored)
    if learner.rank == 0:
        torch.save((trained, after_bad, continued, resumed), out / "weights.pt")
        (out / "facts.json").write_text(json.dumps(facts))


def run_bfloat16(directory: Path, out: Path) -> None:
    student = StudentConfig(model=directory / "student", dtype="bfloat16")
    config = learner_config(1, optimizer="adamw", learning_rate=1e-6, min_learning_rate_ratio=1.0)
    learner = build(directory, config, student)
    losses = [record["loss"] for record in train(learner, 0, 1)]
    if learner.rank == 0:
        out.mkdir(exist_ok=True)
        torch.save((losses, gathered(learner, torch.bfloat16)), out / "weights.pt")
    else:
        gathered(learner, torch.bfloat16)


def run_lora(directory: Path, out: Path) -> None:
    """LoRA and activation checkpointing under ZeRO-3, exported with the adapters merged."""
    student = StudentConfig(
        model=directory / "student",
        dtype="float32",
        lora=LoraConfig(rank=2, alpha=4.0),
    )
    config = learner_config(3, learning_rate=5.0, activation_checkpointing="full")
    learner = build(directory, config, student)
    before = received(learner, student)
    steps = train(learner, 0, STEPS)
    after = received(learner, student)
    log_probs_N = learner.token_logprobs(batches(0, 0, 1)[0])
    learner.save(out / "checkpoint" / LEARNER_FOLDER)
    learner.export(out / "model", [3, 4])
    if learner.rank == 0:
        torch.save((before, after, steps, log_probs_N), out / "weights.pt")


def run_offloaded(directory: Path, stage: int, out: Path) -> None:
    """DeepSpeed's control flow of an offload; main memory is the accelerator's memory here."""
    learner = build(directory, learner_config(stage, offload="cpu"))
    steps = train(learner, 0, STEPS)
    trained = gathered(learner)
    learner.save(out / "checkpoint")
    train(learner, STEPS, STEPS + 1)
    continued = gathered(learner)
    restored = build(directory, learner_config(stage, offload="cpu"))
    restored.load(out / "checkpoint")
    train(restored, STEPS, STEPS + 1)
    resumed = gathered(restored)
    if learner.rank == 0:
        torch.save((steps, trained, continued, resumed), out / "weights.pt")


def run_loading(directory: Path, out: Path) -> None:
    """The most elements of the student that this rank holds until there is an engine."""
    arrived: list[Any] = []
    peaks = {"loading": 0, "forward": 0}

    def held() -> int:
        parts = (one.ds_tensor.numel() if is_partitioned(one) else 0 for one in arrived)
        return sum(one.numel() for one in arrived) + sum(parts)

    def arrive(module: Any, name: str, parameter: torch.nn.Parameter) -> None:
        is_seed = parameter.numel() == 1  # of the partitioning
        if not parameter.is_meta and not is_seed and all(one is not parameter for one in arrived):
            arrived.append(parameter)
            peaks["loading"] = max(peaks["loading"], held())

    def ran(module: Any, args: Any, result: Any) -> None:
        peaks["forward"] = max(peaks["forward"], held())

    hooks = (
        register_module_parameter_registration_hook(arrive),
        register_module_forward_hook(ran),
    )
    config = learner_config(3)
    build_student(
        StudentConfig(model=directory / "deep", dtype="float32"),
        LOSS,
        vocabulary_size=VOCABULARY,
        device=torch.device("cpu"),
        zero_stage=3,
        engine_settings=engine_config(config, torch.float32, persistence_threshold=0),
    )
    for hook in hooks:
        hook.remove()
    sizes = [math.prod(whole_shape(one)) for one in arrived]
    out.write_text(json.dumps(peaks | {"whole": sum(sizes), "largest": max(sizes)}))


def received(learner: Learner, student: StudentConfig) -> dict[str, torch.Tensor]:
    """The weights that a generator makes of the adapters that the learner publishes."""
    base = learner.adapter_base(torch.float32)
    assert base is not None
    buckets = list(learner.gather_weights(torch.float32))
    assert all("lora" in name for bucket in buckets for name in bucket)
    if learner.rank > 0:
        assert buckets == [{}]
        return {}
    whole = with_adapters(fetched(student.model), buckets, base)
    return {name: tensor for bucket in whole for name, tensor in to_tensors(bucket)}


def run_curriculum(directory: Path, out: Path) -> None:
    """Four steps; and the last three of them resumed from within the anchor's window."""
    learner = build(directory, learner_config(3), loss=CURRICULUM)
    steps = train(learner, 0, 1, CURRICULUM)
    learner.save(out / "within")
    steps += train(learner, 1, 4, CURRICULUM)
    learner.save(out / "end")
    restored = build(directory, learner_config(3), loss=CURRICULUM)
    restored.load(out / "within")
    resumed = train(restored, 1, 4, CURRICULUM)
    restored.save(out / "resumed")
    if learner.rank == 0:
        (out / "facts.json").write_text(json.dumps({"steps": steps, "resumed": resumed}))


# ---- the reference: no packing, no ranks, no DeepSpeed ------------------------------------------


def reference(directory: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and weights after three steps."""
    model = AutoModelForCausalLM.from_pretrained(directory / "student", dtype=torch.float32)
    model.train()
    config = learner_config(0)
    head = teacher_head()
    losses, norms = [], []
    for step in range(STEPS):
        model.zero_grad()
        loss = torch.zeros(())
        [micro_batches] = plans(step, 1)
        sequences = [one for micro_batch in micro_batches for one in micro_batch.sequences]
        num_data_tokens, num_student_tokens = (
            sum(one.rollout.num_loss_tokens for one in sequences if one.rollout.source is source)
            for source in (Source.DATASET, Source.STUDENT)
        )
        for sequence in sequences:
            rollout = sequence.rollout
            token_ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.response_ids]))
            logits_LV = model(input_ids=token_ids.long()[None], use_cache=False).logits[0]
            first = len(rollout.prompt_ids) - 1
            student_TV = logits_LV[first : first + len(rollout.response_ids), :VOCABULARY]
            teacher_TV = torch.from_numpy(hidden_targets(rollout).values_TD) @ head.weight_VD.T
            values_T = skew_kl(student_TV, teacher_TV, alpha=0.1)
            labels_T = torch.from_numpy(rollout.response_ids).long()
            entropy_T = torch.nn.functional.cross_entropy(student_TV, labels_T, reduction="none")
            # Each source has half of the slots, spread evenly over its tokens.
            num_tokens = num_data_tokens if rollout.source is Source.DATASET else num_student_tokens
            loss = loss + 0.8 * values_T.sum() / 2 / num_tokens
            # Cross-entropy holds on data-set text only.
            if rollout.source is Source.DATASET:
                loss = loss + 0.3 * entropy_T.sum() / num_data_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
        rate = 0.5 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 9)))
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                decay = config.weight_decay if parameter.ndim >= 2 else 0.0
                parameter -= rate * (parameter.grad + decay * parameter)
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: value.detach() for name, value in model.named_parameters()}


@torch.no_grad()
def cross_entropy(student: Path, of: list[Rollout]) -> float:
    """Sum over the response tokens, in float64."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    total = 0.0
    for rollout in of:
        token_ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()
        logits_LV = model(input_ids=token_ids[None]).logits[0][:, :VOCABULARY]
        first = len(rollout.prompt_ids)
        log_q_LV = logits_LV.log_softmax(-1)
        total -= log_q_LV[first - 1 : -1].gather(-1, token_ids[first:, None]).sum().item()
    return total


# ---- tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("learner")
    tiny_student(directory / "student")
    make.llama(**DEEP).save_pretrained(directory / "deep")
    for num_ranks in (1, 2):
        spawn(run_rank, args=(num_ranks, directory), nprocs=num_ranks)
    yield directory


def facts_of(runs: Path, num_ranks: int, stage: int | str) -> dict[str, Any]:
    return json.loads((runs / f"{num_ranks}-{stage}" / "facts.json").read_text())


def weights_of(runs: Path, num_ranks: int, stage: int | str) -> Any:
    return torch.load(runs / f"{num_ranks}-{stage}" / "weights.pt", weights_only=False)


def assert_close(left: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], rtol=0, atol=tolerance), name


def test_the_learning_rate_warms_up_linearly_and_ends_at_the_ratio_of_a_cosine() -> None:
    config = learner_config(
        0, steps=13, warmup_steps=4, learning_rate=1.0, min_learning_rate_ratio=0.2
    )
    rates = [learning_rate_at(step, config) for step in range(13)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.6)  # half way: the mean of peak and end
    assert rates[12] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_ranks_really_have_unequal_tokens_and_several_micro_batches() -> None:
    first, second = plans(0, 2)
    tokens = [
        sum(one.rollout.num_tokens for micro_batch in rank for one in micro_batch.sequences)
        for rank in (first, second)
    ]
    assert tokens[0] != tokens[1]
    assert len(first) == len(second) >= 2


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_three_steps_equal_plain_torch_on_any_number_of_ranks_and_stage(
    runs: Path, stage: int, num_ranks: int
) -> None:
    losses, norms, expected = reference(runs)
    steps = facts_of(runs, num_ranks, stage)["steps"]
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=1e-5)
    assert [record["gradient_norm"] for record in steps] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.8, "the test has to clip"
    assert_close(weights_of(runs, num_ranks, stage)[0], expected, 2e-6)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_loss_on_one_rank_is_skipped_by_all(
    runs: Path, stage: int, num_ranks: int
) -> None:
    trained, after_bad, continued, _ = weights_of(runs, num_ranks, stage)
    facts = facts_of(runs, num_ranks, stage)
    assert facts["bad"]["skipped"] is True
    assert_close(trained, after_bad, 0.0)
    assert [record["skipped"] for record in facts["next"]] == [False]
    assert all(tensor.isfinite().all() for tensor in continued.values())
    assert not torch.equal(continued["model.norm.weight"], trained["model.norm.weight"])


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_restored_learner_goes_on_bit_for_bit(runs: Path, stage: int, num_ranks: int) -> None:
    """Stage 1 is restored as stage 2, which the rules of resuming allow."""
    _, _, continued, resumed = weights_of(runs, num_ranks, stage)
    assert_close(continued, resumed, 1e-7 if stage == 1 else 0.0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_log_of_a_step_counts_over_all_ranks(runs: Path, stage: int) -> None:
    one, two = (facts_of(runs, num_ranks, stage)["steps"][0] for num_ranks in (1, 2))
    num_tokens = sum(prompt + response for prompt, response in LENGTHS)
    data = [rollout for rollout in rollouts(0) if rollout.source is not Source.STUDENT]
    entropy = cross_entropy(runs / "student", data) / sum(one.num_loss_tokens for one in data)
    for record in (one, two):
        assert record["tokens"] == record["positions"] == num_tokens
        assert record["loss_tokens"] == sum(response for _, response in LENGTHS)
        assert record["learning_rate"] == pytest.approx(0.5)
        assert record["infinite_tokens"] == 0
        # Each source has half of the slots; cross-entropy is the mean over the data-set tokens.
        shares = record["loss_by_shelf"]
        divergences = 0.5 * (shares["fresh"] + shares["dataset"] - 0.3 * entropy)
        assert record["loss"] == pytest.approx(divergences + 0.3 * entropy, rel=1e-5)
        by_term = record["loss_by_term"]
        assert by_term == {
            "skew_kl on all": pytest.approx(divergences / 0.8, rel=1e-5),
            "cross_entropy on dataset": pytest.approx(entropy, rel=1e-5),
        }
        assert record["loss"] == pytest.approx(
            sum(term.weight * by_term[f"{term.type} on {term.on}"] for term in LOSS.terms)
        )
    assert one["loss_by_shelf"] == pytest.approx(two["loss_by_shelf"], rel=1e-5)
    assert one["logprob_gap"] == pytest.approx(two["logprob_gap"], rel=1e-5)
    assert (one["wait_seconds"], two["wait_seconds"]) == (0.0, 1.0)
    assert 0 < two["rank_token_imbalance"] < 0.5


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_validation_is_the_cross_entropy_of_every_response_token_once(
    runs: Path, num_ranks: int
) -> None:
    expected = cross_entropy(runs / "student", rollouts(50))
    for stage in STAGES:
        loss, tokens = facts_of(runs, num_ranks, stage)["validation"]
        assert loss == pytest.approx(expected, rel=1e-5)
        assert tokens == sum(response for _, response in LENGTHS)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_exported_directory_is_the_trained_model_with_the_students_files(
    runs: Path, stage: int, num_ranks: int
) -> None:
    directory = runs / f"{num_ranks}-{stage}" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    continued = weights_of(runs, num_ranks, stage)[2]
    assert_close({name: value.detach() for name, value in loaded.named_parameters()}, continued, 0)
    for name in ("tokenizer.json", "generation_config.json"):
        student = json.loads((runs / "student" / name).read_text())
        assert json.loads((directory / name).read_text()) == student


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_bfloat16_student_has_float32_master_weights_and_no_spurious_first_step(
    runs: Path, num_ranks: int
) -> None:
    """AdamW moves a weight by at most the learning rate, far below bfloat16's resolution."""
    losses, after = weights_of(runs, num_ranks, "bfloat16")
    assert losses == pytest.approx(reference(runs)[0][:1], rel=0.03)
    model = AutoModelForCausalLM.from_pretrained(runs / "student", dtype=torch.bfloat16)
    before = {name: value.detach() for name, value in model.named_parameters()}
    assert_close(
        {name: value.float() for name, value in after.items()},
        {name: value.float() for name, value in before.items()},
        1e-2,
    )
    unchanged = sum((after[name] == before[name]).sum().item() for name in before)
    assert unchanged > 0.95 * sum(value.numel() for value in before.values())


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_lora_student_under_zero_3_learns_and_exports_merged_weights(
    runs: Path, num_ranks: int
) -> None:
    before, published, steps, log_probs_N = weights_of(runs, num_ranks, "lora")
    assert steps[-1]["skipped"] is False
    model = AutoModelForCausalLM.from_pretrained(runs / f"{num_ranks}-lora" / "model").eval()
    after = {name: value.detach() for name, value in model.named_parameters()}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "_proj" in name}
    for name, value in after.items():
        assert torch.allclose(published[name], value, atol=1e-6), name
    batch = batches(0, 0, 1)[0]
    expected = []
    for start, end in zip(batch.boundaries[:-1], batch.boundaries[1:], strict=True):
        token_ids = torch.from_numpy(batch.token_ids_L[start:end].copy()).long()[None]
        log_q_LV = model(input_ids=token_ids).logits[0, :, :VOCABULARY].log_softmax(-1)
        inside = (batch.loss_positions_N >= start) & (batch.loss_positions_N < end)
        positions = torch.from_numpy(batch.loss_positions_N[inside] - start).long()
        labels = torch.from_numpy(batch.labels_N[inside].copy()).long()
        expected.append(log_q_LV[positions, labels])
    assert torch.allclose(torch.from_numpy(log_probs_N), torch.cat(expected), atol=1e-4)


def test_one_and_two_ranks_agree_on_the_lora_student(runs: Path) -> None:
    one, two = (weights_of(runs, num_ranks, "lora")[2] for num_ranks in (1, 2))
    losses = [[record["loss"] for record in steps] for steps in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def anchors_of(runs: Path, num_ranks: int, checkpoint: str) -> list[list[float]]:
    """Sum, sequences and steps of each term."""
    path = runs / f"{num_ranks}-curriculum" / checkpoint / "anchors.json"
    return [list(anchor.values()) for anchor in json.loads(path.read_text())]


def test_a_curriculum_has_the_same_anchors_alphas_and_losses_on_any_number_of_ranks(
    runs: Path,
) -> None:
    one, two = (facts_of(runs, num_ranks, "curriculum")["steps"] for num_ranks in (1, 2))
    for step, (record, other) in enumerate(zip(one, two, strict=True)):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert record["loss_by_term"] == pytest.approx(other["loss_by_term"], rel=1e-5)
        assert record["alpha_by_term"] == pytest.approx(other["alpha_by_term"], rel=1e-3)
        alphas = list(record["alpha_by_term"].values())
        if step < 2:
            assert alphas == pytest.approx([0.1, 0.1])
        # A step's loss has the weights that hold in it: half of the run is five steps.
        weights = (1 - 0.1 * step, 1 + 0.1 * step)
        terms = zip(weights, record["loss_by_term"].values(), strict=True)
        assert record["loss"] == pytest.approx(sum(weight * term for weight, term in terms))
    assert min(one[3]["alpha_by_term"].values()) < 0.099
    for anchor, other in zip(anchors_of(runs, 1, "end"), anchors_of(runs, 2, "end"), strict=True):
        assert anchor == pytest.approx(other, rel=1e-4)
        assert anchor[1:] == [6, 2]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_resumed_curriculum_goes_on_with_its_partial_sums(runs: Path, num_ranks: int) -> None:
    facts = facts_of(runs, num_ranks, "curriculum")
    assert [anchor[1:] for anchor in anchors_of(runs, num_ranks, "within")] == [[3, 1], [3, 1]]
    for record, other in zip(facts["steps"][1:], facts["resumed"], strict=True):
        assert record["loss"] == other["loss"]
        assert record["alpha_by_term"] == other["alpha_by_term"]
    assert anchors_of(runs, num_ranks, "resumed") == anchors_of(runs, num_ranks, "end")


@pytest.mark.parametrize("stage", OFFLOADED_STAGES)
def test_offloaded_steps_equal_those_without_and_are_restored(runs: Path, stage: int) -> None:
    steps, trained, continued, resumed = torch.load(
        runs / f"offloaded-{stage}" / "weights.pt", weights_only=False
    )
    losses, norms, expected = reference(runs)
    assert [record["loss"] for record in steps] == pytest.approx(losses, abs=1e-5)
    assert [record["gradient_norm"] for record in steps] == pytest.approx(norms, rel=1e-4)
    assert_close(trained, expected, 2e-6)
    assert_close(continued, resumed, 0.0)
    assert not torch.equal(continued["model.norm.weight"], trained["model.norm.weight"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_zero_3_never_holds_more_than_its_share_and_one_layer(
    runs: Path, rank: int
) -> None:
    counts = json.loads((runs / f"loading-{rank}.json").read_text())
    model = make.llama(**DEEP)
    layer, head = model.model.layers[0], model.lm_head.weight.numel()
    layer_size = sum(one.numel() for one in layer.parameters())
    share = math.ceil(counts["whole"] / 2)
    assert counts["whole"] == sum(one.numel() for one in model.parameters())
    assert share < counts["loading"] <= share + counts["largest"]
    # The check of the output head holds the head beside a layer.
    assert share + layer_size <= counts["forward"] <= share + layer_size + head


# ---- models from checkpoints ---------------------------------------------------------------------


def exported_from(run: Path, student: StudentConfig, out: Path) -> dict[str, torch.Tensor]:
    meta = CheckpointMeta(step=STEPS, phi=0.0, validation=None)
    write_model(student, Checkpoint(path=run / "checkpoint", meta=meta), out, [3, 4])
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_model_from_a_checkpoint_has_the_weights_of_its_step(
    runs: Path, tmp_path: Path, num_ranks: int, stage: int
) -> None:
    run = runs / f"{num_ranks}-{stage}"
    _, saved, continued, _ = torch.load(run / "weights.pt")
    student = StudentConfig(model=runs / "student", dtype="float32")
    found = exported_from(run, student, tmp_path / "model")
    assert {name: torch.equal(found[name], saved[name]) for name in found} == dict.fromkeys(
        found, True
    )
    assert any(not torch.equal(found[name], continued[name]) for name in found)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_of_a_checkpoint_are_merged_as_the_learner_merges_them(
    runs: Path, tmp_path: Path, num_ranks: int
) -> None:
    run = runs / f"{num_ranks}-lora"
    student = StudentConfig(
        model=runs / "student",
        dtype="float32",
        lora=LoraConfig(rank=2, alpha=4.0),
    )
    found = exported_from(run, student, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    for name, value in model.named_parameters():
        assert torch.equal(found[name], value), name


def test_a_damaged_checkpoint_is_named(runs: Path, tmp_path: Path) -> None:
    whole = runs / "1-1" / "checkpoint"
    shutil.copytree(whole, tmp_path / "checkpoint")
    file = next((tmp_path / "checkpoint").rglob("mp_rank_00_model_states.pt"))
    file.write_bytes(file.read_bytes()[:100])
    student = StudentConfig(model=runs / "student", dtype="float32")
    with pytest.raises(RunDirectoryError, match="its files are damaged"):
        exported_from(tmp_path, student, tmp_path / "model")
