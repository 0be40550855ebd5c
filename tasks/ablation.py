"""An ablation: the same training with one thing changed at a time, several seeds each, judged on `validation`.

This module reads an ablation's file, checks it before any work, and writes the table of what came out. `flows/ablate.py` runs it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tasks.config import RunConfig, load_config, resolve
from tasks.core.manifests import Manifest, canonical_json
from tasks.core.markdown import escape_markdown
from tasks.domain.errors import UserError
from tasks.domain.spec import line_of, load_yaml
from tasks.teach import NO_TEACHER

SEED = "train.seed"
PARTS = ("base_model", "data", "vocabulary", "train")  # of a run's configuration: what the stages of an ablation read
METRICS = ("validation_loss", "validation_exact_match", "tokens_per_s")


class AblationFile(BaseModel):
    """What an ablation's file holds. Fields are changed by dotted name, as with `--set`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    profile: str = Field(description="The profile every arm starts from")
    base: dict[str, Any] = Field({}, description="Fields changed in every arm")
    seeds: tuple[int, ...] = Field(min_length=1, description="Every arm is trained once with each; values of train.seed")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1, description="By name, the fields an arm changes; none for the point of comparison"
    )

    @field_validator("arms", mode="before")
    @classmethod
    def _empty_arm(cls, arms: Any) -> Any:
        return {name: {} if changes is None else changes for name, changes in arms.items()} if isinstance(arms, dict) else arms

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice")
        return seeds


@dataclass(frozen=True)
class Arm:
    """One arm: its name, what it changes, and the whole configuration that gives."""

    name: str
    changes: dict[str, Any]
    config: RunConfig

    def key(self) -> str:
        """What makes two arms the same one, whatever they are called."""
        return canonical_json({part: getattr(self.config, part).model_dump(mode="json") for part in PARTS})


@dataclass(frozen=True)
class Ablation:
    """A checked ablation; `name` is its file's, without the ending."""

    name: str
    profile: str
    base: dict[str, Any]
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]


@dataclass
class Outcome:
    """What became of one arm: the adapters of its seeds, the data they saw, or why there is none."""

    arm: Arm
    dataset: Manifest | None = None
    adapters: list[Manifest] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_ablation(path: Path) -> Ablation:
    """Read an ablation and check every arm, before any work.

    Raises:
        UserError: no such file, not YAML, a name that stands twice, an unknown field or a value that is not allowed, an arm that
            changes what an ablation does not run, or two equal arms. Names the file and the line.
    """
    raw = load_yaml(path)
    name = path.stem
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError("file", str(path), "has a name that cannot name an ablation", mend="Use letters, digits, `_`, `.`, `+` and `-`")
    try:
        read = AblationFile.model_validate(json.loads(json.dumps(raw, default=str)))
    except ValidationError as error:
        raise _explained(path, error) from None
    _check_changes(path, ("base",), read.base)
    arms: list[Arm] = []
    for arm, changes in read.arms.items():
        location = ("arms", arm)
        if not re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", arm):
            raise UserError(
                f"{path}:{line_of(path, location)}: arms",
                arm,
                "is no name for an arm",
                mend="Use letters, digits, `_`, `.`, `+`, `-` and spaces",
            )
        _check_changes(path, location, changes)
        try:
            config = _configured(read, changes, arms)
        except UserError as error:
            raise _at(path, location, error) from None
        made = Arm(arm, changes, config)
        if same := next((other for other in arms if other.key() == made.key()), None):
            raise UserError(
                f"{path}:{line_of(path, location)}: arms.{arm}", None, f"is the same as {same.name}", mend="Change it or leave it out"
            )
        arms.append(made)
    return Ablation(name, read.profile, read.base, read.seeds, tuple(arms))


def _configured(read: AblationFile, changes: dict[str, Any], earlier: Sequence[Arm]) -> RunConfig:
    """An arm's whole configuration, checked. What data and base model point at is looked at once for all arms that leave them alone."""
    config = load_config(read.profile, read.base | changes)
    for seed in read.seeds:
        load_config(read.profile, read.base | changes | {SEED: seed})
    like = next((arm.config for arm in earlier if _only_trains(arm.changes)), None)
    if like and _only_trains(changes):
        return config.model_copy(update={"data": like.data, "base_model": like.base_model})
    return resolve(config, quantizes=False)


def _only_trains(changes: Mapping[str, Any]) -> bool:
    return all(name.startswith("train.") for name in changes)


def _explained(path: Path, error: ValidationError) -> UserError:
    """The first problem of a file's shape."""
    first = error.errors()[0]
    fields = list(AblationFile.model_fields) if first["type"] in ("extra_forbidden", "missing", "model_type") else None
    where = f"{path}:{line_of(path, first['loc'])}: {'.'.join(map(str, first['loc'])) or 'file'}"
    return UserError(where, None, first["msg"].removeprefix("Value error, "), allowed=fields)


