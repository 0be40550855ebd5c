"""The base model's layers while an adapter is trained on them: frozen, so they may be held in whatever form computes fastest."""

from __future__ import annotations

import itertools
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

Form = Literal["plain", "packed", "int8"]


def unpack_nf4(model: Any, form: Form) -> None:
    """Replace every packed NF4 layer by one that holds the same (quantized) values unpacked.

    What is trained is unchanged: QLoRA computes with dequantized values anyway, once per product. Here it is once in all.
    Packed layers also cannot be compiled: bitsandbytes repacks them when gradients are off.

    Args:
        form: how layers multiply. `plain`: as any layer, in the type the NF4 values are dequantized to; `packed`: see `PackedLinear`;
            `int8`: see `Int8Linear`.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear4bit):
            continue
        packed: Any = layer.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).reshape(layer.out_features, layer.in_features)
        frozen = FORMS[form](layer.in_features, layer.out_features, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype)
        frozen.weight = torch.nn.Parameter(weight, requires_grad=False)
        frozen.bias = layer.bias
        if isinstance(frozen, Int8Linear | PackedLinear):
            frozen.prepare()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, frozen)
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer that multiplies 8-bit integers, forward and backward, which VNNI does twice as fast as bfloat16.

    Weights have one scale for each row (of the matrix as it is multiplied), activations and gradients one for each token:
    vector-wise quantization as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), without its outlier part.
    """

    def prepare(self) -> None:
        """Make the integer copies of `weight`: one for the product, one, transposed, for its gradient."""
        for name, weight in (("forward", self.weight.data), ("backward", self.weight.data.t().contiguous())):
            integers, scale = _rounded(weight)
            self.register_buffer(f"{name}_int8", integers, persistent=False)
            self.register_buffer(f"{name}_scale", scale.t().contiguous(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _Int8Product.apply(
            x.to(torch.bfloat16), self.forward_int8, self.forward_scale, self.backward_int8, self.backward_scale
        )
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Int8Product(torch.autograd.Function):
    """`x @ weight.T`; the weight, given as integers and scales in both orientations, gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, scale: Any, transposed: Any, transposed_scale: Any) -> Any:
        ctx.save_for_backward(transposed, transposed_scale)
        return _multiply(x, weight, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return _multiply(gradient, *ctx.saved_tensors), None, None, None, None


def _multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    integers, by_token = _rounded(x.reshape(-1, x.shape[-1]))
    product = torch._int_mm(integers, weight.t()).float() * by_token * scale
    return product.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _rounded(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as int8 and the float32 scale of each row: the largest value becomes 127."""
    scale = matrix.abs().amax(-1, keepdim=True).float().clamp(min=1e-8) / 127
    return (matrix.float() / scale).round().to(torch.int8), scale


class PackedLinear(torch.nn.Linear):
    """A frozen bfloat16 layer whose weight oneDNN lays out once, for the product and for its gradient; a plain layer does it at every call.

    For the 50 to 400 tokens of a training step that is a third of a product's time on a CPU with AMX.
    """

    def prepare(self) -> None:
        """Lay out `weight`, of which only the shape is kept."""
        weight = self.weight.data
        self._packed = [torch.ops.mkldnn._reorder_linear_weight(matrix, TOKENS) for matrix in (weight, weight.t().contiguous())]
        number = next(_numbers)
        _packed[number], _packed[number + 1] = self._packed
        self.register_buffer("number", torch.tensor(number), persistent=False)
        self.weight.data = weight.new_empty(1).expand(weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = _packed_product(x.to(torch.bfloat16), self.number, self.out_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)


TOKENS = 256  # about as many as a step has; oneDNN chooses the layout for it
FORMS: dict[Form, type[torch.nn.Linear]] = {"plain": torch.nn.Linear, "packed": PackedLinear, "int8": Int8Linear}
# oneDNN's own layouts cannot be arguments of a compiled graph: it gets their number. A layer's two have numbers that follow each other.
_packed: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
_numbers = itertools.count(0, 2)


@torch.library.custom_op("cartwright::packed_product", mutates_args=())
def _packed_product(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    """`x` times the packed weight of that number, which gives rows of `width`."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), _packed[int(number)], None, "none", [], "")
    return product


@_packed_product.register_fake
def _(x: torch.Tensor, number: torch.Tensor, width: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _keep_number(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, int], output: torch.Tensor) -> None:
    x, number, _ = inputs
    ctx.save_for_backward(number)
    ctx.width = x.shape[-1]


def _gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    (number,) = ctx.saved_tensors
    return _packed_product(gradient, number + 1, ctx.width), None, None


_packed_product.register_autograd(_gradient, setup_context=_keep_number)
