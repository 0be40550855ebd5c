"""Processes that share a batch: together they compute the gradient of the whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

CONFIG = {"method": "lora", "precision": "fp32", "rank": 4, "compile": False, "tokens_at_a_time": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tasks.base_model import TINY, BaseModelConfig, base_model

    folder = tmp_path_factory.mktemp("base")
    base_model.function(BaseModelConfig(source=TINY), {}, folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> Iterator[tuple[Any, Any]]:
    """A model whose adapter is no longer zero, and a pool of two more processes."""
    from tasks.finetune import FinetuneConfig, build_model
    from tasks.gradient_workers import GradientWorkers

    config = FinetuneConfig(**CONFIG)
    pool = GradientWorkers(2, config, base, autocast=False)
    model = build_model(config, base)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.05)
    pool.follow(model)
    yield model, pool
    pool.close()


def batch(rows: int) -> dict[str, Any]:
    from tasks.completions import IGNORED, pad

    examples = [
        {"input_ids": list(range(5, 12 + row)), "labels": [IGNORED] * 4 + list(range(9, 12 + row)), "length": 7 + row}
        for row in range(rows)
    ]
    return pad(examples, 0)


@pytest.mark.parametrize("rows", [17, 5, 1])
def test_gradients_and_loss_are_those_of_the_whole_batch(trained: tuple[Any, Any], rows: int) -> None:
    from tasks.completions import completion_loss, parts

    model, pool = trained
    inputs = batch(rows)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    whole = completion_loss(model, inputs)
    whole.backward()
    expected = [parameter.grad.clone() for parameter in parameters]
    for step in range(2):  # the second time, gradients of the first must be gone
        model.zero_grad()
        mine = pool.start(inputs, int((inputs["labels"][:, 1:] >= 0).sum()))
        total = 0.0
        for part in parts(mine, 64):
            loss = completion_loss(model, part, (inputs["labels"][:, 1:] >= 0).sum())
            loss.backward()
            total += float(loss)
        total += pool.finish()
        assert total == pytest.approx(float(whole), rel=1e-5), step
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "most_tokens", "sizes"), [(17, 64, [2] * 8 + [1]), (8, 200, [8]), (3, 8, [1, 1, 1]), (0, 64, [])])
def test_a_batch_in_parts_is_the_whole_batch(rows: int, most_tokens: int, sizes: list[int]) -> None:
    from tasks.completions import parts

    whole = {name: torch.arange(rows * 24).reshape(rows, 24) for name in ("input_ids", "labels")}
    found = list(parts(whole, most_tokens))
    assert [len(part["labels"]) for part in found] == sizes
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in found] or [tensor]), tensor)


def test_batches_hold_rows_of_like_length_also_when_they_do_not_come_out_even() -> None:
    from random import Random

    from tasks.completions import bucketed_order

    lengths = [Random(3).randint(10, 60) for _ in range(10)] + [Random(i).randint(10, 60) for i in range(997)]
    order = bucketed_order(lengths, 32, 1)
    assert sorted(order) == list(range(len(lengths)))
    batches = [[lengths[row] for row in order[start : start + 32]] for start in range(0, len(order), 32)]
    assert len(batches[-1]) == len(lengths) % 32
    assert max(max(batch) - min(batch) for batch in batches) <= 6  # 1,007 rows of 51 lengths: a batch spans two or three
    first = [batch[0] for batch in batches]
    assert first != sorted(first) and order != bucketed_order(lengths, 32, 2)
    assert sorted(bucketed_order([5, 3], 32, 1)) == [0, 1]


def test_workers_that_never_got_a_model_end_when_told_to(base: Path) -> None:
    from tasks.finetune import FinetuneConfig
    from tasks.gradient_workers import GradientWorkers

    pool = GradientWorkers(1, FinetuneConfig(**CONFIG), base, autocast=False)
    assert pool.close() > 0
    assert pool._processes[0].exitcode == 0


def test_a_worker_that_is_killed_ends_training_with_a_word(trained: tuple[Any, Any]) -> None:
    from tasks.gradient_workers import WorkerError

    _, pool = trained
    inputs = batch(4)
    os.kill(pool._processes[0].pid, signal.SIGKILL)
    pool._processes[0].join()
    with pytest.raises(WorkerError, match=r"train\.workers=1"):
        pool.start(inputs, 10)
        pool.finish()
