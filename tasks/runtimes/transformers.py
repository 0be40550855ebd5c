"""Hugging Face folders through transformers, GPTQ ones included (their kernels are GPTQModel's)."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks.core import hardware
from tasks.domain.prompt import Message
from tasks.runtimes import Completion, GptqKernel, common_prefix, too_long
from tasks.tokenization import encode, prompt_text

WORTH_SHARING = 64  # tokens of a common prefix from which a copy of its cache is cheaper than reading it again


class TransformersRuntime:
    """A model in transformers, on the first CUDA device if there is one.

    Args:
        gguf_file: read the weights, dequantized, from this file of the folder.
        kernel: multiply by GPTQ weights with this kernel; None takes the one GPTQModel thinks best.

    Raises:
        ValueError: the kernel cannot run this model on this device.
    """

    def __init__(self, path: Path, threads: int, dtype: str, gguf_file: str | None = None, kernel: GptqKernel | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPTQConfig

        self._torch = torch
        self.threads = threads
        self.share_prefix = True
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)
        if dtype == "auto":
            dtype = "float16" if self.device == "cuda" else "bfloat16" if hardware.native_bf16() else "float32"
        self.dtype = dtype
        file: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
        chosen: dict[str, Any] = {}
        if kernel:
            stored = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
            chosen["quantization_config"] = GPTQConfig(bits=stored["bits"], group_size=stored["group_size"], backend=f"gptq_{kernel}")
        self._tokenizer = AutoTokenizer.from_pretrained(path, **file, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), device_map={"": self.device}, trust_remote_code=False, use_safetensors=True, **file, **chosen
        ).eval()
        # Greedy, as every runtime decodes: what a model's makers set beside the end of an answer, such as a penalty for words that were
        # there before, would be followed here alone.
        self._model.generation_config = GenerationConfig(eos_token_id=self._model.generation_config.eos_token_id)
        self._shared: tuple[list[int], Any] = ([], None)
        self._pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._tokenizer.eos_token_id

    def forget(self) -> None:
        """See `LocalRuntime`; a shared prefix is read anew."""
        self._shared = ([], None)

    @property
    def model(self) -> Any:
        return self._model

    @property
    def kernel(self) -> str:
        """Class of the layer that multiplies by quantized weights, `Linear` if none does."""
        names = {type(module).__name__ for module in self._model.modules()}
        return next((name for name in sorted(names) if name.endswith("Linear") and name != "Linear"), "Linear")

    def encode(self, conversation: list[Message]) -> list[int]:
        return encode(self._tokenizer, prompt_text(self._tokenizer, conversation))

    def generate(self, conversations: Sequence[list[Message]], max_tokens: int, parallel: int) -> Iterator[Completion]:
        """See `LocalRuntime.generate`. Batches hold conversations of like length, padded on the left."""
        encoded = [self.encode(conversation) for conversation in conversations]
        refused = too_long(encoded)
        yield from refused.values()
        kept = ((index, prompt) for index, prompt in enumerate(encoded) if index not in refused)
        prompts = sorted(kept, key=lambda item: len(item[1]))
        prefix = common_prefix([ids for _, ids in prompts])
        if not self.share_prefix or len(prefix) < WORTH_SHARING:
            prefix = []
        for start in range(0, len(prompts), parallel):
            yield from self._batch(prompts[start : start + parallel], prefix, max_tokens)

    def _read(self, prefix: list[int], copies: int) -> Any:
        """A cache that holds `prefix` for so many sequences."""
        if not prefix:
            return None
        if self._shared[0] != prefix:
            with self._torch.inference_mode():
                read = self._model(input_ids=self._torch.tensor([prefix], device=self.device), use_cache=True, logits_to_keep=1)
            self._shared = (prefix, read.past_key_values)
        cache = copy.deepcopy(self._shared[1])
        cache.batch_repeat_interleave(copies)
        return cache

    def _batch(self, prompts: list[tuple[int, list[int]]], prefix: list[int], max_tokens: int) -> Iterator[Completion]:
        torch = self._torch
        shared = len(prefix)
        longest = max(len(ids) for _, ids in prompts)
        # The padding stands between the shared prefix, which is read already, and the rest.
        input_ids = torch.tensor([prefix + [self._pad] * (longest - len(ids)) + ids[shared:] for _, ids in prompts], device=self.device)
        mask = torch.tensor(
            [[1] * shared + [0] * (longest - len(ids)) + [1] * (len(ids) - shared) for _, ids in prompts], device=self.device
        )
        clock = _FirstToken(self._synchronize)
        cache = self._read(prefix, len(prompts))
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self._pad,
                logits_processor=[clock],
                past_key_values=cache,
            )
        total = time.perf_counter() - clock.started
        for (index, ids), written in zip(prompts, output[:, longest:].tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(written) if token == self._tokenizer.eos_token_id), len(written))
            text = str(self._tokenizer.decode(written[:length], skip_special_tokens=True))
            yield Completion(index, text, len(ids), length, clock.first - clock.started, total, tokens=tuple(written[:length]))

    def completion_logits(self, prompt: list[int], completion: list[int]) -> Any:
        """See `LocalRuntime`."""
        input_ids = self._torch.tensor([[*prompt, *completion[:-1]]], device=self.device)
        with self._torch.inference_mode():
            return self._model(input_ids=input_ids, logits_to_keep=len(completion)).logits[0].float().cpu().numpy()

    def prefill_tokens_per_s(self, tokens: int) -> float:
        """See `LocalRuntime`: one forward pass from an empty cache."""
        torch = self._torch
        input_ids = (torch.arange(tokens, device=self.device) % self._model.config.vocab_size)[None]
        with torch.inference_mode():
            self._synchronize()
            started = time.perf_counter()
            self._model(input_ids=input_ids, use_cache=True, logits_to_keep=1)
            self._synchronize()
            return tokens / (time.perf_counter() - started)

    def decode_tokens_per_s(self, tokens: int) -> float:
        """See `LocalRuntime`: forward passes of one token each on a growing cache."""
        torch = self._torch
        with torch.inference_mode():
            output = self._model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.device), use_cache=True)
            self._synchronize()
            started = time.perf_counter()
            for token in range(1, tokens + 1):
                output = self._model(
                    input_ids=torch.tensor([[token % self._model.config.vocab_size]], device=self.device),
                    past_key_values=output.past_key_values,
                    use_cache=True,
                )
                output.logits[0, -1].argmax().item()
            self._synchronize()
            return tokens / (time.perf_counter() - started)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            self._torch.cuda.synchronize()


class _FirstToken:
    """A logits processor that changes nothing and remembers when the first logits came."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize  # a GPU is only told what to compute
        self.started = time.perf_counter()
        self.first = 0.0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self.first:
            self._synchronize()
            self.first = time.perf_counter()
        return scores
