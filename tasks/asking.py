"""Asking a finished model from the command line: which one, with what, and how its input is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import runtimes
from tasks.core import hardware
from tasks.core.artifacts import Store
from tasks.core.settings import Settings
from tasks.domain import prompt
from tasks.domain.errors import UserError
from tasks.domain.spec import Spec, load_spec
from tasks.quantize_gguf import MODEL_FILE
from tasks.report import latest_report
from tasks.runtimes import RuntimeName

MAX_TOKENS = 96
PARALLEL = 16


@dataclass(frozen=True)
class Found:
    """A model that can be asked."""

    path: Path
    runtime: RuntimeName
    spec: Spec
    dataset: Path


def find_model(settings: Settings, name: str) -> Found:
    """Find a model by what the user calls it.

    Raises:
        UserError: there is no such model, or no run yet.
    """
    path = Path(name)
    if path.suffix == ".gguf" or path.is_dir():
        if not path.exists():
            raise UserError("model", name, "does not exist")
        spec = load_spec("ecommerce")
        return Found(path, "llama_cpp" if path.suffix == ".gguf" else "transformers", spec, spec.path)
    report = json.loads((latest_report(settings) / "report.json").read_text(encoding="utf-8"))
    store = Store(settings.store_uri, settings.home)
    dataset_stage = next(stage for stage in report["stages"] if stage["name"] == "synthesize")
    dataset = store.path("synthesize", dataset_stage["key"])
    spec = load_spec(str(dataset)) if dataset.is_dir() else load_spec("ecommerce")
    if name == "champion":
        from tasks.core.tracking import champion_files

        folder, runtime = champion_files(settings, report["config"]["registry"]["name"])
        return Found(folder, runtime, spec, dataset)
    wanted = report["recommendation"]["cpu"] if name == "recommended" else name
    variants = {v["name"]: v for v in report["variants"] if not v.get("error")}
    if wanted not in variants:
        raise UserError(
            "model",
            name,
            "is no variant of the latest run",
            allowed=["champion", "recommended", *variants, "a .gguf file", "a Hugging Face folder"],
        )
    variant = variants[wanted]
    kind = {"gguf": "quantize_gguf", "gptq": "quantize_gptq"}.get(variant["format"], "base_model" if variant["role"] == "base" else "merge")
    manifest, damage = store.find(kind, variant["key"])
    if not manifest:
        raise UserError(
            "model", name, damage or f"is no longer in {settings.store_uri}", mend="Run `cartwright run` again: it rebuilds what is missing"
        )
    folder = store.path(kind, variant["key"])
    return Found(folder / MODEL_FILE if variant["runtime"] == "llama_cpp" else folder, variant["runtime"], spec, dataset)


def ask(found: Found, texts: list[str], quiet: bool = False) -> list[str]:
    """The raw answers to texts, in their order."""
    model = runtimes.load(found.runtime, found.path, hardware.cores())
    conversations = [prompt.messages(found.spec, text) for text in texts]
    answers = [""] * len(texts)
    for completion in model.generate(conversations, MAX_TOKENS, max(1, min(PARALLEL, len(texts)))):
        answers[completion.index] = completion.text
    return answers


def read_labelled(path: Path, spec: Spec) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Labelled rows of a JSONL file, and the lines that cannot be used with their problem.

    Raises:
        UserError: the file cannot be read.
    """
    rows, bad = [], []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            bad.append((number, f"is not JSON ({error})"))
            continue
        problem = _problem_of(row, spec)
        if problem:
            bad.append((number, problem))
        else:
            rows.append(row)
    return rows, bad


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("data", str(path), f"cannot be read ({error})", mend="Give a JSONL file in UTF-8") from None


def _problem_of(row: Any, spec: Spec) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return "has no `text`"
    gold = row.get("gold")
    if not isinstance(gold, dict) or gold.get("intent") not in spec.intents:
        return f"`gold.intent` is not one of {', '.join(spec.intents)}"
    unknown = set(gold) - {"intent"} - set(spec.intents[gold["intent"]].slots)
    return f"`gold` has {sorted(unknown)[0]!r}, which {gold['intent']} does not have" if unknown else None


def read_texts(lines: Iterable[str]) -> tuple[list[str], list[tuple[int, str]]]:
    """Texts of JSONL or plain lines, and the lines that cannot be used with their problem."""
    texts, bad = [], []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        if not line.startswith("{"):
            texts.append(line)
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            bad.append((number, f"is not JSON ({error})"))
            continue
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            bad.append((number, "has no `text`"))
    return texts, bad
