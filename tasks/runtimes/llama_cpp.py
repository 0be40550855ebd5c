"""GGUF files through llama.cpp: continuous batching over parallel sequences, the shared prompt prefix evaluated once, and guessed
tokens checked several at a time."""

from __future__ import annotations

import ctypes
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as api
import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from tasks.domain.prompt import Message
from tasks.runtimes import LONGEST_PROMPT, Completion, common_prefix, too_long
from tasks.runtimes.guesses import Guesses
from tasks.runtimes.llama_grammar import Grammar
from tasks.runtimes.sources import Asked, Listed, Source

BATCH = LONGEST_PROMPT  # most tokens one call of llama_decode takes
ERROR = 4  # ggml's level of a log line
FEW = 4  # sequences; with more of them the processor is busy without guesses


_errors: deque[str] = deque(maxlen=8)  # what llama.cpp said last of what it could not do


@api.llama_log_callback
def _hear(level: int, text: bytes, user_data: Any) -> None:
    """llama.cpp writes hundreds of lines while loading; failures are raised instead, with its reason."""
    if level == ERROR:
        _errors.append(text.decode(errors="replace").strip())


api.llama_log_set(_hear, ctypes.c_void_p(0))


@dataclass
class _Sequence:
    """A conversation in progress: which tokens are still to be read, which were written, and how many places it may need."""

    asked: Asked
    prompt: list[int]
    started: float
    needed: int
    first_token_s: float = 0.0
    written: list[int] = field(default_factory=list)
    ended: bool = False  # with the end of a turn
    state: Any = None  # of the grammar, where there is one


