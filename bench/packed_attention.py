"""A packed row under transformers' block-diagonal mask, one sequence at a time, and in one kernel.

    python bench/packed_attention.py [--device cuda]

The bodies of the quickstart's student (forward and backward, as a learner computes it) and teacher
(forward, as a scorer does) in bfloat16, on rows of sequences of 85 tokens, the mean length of the
quickstart's data. The mask's cost grows with the square of the row. The kernel needs a GPU.

Axes: L packed tokens.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from _common import alternate, median, write
from _quickstart import STUDENT, TEACHER
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from distillm_ray.models.packed_attention import BY_SEQUENCE
from distillm_ray.models.row_path import RowPath, attention_of, backbone_of, run_row
from distillm_ray.models.varlen_attention import VARLEN

SEQUENCE = 85
NUM_SEQUENCES = {"cpu": (3, 7, 14, 24), "cuda": (24, 96, 192)}
WAYS = {
    "cpu": {"mask": "sdpa", "packed": BY_SEQUENCE},
    "cuda": {"mask": "sdpa", "packed": BY_SEQUENCE, "varlen": VARLEN},
}


def load(directory: Path, attention: str, device: torch.device) -> PreTrainedModel:
    """The model with one attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation=attention
    )
    nn.Module.to(model, device)
    return model


def run(model: PreTrainedModel, num_sequences: int, *, backward: bool) -> None:
    """One row through the body."""
    position_ids_L = torch.arange(SEQUENCE, device=model.device).repeat(num_sequences)
    token_ids_L = torch.arange(len(position_ids_L), device=model.device) + 100
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
    parser.add_argument("--device", choices=tuple(WAYS), default="cpu")
    arguments = parser.parse_args()
    device, ways = torch.device(arguments.device), WAYS[arguments.device]
    rows = []
    table = Table("model", "pass", "tokens in the row", *(f"{way} s" for way in ways), "ratios")
    for name, directory, backward in (("student", STUDENT, True), ("teacher", TEACHER, False)):
        models = {way: load(directory, attention, device) for way, attention in ways.items()}
        for num_sequences in NUM_SEQUENCES[arguments.device]:
            measured = alternate(
                {
                    way: partial(run, model, num_sequences, backward=backward)
                    for way, model in models.items()
                },
                arguments.repetitions,
                device,
            )
            seconds = {way: median(values) for way, values in measured.items()}
            row = {"model": name, "backward": backward, "tokens": num_sequences * SEQUENCE}
            rows.append(row | {f"{way}_seconds": value for way, value in seconds.items()})
            table.add_row(
                name,
                "forward, backward" if backward else "forward",
                str(row["tokens"]),
                *(f"{value:.3f}" for value in seconds.values()),
                ", ".join(f"{value / seconds['mask']:.2f}" for value in seconds.values()),
            )
    Console(width=100).print(table)
    suffix = "" if device.type == "cpu" else f"_{device.type}"
    content = {"repetitions": arguments.repetitions, "rows": rows}
    print(write(f"packed_attention{suffix}", content))


if __name__ == "__main__":
    main()
