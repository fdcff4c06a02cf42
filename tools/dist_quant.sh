#!/usr/bin/env bash
# Quantize with several processes, on this machine or on NNODES of them:
#
#     tools/dist_quant.sh CONFIG [CHECKPOINT] PROCESSES [flags of tools/quant.py]
#
# PROCESSES is per machine; one a GPU, or any number on a CPU. Several machines run the same
# line with NNODES, NODE_RANK (0 on the first), MASTER_ADDR (the first) and PORT set.
set -eu

usage() {
    echo "usage: $0 CONFIG [CHECKPOINT] PROCESSES [flags of tools/quant.py]" >&2
    exit 2
}

is_count() { [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; }

[ $# -ge 2 ] || usage
what=("$1")
shift
if ! is_count "$1"; then
    what+=("$1")
    shift
fi
is_count "${1:-}" || usage
processes=$1
shift

tools=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$tools/..${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$tools/quant.py" "${what[@]}" --launcher pytorch "$@"
