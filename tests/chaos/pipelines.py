"""What is run while something goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - what a command would import later
import prefect.exceptions  # noqa: F401

from flows.session import alone, ending
from flows.terminal import goes_on, one_message
from tasks.base_model import base_model
from tasks.config import load_config
from tasks.core.artifacts import Store
from tasks.core.child import FORKS
from tasks.core.display import Display
from tasks.core.runner import Runner
from tasks.core.settings import Settings, load_settings, prepare_environment
from tasks.core.tracking import open_parent
from tasks.domain.errors import UserError
from tasks.evaluate import evaluate
from tasks.finetune import finetune
from tasks.merge import merge
from tasks.quantize_gguf import QuantizeGgufConfig, convert_config, convert_gguf, quantize_gguf
from tasks.synthesize import synthesize
from tests.tiny_stages import AddConfig, BuyConfig, CountConfig, add, buy, count, stepwise

MODEL = "openai/m"
# As little of `smoke` as still has every kind of stage but GPTQ's, which is the slowest and takes the same way.
SMALLEST = (
    "gguf=[Q4_0]", "gptq=[]", "base_few_shot=0", "data.languages=[en,de]", "data.intents=[add_to_cart,view_cart]", "train.checkpoints=6",
    "benchmark.requests=5", "benchmark.batched_requests=5", f"data.teacher={MODEL}", "teacher.requests=8", "teacher.items_per_request=2",
    "teacher.concurrency=2", "teacher.timeout_s=20",
)  # fmt: skip
# A few steps of training the 135M model, with a checkpoint after each.
REAL = {
    "data.languages": ["en"], "data.intents": ["add_to_cart", "view_cart"], "data.train_rows": 32, "data.validation_rows": 12,
    "data.test_rows": 12, "data.hard_rows": 12, "data.patterns_per_intent": 4, "train.batch_size": 8, "train.checkpoints": 4,
    "train.compile": False, "train.workers": 1, "evaluate.max_tokens": 12,
}  # fmt: skip


@dataclass(frozen=True)
class Pipeline:
    """A command, and what is known of it.

    Attributes:
        arguments: of the command; `{teacher}` is the teacher's address.
        imported: the module whose `main` takes the arguments, where commands are forked from a process that has imported it; else
            the arguments are Python's.
        other: further arguments, for another configuration that shares most stages.
        own: the first words of what such a one does not share.
        disk_mb: the disk that a home has.
        steady: kinds of artefacts that may vary and do not here: the teacher of these tests says the same each time.
        prefect: it has a Prefect server of its own.
        limit_s: how long a command may take.
    """

    name: str
    arguments: tuple[str, ...]
    imported: str
    other: tuple[str, ...]
    own: frozenset[str]
    disk_mb: int
    steady: frozenset[str]
    prefect: bool
    limit_s: float


HERE = "tests.chaos.pipelines"
SMALL = Pipeline("small", ("small", "{teacher}"), HERE, ("1",), frozenset({"add"}), 32, frozenset(), prefect=False, limit_s=240)
MODEL_135M = Pipeline("135m", ("135m", "{teacher}"), HERE, ("1",), frozenset({"evaluate"}), 2048, frozenset(), prefect=False, limit_s=900)
SMOKE = Pipeline(
    "smoke",
    (
        *("-m", "flows.cli", "run", "--profile", "smoke"),
        *(part for change in (*SMALLEST, "teacher.api_base={teacher}") for part in ("--set", change)),
    ),
    imported="",
    other=("--set", "benchmark.requests=6"),
    own=frozenset({"benchmark", "decide", "register", "report_plots", "report"}),
    disk_mb=512,
    steady=frozenset({"teach"}),
    prefect=True,
    limit_s=900,
)
PIPELINES = {pipeline.name: pipeline for pipeline in (SMALL, MODEL_135M, SMOKE)}


@contextmanager
def stages_of(name: str, settings: Settings, offset: int) -> Iterator[Callable[..., Any]]:
    """What calls stages in a run of a pipeline without Prefect, whose server takes longer than all the rest."""
    store = Store(settings.store_uri, settings.home)
    store.check_writable()
    with alone(settings, f"run-{name}-{offset}", UserError("run", name, "is running already")):
        tracker = open_parent(settings, "chaos", f"{name}-{offset}", name, {"cartwright.opened_by": str(settings.home)})
        run = Runner(name, settings, store, tracker, Display())
        with ending(tracker):
            yield lambda stage, config, **inputs: run._run(stage, config, stage.name, inputs)[0]


def run_small(settings: Settings, teacher: str, offset: int) -> None:
    """A pipeline with everything but Prefect and models: lock, store, child processes, checkpoints, MLflow, a teacher."""
    with stages_of("small", settings, offset) as call:
        numbers = call(count, CountConfig(numbers=4, seconds=0.05))
        call(stepwise, CountConfig(numbers=6, seconds=0.05), numbers=numbers)
        call(buy, BuyConfig(address=teacher))
        call(add, AddConfig(offset=offset), numbers=numbers)


def run_135m(settings: Settings, teacher: str, offset: int) -> None:
    """The stages that make a GGUF file of the 135M model, and ask it. Nobody asks the teacher."""
    config = load_config("quick", REAL)
    try:
        with stages_of("135m", settings, offset) as call:
            dataset = call(synthesize, config.data)
            base = call(base_model, config.base_model)
            adapter = call(finetune, config.train, base_model=base, dataset=dataset)
            tuned = call(merge, config.merge, base_model=base, adapter=adapter, dataset=dataset)
            converted = call(convert_gguf, convert_config(), model=tuned)
            model = call(quantize_gguf, QuantizeGgufConfig(format="Q4_0"), gguf=converted)
            asked = config.evaluate.model_copy(update={"runtime": "llama_cpp", "max_tokens": config.evaluate.max_tokens + offset})
            call(evaluate, asked, model=model, dataset=dataset)
    finally:
        FORKS.close()


def main(name: str, teacher: str, offset: str = "0") -> None:
    """The command of a pipeline without Prefect."""
    settings = load_settings()
    prepare_environment(settings)
    with one_message(settings), goes_on():
        {"small": run_small, "135m": run_135m}[name](settings, teacher, int(offset))
