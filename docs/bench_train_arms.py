"""One arm of bench_train.py in a process of its own: `python docs/bench_train_arms.py REQUEST` prints one line of JSON.

What both trainers are given comes from the functions that the pipeline's own stage uses: rows, base model, adapter, optimizer,
settings. What is left to each is how it makes batches and computes them.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.qlora import FinetuneConfig

PROFILED_STEPS = 3
# Operators by the first part of their name, for a profile. What is in no group is called other.
OPERATORS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_int_mm", "mkldnn::"),
    "dequantization": ("bitsandbytes::",),
    "attention": ("aten::_scaled_dot_product",),
    "compiled loops": ("cpp_fused", "Torch-Compiled Region", "## Call CompiledFxGraph", "CompiledFunction"),
}


class Counted:
    """A collator that notes of each batch how many tokens it holds, and how many are computed with padding.

    With `step` the padding is left out again, and only the number of tokens rounded up to a multiple of it: what the layers compute, less
    the rounding of each process's share.
    """

    def __init__(self, collate: Callable[..., Any], step: int | None = None) -> None:
        self.collate = collate
        self.step = step
        self.batches: list[tuple[int, int]] = []

    def __call__(self, *arguments: Any) -> Any:
        batch = self.collate(*arguments)
        padded = math.prod(batch["input_ids"].shape)
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else padded
        self.batches.append((tokens, tokens + -tokens % self.step if self.step else padded))
        return batch


def cpu_s() -> float:
    """CPU seconds of this process and its children until now."""
    import psutil

    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


class Clock:
    """When each step ended, and the CPU seconds taken until then, of child processes too; the first entry is of the beginning.

    With `profiled_after`, the steps after so many are profiled.
    """

    def __init__(self, profiled_after: int | None) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.first = profiled_after
        self.profiler = None if profiled_after is None else profile(activities=[ProfilerActivity.CPU])

    def step(self, *_: Any) -> None:
        done = len(self.ends)
        if self.profiler and self.first is not None and done == self.first + PROFILED_STEPS:
            self.profiler.stop()
        self.ends.append(time.perf_counter())
        self.cpu.append(cpu_s())
        if self.profiler and done == self.first:
            self.profiler.start()

    def phase(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function; where steps are profiled, one whose time the profile shows under that name."""
        if not self.profiler:
            return function
        from torch.profiler import record_function

        def named(*arguments: Any, **more: Any) -> Any:
            with record_function(f"phase {name}"):
                return function(*arguments, **more)

        return named

    def shares(self) -> dict[str, float] | None:
        """Parts of the profiled steps' time: phases, which exclude each other, and kinds of operators, which lie within them."""
        if not self.profiler or self.first is None:
            return None
        total_us = 1e6 * (self.ends[self.first + PROFILED_STEPS] - self.ends[self.first])
        found: dict[str, float] = {}
        for event in self.profiler.key_averages():
            if event.key.startswith("phase "):
                name, spent = event.key.removeprefix("phase "), event.cpu_time_total
            elif event.key.startswith("Optimizer.step"):
                name, spent = "optimizer", event.cpu_time_total
            else:
                kind = next((kind for kind, starts in OPERATORS.items() if event.key.startswith(starts)), "other")
                name, spent = f"operators: {kind}", event.self_cpu_time_total
            found[name] = found.get(name, 0.0) + spent / total_us
        return found


def ours(config: FinetuneConfig, inputs: dict[str, Path], out_dir: Path, clock: Clock) -> dict[str, Any]:
    """The pipeline's stage as it stands; counted where it makes batches, timed where it says how far it is."""
    from tasks import finetune, gradient_workers
    from tasks.completions import TOKENS_STEP
    from tasks.core import hardware, progress

    counted = Counted(clock.phase(finetune.pad, "collation"), TOKENS_STEP)
    finetune.pad = counted
    finetune.completion_loss = clock.phase(finetune.completion_loss, "forward")
    gradient_workers.GradientWorkers.finish = clock.phase(gradient_workers.GradientWorkers.finish, "waiting for the other processes")  # type: ignore[method-assign]
    progress.listen(lambda event: clock.step() if "done" in event else None)
    metrics = finetune.finetune.function(config, inputs, out_dir)
    peak = hardware.peak_rss_mb() + metrics["workers_peak_rss_mb"]
    return {"batches": counted.batches[: metrics["steps"]], "trainable": metrics["trainable_params"], "peak_rss_mb": peak}


