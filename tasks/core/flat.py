"""Nested figures and settings as MLflow takes them: flat, by dotted name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

TAG = "cartwright."  # our tags begin so
IN_REPORT_ONLY = re.compile(r"\b(confusion\.|by_(intent|language|slot|source)\..*\.(low|high|n)$)")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested mapping by dotted name: what MLflow takes as metrics. Lists and texts are left out."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = float(value)
    return flat


def comparable(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures that runs are compared by. Cells of the confusion matrix and the bounds of small groups are left to `report.json`."""
    return {name: value for name, value in figures.items() if not IN_REPORT_ONLY.search(name)}


def as_params(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A config as MLflow parameters, nested fields by dotted name; at most 6,000 characters each."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= as_params(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[f"{prefix}{name}"] = text[:6000]
    return flat


def metric_name(name: str) -> str:
    """MLflow allows letters, digits, `_ - . : /` and spaces in the name of a metric."""
    return "".join(char if char.isalnum() or char in "_-. :/" else "_" for char in name)
