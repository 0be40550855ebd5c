"""The console command `cartwright`."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from flows import team_commands
from flows.terminal import fail, goes_on, one_message
from tasks.core import settings as environment
from tasks.domain.errors import UserError, printable

app = typer.Typer(
    help="Make small language models for shops: data, QLoRA, GPTQ and GGUF, measured, chosen, registered.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(team_commands.app)

WRONG_SHOWN = 10
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="`champion`, `recommended`, a variant of the latest run such as gguf-Q8_0, a .gguf file, a Hugging Face folder, or a LiteLLM model id such as openai/gpt-4.1.",
    ),
]


def main() -> None:
    """Entry point: user errors are one message and exit code 2."""
    try:
        settings = environment.load_settings()
    except UserError as error:
        fail(environment.without_secrets(str(error)), 2)
    environment.prepare_environment(settings)
    with one_message(settings):
        app()


@app.command()
def run(
    profile: Annotated[
        str,
        typer.Option(
            help="What to run: smoke (some minutes, a tiny model), quick (the plainest data), standard (three times as much, all of it), overnight (three times that), paper (needs a GPU)."
        ),
    ] = "quick",
    change: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Change one field of the profile, such as train.epochs=2 or gguf=[F16,Q4_0]. May be given more than once.",
        ),
    ] = [],  # noqa: B006 - typer copies it
    execution: Annotated[
        Literal["local", "pools"], typer.Option(help="Where stages run: in this process, or on the workers of pools (see `cartwright up`).")
    ] = "local",
    accelerator: Annotated[Literal["cpu", "gpu"], typer.Option(help="With pools: where training and what is made for GPUs run.")] = "cpu",
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the configuration and stop.")] = False,
) -> None:
    """Run the pipeline: data, fine-tuning, quantization, measurement, choice, registration, report.

    Stages that ran before with the same inputs are not run again. Stop it at any time: the same command goes on.
    """
    from tasks.config import check_room, dump, load_config, resolve
    from tasks.overrides import parse_overrides

    overrides = parse_overrides(change)
    config = load_config(profile, overrides)  # before anything starts
    if show_config:
        print(dump(resolve(config)))
        return
    settings = environment.load_settings()
    environment.check_home(settings)
    if execution == "pools" and not settings.prefect_api_url:
        raise UserError(
            "PREFECT_API_URL",
            "",
            "is not set, and pools have their workers at a standing server",
            mend="`cartwright up` starts one and says its address",
        )
    from flows.prefect_server import prefect_api
    from tasks.core.artifacts import Store

    def check() -> None:
        check_room(resolve(config), Store(settings.store_uri, settings.home), settings.home)

    print(f"Cartwright: profile {profile}, base model {config.base_model.source}, home {settings.home}")
    with prefect_api(settings, check), goes_on():
        from flows.retrain import retrain

        folder = retrain(profile=profile, overrides=overrides, execution=execution, accelerator=accelerator)
    _say_where(settings, folder)


def _say_where(settings: environment.Settings, folder: Path) -> None:
    from tasks.asking import path_of
    from tasks.core.artifacts import Store
    from tasks.overhead import since

    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    computed = sum(stage["state"] == "computed" for stage in report["stages"])
    cached = sum(stage["state"] == "cached" for stage in report["stages"])
    failed = report["failed_stages"]
    print()
    print(
        f"{computed} stages computed, {cached} cached, in {report['wall_s']:.0f} s."
        if computed or failed
        else f"Nothing to compute: all {cached} stages were cached."
    )
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}")
    print(f"Recommendation: {report['recommendation']['why']}")
    print(f"Gate: {report['gate']['verdict']} ({'; '.join(check['name'] for check in report['gate']['checks'])})")
    print(f"Report: {folder / 'report.html'}")
    recommended = next((v for v in report["variants"] if v["name"] == report["recommendation"]["cpu"]), None)
    if recommended and (path := path_of(recommended, Store(settings.store_uri, settings.home))).exists():  # it may be with a worker
        print(f"Model: {path}")
    if (after := since(report)) > 1:
        print(f"After the report had counted the time: {after:.1f} s for its pages, MLflow, and the end of Prefect's server.")
    print("Dashboards on what was just done:")
    for line in dashboards(settings):
        print(f"  {line}")


def dashboards(settings: environment.Settings) -> tuple[str, str]:
    """Where Prefect's and MLflow's are, or the commands that open them."""
    bin_dir = Path(sys.executable).parent
    prefect = ["env", f"PREFECT_HOME={settings.prefect_home}", str(bin_dir / "prefect"), "server", "start", "--host", "127.0.0.1"]
    mlflow_uri = environment.shown_uri(settings.mlflow_uri)
    mlflow = [str(bin_dir / "mlflow"), "ui", "--host", "127.0.0.1", "--backend-store-uri", mlflow_uri]
    return (
        environment.shown_uri(settings.prefect_api_url.removesuffix("/api")) if settings.prefect_api_url else shlex.join(prefect),
        mlflow_uri if mlflow_uri.startswith("http") else shlex.join(mlflow),
    )


@app.command()
def ablate(
    file: Annotated[Path, typer.Argument(help="A YAML file like those of deployments/ablations/: profile, base, seeds, arms.")],
) -> None:
    """Train every arm of an ablation with every seed and print the table: which change of the recipe helps, on `validation`.

    Trainings that ran before are not run again. Stop it at any time: the same command goes on.
    """
    from tasks.ablation import load_ablation

    settings = environment.load_settings()
    ablation = load_ablation(file)  # before anything starts
    environment.check_home(settings)
    from flows.prefect_server import prefect_api

    print(f"Cartwright: ablation {ablation.name}, {len(ablation.arms)} arms, {len(ablation.seeds)} seeds each, home {settings.home}")
    with prefect_api(settings), goes_on():
        from flows.ablate import ablate as run_ablation

        path = run_ablation(str(file))
    print(f"\n{path.read_text(encoding='utf-8')}\nTable: {path}")


@app.command()
def evaluate(
    data: Annotated[
        Path | None,
        typer.Option(help="Labelled JSONL: a `text` and its `gold` answer on each line. Default: the test split of the latest run."),
    ] = None,
    model: ModelOption = "recommended",
    output: Annotated[Path | None, typer.Option(help="Save the figures as JSON.")] = None,
) -> None:
    """Score a model on labelled rows: exact match with its 95% interval, by language, intent, slot and source, and what it confuses."""
    from tasks.asking import ask, find_model, wrong_answers
    from tasks.core.display import beside_answers
    from tasks.domain.labelled import read_labelled
    from tasks.domain.scoring import score

    if output:
        _check_output(output)
    settings = environment.load_settings()
    found = find_model(settings, model)
    if not data and not (found.dataset / "test.jsonl").is_file():
        raise UserError("--data", "", "is not given, and there is no run whose test split could be taken", mend="Give labelled JSONL")
    rows, bad = read_labelled(data or found.dataset / "test.jsonl", found.spec)
    for line, problem in bad:
        print(f"line {line}: {printable(problem)}", file=sys.stderr)
    if not rows:
        raise UserError(
            "data",
            str(data),
            "has no usable row",
            mend='Write lines such as {"text": "2 milk", "gold": {"intent": "add_to_cart", "product": "milk", "quantity": 2}}',
        )
    with ExitStack() as asking:
        with beside_answers(f"ask {model}"):
            asked = asking.enter_context(ask(found, [row["text"] for row in rows]))
        figures = score(rows, asked.answers, found.spec)
        figures.pop("correct")
        figures |= {
            "model": model,
            "zero_shot": found.zero_shot,
            "latency_p50_s": asked.latency_p50_s,
            "usd_per_1k_requests": asked.usd_per_1k_requests,
            "requests_failed": asked.failed,
            "bad_lines": [{"line": line, "problem": problem} for line, problem in bad],
            "wrong": wrong_answers(rows, asked.answers, found.spec),
        }
        if output:  # before anything is printed, which may be cut off: `| head`
            output.write_text(json.dumps(figures, indent=2, ensure_ascii=False), encoding="utf-8")
            asking.close()
        _print_figures(figures)
        sys.stdout.flush()


def _check_output(path: Path) -> None:
    """Before what may take long and cost money, and without a trace."""
    if not path.parent.is_dir():
        raise UserError("--output", str(path), "is in a folder that does not exist", mend=f"Make it first: mkdir -p {path.parent}")
    if path.is_dir():
        raise UserError("--output", str(path), "is a folder", mend="Give the name of a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError("--output", str(path), "cannot be written", mend="Mend the permissions, or choose another place")


def _print_figures(figures: dict[str, Any]) -> None:
    exact, wrong = figures["exact_match"], figures["wrong"]
    interval = f"95% interval {exact['low']:.1%} to {exact['high']:.1%}"
    print(f"exact match {exact['value']:.1%}  ({interval}, {exact['n']} rows, {len(figures['bad_lines'])} bad lines)")
    if figures["requests_failed"]:
        print(f"{len(figures['requests_failed'])} requests got no answer and count as wrong. The first: {figures['requests_failed'][0]}")
    if figures["usd_per_1k_requests"] is not None:
        print(f"{figures['usd_per_1k_requests']:.2f} dollars for 1,000 requests, latency p50 {figures['latency_p50_s']:.2f} s")
    print(f"intent accuracy {figures['intent_accuracy']:.1%}, valid answers {figures['json_valid']:.1%}")
    for title in ("by_language", "by_intent", "by_slot", "by_source"):
        if set(figures[title]) - {"?"}:
            print(title.replace("_", " "))
            for name, part in figures[title].items():
                print(f"  {printable(name):<20}{part['value']:>7.1%}  ({part['low']:.1%} to {part['high']:.1%}) of {part['n']}")
    confused = [
        (count, intent, answered) for intent, row in figures["confusion"].items() for answered, count in row.items() if answered != intent
    ]
    if confused:
        print("intents taken for others")
        for count, intent, answered in sorted(confused, reverse=True):
            print(f"  {count:>4}  {intent} -> {answered}")
    for row in wrong[:WRONG_SHOWN]:
        print(f"  wrong: {row['text']!r} -> {printable(row['output'])}")
    if len(wrong) > WRONG_SHOWN:
        print(f"  and {len(wrong) - WRONG_SHOWN} more wrong answers; --output FILE keeps all")


@app.command()
def predict(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="What customers say. Without any, JSONL with a `text` on each line, or plain lines, are read from standard input. If the first line is an object, all have to be."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Read this file instead of standard input; JSONL if its name ends so.")] = None,
    model: ModelOption = "recommended",
) -> None:
    """Turn texts into JSONL answers on standard output; a bad line is reported and the rest goes on.

    What else a line says is kept, but for the fields of an earlier answer: `answer`, `problem` and `output`.
    """
    from tasks.asking import Given, ask, find_model, read_texts
    from tasks.core.display import beside_answers
    from tasks.domain.labelled import has_half_character, read_lines
    from tasks.domain.scoring import parse_answer

    if texts and data:
        raise UserError("--data", str(data), "is given beside texts", mend="Give one or the other")
    if a_file := next((text for text in texts or () if re.fullmatch(r"\S{1,250}\.(jsonl?|txt)", text) and Path(text).is_file()), ""):
        raise UserError("texts", a_file, "is a file, and would be answered as a text", mend=f"Read it with --data {a_file}")
    found = find_model(environment.load_settings(), model)
    if broken := next((text for text in texts or () if has_half_character(text)), ""):
        raise UserError("texts", broken.encode("utf-8", "backslashreplace").decode(), "is not UTF-8", mend="Set the terminal to UTF-8")
    lines = read_lines("--data", data) if data else sys.stdin.buffer
    jsonl = bool(data and data.suffix in (".json", ".jsonl"))
    given, bad = ([Given(text) for text in texts], []) if texts else read_texts(lines, jsonl=jsonl)
    for line, problem in bad:
        print(f"line {line}: {printable(problem)}", file=sys.stderr)
    if not given:
        mend = 'Write a text on each line, or JSON such as {"text": "2 milk"}'
        raise UserError("--data" if data else "standard input", str(data or ""), "has no line that can be answered", mend=mend)
    with ExitStack() as asking:
        with beside_answers(f"ask {model}"):
            asked = asking.enter_context(ask(found, [one.text for one in given]))
        for problem in asked.failed:
            print(f"no answer: {printable(problem)}", file=sys.stderr)
        for one, raw in zip(given, asked.answers, strict=True):
            parsed = parse_answer(raw, found.spec)
            answer = {"answer": parsed.answer} if parsed.answer else {"answer": None, "problem": parsed.problem, "output": raw}
            row = one.fields()
            earlier = ("answer", "problem", "output") if "answer" in row else ()
            kept = {name: value for name, value in row.items() if name not in earlier}
            print(json.dumps({**kept, **answer}, ensure_ascii=False))
        sys.stdout.flush()


@app.command()
def report(
    run_id: Annotated[str, typer.Argument(help="A run, or `latest`.")] = "latest",
    show: Annotated[bool, typer.Option("--open", help="Open the HTML page in a browser.")] = False,
) -> None:
    """Print a run's report as Markdown and say where its page is."""
    from tasks.report import latest_report

    folder = latest_report(environment.load_settings(), run_id)
    print((folder / "report.md").read_text(encoding="utf-8"))
    print(f"Page: {folder / 'report.html'}")
    if show:
        webbrowser.open((folder / "report.html").as_uri())


@app.command()
def doctor() -> None:
    """Check what a run needs on this machine: processor, compiler, libraries, base model, converter, disk."""
    from flows.doctor import checks_of

    checks = list(checks_of(environment.load_settings()))
    for good, name, detail in checks:
        print(f"{'ok  ' if good else 'FAIL'}  {name:<24}{detail}")
    if not all(good for good, _, _ in checks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
