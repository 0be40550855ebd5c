"""How fast an adapter is trained, beside TRL's `SFTTrainer`: `make bench-train`, or `python docs/bench_train.py` where trl is installed.

Both get the same rows of `quick`, base model in NF4, adapter, optimizer, learning rates, schedule, seed, batch, precision and cores (see
bench_train_arms.py). Ours is the pipeline's stage as it stands. `trl-defaults` is SFTTrainer as it comes; `trl` has rows of like length
together, `trl-packed` rows packed without padding, and neither saves memory by computing twice, as the defaults do.

Every training is a process of its own, arms take turns, and the order changes from round to round. Tokens are those of prompts and
completions, without padding, of the steps after `--warmup`, in which our layers are compiled; per CPU second they say what a trainer costs
where other programs keep the machine busy. The wall time is of the whole process, to which ours adds its evaluation. One function tells
the validation loss of all adapters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tasks.config import RunConfig, load_config, resolve
from tasks.core import hardware, settings
from tasks.core.lifetime import tied
from tasks.domain.errors import UserError

CHILD = Path(__file__).with_name("bench_train_arms.py")
ARMS = ("ours", "trl", "trl-packed", "trl-defaults")
Outcome = dict[str, Any]  # what an arm printed, with its wall time


def comparison(options: argparse.Namespace) -> RunConfig:
    """`quick` with the rows and the batch asked for, in a precision that both trainers have."""
    precision = "bf16" if hardware.gpu() or hardware.native_bf16() else "fp32"
    changes = {"data.train_rows": options.rows, "data.validation_rows": options.validation, "train.batch_size": options.batch}
    # Ours would be saved and evaluated on the way; TRL's is not, and neither is timed. Nor does TRL change to the 16-bit weights at last, or
    # count the intent more than once.
    alike = {"train.precision": precision, "train.checkpoints": 1, "train.finish_in_16bit": 0, "train.intent_weight": 1}
    return resolve(load_config("quick", {**changes, **alike}))


def prepare(config: RunConfig) -> dict[str, str]:
    """Folders of base model and rows, made by the pipeline's stages or found in its store."""
    from tasks.base_model import base_model
    from tasks.core.artifacts import Store
    from tasks.core.child import FORKS
    from tasks.core.stage import run
    from tasks.synthesize import synthesize

    places = settings.load_settings()
    store = Store(places.store_uri, places.home)
    wanted = {"base_model": (base_model, config.base_model), "dataset": (synthesize, config.data)}
    made = {name: run(stage, stage_config, {}, store, places.home / "logs")[0] for name, (stage, stage_config) in wanted.items()}
    FORKS.close()  # it would keep the memory of what it imported
    return {name: str(store.fetch(manifest)) for name, manifest in made.items()}


