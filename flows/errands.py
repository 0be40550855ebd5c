"""What passes between a flow and a worker elsewhere: the arguments and the result of a stage flow, as notes in the shared store.

They hold manifests and other small values, never files: artefacts are in the store already. The parameters of a Prefect flow run are
bounded (half a megabyte), and a run with many variants has more to say. What is in them decides which address gets which key, so their
SHA-256 passes through Prefect, which not everyone who can write to the store can write to; it is part of a note's name, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, get_type_hints

from prefect import Flow
from pydantic import BaseModel, ConfigDict, TypeAdapter

from flows.session import Run
from tasks.core.artifacts import Store
from tasks.core.manifests import canonical_json, reason_of
from tasks.domain.errors import UserError

StageFlow = Flow[..., Any]


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    run: Run
    given: dict[str, Any]


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid")
    result: Any
    stages: list[dict[str, Any]]


@dataclass(frozen=True)
class Errand:
    """A stage flow to be run elsewhere. `name` is the same for the same work of the same run, however often it is asked for."""

    name: str
    given: dict[str, Any]

    def send(self, store: Store, run: Run) -> str:
        """Leave the arguments for the worker; the SHA-256 of the note."""
        return _leave(store, self.name, {"run": run.model_dump(mode="json"), "given": self.given})

    def answer(self, store: Store, stage_flow: StageFlow, result: Any, stages: Sequence[dict[str, Any]]) -> str:
        """Leave the result for who asked, and how each stage of it went; the SHA-256 of the note."""
        plain = _type_of_result(stage_flow).dump_python(result, mode="json")
        return _leave(store, f"{self.name}.result", {"result": plain, "stages": list(stages)})

    def result(self, store: Store, stage_flow: StageFlow, sha256: str) -> tuple[Any, list[dict[str, Any]]]:
        """What `answer` left.

        Raises:
            UserError: the note is there and is none, or not that one.
        """
        with _taken(store, f"{self.name}.result", sha256) as text:
            note = _Result.model_validate_json(text)
            return _type_of_result(stage_flow).validate_python(note.result), note.stages


def errand_for(run: Run, stage_flow: StageFlow, given: Sequence[Any]) -> Errand:
    """The errand of a stage flow with its arguments after `run`."""
    types = _types_of_arguments(stage_flow)
    plain = {name: types[name].dump_python(value, mode="json") for name, value in zip(types, given, strict=True)}
    digest = hashlib.sha256(canonical_json(plain).encode()).hexdigest()[:12]
    return Errand(f"{run.mlflow_run}/{stage_flow.name}-{digest}", plain)


def read_errand(store: Store, name: str, sha256: str, stage_flow: StageFlow, sent_to: str) -> tuple[Errand, Run, list[Any]]:
    """An errand that was sent to this machine, the run it belongs to, and its arguments.

    Args:
        sha256: of the note, as `Errand.send` gave it.
        sent_to: the store of the flow that sent it, as that flow's machine calls it.

    Raises:
        UserError: this machine has another store, or the note is none, or not that one.
    """
    types = _types_of_arguments(stage_flow)
    try:
        with _taken(store, name, sha256) as text:
            note = _Order.model_validate_json(text)
            if set(note.given) != set(types):
                raise ValueError(f"has the arguments {', '.join(note.given)[:200] or 'none'} instead of {', '.join(types)}")
            given = [types[argument].validate_python(note.given[argument]) for argument in types]
    except FileNotFoundError:
        mend = "Set CARTWRIGHT_STORE to the same address on every machine, one that all of them reach, such as s3://bucket/store"
        problem = f"is not the store of the flow that sent this work, {sent_to}" + (
            ", or that is another disk" if store.uri == sent_to else ""
        )
        raise UserError("CARTWRIGHT_STORE", store.uri, problem, mend=mend) from None
    return Errand(name, note.given), note.run, given


def _leave(store: Store, name: str, note: dict[str, Any]) -> str:
    text = json.dumps(note)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    store.write_note(_path(name, sha256), text)
    return sha256


def _path(name: str, sha256: str) -> str:
    """A run that is taken up again sends a note of its own; that of its earlier life may still be read by a worker."""
    return f"notes/{name}.{sha256}.json"


@contextmanager
def _taken(store: Store, name: str, sha256: str) -> Iterator[str]:
    """The text of a note. Every machine with the store can write notes: one that cannot be read, or is another than was left, is one clear error."""
    path = _path(name, sha256)
    try:
        text = store.read_note(path)
        if hashlib.sha256(text.encode()).hexdigest() != sha256:
            raise ValueError("has been changed since it was left")
        yield text
    except ValueError as error:
        mend = "Run the same command again; if it stays, look who else writes to the store, and whether all machines have this version"
        raise UserError("CARTWRIGHT_STORE", f"{store.uri}/{path}", f"is no note of Cartwright ({reason_of(error)})", mend=mend) from None


def _types_of_arguments(stage_flow: StageFlow) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(stage_flow.fn)
    return {name: TypeAdapter(hints[name]) for name in list(signature(stage_flow.fn).parameters)[1:]}


def _type_of_result(stage_flow: StageFlow) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(stage_flow.fn)["return"])
