"""Stage `quantize_gptq`: GPTQ (Frantar et al. 2022, arXiv 2210.17323) through transformers and optimum, kernels by GPTQModel."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tasks.calibration import calibration_examples
from tasks.core import hardware, progress
from tasks.core.stage import Seed, StageConfig, stage
from tasks.domain.errors import UserError

GROUP_SIZES = (128, 64, 32, 16)
BATCH = 8  # calibration rows at a time


class QuantizeGptqConfig(StageConfig):
    """One GPTQ variant."""

    bits: Literal[2, 3, 4, 8] = 4
    # The sizes that kernels of GPTQModel compute with.
    group_size: Literal[0, 16, 32, 64, 128, 256, 512, 1024] = Field(
        0,
        description="Weights that share a scale; 0 takes the largest of 128, 64, 32, 16 that divides the model's dimensions",
    )
    calibration_rows: int = Field(128, ge=8, le=4096, description="Templated training rows the rounding is fitted to")
    damp_percent: float = Field(0.05, gt=0, lt=1)
    seed: Seed = 7


def choose_group_size(wanted: int, dimensions: list[int], field: str = "gptq.group_size") -> int:
    """The group size to use: it must divide every dimension of the quantized layers.

    Raises:
        UserError: the wanted one does not, or none does.
    """
    fitting = [size for size in GROUP_SIZES if all(dimension % size == 0 for dimension in dimensions)]
    if wanted and not any(dimension % wanted for dimension in dimensions):
        return wanted
    if not wanted and fitting:
        return fitting[0]
    kind = field.partition(".")[0]
    raise UserError(
        field,
        wanted,
        f"{'does not divide' if wanted else 'finds none of 128, 64, 32, 16 that divides'} the model's dimensions {sorted(set(dimensions))}",
        allowed=fitting or None,
        mend="" if fitting else f"Leave {kind.upper()} out for this model: --set {kind}=[]",
    )


def layer_sizes(model: Path, kind: str) -> list[int]:
    """Hidden and feed-forward size, which group sizes must divide.

    Raises:
        UserError: the model's configuration does not say both, as that of GPT-2.
    """
    known = json.loads((model / "config.json").read_text(encoding="utf-8"))
    try:
        return [known["hidden_size"], known["intermediate_size"]]
    except KeyError as missing:
        problem = f"is a type of model whose config.json does not say {missing}, which group sizes must divide"
        mend = f"Leave {kind.upper()} out for this model: --set {kind}=[]"
        raise UserError(kind, known.get("model_type"), problem, mend=mend) from None


@stage("quantize_gptq", version=6, libraries=("torch", "transformers", "optimum", "gptqmodel"), preloaded=True)
def quantize_gptq(config: QuantizeGptqConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Quantize `inputs["model"]`, calibrated on templated rows of `inputs["dataset"]`'s training split."""
    import torch
    from optimum.gptq import quantizer as optimum_quantizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig, set_seed

    set_seed(config.seed)
    torch.set_num_threads(hardware.cores())
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"], trust_remote_code=False)
    sizes = layer_sizes(inputs["model"], "gptq")
    group_size = choose_group_size(config.group_size, sizes)
    examples = calibration_examples(inputs["dataset"], tokenizer, config.calibration_rows, config.seed)
    # As ids: optimum's own tokenization would put a second BOS before what has one.
    calibration = [{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in examples]

    _report_progress(optimum_quantizer)
    settings = GPTQConfig(
        bits=config.bits,
        group_size=group_size,
        dataset=calibration,
        tokenizer=tokenizer,
        desc_act=False,
        sym=True,
        damp_percent=config.damp_percent,
        batch_size=BATCH,
        pad_token_id=tokenizer.pad_token_id,
    )
    on_gpu = torch.cuda.is_available()
    # Few CPUs multiply float16 themselves: the rounding is fitted in float32 there, and saved in float16.
    dtype = torch.float16 if on_gpu else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(
        inputs["model"],
        dtype=dtype,
        device_map={"": "cuda:0" if on_gpu else "cpu"},
        quantization_config=settings,
        trust_remote_code=False,
        use_safetensors=True,
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    for buffer in model.buffers():
        if buffer.dtype == torch.float32 and buffer.dim() > 1:  # scales; rotary frequencies stay exact
            buffer.data = buffer.data.half()
    model.config.dtype = torch.float16
    model.config.quantization_config.dataset = None  # customers' texts are not for who gets the model
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    weights = sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
    return {
        "bits": config.bits,
        "group_size": group_size,
        "calibration_rows": len(examples),
        "calibration_tokens": sum(map(len, examples)),
        "widest_layer": max(sizes),
        "size_mb": round(weights / 1e6, 3),
    }


def _report_progress(module: Any) -> None:
    """Send optimum's bar over the model's blocks to ours; it offers no callback."""

    def bar(blocks: Any, desc: str = "", leave: bool = True, **_: Any) -> Iterator[Any]:
        return iter(blocks) if not leave else progress.track(blocks, len(blocks), "blocks")

    module.tqdm = bar
