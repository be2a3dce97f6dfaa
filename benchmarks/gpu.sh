#!/bin/sh
# All GPU tests and rows, on a machine with a GPU, torch, transformers and besides them pydantic,
# pyarrow, psutil and pytest; no ray, vllm or redis. Liger and cut-cross-entropy where they are. For
# the small run with a real model `python -m examples.smollm.fetch` must have been called before.
# Rows go to benchmarks/results/gpu-<chip>.json (or to the directory that is named), each as soon as
# it is there. What is there is not taken again: call it again after whatever ended it.
#
#   sh benchmarks/gpu.sh [DIRECTORY]
#
#   PYTHON     which python; python3 otherwise
#   MINUTES    after which nothing runs any more; 25 otherwise
#   DEVICE     cpu rehearses it all with a tiny model
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
OUT=${1:-benchmarks/results}
mkdir -p "$OUT"

CHIP=$DEVICE
if [ "$DEVICE" = cuda ]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu.sh: torch sees no GPU" >&2
        exit 1
    }
    CHIP=$("$PYTHON" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()))')
fi
exec "$PYTHON" -m benchmarks.gpu --device "$DEVICE" --minutes "${MINUTES:-25}" --json "$OUT/gpu-$CHIP.json"
