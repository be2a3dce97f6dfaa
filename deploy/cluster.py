"""The Ray that a command lives on: a cluster that is joined, or one that is started here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import ray

from deploy.config import RayConfig
from services.errors import RunFailed
from teacher.serve import ENVIRONMENT

_TRIES = 3
# What a Ray of one machine needs no process for: nobody takes its only node away with notice.
_ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


class NoRay(RunFailed):
    """Ray does not start on this machine; the message is what it said."""


def start_ray(settings: RayConfig, namespace: str, say: Callable[[str], None]) -> Any:
    """Joins the cluster, or starts one; again if that fails, as it does where the machine is so
    busy that Ray's own processes are not up within its half minute.

    Args:
        namespace: of the actors that this process names.
        say: is told of a start that failed.

    Returns:
        Ray's context: the dashboard's address and the session's directory are in it.

    Raises:
        NoRay: it did not start.
        ConnectionError: there is no cluster at the address.
    """
    for name in ("ray.serve", "ray._private.authentication"):  # theirs is not our progress
        logging.getLogger(name).setLevel(logging.ERROR)
    local = settings.address is None
    os.environ.update({**ENVIRONMENT, **(_ALONE if local else {}), **os.environ})
    tries = _TRIES if local else 1
    while True:
        tries -= 1
        try:
            return ray.init(
                # None would connect to whatever cluster this machine last saw.
                address="local" if local else settings.address,
                num_cpus=settings.num_cpus if local else None,
                include_dashboard=settings.dashboard if local else None,
                namespace=namespace,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except ConnectionError:
            raise
        except OSError as error:
            raise NoRay(f"Ray does not start, where TMPDIR tells it to or /tmp: {error}") from error
        except Exception as error:
            if type(error) is not Exception:  # Ray has no other name for it
                raise
            if not tries:
                raise NoRay(f"Ray does not start: {error}") from error
            say(f"Ray did not start, trying again: {error}")
