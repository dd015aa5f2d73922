"""Hidden states of the quickstart's teacher and student on the quickstart's prompts.

Axes: N positions, D hidden size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_ray.models.heads import FrozenHead, load_frozen_head

TEACHER = Path("models/smollm2-135m-instruct")
STUDENT = Path("models/smollm2-106m-init")
PROMPTS = Path("data/quickstart/prompts.jsonl")


@dataclass(frozen=True)
class Positions:
    """Inputs of both output heads at the same positions, with the heads; float32."""

    teacher_hidden_ND: Tensor
    teacher_head: FrozenHead
    student_hidden_ND: Tensor
    student_head: FrozenHead


def load_positions(num_positions: int, teacher: Path, student: Path) -> Positions:
    """Some positions of real text, drawn at random over many prompts."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    generator = torch.Generator().manual_seed(0)
    texts = [
        json.loads(lines[i])["prompt"] for i in torch.randperm(len(lines), generator=generator)
    ]
    token_ids = [tokenizer(text).input_ids for text in texts[: max(8, num_positions // 8)]]
    # Beginnings of sentences are left out: the first tokens have hardly any context.
    kept = [(row, at) for row, ids in enumerate(token_ids) for at in range(4, len(ids))]
    chosen = [kept[i] for i in torch.randperm(len(kept), generator=generator)[:num_positions]]
    assert len(chosen) == num_positions, f"only {len(chosen)} positions in the prompts"
    hidden, heads = [], []
    for directory in (teacher, student):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            rows = [
                model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
                .last_hidden_state[0]
                .clone()
                for ids in token_ids
            ]
        hidden.append(torch.stack([rows[row][at] for row, at in chosen]))
        heads.append(
            load_frozen_head(directory, vocabulary_size=len(tokenizer), dtype=torch.float32)
        )
    return Positions(hidden[0], heads[0], hidden[1], heads[1])
