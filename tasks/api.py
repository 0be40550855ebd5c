"""Models behind an API, through LiteLLM: one request with retries, for the baseline and the teacher alike.

Keys come from the environment, as LiteLLM reads them; whatever an error or an answer says is shown and kept without them.
"""

from __future__ import annotations

import email.utils
import functools
import math
import random
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

from tasks.core import settings
from tasks.domain.errors import UserError
from tasks.domain.prompt import Message

ATTEMPTS = 6
ATTEMPTS_LOST = 2  # whose time may run out, or whose answer may come unreadable: the server is paid for each of them all the same
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LONGEST_RETRY_AFTER_S = 900.0  # what a server may ask for; to come before its time would be one more refusal
LONGEST_ANSWER = 200_000  # characters that are read and kept of an answer; a hundred items of a teacher have some tens of thousands
NO_ANSWER = ("LiteLLM: provider returned", "Empty or invalid response from LLM endpoint")  # LiteLLM's words for JSON that is no answer
MOST_TOKENS = 2**53  # that an answer may say it took; a budget's sums are floats
REQUEST_S = 120.0  # how long one answer may take
# Providers that LiteLLM asks with one key and no other way. Of others it knows not all that works: logins of a cloud, several names of a
# variable (TOGETHER_API_KEY, HF_TOKEN), servers that need no key.
KEY_ALONE = frozenset({"openai", "anthropic", "gemini", "groq", "deepseek"})
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class RefusedRequest(UserError):
    """The API will not answer this request, whatever the key; `status` is its HTTP status."""

    def __init__(self, field: str, value: object, problem: str, *, mend: str, status: int) -> None:
        super().__init__(field, value, problem, mend=mend)
        self.status, self.problem = status, problem


class TooLong(RefusedRequest):
    """The model has no room for this request and its answer."""


class Forbidden(RefusedRequest):
    """Status 403: of the key, or of what this request says, where others are answered."""


class ApiError(RuntimeError):
    """No answer came, for a reason that may pass; it was tried again until the attempts were used up."""


class Stopped(RuntimeError):
    """Raised by a `sleep` of `complete` whose caller has given up meanwhile."""


class ContentRefused(ApiError):
    """The provider's content policy forbids an answer to this one request."""


@dataclass(frozen=True)
class Reply:
    """An answer, without keys and cut at `LONGEST_ANSWER`, and what it took. `usd` is None where LiteLLM does not know the model's price.

    It has `ended` if it was not cut off at the most tokens allowed.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    usd: float | None
    seconds: float
    ended: bool


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
    """Whether LiteLLM's price list has the model, so that an answer's cost in dollars will be known."""
    try:
        _litellm().cost_per_token(model=model, prompt_tokens=1, completion_tokens=1)
    except Exception:  # a class of its own for each reason why there is no price
        return False
    return True


def missing_keys(model: str) -> list[str]:
    """Variables of which the model's provider wants one, if none is set; none if another way might do, which the first request will tell."""
    litellm = _litellm()
    if litellm.get_llm_provider(model)[1] not in KEY_ALONE:
        return []
    return list(litellm.validate_environment(model)["missing_keys"])


def key_mend(model: str) -> str:
    """What to do about a key that is missing or refused."""
    names = _litellm().validate_environment(model)["missing_keys"] or ["OPENAI_API_KEY"]
    return f"Set the provider's key in the environment, such as {', '.join(names)}"


def _own_key(litellm: Any, model: str, api_base: str | None) -> dict[str, Any]:
    """A key that is none for a provider asked the way of OpenAI, where it has none of its own: LiteLLM would send it that of OpenAI."""
    _, provider, key, _ = litellm.get_llm_provider(model, api_base=api_base)
    return {"api_key": "none"} if not key and provider != "openai" and provider in litellm.openai_compatible_providers else {}