def trl_settings(arm: str, config: FinetuneConfig, rows: int, mean_length: float, device: str) -> dict[str, Any]:
    """Arguments of `SFTConfig`: those our trainer has, and beside them what an arm chooses. Nothing is saved or evaluated on the way.

    `trl-defaults` chooses nothing. `trl` brings rows of like length together and does not compute twice to save memory, and so does
    `trl-packed`, in which a packed row is as long as a batch of ours has tokens and stands alone in its batch: SFTTrainer packs without
    padding into one long row.
    """
    from tasks.qlora import training_settings

    settings = {
        **training_settings(config, rows, device),
        "max_length": config.max_length,
        "completion_only_loss": True,
        "dataloader_pin_memory": device != "cpu",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if arm == "trl-packed":
        # A little longer: what packing cannot fill would make one row more than there are steps.
        packed = {"packing": True, "per_device_train_batch_size": 1, "max_length": math.ceil(1.02 * mean_length * config.batch_size)}
        settings |= {**packed, "gradient_checkpointing": False}
    elif arm == "trl":
        settings |= {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": False}
    return settings


def trl(arm: str, config: FinetuneConfig, inputs: dict[str, Path], out_dir: Path, clock: Clock) -> dict[str, Any]:
    """TRL's `SFTTrainer` on the same token ids, with the same base model, adapter and optimizer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from tasks.completions import IGNORED
    from tasks.core import hardware
    from tasks.qlora import add_adapter, load_base, make_optimizer

    torch.set_num_threads(hardware.cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, rows = encoded(config, inputs, "train")
    mean_length = sum(row["length"] for row in rows) / len(rows)
    set_seed(config.seed)
    model = add_adapter(config, load_base(config, inputs["base_model"], "sdpa"))
    examples = [{"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]} for row in rows]

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step()

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(out_dir / "trainer"), **trl_settings(arm, config, len(rows), mean_length, device)),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        optimizers=(make_optimizer(config, model), None),
        callbacks=[Steps()],
    )
    for parameter in model.parameters():  # SFTTrainer made them bfloat16; ours are float32, and a CPU without bfloat16 would only lose
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    counted = Counted(clock.phase(trainer.data_collator, "collation"))
    trainer.data_collator = counted
    trainer.compute_loss = clock.phase(trainer.compute_loss, "forward")
    clock.step()
    trainer.train()
    model.save_pretrained(out_dir)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"batches": counted.batches[: trainer.state.global_step], "trainable": trainable, "peak_rss_mb": hardware.peak_rss_mb()}


def encoded(config: FinetuneConfig, inputs: dict[str, Path], split: str) -> tuple[Any, list[dict[str, Any]]]:
    """The tokenizer, and the rows of a split as token ids with labels."""
    from transformers import AutoTokenizer

    from tasks.completions import encode_rows
    from tasks.domain.spec import load_spec
    from tasks.synthesize import read_rows
    from tasks.tokenization import set_template

    tokenizer = AutoTokenizer.from_pretrained(inputs["base_model"])
    spec = load_spec(str(inputs["dataset"]))
    set_template(tokenizer, spec)
    return tokenizer, encode_rows(read_rows(inputs["dataset"] / f"{split}.jsonl"), tokenizer, spec, config.max_length)


def judge(config: FinetuneConfig, inputs: dict[str, Path], adapters: dict[str, str]) -> dict[str, float]:
    """Mean negative log-likelihood of a completion token of `validation`, in nats, of each adapter by name and of the base without one."""
    import torch
    from peft import PeftModel

    from tasks.completions import IGNORED, completion_loss, pad
    from tasks.core import hardware
    from tasks.frozen import unpack_nf4
    from tasks.qlora import load_base, resolve_precision

    torch.set_num_threads(hardware.cores())
    tokenizer, rows = encoded(config, inputs, "validation")
    rows.sort(key=lambda row: row["length"])
    base = load_base(config, inputs["base_model"])
    unpack_nf4(base, int8=False)
    model = base
    for name, folder in adapters.items():
        if model is base:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    model.eval()
    device = next(base.parameters()).device

    def mean_loss() -> float:
        total, labels = 0.0, 0
        for start in range(0, len(rows), 32):
            batch = {name: tensor.to(device) for name, tensor in pad(rows[start : start + 32], tokenizer.pad_token_id).items()}
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolve_precision(config) != "fp32"):
                total += float(completion_loss(model, batch, items=1))
            labels += int((batch["labels"][:, 1:] != IGNORED).sum())
        return total / labels

    with model.disable_adapter():
        losses = {"untrained": mean_loss()}
    for name in adapters:
        model.set_adapter(name)
        losses[name] = mean_loss()
    return losses


def main() -> None:
    """`bench_train_arms.py REQUEST`: `{"arm", "config", "inputs", "out_dir", "profiled_after"}`, or `{"arm": "judge", ..., "adapters"}`."""
    request = json.loads(sys.argv[1])
    config = FinetuneConfig.model_validate(request["config"])
    inputs = {name: Path(path) for name, path in request["inputs"].items()}
    if request["arm"] == "judge":
        print(json.dumps(judge(config, inputs, request["adapters"])))
        return
    import torch

    out_dir, clock = Path(request["out_dir"]), Clock(request["profiled_after"])
    torch.Tensor.backward = clock.phase(torch.Tensor.backward, "backward")  # type: ignore[method-assign]
    arm = request["arm"]
    outcome = ours(config, inputs, out_dir, clock) if arm == "ours" else trl(arm, config, inputs, out_dir, clock)
    print(json.dumps({**outcome, "ends": clock.ends, "cpu": clock.cpu, "shares": clock.shares()}))


if __name__ == "__main__":
    main()
