#!/usr/bin/env bash
# Quantize under Slurm, one process a GPU:
#
#     [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#         tools/slurm_quant.sh PARTITION JOB_NAME CONFIG [CHECKPOINT] [flags of tools/quant.py]
#
# GPUS is the number of all. GPUS_PER_NODE=0 asks for none: GPUS processes on CPUs.
set -eu

if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [CHECKPOINT] [flags of tools/quant.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
shift 2

count=${GPUS:-8}
per_node=${GPUS_PER_NODE:-8}
[ "$per_node" -le "$count" ] || per_node=$count
where=(--ntasks="$count" --cpus-per-task="${CPUS_PER_TASK:-5}")
[ "$per_node" -eq 0 ] || where+=(--gres=gpu:"$per_node" --ntasks-per-node="$per_node")

tools=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
# SRUN_ARGS is several words on purpose
# shellcheck disable=SC2086
exec srun -p "$partition" --job-name="$job_name" "${where[@]}" --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$tools/quant.py" "$@" --launcher slurm
