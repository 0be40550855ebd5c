"""The ways to deploy the model that a run makes, and their names."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from tasks.runtimes import Dtype, RuntimeName

BASE, BASE_FEW_SHOT, REFERENCE = "base-bf16", "base-bf16-few-shot", "tuned-fp16"
BASELINES = {"float32": "tuned-fp32", "bfloat16": "tuned-bf16"}
MIXED = "gguf-mixed"


class Variant(BaseModel):
    """One way to deploy the model. `base` was not fine-tuned; `reference` is the 16-bit model all others are compared with.

    `baseline` is the same model computed in another precision, which shows what that alone makes of the speed.
    `api` is somebody else's model, asked for contrast: it is never recommended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    format: Literal["hf", "gptq", "awq", "gguf", "api"]
    bits: float | None
    runtime: RuntimeName
    dtype: Dtype = "float16"
    role: Literal["base", "reference", "baseline", "candidate", "api"]
    few_shot: int = 0
