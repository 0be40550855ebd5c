"""Models behind an API, through LiteLLM: one request with retries, for the baseline and the teacher alike.

Keys come from the environment, as LiteLLM reads them; whatever an error says is shown without them.
"""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tasks.core import settings
from tasks.domain.errors import UserError
from tasks.domain.prompt import Message

ATTEMPTS = 6
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
REQUEST_S = 120.0  # how long one answer may take
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class ApiError(RuntimeError):
    """No answer came, for a reason that may pass; it was tried again until the attempts were used up."""


@dataclass(frozen=True)
class Reply:
    """An answer and what it took. `usd` is None where LiteLLM does not know the model's price."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    seconds: float


def is_model_id(name: str) -> bool:
    """Whether LiteLLM knows which provider a name belongs to."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its list of providers for a name it does not know
        litellm = _litellm()
        try:
            litellm.get_llm_provider(name)
        except Exception:  # a class of its own for each kind of name
            return False
    return True


def has_price(model: str) -> bool:
    """Whether LiteLLM's price list, which comes with the package, has a model."""
    litellm = _litellm()
    try:
        litellm.cost_per_token(model=model, prompt_tokens=1, completion_tokens=1)
    except Exception:  # a plain Exception for a model it does not know
        return False
    return True


def complete(model: str, messages: list[Message], max_tokens: int, *, sleep: Callable[[float], None] = time.sleep, **more: Any) -> Reply:
    """Ask once; tried again with growing pauses, or the one the server names, when it is busy, broken or silent.

    Args:
        more: further arguments of `litellm.completion`, such as `response_format`.

    Raises:
        UserError: the model or the key is refused; to ask again would not help.
        ApiError: no answer after `ATTEMPTS` tries, or the provider's content policy forbids one.
    """
    litellm = _litellm()
    reason = ""
    for attempt in range(ATTEMPTS):
        started = time.perf_counter()
        try:
            response = litellm.completion(model=model, messages=messages, max_tokens=max_tokens, timeout=REQUEST_S, num_retries=0, **more)
            return _reply(litellm, response, time.perf_counter() - started)
        except Exception as error:
            reason = settings.without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:500]
            status = getattr(error, "status_code", None)
            if isinstance(error, litellm.AuthenticationError) or status in (401, 403):
                raise UserError(
                    "model",
                    model,
                    f"the API refuses the key ({reason})",
                    mend="Set the provider's key in the environment, such as OPENAI_API_KEY",
                ) from None
            if isinstance(error, litellm.ContentPolicyViolationError):  # it concerns this request only
                raise ApiError(f"{model} refuses to answer ({reason})") from None
            if status is not None and status not in RETRIED and not isinstance(error, litellm.APIConnectionError):
                raise UserError(
                    "model", model, f"the API refuses the request ({reason})", mend="Correct the model's name or its address"
                ) from None
            if attempt + 1 < ATTEMPTS:
                sleep(_pause(error, attempt))
    raise ApiError(f"{model} gave no answer in {ATTEMPTS} attempts. The last: {reason}")


def _litellm() -> Any:
    import litellm

    litellm.suppress_debug_info = True
    litellm.drop_params = True
    return litellm


def _reply(litellm: Any, response: Any, seconds: float) -> Reply:
    text = response.choices[0].message.content or ""
    usage = getattr(response, "usage", None)
    try:
        usd = float(litellm.completion_cost(completion_response=response))
    except Exception:  # the model is in no price list
        usd = None
    return Reply(text, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0, usd, seconds)


def _pause(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: what `Retry-After` says, else doubling with jitter."""
    # LiteLLM replaces the provider's response by one of its own and keeps the headers beside it.
    headers = getattr(error, "litellm_response_headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    named = _retry_after(str(headers.get("retry-after") or ""))
    if named is not None:
        return min(named, LONGEST_WAIT_S)
    return min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)


def _retry_after(value: str) -> float | None:
    """Seconds of a `Retry-After` header: a number, or a date (RFC 9110, section 10.2.3)."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
