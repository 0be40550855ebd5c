"""A lock between hosts that share nothing but MLflow's tags."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from tasks.core.claims import Claim

pytestmark = pytest.mark.fast
TAG = "cartwright.promoting"


class Tags:
    """What MLflow does with the tags of a registered model, which it writes a moment after it was asked."""

    def __init__(self, delay_s: float = 0.02) -> None:
        self.tags: dict[str, str] = {}
        self.delay_s = delay_s

    def get_registered_model(self, name: str) -> SimpleNamespace:
        time.sleep(self.delay_s)
        return SimpleNamespace(tags=dict(self.tags))

    def set_registered_model_tag(self, name: str, tag: str, value: str) -> None:
        time.sleep(self.delay_s)
        self.tags[tag] = value

    def delete_registered_model_tag(self, name: str, tag: str) -> None:
        del self.tags[tag]


class Unique(Tags):
    """As a database does that two make the same tag in at once: it has room for one, and the other hears of an error."""

    def set_registered_model_tag(self, name: str, tag: str, value: str) -> None:
        time.sleep(self.delay_s)
        if self.tags.setdefault(tag, value) != value:
            raise RuntimeError("UNIQUE constraint failed")


@pytest.mark.parametrize("kind", [Tags, Unique])
@pytest.mark.slow
def test_hosts_that_claim_at_once_have_it_one_after_the_other(kind: type[Tags]) -> None:
    tags, inside, most = kind(), [], []

    def hold(owner: str) -> None:
        with Claim(tags, "m", owner, settle_s=0.2) as claim:
            inside.append(owner)
            most.append(len(inside))
            time.sleep(0.05)
            assert claim.holds()
            inside.remove(owner)

    hosts = [threading.Thread(target=hold, args=(f"host-{number}",)) for number in range(4)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join()
    assert most == [1, 1, 1, 1] and not tags.tags


def test_a_claim_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = Tags()

    def fails(*_: str) -> None:
        raise RuntimeError("no such table")

    monkeypatch.setattr(tags, "set_registered_model_tag", fails)
    for left in ({}, {TAG: "me dead"}, {TAG: "other dead"}):  # none, one's own, and another's that may be taken over
        tags.tags = dict(left)
        with pytest.raises(RuntimeError, match="no such table"), Claim(tags, "m", "me", settle_s=0.05, abandoned_s=0.1):
            pass


def test_a_claim_of_a_dead_host_is_waited_for_and_ones_own_is_not() -> None:
    tags = Tags(0.0)
    tags.tags[TAG] = "other:/home 1"
    started = time.monotonic()
    with Claim(tags, "m", "me", settle_s=0.05, abandoned_s=0.5):
        assert time.monotonic() - started > 0.5
    tags.tags[TAG] = "me:/home 1"  # of a run that was killed; the home's own lock says that nobody has it
    with Claim(tags, "m", "me:/home", settle_s=0.05, abandoned_s=60.0) as claim:
        assert claim.holds()
        tags.tags[TAG] = "other:/home 2"
        assert not claim.holds()
    assert tags.tags == {TAG: "other:/home 2"}


@pytest.mark.slow
def test_a_claim_that_changes_hands_is_not_taken_for_abandoned() -> None:
    tags = Tags(0.0)
    over = threading.Event()

    def busy() -> None:
        for number in range(20):
            tags.tags[TAG] = f"other:/home {number}"
            time.sleep(0.05)
        del tags.tags[TAG]
        over.set()

    threading.Thread(target=busy).start()
    with Claim(tags, "m", "me", settle_s=0.02, abandoned_s=0.4):
        assert over.is_set()
