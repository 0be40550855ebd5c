"""Asking a finished model from the command line: which one, with what, and how its input is read."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from tasks import runtimes
from tasks.api import is_model_id
from tasks.core import hardware, progress
from tasks.core.artifacts import Store
from tasks.core.manifests import checksum
from tasks.core.settings import Settings, shown_uri
from tasks.domain import prompt
from tasks.domain.errors import UserError
from tasks.domain.labelled import has_half_character, parse_json
from tasks.domain.scoring import parse_answer, wrong_fields
from tasks.domain.spec import Spec, load_spec
from tasks.model_folder import check_folder
from tasks.quantize_gguf import MODEL_FILE
from tasks.report import latest_report, read_report
from tasks.runtimes import LocalRuntime, RuntimeName
from tasks.synthesize import read_rows
from tasks.teaching.log import Answer, AnswerLog
from tasks.variants import MIXED
from tasks.weights import check_gguf

MAX_TOKENS = 96
PARALLEL = 16
NAMES = ("champion", "recommended")  # of models, whatever folders are called
OTHERS = ("a .gguf file", "a Hugging Face folder", "a LiteLLM model id such as openai/gpt-4.1")  # that need no run


@dataclass(frozen=True)
class Found:
    """A model that can be asked."""

    path: Path | str  # a LiteLLM id if `runtime` is litellm
    runtime: RuntimeName
    spec: Spec
    dataset: Path
    zero_shot: bool = False
    few_shot: int = 0  # so many rows of `train` are shown as examples
    api_base: str | None = None
    max_tokens: int = MAX_TOKENS
    answers: Path = Path()  # where an API's are kept while others are awaited
    copied: TemporaryDirectory[str] | None = None  # holds the files, and goes when this does


def find_model(settings: Settings, name: str) -> Found:
    """Find a model by what the user calls it.

    Raises:
        UserError: there is no such model, or no run yet.
    """
    path = Path(name)
    if path.suffix == ".gguf" or (path.is_dir() and name not in NAMES):
        if path.suffix == ".gguf":
            check_gguf("model", path)
        else:
            check_folder("model", path, name)
        asked_by = _latest_dataset(settings)
        return Found(path, "llama_cpp" if path.suffix == ".gguf" else "transformers", load_spec(str(asked_by)), asked_by)
    try:
        folder = latest_report(settings)
    except UserError:
        if name in NAMES:
            raise
        if not is_model_id(name):
            problem = "is no model that is known, and there is no run yet whose variants could be asked"
            raise UserError("model", name, problem, allowed=list(OTHERS), mend="Run `cartwright run` first, or give one of these") from None
        return _behind_an_api(name, load_spec("ecommerce"), None, settings)
    report = read_report(folder)
    store = Store(settings.store_uri, settings.home)
    dataset = _dataset_of(report, store)
    if name == "champion":
        from tasks.core.registry import by_server, champion_files

        # It may be older than the latest run, and have been trained with another prompt: its own specification came with it.
        into = TemporaryDirectory(prefix="cartwright-") if by_server(settings) else None  # MLflow would leave one behind for each call
        name = report["config"]["registry"]["name"]
        folder, runtime, asked_by = champion_files(settings, name, Path(into.name) if into else None)
        return Found(folder, runtime, load_spec(str(asked_by)), dataset, copied=into)
    wanted = report["recommendation"]["cpu"] if name == "recommended" else name
    variants = {v["name"]: v for v in report["variants"] if not v.get("error")}
    if wanted not in variants and is_model_id(name):
        asked_by = _or_ecommerce(dataset)
        return replace(_behind_an_api(name, load_spec(str(asked_by)), asked_by, settings), **_measured(report, name))
    if wanted not in variants:
        raise UserError(
            "model",
            name,
            "is no variant of the latest run",
            allowed=[*NAMES, *variants, *OTHERS],
        )
    variant, spec = variants[wanted], load_spec(str(_present(dataset, settings)))
    few_shot = variant.get("few_shot", 0)
    if variant["format"] == "api":
        behind = _behind_an_api(variant["model"], spec, dataset, settings)
        return replace(behind, few_shot=few_shot, **_measured(report, variant["model"]))
    manifest, damage = store.look_up(_kind_of(variant), variant["key"])
    if not manifest:
        raise UserError(
            "model",
            name,
            damage or f"is no longer in {shown_uri(settings.store_uri)}",
            mend="Run `cartwright run` again: it rebuilds what is missing",
        )
    return Found(path_of(variant, store), variant["runtime"], spec, dataset, zero_shot=variant["role"] == "base", few_shot=few_shot)


def path_of(variant: Mapping[str, Any], store: Store) -> Path:
    """Where a variant of a report is on this machine, if it is here: a GGUF file, or a folder of transformers."""
    folder = store.path(_kind_of(variant), variant["key"])
    return folder / MODEL_FILE if variant["runtime"] == "llama_cpp" else folder


def _kind_of(variant: Mapping[str, Any]) -> str:
    """The stage that made a variant."""
    if variant["name"] == MIXED:
        return "search_gguf"
    others = "base_model" if variant["role"] == "base" else "merge"
    return {"gguf": "quantize_gguf", "gptq": "quantize_gptq", "awq": "quantize_awq"}.get(variant["format"], others)


def _dataset_of(report: Mapping[str, Any], store: Store) -> Path:
    """The data set of a run, which may be in another machine's part of the store; its place where it is gone."""
    key = next(stage for stage in report["stages"] if stage["name"] == "synthesize")["key"]
    folder = store.path("synthesize", key)
    if not store.is_local and not folder.is_dir():
        store.look_up("synthesize", key)
    return folder


