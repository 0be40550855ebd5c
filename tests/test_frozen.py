"""Frozen layers in 8-bit integers: their products, and the gradients that pass through them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")  # bound late: the fast tests do not need it


def layers(rows: int = 48, columns: int = 64) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    from tasks.frozen import Int8Linear

    torch.manual_seed(1)
    exact = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    rounded = Int8Linear(columns, rows, bias=False, dtype=torch.bfloat16)
    rounded.weight = torch.nn.Parameter(exact.weight.detach().clone(), requires_grad=False)
    rounded.round_weight()
    return exact, rounded


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_products_and_gradients_are_those_of_the_exact_layer() -> None:
    exact, rounded = layers()
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    upstream = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    gradients = []
    for layer in (exact, rounded):
        mine = x.clone().requires_grad_()
        y = layer(mine)
        assert y.shape == (2, 5, 48) and y.dtype == torch.bfloat16
        y.backward(upstream)
        gradients.append(mine.grad)
    assert relative(rounded(x), exact(x)) < 0.02
    assert relative(gradients[1], gradients[0]) < 0.02


def test_tokens_of_very_different_size_keep_their_own_scale() -> None:
    exact, rounded = layers()
    x = torch.randn(3, 64, dtype=torch.bfloat16) * torch.tensor([[1e-3], [1.0], [1e3]], dtype=torch.bfloat16)
    for token in range(3):
        assert relative(rounded(x)[token], exact(x)[token]) < 0.02
    assert not rounded(torch.zeros(1, 64, dtype=torch.bfloat16)).any()


def test_the_integer_copies_are_not_saved() -> None:
    _, rounded = layers()
    assert set(rounded.state_dict()) == {"weight"}
