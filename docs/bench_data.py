"""How fast training rows are made, and what memory that takes: `make bench-data`, or `python docs/bench_data.py [ROWS ...]`.

Each size runs the whole stage in a process of its own: generation, duplicates, comparison with the evaluation splits of `standard`,
data card, and the check of what was written. Evaluation rows are in the time and not in the count.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (20_000, 100_000, 300_000)


def measure(rows: int) -> dict[str, float]:
    """Make `rows` training rows here; seconds, user CPU seconds (imports included) and peak RSS in MB."""
    from tasks.config import load_config
    from tasks.synthesize import synthesize

    config = load_config("standard").data.model_copy(update={"train_rows": rows})
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        made = synthesize.function(config, {}, Path(folder))["counts"]["train"]
    wall_s, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes on Linux
    return {"rows": made, "wall_s": wall_s, "user_s": usage.ru_utime, "peak_rss_mb": peak}


def main() -> None:
    """Print one row of a Markdown table for each size."""
    print("| rows | wall s | user CPU s | rows per CPU second | peak RSS MB |\n| ---: | ---: | ---: | ---: | ---: |")
    for rows in map(int, sys.argv[1:] or SIZES):
        child = subprocess.run([sys.executable, __file__, "--one", str(rows)], capture_output=True, text=True, check=True)
        m = json.loads(child.stdout)
        print(
            f"| {m['rows']:,} | {m['wall_s']:.1f} | {m['user_s']:.1f} | {m['rows'] / m['user_s']:,.0f} | {m['peak_rss_mb']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(int(sys.argv[2]))))
    else:
        main()
