"""Constrained decoding by llama.cpp's grammars."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np


class Grammar:
    """A grammar that answers keep to, see `tasks.domain.grammar`.

    Raises:
        ValueError: llama.cpp cannot read it.
    """

    def __init__(self, vocab: Any, text: str, vocab_size: int) -> None:
        self._start = api.llama_sampler_init_grammar(vocab, text.encode(), b"root")
        if not self._start:
            raise ValueError(f"llama.cpp cannot read the grammar {text[:200]!r}")
        self._all = (api.llama_token_data * vocab_size)()
        self._view = np.ctypeslib.as_array(self._all)
        self._view["id"] = np.arange(vocab_size)

    def begin(self) -> Any:
        """The state before an answer, to be given back by `end`."""
        return api.llama_sampler_clone(self._start)

    @staticmethod
    def end(state: Any) -> None:
        api.llama_sampler_free(state)

    def choose(self, state: Any, logits: Any) -> int:
        """The likeliest token that the grammar allows. Most often that is the likeliest of all, which alone is tried first: whether
        the grammar allows each token of a whole vocabulary takes milliseconds."""
        likeliest = int(np.argmax(logits))
        one = (api.llama_token_data * 1)(api.llama_token_data(likeliest, 0.0, 0.0))
        if self._allowed(state, one)[0].logit == 0.0:
            return likeliest
        self._view["logit"] = logits
        self._allowed(state, self._all)
        return int(np.argmax(self._view["logit"]))

    @staticmethod
    def _allowed(state: Any, candidates: Any) -> Any:
        """The candidates, those that are not allowed with a logit of minus infinity."""
        array = api.llama_token_data_array(candidates, len(candidates), -1, False)
        api.llama_sampler_apply(state, ctypes.byref(array))
        return candidates

    @staticmethod
    def accept(state: Any, token: int) -> None:
        """Go on from a token that was chosen."""
        api.llama_sampler_accept(state, token)

    def close(self) -> None:
        """Give the memory back."""
        if self._start:
            api.llama_sampler_free(self._start)
            self._start = None
