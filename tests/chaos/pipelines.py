"""What is run while something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - what a command would import later
import prefect.exceptions  # noqa: F401

from flows.session import alone, ending
from flows.terminal import goes_on, one_message
from tasks.core.artifacts import Store
from tasks.core.display import Display
from tasks.core.runner import Runner
from tasks.core.settings import Settings, load_settings, prepare_environment
from tasks.core.tracking import open_parent
from tasks.domain.errors import UserError
from tests.tiny_stages import AddConfig, BuyConfig, CountConfig, add, buy, count, stepwise

MODEL = "openai/m"
# As little of `smoke` as still has every kind of stage but GPTQ's, which is the slowest and takes the same way.
SMALLEST = (
    "gguf=[Q4_0]", "gptq=[]", "base_few_shot=0", "data.languages=[en,de]", "data.intents=[add_to_cart,view_cart]", "train.checkpoints=6",
    "benchmark.requests=5", "benchmark.batched_requests=5", f"data.teacher={MODEL}", "teacher.requests=8", "teacher.items_per_request=2",
    "teacher.concurrency=2", "teacher.timeout_s=20",
)  # fmt: skip


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


SMALL = Pipeline("small", ("{teacher}",), "tests.chaos.pipelines", ("1",), frozenset({"add"}), 32, frozenset(), prefect=False, limit_s=240)
SMOKE = Pipeline(
    "smoke",
    (
        *("-m", "flows.cli", "run", "--profile", "smoke"),
        *(part for change in (*SMALLEST, "teacher.api_base={teacher}") for part in ("--set", change)),
    ),
    imported="",
    other=("--set", "benchmark.requests=6"),
    own=frozenset({"benchmark", "decide", "register", "report"}),
    disk_mb=512,
    steady=frozenset({"teach"}),
    prefect=True,
    limit_s=900,
)
PIPELINES = {pipeline.name: pipeline for pipeline in (SMALL, SMOKE)}


def run_small(settings: Settings, teacher: str, offset: int) -> None:
    """A pipeline with everything but Prefect and models: lock, store, child processes, checkpoints, MLflow, a teacher."""
    store = Store(settings.store_uri, settings.home)
    store.check_writable()
    with alone(settings, f"run-small-{offset}", UserError("run", "small", "is running already")):
        tracker = open_parent(settings, "chaos", f"small-{offset}", "small", {"cartwright.opened_by": str(settings.home)})
        run = Runner("small", settings, store, tracker, Display())

        def call(stage, config, **inputs):  # type: ignore[no-untyped-def]
            return run._run(stage, config, stage.name, inputs)[0]  # without Prefect, whose server takes longer than all the rest

        with ending(tracker):
            numbers = call(count, CountConfig(numbers=4, seconds=0.05))
            call(stepwise, CountConfig(numbers=6, seconds=0.05), numbers=numbers)
            call(buy, BuyConfig(address=teacher))
            call(add, AddConfig(offset=offset), numbers=numbers)


def main(teacher: str, offset: str = "0") -> None:
    """The command of `SMALL`."""
    settings = load_settings()
    prepare_environment(settings)
    with one_message(settings), goes_on():
        run_small(settings, teacher, int(offset))
