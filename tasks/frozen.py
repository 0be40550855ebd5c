"""The base model's layers while an adapter is trained on them: frozen, so they may be held in whatever form computes fastest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

BASE_LAYER = ".base_layer"  # PEFT's name of the layer that an adapter is on


def unpack_nf4(model: Any, int8: bool) -> None:
    """Replace every packed NF4 layer by one that holds the same (quantized) values unpacked.

    What is trained is unchanged: QLoRA computes with dequantized values anyway, once per product. Here it is once in all.
    Packed layers also cannot be compiled: bitsandbytes repacks them when gradients are off.

    Args:
        int8: multiply in 8-bit integers, see `Int8Linear`; else in the type the NF4 values are dequantized to.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Linear4bit):
            continue
        packed: Any = layer.weight
        weight = dequantize_4bit(packed.data, packed.quant_state).reshape(layer.out_features, layer.in_features)
        plain = (Int8Linear if int8 else torch.nn.Linear)(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype
        )
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        if isinstance(plain, Int8Linear):
            plain.round_weight()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, plain)
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def restore_16bit(model: Any, base_model: Path) -> None:
    """Give the unpacked layers of a model with an adapter the values of `base_model`'s files, of which theirs are the NF4 rounding.

    In place: what was compiled stays compiled.
    """
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    causal = model.get_base_model()
    exact = AutoModelForCausalLM.from_pretrained(base_model, dtype="auto", trust_remote_code=False, use_safetensors=True)
    weights = dict(exact.named_parameters())
    with torch.no_grad():
        for name, layer in causal.named_modules():
            if name.endswith(BASE_LAYER):
                name = name.removesuffix(BASE_LAYER)
                weight = weights[f"{name}.weight"]
                layer.weight.copy_(weight.t() if isinstance(exact.get_submodule(name), Conv1D) else weight)  # GPT-2's are transposed
                if isinstance(layer, Int8Linear):
                    layer.round_weight()


class Int8Linear(torch.nn.Linear):
    """A frozen linear layer that multiplies 8-bit integers, forward and backward, which VNNI does twice as fast as bfloat16.

    Weights have one scale for each row (of the matrix as it is multiplied), activations and gradients one for each token:
    vector-wise quantization as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), without its outlier part.
    """

    def round_weight(self) -> None:
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
