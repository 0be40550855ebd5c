"""Write the results table of the latest report into README.md: figures are generated, not typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
START, END = "<!-- results: written by `make readme` -->", "<!-- end of results -->"


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
            f"| {name} | {interval} | {hard['value']:.1%} | {known(v['size_mb'], '.0f')} | {known(p['rss_mb'], '.0f')} | {p['latency_ms']['p50']:.0f} "
            f"| {p['requests_s']:.1f} | {known(p['requests_s_batched'], '.1f')} | {known(v['speedup_vs_fp16'], '.1f', 'x')} | {known(v['ram_reduction_vs_fp16'], '.0%')} |"
        )
    e, t = report["environment"], report["training"]
    about = (
        f"Profile `{report['profile']}`, {report['started'][:10]}, {e['cpu']}, {e['cores']} cores, {e['gpu'] or 'no GPU'}; "
        f"{report['wall_s'] / 60:.0f} minutes in all, {t['wall_s'] / 60:.0f} of them training on {t['examples']:,} utterances "
        f"({t['tokens_per_s']:.0f} tokens/s, peak {t['peak_rss_mb'] / 1000:.1f} GB). {exact_rows(report)}"
    )
    return "\n".join([about, "", *lines, "", report["recommendation"]["why"]])


def known(figure: float | None, form: str, unit: str = "") -> str:
    """A figure in words; of a model behind an API some are not to be known."""
    return "" if figure is None else f"{figure:{form}}{unit}"


def exact_rows(report: dict[str, Any]) -> str:
    counts = report["dataset"]["counts"]
    return f"`test` has {counts['test']} rows, `hard` {counts['hard']}. `base-bf16` is the model before fine-tuning, with long instructions, in bfloat16. The 16-bit model's speed is measured in float16, its accuracy in bfloat16 where the processor has it and emulates float16."


def main() -> None:
    """`python docs/update_readme.py REPORT.json`."""
    text = README.read_text(encoding="utf-8")
    report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    before, after = text.split(START)[0], text.split(END)[1]
    README.write_text(f"{before}{START}\n{table(report)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
