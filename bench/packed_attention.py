"""A packed row on a CPU: transformers' block-diagonal mask against one sequence at a time.

    python bench/packed_attention.py

The bodies of the quickstart's student (forward and backward, as a learner computes it) and teacher
(forward, as a scorer does) in bfloat16, on rows of sequences of 85 tokens, the mean length of the
quickstart's data. The mask's cost grows with the square of the row.

Axes: L packed tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _common import alternate, median, write
from _quickstart import STUDENT, TEACHER
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from distillm_ray.models.packed_attention import BY_SEQUENCE
from distillm_ray.models.row_path import RowPath, attention_of, backbone_of, run_row

SEQUENCE = 85
CPU = torch.device("cpu")


def load(directory: Path, *, packed: bool) -> PreTrainedModel:
    """The model with the one attention or the other."""
    attention = BY_SEQUENCE if packed else "sdpa"
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=attention
    )


def run(model: PreTrainedModel, num_sequences: int, *, backward: bool) -> None:
    """One row through the body."""
    position_ids_L = torch.arange(SEQUENCE).repeat(num_sequences)
    token_ids_L = torch.arange(len(position_ids_L)) + 100
    model.train(backward)
    with torch.set_grad_enabled(backward):
        path = RowPath(attention=attention_of(model))
        hidden_LD = run_row(backbone_of(model), token_ids_L, position_ids_L, path)
    if backward:
        hidden_LD.float().square().mean().backward()
        model.zero_grad(set_to_none=False)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    rows = []
    table = Table("model", "pass", "tokens in the row", "mask s", "one by one s", "ratio")
    for name, directory, backward in (("student", STUDENT, True), ("teacher", TEACHER, False)):
        masked, packed = load(directory, packed=False), load(directory, packed=True)
        for num_sequences in (3, 7, 14, 24):
            seconds = alternate(
                {
                    "mask": lambda: run(masked, num_sequences, backward=backward),  # noqa: B023
                    "packed": lambda: run(packed, num_sequences, backward=backward),  # noqa: B023
                },
                repetitions,
                CPU,
            )
            row = {
                "model": name,
                "backward": backward,
                "tokens": num_sequences * SEQUENCE,
                "mask_seconds": median(seconds["mask"]),
                "packed_seconds": median(seconds["packed"]),
            }
            rows.append(row)
            table.add_row(
                name,
                "forward, backward" if backward else "forward",
                str(row["tokens"]),
                f"{row['mask_seconds']:.2f}",
                f"{row['packed_seconds']:.2f}",
                f"{row['packed_seconds'] / row['mask_seconds']:.2f}",
            )
    Console(width=100).print(table)
    print(write("packed_attention", {"repetitions": repetitions, "rows": rows}))


if __name__ == "__main__":
    main()