def _measured(report: Mapping[str, Any], model: str) -> dict[str, Any]:
    """How a run asked a model behind an API, if it did."""
    asked: dict[str, Any] = next((api for api in report["config"]["api"] if api["model"] == model), {})
    return {name: asked[name] for name in ("api_base", "max_tokens") if name in asked}


def _latest_dataset(settings: Settings) -> Path:
    """The data set of the latest run, by whose specification a file of one's own is asked; without a run, our domain."""
    try:
        folder = latest_report(settings)
    except UserError:  # no run yet
        return load_spec("ecommerce").path
    return _or_ecommerce(_dataset_of(read_report(folder), Store(settings.store_uri, settings.home)))


def _or_ecommerce(dataset: Path) -> Path:
    """A run's data set, or our domain where it is gone: for models that are not that run's."""
    if dataset.is_dir():
        return dataset
    print("the data of the latest run is gone: the model is asked, and scored, by the domain ecommerce", file=sys.stderr)
    return load_spec("ecommerce").path


def _present(dataset: Path, settings: Settings) -> Path:
    """The data set of a run, if it is still there: without it nobody knows by which specification the run's models are asked."""
    if not dataset.is_dir():
        problem = f"the data of the latest run, which says how models are asked, is no longer in {shown_uri(settings.store_uri)}"
        raise UserError("synthesize", dataset.name, problem, mend="Run `cartwright run` again: it rebuilds what is missing")
    return dataset


def _behind_an_api(name: str, spec: Spec, dataset: Path | None, settings: Settings) -> Found:
    """A model of LiteLLM's, which was not fine-tuned and gets the long instructions."""
    from tasks.evaluate_api import MOST_TOKENS

    return Found(name, "litellm", spec, dataset or spec.path, zero_shot=True, max_tokens=MOST_TOKENS, answers=settings.home / "api")


@dataclass(frozen=True)
class Asked:
    """Raw answers in the order of the texts. A price is known of an API only. `failed`: why requests got no answer."""

    answers: list[str]
    latency_p50_s: float
    usd_per_1k_requests: float | None
    failed: tuple[str, ...]


@contextmanager
def ask(found: Found, texts: list[str]) -> Iterator[Asked]:
    """Answer texts, `PARALLEL` at a time. Answers that an API was paid for are kept until the block ends without an error: what is made of
    them has to be written there, and flushed. See `_ask_api`."""
    rows = read_rows(found.dataset / "train.jsonl") if found.few_shot else []
    examples = prompt.pick_examples(rows, found.spec, found.few_shot)
    conversations = [prompt.messages(found.spec, text, zero_shot=found.zero_shot, examples=examples) for text in texts]
    if found.runtime == "litellm":
        with _ask_api(found, conversations) as asked:
            yield asked
        return
    model = _loaded(found.runtime, Path(found.path), conversations[:1])
    answers = [""] * len(texts)
    latencies, failed = [], []
    answering = model.generate(conversations, found.max_tokens, max(1, min(PARALLEL, len(texts))))
    for completion in progress.track(answering, len(conversations), "answers"):
        answers[completion.index] = completion.text
        if not math.isnan(completion.total_s):  # a request without an answer has no latency
            latencies.append(completion.total_s)
        else:
            failed.append(
                f"text {completion.index + 1} has {completion.prompt_tokens:,} tokens; at most {runtimes.LONGEST_PROMPT:,} are read"
            )
    yield Asked(answers, statistics.median(latencies) if latencies else 0.0, None, tuple(failed))


def _loaded(runtime: Literal["transformers", "llama_cpp"], path: Path, conversations: list[list[prompt.Message]]) -> LocalRuntime:
    """The model, once it has been seen to take a conversation.

    Raises:
        UserError: its runtime refuses the files, or its chat template the conversation. What that raises is of many kinds.
        MemoryError, ImportError, OSError: it is not the files' fault.
    """
    try:
        model = runtimes.load(runtime, path, hardware.cores())
        for conversation in conversations:
            model.encode(conversation)
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # of the disk; transformers' own have none
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"cannot be asked with {runtime} ({reason[:300]})"
        raise UserError("model", str(path), problem, mend="See that it is whole, and that there is memory for it") from None
    return model


