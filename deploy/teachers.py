"""The teachers of a run: what each one is, and where it is asked."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from deploy.config import ConfigError, RunConfig, called
from services.models import Fingerprint, ModelError, at_hand, fingerprint
from services.ports import PortTaken, require_free
from services.trajectory import LogProbs
from services.weights import WeightFeed
from teacher.api import ModelCard
from teacher.auth import environment_keys
from teacher.client import Target
from teacher.config import TeacherConfig, TeachersConfig
from teacher.pool import MissingKey, Servers, ask, targets
from teacher.serve import deploy_teacher, stop_teacher

ASK_S = 60.0  # how long a server may take to say what it holds


def identify(teacher: TeacherConfig) -> Fingerprint | None:
    """A teacher's fingerprint: of its directory, or, where that is not at hand, as the servers
    tell it that hold the model; None when they are none of ours.

    Raises:
        ConfigError: there is no such model, or no server answers.
    """
    try:
        if not teacher.endpoints or at_hand(teacher.model):
            return fingerprint(teacher.model)
        answers = asyncio.run(ask(Servers(targets(teacher, os.environ), ASK_S)))
    except (ModelError, MissingKey) as error:
        raise ConfigError(str(error)) from None
    if all(one.failed for one in answers):
        raise ConfigError(
            f"{teacher.model} is not on this machine, and the servers that hold it do not say "
            f"what it is: {answers[-1].failed}"
        )
    cards = {one.url: one.card for one in answers if one.card is not None}
    if teacher.reference in cards:  # the others are compared with it (`deploy.endpoints`)
        return _of_card(cards[teacher.reference])
    if len({card.fingerprint for card in cards.values()}) > 1:
        said = ", ".join(f"{url} {card.fingerprint}" for url, card in cards.items())
        raise ConfigError(
            f"the endpoints of {teacher.model} serve different models; their fingerprints: {said}"
        )
    return next(map(_of_card, cards.values()), None)


def require_port(config: TeachersConfig) -> None:
    """Asks, before anything starts, whether the teachers can be served on this machine.

    Raises:
        ConfigError: nobody can listen at their address.
    """
    scoring = config.scoring
    try:
        require_free(scoring.host, scoring.port)
    except PortTaken as error:
        raise ConfigError(
            f"the teacher {error}; stop what is there, or set another scoring.port (0 takes a "
            f"free one)"
        ) from None


def _of_card(card: ModelCard) -> Fingerprint:
    return Fingerprint(
        model=card.fingerprint,
        tokenizer=card.tokens.tokenizer,
        tokenizer_size=card.tokens.tokenizer_size,
        vocab_size=card.limits.vocab_size,
        context_length=card.limits.max_sequence_tokens,
        end_tokens=tuple(card.tokens.end_tokens),
        chat_template=card.tokens.chat_template,
    )


async def start_teachers(
    config: RunConfig,
    fingerprints: Mapping[str, str | None],
    probes: Mapping[str, LogProbs],
    stack: AsyncExitStack,
    say: Callable[[str], None],
    weights: WeightFeed,
) -> dict[str, Servers]:
    """Where each teacher is that the objective asks: in a Serve application that is started here
    and stopped by `stack`, or on servers of others.

    Args:
        fingerprints: of those teachers, as the preflight found them; none when none is asked.
        probes: what those say of the fixed sequence that are known by nothing else.
        weights: the student's, for those that follow it.
    """
    if not fingerprints:
        return {}
    teachers = config.teachers
    addresses = {name: targets(one, os.environ) for name, one in teachers.items() if one.endpoints}
    for name, servers in addresses.items():
        say(f"{called(name)}: {', '.join(target.url for target in servers)}")
    if served := config.served:
        for name, one in served.items():
            say(f"{called(name)}: loading {one.model}")
        url, key = await _deploy(f"{config.name}-teacher", config, stack, weights)
        say(f"teacher: serving at {url}")
        addresses |= {name: [Target(url, key, one.model)] for name, one in served.items()}
    return {
        name: Servers(
            addresses[name],
            one.request_timeout_s,
            fingerprints[name],
            one.hedge_factor,
            probes.get(name),
            one.endpoint_tolerance,
        )
        for name, one in teachers.items()
    }


async def _deploy(
    name: str, config: TeachersConfig, stack: AsyncExitStack, weights: WeightFeed
) -> tuple[str, str]:
    """The URL of this run's own teachers, and a key of theirs."""
    # One more than the user's, which may be given as digests only.
    keys = [secrets.token_urlsafe(24), *environment_keys(os.environ)]
    # Serve outlives the driver on a cluster that is not its own, and vLLM's processes outlive
    # a replica that is not told to stop.
    stack.push_async_callback(asyncio.to_thread, stop_teacher, name)
    stopping = threading.Event()
    deploying = asyncio.ensure_future(
        asyncio.to_thread(
            deploy_teacher,
            config,
            keys,
            name=name,
            route_prefix=f"/{name}",
            stopping=stopping,
            weights=weights,
        )
    )
    try:
        return await asyncio.shield(deploying), keys[0]
    except asyncio.CancelledError:
        # A thread goes on when its task is cancelled, and Serve would start a Ray of its own once
        # the run's is gone.
        stopping.set()
        await asyncio.wait({deploying})
        deploying.exception()  # is looked at
        raise
