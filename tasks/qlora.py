"""What QLoRA trains (Dettmers et al. 2023, arXiv 2305.14314): the settings, and the model and the optimizer they describe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.core import hardware
from tasks.core.stage import Seed, StageConfig
from tasks.unpadded import let_in_line

LONGEST = 8192  # tokens a row that is trained on may have


class FinetuneConfig(StageConfig):
    """How the adapter is trained."""

    method: Literal["qlora", "lora"] = Field("qlora", description="`qlora` keeps the base weights in NF4 with double quantization")
    precision: Literal["auto", "int8", "bf16", "fp32"] = Field(
        "auto",
        description="What products with frozen weights are computed in; `auto`: bf16 where the machine has it, else fp32, and int8 on a CPU that has bf16 and VNNI but no AMX",
    )
    epochs: float = Field(1.0, gt=0, le=100)
    batch_size: int = Field(4, ge=1, le=1024)
    learning_rate: float = Field(3e-4, gt=0, le=1, description="Of the LoRA matrices A, and of B too unless `lora_plus_ratio` is above 1")
    lora_plus_ratio: float = Field(
        16.0, ge=1, le=256, description="Learning rate of B over that of A: LoRA+ (Hayou et al. 2024, arXiv 2402.12354); 1 is plain LoRA"
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.05, ge=0, le=0.9)
    adam_beta2: float = Field(0.999, gt=0, lt=1, description="Decay of Adam's mean of squared gradients; 0.95 forgets within 20 steps")
    weight_decay: float = Field(0.0, ge=0, le=1)
    intent_weight: float = Field(
        1.0,
        ge=1,
        le=100,
        description="Weight of the loss where an answer says its intent, which is one token of many; 1 elsewhere. Losses of training include it, that of validation does not",
    )
    rank: int = Field(16, ge=1, le=512, description="Rank of the LoRA matrices (Hu et al. 2021, arXiv 2106.09685)")
    alpha: int = Field(32, ge=1, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    max_length: int = Field(256, ge=16, le=LONGEST, description="Longer rows are left out, and counted")
    checkpoints: int = Field(
        10, ge=1, le=1000, description="How often training is evaluated on `validation`, and saved; it is saved every two minutes as well"
    )
    unpack: bool = Field(
        True, description="Hold the NF4 weights unpacked in 16 bits: the same values and faster, for four times their memory"
    )
    finish_in_16bit: float = Field(
        0.3,
        ge=0,
        lt=1,
        description="Share of the steps, the last ones, that are trained on the 16-bit weights the adapter is merged into, where they are unpacked",
    )
    compile: bool = Field(
        True,
        description="Compile the layers with torch.compile where the machine has a C++ compiler and Python's headers: half as fast again on a CPU",
    )
    workers: int | None = Field(
        None, ge=1, le=256, description="Processes that share each batch on a CPU, of one thread each; null for one on every core"
    )
    tokens_at_a_time: int | None = Field(
        None,
        ge=64,
        description="A batch with more is computed in parts; null for 768 in each process on a CPU, and for whole batches on a GPU",
    )
    seed: Seed = 7

    @property
    def unpacks(self) -> bool:
        return self.method == "qlora" and self.unpack

    @model_validator(mode="after")
    def _int8_has_weights_to_round(self) -> FinetuneConfig:
        if self.precision == "int8" and not self.unpacks:
            raise ValueError("`precision: int8` needs `method: qlora` and `unpack: true`. Allowed otherwise: auto, bf16, fp32")
        return self


def resolve_precision(config: FinetuneConfig) -> str:
    """`int8`, `bf16` or `fp32`: what `auto` means on this machine."""
    if config.precision != "auto":
        return config.precision
    if hardware.gpu():
        return "bf16"
    if not hardware.native_bf16():
        return "fp32"
    if hardware.has_amx():  # its bf16 products leave integers nothing to win
        return "bf16"
    return "int8" if config.unpacks and hardware.native_int8() else "bf16"


def tokens_at_a_time(config: FinetuneConfig, device: str) -> int:
    """The most tokens that a process computes at a time."""
    if config.tokens_at_a_time is not None:
        return config.tokens_at_a_time
    return 768 if device == "cpu" else sys.maxsize


def can_compile() -> bool:
    """Whether torch.compile has all it needs here: without, it does not fall back but fails."""
    return not hardware.lacks_to_compile()


def why_slow(config: FinetuneConfig) -> list[str]:
    """What this machine lacks that training would be quicker with, a sentence each."""
    lacks = []
    if config.compile and (missing := hardware.lacks_to_compile()):
        lacks.append(f"The layers are not compiled, and training is slower: torch.compile needs {' and '.join(missing)}.")
    if resolve_precision(config) == "fp32" and config.precision == "auto":
        lacks.append("This processor multiplies no bfloat16: training takes three to four times as long as on one that does.")
    return lacks


def load_base(config: FinetuneConfig, base_model: Path, attention: str | None = None) -> Any:
    """The base model as the config's method and precision hold it, before anything is unpacked.

    Args:
        attention: transformers' name of a kernel; without one it is what is quick for short rows, and tokens can be given to it in a line.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if resolve_precision(config) == "fp32" else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        base_model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=nf4 if config.method == "qlora" else None,
        # On a CPU the backward pass of fused attention took a fifth of a step; for rows this short, plain products are faster.
        attn_implementation=attention or ("eager" if device == "cpu" else "sdpa"),
        trust_remote_code=False,
        use_safetensors=True,
    )
    if attention is None:
        let_in_line(model)
    return model


def add_adapter(config: FinetuneConfig, model: Any) -> Any:
    """The model with a fresh adapter, the only thing of it that is trained."""
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, adapter)


def build_model(config: FinetuneConfig, base_model: Path) -> Any:
    """The base model with a fresh adapter; its layers are frozen and compiled as the config says."""
    from transformers import set_seed

    from tasks.frozen import unpack_nf4

    set_seed(config.seed)
    model = load_base(config, base_model)
    if config.unpacks:
        unpack_nf4(model, int8=resolve_precision(config) == "int8")
    model = add_adapter(config, model)
    if config.compile and can_compile():
        for layer in model.get_base_model().get_decoder().layers:
            layer.compile(dynamic=True)  # one compilation serves all layers, since they are alike
    return model


def make_optimizer(config: FinetuneConfig, model: Any) -> Any:
    """AdamW over the adapter, with LoRA+'s two learning rates."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=config.learning_rate,
        loraplus_lr_ratio=config.lora_plus_ratio,
        loraplus_weight_decay=config.weight_decay,
        betas=(0.9, config.adam_beta2),
        fused=True,
    )


def training_settings(config: FinetuneConfig, rows: int, device: str) -> dict[str, Any]:
    """What decides how `rows` rows are learnt, as transformers' `TrainingArguments` call it; docs/bench_train.py gives them to another trainer."""
    total_steps = max(1, round(-(-rows // config.batch_size) * config.epochs))
    return {
        "max_steps": total_steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": int(config.warmup_ratio * total_steps),
        "bf16": resolve_precision(config) != "fp32",
        "use_cpu": device == "cpu",
        "seed": config.seed,
    }
