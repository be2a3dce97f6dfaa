"""`--address`: commands for a run on a cluster, from anywhere that reaches its dashboard.

Each is a Ray job there: the command runs where the run, its Redis and its directory are, and what
it prints comes back. Ray's token goes along: RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH
names, with RAY_AUTH_MODE=token.

Paths are those of the cluster, relative to $SCOPE_HOME there: deploy/clusters and deploy/kubernetes
set it to where they put this repository.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from deploy.config import RunConfig, dump
from services.errors import RunFailed
from services.tasks import beside

_STOP_S = 60  # for a run to stop in order, before Ray kills it
_IN_HOME = 'given="$PWD" && cd "${SCOPE_HOME:-$PWD}" && exec scope'
# What Ray writes before the first line of a job.
_PREAMBLE = re.compile(
    r"^(?:\S+ \S+\s+INFO job_manager\.py:\d+ -- |Running entrypoint for job ).*\n", re.MULTILINE
)


class _Interrupted(Exception):
    """Ctrl-C. Not KeyboardInterrupt itself: from a task, that ends the loop at once."""


class RemoteError(RunFailed):
    """The cluster cannot be reached, refuses access, or the command failed there."""


class Remote:
    """The cluster whose dashboard is at `address` (http:// or https://).

    Raises:
        RemoteError: it cannot be reached, or it asks for another token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for name in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # not of closed sockets
        try:
            self._client = JobSubmissionClient(address)
        except AuthenticationError as error:
            said = str(error).partition("\n")[0]
            raise RemoteError(f"the cluster at {address} refuses access: {said}") from None
        except (ConnectionError, RuntimeError) as error:  # nobody there, or not Ray
            raise RemoteError(f"no Ray cluster answers at {address}: {error}") from None

    def call(self, arguments: Sequence[str]) -> None:
        """Runs a short `scope` command there and prints what it prints.

        Raises:
            RemoteError: it failed; what it said was printed.
        """
        self._follow(self._submit(shlex.join(arguments)))

    def run(self, config: RunConfig, stop: Callable[[], bool]) -> None:
        """Starts a run there and follows it to its end.

        Args:
            config: with the paths of the cluster.
            stop: asked on Ctrl-C, whether the run shall stop. Else it goes on without us.

        Raises:
            RemoteError: the run failed.
        """
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.yaml").write_text(dump(config), encoding="utf-8")
            job = self._submit('run "$given/config.yaml"', run=config.name, working_dir=directory)
        self._say_and_follow(job, stop)

    def resume(self, run_dir: str, stop: Callable[[], bool]) -> None:
        """Continues a run there and follows it to its end; see `run`."""
        self._say_and_follow(self._submit(f"resume {shlex.quote(run_dir)}"), stop)

    def follow(self, job: str, stop: Callable[[], bool]) -> None:
        """Prints what a job prints, until it ends or the user leaves it."""
        try:
            self._follow(job)
        except KeyboardInterrupt:
            if stop():
                self._client.stop_job(job)
                self._follow(job)
            else:
                print(f"it goes on; see it again with: {self._again(job)}")

    def _say_and_follow(self, job: str, stop: Callable[[], bool]) -> None:
        print(f"job {job}; see it from anywhere with: {self._again(job)}", flush=True)
        self.follow(job, stop)

    def _submit(self, command: str, *, run: str = "", working_dir: str = "") -> str:
        """The id of a job that runs a `scope` command there, from a copy of `working_dir`."""
        environment: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}}
        if working_dir:
            environment["working_dir"] = working_dir
        try:
            job: str = self._client.submit_job(
                entrypoint=f"{_IN_HOME} {command}",
                runtime_env=environment,
                metadata={"scope_run": run} if run else None,
            )
        except RuntimeError as error:
            said = [line for line in str(error).splitlines() if line.strip()]
            raise RemoteError(
                f"the cluster at {self.address} accepted no job: {said[-1]}"
            ) from None
        return job

    def _again(self, job: str) -> str:
        return f"scope follow {job} --address {self.address}"

    def _follow(self, job: str) -> None:
        asyncio.run(self._print_logs(job))
        status = self._client.get_job_status(job)
        if status not in (JobStatus.SUCCEEDED, JobStatus.STOPPED):
            message = self._client.get_job_info(job).message or ""
            raise RemoteError(f"job {job} at {self.address} {status.lower()}: {message[-300:]}")

    async def _print_logs(self, job: str) -> None:
        """Until the job ends. Ctrl-C is waited for here, because asyncio's own way, which is to
        cancel, was seen to be lost in what reads from the network."""
        loop, asked = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, asked.set)
        try:
            await beside(self._print(job), _interruption(asked))
        except _Interrupted:
            raise KeyboardInterrupt from None
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _print(self, job: str) -> None:
        async for lines in self._client.tail_job_logs(job):
            print(_PREAMBLE.sub("", lines), end="", flush=True)


async def _interruption(asked: asyncio.Event) -> None:
    await asked.wait()
    raise _Interrupted
