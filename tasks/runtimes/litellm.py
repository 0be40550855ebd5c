"""Models behind an API, through LiteLLM. What could not be asked is an empty answer, which counts as unparseable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tasks.api import ApiError, ContentRefused, Forbidden, RefusedRequest, Stopped, TooLong, complete, key_mend
from tasks.domain.errors import UserError
from tasks.domain.prompt import Message
from tasks.runtimes import Completion

GIVE_UP = 8  # requests in a row without an answer, each tried several times, after which the rest is not asked
SECOND_PASS_AFTER_S = 5.0  # what got no answer is asked once more at the end, so much later
ONE_ROW = frozenset({400, 422})  # to a request that is wrong: its own fault where others are answered


@dataclass(frozen=True)
class ApiCompletion(Completion):
    """`usd` is None where no price is known. `problem` says why there is no answer; its time is NaN then, but for an empty one that was cut
    off and paid for. `refused`: the API would not answer it another time either."""

    usd: float | None = None
    problem: str = ""
    refused: bool = False


class LiteLlmRuntime:
    """A model that somebody else runs. `usd`, `answered` and `failed` add up over all requests; `in_doubt` are those without an answer
    behind which none was answered that was begun later: it may have been the text, or that the API or the money is gone. `paused_s` was spent
    on waiting for the second pass.

    Args:
        api_base: the address of an API that is not the provider's usual one.
        max_usd: ask no more once the next request might cost more than what is left of this. An attempt whose answer was lost, by time
            that ran out or a body that cannot be read, counts as the dearest answer: the provider may have written it all the same.
        dearest: what the dearest of earlier requests like these cost, in dollars; 0 if there were none.
        answered: how many requests like these were answered before.
        keep: is given what need not be asked again, one at a time. An answer and a refusal that is clearly of the text come at once and by
            the thread that asked, so that who is interrupted loses nothing that was paid for; what else got no answer once it is not `in_doubt`.
    """

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
        self.paused_s = 0.0
        self._doubted: dict[int, tuple[int, ApiCompletion]] = {}  # by index, with the number of the request
        self._begun = self._last_answered = 0  # the number of the latest request, and of the latest of those that were answered
        self._dearest, self._lost = dearest, 0
        self._stop = threading.Event()
        self._keep, self._keeping = keep, threading.Lock()

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Generator[ApiCompletion, None, None]:
        """See `LocalRuntime.generate`. The time to the first token is not known: answers come whole.

        The first request goes alone: what is wrong with address, model or key shows once, and what an answer costs is known. What got no
        answer for a reason that may pass is asked once more at the end.

        Raises:
            UserError: the key, the model or a request is refused, nothing answers, or `max_usd` is used up. What was on its way
                then is waited for and yielded first, since it is paid for.
        """
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(parallel)
        try:
            lacking = yield from self._pass(enumerate(conversations), max_tokens, parallel, pool, first=True)
            if lacking and self.answered:
                self.paused_s += SECOND_PASS_AFTER_S
                self._stop.wait(SECOND_PASS_AFTER_S)
                again = [(index, conversations[index]) for index in sorted(lacking)]
                lacking = yield from self._pass(again, max_tokens, parallel, pool, first=False)
            for done in lacking.values():
                self.failed.append(done.problem)
                if done.index not in self._doubted:
                    self._keep(done)
                yield done
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _pass(
        self, asked: Iterable[tuple[int, list[Message]]], max_tokens: int, parallel: int, pool: ThreadPoolExecutor, *, first: bool
    ) -> Generator[ApiCompletion, None, dict[int, ApiCompletion]]:
        """Ask each once. Returns what got no answer for a reason that may pass. Only the first pass gives up where nothing answers: the second
        is of what was not answered before."""
        left = iter(asked)
        waiting: dict[Future[ApiCompletion], tuple[int, int]] = {}
        lacking: dict[int, ApiCompletion] = {}
        stop: UserError | None = None
        while True:
            alone = not self.answered and (self.max_usd is not None or len(self._doubted) < 2)
            while not stop and len(waiting) < (1 if alone else parallel) and (item := next(left, None)):
                stop = self._overspent(len(waiting))
                if not stop:
                    self._begun += 1
                    waiting[pool.submit(self._ask, *item, max_tokens)] = item[0], self._begun
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                index, number = waiting.pop(future)
                try:
                    done = future.result()
                    self._count(done, number)
                    yield done
                except (ApiError, UserError) as error:
                    if isinstance(error, UserError) and not self._is_its_own_fault(error):  # refused for one, refused for all
                        stop = stop or error
                        continue
                    done = _without_an_answer(index, error, refused=isinstance(error, UserError))
                    if first or done.refused:
                        self._doubt(done, number)
                    if first:
                        stop = stop or self._given_up(error)
                    if done.refused:
                        self.failed.append(done.problem)
                        yield done
                    else:
                        lacking[index] = done
                except Stopped:
                    pass
            if stop:
                self._stop.set()  # who waits for another attempt has paid nothing yet
        if stop:
            raise stop
        return lacking

    def _is_its_own_fault(self, error: UserError) -> bool:
        """Whether a refusal is of one request and not of all. A key may be good no more, or the money used up: see `in_doubt`, `GIVE_UP`."""
        if isinstance(error, Forbidden):
            return bool(self.answered)
        return isinstance(error, RefusedRequest) and error.status in ONE_ROW and bool(self.answered or not self._doubted)

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

    def _count(self, done: ApiCompletion, number: int) -> None:
        """Count an answer, or a refusal: that the API does not answer is no sign of it."""
        self._doubted.pop(done.index, None)
        if done.problem:
            self.failed.append(done.problem)
        if not done.refused:
            self.answered += 1
            self._last_answered = max(self._last_answered, number)
            self.usd = None if self.usd is None or done.usd is None else self.usd + done.usd
            self._dearest = max(self._dearest, done.usd or 0.0)
            self._settle()

    @property
    def in_doubt(self) -> list[ApiCompletion]:
        return [done for _, done in self._doubted.values()]

    def _doubt(self, done: ApiCompletion, number: int) -> None:
        self._doubted[done.index] = number, done
        self._settle()

    def _settle(self) -> None:
        """What was begun before a request that was answered is in doubt no more, and a refusal is for good."""
        for index, (number, done) in list(self._doubted.items()):
            if number < self._last_answered:
                del self._doubted[index]
                if done.refused:
                    with self._keeping:
                        self._keep(done)

    def _overspent(self, on_the_way: int) -> UserError | None:
        if self.max_usd is None or (self.usd or 0.0) + (self._lost + on_the_way + 1) * self._dearest <= self.max_usd:
            return None
        return UserError(
            "api.max_usd", None, f"is used up: one more request to {self.model} might cost more than is left", mend="Raise it and run again"
        )

    def _given_up(self, error: Exception) -> UserError | None:
        if len(self._doubted) < GIVE_UP:
            return None
        mend = key_mend(self.model) if isinstance(error, Forbidden) else "Check the network and the API's address"
        problem = f"gave no answer to {len(self._doubted)} requests in a row ({_problem(error)})"
        return UserError("model", self.model, problem, mend=f"{mend}, and run again")


def _problem(error: Exception) -> str:
    return error.problem if isinstance(error, RefusedRequest) else str(error)  # what to mend is said where it ends the command


def _without_an_answer(index: int, error: Exception, *, refused: bool) -> ApiCompletion:
    return ApiCompletion(index, "", 0, 0, float("nan"), float("nan"), 0.0, _problem(error), refused)
