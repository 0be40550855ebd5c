"""Processes that share a batch: together they compute the gradient of the whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from tasks.gradient_workers import even_order  # noqa: E402
from tasks.unpadded import PLAIN  # noqa: E402

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
    from tasks.gradient_workers import GradientWorkers
    from tasks.qlora import FinetuneConfig, build_model

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


@pytest.mark.parametrize(
    ("tokens", "most_tokens", "sizes"),
    [
        ([20] * 7, 64, [3, 3, 1]),
        ([30, 30, 10, 60, 5], 64, [1, 2, 2]),
        ([9, 9], 8, [1, 1]),
        ([9, 9], 800, [2]),
        ([60, *[2] * 9], 64, [2, 8]),  # with padding the first would be 600
        ([], 64, []),
    ],
)
def test_a_batch_in_parts_is_the_whole_batch(tokens: list[int], most_tokens: int, sizes: list[int]) -> None:
    from tasks.completions import lengths, parts

    whole = {name: torch.arange(len(tokens) * 60).reshape(-1, 60) for name in ("input_ids", "labels")}
    whole["attention_mask"] = torch.arange(60)[None] < torch.tensor(tokens, dtype=torch.long)[:, None]
    found = list(parts(whole, most_tokens))
    assert [len(part["labels"]) for part in found] == sizes
    order = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)
    for part, size in zip(found, sizes, strict=True):
        rows, order = order[:size], order[size:]
        width = -(-tokens[rows[0]] // 4) * 4
        assert lengths(part) == [tokens[row] for row in rows]
        assert all(torch.equal(part[name], tensor[rows, :width]) for name, tensor in whole.items())
    assert not order


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_shares_of_a_batch_have_about_as_many_tokens(shares: int) -> None:
    lengths = [15 + 7 * row % 40 for row in range(31)]
    order = even_order(lengths, shares)
    assert sorted(order) == list(range(31))
    tokens = [sum(lengths[row] for row in order[number::shares]) for number in range(shares)]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_in_a_line_are_learnt_like_each_by_itself(base: Path, compiled: bool) -> None:
    """Loss and gradient of a batch of rows of different lengths, and those of the same rows one at a time by the model as transformers has it."""
    from tasks.completions import IGNORED, completion_loss, completion_matches, pad
    from tasks.qlora import FinetuneConfig, build_model, can_compile

    if compiled and not can_compile():
        pytest.skip("nothing to compile with")
    rows = [list(range(5, 12 + 3 * number)) for number in range(6)]
    batch = pad([{"input_ids": row, "labels": [IGNORED] * 4 + row[4:]} for row in rows], 0)
    found = {}
    for way in ("line", "rows"):
        model = build_model(FinetuneConfig(**{**CONFIG, "compile": compiled and way == "line"}), base)
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.05)
        if way == "line":
            loss = completion_loss(model, batch)
            assert float(completion_matches(model, batch)[0].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        else:
            model.get_base_model().set_attn_implementation("eager")
            alone = [(model(input_ids=torch.tensor([row])).logits[0, 3:-1], torch.tensor(row[4:])) for row in rows]
            loss = torch.nn.functional.cross_entropy(torch.cat([logits for logits, _ in alone]), torch.cat([labels for _, labels in alone]))
        loss.backward()
        found[way] = loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad])
    for ours, theirs in zip(found["line"], found["rows"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    **{kind: (kind, True, {}) for kind in PLAIN},
    "gemma": ("gemma", True, {"head_dim": 8}),
    "granite": ("granite", True, {"logits_scaling": 4.0}),
    "cohere": ("cohere", False, {"logit_scale": 0.3}),
    "gemma3": ("gemma3_text", False, {"head_dim": 8, "final_logit_softcapping": 0.1}),
    "phi3, window": ("phi3", False, {"sliding_window": 6}),  # some rows are longer than that
    "lfm2": ("lfm2", False, {"layer_types": ["conv", "full_attention"]}),  # a convolution goes from row to row
}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_learns_a_batch_as_its_rows_alone(kind: str, kernel: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.completions import IGNORED, completion_loss, pad
    from tasks.unpadded import let_in_line, takes_lines

    torch.manual_seed(3)
    model_type, in_line, more = KINDS[kind]
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, **sizes, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).float().eval()
    rows = [list(range(5, 12 + 3 * number)) for number in range(6)]
    alone = [(model(input_ids=torch.tensor([row])).logits[0, 3:-1], torch.tensor(row[4:])) for row in rows]
    expected = torch.nn.functional.cross_entropy(torch.cat([logits for logits, _ in alone]), torch.cat([labels for _, labels in alone]))
    let_in_line(model)
    assert takes_lines(model, 24) == in_line
    examples = [{"input_ids": row, "labels": [IGNORED] * 4 + row[4:]} for row in rows]
    torch.testing.assert_close(completion_loss(model, pad(examples, 0)), expected, rtol=1e-4, atol=1e-6)
    weighted = pad([{**example, "weights": [0.0] * 4 + [3.0] + [1.0] * (len(example["labels"]) - 5)} for example in examples], 0)
    first = torch.stack([torch.nn.functional.cross_entropy(logits[0], labels[0]) for logits, labels in alone])
    more = 2 * first.sum() / sum(len(labels) for _, labels in alone)  # the first token of each answer counts three times
    torch.testing.assert_close(completion_loss(model, weighted), expected + more, rtol=1e-4, atol=1e-6)


def test_the_order_of_rows_is_random_and_the_same_for_a_seed() -> None:
    from tasks.completions import shuffled_order

    assert sorted(shuffled_order(99, 1)) == list(range(99)) != shuffled_order(99, 1)
    assert shuffled_order(99, 1) == shuffled_order(99, 1) != shuffled_order(99, 2)


def test_workers_that_never_got_a_model_end_when_told_to(base: Path) -> None:
    from tasks.gradient_workers import GradientWorkers
    from tasks.qlora import FinetuneConfig

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
