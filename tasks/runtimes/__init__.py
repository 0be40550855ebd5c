"""One small class per way to run a model on this machine; all of them answer the same calls. Beside them, one for models behind an API."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tasks.domain.prompt import Message

LONGEST_PROMPT = 2048  # tokens; a customer's text has a few dozen, and memory is taken for as many as the longest has
RuntimeName = Literal["transformers", "llama_cpp", "litellm"]
# `auto`: float16 on a GPU, bfloat16 on a CPU that has it, else float32. A CPU without float16 emulates it several times slower.
Dtype = Literal["auto", "float16", "bfloat16", "float32"]

GptqKernel = Literal["marlin", "exllama_v2", "triton", "torch", "torch_aten", "torch_int8"]  # GPTQModel's


@dataclass(frozen=True)
class Completion:
    """One answer. `index` is that of its conversation; times are seconds of wall clock since its prompt was taken up.

    It has `ended` if it was not cut off at the most tokens allowed; not every runtime knows. `tokens` are the ids that were written,
    with the one that ends the turn; an API does not tell them.
    """

    index: int
    text: str
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float
    ended: bool = field(default=True, kw_only=True)
    tokens: tuple[int, ...] = field(default=(), kw_only=True)


class LocalRuntime(Protocol):
    """A loaded model on this machine. Decoding is greedy and stops at the end of the turn.

    `share_prefix`: read only once what all prompts begin with.
    """

    device: str
    threads: int
    share_prefix: bool

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Iterator[Completion]:
        """Answer every conversation, `parallel` at a time, in the order in which they are finished.

        One whose prompt has more than `LONGEST_PROMPT` tokens, besides those with which all begin, gets an empty
        answer, see `too_long`.
        """
        ...

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """Speed of reading a prompt of `tokens` tokens, tokens/s."""
        ...

    def decode_tokens_per_s(self, tokens: int) -> float:
        """Speed of writing `tokens` tokens one after the other, tokens/s."""
        ...

    def forget(self) -> None:
        """Forget what was learnt from earlier requests, so that the next ones are measured as the first ones were."""
        ...

    def encode(self, conversation: list[Message]) -> list[int]:
        """Token ids of a prompt, as this runtime's own template and tokenizer make them."""
        ...

    def completion_logits(self, prompt: list[int], completion: list[int]) -> Any:
        """Logits by which each token of a completion is foretold: float32, (tokens of the completion, vocabulary)."""
        ...


def too_long(prompts: Sequence[list[int]]) -> dict[int, Completion]:
    """What stands for the answers to prompts that are longer than `LONGEST_PROMPT`, besides what all begin with: no text, no tokens,
    and NaN seconds."""
    shared = len(common_prefix(prompts))
    long = [index for index, prompt in enumerate(prompts) if len(prompt) - shared > LONGEST_PROMPT]
    return {index: Completion(index, "", len(prompts[index]), 0, math.nan, math.nan, ended=False) for index in long}


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens with which all of several prompts begin, so that they need to be read only once; none for a single prompt.

    At least one token of each prompt is left, since its logits are needed.
    """
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    limit = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), limit)
    return first[: min(length, limit)]


LIBRARIES: dict[str, tuple[str, ...]] = {
    "llama_cpp": ("tasks.runtimes.llama_cpp",),
    "transformers": ("torch", "transformers.models.auto.modeling_auto", "tasks.runtimes.transformers"),
    "litellm": (),
}


def import_libraries(runtime: RuntimeName, folder: Path) -> None:
    """Import what `load` needs for a model, so that the time of loading is the model's."""
    quantized = runtime == "transformers" and "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in (*LIBRARIES[runtime], *(("optimum.gptq", "gptqmodel") if quantized else ())):
        importlib.import_module(name)


def load(
    runtime: Literal["transformers", "llama_cpp"],
    path: Path,
    threads: int,
    dtype: Dtype = "auto",
    grammar: str | None = None,
    mmap: bool = False,
    kernel: GptqKernel | None = None,
) -> LocalRuntime:
    """Load a GGUF file or a Hugging Face folder; a grammar and mapping into memory are for GGUF files, a kernel is for GPTQ folders."""
    if runtime == "llama_cpp":
        from tasks.runtimes.llama_cpp import LlamaCppRuntime

        return LlamaCppRuntime(path, threads, grammar=grammar, mmap=mmap)
    from tasks.runtimes.transformers import TransformersRuntime

    return TransformersRuntime(path, threads, dtype, kernel=kernel)
