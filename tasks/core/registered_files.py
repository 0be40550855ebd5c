"""The files of a logged model and of a registered version: whether they are there, their SHA-256 as tags of the version, and whether what a
registry hands out still is that."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.core.file_hash import sha256_file
from tasks.core.flat import TAG
from tasks.core.manifests import MANIFEST
from tasks.domain.errors import UserError

FILES = TAG + "files."  # tags that hold, one after the other, the SHA-256 of every file of a version as JSON
MLFLOWS_OWN = ("registered_model_meta",)  # what MLflow adds to a model it hands out
MISSING = "is missing"
TAG_LENGTH = 5000  # most characters of a tag that MLflow's databases hold


def lost_file(listed: Callable[[str | None], Iterable[Any]], artifacts: Mapping[str, Path]) -> str:
    """The first file of a logged model that its storage has lost, or has in another size; empty if there is none.

    Reads listings only: a run in which all is cached asks for every model. What is changed in files of the same size, `check_files` finds.

    Args:
        listed: MLflow's listing of a folder of the model.
        artifacts: what it was logged from.
    """
    top = {entry.path for entry in listed(None)}
    if lost := next((name for name in ("MLmodel", "code", "artifacts") if name not in top), ""):
        return lost
    sizes = {(PurePosixPath(entry.path).name, entry.file_size) for entry in _files_below(listed, "artifacts")}
    for path in artifacts.values():  # by name: the folder a file is logged from may have been another
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            whole = not sizes.isdisjoint({(file.name, file.stat().st_size), (file.name, None)})  # not every storage tells sizes
            if file.is_file() and file.name != MANIFEST and not whole:  # a manifest tells times, too
                return file.name
    return ""


def _files_below(listed: Callable[[str | None], Iterable[Any]], folder: str) -> Iterator[Any]:
    for entry in listed(folder):
        if entry.is_dir:
            yield from _files_below(listed, entry.path)
        else:
            yield entry


def hashes_as_tags(folder: Path, model: str, weights: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file of a model, as tags; `files_of` reads them.

    Args:
        weights: SHA-256 of the files it was made from; if there are any, files of weights must be among them.

    Raises:
        UserError: one is not.
    """
    found = _hashes(folder)
    for file, digest in found.items():
        if weights and file.endswith((".gguf", ".safetensors")) and digest not in weights:
            raise _not_ours(model, file, "is not what was logged")
    return {f"{FILES}{number}": part for number, part in enumerate(_parts(json.dumps(found)))}


def files_of(tags: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of every file of a version by its name, from its tags; empty if it was registered without, or a kill left a part of them."""
    parts = sorted((tag for tag in tags if tag.startswith(FILES)), key=lambda tag: int(tag.removeprefix(FILES)))
    try:
        found: dict[str, str] = json.loads("".join(tags[part] for part in parts) or "{}")
    except ValueError:
        return {}
    return found


def check_files(folder: Path, model: str, tags: Mapping[str, str]) -> None:
    """Compare the files of a version with what was noted when it was registered; before anything in them is looked at.

    The registry's database and its storage are two places: who can write to the storage alone must not change what is loaded.

    Raises:
        UserError: a file is missing, changed or too many, or nothing was noted.
    """
    wanted, found = files_of(tags), _hashes(folder)
    if not wanted:
        mend = "Run `cartwright run` with its configuration once more, which notes them"
        raise UserError("model", model, "was registered without the hashes of its files", mend=mend)
    for file in sorted(wanted.keys() | found.keys()):
        if file not in found:
            raise _not_ours(model, file, MISSING)
        if file not in wanted:
            raise _not_ours(model, file, "was not registered with it")
        if wanted[file] != found[file]:
            raise _not_ours(model, file, "has been changed since it was registered")


def _hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files if path.parent.name != "__pycache__"}
    names = {name: path for name, path in names.items() if name not in MLFLOWS_OWN}
    return {name: "a link" if path.is_symlink() else sha256_file(path) for name, path in sorted(names.items())}


def _not_ours(model: str, file: str, problem: str) -> UserError:
    mend = "Find out who writes to the registry's storage. `cartwright promote VERSION` makes another version the champion; a retraining makes it anew after this version and its logged model are deleted in MLflow"
    if problem == MISSING:
        mend = "`cartwright run` with its configuration logs lost weights anew. " + mend
    return UserError("model", model, f"its file {file} {problem}", mend=mend)


def _parts(text: str) -> list[str]:
    return [text[start : start + TAG_LENGTH] for start in range(0, len(text), TAG_LENGTH)]
