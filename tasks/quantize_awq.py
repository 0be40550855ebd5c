"""Stage `quantize_awq`: AWQ (Lin et al. 2023, arXiv 2306.00978) by GPTQModel. transformers itself only loads it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import Field

from tasks.calibration import calibration_examples
from tasks.core import hardware, progress
from tasks.core.stage import Seed, StageConfig, stage
from tasks.domain.errors import UserError
from tasks.quantize_gptq import choose_group_size, layer_sizes
from tasks.weights import folder_weights

ROWS = 64


class QuantizeAwqConfig(StageConfig):
    """One AWQ variant. Weights that matter most to the activations are scaled up before they are rounded."""

    bits: Literal[4] = 4
    # The sizes that kernels of GPTQModel compute with.
    group_size: Literal[0, 16, 32, 64, 128] = Field(
        0,
        description="Weights that share a scale; 0 takes the largest of 128, 64, 32, 16 that divides the model's dimensions",
    )
    calibration_rows: int = Field(128, ge=8, le=4096, description="Templated training rows the scales are searched on")
    seed: Seed = 7


def check_outputs(folder: Path) -> None:
    """GPTQModel looks for the best clipping of so many rows of a matrix at a time.

    Raises:
        UserError: a matrix of a layer has a number of rows that they do not divide.
    """
    with folder_weights(folder) as weights:
        for name, read in weights.items():
            if ".layers." in name and (rows := read().shape[0]) % ROWS:
                raise UserError(
                    "awq",
                    name,
                    f"has {rows} outputs, and AWQ needs a multiple of {ROWS}",
                    mend="Leave AWQ out for this model: --set awq=[]",
                )


@stage("quantize_awq", version=1, libraries=("torch", "transformers", "gptqmodel"), preloaded=True)
def quantize_awq(config: QuantizeAwqConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Quantize `inputs["model"]`, calibrated on templated rows of `inputs["dataset"]`'s training split."""
    group_size = choose_group_size(config.group_size, layer_sizes(inputs["model"], "awq"), "awq.group_size")
    check_outputs(inputs["model"])
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig
    from transformers import AutoTokenizer, set_seed

    set_seed(config.seed)
    torch.set_num_threads(hardware.cores())
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"], trust_remote_code=False)
    examples = calibration_examples(inputs["dataset"], tokenizer, config.calibration_rows, config.seed)
    on_gpu = torch.cuda.is_available()
    model = GPTQModel.load(
        str(inputs["model"]),
        AWQConfig(bits=config.bits, group_size=group_size, sym=False, offload_to_disk=False),  # else a random path is in the file
        device="cuda:0" if on_gpu else "cpu",
        trust_remote_code=False,
        dtype=torch.float16,  # the layers that hold the result take no float32
    )

    layers = model.model.config.num_hidden_layers

    def layer_complete(layer_idx: int, submodule_finalized: bool) -> None:
        if not submodule_finalized:  # told once more, by another thread, when it is packed
            progress.advance(layer_idx + 1, layers, "blocks")

    model.layer_callback = layer_complete
    with TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # it writes a folder `logs` wherever it is
        model.quantize(
            [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in examples],
            batch_size=1,
            calibration_data_min_length=1,  # rows of ten tokens or fewer would be dropped without a word
            backend=BACKEND.AUTO if on_gpu else BACKEND.AWQ_TORCH,  # what packs the weights; the kernel it would choose needs CUDA
        )
    model.save(str(out_dir.absolute()))
    (out_dir / "quant_log.csv").unlink(missing_ok=True)  # how long each matrix took: it would be another artefact every time
    tokenizer.save_pretrained(out_dir)
    weights = sum(path.stat().st_size for path in out_dir.glob("*.safetensors"))
    return {"bits": config.bits, "group_size": group_size, "calibration_rows": len(examples), "size_mb": round(weights / 1e6, 3)}
