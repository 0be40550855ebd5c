"""Fields of a configuration changed by name, and one clear message for what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from tasks.core.settings import shown_uri
from tasks.domain.errors import UserError

Config = TypeVar("Config", bound=BaseModel)
_SECRET = re.compile(r"(?<![a-z])(api)?(keys?|token|secrets?|passw[a-z]*|credentials?)(?![a-z])", re.IGNORECASE)  # in a field's name
HIDDEN = "***"


def with_overrides(model: type[Config], values: dict[str, Any], overrides: Mapping[str, Any]) -> Config:
    """A configuration of `values` with some fields changed, by dotted name.

    Raises:
        UserError: unknown field, or a value that is not allowed.
    """
    for name, value in overrides.items():
        *parents, last = name.split(".")
        target: Any = values
        for depth, part in enumerate(parents, 1):
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                above = ".".join(parents[:depth])
                raise UserError(
                    name, shown(name, value), f"{above} has no fields to set one by one", mend=f"Give all of it, as in --set '{above}=...'"
                )
        target[last] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error, model) from None


def parse_overrides(items: list[str]) -> dict[str, Any]:
    """`["train.epochs=2", "gguf=[F16,Q4_0]"]` as values by dotted name; values are read as YAML.

    Raises:
        UserError: an item without `=`, or a value that is not YAML.
    """
    parsed = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise UserError("--set", shown(item, item), "is not of the form field=value", mend="For example --set train.epochs=2")
        try:
            parsed[name.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, AttributeError):  # also a date that is none
            mend = "Quote it, as in --set 'base_model.source=\"a: b\"'"
            raise UserError(name, shown(item, text), "is not a YAML value", mend=mend) from None
    return parsed


def explained(error: ValidationError, root: type[BaseModel]) -> UserError:
    """The first problem of a config, with the values it may have."""
    first = error.errors()[0]
    location = list(map(str, first["loc"]))
    context = first.get("ctx", {})
    if first["type"] == "extra_forbidden":
        model = _model_at(root, location[:-1])
        names = list(model.model_fields) if model else None
        name = ".".join(location)
        given = shown(name, first["input"])
        mend = "Give keys by the environment, or a teacher's by teacher.secret_block" if given == HIDDEN else ""
        return UserError(name, given, "is an unknown field", allowed=names, mend=mend)
    if first["type"] == "missing":
        return UserError(".".join(location), None, "is not given", mend=f"Give it, as in `{location[-1]}: ...`")
    allowed = context.get("expected")
    message = first["msg"].removeprefix("Value error, ")
    mend = ""
    given = shown("", first["input"])
    if first["type"] in ("tuple_type", "list_type"):
        message, mend = "is not a list", "Write it in brackets" if given is None else f"Write {_as_list(given)}"
    if first["type"] in ("dict_type", "model_type", "model_attributes_type"):
        model = _model_at(root, location)
        message, allowed = "is not a mapping of fields", list(model.model_fields) if model else "a mapping"
        mend = "Write them in braces, as in `{field: value}`"
    return UserError(".".join(location), given, message, allowed=allowed, mend=mend)


def shown(name: str, given: Any) -> Any:
    """What was given for a field as an error may say it: without keys, and without users and passwords of addresses."""
    if (found := _SECRET.search(name)) and (
        not isinstance(given, int | float) or found[2].lower().startswith("pass")
    ):  # no key is a number
        return HIDDEN
    if isinstance(given, Mapping):
        return {part: shown(str(part), value) for part, value in given.items()}
    if isinstance(given, (list, tuple)):
        return [shown("", value) for value in given]
    if not isinstance(given, str):
        return given
    address = shown_uri(given.partition("?")[0]) if "://" in given else given  # what may be wrong with it is that it holds a key
    return re.sub(r"[^\s/:@'\"]+:[^\s/@]+@", f"{HIDDEN}@", address) if "@" in address else address  # one without its scheme


def _as_list(given: object) -> str:
    """The list that was meant by one item, or by several with commas between them, as it is written with `--set`."""
    return f"[{', '.join(item.strip() for item in str(given).split(','))}]".replace("'", "")


def _model_at(root: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    model = root
    for part in location:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if not found:
            return None
        model = found
    return model
