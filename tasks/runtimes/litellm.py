"""Models behind an API, through LiteLLM. What could not be asked is an empty answer, which counts as unparseable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeGuard

from tasks.api import ApiError, ContentRefused, Forbidden, RefusedRequest, Stopped, TooLong, complete
from tasks.domain.errors import UserError
from tasks.domain.prompt import Message
from tasks.runtimes import Completion

GIVE_UP = 8  # requests in a row without an answer, each tried several times, after which the rest is not asked
ONE_ROW = frozenset({400, 422})  # to a request that is wrong: its own fault where others are answered


@dataclass(frozen=True)
class ApiCompletion(Completion):
    """`usd` is None where no price is known. `problem` says why there is no answer; its time is NaN then, but for an empty one that was cut
    off and paid for. `refused`: the API would not answer it another time either."""

    usd: float | None = None
    problem: str = ""
    refused: bool = False


class LiteLlmRuntime:
    """A model that somebody else runs. `usd`, `answered` and `failed` add up over all requests; `refused_last` says why a request was refused
    behind which none was answered: it may have been the text, or that the money is used up.

    Args:
        api_base: the address of an API that is not the provider's usual one.
        max_usd: ask no more once the next request might cost more than what is left of this. An attempt whose answer was lost, by time
            that ran out or a body that cannot be read, counts as the dearest answer: the provider may have written it all the same.
        dearest: what the dearest of earlier requests like these cost, in dollars; 0 if there were none.
        answered: how many requests like these were answered before.
        keep: is given what need not be asked again, an answer or a refusal, as soon as it comes: by the thread that asked, one at a time,
            so that who is interrupted loses nothing that was paid for.
    """

    device = "api"
    threads = 0

    def __init__(
        self,
        model: str,
        api_base: str | None = None,
        max_usd: float | None = None,
        *,
        dearest: float = 0.0,
        answered: int = 0,
        keep: Callable[[ApiCompletion], None] = lambda done: None,
    ) -> None:
        self.model, self.api_base, self.max_usd = model, api_base, max_usd
        self.usd: float | None = 0.0
        self.answered = answered
        self.failed: list[str] = []
        self._in_a_row = 0
        self._last_answered, self._refused = -1, dict[int, str]()
        self._dearest, self._lost = dearest, 0
        self._stop = threading.Event()
        self._keep, self._keeping = keep, threading.Lock()

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Generator[ApiCompletion, None, None]:
        """See `Runtime.generate`. The time to the first token is not known: answers come whole.

        The first request goes alone: what is wrong with address, model or key shows once, and what an answer costs is known.

        Raises:
            UserError: the key, the model or a request is refused, nothing answers, or `max_usd` is used up. What was on its way
                then is waited for and yielded first, since it is paid for.
        """
        left = iter(enumerate(conversations))
        waiting: dict[Future[ApiCompletion], int] = {}
        stop: UserError | None = None
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(parallel)
        try:
            while True:
                alone = not self.answered and (self.max_usd is not None or self._in_a_row < 2)
                while not stop and len(waiting) < (1 if alone else parallel) and (item := next(left, None)):
                    stop = self._overspent(len(waiting))
                    if not stop:
                        waiting[pool.submit(self._ask, *item, max_tokens)] = item[0]
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    index = waiting.pop(future)
                    try:
                        yield self._counted(future.result())
                    except ApiError as error:
                        yield self._unanswered(index, error)
                    except UserError as error:
                        if self._is_its_own_fault(error):
                            yield self._unanswered(index, error)
                        else:  # refused for one, refused for all
                            stop = stop or error
                    except Stopped:
                        pass
                stop = stop or self._given_up()
                if stop:
                    self._stop.set()  # who waits for another attempt has paid nothing yet
            if stop:
                raise stop
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _is_its_own_fault(self, error: UserError) -> TypeGuard[RefusedRequest]:
        """Whether a refusal is of one request and not of all: a key that was good before may be no more, so that 403 is only where this
        asking had an answer."""
        if isinstance(error, Forbidden):
            return self._last_answered >= 0
        return isinstance(error, RefusedRequest) and error.status in ONE_ROW and bool(self.answered or not self._in_a_row)

    def _ask(self, index: int, conversation: list[Message], max_tokens: int) -> ApiCompletion:
        where: dict[str, Any] = {"api_base": self.api_base} if self.api_base else {}
        try:
            reply = complete(self.model, conversation, max_tokens, sleep=self._pause, lost=self._lose, temperature=0, **where)
        except (ContentRefused, TooLong) as error:
            done = _without_an_answer(index, error, refused=True)
        else:
            said = reply.ended or reply.text.strip()  # a model that thinks may use all its tokens for that
            lack = "" if said else f"the answer was cut off at max_tokens = {max_tokens} before it said anything"
            spent = reply.prompt_tokens, reply.completion_tokens, float("nan"), reply.seconds
            done = ApiCompletion(index, reply.text, *spent, reply.usd, lack, ended=reply.ended)
        with self._keeping:
            self._keep(done)
        return done

    def _lose(self) -> None:
        with self._keeping:
            self._lost += 1

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped

    def _counted(self, done: ApiCompletion) -> ApiCompletion:
        """Count an answer, or a refusal: that the API does not answer is no sign of it."""
        if done.problem:
            self.failed.append(done.problem)
        if not done.refused:
            self.answered += 1
            self._in_a_row = 0
            self._last_answered = max(self._last_answered, done.index)
            self.usd = None if self.usd is None or done.usd is None else self.usd + done.usd
            self._dearest = max(self._dearest, done.usd or 0.0)
        return done

    def _unanswered(self, index: int, error: ApiError | RefusedRequest) -> ApiCompletion:
        done = _without_an_answer(index, error, refused=isinstance(error, RefusedRequest))
        self.failed.append(done.problem)
        if done.refused:
            self._refused[index] = done.problem
        self._in_a_row += 1
        return done

    @property
    def refused_last(self) -> str:
        return next((problem for index, problem in self._refused.items() if index > self._last_answered), "")

    def _overspent(self, on_the_way: int) -> UserError | None:
        if self.max_usd is None or (self.usd or 0.0) + (self._lost + on_the_way + 1) * self._dearest <= self.max_usd:
            return None
        return UserError(
            "api.max_usd", None, f"is used up: one more request to {self.model} might cost more than is left", mend="Raise it and run again"
        )

    def _given_up(self) -> UserError | None:
        if self._in_a_row < GIVE_UP:
            return None
        return UserError(
            "model",
            self.model,
            f"gave no answer to {self._in_a_row} requests in a row ({self.failed[-1]})",
            mend="Check the network and the API's address, and run again",
        )

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """Not to be known of an API."""
        return float("nan")

    def decode_tokens_per_s(self, tokens: int) -> float:
        """Not to be known of an API."""
        return float("nan")


def _without_an_answer(index: int, error: Exception, *, refused: bool) -> ApiCompletion:
    problem = error.problem if isinstance(error, RefusedRequest) else str(error)  # what to mend is said where it ends the command
    return ApiCompletion(index, "", 0, 0, float("nan"), float("nan"), 0.0, problem, refused)
