"""Write the results of a report into README.md: figures are generated, not typed. Each profile has a place of its own there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- results of {}: written by `make readme` -->", "<!-- end of results of {} -->"


def table(report: dict[str, Any]) -> str:
    """The report's variants as a Markdown table, with what it was measured on."""
    lines = [
        "| variant | exact match (95% interval) | `hard` | size MB | RSS MB | latency p50 ms | requests/s alone | batched | speed-up | RAM saved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for v in report["variants"]:
        if v.get("error"):
            lines.append(f"| {v['name']} | failed: {v['error'].splitlines()[0]} |" + " |" * 8)
            continue
        exact, hard, p = v["quality"]["exact_match"], v["quality"]["hard_exact_match"], v["performance"]
        name = f"**{v['name']}**" if v["name"] == report["recommendation"]["cpu"] else v["name"]
        interval = f"{exact['value']:.1%} ({exact['low']:.1%} to {exact['high']:.1%})"
        lines.append(
            f"| {name} | {interval} | {known(hard and hard['value'], '.1%')} | {known(v['size_mb'], '.0f')} | {known(p['rss_mb'], '.0f')} | {p['latency_ms']['p50']:.0f} "
            f"| {p['requests_s']:.1f} | {known(p['requests_s_batched'], '.1f')} | {known(v['speedup_vs_fp16'], '.1f', 'x')} | {known(v['ram_reduction_vs_fp16'], '.0%')} |"
        )
    e, t = report["environment"], report["training"]
    speed = f"{t['tokens_per_s']:.0f} tokens/s, " if t["tokens_per_s"] else ""  # unknown of a training that was interrupted
    minutes, training = f"{report['wall_s'] / 60:.0f} minutes", f"{t['wall_s'] / 60:.0f}"
    on = f"training on {t['examples']:,} utterances ({speed}peak {t['peak_rss_mb'] / 1000:.1f} GB)"
    cached = any(stage["kind"] == "finetune" and stage["state"] == "cached" for stage in report["stages"])
    took = (
        f"{training} minutes of {on} in an earlier command, {minutes} for what was left"
        if cached
        else f"{minutes} in all, {training} of them {on}"
    )
    about = f"Profile `{report['profile']}`, {report['started'][:10]}, {e['cpu']}, {e['cores']} cores, {e['gpu'] or 'no GPU'}; {took}. {exact_rows(report)}"
    return "\n".join([about, "", *lines, "", report["recommendation"]["why"], "", languages(report)])


def languages(report: dict[str, Any]) -> str:
    """Exact match of the 16-bit model on `test`, by language."""
    quality = next(v["quality"] for v in report["variants"] if v["role"] == "reference")
    found = ", ".join(f"{language} {part['value']:.1%}" for language, part in quality["by_language"].items())
    return f"`tuned-fp16` by language: {found}; {1 - quality['json_valid']:.2%} of its answers were none."


def handwritten(figures: dict[str, Any]) -> str:
    """What `cartwright evaluate --output` said of the hand-written set."""
    exact = figures["exact_match"]
    by_language = ", ".join(f"{language} {part['value']:.0%}" for language, part in figures["by_language"].items())
    return (
        f"On the hand-written set, the {figures['model']} variant has {exact['value']:.1%} exact match ({exact['low']:.1%} to {exact['high']:.1%}), "
        f"intent accuracy {figures['intent_accuracy']:.1%}; by language {by_language}."
    )


def known(figure: float | None, form: str, unit: str = "") -> str:
    """A figure in words; of a model behind an API some are not to be known."""
    return "" if figure is None else f"{figure:{form}}{unit}"


def exact_rows(report: dict[str, Any]) -> str:
    counts = report["dataset"]["counts"]
    return f"`test` has {counts['test']} rows, `hard` {counts['hard']}. `base-bf16` is the model before fine-tuning, with long instructions, in bfloat16 where the processor has it, else in float32. The 16-bit model's speed is measured in float16, as in the paper; its accuracy in bfloat16, where the processor multiplies that and only emulates float16."


def main() -> None:
    """`python docs/update_readme.py REPORT.json [HANDWRITTEN.json]`; the second is of `cartwright evaluate --data tests/handwritten.jsonl --output`."""
    text = README.read_text(encoding="utf-8")
    report, *more = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:])
    start, end = START.format(report["profile"]), END.format(report["profile"])
    if start not in text or end not in text:
        sys.exit(f"{README.name} has no place for the profile {report['profile']}: {start}")
    before, after = text.split(start)[0], text.split(end)[1]
    body = "\n\n".join([table(report), *map(handwritten, more)])
    README.write_text(f"{before}{start}\n{body}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
