"""Figures of manifests and of the report beside those of the undisturbed run. Each function says what is wrong, and nothing if all is well."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.core.flat import flatten
from tasks.core.manifests import Manifest
from tests.chaos.world import World

TOLERANCE = 0.05  # of shares of right answers and lengths of answers, where they may vary
# How long something took, where it went on from, or who did it: of stages that give the same bytes each time, what differs all the same.
OF_A_MAKING = re.compile(
    r"tokens_per_s|workers_peak_rss_mb|resumed_from_step|history"  # finetune
    r"|(teacher\.)?requests_from_log"  # teach, and synthesize of it
    r"|pid|begun|bought"  # tests.tiny_stages
)
MEASURED_COUNTS = frozenset({"prompt_tokens", "parallel"})  # of `benchmark`: all else in it is time, memory or energy
MEASURED_LENGTHS = frozenset({"completion_tokens"})
ROWS = re.compile(r"(^|\.)n$")  # of an evaluation: how many were asked
ACCURACY = re.compile(r"(^|\.)(value|intent_accuracy|json_valid|slot_f1\.\w+)$")


def metrics_like(made: Manifest, expected: Manifest, varies: bool) -> Iterator[str]:
    """An artefact's metrics are those of the undisturbed run: all but those of its making, or, where it varies, what was not measured."""
    if not varies:
        found, wanted = ({k: v for k, v in _flat(m.metrics).items() if not OF_A_MAKING.fullmatch(k)} for m in (made, expected))
        wrong = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
    else:
        found, wanted = flatten(made.metrics), flatten(expected.metrics)
        wrong = {name for name in MEASURED_COUNTS & wanted.keys() if found.get(name) != wanted[name]}
        wrong |= {name for name in MEASURED_LENGTHS & wanted.keys() if not _close(found.get(name), wanted[name])}
    for name in sorted(wrong):
        yield f"{made.kind} {made.key} has {name} {found.get(name)}, {wanted.get(name)} without the fault"


def reported(world: World) -> Iterator[str]:
    """The report has every variant of the undisturbed run's, none that failed, asked as many rows, and as many of them right, nearly."""
    report = world.latest_report()
    variants = {variant["name"]: variant for variant in report.get("variants", ())}
    for name, variant in variants.items():
        if variant.get("error"):
            yield f"the variant {name} failed: {variant['error'][-300:]}"
    for expected in world.report["variants"]:
        name, found = expected["name"], variants.get(expected["name"])
        if found is None:
            yield f"the report has no variant {name}"
        elif not found.get("error"):
            yield from (f"the variant {name} has {problem}" for problem in _quality(found["quality"], expected["quality"]))
    chosen, wanted = ((r.get("recommendation") or {}).get("cpu") for r in (report, world.report))
    if chosen != wanted:
        yield f"{chosen} is recommended, {wanted} without the fault"


def _quality(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    now, then = flatten(found), flatten(expected)
    for name in sorted(now.keys() | then.keys()):
        rows = ROWS.search(name) and now.get(name) != then.get(name)
        if rows or (ACCURACY.search(name) and not _close(now.get(name), then.get(name))):
            yield f"{name} {now.get(name)}, {then.get(name)} without the fault"


def _close(found: float | None, expected: float | None) -> bool:
    return found is not None and expected is not None and math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """By dotted name, texts and lists too."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
