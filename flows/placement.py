"""Where stage flows run: in this process, or on the workers of pools, as deployments."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol, cast
from uuid import UUID

import httpx
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, State, StateType, Worker, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from flows import errands
from flows.errands import Errand, StageFlow
from flows.session import Run, runner
from tasks.core import ledger
from tasks.core.child import StageError
from tasks.domain.errors import UserError
from tasks.variants import Variant

Machine = Literal["cpu", "gpu"]
ACCELERATED = ("train", "quantize-gptq")  # stage flows that a GPU makes faster
POLL_S = 0.5
UNREACHABLE_S = 600  # how long a Prefect server may be away while a worker goes on
CANCELLED_WITHIN_S = 25  # Prefect kills a flow 30 s after it asked it to end


class Place(Protocol):
    """Runs stage flows of one pipeline run."""

    def __call__(self, stage_flow: StageFlow, *given: Any, machine: Machine | None = None) -> Any:
        """Run a stage flow with its arguments after `run`; on `machine`, or where such a flow belongs."""
        ...

    def machines(self, variants: Sequence[Variant]) -> list[tuple[Machine, list[Variant]]]:
        """Variants by the machine they are measured on."""
        ...


class Here:
    """Every stage flow in this process."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, stage_flow: StageFlow, *given: Any, machine: Machine | None = None) -> Any:
        """See `Place`."""
        return stage_flow(self._run, *given)

    def machines(self, variants: Sequence[Variant]) -> list[tuple[Machine, list[Variant]]]:
        """See `Place`."""
        return [("cpu", list(variants))]


class Pools:
    """Every stage flow as a run of the deployment `<flow>/<machine>`, on a worker of `<machine>-pool`.

    A flow that was killed and is started again finds the runs it had started: those that go on are waited for, those that are
    finished are not started again.

    Args:
        accelerator: where flows run that a GPU makes faster.

    Raises:
        UserError: a deployment is missing, or a pool has no worker.
    """

    def __init__(self, run: Run, accelerator: Machine) -> None:
        self._run = run
        self._accelerator: Machine = accelerator
        self._runner = runner(run)
        _not_on_a_pool_it_waits_for(accelerator)
        for machine in dict.fromkeys(("cpu", accelerator)):
            self._check(machine)

    def machines(self, variants: Sequence[Variant]) -> list[tuple[Machine, list[Variant]]]:
        """See `Place`. llama.cpp is built for the CPU; what transformers runs belongs on the accelerator."""
        if self._accelerator == "cpu":
            return [("cpu", list(variants))]
        on_cpu = [variant for variant in variants if variant.format == "gguf"]
        return [(self._accelerator, [v for v in variants if v not in on_cpu]), ("cpu", on_cpu)]

    def __call__(self, stage_flow: StageFlow, *given: Any, machine: Machine | None = None) -> Any:
        """See `Place`.

        Raises:
            StageError: the run failed; the message has its reason.
        """
        where = machine or (self._accelerator if stage_flow.name in ACCELERATED else "cpu")
        errand = errands.errand_for(self._run, stage_flow, given)
        sha256 = errand.send(self._runner.store, self._run)
        with ledger.charge("processes"):
            result, stages = self._result(stage_flow, where, errand, sha256)
            ledger.waited_for({"stages": sum(stage.get("worked_s", 0.0) for stage in stages)})
        self._runner.stages.extend(stages)
        return result

    def _result(self, stage_flow: StageFlow, where: Machine, errand: Errand, sha256: str) -> tuple[Any, list[dict[str, Any]]]:
        """What came of an errand, once a run of it is completed, and how its stages went."""
        child: FlowRun | None = None
        try:
            for child in self._attempts(f"{stage_flow.name}/{where}", errand, sha256):
                known = child.state is not None and child.state.is_final()  # of an earlier life of this run
                self._runner.display.say(f"{stage_flow.name} on {where}-pool: flow run {child.name} ({child.id})")
                state = self._wait(child)
                if state.is_completed():
                    with suppress(FileNotFoundError):  # who cleans up the store may have taken the note of an old one
                        return errand.result(self._runner.store, stage_flow, state.message or "")
                if not known:
                    raise StageError(f"{stage_flow.name} on {where}-pool {_ended(state)}: {_reason(state)}")
        except StageError:
            raise
        except BaseException:  # cancelled, or stopped: nothing may go on that nobody waits for
            if child:
                _cancel(child)
            raise
        raise AssertionError("there is always another attempt")

    def _attempts(self, deployment: str, errand: Errand, sha256: str) -> Iterator[FlowRun]:
        """The flow runs of an errand, one after the other: those that were started in an earlier life of this run, then new ones."""
        parameters = {"errand": errand.name, "sha256": sha256, "store": self._runner.store.uri}
        for attempt in itertools.count(1):
            key = f"{errand.name}-{deployment.partition('/')[2]}-{attempt}"
            name = f"{self._run.run_id}-{deployment.partition('/')[0]}" + (f"-{attempt}" if attempt > 1 else "")
            made = run_deployment(deployment, parameters=parameters, timeout=0, idempotency_key=key, flow_run_name=name)
            yield cast(FlowRun, made)  # a coroutine only where it is called from one

    def _wait(self, child: FlowRun) -> State[Any]:
        late, answered = False, time.monotonic()
        with get_client(sync_client=True) as client:
            while True:
                try:
                    state = client.read_flow_run(child.id).state
                    answered = time.monotonic()
                except httpx.HTTPError:
                    if time.monotonic() - answered > UNREACHABLE_S:
                        raise
                    state = None
                if state and state.is_final():
                    return state
                if state and state.name == "Late" and not late:
                    late = True
                    self._runner.display.say(f"  ...  {child.name} waits for a worker")
                time.sleep(POLL_S)

    def _check(self, machine: Machine) -> None:
        """Whether every stage flow of a machine is deployed, and a worker is there to run them."""
        mend = "`make up` deploys it and starts a worker" + (" (with ARGS=--gpu where no GPU is seen)" if machine == "gpu" else "")
        wanted = sorted(stage_flows_on(machine))
        with get_client(sync_client=True) as client:
            some = client.read_deployments(
                flow_filter=FlowFilter(name=FlowFilterName(any_=wanted)),
                deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[machine])),
            )
            for name in wanted if len(some) < len(wanted) else ():
                try:
                    client.read_deployment_by_name(f"{name}/{machine}")
                except ObjectNotFound:
                    raise UserError("execution", "pools", f"the deployment {name}/{machine} is missing", mend=mend) from None
            pool = f"{machine}-pool"
            if not any(worker.status == WorkerStatus.ONLINE for worker in _workers(client, pool)):
                raise UserError("execution", "pools", f"{pool} has no worker", mend=mend)


