#!/usr/bin/env bash
# A Ray cluster for the time of one Slurm allocation, and one job on it. From the repository's root, with the
# environment active and on a file system that every node sees:
#     sbatch infra/slurm.sh python jobs/train.py $RUN --run_dir "$PWD/runs/one"    # the README's RUN
# A job that ran out of time or was preempted goes on where it was when the same line is submitted again.
#SBATCH --job-name=t2v
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: sbatch $0 COMMAND..." >&2; exit 2; }

# The token is this allocation's own; the nodes read it from a file in the shared home that only its owner can.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$HOME/.ray-token-$SLURM_JOB_ID"
(umask 077 && openssl rand -hex 32 >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"; kill $(jobs -p) 2>/dev/null || true' EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 {print $1}')
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="/tmp/ray-$SLURM_JOB_ID")
start_ray() { # NODE ARGUMENTS...
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" ray start "${@:2}" "${resources[@]}" --disable-usage-stats --block &
}

# This script runs on the first node, so the dashboard, and with it the job API, stays on that node's loopback.
start_ray "${nodes[0]}" --head --node-ip-address="$head_ip" --port=6379 --dashboard-host=127.0.0.1
dashboard=http://127.0.0.1:8265 # up some seconds after the head itself
timeout 300 bash -c "until ray job list --address $dashboard >/dev/null 2>&1; do sleep 2; done"
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$head_ip:6379"
done
ray job submit --address "$dashboard" --working-dir . -- "$@"
