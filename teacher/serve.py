"""The teacher on Ray Serve: replicas of the REST application behind Serve's HTTP proxy.

    one model      HTTP ──▶ Serve proxy (host:port) ──▶ replica: build_app ▶ Scorer ▶ model
    more of them   HTTP ──▶ Serve proxy ──▶ front ──▶ replica of the model that is asked for

Each model is a deployment of its own, so that it scales, fails and is replaced alone. The only
module of this room that imports Ray.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import ray.util
from fastapi import FastAPI
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, RayActorError
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from services.config import HEAD
from services.errors import RunFailed
from services.ports import free_port
from services.redis_server import resolve_url
from services.weights import WeightFeed
from teacher.admission import Admission, Overloaded, RateLimit
from teacher.api import ModelCard
from teacher.app import Teacher, build_app
from teacher.auth import KeyRing, environment_keys, require_keys
from teacher.cache import CachedScorer, connect
from teacher.config import CacheConfig, TeacherConfig, TeachersConfig
from teacher.front import Answered, Ask, Asked, Away, ask_app, build_front
from teacher.metrics import Metrics
from teacher.scorer import Scorer, build_scorer, model_card

log = logging.getLogger(__name__)

DEPLOYMENT = "teacher"  # what Serve's proxy asks; with several models each is `teacher-<name>`
_POLL_S = 0.2
_HEALTH_TIMEOUT_S = 30.0
_DRAIN_POLL_S = 0.2
_TURNED_AWAY = 1024  # requests that a replica may be refusing at once


# What Serve reads from the environment of a Ray that starts. It gives a dead proxy up after three
# failed checks: at its own 10 s between two, every group would wait for half a minute. And it gives
# a proxy that is starting three times 5 s: on a busy machine its imports alone take longer, and the
# run would fail before it began. A proxy that died is still noticed at once.
ENVIRONMENT: Mapping[str, str] = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
}


class TeacherFailed(RunFailed):
    """The teacher did not come up; the message holds what its replica last said."""


class TeacherReplica:
    """One copy of the model. Serve asks it for its application once the model is loaded, so
    that the proxy sends no request to a replica that cannot answer."""

    _teacher: Teacher | None = None  # until it is loaded
    _app: FastAPI | None = None

    def __init__(
        self, config: TeacherConfig, keys: KeyRing, weights: WeightFeed | None = None
    ) -> None:
        self._config, self._keys = config, keys
        card = model_card(config)  # first: it fails at once where loading takes minutes
        self._metrics = Metrics()
        self._teacher = Teacher(
            card, remembering(build_scorer(config, weights), card, config.cache, self._metrics)
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        config = self._config
        assert self._teacher is not None
        return build_app(
            [self._teacher],
            self._keys,
            max_body_bytes=config.max_body_bytes,
            admission=Admission(
                max_requests=config.max_ongoing_requests, max_tokens=config.max_held_tokens
            ),
            rate_limit=RateLimit(config.key_tokens_per_s) if config.key_tokens_per_s else None,
            metrics=self._metrics,
        )

    async def ask(self, asked: Asked) -> Answered:
        """What the application answers, to the front that stands before several models."""
        if self._app is None:
            self._app = self.__serve_build_asgi_app__()
        return await ask_app(self._app, asked)

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._teacher is not None:
            await self._teacher.scorer.check()

    async def __del__(self) -> None:
        # Serve calls it when the replica has finished its last request.
        if self._teacher is not None:
            await self._teacher.scorer.close()


def remembering(
    scorer: Scorer, card: ModelCard, settings: CacheConfig | None, metrics: Metrics
) -> Scorer:
    """`scorer`, behind the cache if there is one, whose hits are counted in `metrics`."""
    if settings is None:
        return scorer
    redis = connect(resolve_url(settings) or settings.url)

    def count(hits: int, missed: int) -> None:
        metrics.cached.labels(card.id, "hit").inc(hits)
        metrics.cached.labels(card.id, "miss").inc(missed)

    return CachedScorer(scorer, redis, card.fingerprint, count=count)


class FrontReplica:
    """What Serve's proxy asks where there are several models."""

    def __init__(
        self, models: dict[str, TeacherConfig], keys: KeyRing, *handles: DeploymentHandle[Any]
    ) -> None:
        self._models, self._keys, self._handles = models, keys, handles

    def __serve_build_asgi_app__(self) -> FastAPI:
        models = [*self._models.values()]
        asks = map(_through, self._handles)
        return build_front(
            dict(zip((one.model for one in models), asks, strict=True)),
            self._keys,
            max_body_bytes=max(one.max_body_bytes for one in models),
            admission=Admission(max_requests=_held(models), max_tokens=0),
        )


