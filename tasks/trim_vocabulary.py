"""Stage `trim_vocabulary`: a base model without the tokens that the customers of one shop do not write.

A tokenizer is made for everything, and each token costs a row of the embeddings, which are a fifth of a small model's weights and a third of
its 4-bit file, and a logit whenever a token is written. Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; Radford et al. 2019) can do
without most of them: what they stood for is written in smaller pieces. A token is kept with all that it is merged from, so that a text whose
tokens are all kept has the same ones as before.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.base_model import OFFLINE, TINY, BaseModelConfig, folder_of, offline_gguf
from tasks.completions import encode_rows
from tasks.core import progress
from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError
from tasks.domain.spec import Spec, load_spec
from tasks.model_folder import json_of
from tasks.synthesize import read_rows
from tasks.tokenization import set_template

FIELD = "vocabulary.tokens"
FEWEST = 512
TOKENIZER = "tokenizer.json"
OTHER_MODEL = "Set vocabulary.tokens=null, or choose another base model"
COMPARED = 1000  # training rows that are tokenized again
CODE_LLAMA = 32016  # tokens by which llama.cpp's converter knows one, whose last ones mean something to it


class VocabularyConfig(StageConfig):
    """How much of the base model's vocabulary is kept."""

    tokens: int | None = Field(
        None,
        ge=FEWEST,
        le=1_000_000,
        description="Tokens to keep: those of the training rows, the commonest first, then those the tokenizer learnt first; null keeps all",
    )


