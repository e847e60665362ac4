#!/usr/bin/env bash
# Starts this machine's part of a run with torchrun, without a scheduler.
#
#   One machine:        launch.sh CONFIG [--set PATH=VALUE ...]
#   Several machines:   NNODES=4 HOST=first-machine launch.sh CONFIG [...]      the same line on each of the 4
#
# HOST is the machine that the others meet at, under a name that all of them know. Of the environment also:
# RANKS_PER_NODE (default: GPUs, or 1), PORT (29500), RUN_ID (any word; another for another run), PYTHON.
set -euo pipefail
: "${NNODES:=1}" "${HOST:=localhost}" "${PORT:=29500}" "${RUN_ID:=megatron-ove}" "${PYTHON:=python}"
if (($# == 0)); then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
if ((NNODES > 1)); then
    [[ $HOST != localhost && $HOST != 127.* ]] ||
        { echo "HOST=$HOST is another machine on each of the $NNODES; name one that all of them know" >&2; exit 2; }
    getent ahosts "$HOST" >/dev/null ||
        { echo "$(hostname) does not know the name HOST=$HOST, so it could not join the run; give its address" >&2; exit 2; }
fi
if [[ -z ${RANKS_PER_NODE:-} ]]; then
    RANKS_PER_NODE=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
# Before anything large starts: a mistake in the configuration is one sentence, not one of every rank.
"$PYTHON" -m megatron_ove train "$@" --check >/dev/null
# torchrun kills its workers this long after SIGTERM, 30 s by default: less than a large checkpoint takes.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
meeting=(--standalone)
if ((NNODES > 1)); then
    meeting=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$RUN_ID" --rdzv-endpoint "$HOST:$PORT"
        --rdzv-conf "read_timeout=300")
fi
exec "$PYTHON" -m torch.distributed.run "${meeting[@]}" --nproc-per-node "$RANKS_PER_NODE" --max-restarts 0 \
    -m megatron_ove train "$@"