def _workers(client: SyncPrefectClient, pool: str) -> list[Worker]:
    try:
        return client.read_workers_for_work_pool(pool)
    except ObjectNotFound:
        return []


def stage_flows_on(machine: Machine) -> set[str]:
    """The stage flows that a retraining may send to a machine."""
    from flows import pools  # a run in one process has no use for them

    on_gpu = {*ACCELERATED, "measure", "check"}
    return on_gpu if machine == "gpu" else {flow.name for flow in vars(pools).values() if isinstance(flow, Flow)}


def _ended(state: State[Any]) -> str:
    return {StateType.CANCELLED: "was cancelled", StateType.CRASHED: "crashed"}.get(state.type, "failed")


def _reason(state: State[Any]) -> str:
    return (state.message or "no reason was given").removeprefix("Flow run encountered an exception: ")


def _not_on_a_pool_it_waits_for(accelerator: Machine) -> None:
    """A worker that waits for stages must not be the one that would run them."""
    from prefect.runtime import flow_run

    if not flow_run.id:
        return
    with get_client(sync_client=True) as client:
        pool = client.read_flow_run(UUID(flow_run.id)).work_pool_name
    if pool in ("cpu-pool", f"{accelerator}-pool"):
        mend = "Use the deployment retrain/pools, which waits in a pool of its own"
        raise UserError("execution", "pools", f"this flow runs on {pool} and would wait for itself", allowed=["local"], mend=mend)


def _cancel(child: FlowRun) -> None:
    """Ask the worker to end a flow run, and wait until it has. What ends this flow is not replaced by a server that does not answer."""
    deadline = time.monotonic() + CANCELLED_WITHIN_S
    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        client.set_flow_run_state(child.id, Cancelling())
        while time.monotonic() < deadline:
            state = client.read_flow_run(child.id).state
            if state and state.is_final():
                return
            time.sleep(POLL_S)
