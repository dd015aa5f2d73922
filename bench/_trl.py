"""TRL's on-policy DistillationTrainer on the benchmark's models and prompts; peers.py starts it.

    .venv-bench/bin/python bench/_trl.py STEPS OUTPUT

Writes when each step ended (seconds since the epoch) and the response tokens generated until then.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _speed import BATCH_SIZE, DATA, MAX_NEW_TOKENS, STUDENT, TEACHER
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]

from distillm_ray.models.dtypes import resolve_dtype

BETA = 0.5  # the generalized Jensen-Shannon divergence of GKD's own experiments


class Clock(TrainerCallback):
    """Notes the end of every optimizer step."""

    def __init__(self) -> None:
        self.step_ends: list[float] = []
        self.response_tokens: list[int] = []
        self.generated = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.step_ends.append(time.time())
        self.response_tokens.append(self.generated)


def main() -> None:
    steps, output = int(sys.argv[1]), Path(sys.argv[2])
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()]
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    dtype = resolve_dtype("auto", "cpu")  # the faster of its choices on this processor
    load = {"dtype": dtype}
    student: Any = AutoModelForCausalLM.from_pretrained(STUDENT, **load)
    teacher = AutoModelForCausalLM.from_pretrained(TEACHER, **load)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT, padding_side="left")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=BATCH_SIZE,
                max_completion_length=MAX_NEW_TOKENS,
                learning_rate=1e-4,
                beta=BETA,
                temperature=1.0,
                gradient_checkpointing=False,
                bf16=False,  # the weights have their dtype already
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                logging_steps=steps,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        generate = student.generate

        def counted(*arguments: Any, **settings: Any) -> Any:
            sequences = generate(*arguments, **settings)
            ids = sequences if isinstance(sequences, torch.Tensor) else sequences.sequences
            responses = ids[:, settings["input_ids"].shape[1] :]
            is_end = responses == tokenizer.eos_token_id
            until_end = is_end.int().argmax(dim=1) + 1
            lengths = torch.where(is_end.any(dim=1), until_end, responses.shape[1])
            clock.generated += int(lengths.sum())
            return sequences

        student.generate = counted
        trainer.train()
    output.write_text(
        json.dumps({"step_ends": clock.step_ends, "response_tokens": clock.response_tokens})
    )


if __name__ == "__main__":
    main()
