"""A learner's step beside a bare PyTorch loop on the same packed rows, and skew KL beside SFT.

    python bench/learner_step.py [--steps 8] [--dtype bfloat16]

The quickstart's student, batches of 8 of its rows packed into at most 640 tokens, one thread, one
rank. The bare loop is what one writes by hand: the model of transformers, packed by position ids,
logits at the loss positions, cross-entropy, clipping, AdamW; in bfloat16 without float32 master
weights, which ours keeps. The learner with skew KL gets the teacher's hidden states ready-made, as
from the store on a second visit. All take turns, step by step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import REPOSITORY, alternate, median, write
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_ray.batching import pack, plan_step
from distillm_ray.config import (
    Config,
    CrossEntropy,
    LearnerConfig,
    LossConfig,
    SkewKL,
    StudentConfig,
)
from distillm_ray.config.files import load_config
from distillm_ray.data import tokenizing
from distillm_ray.data.splits import load_splits
from distillm_ray.learner.learner import Learner
from distillm_ray.models.heads import load_frozen_head
from distillm_ray.remote.inputs import fetched
from distillm_ray.types import (
    Draw,
    DrawnSequence,
    HiddenTargets,
    LearnerBatch,
    MicroBatchPlan,
    Mix,
    Rollout,
    Shelf,
)

BATCH_SIZE, MAX_TOKENS = 8, 640
SFT = LossConfig(terms=(CrossEntropy(),))
SKEW_KL = LossConfig(terms=(SkewKL(),))


def plans_of(rollouts: Sequence[Rollout], loss: LossConfig) -> tuple[MicroBatchPlan, ...]:
    """The packed rows of one step on one rank."""
    drawn = tuple(DrawnSequence(rollout=one, shelf=Shelf.DATASET, age=0) for one in rollouts)
    draw = Draw(step=0, phi=0.0, psi=0.0, mix=Mix(dataset=len(drawn)), sequences=drawn)
    plan = plan_step(draw, num_ranks=1, max_micro_batch_tokens=MAX_TOKENS, loss=loss)
    return plan.ranks[0]


def hidden_targets(teacher: nn.Module, rollouts: Sequence[Rollout]) -> dict[str, HiddenTargets]:
    """The teacher's hidden states at the positions that predict each response."""
    found = {}
    for rollout in rollouts:
        ids = torch.tensor([*rollout.prompt_ids.tolist(), *rollout.response_ids.tolist()])
        with torch.inference_mode():
            hidden = teacher(ids.unsqueeze(0)).last_hidden_state[0]
        first = len(rollout.prompt_ids) - 1
        values = hidden[first : first + len(rollout.response_ids)].float().numpy()
        found[rollout.rollout_id] = HiddenTargets(values_TD=values)
    return found


def bare_loop(model: Any, batches: Sequence[LearnerBatch]) -> Callable[[], None]:
    """A step of the loop that one writes by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    rows = [
        (
            torch.from_numpy(batch.token_ids_L.astype("int64")),
            torch.from_numpy(batch.position_ids_L.astype("int64")),
            torch.from_numpy(batch.loss_positions_N.astype("int64")),
            torch.from_numpy(batch.labels_N.astype("int64")),
        )
        for batch in batches
    ]
    total = sum(len(labels) for *_, labels in rows)

    def step() -> None:
        optimizer.zero_grad()
        for ids, positions, chosen, labels in rows:
            output = model(
                input_ids=ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=chosen,
            )
            loss = nn.functional.cross_entropy(output.logits[0].float(), labels, reduction="sum")
            (loss / total).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def learner_of(
    config: Config, loss: LossConfig, dtype: str, vocabulary_size: int, teacher: Path
) -> Learner:
    """One rank of the product's learner."""
    return Learner(
        LearnerConfig(
            steps=1000,
            batch_size=BATCH_SIZE,
            max_micro_batch_tokens=MAX_TOKENS,
            learning_rate=1e-5,
            num_threads=1,
        ),
        StudentConfig.model_validate({"model": config.student.model, "dtype": dtype}),
        loss,
        teacher_head=load_frozen_head(teacher, vocabulary_size=vocabulary_size),
        vocabulary_size=vocabulary_size,
        device=torch.device("cpu"),
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A learner's step beside a bare loop.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(REPOSITORY / "configs" / "quickstart.yaml", [])
    assert config.teacher is not None
    teacher_path = fetched(config.teacher.model)
    tokenizer = AutoTokenizer.from_pretrained(fetched(config.student.model))
    splits = load_splits(config.data, tokenizer, 0, map_files=tokenizing.map_files)
    rollouts = splits.train.demonstrations[:BATCH_SIZE]
    dtype = getattr(torch, arguments.dtype)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path, dtype=dtype)
    targets = hidden_targets(teacher.get_decoder(), rollouts)
    del teacher
    rows = {
        "SFT": [pack(one, None) for one in plans_of(rollouts, SFT)],
        "skew KL": [pack(one, targets) for one in plans_of(rollouts, SKEW_KL)],
    }
    vocabulary_size = len(tokenizer)
    learners = {
        name: learner_of(config, loss, arguments.dtype, vocabulary_size, teacher_path)
        for name, loss in (("SFT", SFT), ("skew KL", SKEW_KL))
    }
    bare = AutoModelForCausalLM.from_pretrained(fetched(config.student.model), dtype=dtype)
    functions: dict[str, Callable[[], Any]] = {
        "bare loop": bare_loop(bare, rows["SFT"]),
        "learner, SFT": lambda: learners["SFT"].train_step(rows["SFT"], 1),
        "learner, skew KL": lambda: learners["skew KL"].train_step(rows["skew KL"], 1),
    }
    seconds = alternate(functions, arguments.steps, torch.device("cpu"))
    tokens = sum(len(batch.token_ids_L) for batch in rows["SFT"])
    table = Table("", "s/step", "tokens/s", "speed / bare loop", title=f"{arguments.dtype}")
    baseline = median(seconds["bare loop"])
    for name, values in seconds.items():
        took = median(values)
        table.add_row(name, f"{took:.3f}", f"{tokens / took:.0f}", f"{baseline / took:.2f}")
    Console().print(table)
    write(
        f"learner_step_{arguments.dtype}",
        {"rows": len(rows["SFT"]), "tokens": tokens, "seconds": seconds},
    )


if __name__ == "__main__":
    main()
