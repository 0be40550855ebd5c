"""What a server is told: which model, where it listens, and the limits it keeps."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.domain.errors import UserError

SHORTEST_KEY = 16


class ServeConfig(BaseModel):
    """Limits are per process. A limit of 0 is none where the description says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("shop-intent", min_length=1, description="The registered model, `registry.name` of the configuration")
    gguf: Path | None = Field(None, description="Serve this file instead, without a registry")
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535, description="0 takes a free one")
    threads: int = Field(0, ge=0, description="Threads of llama.cpp; 0: one for each core")
    constrained: bool = Field(True, description="Keep every answer to the grammar of the domain")
    parallel: int = Field(16, ge=1, le=255, description="Texts answered at a time")
    max_waiting: int = Field(256, ge=0, le=100_000, description="Texts that wait for their turn; more are refused with 503")
    max_tokens: int = Field(64, ge=1, le=1024, description="Longest answer, in tokens")
    max_chars: int = Field(1000, ge=1, le=100_000, description="Longest text, in characters; 422")
    max_texts: int = Field(64, ge=1, le=10_000, description="Most texts of one request; 422")
    max_body: int = Field(262_144, ge=64, le=2**30, description="Largest body, in bytes; 413")
    max_connections: int = Field(512, ge=1, le=100_000, description="Open connections; more are refused with 503")
    rate: float = Field(100.0, ge=0, description="Requests a second of one client, by its address; 429; 0: no limit")
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="Longest time for a request; 504, or 408 where its head or its body does not arrive; and for an answer to be read",
    )
    reload_s: float = Field(10.0, gt=0, le=86_400, description="How often the alias is looked up")
    end_s: float = Field(30.0, gt=0, le=3600, description="How long running requests may take to end after SIGTERM")


def serve_config(**given: Any) -> ServeConfig:
    """The configuration of a server from options.

    Raises:
        UserError: one of them is out of bounds.
    """
    try:
        return ServeConfig(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        raise UserError(f"--{option.replace('_', '-')}", first["input"], first["msg"]) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_key(host: str, key: str | None) -> None:
    """Whoever can be reached by others asks for a key.

    Raises:
        UserError: there is none, or it is short.
    """
    mend = "Set CARTWRIGHT_SERVE_KEY to a long random text, such as that of `openssl rand -hex 32`, and send it as `Authorization: Bearer`"
    if key is None and not is_loopback(host):
        raise UserError("--host", host, "can be reached from other machines, which needs a key", allowed="127.0.0.1 without one", mend=mend)
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError("CARTWRIGHT_SERVE_KEY", None, f"needs {SHORTEST_KEY} or more ASCII characters without spaces", mend=mend)
