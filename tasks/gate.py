"""The gate: whether the model that would be deployed may take the champion's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from tasks.core.markdown import escape_markdown
from tasks.core.rows import rows_of
from tasks.core.stage import StageConfig
from tasks.paired import paired_interval

Verdict = Literal["promote", "hold", "inconclusive"]
PROMOTION = "cartwright-promotion"  # the concurrency limit of a Prefect server that lets one promotion go on at a time
PromotionMode = Literal["auto", "manual", "off"]


class RegisterConfig(StageConfig):
    """Where the recommended model goes, and what it must not lose to take the champion's place."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"own_rows"})
    name: str = Field("shop-intent", pattern=r"^\w[\w.-]*$", description="Name of the registered model")
    mode: PromotionMode = Field(
        "auto",
        description="What passes the gate becomes champion at once (auto), once a person agrees (manual), or not at all (off)",
    )
    margin: float = Field(
        0.02, gt=0, le=1, description="Loss of exact match on `test` that must be ruled out, as a share: 0.01 is one percentage point"
    )
    group_margin: float = Field(
        0.05, gt=0, le=1, description="The same on `hard`, on each language and on rows of your own, of which there are fewer"
    )
    test_rows: int = Field(3000, ge=12, le=100_000, description="Rows of the same kind as `test` that both models are asked")
    hard_rows: int = Field(900, ge=12, le=100_000, description="Rows of the same kind as `hard` that both models are asked")
    own_rows: tuple[str, ...] = Field((), description="Labelled JSONL files of your own that both models are asked too")
    own_rows_sha256: tuple[str, ...] = Field((), description="Digests of these files; filled in")


