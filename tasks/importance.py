"""Stage `importance`: llama.cpp's importance matrix: how much each input of a layer matters, by which rounding errors are weighted.

llama.cpp's own tool for it is no part of its Python package. The matrix is the mean square of a layer's inputs over real text, which
transformers gives as well; `llama_model_quantize` takes it as numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tasks.calibration import calibration_examples
from tasks.core import hardware, progress
from tasks.core.stage import Seed, StageConfig, stage
from tasks.weights import open_gguf

IMPORTANCE = "importance.npz"
BATCH = 8  # rows at a time


class ImportanceConfig(StageConfig):
    """What the importance matrix is measured on."""

    rows: int = Field(256, ge=8, le=100_000, description="Templated training rows")
    seed: Seed = 7


@stage("importance", version=1, libraries=("torch", "transformers", "gguf"), preloaded=True)
def importance(config: ImportanceConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Mean square of every input of every linear layer of `inputs["model"]`, on training rows of `inputs["dataset"]`.

    `inputs["gguf"]` is the same model as GGUF, which says what llama.cpp calls the layers. `importance.npz` has an array of float32
    by tensor name, as long as the tensor's rows. The output head is left out, as by llama.cpp's own tool.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["model"], trust_remote_code=False)
    torch.set_num_threads(hardware.cores())
    model: Any = AutoModelForCausalLM.from_pretrained(inputs["model"], dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    examples = calibration_examples(inputs["dataset"], tokenizer, config.rows, config.seed)
    real = torch.zeros(0, dtype=torch.bool)  # of the batch at hand: which positions are no padding
    squares: dict[str, Any] = {}

    def add(name: str, x: Any) -> None:
        squares[name] = squares.get(name, 0) + x.detach()[real].double().square().sum(0)

    decoder = model.get_decoder()
    for name, layer in decoder.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, arguments, name=name: add(f"model.{name}", arguments[0]))
    tokens = 0
    starts = range(0, len(examples), BATCH)
    with torch.inference_mode():
        for start in progress.track(starts, len(starts), "batches"):
            batch = examples[start : start + BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in batch])
            real = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in batch])
            decoder(input_ids=ids, attention_mask=real.long(), use_cache=False)
            tokens += int(real.sum())
    names = gguf_names(inputs["gguf"] / "model.gguf", model.config.num_hidden_layers)
    found = {names(name): (total / tokens).float().numpy() for name, total in squares.items()}
    np.savez(out_dir / IMPORTANCE, **found)
    return {"rows": len(examples), "tokens": tokens, "tensors": len(found)}


def gguf_names(path: Path, layers: int) -> Any:
    """A function from a layer's name in transformers to the name of its tensor in the GGUF file at `path`."""
    import gguf

    architecture = str(open_gguf(path).get_field("general.architecture").contents())
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[architecture], layers)

    def name_of(layer: str) -> str:
        name = table.get_name(layer)
        if name is None:
            raise ValueError(f"llama.cpp has no tensor for layer {layer}")
        return f"{name}.weight"

    return name_of


def as_parameter(path: Path) -> tuple[Any, Any]:
    """The matrix of a stage's folder as llama.cpp takes it: an array that ends with an entry without a name, and what it points to."""
    import llama_cpp.llama_cpp as api

    with np.load(path / IMPORTANCE) as kept:
        arrays = {name: np.ascontiguousarray(kept[name], dtype=np.float32) for name in kept.files}
    entries = (api.llama_model_imatrix_data * (len(arrays) + 1))()
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries, arrays
