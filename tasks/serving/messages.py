"""Bodies of requests and answers: ours, and those of OpenAI's chat completions as far as they make sense here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, StringConstraints, model_validator

# As many as `--max-texts` may allow. Lists are read to their first error (`fail_fast`), the one that is told: with an error for each item,
# a body of ordinary size took seconds in which nobody else was answered.
LONGEST_LIST = 10_000
LONGEST_CHAT = 1_000  # messages, and parts of one; one more still is a body that is read, and answered with what is wrong


def _is_unicode(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("has half of a surrogate pair, which is no character") from None
    if not text.strip():
        raise ValueError("is empty")
    return text


Text = Annotated[str, StringConstraints(strict=True), AfterValidator(_is_unicode)]


class IntentRequest(BaseModel):
    """One `text`, or several `texts`. Lengths are limits of the server, see `cartwright serve --help`."""

    text: Text | None = Field(None, description="What a customer says", examples=["two olive oils please"])
    texts: Annotated[list[Text], Field(min_length=1, max_length=LONGEST_LIST, fail_fast=True)] | None = Field(
        None, description="What several customers say"
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> IntentRequest:
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either `text` or `texts`")
        return self


class Answer(BaseModel):
    """`answer` is null where the model's `output` is no valid answer, and `problem` says why."""

    answer: dict[str, Any] | None
    problem: str | None = None
    output: str | None = None


class IntentAnswer(BaseModel):
    """The answer to `text`, or those to `texts` in their order."""

    model: str
    version: str
    answer: dict[str, Any] | None = None
    problem: str | None = None
    output: str | None = None
    answers: list[Answer] | None = None


class Part(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    # The list first: what is wrong in it is told, rather than that it is no text.
    content: Annotated[list[Part], Field(max_length=LONGEST_CHAT, fail_fast=True)] | str | None = None


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The last message of the role `user` is what the customer says; the model was trained on single messages, so others are not read.
    Decoding is greedy whatever `temperature` says; fields that are not named here are ignored."""

    model: str = Field(examples=["shop-intent"])
    messages: list[ChatMessage] = Field(
        min_length=1, max_length=LONGEST_CHAT, fail_fast=True, examples=[[{"role": "user", "content": "two olive oils please"}]]
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] | None = 1

    def customer(self) -> str | None:
        """What the customer says; None if there is no such message."""
        said = next((message.content for message in reversed(self.messages) if message.role == "user"), None)
        return "".join(part.text for part in said) if isinstance(said, list) else said


class Reply(BaseModel):
    role: Literal["assistant"]
    content: str | None


class Choice(BaseModel):
    index: int
    message: Reply
    logprobs: None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Chat(BaseModel):
    """What is answered without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Seconds since 1970")
    model: str
    system_fingerprint: str = Field(description="The champion's name and version")
    choices: list[Choice] = Field(min_length=1, max_length=1)
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    status: Literal["ready"]
    model: str
    version: str
    variant: str


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every error, of every endpoint."""

    error: ErrorDetail
