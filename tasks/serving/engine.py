"""One loaded model and the thread that answers with it. Requests join its running batch as they arrive."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import deque
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING

from tasks.domain.errors import UserError
from tasks.domain.prompt import Message
from tasks.runtimes import Completion
from tasks.runtimes.sources import Asked

if TYPE_CHECKING:
    from tasks.runtimes.llama_cpp import LlamaCppRuntime

log = logging.getLogger("cartwright.serve")
LONGEST_TEXT = 512  # tokens of a prompt behind what all begin with
PLACES = 128  # tokens of the context for each sequence: several times a usual prompt and its answer; longer ones share


class Busy(RuntimeError):
    """As many texts wait as may."""


class Closing(RuntimeError):
    """The model takes no more questions: another serves in its stead, or the server ends."""


class EngineError(RuntimeError):
    """llama.cpp failed while it answered."""


class Engine:
    """Answers conversations with one model, `parallel` at a time. It is the `Source` of `LlamaCppRuntime.answer`.

    The thread is the only one that computes with the model; tokenizing, which only reads, is done by whoever asks.
    """

    def __init__(self, model: LlamaCppRuntime, prefix: list[int], parallel: int, max_waiting: int, max_tokens: int) -> None:
        self._model, self._prefix, self._parallel, self._max_waiting = model, prefix, parallel, max_waiting
        self.max_tokens = max_tokens
        self.max_prompt = len(prefix) + LONGEST_TEXT
        longest = len(prefix) + LONGEST_TEXT + max_tokens + 8
        self._places = len(prefix) + max(longest, parallel * (PLACES + max_tokens))
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Asked, Future[Completion]]] = deque()
        self._running: dict[int, Future[Completion]] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._tokenizing = 0  # askers who read the model just now
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, conversations: list[list[Message]], max_tokens: int) -> list[Future[Completion]]:
        """Ask; all of the conversations or none. A future that is cancelled makes room.

        Raises:
            UserError: a conversation is too long.
            Busy: there is no room for all of them.
            Closing: see there.
        """
        prompts = self._encode(conversations)
        with self._changed:
            if self._closing:
                raise Closing
            if len(self._waiting) + len(self._running) + len(prompts) > self._max_waiting + self._parallel:
                raise Busy
            made = [(Asked(next(self._numbers), prompt, min(max_tokens, self.max_tokens)), Future[Completion]()) for prompt in prompts]
            self._waiting.extend(made)
            self._changed.notify_all()
        for asked, future in made:
            future.add_done_callback(lambda done, asked=asked: setattr(asked, "gone", done.cancelled()))  # type: ignore[misc]
        return [future for _, future in made]

    def _encode(self, conversations: list[list[Message]]) -> list[list[int]]:
        with self._changed:
            if self._closing:
                raise Closing
            self._tokenizing += 1  # the model is not freed meanwhile
        try:
            prompts = [self._model.encode(conversation) for conversation in conversations]
        finally:
            with self._changed:
                self._tokenizing -= 1
                self._changed.notify_all()
        longest = max(map(len, prompts))
        if longest > self.max_prompt:
            raise UserError("text", None, f"has {longest} tokens with its prompt", allowed=f"at most {self.max_prompt}")
        return prompts

    def close(self) -> None:
        """Take no more questions; what was asked is still answered, then the model's memory is given back."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    # The source of the running batch -----------------------------------------------------------------------------

    def take(self, wait: bool) -> Asked | None:
        """See `Source`."""
        if not wait and not self._waiting:  # asked between any two tokens: without the lock
            return None
        with self._changed:
            while True:
                while self._waiting:
                    asked, future = self._waiting.popleft()
                    if not asked.gone:
                        self._running[asked.index] = future
                        return asked
                if not wait or self._closing:
                    return None
                self._changed.wait()

    def refuse(self, asked: Asked, problem: str) -> None:
        """See `Source`."""
        self._end(self._running.pop(asked.index), EngineError(f"a text {problem}"))

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                for completion in self._model.answer(self, self._prefix, self._parallel, self._places):
                    self._end(self._running.pop(completion.index), completion)
            except Exception as error:  # whatever it is: those concerned are told, the others and those to come are answered
                log.exception("llama.cpp failed")
                self._fail(EngineError(f"{type(error).__name__}: {error}"))
        with self._changed:
            self._changed.wait_for(lambda: not self._tokenizing)
        self._model.close()

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return bool(self._waiting)

    def _fail(self, error: EngineError) -> None:
        """Tell those who were being answered; if it failed before there were any, those who wait."""
        with self._changed:
            concerned = list(self._running.values()) or [future for _, future in self._waiting]
            if not self._running:
                self._waiting.clear()
            self._running.clear()
        for future in concerned:
            self._end(future, error)

    @staticmethod
    def _end(future: Future[Completion], result: Completion | EngineError) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            future.set_exception(result) if isinstance(result, EngineError) else future.set_result(result)
