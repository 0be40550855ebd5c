"""How cost grows with rows, variants, languages, model size, workers and MLflow's runs: `make bench-scale`, or `python -m docs.bench_scale`.

Every measurement is a line of `docs/scaling.jsonl` as soon as it is made, with its raw samples and how busy the machine was; what is there
is not measured again. Tables and plots of docs/scaling.md are written from these lines. All work is done in a home of its own, `scale` below
`CARTWRIGHT_HOME`, whose artefacts are removed at the end. What is not a measurement, to make data and models, is done once and not timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from docs import bench_scale_servers as servers
from docs import bench_scale_stages as stages
from docs.bench_scale_report import DIMENSIONS, Record, write
from docs.bench_scale_stages import QUICK, SHAPES, Bench, Samples, Scope
from tasks.core import hardware, settings
from tasks.core.child import FORKS, StageError
from tasks.domain.errors import UserError
from tasks.qlora import resolve_precision

DOCS = Path(__file__).parent
PAGE = DOCS / "scaling.md"


class Plan(NamedTuple):
    """What is measured of a dimension: the sizes, for a try other ones, and how often."""

    measure: Callable[[Bench, int, int], Samples]
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    repeats: int


# A repeat beyond the first is of noise; where a measurement has many samples of its own there is one.
PLANS = {
    "rows": Plan(stages.rows, (10_000, 30_000, 100_000), (50, 100, 200), 3),
    "training": Plan(stages.training, (400, 1200, 3600), (48, 96, 192), 2),
    "languages": Plan(stages.languages, (1, 3, 6), (1, 2), 2),
    "variants": Plan(stages.variants, (1, 3, 6), (1, 2), 1),
    "model": Plan(stages.model, tuple(SHAPES), tuple(SHAPES)[:2], 2),
    "workers": Plan(servers.workers, (1, 4, 16), (1, 4), 1),
    "mlflow": Plan(servers.mlflow, (100, 1000, 3000, 10_000), (20, 60), 1),
}


def wanted(names: list[str], quick: bool) -> Iterator[tuple[str, int, int]]:
    """Dimension, size and repeat of every measurement; sizes take turns, so that a machine that gets slower does it to all of them."""
    for name in names:
        plan = PLANS[name]
        for repeat in range(1 if quick else plan.repeats):
            yield from ((name, size, repeat) for size in (plan.quick if quick else plan.sizes))


def read(path: Path) -> list[Record]:
    """What was measured until now.

    Raises:
        UserError: a line is none of ours, or of another machine.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            there = record["conditions"]["hardware"]
        except (ValueError, KeyError, TypeError):
            raise UserError("--output", str(path), f"has no measurement in line {number}", mend="Delete the line") from None
        if there != hardware.hardware_class():
            raise UserError("--output", str(path), f"was measured on another machine ({there})", mend="Delete the file, or name another")
        records.append(record)
    return records


def measure(bench: Bench, name: str, size: int, repeat: int) -> Record:
    """One measurement, and under what conditions it was made."""
    others, started = hardware.Disturbance(), time.monotonic()
    samples = PLANS[name].measure(bench, size, repeat)
    conditions: dict[str, Any] = {
        "day": datetime.now(UTC).date().isoformat(),
        "wall_s": round(time.monotonic() - started, 1),
        "hardware": hardware.hardware_class(),
        "cpu": hardware.cpu_model(),
        "cores": hardware.cores(),
        "precision": resolve_precision(bench.tiny.train),
        **others.cores(),
    }
    rounded = {figure: [float(f"{value:.5g}") for value in values] for figure, values in samples.items()}
    x = SHAPES[size].x() if name == "model" else {"size": size}
    return {"dimension": name, "size": size, "repeat": repeat, "x": x, "samples": rounded, "conditions": conditions}


def work(bench: Bench, output: Path, todo: list[tuple[str, int, int]]) -> tuple[list[Record], list[str]]:
    """Make the measurements that are not in the file yet; one that fails does not stop the others.

    Returns:
        All measurements, and what failed.
    """
    records, failed = read(output), []
    done = {(record["dimension"], record["size"], record["repeat"]) for record in records}
    begun = time.monotonic()
    for number, (name, size, repeat) in enumerate(todo, 1):
        said = f"{(time.monotonic() - begun) / 60:4.1f} min  {number}/{len(todo)}  {size:,} {DIMENSIONS[name].of} ({name}, repeat {repeat + 1})"
        if (name, size, repeat) in done:
            print(f"{said}: is there", flush=True)
            continue
        print(said, flush=True)
        if name in ("workers", "mlflow"):
            FORKS.close()  # half a gigabyte that a server's measurement does not need
        try:
            record = measure(bench, name, size, repeat)
        except (StageError, UserError, OSError, RuntimeError, ValueError) as error:
            failed.append(f"{name} {size:,}: {error}")
            print(f"failed: {error}", flush=True)
            continue
        records.append(record)
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return records, failed


def main() -> None:
    """Measure what is not measured yet, and write tables and plots."""
    options = read_options()
    known = settings.load_settings()
    home = known.home / ("scale-quick" if options.quick else "scale")
    places = replace(known, home=home, store_uri=(home / "store").as_uri(), prefect_api_url=None)
    settings.prepare_environment(places)
    home.mkdir(parents=True, exist_ok=True)
    output = options.output or (home / "scaling.jsonl" if options.quick else DOCS / "scaling.jsonl")
    try:
        for name in options.only:
            if name not in PLANS:
                raise UserError("--only", name, "is unknown", allowed=list(PLANS))
        bench = Bench(places, QUICK if options.quick else Scope())
        records, failed = work(bench, output, list(wanted(options.only, options.quick)))
    except UserError as error:
        raise SystemExit(str(error)) from None
    finally:
        FORKS.close()
    print(f"Written: {write(records, PAGE.read_text(encoding='utf-8'), home if options.quick else DOCS)}")
    if failed:
        sys.exit("Not measured, and tried again by the same command:\n" + "\n".join(failed))
    shutil.rmtree(home / "store", ignore_errors=True)
    (home / "mlflow-scale.db").unlink(missing_ok=True)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes once, to see that it works; docs/ is left alone")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PLANS), help=f"of {','.join(PLANS)}")
    parser.add_argument("--output", type=Path, help="the JSONL file of measurements")
    return parser.parse_args()


if __name__ == "__main__":
    main()
