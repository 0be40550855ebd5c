"""Stage `synthesize`: labelled utterances for training and evaluation, offline, from the domain's phrase banks."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator

from tasks.core import progress
from tasks.core.manifests import describe_files, digest_of
from tasks.core.rows import rows_of
from tasks.core.stage import Seed, StageConfig, stage
from tasks.data_card import GENERATOR, TEACHER_PATTERN, DataCard, origin_kind
from tasks.domain.bank import load_bank
from tasks.domain.errors import UserError
from tasks.domain.labelled import ROWS_READ_BY, read_training, reason_of
from tasks.domain.noise import KINDS
from tasks.domain.scoring import text_contains_slots
from tasks.domain.spec import AnswerStyle, PromptStyle, Spec, domain_path, line_of, load_spec
from tasks.domain.utterances import SPLITS, Generator, Split, Style
from tasks.leakage import ORDER, Admission, batched, check_leakage
from tasks.own_files import paths_in
from tasks.teaching import joining

ATTEMPTS = 30  # rows tried for one turn before it is left out
# Share of training rows whose number is said in words, drawn from all that there are words for. As often as people order so many, a
# model that sees each text once hardly meets "vierundzwanzig" or "media docena".
DRILLED_NUMBERS = 0.3
BLOCK = 500  # rows made, and compared with the evaluation splits, at a time


class SynthesizeConfig(StageConfig):
    """What data to make."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"domain", "extra"})
    domain: str = Field("ecommerce", description="Name of a domain, or path of a folder with a spec.yaml")
    domain_sha256: str = Field("", description="Digest of the domain's files; filled in, so that a changed phrase bank is new data")
    languages: tuple[str, ...] = Field(
        ("en", "de", "es", "fr", "it", "hr"),
        min_length=1,
        description="Languages of the domain to use; where none are given, a run uses all",
    )
    intents: tuple[str, ...] = Field((), description="Intents of the domain to use; empty for all")
    train_rows: int = Field(4000, ge=24, le=2_000_000)
    validation_rows: int = Field(144, ge=12, le=100_000)
    test_rows: int = Field(300, ge=12, le=100_000)
    hard_rows: int = Field(144, ge=12, le=100_000)
    noise_rate: float = Field(0.35, ge=0, le=1, description="Share of rows with noise; `hard` has 0.3 more")
    decoration_rate: float = Field(0.5, ge=0, le=1, description="How often greetings, thanks and chatter surround an utterance")
    patterns_per_intent: int | None = Field(
        None, ge=2, description="Use only so many phrase patterns of each intent and language; null for all"
    )
    held_out_noise: tuple[str, ...] = Field(("upper", "keyboard", "missing_space"), description="Kinds of noise that only `hard` has")
    prompt: PromptStyle = Field(
        "short", description="What the fine-tuned model reads: the customer's text alone, or a chat with a system prompt"
    )
    answer: AnswerStyle = Field(
        "short", description="What the fine-tuned model writes: a few short lines, or the JSON itself in twice the tokens"
    )
    extra: tuple[str, ...] = Field(
        (), description="Labelled JSONL files of your own that join training: a `text` and its `gold` answer a line"
    )
    extra_sha256: tuple[str, ...] = Field((), description="Digests of these files; filled in, so that a changed file is new data")
    teacher: str = Field("none", description="A model that extends the phrase banks, by its LiteLLM id; `none` works offline")
    seed: Seed = 7

    @field_validator("held_out_noise")
    @classmethod
    def _known_noise(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise ValueError(f"unknown noise {unknown[0]!r}. Allowed: {', '.join(KINDS)}")
        return kinds

    def in_key(self) -> dict[str, Any]:
        return super().in_key() | ({"rows_read_by": ROWS_READ_BY} if self.extra_sha256 else {})

    def rows(self, split: Split) -> int:
        return {"train": self.train_rows, "validation": self.validation_rows, "test": self.test_rows, "hard": self.hard_rows}[split]


def make_generator(config: SynthesizeConfig) -> Generator:
    """The generator a config describes; reads and checks the domain's files.

    Raises:
        UserError: an unknown language, a broken file, or one that says how a model is asked, which a run does.
    """
    spec = load_spec(config.domain)
    for name in ("prompt", "answer"):
        if name in spec.model_fields_set:
            file = spec.path / "spec.yaml"
            mend = f"Take the line out, and choose by data.{name}={getattr(spec, name)}"
            raise UserError(name, f"{file}:{line_of(file, (name,))}", "is chosen for each run, not by a domain", mend=mend)
    banks = {language: load_bank(spec, language) for language in config.languages}
    usual = tuple(kind for kind in KINDS if kind not in config.held_out_noise)
    plain = Style(usual, config.noise_rate, config.decoration_rate)
    hard = Style(tuple(KINDS), min(1.0, config.noise_rate + 0.3), min(1.0, config.decoration_rate + 0.2))
    drilled = replace(plain, drilled_rate=DRILLED_NUMBERS)
    styles: dict[Split, Style] = {"train": drilled, "validation": plain, "test": plain, "hard": hard}
    return Generator(spec, banks, styles, config.seed, list(config.intents) or None, config.patterns_per_intent)


def domain_digest(domain: str) -> str:
    """One digest of all files of a domain, but for what an editor or a file manager hides beside them."""
    files = describe_files(domain_path(domain))
    return digest_of({name: entry for name, entry in files.items() if not Path(name).name.startswith(".")})


def check_domain(domain: str, sha256: str) -> None:
    """After a stage has read a domain, whether it is the one of the stage's key: what is made of another would be found under that key for good.

    Args:
        sha256: what `domain_digest` was when the run began; empty where nobody asked.

    Raises:
        UserError: it is another one.
    """
    if sha256 and domain_digest(domain) != sha256:
        mend = "Run again when it is complete; on another host it has to be the same"
        raise UserError("data.domain", domain, "has changed since the run began", mend=mend)


@stage("synthesize", version=9, libraries=("rapidfuzz", "scikit-learn"))
def synthesize(config: SynthesizeConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `<split>.jsonl`, one row a line, and `data_card.json`; return the counts of the data card.

    A row that repeats another, or is nearly a row of an earlier split, is replaced. Splits are made in the order `ORDER`.
    Memory does not grow with `train_rows`; each evaluation row takes about 4 kB.

    Args:
        inputs: `extra`, of the stage `own_files`, if the config has such files; `teacher`, of the stage `teach`, if it names one.

    Raises:
        LeakError: splits share what they must not, as written.
        UserError: the domain is not the one the run began with.
    """
    generator = make_generator(config)
    specification = (generator.spec.path / "spec.yaml").read_text(encoding="utf-8")
    check_domain(config.domain, config.domain_sha256)
    lessons = inputs.get("teacher")
    if lessons:
        joining.join_banks(generator, lessons)
    taught = [lessons / "utterances.jsonl"] if lessons else []
    extra = paths_in(inputs["extra"], config.extra_sha256) if config.extra else []
    admission, card = Admission(), DataCard(config.seed)
    total, done = sum(config.rows(split) for split in SPLITS), 0
    for split in ORDER:
        rows = distinct_rows(generator, split, config.rows(split), admission)
        if split == "train":
            own = extra_rows(extra, generator.spec, admission)
            rows = itertools.chain(rows, own, extra_rows(taught, generator.spec, admission, "teacher"))
        held_out = []
        with (out_dir / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                kind = origin_kind(row["origin"])
                name = f"{split if kind in (GENERATOR, TEACHER_PATTERN) else kind}-{number}"
                file.write(json.dumps({"id": name, **row}, ensure_ascii=False) + "\n")
                card.add(split, row)
                if split != "train":
                    held_out.append(row)
                if number % BLOCK == 0:
                    progress.advance(done + number, total, split)
        admission.hold_out(held_out)
        done += config.rows(split)
    check_leakage(out_dir)
    # Later stages read prompt and schema from the data set, so that what was trained and what is asked cannot differ.
    (out_dir / "spec.yaml").write_text(f"{specification}\nprompt: {config.prompt}\nanswer: {config.answer}\n", encoding="utf-8")
    figures = {**card.counts(), **admission.counts()}
    figures |= joining.summary(lessons, figures["origins"]["train"].get("teacher", 0), admission.rejected)
    card.write(out_dir, joining.lasting(figures))
    return figures


def distinct_rows(generator: Generator, split: Split, rows: int, admission: Admission) -> Iterator[dict[str, Any]]:
    """The rows of a split, a block at a time; a turn for which `ATTEMPTS` rows were refused is left out, and counted."""
    for start in range(0, rows, BLOCK):
        yield from _block(generator, split, range(start, min(start + BLOCK, rows)), admission)


def _block(generator: Generator, split: Split, turns: Iterable[int], admission: Admission) -> list[dict[str, Any]]:
    made: dict[int, dict[str, Any]] = {}
    left = list(turns)
    for attempt in range(ATTEMPTS):
        drawn = [(turn, generator.row(split, turn, attempt)) for turn in left]
        whole = [(turn, row) for turn, row in drawn if text_contains_slots(row["text"], row["gold"], generator.spec)]
        if len(whole) < len(drawn):
            admission.rejected["slot_not_in_text"] += len(drawn) - len(whole)
        admitted = admission.admit([row for _, row in whole])
        made |= {turn: row for (turn, row), may in zip(whole, admitted, strict=True) if may}
        left = [turn for turn in left if turn not in made]
        if not left:
            break
    else:
        admission.rejected["no_new_row_found"] += len(left)
    return [made[turn] for turn in sorted(made)]


def extra_rows(paths: Iterable[Path], spec: Spec, admission: Admission, kind: str = "extra") -> Iterator[dict[str, Any]]:
    """Rows of labelled files as rows of `train`; what cannot be used, or is nearly an evaluation row, is counted.

    Args:
        kind: `extra` for the user's own files, `teacher` for a teacher's; what origins and reasons begin with.

    Raises:
        UserError: a file cannot be read.
    """
    for path in paths:
        rows, bad = read_training(path, spec)
        for _, problem in bad:
            admission.rejected[f"{kind}: {reason_of(problem)}"[:120]] += 1
        for part in batched(rows, BLOCK):
            for row, may in zip(part, admission.admit(part, prefix=f"{kind}: "), strict=True):
                if may:
                    yield {
                        "text": row["text"],
                        "gold": row["gold"],
                        "language": row.get("language", "?"),
                        "split": "train",
                        "origin": f"{kind}:{row['source']}" if "source" in row else kind,
                        "product": None,  # of the generator's catalog only: a shop's own rows may name what `test` asks about
                        "noise": [],
                    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one split."""
    return list(rows_of(path))


def in_turns(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a split in another order: intents take turns, and so do languages.

    A split is written in blocks of one intent, so that its first rows are of a few intents only; in this order the first n are like all.
    """
    intents, languages = ([*dict.fromkeys(names)] for names in ([row["gold"]["intent"] for row in rows], [row["language"] for row in rows]))
    seen: Counter[tuple[int, int]] = Counter()
    turns = []
    for row in rows:
        intent, language = intents.index(row["gold"]["intent"]), languages.index(row["language"])
        turns.append((seen[intent, language] * len(languages) + (language - intent) % len(languages), intent))
        seen[intent, language] += 1
    return [row for _, row in sorted(zip(turns, rows, strict=True), key=lambda pair: pair[0])]
