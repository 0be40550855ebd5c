"""What is the same bytes each time it is made, by what the stages of a run declare: the `reproducibility` of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def reproducibility(stages: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which kinds of artefacts of a run are reproducible, why others are not, and by how much those varied that were measured again.

    Args:
        stages: of the report; `kind`, and `varies` as `Stage.varies`.
        variants: of the report. `performance.spread` is (largest - smallest) / median over several runs.

    Returns:
        `same`: kinds in alphabetical order. `varies`: reasons by kind. `spread`: by figure the largest share of all variants, and which
        variant that is; None, with `spread_reason`, where everything was measured once.
    """
    kinds = {stage["kind"]: stage["varies"] for stage in stages if stage.get("kind")}
    spread: dict[str, dict[str, Any]] = {}
    for variant in variants:
        for figure, share in ((variant.get("performance") or {}).get("spread") or {}).items():
            if figure not in spread or share > spread[figure]["share"]:
                spread[figure] = {"share": share, "variant": variant["name"]}
    return {
        "same": sorted(kind for kind, reason in kinds.items() if not reason),
        "varies": {kind: kinds[kind] for kind in sorted(kinds) if kinds[kind]},
        "spread": spread or None,
        **({} if spread else {"spread_reason": "each variant was measured once; benchmark.runs measures it more often"}),
    }


def sentences(found: Mapping[str, Any] | None) -> list[str]:
    """The `reproducibility` of a report in words; nothing without one."""
    if not found:
        return []
    told = [
        f"The same bytes each time, from the same inputs, versions, kind of machine and number of cores (compared on CPUs, never on a GPU): {', '.join(found['same'])}."
    ]
    told += [f"{kind} is not: {reason}." for kind, reason in found["varies"].items()]
    for figure, most in (found["spread"] or {}).items():
        told.append(f"{figure} of repeated measurements lay up to {most['share']:.1%} of the median apart ({most['variant']}).")
    if not found["spread"]:
        told.append(f"By how much measurements vary was not measured: {found['spread_reason']}.")
    return told