@contextmanager
def _ask_api(found: Found, conversations: list[list[prompt.Message]]) -> Iterator[Asked]:
    """Ask a model behind an API. Every answer is written down at once, and forgotten when all are there that there will be and the block has
    ended: a command that asks the same after a kill, a refusal, a lost network or a full disk buys none of them again, and a later one
    asks anew."""
    from tasks.runtimes.litellm import ApiCompletion, LiteLlmRuntime

    where = {"model": str(found.path), "api_base": found.api_base}
    requests = [checksum({**where, "messages": asked, "max_tokens": found.max_tokens}) for asked in conversations]
    with AnswerLog(found.answers / f"{checksum(where)[:16]}.jsonl", requests) as log:
        known = {request: answer for request in requests if (answer := log.get(request))}
        todo = {request: asked for request, asked in zip(requests, conversations, strict=True) if request not in known}
        if earlier := sum(request in known for request in requests):
            print(f"{earlier} answers are those of an earlier attempt, which did not end", file=sys.stderr)
        names = list(todo)

        def keep(done: ApiCompletion) -> None:
            if math.isnan(done.total_s) and not done.refused:
                return  # it is asked again by a command that asks the same
            seconds = 0.0 if done.refused else done.total_s
            answer = Answer(done.text, done.prompt_tokens, done.completion_tokens, done.usd, seconds, done.problem)
            log.add(names[done.index], answer, {})

        problems = {request: answer.problem for request, answer in known.items()}
        before = sum(answer.tokens > 0 for answer in known.values())
        model = LiteLlmRuntime(str(found.path), found.api_base, answered=before, keep=keep)
        lacking = False
        with closing(model.generate(list(todo.values()), found.max_tokens, max(1, min(PARALLEL, len(todo))))) as answering:
            for done in progress.track(answering, len(todo), model.model):
                problems[names[done.index]] = done.problem
                lacking |= math.isnan(done.total_s) and not done.refused
        answers = [log.get(request) for request in requests]
        bought = [answer for request in dict.fromkeys(requests) if (answer := log.get(request)) and answer.tokens]
        failed = tuple(problem for request in requests if (problem := problems[request]))
        if failed and not bought:
            log.forget()  # refusals cost nothing
            raise UserError("model", model.model, f"answered none of {len(requests)} requests. The first: {failed[0]}")
        prices = [answer.usd for answer in bought if answer.usd is not None]
        yield Asked(
            [answer.text if answer else "" for answer in answers],
            statistics.median(answer.seconds for answer in bought) if bought else 0.0,
            sum(prices) * 1000 / len(bought) if bought and len(prices) == len(bought) else None,
            failed,
        )
        if not (lacking or (model.in_doubt and model.answered > before)):
            log.forget()


def wrong_answers(rows: list[dict[str, Any]], answers: list[str], spec: Spec) -> list[dict[str, Any]]:
    """What was answered wrongly, the worst first: answers that are none, then those with most wrong fields."""
    found = []
    for row, output in zip(rows, answers, strict=True):
        parsed = parse_answer(output, spec)
        wrong = wrong_fields(row["gold"], parsed.answer, row.get("score")) if parsed.answer else ["intent", *spec.slots]
        if wrong:
            names = ("line", "id", "text", "language", "source", "gold")
            kept = {name: row[name] for name in names if name in row}
            found.append({**kept, "answer": parsed.answer, "problem": parsed.problem, "output": output, "wrong": wrong})
    return sorted(found, key=lambda item: -len(item["wrong"]))


@dataclass(frozen=True, slots=True)
class Given:
    """A text that is asked about, and the JSON it came in, if it did: packed, it takes a twentieth of the memory that its fields may take."""

    text: str
    row: bytes = b""

    def fields(self) -> dict[str, Any]:
        """The text, and whatever else was said beside it."""
        return dict(json.loads(self.row)) if self.row else {"text": self.text}


def read_texts(lines: Iterable[bytes], *, jsonl: bool = False) -> tuple[list[Given], list[tuple[int, str]]]:
    """What is given as JSONL, each line with a `text` and whatever else it has, or as plain lines; and the lines that cannot be used with
    their problem.

    Args:
        jsonl: whether all lines are objects; without it, they are if the first is one.
    """
    given, bad, first = list[Given](), [], True
    for number, packed in enumerate(lines, 1):
        try:
            line = packed.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            bad.append((number, "is not UTF-8"))
            continue
        if not line:
            continue
        jsonl, first = jsonl or (first and line.startswith("{")), False
        if not jsonl and not line.startswith("{"):
            given.append(Given(line))
            continue
        row, problem = parse_json(line)
        if problem or has_half_character(row):
            bad.append((number, problem or "has half a character"))
        elif isinstance(row, dict) and isinstance(row.get("text"), str):
            given.append(Given(row["text"], line.encode()))
        else:
            bad.append((number, "has no `text`"))
    return given, bad
