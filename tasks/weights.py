"""Weights of a model file as plain numbers, and what quantization left of them."""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tasks.domain.errors import UserError

Weights = Mapping[str, Callable[[], np.ndarray]]  # matrices by name, float32, read when they are called for
_LAYER = re.compile(r"(?:blk|layers|h)\.(\d+)\.")
_SUFFIX = ".weight"


class BrokenFileError(ValueError):
    """The weights cannot be what was written: a tensor is missing, of another shape, or not finite."""


@dataclass
class Comparison:
    """What became of the fine-tuned weights.

    Attributes:
        weight_rel_error: norm of (variant - tuned) as a share of the norm of tuned.
        delta_retained: projection of (variant - base) on (tuned - base): 1 if all of the fine-tuning is there, 0 if none.
        by_layer: `delta_retained` of each layer in which fine-tuning changed something.
        worst_tensor: the tensor with the largest relative error, and that error.
    """

    weight_rel_error: float
    delta_retained: float
    by_layer: dict[str, float] = field(default_factory=dict)
    worst_tensor: tuple[str, float] = ("", 0.0)


def open_gguf(path: Path) -> Any:
    """A GGUF file as gguf-py reads it, without the arrays among its metadata.

    gguf-py makes an object of every token of the vocabulary, which takes longer than all the weights.

    Raises:
        BrokenFileError: it is no GGUF file, or a damaged one. Counts in its header are checked against the size of the file.
    """
    import gguf

    class _Ends(BrokenFileError):
        def __init__(self) -> None:
            super().__init__(f"{path} ends within its metadata or its weights")

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            if kind == gguf.GGUFValueType.ARRAY:  # llama.cpp reads none either
                raise BrokenFileError(f"{path} has an array of arrays")
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            end = orig_offs + 12
            view = self.data.data
            if kind == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    end += 8 + int.from_bytes(view[end : end + 8], "little")
                    if end > len(view):
                        raise _Ends
            else:
                end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
            if end > len(view):
                raise _Ends
            return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, kind]

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self.data):  # numpy would give what there is, or nothing
                raise _Ends
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(str(path))
    except BrokenFileError:
        raise
    except Exception as error:  # the reader raises whatever damaged bytes lead it to
        raise BrokenFileError(f"{path} is no readable GGUF file ({str(error) or type(error).__name__})") from None


def check_gguf(field: str, path: Path) -> Any:
    """The metadata of a GGUF file that a user gave, by name; arrays are left out. llama.cpp, which is less patient, reads it after this.

    Raises:
        UserError: there is no such file, it is none, or its tensors are not all there.
    """
    if not path.is_file():
        raise UserError(field, str(path), "does not exist", mend="Give the path of a .gguf file")
    try:
        return open_gguf(path).fields
    except BrokenFileError as error:
        raise UserError(field, str(path), f"is not a readable GGUF file ({error})", mend="Download it again") from None


def check_safetensors(field: str, path: Path) -> None:
    """Raise UserError for a file that is no safetensors file, or not all of one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(field, str(path), f"is not a readable safetensors file ({error})", mend="Download it again") from None


def check_no_adapter(field: str, folder: Path) -> None:
    """Raise UserError for a folder with an adapter: transformers would load it with the model, and its weights may be pickled."""
    if (folder / "adapter_config.json").exists():
        problem = "holds an adapter (adapter_config.json), which would be loaded with the model"
        raise UserError(field, str(folder), problem, mend="Merge it into the model first, or take the adapter_* files away")


def gguf_weights(path: Path) -> Weights:
    """The matrices of a GGUF file, dequantized by gguf-py. Names, and the order of rows, are llama.cpp's."""
    import gguf

    return {
        tensor.name: functools.partial(_dequantized, gguf.dequantize, tensor)
        for tensor in open_gguf(path).tensors
        if sum(int(n) > 1 for n in tensor.shape) > 1
    }


def _dequantized(dequantize: Callable[..., Any], tensor: Any) -> np.ndarray:
    return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


@contextmanager
def _tensors(path: Path) -> Iterator[dict[str, Any]]:
    """The open safetensors file of a folder that holds each tensor."""
    from contextlib import ExitStack

    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in sorted(path.glob("*.safetensors"))]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping


