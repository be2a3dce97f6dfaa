#!/bin/bash
# What a node of a `ray up` cluster does: `node.sh setup`, then `node.sh head` or
# `node.sh worker HEAD_IP`. Each may be repeated at any time.
#
#     SCOPE_HOME       this repository on the node; ~/scope where it is not set
#     SCOPE_RESOURCES  custom resources of the node, as JSON; /etc/scope/resources may hold them
set -eu

SCOPE_HOME="${SCOPE_HOME:-$HOME/scope}"
PATH="$SCOPE_HOME/.venv/bin:$PATH"
RAY_AUTH_MODE=token # with the token in ~/.ray/auth_token
RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=2 # as teacher/serve.py says, both
RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=20
export SCOPE_HOME PATH RAY_AUTH_MODE
export RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# From a bare Debian or Ubuntu image to one that has everything; nothing where all is there.
setup() {
    packages=
    need() { command -v "$1" >/dev/null 2>&1 || packages="$packages $2"; }
    need make make
    need bwrap bubblewrap
    python3 -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"
    if [ -e /dev/nvidiactl ]; then # Triton compiles its launcher when it first runs a kernel
        need gcc "gcc libc6-dev"
        [ -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] ||
            packages="$packages python3-dev"
    fi
    if [ -n "$packages" ]; then
        as_root apt-get update -qq
        # shellcheck disable=SC2086  # one word a package
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
    fi
    make -s -C "$SCOPE_HOME" install
    if [ -e /dev/nvidiactl ] && ! pip show -q vllm 2>/dev/null; then
        sh "$SCOPE_HOME/deploy/install-vllm.sh" -q
    fi
}

# The run's Redis: on the head, which every node reaches, with its append-only file on the head's disk.
redis() {
    directory="$HOME/scope-redis"
    mkdir -p "$directory"
    (umask 077 && [ -s "$directory/password" ] ||
        python3 -c 'import secrets; print(secrets.token_urlsafe(24))' >"$directory/password")
    SCOPE_REDIS_PASSWORD="$(cat "$directory/password")"
    export SCOPE_REDIS_PASSWORD # for runs that are submitted to this cluster
    (umask 077 && printf '%s\n' "requirepass $SCOPE_REDIS_PASSWORD" 'port 6380' "dir $directory" \
        'bind * -::*' 'appendonly yes' 'appendfsync everysec' 'save ""' \
        'maxmemory-policy noeviction' 'daemonize yes' "logfile $directory/redis.log" \
        >"$directory/redis.conf")
    python3 -c 'import os, sys; from services.redis_server import answers
sys.exit(not answers("redis://:" + os.environ["SCOPE_REDIS_PASSWORD"] + "@127.0.0.1:6380"))' ||
        "$(python3 -c 'from services.redis_server import find_binary; print(find_binary())')" "$directory/redis.conf"
}

resources() {
    if [ -n "${SCOPE_RESOURCES:-}" ]; then
        echo "$SCOPE_RESOURCES"
    elif [ -r /etc/scope/resources ]; then
        cat /etc/scope/resources
    else
        echo '{}'
    fi
}

case "$1" in
setup) setup ;;
head)
    redis
    ray stop
    ulimit -n 65536 2>/dev/null || true
    ray start --head --port=6379 --dashboard-host=0.0.0.0 --metrics-export-port=8080 \
        --autoscaling-config="$HOME/ray_bootstrap_config.yaml" --resources="$(resources)"
    ;;
worker)
    ray stop
    ulimit -n 65536 2>/dev/null || true
    ray start --address="$2:6379" --metrics-export-port=8080 --resources="$(resources)"
    ;;
*)
    echo "usage: node.sh setup | head | worker HEAD_IP" >&2
    exit 2
    ;;
esac
