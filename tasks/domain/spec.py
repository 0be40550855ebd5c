"""The specification of a domain: intents, slots, languages, departments. Read from `<domain>/spec.yaml`."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.domain.errors import UserError
from tasks.domain.files import read_text

DOMAINS_DIR = Path(__file__).parent
LARGEST_FILE = 8_000_000  # bytes of a YAML or CSV file of a domain
MOST_NODES = 100_000  # keys, values, lists and mappings of a YAML file: two bytes of it can be one, which takes some 800 in memory
DEEPEST = 20  # levels of nesting in one
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]  # of an intent or a slot
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]{1,8}){0,3}$")]  # also the name of its files


class Misfit(ValueError):
    """What a part of a file says does not fit the others; `location` is that part's keys and indices."""

    def __init__(self, problem: str, *location: str | int) -> None:
        super().__init__(problem)
        self.location = location


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CatalogSlot(_Frozen):
    """A phrase of the catalog, in whatever form the customer writes it."""

    type: Literal["catalog"]


class IntegerSlot(_Frozen):
    type: Literal["integer"]
    minimum: int = Field(1, ge=0, le=999_999_999)
    maximum: int = Field(999, ge=1, le=999_999_999)  # as many digits as an answer's number may have

    @model_validator(mode="after")
    def _has_values(self) -> IntegerSlot:
        if self.minimum > self.maximum:
            raise ValueError(f"the minimum {self.minimum} is above the maximum {self.maximum}")
        return self


def _is_a_format(text: str) -> str:
    if re.search(r"[{}]", text.replace("{word}", "", 1)):
        raise ValueError(f"{text!r} has braces other than one `{{word}}`, which would be written into texts as they are")
    return text


class CodeSlot(_Frozen):
    """An identifier. In a format `9` stands for a digit, `A` for a letter, `{word}` for a coupon word."""

    type: Literal["code"]
    formats: list[Annotated[str, Field(pattern=r"\S"), AfterValidator(_is_a_format)]] = Field(min_length=1)


Slot = Annotated[CatalogSlot | IntegerSlot | CodeSlot, Field(discriminator="type")]


class SlotDefault(_Frozen):
    """The slot is always in the answer; this is its value when the customer does not say it."""

    default: bool | int | str  # `true` is refused where the message can say which slot it is of, and would be read as 1 otherwise


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
    languages: list[Language] = Field(min_length=1)
    system_prompt: str
    zero_shot_prompt: str
    slots: dict[Name, Slot]
    intents: dict[Name, Intent] = Field(min_length=2)
    departments: list[str] = Field(min_length=2)
    held_out_departments: list[str] = Field(min_length=1)
    # How the fine-tuned model is asked, and how it writes: every request pays for both. `synthesize` sets them for a data set.
    prompt: PromptStyle = "short"
    answer: AnswerStyle = "short"
    path: Path = Field(exclude=True)

    @model_validator(mode="after")
    def _names_agree(self) -> Spec:
        if "intent" in self.slots:
            raise Misfit("names 'intent', which an answer has already; choose another name", "slots", "intent")
        for kind in ("catalog", "integer"):  # an utterance is made with one product and one number that it means
            if others := self.slot_of_type(kind)[1:]:
                raise Misfit(f"{others[0]!r} is a second slot of the type {kind!r}; a domain has one at most", "slots", others[0])
        for name, intent in self.intents.items():
            for slot, use in intent.slots.items():
                if slot not in self.slots:
                    raise Misfit(f"{slot!r} is no slot; known slots: {', '.join(self.slots)}", "intents", name, "slots", slot)
                if isinstance(use, SlotDefault) and (problem := _unfit_default(use.default, self.slots[slot])):
                    raise Misfit(f"the default {use.default!r} {problem}", "intents", name, "slots", slot)
        for number, department in enumerate(self.held_out_departments):
            if department not in self.departments:
                raise Misfit(f"{department!r} is no department; known: {', '.join(self.departments)}", "held_out_departments", number)
        fallbacks = [name for name, intent in self.intents.items() if intent.fallback]
        if len(fallbacks) != 1:
            raise Misfit("exactly one intent must have `fallback: true`", "intents", *fallbacks[1:2])
        return self

    @model_validator(mode="after")
    def _only_intents_are_filled_in(self) -> Spec:
        try:
            fits = all(
                place[1:] in (("intents", "", None), (None, None, None)) for place in string.Formatter().parse(self.zero_shot_prompt)
            )
        except ValueError:  # a brace alone
            fits = False
        if not fits:
            problem = "has braces other than `{intents}`, for which the list of intents is put; double those that are text, as in {{...}}"
            raise Misfit(problem, "zero_shot_prompt")
        return self

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