def _matrices(tensors: Mapping[str, Any]) -> Weights:
    return {
        name: functools.partial(_as_float32, file, name)
        for name, file in tensors.items()
        if name.endswith(_SUFFIX) and len(file.get_slice(name).get_shape()) > 1
    }


def _as_float32(file: Any, name: str) -> np.ndarray:
    return file.get_tensor(name).float().numpy()


@contextmanager
def folder_weights(path: Path) -> Iterator[Weights]:
    """The matrices of the safetensors files of a Hugging Face folder."""
    with _tensors(path) as tensors:
        yield _matrices(tensors)


@contextmanager
def gptq_weights(path: Path) -> Iterator[Weights]:
    """The matrices of a GPTQ folder, unpacked by the format's definition: no kernel has a part in it.

    Weights of so many bits stand one after the other, the lowest bit first, down each output's column of `qweight`, and zeros along each
    group's row of `qzeros` (Frantar et al. 2022, arXiv 2210.17323, as AutoGPTQ stores it; its first format has zeros less one).
    """
    settings = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    bits, less = settings["bits"], 0 if settings["checkpoint_format"] == "gptq_v2" else 1

    def unpacked(layer: str) -> np.ndarray:
        try:
            words, zeros, scales, group = (
                tensors[name := f"{layer}.{part}"].get_tensor(name).numpy() for part in ("qweight", "qzeros", "scales", "g_idx")
            )
        except KeyError as missing:
            raise BrokenFileError(f"tensor {missing.args[0]} is missing") from None
        offsets = (_integers(zeros, bits) + less) % (1 << bits)
        return (_integers(words.T, bits) - offsets[group].T) * scales.astype(np.float32)[group].T

    with _tensors(path) as tensors:
        layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
        yield {**_matrices(tensors), **{f"{layer}{_SUFFIX}": functools.partial(unpacked, layer) for layer in layers}}


def _integers(packed: np.ndarray, bits: int) -> np.ndarray:
    """The integers of so many bits that each row of 32-bit words holds, the lowest bit first."""
    streams = np.unpackbits(np.ascontiguousarray(packed).astype("<i4").view(np.uint8), axis=1, bitorder="little")
    return streams.reshape(len(packed), -1, bits) @ (1 << np.arange(bits)).astype(np.float32)


def compare(variant: Weights, tuned: Weights, base: Weights) -> Comparison:
    """Compare a variant's matrices with the fine-tuned and the base model's, those that `variant` and `tuned` share by name.

    Raises:
        BrokenFileError: a matrix of a changed layer is missing, has another shape, or holds what is no number.
    """
    error = norm = 0.0
    projected: dict[str, float] = defaultdict(float)
    changed: dict[str, float] = defaultdict(float)
    worst = ("", 0.0)
    for name in tuned:
        if name not in variant:
            if _LAYER.search(name):
                raise BrokenFileError(f"tensor {name} is missing")
            continue
        mine, wanted, before = variant[name](), tuned[name](), base[name]()
        if mine.shape != wanted.shape:
            raise BrokenFileError(f"tensor {name} has the shape {mine.shape} instead of {wanted.shape}")
        if not np.isfinite(mine).all():
            raise BrokenFileError(f"tensor {name} holds values that are no numbers")
        off, size = _squared(mine - wanted), _squared(wanted)
        error, norm = error + off, norm + size
        relative = float(np.sqrt(off / size)) if size else 0.0
        worst = max(worst, (name, relative), key=lambda item: item[1])
        delta = wanted - before
        layer = found[1] if (found := _LAYER.search(name)) else "other"
        projected[layer] += float(np.vdot(mine - before, delta))
        changed[layer] += _squared(delta)
    total = sum(changed.values())
    return Comparison(
        weight_rel_error=float(np.sqrt(error / norm)) if norm else 0.0,
        delta_retained=sum(projected.values()) / total if total else 1.0,
        by_layer={layer: projected[layer] / changed[layer] for layer in sorted(changed, key=_layer_order) if changed[layer]},
        worst_tensor=worst,
    )


def _squared(matrix: np.ndarray) -> float:
    return float(np.vdot(matrix, matrix))


def _layer_order(layer: str) -> tuple[bool, int]:
    return (not layer.isdigit(), int(layer) if layer.isdigit() else 0)
