"""Stage `merge`: the adapter into a 16-bit model. Never through the 4-bit weights: those would be rounded twice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.core import progress
from tasks.core.stage import StageConfig, stage
from tasks.domain import prompt
from tasks.domain.spec import load_spec
from tasks.synthesize import read_rows
from tasks.tokenization import encode, prompt_text


class MergeError(RuntimeError):
    """The merged model does not say what base model and adapter say."""


class MergeConfig(StageConfig):
    """How the merged model is checked."""

    check_rows: int = Field(8, ge=1, le=1000, description="Validation rows on which merged and adapter logits are compared")
    tolerance: float = Field(0.01, gt=0, description="Largest logit difference in float32, as a share of the logits' range")


@stage("merge", version=2, libraries=("torch", "transformers", "peft"), preloaded=True)
def merge(config: MergeConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Merge `inputs["adapter"]` into `inputs["base_model"]` in float32 and save float16.

    Raises:
        MergeError: the logits differ by more than the tolerance.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress.advance(0, 3, "reading")
    tokenizer = AutoTokenizer.from_pretrained(inputs["adapter"], trust_remote_code=False)  # with the template it was trained with
    spec = load_spec(str(inputs["dataset"]))
    rows = read_rows(inputs["dataset"] / "validation.jsonl")[: config.check_rows]
    prompts = [torch.tensor([encode(tokenizer, prompt_text(tokenizer, prompt.messages(spec, row["text"])))]) for row in rows]

    base = AutoModelForCausalLM.from_pretrained(inputs["base_model"], dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    model = PeftModel.from_pretrained(base, inputs["adapter"]).eval()
    progress.advance(1, 3, "merging")
    with torch.inference_mode():
        expected = [model(ids).logits[0] for ids in prompts]
    merged = model.merge_and_unload()
    with torch.inference_mode():
        difference = max(float((merged(ids).logits[0] - want).abs().max()) for ids, want in zip(prompts, expected, strict=True))
    spread = max(float(want.max() - want.min()) for want in expected)
    if not difference <= config.tolerance * spread:
        raise MergeError(
            f"merged and adapter logits differ by {difference:.3g}, more than {config.tolerance:.0%} of their range {spread:.3g}"
        )
    progress.advance(2, 3, "writing")
    merged.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    reloaded = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    with torch.inference_mode():
        agreement = torch.cat([reloaded(ids).logits[0].argmax(-1) == want.argmax(-1) for ids, want in zip(prompts, expected, strict=True)])
    return {"max_logit_difference": difference, "logit_range": spread, "top1_agreement_float16": float(agreement.float().mean())}
