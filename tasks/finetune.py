"""Stage `finetune`: QLoRA (Dettmers et al. 2023, arXiv 2305.14314) on the completions of the training rows."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.checkpoints import newest_whole, seal
from tasks.completions import IGNORED, completion_loss, completion_matches, encode_rows, pad, parts, shuffled_order
from tasks.core import hardware, progress
from tasks.core.stage import StageConfig, stage
from tasks.domain.spec import load_spec
from tasks.synthesize import read_rows
from tasks.tokenization import set_template
from tasks.unpadded import let_in_line


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
    rank: int = Field(16, ge=1, le=512, description="Rank of the LoRA matrices (Hu et al. 2021, arXiv 2106.09685)")
    alpha: int = Field(32, ge=1, le=1024)
    dropout: float = Field(0.0, ge=0, lt=1)
    max_length: int = Field(256, ge=16, le=8192, description="Longer rows are left out, and counted")
    checkpoints: int = Field(10, ge=1, le=1000, description="How often training is saved, and evaluated on `validation`")
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
        True, description="Compile the layers with torch.compile where the machine has a C++ compiler: half as fast again on a CPU"
    )
    workers: int | None = Field(
        None, ge=1, le=256, description="Processes that share each batch on a CPU, of one thread each; null for one on every core"
    )
    tokens_at_a_time: int | None = Field(
        None,
        ge=64,
        description="A batch with more is computed in parts; null for 768 in each process on a CPU, and for whole batches on a GPU",
    )
    seed: int = Field(7, ge=0)

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


def has_compiler() -> bool:
    """Whether there is a C++ compiler for torch.compile."""
    return bool(shutil.which("c++") or shutil.which("g++"))


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
    if config.compile and has_compiler():
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


@stage("finetune", version=9, libraries=("torch", "transformers", "peft", "bitsandbytes"), resumable=True, preloaded=True)
def finetune(config: FinetuneConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Train a LoRA adapter on `inputs["base_model"]` with `inputs["dataset"]`; goes on from the last checkpoint in `out_dir`."""
    import numpy as np
    import torch
    from datasets import Dataset
    from torch.utils.data import Sampler
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    from tasks.frozen import restore_16bit
    from tasks.gradient_workers import GradientWorkers

    precision = resolve_precision(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = hardware.cores() if config.workers is None else config.workers
    workers = 1 if device != "cpu" else min(workers, config.batch_size)
    base_model = inputs["base_model"]
    pool = GradientWorkers(workers - 1, config, base_model, precision != "fp32") if workers > 1 else None
    tokenizer = AutoTokenizer.from_pretrained(base_model, trust_remote_code=False)
    spec = load_spec(str(inputs["dataset"]))
    set_template(tokenizer, spec)
    rows = read_rows(inputs["dataset"] / "train.jsonl")
    train = encode_rows(rows, tokenizer, spec, config.max_length)
    validation = encode_rows(read_rows(inputs["dataset"] / "validation.jsonl"), tokenizer, spec, config.max_length)

    most_tokens = tokens_at_a_time(config, device)
    threads = 1 if workers > 1 else hardware.cores()
    torch.set_num_threads(threads)
    model = build_model(config, base_model)
    compiled = config.compile and has_compiler()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)

    settings = training_settings(config, len(train), device)
    total_steps = settings["max_steps"]
    every = -(-total_steps // config.checkpoints)
    finishes = config.unpacks and config.finish_in_16bit > 0
    in_nf4 = total_steps - round(total_steps * config.finish_in_16bit) if finishes else sys.maxsize  # steps

    class ShuffledSampler(Sampler[int]):
        """Rows in random order; Trainer sets the epoch, so that a resumed epoch has the order of the interrupted one."""

        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(train)

        def __iter__(self) -> Iterator[int]:
            return iter(shuffled_order(len(train), config.seed + self.epoch))

    class CompletionTrainer(Trainer):
        restored = False

        def restore_when_due(self) -> None:
            if not self.restored and self.state.global_step >= in_nf4:
                self.restored = True
                if pool:
                    pool.restore_16bit()
                restore_16bit(model, base_model)

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return ShuffledSampler()

        def create_optimizer(self, *_: Any) -> Any:
            if self.optimizer is None:
                self.optimizer = make_optimizer(config, model)
            return self.optimizer

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.restore_when_due()
            items = (inputs["labels"][:, 1:] != IGNORED).sum()
            mine = pool.start(inputs, int(items)) if pool else inputs
            loss = sum(super(CompletionTrainer, self).training_step(model, part, items) for part in parts(mine, most_tokens))
            return loss + pool.finish() if pool else loss

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            with torch.autocast(device, dtype=torch.bfloat16, enabled=precision != "fp32"):
                loss = completion_loss(model, inputs, num_items_in_batch)
            return (loss, {}) if return_outputs else loss

        def evaluate(self, *arguments: Any, **more: Any) -> Any:
            torch.set_num_threads(hardware.cores())  # the workers wait meanwhile
            try:
                return super().evaluate(*arguments, **more)
            finally:
                torch.set_num_threads(threads)

        def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
            with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=precision != "fp32"):
                loss, matches = completion_matches(model, self._prepare_inputs(inputs))
            return loss, matches, matches

    class Report(TrainerCallback):
        loss = float("nan")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)
            values = {
                name: float(value)
                for name, value in (logs or {}).items()
                if name in ("loss", "eval_loss", "eval_exact_match", "learning_rate", "grad_norm")
            }
            progress.metrics(values, state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(out_dir / "checkpoints" / f"checkpoint-{state.global_step}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.advance(state.global_step, total_steps, f"loss {self.loss:.3f}" if self.loss == self.loss else "")

    arguments = TrainingArguments(
        **settings,
        output_dir=str(out_dir / "checkpoints"),
        per_device_eval_batch_size=max(32, config.batch_size),
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, total_steps // 50),
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        report_to=[],
        disable_tqdm=True,
    )
    report = Report()
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation),
        data_collator=lambda batch: pad(batch, tokenizer.pad_token_id),
        compute_metrics=lambda prediction: {"exact_match": float(np.mean(prediction.predictions))},
        callbacks=[report],
    )
    progress.advance(0, total_steps, "starting")
    resumed_from = newest_whole(out_dir / "checkpoints")
    if pool:
        pool.follow(model)
    try:
        outcome = trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    finally:
        workers_peak = pool.close() if pool else 0.0
        pool = None
    # The last step's evaluation, if there was one at that step.
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
    if last.get("step") != total_steps:
        trainer.restore_when_due()  # a training that was killed behind its last step has taken none here
        last = trainer.evaluate()

    # What is saved says neither where this machine keeps the base model, nor in which order Python has a set.
    saved = model.peft_config["default"]
    saved.base_model_name_or_path, saved.target_modules = "base_model", sorted(saved.target_modules)
    model.save_pretrained(out_dir, save_embedding_layers=False)  # to decide it by itself, PEFT would ask the hub about the base model
    (out_dir / "README.md").unlink()  # PEFT's form for a model card: empty, but for the folder of the base model
    tokenizer.save_pretrained(out_dir)
    tokens = round(sum(example["length"] for example in train) * config.epochs)
    history = trainer.state.log_history
    shutil.rmtree(out_dir / "checkpoints")
    return {
        "examples": len(train),
        "left_out_too_long": len(rows) - len(train),
        "epochs": config.epochs,
        "steps": total_steps,
        "tokens": tokens,
        "tokens_per_s": round(tokens * (1 if not resumed_from else 0) / outcome.metrics["train_runtime"], 1) or None,
        "resumed_from_step": int(resumed_from.name.split("-")[1]) if resumed_from else None,
        "trainable_params": trainable,
        "final_loss": report.loss,
        "validation_loss": last["eval_loss"],
        "validation_exact_match": last["eval_exact_match"],
        "precision": precision,
        "workers": workers,
        "workers_peak_rss_mb": round(workers_peak, 1),
        "compiled": compiled,
        "history": [
            {key: entry[key] for key in ("step", "loss", "eval_loss", "eval_exact_match", "learning_rate") if key in entry}
            for entry in history
        ],
    }
