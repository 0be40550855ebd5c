"""Models behind an API, through LiteLLM. What could not be asked is an empty answer, which counts as unparseable."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tasks.api import ApiError, ContentRefused, Reply, Stopped, complete
from tasks.domain.errors import UserError
from tasks.domain.prompt import Message
from tasks.runtimes import Completion

GIVE_UP = 8  # requests in a row without an answer, each tried several times, after which the rest is not asked


@dataclass(frozen=True)
class ApiCompletion(Completion):
    """`usd` is None where no price is known. `problem` says why there is no answer; its time is NaN then. `refused`: there never will be."""

    usd: float | None = None
    problem: str = ""
    refused: bool = False


class LiteLlmRuntime:
    """A model that somebody else runs. `usd`, `answered` and `failed` add up over all requests.

    Args:
        api_base: the address of an API that is not the provider's usual one.
        max_usd: ask no more once the next request might cost more than what is left of this.
        dearest: what the dearest of earlier requests like these cost, in dollars; 0 if there were none.
    """

    device = "api"
    threads = 0

    def __init__(self, model: str, api_base: str | None = None, max_usd: float | None = None, dearest: float = 0.0) -> None:
        self.model, self.api_base, self.max_usd = model, api_base, max_usd
        self.usd: float | None = 0.0
        self.answered = 0
        self.failed: list[str] = []
        self._in_a_row = 0
        self._dearest = dearest
        self._stop = threading.Event()

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Iterator[ApiCompletion]:
        """See `Runtime.generate`. The time to the first token is not known: answers come whole.

        Raises:
            UserError: the key, the model or a request is refused, nothing answers, or `max_usd` is used up. What was on its way
                then is waited for and yielded first, since it is paid for.
        """
        left = iter(enumerate(conversations))
        waiting: dict[Future[Reply], int] = {}
        stop: UserError | None = None
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(parallel)
        try:
            while True:
                # With a limit, the first answer alone tells what one costs.
                room = parallel if self.max_usd is None or self._dearest or self.answered else 1
                while not stop and len(waiting) < room and (item := next(left, None)):
                    stop = self._overspent(len(waiting))
                    if not stop:
                        waiting[pool.submit(self._ask, item[1], max_tokens)] = item[0]
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    index = waiting.pop(future)
                    try:
                        yield self._answered(index, future.result())
                    except ApiError as error:
                        yield self._unanswered(index, error)
                    except UserError as error:  # refused for one, refused for all
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

    def _ask(self, conversation: list[Message], max_tokens: int) -> Reply:
        where: dict[str, Any] = {"api_base": self.api_base} if self.api_base else {}
        return complete(self.model, conversation, max_tokens, sleep=self._pause, temperature=0, **where)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped

    def _answered(self, index: int, reply: Reply) -> ApiCompletion:
        self.answered += 1
        self._in_a_row = 0
        self.usd = None if self.usd is None or reply.usd is None else self.usd + reply.usd
        self._dearest = max(self._dearest, reply.usd or 0.0)
        return ApiCompletion(index, reply.text, reply.prompt_tokens, reply.completion_tokens, float("nan"), reply.seconds, reply.usd)

    def _unanswered(self, index: int, error: ApiError) -> ApiCompletion:
        problem, refused = str(error), isinstance(error, ContentRefused)
        self.failed.append(problem)
        self._in_a_row += 1
        return ApiCompletion(index, "", 0, 0, float("nan"), float("nan"), 0.0, problem, refused)

    def _overspent(self, on_the_way: int) -> UserError | None:
        if self.max_usd is None or (self.usd or 0.0) + (on_the_way + 1) * self._dearest <= self.max_usd:
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
