#!/bin/bash
# Written by: distillm-ray manifest configs/recipes/qwen3-chat.yaml learner.workers=16 rollout.actors=4 teacher.actors=4 --slurm --node-memory-gib 900
#
#     sbatch THIS_FILE                           # in the shared directory, with its .venv
#     tail -f JOB_NAME-JOB_ID.log
#     scancel --batch --signal=INT JOB_ID        # stops it with a checkpoint
#
# At its time limit the job stops with a checkpoint and is put into the queue again.
#SBATCH --job-name=qwen3-chat
#SBATCH --nodes=3
#SBATCH --exclusive
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=900G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"

# A token of this job alone, which only its user can read.
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID"
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Becomes a command on one of the nodes, by its number; for subshells only.
on() {
  exec srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="${nodes[$1]}" "${@:2}"
}
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; kill $(jobs -p) 2> /dev/null || true; wait' EXIT

head_ip=$(on 0 hostname --ip-address)
head_ip="${head_ip%% *}"
export RAY_ADDRESS="$head_ip:6379"
on 0 ray start --head --node-ip-address="$head_ip" --port=6379 --block --num-cpus=64 --object-store-memory=34359738368 --labels=distillm-ray=learner --disable-usage-stats &
timeout 300 bash -c "until ray health-check --address $RAY_ADDRESS > /dev/null 2>&1; do sleep 2; done"
on 1 ray start --address="$RAY_ADDRESS" --block --num-cpus=64 --object-store-memory=34359738368 --labels=distillm-ray=learner --disable-usage-stats &
on 2 ray start --address="$RAY_ADDRESS" --block --num-cpus=64 --object-store-memory=34359738368 --labels=distillm-ray=generator-scorer --disable-usage-stats &
timeout 900 python - <<'END'
import time
import ray
ray.init(log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 3:
    time.sleep(2)
END

stopped=
distillm-ray train configs/recipes/qwen3-chat.yaml learner.workers=16 rollout.actors=4 teacher.actors=4 run.device=cuda learner.node_labels.distillm-ray=learner rollout.node_labels.distillm-ray=generator-scorer teacher.node_labels.distillm-ray=generator-scorer &
driver=$!
trap 'stopped=time; kill -TERM "$driver" || true' TERM
trap 'stopped=user; kill -TERM "$driver" || true' INT
code=0
wait "$driver" || code=$?
if [ -n "$stopped" ]; then  # the signal has ended the first wait
  code=0
  wait "$driver" || code=$?
fi
if [ "$stopped" = time ] && [ "$code" -eq 3 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
