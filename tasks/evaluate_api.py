"""Stage `evaluate_api`: accuracy, latency and price of a model behind an API, all from the same requests.

A latency is that of one answer, from the request to its last token, while up to `parallel` requests are under way. Every answer
is written down at once: a stage that was killed, or stopped by its budget, buys none of them again.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tasks.benchmark import percentiles
from tasks.core import progress
from tasks.core.manifests import checksum
from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec
from tasks.evaluate import EvaluateConfig, conversations, score_and_keep
from tasks.synthesize import read_rows
from tasks.variants import Variant

if TYPE_CHECKING:
    from tasks.runtimes.litellm import ApiCompletion

ANSWERS = "answers.jsonl"  # every answer with its time, tokens and price, the raw samples; and what got none
MOST_TOKENS = 256  # of an answer, unless a run says otherwise
Answers = dict[tuple[str, str], dict[str, Any]]  # by split and id of the row


class EvaluateApiConfig(StageConfig):
    """A model behind an API. Its key is read from the environment, as LiteLLM does."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"api_base", "max_usd", "parallel"}
    )  # `parallel` moves latencies, which `performance` says
    model: str = Field(min_length=1, description="A LiteLLM model id, such as openai/gpt-4.1")
    few_shot: int = Field(0, ge=0, le=64, description="Ask once more, with so many rows of `train` as examples; 0 leaves that out")
    api_base: str | None = Field(None, pattern=r"^https?://", description="The API's address, where it is not the provider's usual one")
    max_usd: float | None = Field(None, gt=0, description="Most dollars that asking once may cost; null does not limit")
    splits: tuple[Literal["test", "hard", "validation"], ...] = Field(("test", "hard"), min_length=1)
    max_tokens: int = Field(MOST_TOKENS, ge=8, le=16_384, description="Longer answers are cut")
    parallel: int = Field(8, ge=1, le=256, description="Requests under way at a time")


def api_variants(configs: Sequence[EvaluateApiConfig]) -> list[tuple[Variant, EvaluateApiConfig]]:
    """Every model without examples and, if wanted, with them. Named by the last part of its id, or by all of it if two share that."""
    short = [config.model.split("/")[-1] for config in configs]
    found = []
    for config, last in zip(configs, short, strict=True):
        name = "api-" + re.sub(r"[^\w.-]+", "-", last if short.count(last) == 1 else config.model)
        for few_shot in dict.fromkeys((0, config.few_shot)):
            variant = Variant(
                name=name + (f"-{few_shot}-shot" if few_shot else ""),
                format="api",
                bits=None,
                runtime="litellm",
                role="api",
                few_shot=few_shot,
            )
            found.append((variant, config.model_copy(update={"few_shot": few_shot})))
    return found


def check(configs: Sequence[EvaluateApiConfig]) -> None:
    """Check models and addresses without asking them.

    Raises:
        UserError: a model no provider is known for, one that is listed twice, a limit that cannot be kept, a key in an address.
    """
    from tasks.api import has_price, is_model_id, key_mend, missing_keys

    for number, config in enumerate(configs):
        field = f"api.{number}"
        if [other.model for other in configs].count(config.model) > 1:
            raise UserError(f"{field}.model", config.model, "is listed twice", mend="Give each model one entry")
        if re.search("[@?#]", config.api_base or ""):  # not shown: it may hold a key
            raise UserError(
                f"{field}.api_base", None, "has a user name or a query", mend="Give keys in the environment, such as OPENAI_API_KEY"
            )
        if not is_model_id(config.model):
            raise UserError(
                f"{field}.model", config.model, "is no model id LiteLLM knows a provider for", mend="For example openai/gpt-4.1"
            )
        if config.max_usd is not None and not has_price(config.model):
            problem = f"cannot be kept: LiteLLM has no price of {config.model}"
            raise UserError(f"{field}.max_usd", config.max_usd, problem, mend="Set it to null")
        if not config.api_base and missing_keys(config.model):
            raise UserError(f"{field}.model", config.model, "needs a key", mend=key_mend(config.model))