def not_inferior(name: str, mine: Sequence[bool], theirs: Sequence[bool], margin: float) -> dict[str, Any]:
    """Whether a loss of more than `margin` is ruled out on some rows.

    Returns:
        A check: `passed` is True if the lower bound of the interval is above minus the margin, False if the loss is as large as that,
        None if there are too few rows to tell.
    """
    won = sum(a and not b for a, b in zip(mine, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(mine, theirs, strict=True))
    n = len(mine)
    delta = (won - lost) / n if n else 0.0
    low, high = paired_interval(won, lost, n)
    passed = True if low > -margin else False if delta <= -margin else None
    words = f"{name}: {100 * delta:+.1f} points on {n} rows, at worst {100 * low:+.1f}; more than {-100 * margin:g} wanted"
    return {"name": words, "group": name, "passed": passed, "delta": delta, "low": low, "high": high, "n": n, "margin": margin}


def compare(rows: Path, mine: Path, theirs: Path, config: RegisterConfig) -> list[dict[str, Any]]:
    """One check for `test`, for each language of it, for `hard`, and for the team's own rows.

    Args:
        rows: folder of the stage `gate_rows`.
        mine, theirs: folders of the evaluations of challenger and champion on them.
    """
    checks = []
    for split in ("test", "hard", "own"):
        if not (rows / f"{split}.jsonl").exists():
            continue
        asked, right, was_right = ([*rows_of(folder / f"{split}.jsonl")] for folder in (rows, mine, theirs))
        mine_right, theirs_right = [row["correct"] for row in right], [row["correct"] for row in was_right]
        margin = config.margin if split == "test" else config.group_margin
        checks.append(not_inferior(split, mine_right, theirs_right, margin))
        if split != "test":
            continue
        for language in sorted({row["language"] for row in asked}):
            chosen = [number for number, row in enumerate(asked) if row["language"] == language]
            mine_here, theirs_here = ([found[number] for number in chosen] for found in (mine_right, theirs_right))
            checks.append(not_inferior(f"test, {language}", mine_here, theirs_here, config.group_margin))
    return checks


def verdict_of(checks: Iterable[Mapping[str, Any]]) -> Verdict:
    """`promote` only if every check passed; `inconclusive` if none failed and some could not tell."""
    found = [check["passed"] for check in checks]
    return "hold" if False in found else "inconclusive" if None in found else "promote"


def judge(
    config: RegisterConfig,
    champion: Mapping[str, str] | None,
    challenger: Mapping[str, Any] | None,
    excluded: Mapping[str, str],
    compared: Sequence[dict[str, Any]] | str,
    rolled_back: str | None = None,
) -> dict[str, Any]:
    """The gate's verdict on a recommended variant.

    Args:
        champion: version and tags of the champion, None if there is none.
        challenger: the recommended variant as `decision.json` describes it, None if none was recommended.
        excluded: variants that break a limit of `decide`, with the reason.
        compared: checks of `compare`, or why there are none.
        rolled_back: when the challenger was taken out of service by a person; None if it was not.

    Returns:
        The `gate` of the report: `verdict`, `champion`, `challenger`, `delta`, `low`, `margin` and `checks`.
    """
    result: dict[str, Any] = {
        "verdict": "hold",
        "champion": f"version {champion['version']}" if champion else None,
        "challenger": challenger["name"] if challenger else None,
        "challenger_sha256": challenger["sha256"] if challenger else None,
        "unchanged": False,
        "delta": None,
        "low": None,
        "margin": config.margin,
        "mode": config.mode,
        "checks": [],
    }
    if not challenger:
        return {**result, "checks": [_said("no variant was recommended", False)]}
    if champion and champion.get("cartwright.digest") == challenger["sha256"]:
        return {**result, "unchanged": True, "checks": [_said("the challenger is the champion already", False)]}
    checks = [_fidelity(challenger), _limits(challenger, excluded)]
    if not champion:
        checks.append(_said("there was no champion yet", True))
    elif isinstance(compared, str):
        checks.append(_said(f"not compared with the champion: {compared}", None))
    else:
        checks += compared
        of_all = next(check for check in compared if check["group"] == "test")
        result |= {"delta": of_all["delta"], "low": of_all["low"]}
    if rolled_back:
        checks.append(
            _said(f"it was rolled back at {rolled_back}; only a person (`cartwright promote`) makes it the champion again", False)
        )
    verdict = {**result, "verdict": verdict_of(checks), "checks": checks}
    if config.mode == "off" and verdict["verdict"] == "promote":
        return hold(verdict, "promotion is off (registry.mode); `cartwright promote` makes it the champion")
    return verdict


def _fidelity(challenger: Mapping[str, Any]) -> dict[str, Any]:
    found = challenger["fidelity"]
    if not found:
        return _said(f"fidelity: {challenger.get('fidelity_reason') or 'not measured'}", None)
    return _said(f"fidelity: {found['verdict']}", found["verdict"] == "ok")


def _limits(challenger: Mapping[str, Any], excluded: Mapping[str, str]) -> dict[str, Any]:
    why = excluded.get(challenger["name"])
    return _said(f"limits: {why}" if why else "size, memory, latency and price within the limits", not why)


def _said(name: str, passed: bool | None) -> dict[str, Any]:
    return {"name": name, "passed": passed}


def hold(verdict: dict[str, Any], why: str) -> dict[str, Any]:
    """A verdict to promote, taken back for a reason."""
    return {**verdict, "verdict": "hold", "checks": [*verdict["checks"], _said(why, False)]}


def in_markdown(verdict: Mapping[str, Any]) -> str:
    """A verdict as a table, for a person who is to decide."""
    mark = {True: "yes", False: "no", None: "cannot tell"}
    lines = [f"| {escape_markdown(check['name'])} | {mark[check['passed']]} |" for check in verdict["checks"]]
    names = [escape_markdown(verdict[name] or f"no {name}") for name in ("challenger", "champion")]
    head = f"{names[0]} against {names[1]}: **{verdict['verdict']}**"
    return "\n".join([head, "", "| check | passed |", "| --- | --- |", *lines])
