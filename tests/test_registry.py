"""The registered model's aliases: promotion that takes itself back, and rollback. A real MLflow registry in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.settings import load_settings
from tasks.core.tracking import CHAMPION, PREVIOUS, Tracker, open_parent, rollback
from tasks.domain.errors import UserError
from tasks.registered import problem_of_champion

NAME = "shop-intent"


@pytest.fixture
def tracker(home: Path) -> Tracker:
    """A registry with three versions of a model whose files are nowhere."""
    home.mkdir()
    tracker = open_parent(load_settings(), "domain/base", "key", "run", {})
    tracker.client.create_registered_model(NAME)
    for variant in ("Q8_0", "Q4_0", "Q4_1"):
        tracker.client.create_model_version(NAME, (home / variant).as_uri(), tags={"cartwright.variant": variant})
    return tracker


def aliases(tracker: Tracker) -> tuple[str | None, str | None]:
    found = [tracker.champion(NAME, alias) for alias in (CHAMPION, PREVIOUS)]
    return found[0] and found[0]["version"], found[1] and found[1]["version"]


def test_a_promotion_keeps_the_champion_before_it_and_takes_itself_back_when_the_new_one_fails(tracker: Tracker) -> None:
    assert tracker.champion("unknown") is None and aliases(tracker) == (None, None)
    assert tracker.promote(NAME, "1", lambda: "it does not load") == "it does not load"
    assert aliases(tracker) == (None, None)
    assert tracker.promote(NAME, "1", lambda: "") == "" and aliases(tracker) == ("1", None)
    seen: list[tuple[str | None, str | None]] = []
    tracker.promote(NAME, "2", lambda: seen.append(aliases(tracker)) or "")  # type: ignore[func-returns-value]
    assert seen == [("2", "1")] == [aliases(tracker)]
    tracker.promote(NAME, "3", lambda: "it answers nothing")
    assert aliases(tracker) == ("2", "1")
    promoted = tracker.champion(NAME)
    assert promoted and promoted["cartwright.promoted"] and "cartwright.promoted" not in tracker.client.get_model_version(NAME, "3").tags


def test_an_interrupted_promotion_leaves_everything_as_it_was(tracker: Tracker) -> None:
    tracker.promote(NAME, "1", lambda: "")

    def stopped() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracker.promote(NAME, "2", stopped)
    assert aliases(tracker) == ("1", None)


def test_rollback_swaps_and_says_what_it_did(tracker: Tracker) -> None:
    tracker.promote(NAME, "1", lambda: "")
    with pytest.raises(UserError, match="no version with the alias previous"):
        rollback(load_settings(), NAME)
    with pytest.raises(UserError, match="no version with the alias champion"):
        rollback(load_settings(), "unknown")
    tracker.promote(NAME, "2", lambda: "")
    now, before = rollback(load_settings(), NAME)
    assert (now["cartwright.variant"], before["cartwright.variant"]) == ("Q8_0", "Q4_0") and aliases(tracker) == ("1", "2")
    assert tracker.rolled_back(NAME, "2") and not tracker.rolled_back(NAME, "1")
    rollback(load_settings(), NAME)
    assert aliases(tracker) == ("2", "1") and tracker.rolled_back(NAME, "1") and not tracker.rolled_back(NAME, "2")


def test_a_champion_whose_files_are_gone_does_not_work(tracker: Tracker) -> None:
    tracker.promote(NAME, "1", lambda: "")
    problem = problem_of_champion(NAME)
    assert problem and "Traceback" not in problem
