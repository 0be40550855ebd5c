"""Asking a person, in the Prefect UI, whether what passed the gate may become the champion."""

from __future__ import annotations

from typing import Any

from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment

from tasks import gate

ANSWER_WITHIN_S = 7 * 24 * 3600


class Approval(RunInput):
    """What a person answers."""

    promote: bool
    by: str
    why: str = ""


def ask(verdict: dict[str, Any], run_id: str) -> dict[str, Any]:
    """The verdict after a person was asked.

    The flow run is suspended until the answer: no worker waits. It then begins anew, finds every stage cached, and comes here again.
    Where no one can be asked, since the flow was not started from a deployment, the model is held.
    """
    if not deployment.id:
        return gate.hold(verdict, "waits for a person: `cartwright promote` makes it the champion")
    asked = Approval.with_initial_data(description=gate.in_markdown(verdict), promote=False, by="", why="")
    answer = suspend_flow_run(wait_for_input=asked, timeout=ANSWER_WITHIN_S, key=f"promote-{run_id}")
    decided = {**verdict, "by": answer.by or "a person in the Prefect UI", "why": answer.why}
    return decided if answer.promote else gate.hold(decided, f"{decided['by']} refused it" + (f": {answer.why}" if answer.why else ""))
