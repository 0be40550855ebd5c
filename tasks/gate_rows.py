"""Stage `gate_rows`: the rows on which challenger and champion are compared, more of them than every variant is asked."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.core import progress
from tasks.core.rows import rows_of
from tasks.core.stage import stage
from tasks.domain.labelled import read_labelled
from tasks.domain.spec import Spec
from tasks.domain.utterances import Split
from tasks.gate import RegisterConfig
from tasks.leakage import Admission, NearDuplicates, batched
from tasks.own_files import paths_in
from tasks.synthesize import BLOCK, SynthesizeConfig, check_domain, distinct_rows, make_generator

SPLITS: tuple[Split, ...] = ("test", "hard")


class GateRowsConfig(SynthesizeConfig):
    """The data set's config with other numbers of rows, and the digests of the team's own files."""

    own_sha256: tuple[str, ...] = Field((), description="Digests of labelled JSONL files of the team")


def gate_rows_config(data: SynthesizeConfig, registry: RegisterConfig) -> GateRowsConfig:
    """What to ask challenger and champion of a run."""
    rows = {"test_rows": registry.test_rows, "hard_rows": registry.hard_rows}
    return GateRowsConfig.model_validate(data.model_dump() | rows | {"own_sha256": registry.own_rows_sha256})


@stage("gate_rows", version=3, libraries=("rapidfuzz", "scikit-learn"))
def gate_rows(config: GateRowsConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Write `test.jsonl` and `hard.jsonl` of unseen products and, where the team has rows of its own, `own.jsonl`.

    They depend on the domain and the seed, so they stay the same from one retraining to the next. What is in the challenger's
    training data, or nearly, is left out and counted; products of `test` are in no model's, whatever its seed, but for those that a team's own rows name.

    Args:
        inputs: `dataset`; and `own`, of the stage `own_files`, if the config has such files.

    Raises:
        UserError: the domain is not the one the run began with.
    """
    generator = make_generator(config)
    check_domain(config.domain, config.domain_sha256)
    admission = Admission()
    rows: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        drawn = distinct_rows(generator, split, config.rows(split), admission)
        rows[split] = list(progress.track(drawn, config.rows(split), split))
        admission.hold_out(rows[split])
    if config.own_sha256:
        rows["own"], admission.rejected["own: cannot be used"] = _own_rows(paths_in(inputs["own"], config.own_sha256), generator.spec)
    learnt = _learnt(rows, inputs["dataset"] / "train.jsonl")
    for name, made in rows.items():
        kept = [row for number, row in enumerate(made) if number not in learnt[name]]
        admission.rejected[f"{name}: in the training data"] += len(made) - len(kept)
        with (out_dir / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for n, row in enumerate(kept):
                number = {"id": f"{name}-{n}"}  # in the place of a team's own, which need not be unique: models are compared by it
                file.write(json.dumps(number | row | number, ensure_ascii=False) + "\n")
        rows[name] = kept
    shutil.copy(inputs["dataset"] / "spec.yaml", out_dir)
    return {"rows": {split: len(kept) for split, kept in rows.items()}, "rejected": dict(Counter(+admission.rejected))}


def _own_rows(paths: list[Path], spec: Spec) -> tuple[list[dict[str, Any]], int]:
    """Rows of the team's files, and how many lines cannot be used."""
    found, bad = [], 0
    for path in paths:
        rows, problems = read_labelled(path, spec)
        found += [{"language": "?", **row} for row in rows]
        bad += len(problems)
    return found, bad


def _learnt(rows: Mapping[str, list[dict[str, Any]]], train: Path) -> dict[str, set[int]]:
    """The numbers of those rows of each split that are nearly a training row."""
    known = {split: NearDuplicates(row["text"] for row in made) for split, made in rows.items()}
    learnt: dict[str, set[int]] = {split: set() for split in rows}
    for part in batched(rows_of(train), BLOCK):
        texts = [row["text"] for row in part]
        for split, index in known.items():
            learnt[split].update(number for _, number in index.pairs(texts))
    return learnt
