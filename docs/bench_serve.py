"""What serving over HTTP costs: `make bench-serve ARGS='--gguf FILE'`, or `python docs/bench_serve.py --gguf FILE`.

By turns, round after round: `generate` answers texts of tests/handwritten.jsonl, `--parallel` at a time, as `requests_s_batched` of the
benchmark is measured; then the server answers the same texts, asked by `--clients` connections of a load generator, each of which asks
again as soon as it has its answer. All three are processes of their own and share the machine's cores: what the load generator takes
(its CPU time is printed) the server does not get. A request's time is from its sending to the end of its answer, waiting included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Round = tuple[dict[str, Any], dict[str, Any]]  # what `direct` and `load` measured
TEXTS = ROOT / "tests" / "handwritten.jsonl"


def texts(count: int) -> list[str]:
    """So many texts, again from the first after the last."""
    lines = TEXTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(lines[i % len(lines)])["text"] for i in range(count)]


def cpu_s() -> float:
    """CPU seconds of this process until now."""
    return time.process_time()


def direct(options: argparse.Namespace) -> None:
    """For each line of standard input, answer all texts with `generate` and print one line of JSON."""
    from tasks.core import hardware
    from tasks.domain import prompt
    from tasks.domain.grammar import answer_grammar
    from tasks.domain.spec import load_spec
    from tasks.runtimes.llama_cpp import LlamaCppRuntime

    spec = load_spec("ecommerce")
    grammar = answer_grammar(spec) if options.constrained else None
    model = LlamaCppRuntime(options.gguf, options.threads or hardware.cores(), grammar=grammar)
    asked = [prompt.messages(spec, text) for text in texts(options.requests)]
    for _ in sys.stdin:
        model.forget()
        started, cpu = time.perf_counter(), cpu_s()
        tokens = sum(completion.completion_tokens for completion in model.generate(asked, options.max_tokens, options.parallel))
        print(json.dumps({"s": time.perf_counter() - started, "cpu_s": cpu_s() - cpu, "tokens": tokens}), flush=True)


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """Ask a server all texts once, each connection one after the other."""
    import httpx

    waiting, latencies, statuses = texts(options.requests)[::-1], list[float](), list[int]()
    limits = httpx.Limits(max_connections=options.clients, max_keepalive_connections=options.clients)
    async with httpx.AsyncClient(base_url=options.load, timeout=600, limits=limits) as client:

        async def ask_on() -> None:
            while waiting:
                text, sent = waiting.pop(), time.perf_counter()
                response = await client.post("/intent", json={"text": text})
                latencies.append(time.perf_counter() - sent)
                statuses.append(response.status_code)

        await asyncio.gather(*(client.get("/health") for _ in range(options.clients)))
        started, cpu = time.perf_counter(), cpu_s()
        await asyncio.gather(*(ask_on() for _ in range(options.clients)))
        return {"s": time.perf_counter() - started, "cpu_s": cpu_s() - cpu, "latencies": latencies, "good": statuses.count(200)}


def main() -> None:
    """Print one row a round, and what all rounds say together."""
    options = read_options()
    if options.direct:
        direct(options)
    elif options.load:
        print(json.dumps(asyncio.run(load(options))))
    else:
        summarise(options, measure(options))


def measure(options: argparse.Namespace) -> list[Round]:
    """Start both sides and let them take turns."""
    import psutil

    from tasks.core.lifetime import tied

    gguf = ["--gguf", str(options.gguf.absolute()), *(["--constrained"] if options.constrained else [])]
    me = [__file__, *gguf, *flags(options, "requests", "parallel", "threads", "max_tokens", "clients")]
    serve = ["-m", "flows.cli", "serve", *gguf, *([] if options.constrained else ["--no-constrained"])]
    serve += ["--port", "0", "--rate", "0", "--timeout-s", "600", "--max-waiting", str(options.clients)]
    serve += flags(options, "parallel", "threads", "max_tokens")
    piped: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    rounds: list[Round] = []
    with (
        subprocess.Popen(tied("python", *serve), **piped) as server,
        subprocess.Popen(tied("python", *me, "--direct"), stdin=subprocess.PIPE, **piped) as alone,
    ):
        assert server.stdout and alone.stdin and alone.stdout
        said, seen = server.stdout.readline(), psutil.Process(server.pid)
        if not said.startswith("Serving "):
            raise SystemExit(f"The server did not start: {said or 'it said nothing'}")
        address = said.split()[-1]
        print("| round | generate requests/s | HTTP requests/s | ratio | CPU ms/request: generate, server, load generator |")
        print("| ---: | ---: | ---: | ---: | --- |")
        for number in range(options.rounds + 1):  # the first warms up
            print(file=alone.stdin, flush=True)
            plain = json.loads(alone.stdout.readline())
            before = sum(seen.cpu_times()[:2])
            http = json.loads(
                subprocess.run(tied("python", *me, "--load", address), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
            )
            http["server_cpu_s"] = sum(seen.cpu_times()[:2]) - before
            if number:
                rounds.append((plain, http))
                show(number, options.requests, plain, http)
        server.terminate()
        alone.stdin.close()
    return rounds


def flags(options: argparse.Namespace, *names: str) -> list[str]:
    """Options as they are written on a command line."""
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def show(number: int, requests: int, plain: dict[str, Any], http: dict[str, Any]) -> None:
    """One row of the table."""
    ms = ", ".join(f"{1000 * s / requests:.1f}" for s in (plain["cpu_s"], http["server_cpu_s"], http["cpu_s"]))
    print(f"| {number} | {requests / plain['s']:.2f} | {requests / http['s']:.2f} | {plain['s'] / http['s']:.1%} | {ms} |", flush=True)


def summarise(options: argparse.Namespace, rounds: list[Round]) -> None:
    """Medians over the rounds, and percentiles of all requests together."""
    from tasks.benchmark import percentiles

    figures = {name: statistics.median(options.requests / part[i]["s"] for part in rounds) for i, name in enumerate(("generate", "HTTP"))}
    ratio = statistics.median(plain["s"] / http["s"] for plain, http in rounds)
    all_of_them = percentiles([seconds for _, http in rounds for seconds in http["latencies"]])
    answered = sum(http["good"] for _, http in rounds)
    print(f"\n{figures['HTTP']:.2f} requests/s over HTTP, {figures['generate']:.2f} by generate, median ratio of a round {ratio:.1%}")
    print(f"{options.clients} clients: p50 {all_of_them['p50']:.0f} ms, p95 {all_of_them['p95']:.0f} ms, p99 {all_of_them['p99']:.0f} ms")
    print(f"{answered} of {options.requests * len(rounds)} requests answered with 200")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=128, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=16)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp; 0: one for each core")
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--constrained", action="store_true", help="both; a model that was not fine-tuned is much slower with it")
    parser.add_argument("--direct", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