@stage("evaluate_api", version=2, resumable=True, keeps=ANSWERS, varies="a provider answers it, and how long that takes is part of it")
def evaluate_api(config: EvaluateApiConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Score a model on splits of `inputs["dataset"]`; goes on with the answers that an earlier attempt left in `out_dir`.

    Raises:
        UserError: the API refuses or does not answer, or stopped to before the end, or the budget is used up. What was answered stays for
            the next attempt.
    """
    from tasks.runtimes.litellm import LiteLlmRuntime

    spec = load_spec(str(inputs["dataset"]))
    rows = {split: read_rows(inputs["dataset"] / f"{split}.jsonl") for split in config.splits}
    every = [(split, row) for split in rows for row in rows[split]]
    how = EvaluateConfig(zero_shot=True, few_shot=config.few_shot)
    requests = conversations(how, inputs["dataset"], spec, [row["text"] for _, row in every])
    kept, paid = _read_answers(out_dir / ANSWERS)
    answers: Answers = {}
    todo = []
    for (split, row), request in zip(every, requests, strict=True):
        answer, name = kept.get((split, row["id"]), {}), checksum(request)
        is_its_own = answer.get("request") == name  # not if the row was damaged when it was asked
        if is_its_own and not answer.get("in_doubt"):
            answers[split, row["id"]] = answer
        else:
            todo.append((split, row, request, is_its_own))
    before = _bought(answers)
    refused = [answer["problem"] for answer in answers.values() if answer.get("problem")]
    prices = [usd or 0.0 for usd in paid]
    left = None if config.max_usd is None else config.max_usd - sum(prices)
    with (out_dir / ANSWERS).open("a", encoding="utf-8") as file:

        def keep(done: ApiCompletion, in_doubt: bool = False) -> None:
            split, row, request, _ = todo[done.index]
            answer = {"split": split, "id": row["id"], "request": checksum(request), "output": done.text} | _figures(done, config.parallel)
            file.write(_line(answer | ({"in_doubt": True} if in_doubt else {})))
            file.flush()
            answers[split, row["id"]] = answer
            paid.extend(_price(answer))

        model = LiteLlmRuntime(config.model, config.api_base, left, dearest=max(prices, default=0.0), answered=len(before), keep=keep)
        started = time.perf_counter()
        asked = [request for _, _, request, _ in todo]
        with closing(model.generate(asked, config.max_tokens, config.parallel)) as answering:
            for _ in progress.track(answering, len(asked), config.model):
                pass
        wall_s = time.perf_counter() - started - model.paused_s
        in_doubt = [done for done in model.in_doubt if not todo[done.index][-1]]  # what was in doubt before counts as wrong
        for done in in_doubt:
            keep(done, in_doubt=True)
    bought, failed = _bought(answers), [*refused, *model.failed]
    if not bought:
        (out_dir / ANSWERS).unlink()  # refusals cost nothing, and another server at that address may not refuse
        raise UserError("model", config.model, f"answered none of {len(failed)} requests. The first: {failed[0]}")
    if in_doubt:
        last = f"the last {len(in_doubt)} of {len(asked)} requests"
        problem = f"gave no answer to {last}, as where it is gone or the money is used up. The first: {in_doubt[0].problem}"
        mend = "Run again to ask these alone: answers that came are kept. What gets none then counts as wrong"
        raise UserError("model", config.model, problem, mend=mend)
    results: dict[str, Any] = {}
    for split, found in rows.items():
        texts = [answers[split, row["id"]]["output"] if (split, row["id"]) in answers else "" for row in found]
        results[split] = score_and_keep(found, texts, spec, out_dir / f"{split}.jsonl")
    performance = _performance(bought) | {
        "usd": None if None in paid else sum(usd or 0.0 for usd in paid),
        "requests_s_batched": len(bought) / wall_s if not before else None,
        "requests_s_batched_reason": "asking was interrupted and taken up again" if before else None,
        **_parallel(bought),
        "requests_failed": len(failed),
        "first_failure": failed[0] if failed else None,
    }
    return {**results, "performance": performance}


def _figures(done: ApiCompletion, parallel: int) -> dict[str, Any]:
    """What else is kept of an answer; where there is none, its reason alone."""
    problem = {"problem": done.problem} if done.problem else {}
    if math.isnan(done.total_s):
        return problem
    return problem | {
        "seconds": done.total_s,
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "usd": done.usd,
        "parallel": parallel,
    }


def _bought(answers: Answers) -> list[dict[str, Any]]:
    """Those that took time and tokens: a refusal did not."""
    return [answer for answer in answers.values() if "seconds" in answer]


def _line(answer: dict[str, Any]) -> str:
    return json.dumps({**answer, "sha256": checksum(answer)}, ensure_ascii=False) + "\n"


def _price(answer: dict[str, Any]) -> list[float | None]:
    """What an answer cost, None if nobody knows; nothing for a refusal."""
    return [answer["usd"]] if "usd" in answer else []


def _read_answers(path: Path) -> tuple[Answers, list[float | None]]:
    """What an earlier attempt was answered, and the price of each answer, of rows that were damaged then too: a row may have several. Lines that
    a kill cut short, or that something changed since, are dropped from the file."""
    found: Answers = {}
    paid: list[float | None] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    whole = []
    for line in lines[:-1]:  # what stands after the last line break was cut short
        try:
            answer = json.loads(line)
            if answer.pop("sha256") != checksum(answer):
                continue
            found[answer["split"], answer["id"]] = answer
            paid.extend(_price(answer))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        whole.append(line + b"\n")
    if b"".join(whole) != b"\n".join(lines):
        new = path.with_suffix(".new")  # answers cost money: a kill while they are written must not lose them
        new.write_bytes(b"".join(whole))
        new.replace(path)
    return found, paid


def _parallel(answers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How many requests were under way at a time: not one number, if asking was stopped and taken up with another."""
    at_a_time = sorted({answer["parallel"] for answer in answers if "parallel" in answer})
    if len(at_a_time) == 1:
        return {"parallel": at_a_time[0]}
    return {"parallel": None, "parallel_reason": f"{' or '.join(map(str, at_a_time))} requests at a time, since asking was interrupted"}


def _performance(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of `performance` that can be known of an API. Requests without an answer have no time and no price."""
    seconds = [answer["seconds"] for answer in answers]
    prices = [answer["usd"] for answer in answers]
    return {
        "device": "api",
        "latency_ms": percentiles(seconds),
        "requests_s": len(seconds) / sum(seconds),
        "completion_tokens": statistics.mean(answer["completion_tokens"] for answer in answers),
        "prompt_tokens": statistics.mean(answer["prompt_tokens"] for answer in answers),
        "requests": sum(not answer.get("problem") for answer in answers),
        "usd_per_1k_requests": None if None in prices else sum(prices) * 1000 / len(answers),
    }