def _unfit_default(default: bool | int | str, slot: Slot) -> str:
    if isinstance(default, bool) or isinstance(default, int) != isinstance(slot, IntegerSlot):
        return f"is no value of a slot of the type {slot.type}"
    if isinstance(slot, IntegerSlot) and not slot.minimum <= int(default) <= slot.maximum:
        return f"is outside of the slot's range, {slot.minimum} to {slot.maximum}"
    return ""


class Text(str):
    """A string that remembers the line of the YAML file it came from (1-based)."""

    line: int = 0


class LineLoader(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """A safe YAML loader whose strings are `Text`, so that an error can name the line, and that refuses a key that stands twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # days, times and numbers that are none
            raise yaml.constructor.ConstructorError(None, None, f"{error}; mend or quote that value", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Text:
    text = Text(loader.construct_scalar(node))
    text.line = node.start_mark.line + 1
    return text


LineLoader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def load_yaml(path: Path) -> Any:
    """Parse a YAML file of a domain.

    Raises:
        UserError: no such file, too large, more than `MOST_NODES`, not UTF-8, or not YAML as it is meant here; names file and line.
    """
    text = read_text("file", path, LARGEST_FILE)
    try:
        _check_plain(text, path)
        return yaml.load(text, Loader=LineLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else "?"
        raise UserError("file", f"{path}:{line}", f"is not valid YAML: {error.problem}", mend="Mend that line") from None
    except UserError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML does not allow
        found = yaml.reader.Reader.NON_PRINTABLE.search(text)
        where = f"{path}:{text.count(chr(10), 0, found.start()) + 1}" if found else str(path)
        raise UserError("file", where, f"is not valid YAML: {str(error)[:200]}", mend="Mend or quote that value") from None


def _check_plain(text: str, path: Path) -> None:
    """Refuse what a domain's files never need and what could make a small file a large thing: aliases, tags, deep nesting, very
    many values."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=LineLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        problem = "is an alias of another value" if isinstance(event, yaml.AliasEvent) else ""
        problem = problem or ("has a tag" if getattr(event, "tag", None) else "")
        problem = problem or (f"is nested more than {DEEPEST} deep" if depth > DEEPEST else "")
        if problem:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise UserError("file", f"{path}:{line}", f"a value {problem}", mend="Write the value itself, plainly")
        nodes += isinstance(event, yaml.NodeEvent)
        if nodes > MOST_NODES:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            problem = f"has {nodes:,} keys and values up to this line"
            raise UserError("file", f"{path}:{line}", problem, allowed=f"at most {MOST_NODES:,}", mend="Leave out what follows")


def line_of(path: Path, location: tuple[Any, ...]) -> int:
    """The line of a YAML file where the value at `location` (keys and indices) stands; of one that is not there, that of what it is missing in."""
    node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=LineLoader)  # the pure one refuses some of what the other reads
    line = 1
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


def explained(error: ValidationError, path: Path) -> UserError:
    """The first problem of a YAML file, with the field and line it is in."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    location = cause.location if isinstance(cause, Misfit) else first["loc"]
    where = ".".join(map(str, location)) or path.stem
    return UserError(where, f"{path}:{line_of(path, location)}", first["msg"].removeprefix("Value error, "), mend="Mend that field")


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
        return Spec.model_validate({**raw, "path": path})
    except ValidationError as error:
        raise explained(error, file) from None