def complete(
    model: str,
    messages: list[Message],
    max_tokens: int,
    *,
    sleep: Callable[[float], None] = time.sleep,
    timeout_s: float = REQUEST_S,
    lost: Callable[[], None] = lambda: None,
    field: str = "model",
    **more: Any,
) -> Reply:
    """Ask once; tried again with growing pauses, or the one the server names, when it is busy, broken or silent.

    Args:
        timeout_s: how long one attempt may take.
        lost: called for each attempt whose time ran out or whose answer cannot be read, which may have cost what an answer costs.
        field: what an error calls the model.
        more: further arguments of `litellm.completion`, such as `response_format`.

    Raises:
        UserError: the key is refused, or the request (`RefusedRequest`, `TooLong`), or one of them (`Forbidden`); to ask again would not
            help.
        ApiError: no answer after `ATTEMPTS` tries, or `ATTEMPTS_LOST` that were lost, the server wants to be asked again in more
            than `LONGEST_RETRY_AFTER_S`, or the provider's content policy forbids an answer (`ContentRefused`).
    """
    litellm = _litellm()
    more = _own_key(litellm, model, more.get("api_base")) | more
    reason, losses = "", 0
    for attempt in range(ATTEMPTS):
        started = time.perf_counter()
        try:
            asked = functools.partial(litellm.completion, model=model, messages=messages, max_tokens=max_tokens, timeout=timeout_s, **more)
            response = _in_time(functools.partial(asked, num_retries=0), timeout_s)
            if response is None:  # LiteLLM's way to say that a server answered 422 twice, once without what it complained of
                raise RefusedRequest(field, model, "the API cannot process the request", mend="Correct the model's name", status=422)
            break
        except RefusedRequest:
            raise
        except Exception as error:
            reason = " ".join(settings.without_secrets(f"{type(error).__name__}: {error}").split())[:500]
            status = getattr(error, "status_code", None)
            if isinstance(error, litellm.AuthenticationError) or status == 401:
                raise UserError(field, model, f"the API refuses the key ({reason})", mend=key_mend(model)) from None
            if isinstance(error, litellm.ContentPolicyViolationError):
                raise ContentRefused(f"{model} refuses to answer ({reason})") from None
            if status == 403:
                problem = f"the API refuses the key, or what is asked ({reason})"
                raise Forbidden(field, model, problem, mend=key_mend(model), status=403) from None
            unreadable = _unreadable(error)
            passes = status is None or status in RETRIED or isinstance(error, litellm.APIConnectionError)
            if "response_format" in more and "response_format" in reason:  # llama-cpp-python's server says 500 to a format it does not know
                passes = False
            if not (passes or unreadable):
                if isinstance(error, litellm.ContextWindowExceededError):
                    problem, mend = f"has no room for the request and its answer ({reason})", "Shorten the text, or allow fewer tokens"
                    raise TooLong(field, model, problem, mend=mend, status=int(status or 400)) from None
                problem, mend = f"the API refuses the request ({reason})", "Correct the model's name or its address"
                raise RefusedRequest(field, model, problem, mend=mend, status=int(status or 500)) from None
            late = isinstance(error, TimeoutError) or time.perf_counter() - started > 0.9 * timeout_s  # a gateway's 504 may come at once
            if late or unreadable:
                lost()
                losses += 1
                if losses == ATTEMPTS_LOST:
                    lack = "no answer in time" if late else "no whole answer"
                    raise ApiError(f"{model} gave {lack} in {losses} attempts ({reason})") from None
            pause = _pause(error, attempt)
            if pause > LONGEST_RETRY_AFTER_S:
                raise ApiError(f"{model} wants to be left alone for {pause:.0f} s ({reason})") from None
            if attempt + 1 < ATTEMPTS:
                sleep(pause)
    else:
        raise ApiError(f"{model} gave no answer in {ATTEMPTS} attempts. The last: {reason}")
    try:
        return _reply(litellm, model, messages, response, time.perf_counter() - started)
    except (AttributeError, IndexError, TypeError) as error:  # it was paid for: not asked again
        lost()
        raise ApiError(f"{model} gave an answer without a message ({type(error).__name__}: {error})") from None


def _in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What a call returns, or TimeoutError. An HTTP client's limit is for each read, so an answer that drips in would never end."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds + 1)  # the client's own limit comes first, and its message says more
    if not outcome:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _unreadable(error: Exception) -> bool:
    """Whether the server answered, and its answer broke off or is none. LiteLLM gives that a status, mostly 500, as if the server had."""
    import httpx

    causes, cause = list[BaseException](), error.__cause__ or error.__context__
    while cause:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(cause, httpx.HTTPStatusError) for cause in causes):
        return False
    readers = (frame.f_locals.get("self") for cause in causes for frame, _ in traceback.walk_tb(cause.__traceback__))
    if any(isinstance(reader, httpx.Response) and reader.is_success for reader in readers):  # in the middle of its body, or at its JSON
        return True
    parsing = (ValueError, LookupError, TypeError, AttributeError)  # of JSON in which something is of another kind than LiteLLM expects
    if getattr(error, "status_code", None) in (None, 500) and any(isinstance(c, parsing) and not isinstance(c, OSError) for c in causes):
        return True
    return any(words in str(error) for words in NO_ANSWER)


def _litellm() -> Any:
    import litellm

    litellm.suppress_debug_info = True
    litellm.drop_params = True
    litellm.disable_hf_tokenizer_download = True  # counting tokens must not look for a hub
    return litellm


def _reply(litellm: Any, model: str, messages: list[Message], response: Any, seconds: float) -> Reply:
    choice = response.choices[0]
    text = (choice.message.content or "").encode("utf-8", "replace").decode()  # half a character cannot be written down
    usage = getattr(response, "usage", None)
    asked, answered = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    if not (
        _is_count(asked) and _is_count(answered) and asked
    ):  # nothing, or what cannot be: counted here, or an answer would cost nothing
        asked, answered = _tokens(litellm, model, messages, text)
        usd = _usd(functools.partial(_price_of_tokens, litellm, model, asked, answered))
    else:
        usd = _usd(functools.partial(litellm.completion_cost, completion_response=response, model=model))
    kept = settings.without_known_secrets(text)[:LONGEST_ANSWER]
    return Reply(kept, asked, answered, usd, seconds, ended=getattr(choice, "finish_reason", None) != "length")


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 0 <= value <= MOST_TOKENS


def _tokens(litellm: Any, model: str, messages: list[Message], text: str) -> tuple[int, int]:
    try:
        return litellm.token_counter(model=model, messages=messages), litellm.token_counter(model=model, text=text)
    except Exception:  # no tokenizer for it
        return sum(len(message["content"]) for message in messages) // 4, len(text) // 4


def _usd(price: Callable[[], float]) -> float | None:
    try:
        usd = float(price())
    except Exception:  # the model is in no price list; a class of its own for each reason why
        return None
    return max(0.0, usd) if math.isfinite(usd) else None  # some of what it is made of the server says


def _price_of_tokens(litellm: Any, model: str, prompt_tokens: int, completion_tokens: int) -> float:
    return sum(litellm.cost_per_token(model=model, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens))


def _pause(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: what `Retry-After` says, else doubling with jitter."""
    # LiteLLM replaces the provider's response by one of its own and keeps the headers beside it.
    headers = getattr(error, "litellm_response_headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    named = _retry_after(str(headers.get("retry-after") or ""))
    if named is not None:
        return named
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