def _held(models: Iterable[TeacherConfig]) -> int:
    """Requests that all replicas together hold, however many there are."""
    return sum(
        one.max_ongoing_requests * (one.autoscale.max_replicas if one.autoscale else one.replicas)
        for one in models
    )


def _through(handle: DeploymentHandle[Any]) -> Ask:
    """The way to a model's replicas."""

    async def ask(asked: Asked) -> Answered:
        response = handle.ask.remote(asked)
        try:
            answer: Answered = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError as error:
            raise Overloaded("too many requests are waiting already", 1) from error
        except (RayActorError, RayServeException) as error:
            raise Away("its replica is being replaced") from error
        return answer

    return ask


def application(settings: dict[str, Any]) -> serve.Application:
    """The teacher for a Serve config file: `import_path: teacher.serve:application`, with the
    settings of `TeachersConfig` as `args` and the API keys in SCOPE_TEACHER_KEYS, separated by
    commas. The proxy's address is the file's `http_options`.

    Raises:
        pydantic.ValidationError: the settings are not a teacher's.
        ValueError: others serve all its models.
        teacher.auth.InsecureAddress: it would listen to other machines without a key.
    """
    config = TeachersConfig.model_validate(settings)
    ring = KeyRing(environment_keys(os.environ))
    require_keys(config.scoring.host, ring)
    if not config.served:
        raise ValueError("endpoints are served by others: there is no teacher to serve here")
    return _bind(config, ring, None)


def deploy_teacher(
    config: TeachersConfig,
    keys: Iterable[str],
    *,
    name: str,
    route_prefix: str = "/",
    stopping: threading.Event | None = None,
    weights: WeightFeed | None = None,
) -> str:
    """Deploys the models of `config` that are not served by others on the Ray cluster at hand, and
    waits until they answer.

    Args:
        config: what to serve, at least one model, and where to listen.
        keys: API keys; only their digests leave this process.
        name: of the Serve application; one that exists under it is replaced.
        route_prefix: path under which it is served.
        stopping: ends the wait when it is set, with TeacherFailed.
        weights: the student's, for those that follow it.

    Returns:
        The URL for `TeacherClient`; with several models, requests name theirs.

    Raises:
        teacher.auth.InsecureAddress: it would listen to other machines without a key.
        TeacherFailed: it did not start, or not in time.
    """
    ring = KeyRing(keys)
    require_keys(config.scoring.host, ring)
    stopping = stopping or threading.Event()
    url = _start_http(config) + route_prefix.rstrip("/")
    if stopping.is_set():
        raise TeacherFailed("the teacher was told to stop before it started")
    # Not `serve.run`: its wait has no deadline.
    target = serve.RunTarget(_bind(config, ring, weights), name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)
    try:
        _wait_until_healthy(name, url, config.scoring.start_timeout_s, stopping)
    except TeacherFailed:
        serve.delete(name, _blocking=False)  # or it would be started again and again
        raise
    log.info("%s served at %s", ", ".join(one.model for one in config.served.values()), url)
    return url


def _bind(config: TeachersConfig, ring: KeyRing, weights: WeightFeed | None) -> serve.Application:
    served = config.served
    if len(served) == 1:
        (only,) = served.values()
        return _model(serve.ingress()(TeacherReplica), DEPLOYMENT, only, ring, weights)
    models = [
        _model(TeacherReplica, f"{DEPLOYMENT}-{name}", one, ring, weights)
        for name, one in served.items()
    ]
    held = _held(served.values())
    front = serve.deployment(
        serve.ingress()(FrontReplica),
        name=DEPLOYMENT,
        max_ongoing_requests=held + _TURNED_AWAY,
        max_queued_requests=_TURNED_AWAY,
        graceful_shutdown_timeout_s=max(one.drain_s for one in served.values()),
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        ray_actor_options={"num_cpus": HEAD.cpus, "resources": HEAD.custom},
    )
    bound: serve.Application = front.bind(served, ring, *models)
    return bound


