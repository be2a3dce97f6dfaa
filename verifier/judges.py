"""All that a config can judge, behind one call: who judges a data source, and where.

data_source ──▶ kind ─▶ code: sandboxes of `services.sandbox`, one for each program
                     └▶ exact, math, "module:function": judge processes of `verifier.judge_pool`
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from services.trajectory import Verdict
from verifier.code_tests import CodeJudge
from verifier.config import VerifierConfig
from verifier.judge_pool import JudgePool


class Judges:
    """The judges of one worker.

    Raises:
        Unavailable: (on entering) the judge processes do not start.
        SandboxRefused: (on entering) programs are to be judged and cannot be confined here.
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._pool: JudgePool | None = None
        self._code: CodeJudge | None = None
        self._resources = AsyncExitStack()

    async def __aenter__(self) -> Self:
        config = self._config
        if "code" in config.used_kinds:
            self._code = await CodeJudge.start(
                config.code,
                cached_verdicts=config.cached_verdicts,
                thinking=config.answer_in_thinking,
            )
        if kinds := config.used_kinds - {"code"}:
            pool = JudgePool(
                kinds,
                judges=config.judges,
                deadline_s=config.deadline_s,
                memory_mb=config.memory_mb,
                answer_marker=config.answer_marker,
                answer_from=config.answer_from,
                answer_in_thinking=config.answer_in_thinking,
                require_evaluated=config.require_evaluated,
                cached_verdicts=config.cached_verdicts,
            )
            self._pool = await self._resources.enter_async_context(pool)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._resources.aclose()

    def queue(self) -> dict[str, float]:
        """How many completions wait for a judge or a sandbox, how many slow ones are kept apart
        from the others, and how many judges had to be replaced so far."""
        used = [judge for judge in (self._pool, self._code) if judge is not None]
        return {
            "waiting": sum(judge.waiting for judge in used),
            "slow": sum(judge.slow for judge in used),
            "replaced": self._pool.replaced if self._pool is not None else 0,
        }

    async def judge(self, data_source: str, completion: str, reference: str) -> Verdict:
        """The verdict on one completion, by the kind of its data source.

        Raises:
            Unavailable: a judge could not be started.
        """
        kind = self._config.kind_of(data_source)
        judge = self._code if kind == "code" else self._pool
        assert judge is not None, f"{kind} is not among the kinds that were prepared"
        if isinstance(judge, CodeJudge):
            return await judge.judge(completion, reference)
        return await judge.judge(kind, completion, reference)