@stage("trim_vocabulary", version=1, libraries=("torch", "transformers"), preloaded=True)
def trim_vocabulary(config: VocabularyConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `inputs["base_model"]` with the tokens that `inputs["dataset"]` needs, as a Hugging Face folder.

    Raises:
        UserError: the tokenizer is no byte-level BPE, has no more tokens than are to be kept, or cannot do with so few.
    """
    from transformers import AutoTokenizer

    size = config.tokens or 0
    progress.advance(0, 3, "counting tokens")
    base_model = inputs["base_model"]
    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    if not (base_model / TOKENIZER).is_file():
        raise _cannot(size, "its tokenizer is none of the library `tokenizers`")
    described = json.loads((base_model / TOKENIZER).read_text(encoding="utf-8"))
    check_trimmable(described, size)
    tokenizer.save_pretrained(out_dir)  # with the template it has: training gives it another, if it is to
    spec = load_spec(str(inputs["dataset"]))
    set_template(tokenizer, spec)
    rows = read_rows(inputs["dataset"] / "train.jsonl")
    counts = Counter(token for example in encode_rows(rows, tokenizer, spec, sys.maxsize) for token in example["input_ids"])
    new_id = {old: new for new, old in enumerate(choose_tokens(described, counts, size))}

    progress.advance(1, 3, "trimming")
    (out_dir / TOKENIZER).write_text(json.dumps(trimmed_tokenizer(described, new_id), ensure_ascii=False, indent=2), encoding="utf-8")
    parameters = _trim_model(base_model, out_dir, new_id)
    progress.advance(2, 3, "comparing")
    trimmed = AutoTokenizer.from_pretrained(out_dir, trust_remote_code=False)
    set_template(trimmed, spec)
    _check_same(rows[:COMPARED], tokenizer, trimmed, new_id, spec)
    return {
        "tokens": len(new_id),
        "tokens_before": len(tokenizer),
        "tokens_in_use": len(counts),
        "tokens_in_use_left_out": sum(token not in new_id for token in counts),
        "share_of_text_left_out": round(sum(count for token, count in counts.items() if token not in new_id) / max(1, counts.total()), 6),
        "parameters": parameters,
    }


def check_source(config: VocabularyConfig, base: BaseModelConfig) -> None:
    """Check, before any work, that the vocabulary of a base model that was found can be trimmed, as far as its files tell.

    Raises:
        UserError: it cannot, and why.
    """
    from tasks.weights import check_gguf, open_gguf

    if config.tokens is None:
        return
    if base.source in (OFFLINE, TINY) or base.source.endswith(".gguf"):
        path = Path(base.source) if base.source.endswith(".gguf") else offline_gguf()
        field = check_gguf(FIELD, path).get("tokenizer.ggml.model")
        kind = field.contents() if field else None
        if kind != "gpt2":  # llama.cpp's name of byte-level BPE
            raise _cannot(config.tokens, f"its tokenizer ({kind}) is no byte-level BPE")
        embeddings = next((tensor for tensor in open_gguf(path).tensors if tensor.name == "token_embd.weight"), None)
        if embeddings is not None and config.tokens >= (tokens := int(embeddings.shape[-1])):
            raise _leaves_nothing_out(config.tokens, tokens)
    elif (file := folder_of(base) / TOKENIZER).is_file():
        check_trimmable(json_of("base_model.source", file), config.tokens)
    else:
        raise _cannot(config.tokens, f"it has no {TOKENIZER}")


def check_trimmable(described: Mapping[str, Any], size: int) -> None:
    """Whether a `tokenizer.json` can be cut to `size` tokens.

    Raises:
        UserError: it cannot, and why.
    """
    try:
        model, behind = described["model"], set(_kinds(described.get("post_processor")))
        kinds = {*_kinds(described.get("pre_tokenizer")), *_kinds(described.get("decoder"))}
        everything = {*model["vocab"].values(), *(token["id"] for token in described["added_tokens"])}
        fewest, merges = len(_unmerged(described)), model.get("merges")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        raise _cannot(size, f"its {TOKENIZER} is not of the form that is known") from None
    if model.get("type", "BPE") != "BPE" or not merges or model.get("byte_fallback") or "ByteLevel" not in kinds:
        raise _cannot(size, f"its tokenizer ({model.get('type')}) is no byte-level BPE")
    if unknown := behind - {"ByteLevel", "TemplateProcessing"}:
        raise _cannot(size, f"what its tokenizer does to tokens ({', '.join(sorted(unknown))}) is not understood")
    if size >= len(everything):
        raise _leaves_nothing_out(size, len(everything))
    if size == CODE_LLAMA:
        raise UserError(FIELD, size, "makes llama.cpp's converter take the model for a CodeLlama", mend="Take one more")
    if size < fewest:
        problem = "does not hold the tokenizer's bytes and special tokens"
        raise UserError(FIELD, size, problem, mend=f"Take {max(fewest, FEWEST)} or more, or null to keep all")


def choose_tokens(described: Mapping[str, Any], counts: Mapping[int, int], size: int) -> list[int]:
    """Ids of the `size` tokens to keep, in order: bytes and special tokens, then what is counted, the commonest first, then by id.

    A token comes with all it is merged from, or not at all.
    """
    vocabulary: dict[str, int] = described["model"]["vocab"]
    whole = bool(described["model"].get("ignore_merges"))  # a word that is a token is one at once
    rank = {pair: number for number, pair in enumerate(_merges(described))}
    kept = _unmerged(described)
    for token in sorted(vocabulary, key=lambda token: (-counts.get(vocabulary[token], 0), vocabulary[token])):
        if len(kept) == size:
            break
        if token in kept:
            continue
        made = _merged_from(token, rank)
        if made is None:  # no text becomes it by merging
            made = {token} if whole else set()
        if len(kept) + len(new := made - kept) <= size:
            kept |= new
    ids = {**vocabulary, **{token["content"]: token["id"] for token in described["added_tokens"]}}
    return sorted(ids[token] for token in kept)


def trimmed_tokenizer(described: Mapping[str, Any], new_id: Mapping[int, int]) -> dict[str, Any]:
    """A `tokenizer.json` with the tokens of `new_id` alone, under their new ids."""
    model = described["model"]
    vocabulary = {token: new_id[old] for token, old in model["vocab"].items() if old in new_id}
    merges = [list(pair) for pair in _merges(described) if {*pair, "".join(pair)} <= vocabulary.keys()]
    return {
        **described,
        "padding": None,  # transformers sets both with each call
        "truncation": None,
        "added_tokens": [{**token, "id": new_id[token["id"]]} for token in described["added_tokens"]],
        "post_processor": _renumbered(described.get("post_processor"), new_id),
        "model": {**model, "vocab": vocabulary, "merges": merges},
    }


def _merged_from(token: str, rank: Mapping[tuple[str, str], int]) -> set[str] | None:
    """A token, and what stands for parts of it on the way from its bytes, as BPE merges them: always the pair of the lowest rank. In any text
    that has the token its bytes are merged in that order. None, if they end otherwise."""
    pieces, made = list(token), set(token)
    while len(pieces) > 1:
        at = min(range(len(pieces) - 1), key=lambda i: rank.get((pieces[i], pieces[i + 1]), sys.maxsize))
        if (pieces[at], pieces[at + 1]) not in rank:
            return None
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
        made.add(pieces[at])
    return made


def _unmerged(described: Mapping[str, Any]) -> set[str]:
    """Tokens that cannot be left out: those that no merge makes, and those added by name."""
    merged = {"".join(pair) for pair in _merges(described)}
    return {token for token in described["model"]["vocab"] if token not in merged} | {
        token["content"] for token in described["added_tokens"]
    }


def _merges(described: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Pairs of tokens, in either form that `tokenizer.json` has had."""
    for pair in described["model"].get("merges") or ():
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        yield first, second


def _kinds(part: Mapping[str, Any] | None) -> Iterable[str]:
    """Types of a tokenizer's part, which may be a sequence of parts."""
    within = [one for name in ("pretokenizers", "processors", "decoders") for one in (part or {}).get(name, ())]
    if part and not within:
        yield part["type"]
    for one in within:
        yield from _kinds(one)


def _renumbered(part: Any, new_id: Mapping[int, int]) -> Any:
    """A post-processor whose special tokens have their new ids."""
    if isinstance(part, list):
        return [_renumbered(one, new_id) for one in part]
    if not isinstance(part, dict):
        return part
    return {name: [new_id[old] for old in value] if name == "ids" else _renumbered(value, new_id) for name, value in part.items()}


def _trim_model(base_model: Path, out_dir: Path, new_id: Mapping[int, int]) -> int:
    """Write the model with the kept rows of embeddings and output head; the number of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto", trust_remote_code=False, use_safetensors=True)
    before, rows = model.config.vocab_size, torch.tensor(list(new_id))
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    trims = (embeddings.weight, head.weight)
    others = [n for n, parameter in model.named_parameters() if before in parameter.shape and all(parameter is not trim for trim in trims)]
    if others:
        raise _cannot(len(new_id), f"its weight {others[0]} has a place for each token, too")
    embeddings.weight = torch.nn.Parameter(embeddings.weight.detach()[rows].clone())
    head.weight = embeddings.weight if tied else torch.nn.Parameter(head.weight.detach()[rows].clone())
    embeddings.num_embeddings = head.out_features = model.config.vocab_size = len(new_id)
    ids = {name: _new_ids(value, new_id) for name, value in model.config.to_dict().items() if name.endswith("_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    generation = model.generation_config.to_dict() if model.generation_config else {}
    # Other settings of it may name tokens, too, and answers are written without them.
    model.generation_config = GenerationConfig(
        **{name: _new_ids(value, new_id) for name, value in generation.items() if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    model.save_pretrained(out_dir)
    return sum(parameter.numel() for parameter in model.parameters())


def _new_ids(old: Any, new_id: Mapping[int, int]) -> Any:
    """An id, or a list of some; None for what is no longer there."""
    return [new_id[one] for one in old if one in new_id] or None if isinstance(old, list) else new_id.get(old)


def _check_same(rows: list[dict[str, Any]], before: Any, after: Any, new_id: Mapping[int, int], spec: Spec) -> None:
    """Whether rows whose tokens are all kept have the same ones; a tokenizer that merges in its own way would not."""
    pairs = zip(*(encode_rows(rows, tokenizer, spec, sys.maxsize) for tokenizer in (before, after)), strict=True)
    for old, new in ((old["input_ids"], new["input_ids"]) for old, new in pairs):
        if all(token in new_id for token in old) and [new_id[token] for token in old] != new:
            raise _cannot(len(new_id), f"{before.decode(old)[:80]!r}, whose tokens are kept, would have others")


def _cannot(size: int, why: str) -> UserError:
    return UserError(FIELD, size, f"cannot be kept of this base model: {why}", mend=OTHER_MODEL)


def _leaves_nothing_out(size: int, tokens: int) -> UserError:
    return UserError(FIELD, size, "leaves nothing out", mend=f"The base model has {tokens:,} tokens: take fewer, or null to keep all")
