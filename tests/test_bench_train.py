"""The comparison with another trainer: both are given the same, and tokens are counted alike."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

from docs import bench_train
from docs.bench_train_arms import Counted, trl_settings
from tasks.domain.errors import UserError
from tasks.qlora import FinetuneConfig, training_settings

pytestmark = pytest.mark.fast
CONFIG = FinetuneConfig(precision="fp32", batch_size=16, max_length=300)
# What both trainers take from the config, and what is only how ours computes the same.
SETTINGS = {"precision", "epochs", "batch_size", "learning_rate", "schedule", "warmup_ratio", "seed"}
BUILT = {"method", "rank", "alpha", "dropout", "lora_plus_ratio", "adam_beta2", "weight_decay"}  # by the stage's own functions
OURS_ALONE = {"checkpoints", "unpack", "compile", "workers", "tokens_at_a_time"}
OFF = {"finish_in_16bit": 0, "intent_weight": 1}  # which TRL has not


@pytest.mark.slow
def test_every_field_of_the_config_is_for_both_trainers_or_says_only_how_ours_computes() -> None:
    assert set(FinetuneConfig.model_fields) == SETTINGS | BUILT | OURS_ALONE | set(OFF) | {"max_length"}
    compared = bench_train.comparison(argparse.Namespace(rows=128, validation=144, batch=16)).train
    assert {name: getattr(compared, name) for name in OFF} == OFF


@pytest.mark.parametrize("arm", ["trl", "trl-packed", "trl-defaults"])
def test_the_other_trainer_is_given_our_settings(arm: str) -> None:
    given = trl_settings(arm, CONFIG, 320, 27.3, "cpu")
    ours = training_settings(CONFIG, 320, "cpu")
    assert ours["max_steps"] == 20 and ours["warmup_steps"] == 1 and not ours["bf16"]
    packed = arm == "trl-packed"
    assert {name for name, value in ours.items() if given[name] != value} == ({"per_device_train_batch_size"} if packed else set())
    # A packed row holds what a batch of ours holds: 16 rows of 27.3 tokens, and 2% more.
    assert (given["per_device_train_batch_size"], given["max_length"]) == ((1, 446) if packed else (16, 300))
    assert given["completion_only_loss"] and given.get("gradient_checkpointing", True) == (arm == "trl-defaults")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 2}, {"batch_size": 8}, {"learning_rate": 1e-3}, {"schedule": "linear"}, {"warmup_ratio": 0.5}, {"seed": 8},
        {"precision": "bf16"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_changed_setting_changes_both(change: dict[str, Any]) -> None:
    changed = CONFIG.model_copy(update=change)
    assert set(change) <= SETTINGS
    assert training_settings(changed, 320, "cpu") != training_settings(CONFIG, 320, "cpu")
    for arm in ("trl", "trl-defaults"):
        given = trl_settings(arm, changed, 320, 27.3, "cpu")
        assert {name: given[name] for name in training_settings(changed, 320, "cpu")} == training_settings(changed, 320, "cpu")


def test_tokens_are_counted_without_padding_and_padding_beside_them() -> None:
    def collate(lengths: list[int]) -> dict[str, Any]:
        mask = np.arange(12) < np.array(lengths)[:, None]
        return {"input_ids": np.full(mask.shape, 7), "attention_mask": mask.astype(int)}

    counted = Counted(collate)
    assert counted([5, 7, 9])["attention_mask"].sum() == 21
    counted([12])
    assert counted.batches == [(21, 36), (12, 12)]
    packed = Counted(lambda tokens: {"input_ids": np.zeros((1, tokens))})  # a packed batch has no mask, and nothing to mask
    packed(10)
    assert packed.batches == [(10, 10)]
    line = Counted(collate, step=16)  # padded for the way, and computed without
    line([5, 7, 9])
    assert line.batches == [(21, 32)]


def test_speed_is_of_the_steps_after_the_warm_up() -> None:
    outcome = {"ends": [0.0, 60.0, 62.0, 64.0], "cpu": [5.0, 115.0, 119.0, 123.0], "batches": [[500, 600], [100, 120], [300, 480]]}
    assert bench_train.tokens_per_s(outcome, 1) == pytest.approx(400 / 4)
    assert bench_train.tokens_per_s(outcome, 0) == pytest.approx(900 / 64)
    assert bench_train.tokens_per_s(outcome, 1, "cpu") == pytest.approx(400 / 8)
    assert bench_train.ratio({**outcome, "ends": [0.0, 1.0, 2.0, 3.0]}, outcome, 1, "ends") == pytest.approx(2)
    assert bench_train.padding(outcome) == pytest.approx(0.25)
    with pytest.raises(SystemExit, match="2 batches were counted and 3 steps timed"):
        bench_train.tokens_per_s({**outcome, "batches": outcome["batches"][1:]}, 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arms": ["ours", "axolotl"]}, "--arms = 'axolotl': is unknown. Allowed: ours, trl, trl-packed, trl-defaults"),
        ({"rows": 100}, "--rows = 100: leaves too few steps after the warm-up: must be 128 or more"),
        ({"repeats": 0}, "--repeats = 0: must be 1 or more"),
        ({"arms": ["trl"]}, "needs the package trl. `make bench-train` installs it"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    usual = {"rows": 128, "validation": 1, "batch": 16, "repeats": 1, "warmup": 3, "arms": ["ours"]}
    bench_train.check(argparse.Namespace(**usual))
    with pytest.raises(UserError) as error:
        bench_train.check(argparse.Namespace(**{**usual, **change}))
    assert words in str(error.value)