def _check_changes(path: Path, location: tuple[str, ...], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        where = f"{path}:{line_of(path, (*location, name))}: {'.'.join(location)}"
        if name == SEED:
            raise UserError(where, name, "is given by `seeds`", mend="Leave it out")
        if name == "data.teacher" and value != NO_TEACHER:
            raise UserError(
                where, value, "an ablation asks no teacher", mend="Leave it out; a run with a teacher keeps its lessons for data.extra"
            )
        if name.partition(".")[0] not in PARTS or "." not in name:
            raise UserError(where, name, "is nothing an ablation runs", allowed=[f"{part}.<field>" for part in PARTS])


def _at(path: Path, location: tuple[str, ...], error: UserError) -> UserError:
    """The same error, with the file and the arm in front."""
    return UserError(f"{path}:{line_of(path, location)}: {'.'.join(location)}", None, str(error))


def figures(adapter: Manifest) -> dict[str, float]:
    """What MLflow gets of one training: the metrics that are there, and its seconds if it was not interrupted."""
    found = {name: float(adapter.metrics[name]) for name in METRICS if adapter.metrics.get(name) is not None}
    return found if adapter.metrics.get("resumed_from_step") else {**found, "wall_s": adapter.wall_s}


def table(ablation: Ablation, outcomes: Sequence[Outcome]) -> str:
    """The ablation as Markdown: a row for each arm, with the mean over its seeds and their range."""
    measured = [figures(adapter) for outcome in outcomes for adapter in outcome.adapters]
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("validation_exact_match", "exact match", lambda value: f"{value:.1%}"),
        ("validation_loss", "loss", lambda value: f"{value:.4f}"),
        ("tokens_per_s", "tokens/s", lambda value: f"{value:.0f}"),
        ("wall_s", "minutes", lambda value: f"{value / 60:.1f}"),
    ]
    shown = [column for column in columns if any(column[0] in found for found in measured)]
    heads = ["arm", "changes", "rows", *(head for _, head, _ in shown)]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    first = next((o.dataset for o in outcomes if o.dataset), None)
    for outcome in outcomes:
        other = "*" if first and outcome.dataset and _validation(outcome.dataset) != _validation(first) else ""
        changes = ", ".join(f"`{name}={_value(value)}`" for name, value in outcome.arm.changes.items()) or "nothing"
        cells = [escape_markdown(outcome.arm.name) + other, changes, _rows(outcome)]
        cells += [_mean_and_range([f[name] for f in map(figures, outcome.adapters) if name in f], form) for name, _, form in shown]
        lines.append(f"| {' | '.join(cells)} |")
    problems = [
        f"- {escape_markdown(outcome.arm.name)}: {escape_markdown(problem)}" for outcome in outcomes for problem in outcome.problems
    ]
    return (
        "\n".join(
            [f"# Ablation {ablation.name}", "", _introduction(ablation, outcomes), "", *lines, *([""] if problems else []), *problems]
        )
        + "\n"
    )


def _introduction(ablation: Ablation, outcomes: Sequence[Outcome]) -> str:
    base = ", ".join(f"`{name}={_value(value)}`" for name, value in ablation.base.items())
    machines = sorted({adapter.hardware for outcome in outcomes for adapter in outcome.adapters})
    sentences = [
        f"Profile `{ablation.profile}`{f' with {base}' if base else ''}; seeds {', '.join(map(str, ablation.seeds))}.",
        "Figures are of the validation rows: the mean over seeds, and their range in brackets.",
        f"Trained on {'; '.join(machines).replace('|', ', ')}." if machines else "",
    ]
    counted = {outcome.dataset.metrics["counts"]["validation"] for outcome in outcomes if outcome.dataset}
    if len({_validation(outcome.dataset) for outcome in outcomes if outcome.dataset}) > 1:
        sentences.append("An arm with * has other validation rows than the first, so its figures compare less well.")
    elif counted:
        sentences.append(f"All arms have the same {counted.pop()} validation rows.")
    if (
        len(
            {
                canonical_json([o.arm.config.base_model.model_dump(mode="json"), o.arm.config.vocabulary.model_dump(mode="json")])
                for o in outcomes
            }
        )
        > 1
    ):
        sentences.append("Arms differ in base model or vocabulary: a loss per token says nothing between those, exact match does.")
    return " ".join(filter(None, sentences))


def _validation(dataset: Manifest) -> str:
    return dataset.files["validation.jsonl"].sha256


def _rows(outcome: Outcome) -> str:
    counts = sorted({adapter.metrics["examples"] for adapter in outcome.adapters})
    return " to ".join(f"{count:,}" for count in (counts[:1] + counts[-1:] if len(counts) > 1 else counts))


def _mean_and_range(values: list[float], form: Callable[[float], str]) -> str:
    if len(values) < 2:
        return form(values[0]) if values else ""
    return f"{form(statistics.mean(values))} ({form(min(values))} to {form(max(values))})"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
