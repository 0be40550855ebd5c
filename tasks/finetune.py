"""Stage `finetune`: QLoRA (Dettmers et al. 2023, arXiv 2305.14314) on the completions of the training rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.checkpoints import newest_whole, seal
from tasks.completions import IGNORED, completion_loss, completion_matches, encode_rows, pad, parts, shuffled_order
from tasks.core import hardware, progress
from tasks.core.manifests import CHECKPOINTS
from tasks.core.stage import stage
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec
from tasks.qlora import (
    LONGEST,
    FinetuneConfig,
    build_model,
    can_compile,
    make_optimizer,
    resolve_precision,
    tokens_at_a_time,
    training_settings,
)
from tasks.synthesize import read_rows
from tasks.tokenization import set_template

SAVED_EVERY_S = 120.0  # how much of a training that is stopped is done again, at most


@stage("finetune", version=9, libraries=("torch", "transformers", "peft", "bitsandbytes"), resumable=True, preloaded=True)
def finetune(config: FinetuneConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Train a LoRA adapter on `inputs["base_model"]` with `inputs["dataset"]`; goes on from the last checkpoint in `out_dir`.

    Raises:
        UserError: no row of a split is short enough.
    """
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
    train = encode_rows(rows, tokenizer, spec, config.max_length, config.intent_weight)
    validation_rows = read_rows(inputs["dataset"] / "validation.jsonl")
    validation = encode_rows(validation_rows, tokenizer, spec, config.max_length)
    if not train or not validation:
        longest = max(example["length"] for example in encode_rows(rows + validation_rows, tokenizer, spec, sys.maxsize))
        raise UserError(
            "train.max_length",
            config.max_length,
            f"leaves {len(train):,} of {len(rows):,} rows of train and {len(validation):,} of {len(validation_rows):,} of validation",
            mend=f"The longest row has {longest} tokens: set train.max_length={min(longest, LONGEST)}",
        )

    most_tokens = tokens_at_a_time(config, device)
    threads = 1 if workers > 1 else hardware.cores()
    torch.set_num_threads(threads)
    model = build_model(config, base_model)
    compiled = config.compile and can_compile()
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

        optimizer: Any  # transformers' types are not looked at

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
        saved = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)
            values = {
                name: float(value)
                for name, value in (logs or {}).items()
                if name in ("loss", "eval_loss", "eval_exact_match", "learning_rate", "grad_norm")
            }
            progress.metrics(values, state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(out_dir / CHECKPOINTS / f"checkpoint-{state.global_step}")
            self.saved = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress.advance(state.global_step, total_steps, f"loss {self.loss:.3f}" if self.loss == self.loss else "")
            if time.monotonic() - self.saved > SAVED_EVERY_S:
                control.should_save = True

    arguments = TrainingArguments(
        **settings,
        output_dir=str(out_dir / CHECKPOINTS),
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
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(validation),
        data_collator=lambda batch: pad(batch, tokenizer.pad_token_id),
        compute_metrics=lambda prediction: {"exact_match": float(np.mean(prediction.predictions))},
        callbacks=[Report()],
    )
    progress.advance(0, total_steps, "starting")
    resumed_from = newest_whole(out_dir / CHECKPOINTS)
    if pool:
        pool.follow(model)
    try:
        outcome = trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    finally:
        workers_peak = pool.close() if pool else 0.0
        pool = None
    # The last step's evaluation, if there was one at that step.
    last: dict[str, Any] = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})
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
    return {
        "examples": len(train),
        "left_out_too_long": len(rows) - len(train),
        "epochs": config.epochs,
        "steps": total_steps,
        "tokens": tokens,
        "tokens_per_s": None if resumed_from else round(tokens / outcome.metrics["train_runtime"], 1),
        "resumed_from_step": int(resumed_from.name.split("-")[1]) if resumed_from else None,
        "trainable_params": trainable,
        "final_loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
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
