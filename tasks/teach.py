"""Stage `teach`: phrase patterns, products and labelled utterances from a teacher, any model that LiteLLM reaches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from tasks.api import has_price, is_model_id, key_mend, missing_keys
from tasks.core import settings
from tasks.core.stage import StageConfig, stage
from tasks.domain.bank import load_bank
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec
from tasks.synthesize import SynthesizeConfig, check_domain
from tasks.teaching.answers import items_of
from tasks.teaching.asking import FIELD, Asked, Budget, Request, Teacher
from tasks.teaching.log import AnswerLog
from tasks.teaching.plan import make_plan
from tasks.teaching.prompts import PROMPT_VERSION
from tasks.teaching.validators import Judge

NO_TEACHER = "none"
KINDS = ("patterns", "products", "utterances")
SHOWN = 500  # characters of an answer without items that are kept beside the reason


class TeacherConfig(StageConfig):
    """How a teacher is asked. Which one is `data.teacher`; a budget that is used up ends the asking and not the run."""

    requests: int = Field(72, ge=1, le=100_000, description="How many requests to ask; languages, intents and manners take turns")
    items_per_request: int = Field(20, ge=1, le=100)
    concurrency: int = Field(4, ge=1, le=64, description="Requests at the same time")
    max_usd: float | None = Field(None, gt=0, description="Dollars that may be spent on these requests, answers of earlier runs included")
    max_tokens: int | None = Field(None, ge=1, description="Tokens, of questions and answers, that may be spent")
    max_requests: int | None = Field(None, ge=1, description="Answers that may be bought; an attempt whose answer was lost counts as one")
    temperature: float = Field(1.0, ge=0, le=2)
    timeout_s: float = Field(120, gt=0, le=3600, description="How long one attempt of a request may take")
    api_base: str = Field(
        "", description="Address of a server of your own; empty for the provider's. The model's id must tell two servers' models apart"
    )
    secret_block: str = Field("", description="Name of a Prefect Secret block that holds the key; empty for the environment")

    @field_validator("api_base")
    @classmethod
    def _without_a_key(cls, address: str) -> str:
        parts = urlsplit(address)
        if address and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("is no address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("must not hold a user, a password or a key: give keys by the environment or teacher.secret_block")
        return address


class TeachConfig(TeacherConfig):
    """A teacher's whole task: what `data` and `teacher` say, and the version of the prompts."""

    # What says where something is, or how fast and with what limits of time it is asked: none changes an answer.
    not_in_key: ClassVar[frozenset[str]] = frozenset({"domain", "concurrency", "timeout_s", "api_base", "secret_block"})
    model: str
    prompt_version: int = PROMPT_VERSION
    domain: str
    domain_sha256: str
    languages: tuple[str, ...]
    intents: tuple[str, ...]


def teach_config(data: SynthesizeConfig, teacher: TeacherConfig) -> TeachConfig:
    """The stage's config for a run's data."""
    return TeachConfig(
        **teacher.model_dump(),
        model=data.teacher,
        domain=data.domain,
        domain_sha256=data.domain_sha256,
        languages=data.languages,
        intents=data.intents,
    )


def check_teacher(data: SynthesizeConfig, teacher: TeacherConfig) -> None:
    """Find out before any request what would make all of them useless.

    Raises:
        UserError: an unknown model, no key, or a budget in dollars for a model without a known price.
    """
    model = data.teacher
    if model == NO_TEACHER:
        return
    if not is_model_id(model):
        allowed = f"{NO_TEACHER}, or a LiteLLM model id such as openai/gpt-4.1-mini"
        raise UserError(FIELD, model, "is no model that LiteLLM knows", allowed=allowed)
    if teacher.max_usd is not None and not has_price(model):
        problem = f"is a budget in dollars, and the price of {model} is unknown"
        raise UserError("teacher.max_usd", teacher.max_usd, problem, mend="Set teacher.max_tokens or teacher.max_requests instead")
    if not (teacher.secret_block or teacher.api_base) and missing_keys(model):
        mend = f"{key_mend(model)}, or name a Prefect Secret block in teacher.secret_block"
        raise UserError(FIELD, model, "there is no key for it", mend=mend)


