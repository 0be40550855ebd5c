"""The stage flows as deployments: what a worker of a pool runs when a retraining with `execution=pools` sends it there.

A person has no reason to run one by itself: its parameters name a note that the retraining left in the store.
"""

from __future__ import annotations

from typing import Any

from prefect import Flow, State, flow
from prefect.runtime import deployment
from prefect.states import Completed

from flows import releasing, stages
from flows.errands import StageFlow, read_errand
from flows.session import join_run, run_log
from tasks.core.artifacts import Store
from tasks.core.child import FORKS
from tasks.core.display import Display
from tasks.core.settings import load_settings


def _on_worker(stage_flow: StageFlow, torch: bool = True) -> Flow[..., Any]:
    @flow(name=stage_flow.name, description=f"{stage_flow.description}\n\nStarted by a retraining with execution=pools.")
    def on_worker(errand: str, sha256: str, store: str) -> State[None]:
        """A stage flow on a worker. The message of its state is the SHA-256 of the note with the result.

        Args:
            errand: Name of the note in the store that holds the arguments; the result is left beside it.
            sha256: That of the note. One that was changed on the way is refused.
            store: The store of the retraining, to say so where a worker has another.
        """
        if torch:
            FORKS.warm()  # it takes as long as what is done until the first stage begins
        settings = load_settings()
        here = Store(settings.store_uri, settings.home)
        asked, run, given = read_errand(here, errand, sha256, stage_flow, store)
        with join_run(run, settings, Display(run_log()), deployment.name or "") as joined:
            result = stage_flow.fn(run, *given)
            return Completed(message=asked.answer(here, stage_flow, result, joined.stages))

    return on_worker


data = _on_worker(stages.make_data, torch=False)
train = _on_worker(stages.train)
quantize_gptq = _on_worker(stages.make_gptq)
quantize_gguf = _on_worker(stages.make_gguf)
measure = _on_worker(stages.measure)
check = _on_worker(stages.check)
ask_apis = _on_worker(stages.ask_apis, torch=False)
compare = _on_worker(releasing.compare)
