"""Models behind an API, through LiteLLM. What could not be asked is an empty answer, which counts as unparseable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from tasks.api import ApiError, Reply, complete
from tasks.domain.prompt import Message
from tasks.runtimes import Completion


class LiteLlmRuntime:
    """A model that somebody else runs. `usd` and `failed` add up over all requests."""

    device = "api"
    threads = 0

    def __init__(self, model: str) -> None:
        self.model = model
        self.usd: float | None = 0.0
        self.failed: list[str] = []

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Iterator[Completion]:
        """See `Runtime.generate`. The time to the first token is not known: answers come whole."""
        pool = ThreadPoolExecutor(parallel)
        try:
            waiting = {
                pool.submit(complete, self.model, conversation, max_tokens, temperature=0): index
                for index, conversation in enumerate(conversations)
            }
            for future in as_completed(waiting):
                try:
                    reply = future.result()
                except ApiError as error:
                    self.failed.append(str(error))
                    reply = Reply("", 0, 0, 0.0, 0.0)
                self.usd = None if self.usd is None or reply.usd is None else self.usd + reply.usd
                yield Completion(waiting[future], reply.text, reply.prompt_tokens, reply.completion_tokens, float("nan"), reply.seconds)
        finally:
            pool.shutdown(cancel_futures=True)  # a refused key is refused for all of them

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """Not to be known of an API."""
        return float("nan")

    def decode_tokens_per_s(self, tokens: int) -> float:
        """Not to be known of an API."""
        return float("nan")