def _model(
    replica: type[Any],
    deployment: str,
    config: TeacherConfig,
    ring: KeyRing,
    weights: WeightFeed | None,
) -> serve.Application:
    made = serve.deployment(
        replica,
        name=deployment,
        **_size(config),
        # More than a replica holds, so that the refusal is its own: Serve's names no time.
        max_ongoing_requests=config.max_ongoing_requests + _TURNED_AWAY,
        max_queued_requests=_TURNED_AWAY,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=_DRAIN_POLL_S,
        ray_actor_options={
            "num_cpus": config.resources.cpus,
            "num_gpus": config.resources.gpus,
            "resources": config.resources.custom,
        },
    )
    bound: serve.Application = made.bind(config, ring, weights)
    return bound


def stop_teacher(name: str) -> None:
    """Lets every replica finish what it holds, then ends it with all that it started."""
    serve.delete(name)


def _size(config: TeacherConfig) -> dict[str, Any]:
    """How many replicas there are, as options of a deployment."""
    scale = config.autoscale
    if scale is None:
        return {"num_replicas": config.replicas}
    return {
        "autoscaling_config": {
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            "target_ongoing_requests": scale.target_requests,
            "upscale_delay_s": scale.upscale_delay_s,
            "downscale_delay_s": scale.downscale_delay_s,
            # What is averaged over a longer time than the delay only makes the delay longer.
            "look_back_period_s": max(1.0, min(30.0, scale.upscale_delay_s)),
        }
    }


def _start_http(config: TeachersConfig) -> str:
    """Starts Serve's HTTP proxy, once a cluster, and returns its address."""
    scoring = config.scoring
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        # Serve would ignore other options with no more than a warning. There is no public way
        # to ask where its proxy listens.
        host, port = running.http_config.host, running.http_config.port
        if host != scoring.host or scoring.port not in (0, port):
            raise TeacherFailed(
                f"Ray Serve already listens on {host}:{port} in this cluster and cannot also "
                f"listen on {scoring.host}:{scoring.port}"
            )
    else:
        host, port = scoring.host, scoring.port or free_port(scoring.host)
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={
                    "host": host,
                    "port": port,
                    "request_timeout_s": max(
                        one.request_timeout_s for one in config.served.values()
                    ),
                },
            )
        except ActorAlreadyExistsError:  # another run on this cluster was faster
            return _start_http(config)
    return f"http://{_reachable(host)}:{port}"


def _reachable(host: str) -> str:
    """How workers, on this node or another, name the address that the proxy listens on."""
    if host in ("0.0.0.0", "::"):
        host = ray.util.get_node_ip_address()
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:  # a host name
        return host


def _wait_until_healthy(name: str, url: str, timeout_s: float, stopping: threading.Event) -> None:
    """Waits until `/health` answers through the proxy, or Serve gives the application up."""
    started = time.monotonic()
    said = ["nothing"]
    while time.monotonic() - started < timeout_s:
        # Not `serve.status`, which pickles classes at every call: 3 s of a processor by the end.
        status = _get_global_client().get_serve_status(name)
        application = status.app_status
        messages = filter(None, (one.message for one in status.deployment_statuses))
        said = [*messages] or ([application.message] if application.message else said)
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            log.error("the teacher's replica failed to start: %s", "\n".join(said))
            raise TeacherFailed(f"the teacher at {url} failed to start: {_gist(said)}")
        if application.status == ApplicationStatus.RUNNING:
            try:
                answer = httpx.get(f"{url}/health", timeout=_HEALTH_TIMEOUT_S)
            except httpx.HTTPError as error:
                said = [f"{url}/health cannot be reached: {error}"]
            else:
                if answer.is_success:
                    return
                said = [f"{url}/health answered {answer.status_code}: {answer.text[:300]}"]
        if stopping.wait(_POLL_S):
            raise TeacherFailed(f"the teacher at {url} was told to stop before it was healthy")
    raise TeacherFailed(
        f"the teacher at {url} was not healthy within {timeout_s:g} s; it last said: {_gist(said)}"
    )


def _gist(said: Iterable[str]) -> str:
    """The last lines: of a traceback it is the error, and Serve's other messages have but one."""
    return "; ".join(message.strip().rpartition("\n")[2] for message in said)
