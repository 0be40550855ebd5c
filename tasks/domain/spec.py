"""The specification of a domain: intents, slots, languages, departments. Read from `<domain>/spec.yaml`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.domain.errors import UserError

DOMAINS_DIR = Path(__file__).parent


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogSlot(_Frozen):
    """A phrase of the catalog, in whatever form the customer writes it."""

    type: Literal["catalog"]


class IntegerSlot(_Frozen):
    type: Literal["integer"]
    minimum: int = 1
    maximum: int = 999


class CodeSlot(_Frozen):
    """An identifier. In a format `9` stands for a digit, `A` for a letter, `{word}` for a coupon word."""

    type: Literal["code"]
    formats: list[str] = Field(min_length=1)


Slot = Annotated[CatalogSlot | IntegerSlot | CodeSlot, Field(discriminator="type")]


class SlotDefault(_Frozen):
    """The slot is always in the answer; this is its value when the customer does not say it."""

    default: int | str


PromptStyle = Literal["short", "chat"]  # the customer's text alone, or `system_prompt` and the tokenizer's own chat template
AnswerStyle = Literal["short", "json"]  # see `scoring.answer_text`
SlotUse = Literal["always", "optional"] | SlotDefault


class Intent(_Frozen):
    slots: dict[str, SlotUse] = {}
    fallback: bool = False
    weight: int = Field(1, ge=1, le=100)  # how often its turn comes in training; evaluation is balanced


class Spec(_Frozen):
    """A domain. `path` is the folder that holds `spec.yaml`, `phrases/` and `catalog/`."""

    name: str
    version: int
    title: str
    languages: list[str] = Field(min_length=1)
    system_prompt: str
    zero_shot_prompt: str
    slots: dict[str, Slot]
    intents: dict[str, Intent] = Field(min_length=2)
    departments: list[str] = Field(min_length=2)
    held_out_departments: list[str] = Field(min_length=1)
    # How the fine-tuned model is asked, and how it writes: every request pays for both. `synthesize` sets them for a data set.
    prompt: PromptStyle = "short"
    answer: AnswerStyle = "short"
    path: Path = Field(exclude=True)

    @model_validator(mode="after")
    def _names_agree(self) -> Spec:
        for name, intent in self.intents.items():
            for slot in intent.slots:
                if slot not in self.slots:
                    raise ValueError(f"intents.{name}.slots names {slot!r}; known slots: {', '.join(self.slots)}")
        for department in self.held_out_departments:
            if department not in self.departments:
                raise ValueError(f"held_out_departments names {department!r}; known: {', '.join(self.departments)}")
        if sum(intent.fallback for intent in self.intents.values()) != 1:
            raise ValueError("exactly one intent must have `fallback: true`")
        return self

    @property
    def fallback_intent(self) -> str:
        return next(name for name, intent in self.intents.items() if intent.fallback)

    @functools.cached_property
    def intent_codes(self) -> dict[str, str]:
        """What a short answer calls each intent: the first word of its name where no other begins with it."""
        words = Counter(name.split("_")[0] for name in self.intents)
        return {name: word if words[word := name.split("_")[0]] == 1 else name for name in self.intents}

    @functools.cached_property
    def slot_codes(self) -> dict[str, str]:
        """What a short answer calls each slot: as much of its name as no other slot begins with."""
        return {
            name: next(name[:end] for end in range(1, len(name) + 1) if end == len(name) or not _begins(name[:end], self.slots, name))
            for name in self.slots
        }

    def slot_of_type(self, kind: str) -> list[str]:
        """Names of the slots of one type (`catalog`, `integer`, `code`), in the order of the specification."""
        return [name for name, slot in self.slots.items() if slot.type == kind]


def _begins(prefix: str, names: Iterable[str], besides: str) -> bool:
    return any(name.startswith(prefix) for name in names if name != besides)


class Text(str):
    """A string that remembers the line of the YAML file it came from (1-based)."""

    line: int = 0


class LineLoader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """A safe YAML loader whose strings are `Text`, so that an error can name the line."""


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Text:
    text = Text(loader.construct_scalar(node))
    text.line = node.start_mark.line + 1
    return text


LineLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def load_yaml(path: Path) -> Any:
    """Parse a YAML file of a domain.

    Raises:
        UserError: no such file, not UTF-8, or not YAML; names file and line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=LineLoader)
    except FileNotFoundError:
        raise UserError("file", str(path), "does not exist", mend="Restore it or correct the path") from None
    except UnicodeDecodeError as error:
        raise UserError("file", str(path), f"is not UTF-8 ({error})", mend="Save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else "?"
        raise UserError("file", f"{path}:{line}", f"is not valid YAML: {error.problem}", mend="Mend that line") from None


def line_of(path: Path, location: tuple[Any, ...]) -> int | str:
    """The line of a YAML file where the value at `location` (keys and indices) stands, `?` if it is nowhere."""
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    line: int | str = "?"
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                continue  # a tag of a union in pydantic's location, not a key of the file
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def domain_path(name: str) -> Path:
    """The folder of a domain given by name (one of ours) or by path (your own)."""
    path = Path(name) if "/" in name else DOMAINS_DIR / name
    if not (path / "spec.yaml").is_file():
        known = sorted(p.parent.name for p in DOMAINS_DIR.glob("*/spec.yaml"))
        raise UserError("domain", name, "has no spec.yaml", allowed=known, mend="Or give the path of a folder with one")
    return path


@functools.cache
def load_spec(name: str) -> Spec:
    """Read and check a domain's specification.

    Raises:
        UserError: unknown domain, broken YAML, or a field that is missing, unknown or inconsistent (file and line named).
    """
    path = domain_path(name)
    file = path / "spec.yaml"
    raw = load_yaml(file)
    if not isinstance(raw, dict):
        raise UserError("file", f"{file}:1", "is not a mapping", mend="Write `name: ...` and the other fields")
    try:
        return Spec(**raw, path=path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "spec"
        line = line_of(file, first["loc"])
        raise UserError(where, f"{file}:{line}", first["msg"], mend="Mend that field") from None
