"""A batch script for Slurm: Ray on whole machines, from the environment in the shared directory."""

from __future__ import annotations

from distillm_ray.manifest.job import STOP_S, STOPPED, Job
from distillm_ray.manifest.layout import Layout
from distillm_ray.manifest.text import (
    PORT,
    block,
    driver,
    groups_by_node,
    heading,
    ray_start,
    wait_for_nodes,
)


def slurm(job: Job, layout: Layout) -> str:
    """The script.

    Some minutes before the time limit Slurm sends SIGTERM: the driver writes a checkpoint and ends
    with `STOPPED`, and the script puts the job into the queue again.
    """
    first = layout.groups[0]
    memory = "0" if first.memory_gib is None else f"{first.memory_gib}G"
    settings = [
        f"--job-name={job.name}",
        f"--nodes={layout.num_nodes}",
        "--exclusive",
        "--ntasks-per-node=1",
        f"--cpus-per-task={first.cpus}",
        *([f"--gpus-per-node={first.gpus}"] if first.gpus else []),
        f"--mem={memory}",
        "--time=24:00:00",
        f"--signal=B:TERM@{STOP_S}",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.log",
    ]
    usage = (
        "",
        "    sbatch THIS_FILE                           # in the shared directory, with its .venv",
        "    tail -f JOB_NAME-JOB_ID.log",
        "    scancel --batch --signal=INT JOB_ID        # stops it with a checkpoint",
        "",
        "At its time limit the job stops with a checkpoint and is put into the queue again.",
    )
    script = [
        "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        'export PATH="$PWD/.venv/bin:$PATH"',
        "",
        "# A token of this job alone, which only its user can read.",
        "export RAY_AUTH_MODE=token",
        'export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"',
        "(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))'"
        ' > "$RAY_AUTH_TOKEN_PATH")',
        "",
        'mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "# Becomes a command on one of the nodes, by its number; for subshells only.",
        "on() {",
        '  exec srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK"'
        ' --nodelist="${nodes[$1]}" "${@:2}"',
        "}",
        "trap 'rm -f \"$RAY_AUTH_TOKEN_PATH\"; kill $(jobs -p) 2> /dev/null || true; wait' EXIT",
        "",
        "head_ip=$(on 0 hostname --ip-address)",
        'head_ip="${head_ip%% *}"',
        f'export RAY_ADDRESS="$head_ip:{PORT}"',
        f"on 0 {_start(layout, 0)} &",
        'timeout 300 bash -c "until ray health-check --address $RAY_ADDRESS > /dev/null 2>&1;'
        ' do sleep 2; done"',
        *(f"on {index} {_start(layout, index)} &" for index in range(1, layout.num_nodes)),
        *(wait_for_nodes(layout) if layout.num_nodes > 1 else ()),
        "",
        *driver(job),
        f'if [ "$stopped" = time ] && [ "$code" -eq {STOPPED} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$code"',
    ]
    lines = [*(f"#SBATCH {setting}" for setting in settings), "", *script]
    return "#!/bin/bash\n" + heading(job, *usage) + block(lines)


def _start(layout: Layout, index: int) -> str:
    place = ('--address="$RAY_ADDRESS"',)
    if index == 0:
        place = ("--head", '--node-ip-address="$head_ip"', f"--port={PORT}")
    group = groups_by_node(layout)[index]
    return ray_start(layout, group, *place, "--block", f"--num-cpus={group.cpus}")