@stage(
    "teach", version=3, libraries=("rapidfuzz", "py3langid"), varies="another model writes it; only answers that are in the log come again"
)
def teach(config: TeachConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Ask, check, and write `patterns.jsonl`, `products.jsonl`, `utterances.jsonl` and `rejected.jsonl`.

    Returns:
        The `dataset.teacher` of the report.

    Raises:
        UserError: the teacher refuses or cannot be reached; answers that came are kept in the log. Or the domain is not the one the run
            began with, and nothing is asked.
    """
    spec = load_spec(config.domain)
    banks = {language: load_bank(spec, language) for language in config.languages}
    check_domain(config.domain, config.domain_sha256)
    plan = make_plan(
        spec, banks, config.intents or list(spec.intents), config.model, config.requests, config.items_per_request, config.temperature
    )
    budget = Budget(config.max_usd, config.max_tokens, config.max_requests)
    log_file = settings.load_settings().home / "teacher" / "answers.jsonl"
    with AnswerLog(log_file, {request.hash for request in plan}) as log:
        asked = Teacher(config.model, log, config.timeout_s, _access(config)).ask_all(plan, budget, config.concurrency)
    accepted, rejected = _judged(plan, asked, Judge(spec, banks))
    for kind in KINDS:
        _write(out_dir / f"{kind}.jsonl", accepted[kind])
    _write(out_dir / "rejected.jsonl", rejected)
    return _summary(config, asked, accepted, rejected)


def _access(config: TeachConfig) -> dict[str, Any]:
    """Where the teacher is and who asks: what must be in no artefact, log or hash."""
    key = settings.teacher_key()
    if not key and config.api_base and missing_keys(config.model):
        key = "none"  # a server of one's own needs none, but the client of the provider asks for one
    return {**({"api_base": config.api_base} if config.api_base else {}), **({"api_key": key} if key else {})}


def _judged(plan: Sequence[Request], asked: Asked, judge: Judge) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Rows by kind, and what was rejected with its reason, in the order of the plan whenever the answers came."""
    accepted: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    rejected: list[dict[str, Any]] = []
    for request in plan:
        about = {"kind": request.kind, "language": request.language, "topic": request.topic, "request": request.hash}
        if request.hash in asked.unanswered:
            rejected.append({**about, "reason": "no_answer", "answer": asked.unanswered[request.hash]})
        if request.hash not in asked.answers:
            continue
        items, problem = items_of(asked.answers[request.hash].text)
        if problem:
            rejected.append({**about, "reason": problem, "answer": asked.answers[request.hash].text[:SHOWN]})
        for item in items:
            row, reason = judge.judge(item, request)
            if row is None:
                rejected.append({**about, "reason": reason, "item": item})
            else:
                accepted[request.kind].append(row)
    return accepted, rejected


def _summary(
    config: TeachConfig, asked: Asked, accepted: Mapping[str, Sequence[Any]], rejected: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    answers = asked.answers.values()  # what attempts whose answer was lost may have cost is in the budget alone: a guess
    price = {} if has_price(config.model) else {"usd_reason": f"LiteLLM does not know the price of {config.model}"}
    return {
        "model": config.model,
        "prompt_version": config.prompt_version,
        "requests": len(asked.answers),
        "requests_from_log": asked.from_log,
        "tokens": sum(answer.tokens for answer in answers),
        "usd": None if price else round(sum(answer.usd or 0.0 for answer in answers), 6),
        **price,
        "accepted": {kind: len(rows) for kind, rows in accepted.items()},
        "rejected": dict(Counter(str(row["reason"]) for row in rejected).most_common()),
        "stopped": asked.stopped,
    }


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # half characters, of rejected items, as JSON escapes them
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
