"""`scope teacher`: the teacher endpoint alone, until it is told to stop."""

from __future__ import annotations

import os
import signal
import threading

import ray

from deploy.cluster import start_ray
from deploy.config import ConfigError, RayConfig
from deploy.teachers import require_port
from services.models import ModelError, fingerprint
from teacher.auth import KEYS_VARIABLE, environment_keys
from teacher.config import TeachersConfig
from teacher.serve import deploy_teacher, stop_teacher

_NAME = "teacher"


def serve_teacher(config: TeachersConfig) -> None:
    """Serves all models of `config` over REST; returns after Ctrl-C or SIGTERM."""
    keys = environment_keys(os.environ)
    models = [one.model for one in config.served.values()]
    if not models:
        raise ConfigError("endpoints are served by others: there is no teacher to serve here")
    if any(one.weights == "student" for one in config.served.values()):
        raise ConfigError("weights: student are those of a run's learner, and here is none")
    try:
        for model in models:  # a wrong path is said at once, not after Ray has started
            fingerprint(model)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    require_port(config)
    start_ray(RayConfig(), "scope-teacher", print)
    try:
        url = deploy_teacher(config, keys, name=_NAME)
        access = "with a bearer key" if keys else f"without a key ({KEYS_VARIABLE} is not set)"
        print(f"serving {', '.join(models)} at {url} {access}; stop with Ctrl-C", flush=True)
        stopped = threading.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: stopped.set())
        stopped.wait()
        print("finishing the requests in flight", flush=True)
        stop_teacher(_NAME)
    finally:
        ray.shutdown()
