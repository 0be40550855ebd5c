"""The files of a registered version: their SHA-256 as tags of it, and whether what a registry hands out still is that."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from tasks.core.file_hash import sha256_file
from tasks.core.flat import TAG
from tasks.domain.errors import UserError

FILES = TAG + "files."  # tags that hold, one after the other, the SHA-256 of every file of a version as JSON
MLFLOWS_OWN = ("registered_model_meta",)  # what MLflow adds to a model it hands out
ANEW = "`cartwright promote VERSION` makes another version the champion; a retraining makes it anew after this version and its logged model are deleted in MLflow"
TAG_LENGTH = 5000  # most characters of a tag that MLflow's databases hold


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
            raise _not_ours(model, file, "is missing")
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
    return UserError("model", model, f"its file {file} {problem}", mend=f"Find out who writes to the registry's storage. {ANEW}")


def _parts(text: str) -> list[str]:
    return [text[start : start + TAG_LENGTH] for start in range(0, len(text), TAG_LENGTH)]
