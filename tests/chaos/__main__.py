"""Let faults strike one after the other and write down what came of them.

python -m tests.chaos --pipeline small --faults 200 --output FOLDER
python -m tests.chaos --pipeline smoke --seed 123 --faults 1
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

from tests.chaos.cycle import Outcome, cycle
from tests.chaos.pipelines import PIPELINES
from tests.chaos.world import a_world
from tests.places import forget_places


def main() -> int:
    """The exit code: 1 if anything was lost, or too few faults found something to strike."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pipeline",
        choices=PIPELINES,
        default="small",
        help="small: the seam on tiny stages; 135m: a GGUF file of the real model; smoke: the whole DAG",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first fault; the next has the next number")
    parser.add_argument(
        "--faults",
        type=int,
        default=200,
        help="how many are to strike; a seed whose fault finds nothing to strike is not counted. With 1, one seed",
    )
    parser.add_argument("--only", default="", help="a word in the name of the faults to draw from, such as disk; a seed then draws another")
    parser.add_argument("--output", type=Path, default=None, help="a folder for chaos.json and chaos.md")
    asked = parser.parse_args()
    forget_places()  # faults are for a store of their own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that disks and servers are put away
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, a_world(PIPELINES[asked.pipeline], Path(folder)) as world:
        print(f"The home has {'a disk of its own' if world.mounting else 'no disk of its own: none is made read-only'}.", flush=True)
        for seed in range(asked.seed, asked.seed + (10 * asked.faults if asked.faults > 1 else 1)):
            outcomes.append(found := cycle(world, seed, asked.only))
            said = "; ".join(found.problems) or ("recovered" if found.struck else "did not strike")
            print(f"{seed:>6}  {found.fault:<34} {found.moment:<28} {found.seconds:6.1f} s  {said}", flush=True)
            if found.problems:
                print(found.output, file=sys.stderr, flush=True)
            if asked.output:
                write(outcomes, asked.pipeline, asked.output)
            if sum(found.struck for found in outcomes) >= asked.faults:
                break
    print(as_table(outcomes))
    too_few = asked.faults > 1 and sum(found.struck for found in outcomes) < asked.faults
    return int(too_few or any(found.problems for found in outcomes))


def write(outcomes: list[Outcome], pipeline: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in asdict(found).items() if name != "output" or found.problems} for found in outcomes]
    (folder / "chaos.json").write_text(json.dumps({"pipeline": pipeline, "outcomes": rows}, indent=1), encoding="utf-8")
    (folder / "chaos.md").write_text(as_table(outcomes), encoding="utf-8")


def as_table(outcomes: list[Outcome]) -> str:
    """A row for each fault, as Markdown."""
    by_fault: dict[str, list[Outcome]] = defaultdict(list)
    for found in outcomes:
        by_fault[found.fault].append(found)
    lines = ["| fault | struck | nothing lost | median seconds to recover | did not strike |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, some in [*sorted(by_fault.items()), ("**all**", outcomes)]:
        struck = [found for found in some if found.struck]
        kept = sum(not found.problems for found in struck)
        seconds = f"{statistics.median(found.seconds for found in struck):.1f}" if struck else "none"
        lines.append(f"| {name} | {len(struck)} | {kept} | {seconds} | {len(some) - len(struck)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
