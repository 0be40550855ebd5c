"""The gate: what it compares, and that too few rows never pass it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows import approval
from tasks import gate
from tasks.gate import RegisterConfig

pytestmark = pytest.mark.fast
CHAMPION = {"version": "3", "cartwright.digest": "old"}
CONFIG = RegisterConfig()
LANGUAGES = ("de", "en")
WHY = "it does not load"


def challenger(sha256: str = "new", **fidelity: Any) -> dict[str, Any]:
    return {"name": "gguf-Q4_0", "sha256": sha256, "fidelity": {"verdict": "ok", **fidelity}}


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(tmp_path: Path, split: str, mine: list[bool], theirs: list[bool]) -> tuple[Path, Path, Path]:
    """Folders of rows, in two languages by turns, and of what both models got right of them."""
    write(tmp_path / "rows", split, [{"language": LANGUAGES[n % 2]} for n in range(len(mine))])
    for name, right in (("mine", mine), ("theirs", theirs)):
        write(tmp_path / name, split, [{"correct": correct} for correct in right])
    return tmp_path / "rows", tmp_path / "mine", tmp_path / "theirs"


def test_paired_interval_against_counted_values() -> None:
    # Agresti and Min: half a row is added to each cell. (10.5 - 2.5) / 102, and 1.96 sqrt(13 - 8² / 102) / 102 on both sides.
    assert gate.paired_interval(10, 2, 100) == pytest.approx((0.01085, 0.14602), abs=1e-4)
    assert gate.paired_interval(0, 0, 100) == pytest.approx((-0.01922, 0.01922), abs=1e-4)
    assert gate.paired_interval(0, 0, 0)[0] < -0.9


@pytest.mark.parametrize(
    ("won", "lost", "n", "passed"),
    [
        (0, 0, 1000, True),
        (0, 0, 20, None),  # the same answers, and too few of them
        (30, 30, 1000, True),
        (30, 30, 200, None),
        (0, 20, 1000, False),
        (0, 15, 1000, None),
        (40, 0, 1000, True),
    ],
)
def test_a_loss_is_ruled_out_shown_or_neither(won: int, lost: int, n: int, passed: bool | None) -> None:
    mine = [True] * won + [False] * lost + [True] * (n - won - lost)
    theirs = [False] * won + [True] * lost + [True] * (n - won - lost)
    check = gate.not_inferior("test", mine, theirs, 0.02)
    assert check["passed"] is passed and check["n"] == n and check["delta"] == pytest.approx((won - lost) / n)
    assert check["low"] < check["delta"] < check["high"]


def test_test_each_language_hard_and_own_rows_are_compared_with_their_margins(tmp_path: Path) -> None:
    # As good in all, but 40 German rows are lost and 40 English ones won.
    mine = [n % 2 == 1 or n >= 80 for n in range(1200)]
    theirs = [n % 2 == 0 or n >= 80 for n in range(1200)]
    folders = asked(tmp_path, "test", mine, theirs)
    asked(tmp_path, "hard", [True] * 300, [True] * 300)
    asked(tmp_path, "own", [True] * 10, [True] * 10)
    checks = {check["group"]: check for check in gate.compare(*folders, CONFIG)}
    assert list(checks) == ["test", "test, de", "test, en", "hard", "own"]
    assert {name: check["passed"] for name, check in checks.items()} == {
        "test": True,
        "test, de": False,
        "test, en": True,
        "hard": True,
        "own": None,
    }
    margins = {"test": 0.02, "test, de": 0.05, "test, en": 0.05, "hard": 0.05, "own": 0.05}  # as the README promises
    assert {name: check["margin"] for name, check in checks.items()} == margins
    verdict = gate.judge(CONFIG, CHAMPION, challenger(), {}, list(checks.values()))
    assert verdict["verdict"] == "hold" and verdict["delta"] == 0 and -CONFIG.margin < verdict["low"] < 0
    without_german = [check for name, check in checks.items() if name != "test, de"]
    assert gate.judge(CONFIG, CHAMPION, challenger(), {}, without_german)["verdict"] == "inconclusive"  # for `own`
    passing = [check for check in without_german if check["group"] != "own"]
    assert gate.judge(CONFIG, CHAMPION, challenger(), {}, passing)["verdict"] == "promote"
    assert "cannot tell" in gate.in_markdown(gate.judge(CONFIG, CHAMPION, challenger(), {}, without_german))


def test_without_a_comparison_nothing_passes_but_the_first_model() -> None:
    assert gate.judge(CONFIG, None, challenger(), {}, WHY)["verdict"] == "promote"
    judged = gate.judge(CONFIG, CHAMPION, challenger(), {}, WHY)
    assert judged["verdict"] == "inconclusive" and WHY in judged["checks"][-1]["name"]
    known = gate.judge(CONFIG, CHAMPION, challenger("old"), {}, WHY)
    assert known["verdict"] == "hold" and known["unchanged"]
    assert gate.judge(CONFIG, CHAMPION, None, {}, WHY)["verdict"] == "hold"


def test_what_is_not_the_fine_tuned_model_or_breaks_a_limit_never_passes() -> None:
    for verdict in ("degraded", "erased", "runtime-broken", "file-broken"):
        assert gate.judge(CONFIG, None, challenger(verdict=verdict), {}, WHY)["verdict"] == "hold"
    unchecked = {**challenger(), "fidelity": None, "fidelity_reason": "no disk"}
    judged = gate.judge(CONFIG, None, unchecked, {}, WHY)
    assert judged["verdict"] == "inconclusive" and "no disk" in judged["checks"][0]["name"]
    assert gate.judge(CONFIG, None, challenger(), {"gguf-Q4_0": "its size is 99 MB"}, WHY)["verdict"] == "hold"


def test_with_promotion_off_what_would_pass_is_held() -> None:
    off = RegisterConfig(mode="off")
    verdict = gate.judge(off, None, challenger(), {}, WHY)
    assert verdict["verdict"] == "hold" and "promotion is off" in verdict["checks"][-1]["name"]
    assert gate.judge(off, CHAMPION, challenger(), {}, WHY)["verdict"] == "inconclusive"


def test_what_a_person_refuses_in_the_ui_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's own part, the question and the wait for its answer, is replaced."""
    passed = gate.judge(CONFIG, None, challenger(), {}, WHY)
    monkeypatch.setattr(approval, "suspend_flow_run", lambda **_: approval.Approval(promote=False, by="Ana", why="prices are wrong"))
    said = approval.ask(passed)
    assert said["verdict"] == "hold" and (said["by"], said["why"]) == ("Ana", "prices are wrong")
    assert said["checks"] == [*passed["checks"], {"name": "Ana refused it: prices are wrong", "passed": False}]


def test_what_a_person_rolled_back_only_a_person_promotes_again() -> None:
    verdict = gate.judge(CONFIG, None, challenger(), {}, WHY, rolled_back="2026-01-01")
    assert verdict["verdict"] == "hold" and "rolled back at 2026-01-01" in verdict["checks"][-1]["name"]
