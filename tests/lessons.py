"""A teacher's lessons for tests: what a good one says, and the stage that asks it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.synthesize import SynthesizeConfig
from tasks.teach import TeacherConfig, teach, teach_config

DATA = SynthesizeConfig(
    languages=("en", "de"), intents=("add_to_cart", "view_cart"), train_rows=96, validation_rows=12, test_rows=48, hard_rows=24, teacher="openai/m"
)  # fmt: skip
TEACHER = TeacherConfig(requests=8, items_per_request=2, concurrency=1, timeout_s=5)
UTTERANCES = {
    ("en", "add_to_cart"): [{"text": f"{n} brass kettles number {i} style, ta", "product": "brass kettles", "quantity": n} for i, n in ((1, 3), (2, 4))],
    ("de", "add_to_cart"): [{"text": "ach komm, zwölf Messingkessel nehme ich wohl noch mit", "product": "Messingkessel", "quantity": 12}],
    ("en", "view_cart"): [{"text": "remind me what I have thrown together until now"}, {"text": "As an AI I cannot say"}],
    ("de", "view_cart"): [{"text": "sag mal was liegt da jetzt eigentlich alles drin in meinem Korb"}, {"text": "what is in my basket at this moment"}],
}  # fmt: skip
PATTERNS = {
    ("en", "add_to_cart"): ["bung {counted} in with the rest[, will you]"],
    ("de", "add_to_cart"): ["pack mir noch {counted} dazu[, sei so gut]"],
    ("en", "view_cart"): ["so what have I (lumped|thrown) together until now then"],
    ("de", "view_cart"): ["lass mal sehen was da bis jetzt so (drin liegt|zusammenkam)"],
}
PRODUCTS = {
    "en": [{"class": "sc", "one": "brass kettle", "pl": "brass kettles", "measure": ""}],
    "de": [{"class": "m", "nom": "Messingkessel", "pl": "Messingkessel", "measure": ""}],
}


def lesson(body: dict[str, Any]) -> str:
    """What a good teacher says to a request."""
    asked = body["messages"][-1]["content"]
    language, topic = (re.search(pattern, asked) for pattern in (r"Language: (\w+)", r"the intent (\w+)"))
    assert language
    if "products that customers order" in asked:
        items: list[Any] = PRODUCTS[language[1]]
    else:
        assert topic
        cell = (language[1], topic[1])
        items = [{"pattern": text} for text in PATTERNS[cell]] if "phrase patterns" in asked else UTTERANCES[cell]
    return json.dumps({"items": items}, ensure_ascii=False)


@pytest.fixture
def ask(home: Path, tmp_path: Path) -> Callable[..., Manifest]:
    """Run the stage through the seam; in this process, where LiteLLM is imported already, unless `isolated`."""

    def run(data: SynthesizeConfig = DATA, isolated: bool = False, **changes: Any) -> Manifest:
        config = teach_config(data, TEACHER.model_copy(update=changes))
        stage = replace(teach, isolated=isolated)
        return seam.run(stage, config, {}, Store((home / "store").as_uri(), home), home / "logs")[0]

    return run


def log_of(home: Path) -> list[dict[str, Any]]:
    path = home / "teacher" / "answers.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def holding(folder: Path, text: str) -> list[Path]:
    """Files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@contextmanager
def watched() -> Iterator[list[str]]:
    """Arguments of every process that this one's children have while the block lasts, as anybody on the machine could read them."""
    seen: set[str] = set()
    stop, me, lines = threading.Event(), psutil.Process(), list[str]()

    def look() -> None:
        while not stop.wait(0.02):
            for child in me.children(recursive=True):
                with_arguments = Path(f"/proc/{child.pid}/cmdline")
                try:
                    seen.add(with_arguments.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
                except OSError:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lines
    finally:
        stop.set()
        thread.join()
        lines += sorted(seen)
