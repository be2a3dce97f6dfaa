#!/bin/sh
# All GPU tests and rows on a machine with a GPU, torch and transformers; no ray, vllm or redis.
# Figures go to benchmarks/results/learner-<device>.json (or to the directory that is named).
#
#   sh benchmarks/gpu.sh [DIRECTORY]          PYTHON says which python, python3 otherwise
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-benchmarks/results}
mkdir -p "$OUT"
FAILED=

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu.sh: torch sees no GPU" >&2
    exit 1
}
DEVICE=$("$PYTHON" -c 'import torch; print("-".join(torch.cuda.get_device_name().lower().split()))')
# Without conftest.py and the project's settings: those ask for packages that may be missing.
"$PYTHON" -m pytest -q -c /dev/null --rootdir=. --noconftest -p no:cacheprovider \
    tests/services/test_packed_gpu.py || FAILED="the tests"
# Figures are taken even then: a machine with a GPU may not come again.
"$PYTHON" -m benchmarks.gpu --json "$OUT/learner-$DEVICE.json" || FAILED="$FAILED the figures"
[ -z "$FAILED" ] || { echo "gpu.sh: not all well:$FAILED" >&2; exit 1; }