def child(request: dict[str, Any], reuse_memory: bool) -> tuple[Any, float]:
    """What a process of its own answers, and the seconds from its start to its end."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            tied("python", str(CHILD), json.dumps(request)),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=settings.child_environment(reuse_memory),
        )
        if done.returncode:
            log.seek(0)
            raise SystemExit(f"The arm {request['arm']} failed with exit code {done.returncode}:\n{log.read()[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - started


def train(arm: str, config: RunConfig, inputs: dict[str, str], out_dir: Path, options: argparse.Namespace, profiled: bool) -> Outcome:
    """Train one arm once; to be profiled, only as long as a profile takes."""
    out_dir.mkdir(parents=True)
    stage_config = config.train
    if profiled:
        stage_config = stage_config.model_copy(update={"epochs": (options.warmup + 4) / -(-options.rows // options.batch)})
    request = {"arm": arm, "config": stage_config.model_dump(mode="json"), "inputs": inputs, "out_dir": str(out_dir)}
    # As the pipeline starts its own stage; who starts another trainer would not know of it.
    reuse_memory = arm == "ours" or options.reuse_memory
    outcome, wall_s = child({**request, "profiled_after": options.warmup if profiled else None}, reuse_memory)
    outcome["wall_s"] = wall_s
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"arm": arm, "rows": options.rows, "batch": options.batch, **outcome}) + "\n")
    return outcome


def tokens_per_s(outcome: Outcome, after: int, clock: str = "ends") -> float:
    """Tokens without padding per second of the steps after the first `after`; per CPU second with the clock `cpu`."""
    ends, batches = outcome[clock], outcome["batches"]
    if len(ends) != len(batches) + 1:
        raise SystemExit(f"{len(batches)} batches were counted and {len(ends) - 1} steps timed")
    return sum(tokens for tokens, _ in batches[after:]) / (ends[-1] - ends[after])


def padding(outcome: Outcome) -> float:
    """Share of what was computed that is padding."""
    tokens, padded = (sum(batch[i] for batch in outcome["batches"]) for i in (0, 1))
    return 1 - tokens / padded


def spread(figures: list[float], form: str) -> str:
    """Median, and the range where there is one."""
    middle = f"{statistics.median(figures):{form}}"
    return middle if len(figures) == 1 else f"{middle} ({min(figures):{form}} to {max(figures):{form}})"


def main() -> None:
    """Print the table, the ratio of every round, and with `--profile` where the time goes."""
    options = read_options()
    try:
        check(options)
        config = comparison(options)
        inputs = prepare(config)
    except UserError as error:
        raise SystemExit(str(error)) from None
    disturbance = hardware.Disturbance()
    with tempfile.TemporaryDirectory() as folder:
        rounds: list[dict[str, Outcome]] = []
        for number in range(options.repeats):
            turn = options.arms if number % 2 == 0 else options.arms[::-1]
            rounds.append({arm: train(arm, config, inputs, Path(folder) / f"{arm}-{number}", options, False) for arm in turn})
            said = ", ".join(f"{arm} {tokens_per_s(rounds[-1][arm], options.warmup):.1f}" for arm in options.arms)
            print(f"round {number + 1}: {said} tokens/s", flush=True)
        others = disturbance.cores()
        adapters = {f"{arm}-{number}": f"{folder}/{arm}-{number}" for number in range(options.repeats) for arm in options.arms}
        request = {"arm": "judge", "config": config.train.model_dump(mode="json"), "inputs": inputs, "adapters": adapters}
        losses, _ = child(request, reuse_memory=False)
        show(options, config, rounds, losses, others)
        for arm in options.arms if options.profile else ():
            profiled = train(arm, config, inputs, Path(folder) / f"{arm}-profiled", options, True)
            print(f"\nProfile of {arm} (torch.profiler, 3 steps after the warm-up, its first process): {shares(profiled['shares'])}")


def show(
    options: argparse.Namespace, config: RunConfig, rounds: list[dict[str, Outcome]], losses: dict[str, float], others: dict[str, float]
) -> None:
    """The table and the ratios."""
    if len({outcome["trainable"] for turn in rounds for outcome in turn.values()}) > 1:
        raise SystemExit("The arms trained adapters of different sizes")
    print(
        f"\n{hardware.cpu_model()}, {hardware.cores()} cores, {hardware.gpu() or 'no GPU'}; {config.train.precision}, {options.rows} rows,"
    )
    print(f"batches of {options.batch}, {options.repeats} rounds; others took {others['others_cores']:.2f} cores meanwhile, and the host")
    print(f"{others['stolen_cores']:.2f}; validation loss of the base model {losses['untrained']:.3f}\n")
    print("| trainer | tokens/s | per CPU s | with warm-up | steps | tokens | padding | wall s | peak RSS MB | validation loss |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | --- | ---: | --- |")
    for arm in options.arms:
        runs = [turn[arm] for turn in rounds]
        steps, tokens = len(runs[0]["batches"]), sum(real for real, _ in runs[0]["batches"])
        cells = [
            spread([tokens_per_s(run, options.warmup) for run in runs], ".1f"),
            spread([tokens_per_s(run, options.warmup, "cpu") for run in runs], ".1f"),
            spread([tokens_per_s(run, 0) for run in runs], ".1f"),
            f"{steps} | {tokens:,} | {padding(runs[0]):.0%}",
            spread([run["wall_s"] for run in runs], ".0f"),
            f"{max(run['peak_rss_mb'] for run in runs):.0f}",
            spread([losses[f"{arm}-{number}"] for number in range(len(rounds))], ".3f"),
        ]
        print(f"| {arm} | {' | '.join(cells)} |")
    print()
    for arm in options.arms:
        if arm != "ours" and "ours" in options.arms:
            said = {
                clock: spread([ratio(turn["ours"], turn[arm], options.warmup, clock) for turn in rounds], ".2f")
                for clock in ("ends", "cpu")
            }
            print(f"ours / {arm}: {said['ends']} times the tokens/s, {said['cpu']} times the tokens per CPU second")


def ratio(one: Outcome, other: Outcome, after: int, clock: str) -> float:
    """How many times the tokens per second."""
    return tokens_per_s(one, after, clock) / tokens_per_s(other, after, clock)


def shares(found: dict[str, float]) -> str:
    """Phases in the order of their size, what is in none of them, and then the kinds of operators."""
    phases = {name: share for name, share in found.items() if not name.startswith("operators: ")}
    phases["the rest"] = 1 - sum(phases.values())
    kinds = {name.removeprefix("operators: "): share for name, share in found.items() if name not in phases}
    said = [", ".join(f"{name} {share:.1%}" for name, share in sorted(part.items(), key=lambda item: -item[1])) for part in (phases, kinds)]
    return f"{said[0]}; of which operators: {said[1]}"


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be compared.

    Raises:
        UserError: an unknown arm, a number that is too small, or no trl.
    """
    for arm in options.arms:
        if arm not in ARMS:
            raise UserError("--arms", arm, "is unknown", allowed=list(ARMS))
    for name, least in (("validation", 1), ("batch", 1), ("repeats", 1), ("warmup", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}", getattr(options, name), f"must be {least} or more")
    # A profile lasts 3 steps; packed rows may fill a step less than there are batches.
    if options.rows < (least := options.batch * (options.warmup + 5)):
        raise UserError(
            "--rows", options.rows, f"leaves too few steps after the warm-up: must be {least} or more", mend="Or use a smaller --batch"
        )
    if any(arm != "ours" for arm in options.arms) and importlib.util.find_spec("trl") is None:
        raise UserError("--arms", ",".join(options.arms), "needs the package trl", mend="`make bench-train` installs it")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=384, help="training rows; one epoch")
    parser.add_argument("--validation", type=int, default=144, help="rows the loss is measured on")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3, help="steps that are not in tokens/s")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help=f"of {','.join(ARMS)}")
    parser.add_argument("--reuse-memory", action="store_true", help="start TRL too with the allocator settings of our stages")
    parser.add_argument("--output", type=Path, help="a JSONL file to which the times and tokens of every step are added, as they come")
    parser.add_argument("--profile", action="store_true", help="train every arm a few steps more, under torch.profiler")
    return parser.parse_args()


if __name__ == "__main__":
    main()
