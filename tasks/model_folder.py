"""A Hugging Face folder that a user gave: whether a model can be loaded from it, and nothing but the weights it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.core.file_hash import sha256_file
from tasks.core.manifests import checksum
from tasks.domain.errors import UserError
from tasks.domain.files import read_text

LARGEST_CONFIG = 64_000_000  # bytes of a JSON file beside the weights
READ = {".safetensors", ".json", ".jinja", ".model", ".txt"}  # what a model and its tokenizer are loaded from
# One of them holds a tokenizer's vocabulary.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def check_folder(field: str, folder: Path, source: str) -> None:
    """Check a model's folder without loading it.

    Args:
        source: what the user calls it.

    Raises:
        UserError: not a causal language model, or something is missing or of a kind that is not loaded.
    """
    from tasks.weights import check_no_adapter, check_safetensors

    check_no_adapter(field, folder)
    if not (folder / "config.json").is_file():
        raise UserError(field, source, "has no config.json", mend="Give the folder of a Hugging Face model")
    config = json_of(field, folder / "config.json")
    architectures = config.get("architectures")
    names = [name for name in (architectures if isinstance(architectures, list) else [architectures]) if isinstance(name, str)]
    if not any(name.endswith("ForCausalLM") for name in names):
        raise UserError(
            field,
            source,
            f"is {', '.join(names) or 'of no known architecture'}, not a causal language model",
            mend="Choose a model whose architecture ends in ForCausalLM",
        )
    if "transformers_weights" in config:  # transformers would read that file, whatever is checked here
        problem = "names the file of its weights itself (`transformers_weights`)"
        raise UserError(field, str(folder / "config.json"), problem, mend="Call the weights model.safetensors and take the line away")
    if not _has_chat_template(field, folder):
        mend = "Use the instruction-tuned version, or add chat_template.jinja to the folder"
        raise UserError(field, source, "has no chat template", mend=mend)
    if not list(folder.glob("*.safetensors")):
        mend = "Convert the model to safetensors; pickled weights are not loaded"
        raise UserError(field, source, "has no .safetensors weights", mend=mend)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(field, source, "has no tokenizer", allowed=list(TOKENIZERS), mend="Download the model's other files too")
    for path in sorted({*folder.glob("*.safetensors"), *_shards(field, folder)}):
        check_safetensors(field, path)


def folder_digest(folder: Path) -> str:
    """One digest of all that model and tokenizer are loaded from."""
    return checksum({path.name: sha256_file(path) for path in folder.iterdir() if path.suffix in READ and path.is_file()})


def json_of(field: str, file: Path) -> dict[str, Any]:
    """What a JSON file says.

    Raises:
        UserError: it is no JSON object, or too large for one.
    """
    try:
        found = json.loads(read_text(field, file, LARGEST_CONFIG))
    except UserError:
        raise
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(field, str(file), "is not valid JSON", mend="Download the model again")
    return found


def _shards(field: str, folder: Path) -> set[Path]:
    """The files that a folder's index says its weights are in, which stand beside it: transformers would also open others, pickled ones too."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    weights = json_of(field, index).get("weight_map")
    names = set(map(str, weights.values())) if isinstance(weights, dict) else {""}
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            problem = f"is not an index of weights: {name!r} is no .safetensors file beside it"
            raise UserError(field, str(index), problem, mend="Download the model again")
    return {folder / name for name in names}


def _has_chat_template(field: str, folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    tokenizer = folder / "tokenizer_config.json"
    return tokenizer.is_file() and bool(json_of(field, tokenizer).get("chat_template"))
