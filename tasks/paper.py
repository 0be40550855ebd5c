"""What the paper claims, beside what a run measured: Licardo and Tanković, arXiv 2510.21970 (2025)."""

from __future__ import annotations

from typing import Any

GPT_4_1 = "gpt-4.1"
LLAMA_3_2_1B = 1236  # millions of weights of the paper's model


def _claim(text: str, paper: str, ours: str | None, comparable: bool, note: str) -> dict[str, Any]:
    claim = {"claim": text, "paper": paper, "ours": ours, "comparable": comparable, "note": note}
    return claim if ours else claim | {"ours_reason": "no such variants were measured here"}


def _gpt_4_1(apis: list[dict[str, Any]]) -> dict[str, Any]:
    """The paper's API baseline on our rows, if it was asked."""
    asked = [v for v in apis if v["quality"] and v["model"].split("/")[-1] == GPT_4_1]
    ours = [f"{v['quality']['exact_match']['value']:.1%} with {v['few_shot'] or 'no'} examples" for v in asked]
    claim = _claim(
        "Exact match, GPT-4.1", "99%", ", ".join(ours) or None, False, "Our rows and our prompt; the paper's are not public here."
    )
    return claim if asked else {**claim, "ours_reason": "it was not asked, or gave no answer; the field `api` lists the models to ask"}


def compare_with_paper(ours: list[dict[str, Any]], apis: list[dict[str, Any]], recommended: str | None = None) -> list[dict[str, Any]]:
    """The paper's claims beside ours, with a note on what can be compared.

    Args:
        ours: our fine-tuned variants that have figures.
        apis: models behind an API.
        recommended: the variant for a CPU, whose speed and memory count; without one the fastest, and the one with least memory.
    """
    by_name = {v["name"]: v for v in ours}
    reference = next((v for v in ours if v["role"] == "reference"), None)
    ggufs = [v for v in by_name.values() if v["format"] == "gguf"]
    gptq = by_name.get("gptq-4bit") or next((v for name, v in by_name.items() if name.startswith("gptq-4bit")), None)
    comparable = [v for v in ggufs if v["speedup_vs_fp16"] is not None]  # not where the 16-bit model ran on a GPU
    chosen = [v for v in comparable if v["name"] == recommended] or comparable
    quickest = max(chosen, key=lambda v: v["performance"]["requests_s"], default=None)
    fastest = max(ggufs, key=lambda v: v["performance"]["requests_s"], default=None)
    leanest = max(chosen, key=lambda v: v["ram_reduction_vs_fp16"], default=None)
    best = max((v for v in ggufs if v["bits"] < 16), key=lambda v: v["quality"]["exact_match"]["value"], default=None)
    on_gpu = bool(gptq and reference and gptq["device"] == reference["device"] == "cuda")
    vram = [v["performance"].get("vram_mb") for v in (gptq, reference) if v] if on_gpu else []
    parameters = round(reference["size_mb"] / 2) if reference else 0  # millions: 16 bits each

    return [
        _claim(
            "Exact match, fine-tuned model",
            "99% (1B parameters)",
            f"{reference['quality']['exact_match']['value']:.1%} ({parameters}M parameters)" if reference else None,
            False,
            f"Another data set{f' and a model {LLAMA_3_2_1B / parameters:.0f} times smaller' if 0 < parameters < 700 else ''}; the paper's data and prompt are not public here.",
        ),
        _gpt_4_1(apis),
        _claim(
            "GPTQ 4-bit against FP16: GPU memory",
            "-41% (NVIDIA T4)",
            f"{vram[0] / vram[1] - 1:+.0%}" if len(vram) == 2 and all(vram) else None,
            False,
            "Another GPU." if on_gpu else "No GPU here: not measured.",
        ),
        _claim(
            "GPTQ 4-bit against FP16: speed",
            "82% slower (NVIDIA T4)",
            f"{gptq['speedup_vs_fp16']:.2f}x (on {'a GPU' if on_gpu else 'the CPU'})"
            if gptq and gptq["speedup_vs_fp16"] is not None
            else None,
            on_gpu,
            "Depends on the kernel; ours is " + (f"{gptq['kernel']}." if gptq else "not measured."),
        ),
        _claim(
            "GGUF on a CPU against FP16: speed",
            "up to 18x",
            f"{quickest['speedup_vs_fp16']:.1f}x one at a time, {quickest['speedup_vs_fp16_batched']:.1f}x both batched, {quickest['batched_vs_fp16_alone']:.1f}x batched against FP16 one at a time ({quickest['name']})"
            if quickest
            else None,
            True,
            "Both mix the gain of the runtime with that of quantization; the F16 row of llama.cpp tells them apart.",
        ),
        _claim(
            "GGUF on a CPU against FP16: memory",
            "over 90% less",
            f"{leanest['ram_reduction_vs_fp16']:.0%} less resident memory, {leanest['private_reduction_vs_fp16']:.0%} less private ({leanest['name']})"
            if leanest and reference
            else None,
            True,
            "Ours is the resident memory of the whole process; a smaller model leaves a larger share to the libraries.",
        ),
        _claim(
            "Best GGUF by accuracy",
            "Q5_K_M",
            best["name"].removeprefix("gguf-") if best else None,
            True,
            "Differences between formats are mostly within the interval.",
        ),
        _claim("Best GGUF by speed", "Q4_K_M", fastest["name"].removeprefix("gguf-") if fastest else None, True, "Fastest one at a time."),
    ]
