"""The commands of `cartwright` for a team: standing servers and workers, deployments, the registered model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows.terminal import fail, goes_on
from tasks.core import settings as environment
from tasks.domain.errors import UserError

app = typer.Typer()


PrefectPort = Annotated[int, typer.Option(min=1024, max=65535, help="Port of the Prefect server.")]
MlflowPort = Annotated[int, typer.Option(min=1024, max=65535, help="Port of the MLflow server.")]


@app.command()
def up(
    prefect_port: PrefectPort = 4200,
    mlflow_port: MlflowPort = 5000,
    gpu: Annotated[bool, typer.Option("--gpu", help="Start a worker for the gpu-pool even where no GPU is seen.")] = False,
) -> None:
    """Start a Prefect server, an MLflow server and workers on this machine, and deploy `retrain` to them. Twice is harmless."""
    from flows.team import Team

    settings = environment.load_settings()
    environment.check_home(settings)
    team = Team(settings, prefect_port, mlflow_port)
    print("Starting the Prefect server, the MLflow server and the workers: about a minute")
    automated = team.up(gpu)
    for service in team.services():
        print(f"  {service.name:<20} process {service.pid}, log {service.log}")
    print(f"Prefect: {team.prefect}/deployments  (choose retrain/cpu, press Run, Custom run, and fill in the form)")
    print(f"MLflow:  {team.mlflow}  (every retraining is a run; its variants are its children)")
    print(automated)
    print("`cartwright down` ends what was started here.")


@app.command()
def down() -> None:
    """End what `up` started, and nothing else. What was made stays."""
    from flows.team import Team

    settings = environment.load_settings()
    environment.check_home(settings)
    ended = Team(settings, 0, 0).down()
    print(f"Ended: {', '.join(ended)}." if ended else "Nothing that `up` started is running.")


@app.command()
def deploy(
    kind: Annotated[
        Literal["process", "docker", "kubernetes"],
        typer.Option("--pools", help="How workers start runs: as processes of their host, or as containers."),
    ] = "process",
) -> None:
    """Tell the Prefect server of PREFECT_API_URL about pools, deployments and schedules. `up` does it for its own server. Twice is harmless."""
    from flows.automations import install
    from flows.deploying import SOURCE, Server

    api = prefect_api()
    variables = {**environment.child_environment(), "CARTWRIGHT_SOURCE": environment.source_on_workers(SOURCE)}
    Server(api, variables).deploy(kind)
    print(install(api))
    start = "cartwright worker cpu-pool" if kind == "process" else f"prefect worker start --pool cpu-pool --type {kind} --limit 1"
    print(f"Deployed to {api}. Workers: {start}, and so for orchestrator and gpu-pool.")
    if kind != "process" and (needed := environment.given_credentials()):  # everyone reads a pool's variables in the UI
        print(f"Containers get no password from here. Give them {', '.join(needed)} by their image or as a secret of their host.")


@app.command()
def worker(
    pool: Annotated[str, typer.Argument(help="cpu-pool, gpu-pool or orchestrator.")],
    name: Annotated[str | None, typer.Option(help="How the worker is called in the UI; by default after the pool and this host.")] = None,
) -> None:
    """Run what is sent to a pool of the Prefect server of PREFECT_API_URL, as processes of this host and with its CARTWRIGHT_HOME, until Ctrl-C."""
    from flows.deploying import Server, worker_command

    api = prefect_api()
    known = [found["name"] for found in Server(api, {}).ask("work_pools/filter", {})]
    if pool not in known:
        raise UserError("pool", pool, "is not on the Prefect server", allowed=known, mend="`cartwright deploy` makes the pools")
    program, *arguments = worker_command(pool, name)
    os.execve(Path(sys.executable).parent / program, [program, *arguments], environment.team_environment())


def prefect_api() -> str:
    """The address of the server that a command is for.

    Raises:
        UserError: none is set.
    """
    api = environment.load_settings().prefect_api_url
    if not api:
        mend = "Set the address of a Prefect server, such as http://127.0.0.1:4200/api"
        raise UserError("PREFECT_API_URL", None, "is not set", mend=mend)
    return api


@app.command()
def serve(
    name: Annotated[str, typer.Option(help="The registered model, `registry.name` of the configuration.")] = "shop-intent",
    host: Annotated[str, typer.Option(help="Where to listen. Any but a loopback address needs CARTWRIGHT_SERVE_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8080,
    gguf: Annotated[Path | None, typer.Option(help="Serve this file instead of the champion, without a registry.")] = None,
    constrained: Annotated[bool, typer.Option(help="Keep every answer to the grammar of the domain.")] = True,
    threads: Annotated[int, typer.Option(help="Threads of llama.cpp; 0: one for each core.")] = 0,
    parallel: Annotated[int, typer.Option(help="Texts answered at a time.")] = 16,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait for their turn; more are refused with 503.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    max_chars: Annotated[int, typer.Option(help="Longest text, in characters; else 422.")] = 1000,
    max_texts: Annotated[int, typer.Option(help="Most texts of one request; else 422.")] = 64,
    max_body: Annotated[int, typer.Option(help="Largest body, in bytes; else 413.")] = 262_144,
    max_connections: Annotated[int, typer.Option(help="Open connections; more are refused with 503.")] = 512,
    rate: Annotated[float, typer.Option(help="Requests a second of one address; else 429. 0: no limit.")] = 100.0,
    timeout_s: Annotated[float, typer.Option(help="Longest time for a request, seconds; else 504.")] = 10.0,
    reload_s: Annotated[float, typer.Option(help="How often the alias `champion` is looked up, seconds.")] = 10.0,
    end_s: Annotated[float, typer.Option(help="How long running requests may take to end after SIGTERM, seconds.")] = 30.0,
) -> None:
    """Answer over HTTP with the registered champion: POST /intent, OpenAI's /v1/chat/completions, /health, /ready, /metrics.

    When the alias moves, the new champion takes over without a request being dropped.
    """
    given = dict(locals())
    from tasks.serving.config import serve_config

    config = serve_config(**given)
    environment.give_up_soon()
    from tasks.serving.server import serve as serve_champion

    serve_champion(environment.load_settings(), config)


@app.command()
def drift(
    texts: Annotated[
        str,
        typer.Option(help="JSONL with a `text` on each line: a path or any fsspec URI; `*` stands for any part of a name."),
    ] = "",
    name: Annotated[str, typer.Option(help="The registered model, `registry.name` of the configuration.")] = "shop-intent",
    change: Annotated[
        list[str],
        typer.Option("--set", metavar="FIELD=VALUE", help="Change one option, such as allowed.language=0.3, max_asked=50 or samples=5."),
    ] = [],  # noqa: B006 - typer copies it
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="End with 3 where drift is found, and with 4 where too few texts are.")
    ] = False,
) -> None:
    """Compare recent customer texts with what the champion was trained on: languages, length, unknown words, its answers.

    Finds and tells; promotes nothing. Without --texts those of CARTWRIGHT_TEXTS, by default texts/*.jsonl in the home.
    """
    from flows.prefect_server import prefect_api
    from tasks.champion import champion_with_dataset
    from tasks.drift import FOUND, INCONCLUSIVE, DriftOptions, read_result
    from tasks.drift_report import HEADLINES
    from tasks.overrides import parse_overrides, with_overrides
    from tasks.recent_texts import read_texts

    options = with_overrides(DriftOptions, {}, parse_overrides(change))
    settings = environment.load_settings()
    environment.check_home(settings)
    read_texts(texts or settings.texts_uri, most=0)  # before anything starts
    champion = champion_with_dataset(settings, name)
    print(f"Cartwright: drift against the champion of {name}, version {champion.tags['version']}, home {settings.home}")
    with prefect_api(settings), goes_on():
        from flows.drift import drift as check

        folder = check(texts=texts, model=name, options=options)
    found = read_result(folder)
    counts = found["texts"]
    print(f"\n{HEADLINES[found['verdict']]}")
    for reason in found["reasons"]:
        print(f"  {reason}")
    print(
        f"{counts['usable']} usable texts, {counts['compared']} compared, {counts['asked']} answered by the champion, {counts['bad']} bad lines"
    )
    for problem, times in found["problems"].items():
        print(f"  {times} {problem}")
    print(f"Report: {folder / 'drift.html'}")
    if exit_code:
        raise SystemExit({FOUND: 3, INCONCLUSIVE: 4}.get(found["verdict"], 0))


@contextmanager
def _one_at_a_time(settings: environment.Settings) -> Iterator[None]:
    """One promotion or rollback goes on at a time on all hosts, where a Prefect server knows the limit."""
    if not settings.prefect_api_url:
        yield
        return
    from prefect.concurrency.sync import concurrency

    from tasks.gate import PROMOTION

    with concurrency(PROMOTION):
        yield


def _tell(settings: environment.Settings, what: str, name: str, facts: dict[str, Any]) -> None:
    """An event on the Prefect server, where there is a standing one."""
    if settings.prefect_api_url:
        from prefect.events.worker import EventsWorker

        from flows.session import tell

        tell(what, name, facts)
        EventsWorker.drain_all(timeout=5)


@app.command()
def promote(
    version: Annotated[str | None, typer.Argument(help="Version of the registered model. Default: the newest.")] = None,
    name: Annotated[str, typer.Option(help="The registered model, `registry.name` of the configuration.")] = "shop-intent",
    why: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Make a version of the registered model the champion by hand, whatever the gate said of it, if it answers from the registry."""
    from getpass import getuser

    from tasks.core.registry import Registry
    from tasks.register import promote_by_hand

    settings = environment.load_settings()
    environment.check_home(settings)
    registry = Registry(settings)
    chosen = registry.version(name, version)
    print(
        f"The gate said of version {chosen['version']} ({chosen.get('cartwright.variant', 'unknown variant')}): {chosen.get('cartwright.verdict', 'nothing')}."
    )
    with _one_at_a_time(settings):
        verdict = promote_by_hand(registry, name, chosen, by=getuser(), why=why)
    if verdict["verdict"] != "promote":
        fail(f"{name} version {chosen['version']} was not promoted: {verdict['checks'][-1]['name']}. All is as it was.")
    _tell(settings, "gate.promote", name, {**verdict, "version": chosen["version"]})
    before = f"; {verdict['champion']} is kept as `previous`" if verdict["champion"] else ""
    print(f"{name}: version {chosen['version']} is the champion{before}.")


@app.command()
def rollback(
    name: Annotated[str, typer.Option(help="The registered model, `registry.name` of the configuration.")] = "shop-intent",
    why: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Make the champion before this one the champion again. Twice is as it was."""
    from getpass import getuser

    from tasks.core.registry import Registry

    settings = environment.load_settings()
    environment.check_home(settings)
    with _one_at_a_time(settings):
        now, before = Registry(settings).rollback(name, by=getuser(), why=why)
    was = {version["version"]: version.get("cartwright.variant", "unknown variant") for version in (now, before)}
    _tell(settings, "gate.rollback", name, {"champion": now["version"], "previous": before["version"], "by": getuser(), "why": why})
    print(
        f"{name}: version {now['version']} ({was[now['version']]}) is the champion again; version {before['version']} ({was[before['version']]}) is kept as `previous`."
    )
