"""The teachers of a run: what each one is, and where it is asked."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from deploy.config import ConfigError, RunConfig, called
from services.models import Fingerprint, ModelError, at_hand, fingerprint
from services.stage import Unavailable
from teacher.api import ModelCard
from teacher.auth import environment_keys
from teacher.client import BadAnswer, Target
from teacher.config import TeacherConfig, TeacherModel
from teacher.pool import MissingKey, Servers, cards, targets
from teacher.serve import deploy_teacher, stop_teacher

_ASK_S = 10.0  # how long a server may take to say what it holds


def identify(teacher: TeacherModel) -> Fingerprint | None:
    """A teacher's fingerprint: of its directory, or, where that is not at hand, as the servers
    tell it that hold the model; None when they are none of ours.

    Raises:
        ConfigError: there is no such model, or no server answers.
    """
    try:
        if not teacher.endpoints or at_hand(teacher.model):
            return fingerprint(teacher.model)
        servers = Servers(targets(teacher, os.environ), _ASK_S)
        told = asyncio.run(cards(servers))
    except (ModelError, MissingKey) as error:
        raise ConfigError(str(error)) from None
    except (Unavailable, BadAnswer) as error:
        raise ConfigError(
            f"{teacher.model} is not on this machine, and the servers that hold it do not say "
            f"what it is: {error}"
        ) from None
    if len({card.fingerprint for card in told}) > 1:
        raise ConfigError(f"the endpoints of {teacher.model} serve different models")
    return _as_told(told[0]) if told else None


def _as_told(card: ModelCard) -> Fingerprint:
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
    stack: AsyncExitStack,
    say: Callable[[str], None],
) -> dict[str, Servers]:
    """Where each teacher is that the objective asks: in a Serve application that is started here
    and stopped by `stack`, or on servers of others.

    Args:
        fingerprints: of those teachers, as the preflight found them; none when none is asked.
    """
    if config.teacher is None or not fingerprints:
        return {}
    teachers = config.teacher.named
    found = {name: targets(one, os.environ) for name, one in teachers.items() if one.endpoints}
    for name, servers in found.items():
        say(f"{called(name)}: {', '.join(target.url for target in servers)}")
    if served := config.teacher.served:
        for name, one in served.items():
            say(f"{called(name)}: loading {one.model}")
        url, key = await _deploy(f"{config.name}-teacher", config.teacher, stack)
        say(f"teacher: serving at {url}")
        found |= {name: [Target(url, key, one.model)] for name, one in served.items()}
    return {
        name: Servers(found[name], one.request_timeout_s, fingerprints[name], one.hedge_factor)
        for name, one in teachers.items()
    }


async def _deploy(name: str, config: TeacherConfig, stack: AsyncExitStack) -> tuple[str, str]:
    """The URL of this run's own teachers, and a key of theirs."""
    # One more than the user's, which may be given as digests only.
    keys = [secrets.token_urlsafe(24), *environment_keys(os.environ)]
    # Serve outlives the driver on a cluster that is not its own, and vLLM's processes outlive
    # a replica that is not told to stop.
    stack.push_async_callback(asyncio.to_thread, stop_teacher, name)
    url = await asyncio.to_thread(deploy_teacher, config, keys, name=name, route_prefix=f"/{name}")
    return url, keys[0]
