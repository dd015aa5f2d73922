"""Speed and cost of every method of ours: seconds and CPU-seconds a step, all roles counted.

    python bench/throughput.py [--quick] [--repetitions 3] [--steps 16] [--only NAME,...]

SmolLM2-135M into a student of 64M, batch 8, up to 64 new tokens, the quickstart's prompts, vLLM for
everybody. The runs alternate, round after round, each with the same engine, data, batch and
threads; a strictly on-policy run works in turns and may use both cores in each. DistiLLM has a
fixed phi here, so that every step of the window asks for the same share of student text; `psi` is
the share that is generated for it. The library's two rows are the first run on an empty target
library and a second one, with another seed over the same rows.

Finished runs are kept in runs/bench/throughput, by commit; the same command continues. `--again`
begins anew. `--only` prints its rows and writes no result.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from _common import REPOSITORY, RESULTS, write
from _speed import WARM_UP, Measured, draw, kept, prepare, ratio, run_ours, show, write_config

FOLDER = REPOSITORY / "runs" / "bench" / "throughput"
BURSTS = ("rollout.lookahead=2", "rollout.sync_interval=4", "rollout.max_staleness=4")
STRICT = (
    *("rollout.lookahead=1", "rollout.sync_interval=1", "rollout.max_staleness=0"),
    *("learner.num_threads=2", "rollout.num_threads=2", "teacher.num_threads=2"),
)
GKD = ("method=gkd", "schedule.phi=1.0")


def distillm(phi: float) -> tuple[str, ...]:
    """DistiLLM whose every step draws student text with probability phi, half of it replayed."""
    schedule = f"schedule={{type: fixed, phi: {phi}, replay_ratio: constant}}"
    return ("method=distillm", schedule, *BURSTS)


LIBRARY = f"targets.library={FOLDER / 'library'}"
# Every run over the same 8 x steps rows, in another order.
ROWS = "data.train=[{rows}]"
FIRST_ON_LIBRARY, SECOND_ON_LIBRARY = "KD, 1st on a library", "KD, 2nd on a library"
RUNS: dict[str, tuple[str, ...]] = {
    "SFT": ("method=sft", "teacher=null"),
    "KD": ("method=kd",),
    FIRST_ON_LIBRARY: ("method=kd", LIBRARY, ROWS),
    SECOND_ON_LIBRARY: ("method=kd", LIBRARY, ROWS, "run.seed=1"),
    "DistiLLM, psi 0.1": distillm(0.2),
    "DistiLLM, psi 0.2": distillm(0.4),
    "DistiLLM, psi 0.25": distillm(0.5),
    "DistiLLM, psi 0.5": distillm(1.0),
    "GKD, asynchronous": (*GKD, *BURSTS),
    "GKD, strict": (*GKD, *STRICT),
    "ImitKD, strict": ("method=imitkd", *STRICT),
    "on-policy reverse KL": ("method=opd", *BURSTS),
    "MiniLLM": ("method=minillm", *BURSTS),
}
QUICK = ("SFT", "KD", "DistiLLM, psi 0.2", "GKD, asynchronous", "GKD, strict")
BASELINE = "GKD, strict"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and cost of every method.")
    parser.add_argument("--quick", action="store_true", help="five rows, one repetition")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--only", help="names of rows, separated by ;")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    names = QUICK if arguments.quick else tuple(RUNS)
    if arguments.only:
        chosen = [name.strip() for name in arguments.only.split(";")]
        if unknown := [name for name in chosen if name not in RUNS]:
            parser.error(f"--only: {unknown} is none of {'; '.join(RUNS)}")
        names = tuple(name for name in RUNS if name in chosen)
    if SECOND_ON_LIBRARY in names and FIRST_ON_LIBRARY not in names:
        parser.error(f"--only: {SECOND_ON_LIBRARY} needs {FIRST_ON_LIBRARY}, which fills it")
    if arguments.steps % 4 or arguments.steps <= WARM_UP:
        parser.error(f"--steps must be a multiple of 4 above {WARM_UP}")
    if arguments.again:
        shutil.rmtree(FOLDER, ignore_errors=True)
    prepare()
    config = write_config(FOLDER / "throughput.yaml", steps=arguments.steps)
    rows = FOLDER / "rows.jsonl"
    lines = (REPOSITORY / "data" / "quickstart" / "train.jsonl").read_text().splitlines()
    rows.write_text("\n".join(lines[: 8 * arguments.steps]) + "\n")
    repetitions = 1 if arguments.quick else arguments.repetitions
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for repetition in range(repetitions):
        for number, name in enumerate(names):

            def measure(directory: Path, name: str = name) -> Measured:
                if name == FIRST_ON_LIBRARY:
                    shutil.rmtree(FOLDER / "library", ignore_errors=True)
                overrides = [one.format(rows=rows) if one == ROWS else one for one in RUNS[name]]
                return run_ours(config, directory, overrides)

            measured = kept(FOLDER, f"{repetition}-{arguments.steps}-{name}", measure)
            found[name].append(measured)
            print(
                f"{time.strftime('%H:%M')} round {repetition + 1}, {number + 1} of {len(names)},"
                f" {name}: {measured.seconds:.2f} s, {measured.cpu_seconds:.2f} CPU-s a step",
                flush=True,
            )
    show(f"medians of {repetitions}", found, against=BASELINE)
    if arguments.only:
        return
    stem = f"throughput{'_quick' if arguments.quick else ''}"
    draw(found, RESULTS / f"{stem}.png")
    write(
        stem,
        {
            "steps": arguments.steps,
            "warm_up": WARM_UP,
            "runs": {name: [asdict(run) for run in runs] for name, runs in found.items()},
            "speed_against_strict_gkd": {
                name: ratio(found[BASELINE], runs, "seconds") for name, runs in found.items()
            },
        },
    )


if __name__ == "__main__":
    main()
