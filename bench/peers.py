"""Ours beside TRL's on-policy trainer: the same models, prompts, batch and lengths, alternating.

    make bench-setup
    python bench/peers.py [--quick] [--repetitions 3] [--steps 16]

SmolLM2-135M into a student of 64M, batch 8, up to 64 new tokens, two cores for everybody. TRL's
`DistillationTrainer` generates with transformers, in our dtype, without gradient checkpointing. The
rows of ours: GKD strictly on-policy, as TRL trains, with vLLM and, as in the DistiLLM paper, with
transformers' generate(); GKD asynchronously; DistiLLM with a rollout rate of 0.2.

TRL's experimental asynchronous trainer hands weights to its vLLM server through NCCL, which a
machine without a GPU does not have.

Finished runs are kept in runs/bench/peers, by commit; the same command continues. `--again` begins
anew.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from _common import REPOSITORY, RESULTS, write
from _speed import Measured, draw, kept, prepare, ratio, run_ours, run_trl, show, write_config
from throughput import BURSTS, GKD, STRICT, distillm

FOLDER = REPOSITORY / "runs" / "bench" / "peers"
TRL = "TRL, on-policy"
OURS: dict[str, tuple[str, ...]] = {
    "GKD, strict, transformers": (
        *GKD,
        *STRICT,
        "rollout.engine={type: transformers, max_batch_size: 8}",
    ),
    "GKD, strict, vLLM": (*GKD, *STRICT),
    "GKD, asynchronous": (*GKD, *BURSTS),
    "DistiLLM, psi 0.2": distillm(0.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Ours beside TRL.")
    parser.add_argument("--quick", action="store_true", help="one repetition of 8 steps")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="a multiple of 4")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    if arguments.again:
        shutil.rmtree(FOLDER, ignore_errors=True)
    steps = 8 if arguments.quick else arguments.steps
    repetitions = 1 if arguments.quick else arguments.repetitions
    prepare()
    config = write_config(FOLDER / "peers.yaml", steps=steps)
    found: dict[str, list[Measured]] = {name: [] for name in (TRL, *OURS)}
    for repetition in range(repetitions):
        for name, runs in found.items():

            def measure(directory: Path, name: str = name) -> Measured:
                if name == TRL:
                    return run_trl(directory.with_suffix(".log"), steps=steps)
                return run_ours(config, directory, OURS[name])

            runs.append(kept(FOLDER, f"{repetition}-{steps}-{name}", measure))
            print(
                f"{time.strftime('%H:%M')} round {repetition + 1}, {name}:"
                f" {runs[-1].seconds:.2f} s, {runs[-1].cpu_seconds:.2f} CPU-s a step",
                flush=True,
            )
    show(f"medians of {repetitions}", found, against=TRL)
    stem = f"peers{'_quick' if arguments.quick else ''}"
    draw(found, RESULTS / f"{stem}.png")
    write(
        stem,
        {
            "steps": steps,
            "runs": {name: [asdict(run) for run in runs] for name, runs in found.items()},
            "speed_against_trl": {
                name: ratio(found[TRL], runs, "seconds") for name, runs in found.items()
            },
        },
    )


if __name__ == "__main__":
    main()
