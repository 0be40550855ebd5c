"""Asking a teacher: several requests at once, within a budget, each answer kept before the next step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from tasks.api import ApiError, ContentRefused, Forbidden, RefusedRequest, Stopped, complete
from tasks.core import progress
from tasks.core.manifests import checksum
from tasks.domain.errors import UserError
from tasks.domain.prompt import Message
from tasks.teaching.log import Answer, AnswerLog

FIELD = "data.teacher"
FAILURES_IN_A_ROW = 3  # requests without an answer, each tried several times, after which the teacher counts as gone
NOT_UNDERSTOOD = frozenset({400, 415, 422, 501})  # a server that does not know `response_format` says one of these, or names it


@dataclass(frozen=True)
class Request:
    """One request of a plan: what is asked for, and the words it is asked with."""

    kind: str  # utterances, patterns or products
    language: str
    topic: str  # an intent, or a department for products
    register: str
    messages: tuple[Message, ...]
    parameters: dict[str, Any]
    model: str
    prompt_version: int

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(self.messages),
            "parameters": self.parameters,
            "prompt_version": self.prompt_version,
        }

    @property
    def hash(self) -> str:
        return checksum(self.body)

    @property
    def allowed(self) -> int:
        """Tokens an answer may have."""
        return int(self.parameters["max_tokens"])


@dataclass
class Budget:
    """What may be spent, and what was. Answers of an earlier run that are used again count: they were paid for; its attempts whose
    answer was lost are forgotten.

    Nobody knows what an answer will cost, so the dearest so far, for each token it was allowed, stands for those that are still awaited:
    a request that is allowed twice as many tokens is expected to cost twice as much. The first answer is bought unseen.
    """

    max_usd: float | None = None
    max_tokens: int | None = None
    max_requests: int | None = None
    usd: float = 0.0
    tokens: int = 0
    requests: int = 0
    dearest_usd: float = 0.0  # for each token allowed
    dearest_tokens: float = 0.0

    def spend(self, answer: Answer, request: Request) -> None:
        self.requests += 1
        self.tokens += answer.tokens
        self.usd += answer.usd or 0.0
        self.dearest_usd = max(self.dearest_usd, (answer.usd or 0.0) / request.allowed)
        self.dearest_tokens = max(self.dearest_tokens, answer.tokens / request.allowed)

    def charge(self, request: Request) -> None:
        """Count an attempt whose answer was lost as the one that was expected: the provider may have written it all the same."""
        self.requests += 1
        self.tokens += round(request.allowed * self.dearest_tokens)
        self.usd += request.allowed * self.dearest_usd

    def limit(self, awaited: Collection[Request], another: Request) -> str | None:
        """The limit that another request would pass, besides those that are awaited, in words; None if it is within all."""
        allowed = sum(request.allowed for request in (*awaited, another))
        limits = (
            ("max_requests", self.max_requests, self.requests + len(awaited) + 1, f"{self.requests} requests"),
            ("max_tokens", self.max_tokens, self.tokens + allowed * self.dearest_tokens, f"{self.tokens} tokens"),
            ("max_usd", self.max_usd, self.usd + allowed * self.dearest_usd, f"{self.usd:.4f} dollars"),
        )
        for name, most, expected, spent in limits:
            if most is not None and expected > most * (1 + 1e-9):  # a sum of floats
                return f"budget teacher.{name} = {most:g}: {spent} spent, and another request would pass it"
        return None


@dataclass
class Asked:
    """What came of a plan: answers by request hash, and why it stopped early, if it did."""

    answers: dict[str, Answer] = field(default_factory=dict)
    from_log: int = 0
    unanswered: dict[str, str] = field(default_factory=dict)  # request hash to reason
    stopped: str | None = None


class Teacher:
    """One model, and how it is reached.

    Args:
        access: arguments of `litellm.completion` that say where the model is and who asks; in no hash and no log.
    """

    def __init__(self, model: str, log: AnswerLog, timeout_s: float, access: dict[str, Any]) -> None:
        self.model, self._log, self._timeout_s, self._access = model, log, timeout_s, access
        self._structured = True
        self._stop = threading.Event()
        self._lost = deque[Request]()  # each once for an attempt whose answer was lost, until the budget is charged with it

    def ask_all(self, plan: Sequence[Request], budget: Budget, concurrency: int) -> Asked:
        """Ask what the log does not hold, in the plan's order, until it ends or the budget does.

        The first request goes alone: what is wrong with address, model or key shows once, and what an answer costs is known.

        Raises:
            UserError: model or key is refused, or the teacher gives no answer. What came until then is in the log.
        """
        asked = self._from_log(plan, budget)
        left = deque(request for request in plan if request.hash not in asked.answers)
        running: dict[Future[Answer], Request] = {}
        bought = failures = 0
        with ThreadPoolExecutor(concurrency) as pool:
            try:
                while left or running:
                    most = concurrency if bought else 1
                    while left and len(running) < most and not budget.limit(running.values(), left[0]):
                        request = left.popleft()
                        running[pool.submit(self._ask, request)] = request
                    if not running:
                        asked.stopped = budget.limit((), left[0])
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        request = running.pop(future)
                        try:
                            asked.answers[request.hash] = answer = future.result()
                        except ContentRefused as error:
                            asked.unanswered[request.hash] = str(error)
                        except (ApiError, Forbidden) as error:
                            failures += 1
                            asked.unanswered[request.hash] = str(error)
                            answered = bought or (asked.from_log and (left or isinstance(error, Forbidden)))  # else it may be gone
                            if not answered or failures >= FAILURES_IN_A_ROW:
                                raise error if isinstance(error, Forbidden) else self._gone(str(error)) from None
                        else:
                            budget.spend(answer, request)
                            bought, failures = bought + 1, 0
                    while self._lost:
                        budget.charge(self._lost.popleft())
                    progress.advance(len(asked.answers) + len(asked.unanswered), len(plan), "requests")
            finally:
                self._stop.set()  # whoever waits for another attempt does not delay the end
        return asked

    def _from_log(self, plan: Sequence[Request], budget: Budget) -> Asked:
        asked = Asked()
        for request in plan:
            if answer := self._log.get(request.hash):
                asked.answers[request.hash] = answer
                budget.spend(answer, request)
        asked.from_log = len(asked.answers)
        return asked

    def _ask(self, request: Request) -> Answer:
        structured = self._structured
        try:
            answer = self._request(request, structured)
        except RefusedRequest as error:
            if not structured or not (error.status in NOT_UNDERSTOOD or "response_format" in str(error)):
                raise
            self._structured = False  # the messages ask for JSON in words too
            answer = self._request(request, structured=False)
        about = {"kind": request.kind, "language": request.language, "topic": request.topic, "request": request.body}
        self._log.add(request.hash, answer, about)
        return answer

    def _request(self, request: Request, structured: bool) -> Answer:
        wanted = {name: value for name, value in request.parameters.items() if structured or name != "response_format"}
        reply = complete(
            self.model,
            list(request.messages),
            sleep=self._pause,
            timeout_s=self._timeout_s,
            lost=lambda: self._lost.append(request),
            field=FIELD,
            **wanted,
            **self._access,
        )
        return Answer(reply.text, reply.prompt_tokens, reply.completion_tokens, reply.usd, round(reply.seconds, 3))

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped

    def _gone(self, reason: str) -> UserError:
        return UserError(
            FIELD,
            self.model,
            f"the teacher does not answer ({reason})",
            mend="Check its address (teacher.api_base) and the network, and run the same command again: answers that came are kept and not bought twice",
        )