class LlamaCppRuntime:
    """A GGUF file on the CPU.

    Args:
        guesses: most tokens guessed at a time, see `Guesses`; 0 writes token after token.
        grammar: keep every answer to it, see `tasks.domain.grammar`.
        mmap: map the file into memory and compute from there. Its pages are shared with other processes and given up when memory is
            short; but weights are not rearranged for the CPU, which makes most formats slower.

    Attributes:
        share_prefix: evaluate what all prompts begin with only once.

    Raises:
        ValueError: llama.cpp cannot load the file, or read the grammar.
    """

    device = "cpu"

    def __init__(self, path: Path, threads: int, guesses: int = 4, grammar: str | None = None, mmap: bool = False) -> None:
        self.threads = threads
        self.share_prefix = True
        api.llama_backend_init()
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = api.LLAMA_LOAD_MODE_MMAP if mmap else api.LLAMA_LOAD_MODE_NONE
        parameters.use_extra_bufts = not mmap  # rearranged weights would be in memory beside the file's pages
        _errors.clear()
        self._model = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            reason = next(iter(_errors), "it does not say why")  # the others say that therefore something else failed
            raise ValueError(f"llama.cpp cannot load {path}: {reason[-300:]}")
        # The state of a recurrent layer cannot be taken back when a guess was wrong.
        takes_back = not (api.llama_model_is_recurrent(self._model) or api.llama_model_is_hybrid(self._model))
        self._most_guesses = guesses if takes_back else 0
        self._guesses = Guesses(self._most_guesses)
        self._vocab = api.llama_model_get_vocab(self._model)
        self._vocab_size = api.llama_vocab_n_tokens(self._vocab)
        self._context: Any = None
        self._shape = (0, 0)
        self._grammar: Grammar | None = None
        try:
            self._formatter = self._template(path)
            self._grammar = Grammar(self._vocab, grammar, self._vocab_size) if grammar else None
        except BaseException:  # a server that goes on with another model must get the memory back
            self.close()
            raise

    def _template(self, path: Path) -> Jinja2ChatFormatter:
        template = api.llama_model_chat_template(self._model, None)
        if not template:
            raise ValueError(f"{path} has no chat template")
        return Jinja2ChatFormatter(
            template.decode(),
            eos_token=self._piece(api.llama_vocab_eos(self._vocab)),
            bos_token=self._piece(api.llama_vocab_bos(self._vocab)),
        )

    def close(self) -> None:
        """Give the memory back."""
        if self._grammar:
            self._grammar.close()
        if self._context:
            api.llama_free(self._context)
            self._context = None
        if self._model:
            api.llama_model_free(self._model)
            self._model = None

    def forget(self) -> None:
        """See `LocalRuntime`."""
        self._guesses = Guesses(self._most_guesses)

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
        """See `LocalRuntime.generate`. A sequence that ends makes room for the next conversation at once."""
        encoded = [self.encode(conversation) for conversation in conversations]
        refused = too_long(encoded)
        yield from refused.values()
        prompts = {index: prompt for index, prompt in enumerate(encoded) if index not in refused}
        prefix = common_prefix(list(prompts.values())) if self.share_prefix else []
        longest = sorted(map(len, prompts.values()))[-parallel:]  # whichever are answered at a time, they need no more than these
        places = len(prefix) + sum(length - len(prefix) + max_tokens + self._most_guesses for length in longest)
        listed = Listed([Asked(index, prompt, max_tokens) for index, prompt in prompts.items()])
        yield from self.answer(listed, prefix, parallel, places)

    def answer(self, source: Source, prefix: list[int], parallel: int, places: int) -> Iterator[Completion]:
        """Answer what a source gives, `parallel` at a time, until it has ended. What comes later joins those that are being answered.

        Args:
            prefix: tokens with which prompts begin, read once. One that begins otherwise is read whole.
            places: tokens the context holds in all, those of the prefix too. A conversation waits until there is room for its longest answer.
        """
        self._make_context(parallel, places)
        memory = api.llama_get_memory(self._context)
        for start in range(0, len(prefix), BATCH):
            self._evaluate([(token, start + i, 0, False) for i, token in enumerate(prefix[start : start + BATCH])])
        room = self._shape[1] - len(prefix)
        free = list(range(parallel, 0, -1))
        running: dict[int, _Sequence] = {}
        asked: Asked | None = None
        try:
            while True:
                entries: list[tuple[int, int, int, bool]] = []
                owners: list[tuple[int, list[int]]] = []
                for slot, sequence in running.items():
                    guessed = self._guesses.after(sequence.prompt, sequence.written) if len(running) <= FEW else []
                    at = len(sequence.prompt) + len(sequence.written) - 1
                    entries.extend((token, at + i, slot, True) for i, token in enumerate([sequence.written[-1], *guessed]))
                    owners.append((slot, guessed))
                while free and (asked := asked or source.take(wait=not running)):
                    shared = len(prefix) if asked.prompt[: len(prefix)] == prefix and len(asked.prompt) > len(prefix) else 0
                    rest = asked.prompt[shared:]
                    needed = len(rest) + asked.max_tokens + self._most_guesses
                    if len(entries) + len(rest) > BATCH or needed > room:
                        break
                    slot = free.pop()
                    room -= needed
                    state = self._grammar and self._grammar.begin()
                    running[slot] = _Sequence(asked, asked.prompt, time.perf_counter(), needed, state=state)
                    if shared:
                        api.llama_memory_seq_cp(memory, 0, slot, 0, shared)
                    entries.extend((token, shared + i, slot, i == len(rest) - 1) for i, token in enumerate(rest))
                    owners.append((slot, []))
                    asked = None
                if not running:
                    if not asked:
                        return
                    source.refuse(asked, f"has more than {min(BATCH, self._shape[1])} tokens")
                    asked = None
                    continue
                logits = iter(self._logits(entries))
                for slot, guessed in owners:
                    sequence = running[slot]
                    sequence.first_token_s = sequence.first_token_s or time.perf_counter() - sequence.started
                    found = self._chosen(sequence, list(itertools.islice(logits, 1 + len(guessed))), guessed)
                    right = len(found) - 1
                    self._write(sequence, found)
                    if not sequence.ended and right < len(guessed):  # forget the wrong guesses
                        api.llama_memory_seq_rm(memory, slot, len(sequence.prompt) + len(sequence.written) - 1, -1)
                    if sequence.ended or len(sequence.written) >= sequence.asked.max_tokens or sequence.asked.gone:
                        api.llama_memory_seq_rm(memory, slot, -1, -1)
                        del running[slot]
                        free.append(slot)
                        room += sequence.needed
                        yield self._completion(sequence)
        finally:
            for sequence in running.values():
                self._release(sequence)

    def _write(self, sequence: _Sequence, found: list[int]) -> None:
        """Go on from tokens that were chosen, up to the end of the turn or as many as were asked for."""
        new = found[: sequence.asked.max_tokens - len(sequence.written)]
        ended = next((i for i, token in enumerate(new) if api.llama_vocab_is_eog(self._vocab, token)), None)
        sequence.ended = ended is not None
        sequence.written.extend(new if ended is None else new[: ended + 1])

    def _completion(self, sequence: _Sequence) -> Completion:
        self._release(sequence)
        self._guesses.learn(sequence.written)
        return Completion(
            sequence.asked.index,
            self.decode(sequence.written[:-1] if sequence.ended else sequence.written),
            len(sequence.prompt),
            len(sequence.written),
            sequence.first_token_s,
            time.perf_counter() - sequence.started,
            ended=sequence.ended,
            tokens=tuple(sequence.written),
        )

    def _release(self, sequence: _Sequence) -> None:
        if self._grammar:
            self._grammar.end(sequence.state)

    def _chosen(self, sequence: _Sequence, logits: list[Any], guessed: list[int]) -> list[int]:
        """The tokens that follow: one for each guess that was right, and the one after them."""
        found: list[int] = []
        for at, row in enumerate(logits):
            token = self._grammar.choose(sequence.state, row) if self._grammar else int(np.argmax(row))
            found.append(token)
            if self._grammar:
                self._grammar.accept(sequence.state, token)
            if at == len(guessed) or token != guessed[at] or api.llama_vocab_is_eog(self._vocab, token):
                break
        return found

    # Fixed lengths -----------------------------------------------------------------------------------------------

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """See `LocalRuntime`. As llama-bench's `pp`: one prompt from an empty cache."""
        self._make_context(1, tokens)
        started = time.perf_counter()
        self._evaluate([(i % self._vocab_size, i, 1, i == tokens - 1) for i in range(tokens)])
        return tokens / (time.perf_counter() - started)

    def decode_tokens_per_s(self, tokens: int) -> float:
        """See `LocalRuntime`. As llama-bench's `tg`: token after token from an empty cache."""
        self._make_context(1, tokens + 1)
        self._evaluate([(0, 0, 1, True)])
        started = time.perf_counter()
        for position in range(1, tokens + 1):
            self._evaluate([(position % self._vocab_size, position, 1, True)])
        return tokens / (time.perf_counter() - started)
