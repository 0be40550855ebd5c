"""GGUF files through llama.cpp: continuous batching over parallel sequences, the shared prompt prefix evaluated once, and guessed
tokens checked several at a time."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tasks.domain.prompt import Message
from tasks.runtimes import Completion, common_prefix

BATCH = 2048  # most tokens one call of llama_decode takes
FEW = 4  # sequences; with more of them the processor is busy without guesses
REMEMBERED = 20_000  # pairs of tokens of earlier answers


@api.llama_log_callback
def _silent(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp writes hundreds of lines while loading; failures are raised instead."""


api.llama_log_set(_silent, ctypes.c_void_p(0))


@dataclass
class _Sequence:
    """A conversation in progress: which tokens are still to be read, which were written."""

    index: int
    prompt: list[int]
    started: float
    first_token_s: float = 0.0
    written: list[int] = field(default_factory=list)


class Guesses:
    """What may come next, from the prompt, which products are copied from, and from earlier answers, which are built alike.

    Speculative decoding without a second model (prompt lookup): the model reads guessed tokens in the same pass as the last one it
    wrote, and those are kept that it would have written: fewer passes for the same greedy answer, but for near ties, since a pass
    over several tokens rounds differently.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._followed: dict[tuple[int, ...], list[int]] = {}

    def after(self, prompt: list[int], written: list[int]) -> list[int]:
        """Up to `most` tokens that may follow `written`."""
        if not self._most:
            return []
        pair = tuple(written[-2:])
        return (len(pair) > 1 and self._copied(prompt, pair)) or self._followed.get(pair) or self._copied(prompt, pair[-1:])

    def _copied(self, prompt: list[int], last: tuple[int, ...]) -> list[int]:
        for end in range(len(prompt) - 1, len(last) - 1, -1):
            if tuple(prompt[end - len(last) : end]) == last:
                return prompt[end : end + self._most]
        return []

    def learn(self, written: list[int]) -> None:
        """Remember what followed what in an answer."""
        for at in range(len(written) - 1):
            if len(self._followed) < REMEMBERED:
                self._followed[tuple(written[max(0, at - 1) : at + 1])] = written[at + 1 : at + 1 + self._most]


class LlamaCppRuntime:
    """A GGUF file on the CPU.

    Args:
        guesses: most tokens guessed at a time, see `Guesses`; 0 writes token after token.

    Raises:
        ValueError: llama.cpp cannot load the file.
    """

    device = "cpu"

    def __init__(self, path: Path, threads: int, guesses: int = 4) -> None:
        self.threads = threads
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = (
            api.LLAMA_LOAD_MODE_NONE
        )  # most weights are rearranged for the CPU; mapped, the file's pages would stay beside them
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {path}")
        # The state of a recurrent layer cannot be taken back when a guess was wrong.
        takes_back = not (api.llama_model_is_recurrent(self._model) or api.llama_model_is_hybrid(self._model))
        self._most_guesses = guesses if takes_back else 0
        self._guesses = Guesses(self._most_guesses)
        self._vocab = api.llama_model_get_vocab(self._model)
        self._vocab_size = api.llama_vocab_n_tokens(self._vocab)
        self._context: Any = None
        self._shape = (0, 0)
        template = api.llama_model_chat_template(self._model, None)
        if not template:
            raise ValueError(f"{path} has no chat template")
        self._formatter = Jinja2ChatFormatter(
            template.decode(),
            eos_token=self._piece(api.llama_vocab_eos(self._vocab)),
            bos_token=self._piece(api.llama_vocab_bos(self._vocab)),
        )

    def close(self) -> None:
        """Give the memory back."""
        if self._context:
            api.llama_free(self._context)
            self._context = None
        if self._model:
            api.llama_model_free(self._model)
            self._model = None

    # Tokens ------------------------------------------------------------------------------------------------------

    def _piece(self, token: int) -> str:
        return self.decode([token], special=True) if token >= 0 else ""

    def encode(self, conversation: list[Message]) -> list[int]:
        """Token ids of a prompt; the template brings the special tokens, none is added."""
        text = self._formatter(messages=conversation).prompt.encode()  # type: ignore[arg-type]
        room = (api.llama_token * (len(text) + 8))()
        count = api.llama_tokenize(self._vocab, text, len(text), room, len(room), False, True)
        if count < 0:
            raise ValueError(f"llama.cpp cannot tokenize {text[:60]!r}")
        return list(room[:count])

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of token ids; special tokens are left out unless asked for."""
        ids = (api.llama_token * len(tokens))(*tokens)
        room = ctypes.create_string_buffer(len(tokens) * 64 + 64)
        count = api.llama_detokenize(self._vocab, ids, len(tokens), room, len(room), False, special)
        return room.raw[: max(count, 0)].decode("utf-8", errors="replace")

    # Generation --------------------------------------------------------------------------------------------------

    def _make_context(self, parallel: int, tokens: int) -> None:
        """A context for `parallel` sequences (and the shared prefix) with `tokens` places in all; kept while it fits."""
        if self._context and self._shape[0] == parallel and self._shape[1] >= tokens:
            api.llama_memory_clear(api.llama_get_memory(self._context), True)
            return
        if self._context:
            api.llama_free(self._context)
        parameters = api.llama_context_default_params()
        parameters.n_ctx = -(-tokens // 256) * 256
        parameters.n_batch = BATCH
        parameters.n_seq_max = parallel + 1
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.kv_unified = True  # sequences share the cells of their common prefix
        parameters.no_perf = True
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise MemoryError(f"llama.cpp cannot make a context of {tokens} tokens for {parallel} sequences")
        self._shape = (parallel, parameters.n_ctx)

    def _evaluate(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest next token of each entry that wants logits, see `_logits`."""
        return [int(np.argmax(logits)) for logits in self._logits(entries)]

    def _logits(self, entries: list[tuple[int, int, int, bool]]) -> list[Any]:
        """Run one batch of (token, position, sequence, wants logits); logits of each that wants them, valid until the next batch."""
        batch = api.llama_batch_init(len(entries), 0, 1)
        try:
            batch.n_tokens = len(entries)
            for i, (token, position, sequence, wants) in enumerate(entries):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wants
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
            code = api.llama_decode(self._context, batch)
            if code:
                raise RuntimeError(f"llama_decode returned {code} for {len(entries)} tokens")
        finally:
            api.llama_batch_free(batch)
        return [
            np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, i), (self._vocab_size,))
            for i, entry in enumerate(entries)
            if entry[3]
        ]

    def completion_logits(self, prompt: list[int], completion: list[int]) -> Any:
        """See `LocalRuntime`."""
        tokens = [*prompt, *completion[:-1]]
        self._make_context(1, len(tokens))
        return np.stack(self._logits([(token, at, 1, at >= len(prompt) - 1) for at, token in enumerate(tokens)]))

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Iterator[Completion]:
        """See `Runtime.generate`. A sequence that ends makes room for the next conversation at once."""
        prompts = [self.encode(conversation) for conversation in conversations]
        prefix = common_prefix(prompts)
        longest = max(map(len, prompts), default=0)
        self._make_context(parallel, len(prefix) + parallel * (longest - len(prefix) + max_tokens + self._most_guesses))
        memory = api.llama_get_memory(self._context)
        if prefix:
            for start in range(0, len(prefix), BATCH):
                self._evaluate([(token, start + i, 0, False) for i, token in enumerate(prefix[start : start + BATCH])])
        waiting = list(enumerate(prompts))[::-1]
        free = list(range(parallel, 0, -1))
        running: dict[int, _Sequence] = {}
        while waiting or running:
            entries: list[tuple[int, int, int, bool]] = []
            owners: list[tuple[int, list[int]]] = []
            for slot, sequence in running.items():
                guessed = self._guesses.after(sequence.prompt, sequence.written) if len(running) <= FEW else []
                at = len(sequence.prompt) + len(sequence.written) - 1
                entries.extend((token, at + i, slot, True) for i, token in enumerate([sequence.written[-1], *guessed]))
                owners.append((slot, guessed))
            while waiting and free and len(entries) + len(waiting[-1][1]) - len(prefix) <= BATCH:
                index, prompt = waiting.pop()
                slot = free.pop()
                running[slot] = _Sequence(index, prompt, time.perf_counter())
                api.llama_memory_seq_cp(memory, 0, slot, 0, len(prefix))
                rest = prompt[len(prefix) :]
                entries.extend((token, len(prefix) + i, slot, i == len(rest) - 1) for i, token in enumerate(rest))
                owners.append((slot, []))
            if not entries:
                raise ValueError(f"conversation {waiting[-1][0]} has more than {BATCH} tokens")
            likeliest = iter(self._evaluate(entries))
            for slot, guessed in owners:
                sequence = running[slot]
                sequence.first_token_s = sequence.first_token_s or time.perf_counter() - sequence.started
                found = list(itertools.islice(likeliest, 1 + len(guessed)))
                right = next((i for i, token in enumerate(guessed) if token != found[i]), len(guessed))
                new = found[: min(right + 1, max_tokens - len(sequence.written))]
                ended = next((i for i, token in enumerate(new) if api.llama_vocab_is_eog(self._vocab, token)), None)
                sequence.written.extend(new if ended is None else new[: ended + 1])
                if ended is None and right < len(guessed):  # forget the wrong guesses
                    api.llama_memory_seq_rm(memory, slot, len(sequence.prompt) + len(sequence.written) - 1, -1)
                if ended is not None or len(sequence.written) >= max_tokens:
                    self._guesses.learn(sequence.written)
                    text = self.decode(sequence.written if ended is None else sequence.written[:-1])
                    yield Completion(
                        sequence.index,
                        text,
                        len(sequence.prompt),
                        len(sequence.written),
                        sequence.first_token_s,
                        time.perf_counter() - sequence.started,
                    )
                    api.llama_memory_seq_rm(memory, slot, -1, -1)
                    del running[slot]
                    free.append(slot)

    # Fixed lengths -----------------------------------------------------------------------------------------------

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """See `Runtime`. As llama-bench's `pp`: one prompt from an empty cache."""
        self._make_context(1, tokens)
        started = time.perf_counter()
        self._evaluate([(i % self._vocab_size, i, 1, i == tokens - 1) for i in range(tokens)])
        return tokens / (time.perf_counter() - started)

    def decode_tokens_per_s(self, tokens: int) -> float:
        """See `Runtime`. As llama-bench's `tg`: token after token from an empty cache."""
        self._make_context(1, tokens + 1)
        self._evaluate([(0, 0, 1, True)])
        started = time.perf_counter()
        for position in range(1, tokens + 1):
            self._evaluate([(position % self._vocab_size, position, 1, True)])
        return tokens / (time.perf_counter() - started)
