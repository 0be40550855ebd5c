"""Asking a person, in the Prefect UI, whether what passed the gate may become the champion."""

from __future__ import annotations

from typing import Any

from prefect.context import FlowRunContext
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


def waiting(verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict while nobody has answered, and for good where nobody can be asked: the flow was not started from a deployment."""
    return gate.hold(verdict, "waits for a person: `cartwright promote` makes it the champion")


def to_be_asked(verdict: dict[str, Any]) -> bool:
    """Whether a person can be asked, and was not yet."""
    context = FlowRunContext.get()
    policy = context.flow_run.empirical_policy if context and context.flow_run else None
    return bool(deployment.id) and _key(verdict) not in ((policy and policy.pause_keys) or set())


def ask(verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict after a person was asked.

    The flow run is suspended until the answer: no worker waits. It then begins anew, finds every stage cached, and comes here again.
    An answer is to one comparison: should another model have become champion meanwhile, the person is asked once more.
    """
    asked = Approval.with_initial_data(description=gate.in_markdown(verdict), promote=False, by="", why="")
    answer = suspend_flow_run(wait_for_input=asked, timeout=ANSWER_WITHIN_S, key=_key(verdict))
    decided = {**verdict, "by": answer.by or "a person in the Prefect UI", "why": answer.why}
    return decided if answer.promote else gate.hold(decided, f"{decided['by']} refused it" + (f": {answer.why}" if answer.why else ""))


def _key(verdict: dict[str, Any]) -> str:
    return f"promote-{verdict['challenger_sha256'][:12]}-{verdict['champion']}".replace(" ", "-").lower()  # all that Prefect allows in it
