"""Models that people give, and what other machines write, whatever is in them: an answer or one clear error (see `tests/fuzzing.py`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tasks.core.manifests import MANIFEST, FileEntry, digest_of
from tasks.domain.errors import UserError
from tests.fuzzing import DEEP, JSON, answered, mutated

# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def small_gguf(folder: Path) -> bytes:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(folder / "small.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2])
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "small.gguf").read_bytes()


HUGE = (2**60).to_bytes(8, "little")
COUNTS = b"GGUF\x03\0\0\0" + bytes(8) + (1).to_bytes(8, "little")  # no tensor, one field
FIELD = (1).to_bytes(8, "little") + b"a" + (9).to_bytes(4, "little")  # `a`, an array


@given(
    st.integers(0, 400),
    st.integers(0, 20),
    st.binary(max_size=12) | st.sampled_from([HUGE, b"\xff" * 8, bytes(8), (9).to_bytes(4, "little")]),
)
@example(0, 0, b"")
@example(0, 10_000, COUNTS + FIELD + (4).to_bytes(4, "little") + HUGE)  # an array of 2^60 numbers
@example(0, 10_000, COUNTS + FIELD + (9).to_bytes(4, "little") + HUGE)  # of arrays
@example(0, 10_000, COUNTS + FIELD + (8).to_bytes(4, "little") + HUGE)  # of texts
@example(0, 10_000, b"GGUF\x03\0\0\0" + HUGE + HUGE)
@example(0, 10_000, b"")
def test_header_of_a_gguf_file(folder: Path, small_gguf: bytes, at: int, length: int, new: bytes) -> None:
    from tasks.base_model import BaseModelConfig, resolve
    from tasks.weights import BrokenFileError, gguf_weights

    path = folder / "fuzzed.gguf"
    path.write_bytes(small_gguf[:at] + new + small_gguf[at + length :])
    found = answered(lambda: resolve(BaseModelConfig(source=str(path))))
    assert isinstance(found, UserError) or found.revision
    try:
        weights = gguf_weights(path)
    except BrokenFileError:
        return
    assert all(read().ndim > 1 for read in weights.values())


def test_a_text_that_ends_behind_the_end_of_the_file_is_refused(folder: Path) -> None:
    from tasks.weights import BrokenFileError, open_gguf

    (folder / "text.gguf").write_bytes(COUNTS + FIELD[:9] + (8).to_bytes(4, "little") + HUGE + b"abc")
    with pytest.raises(BrokenFileError, match="ends within"):
        open_gguf(folder / "text.gguf")


# What other machines write -------------------------------------------------------------------------------------------

KIND, KEY = "merge", "k"
FACTS: dict[str, Any] = {
    "kind": KIND, "key": KEY, "version": 1, "config": {}, "inputs": {}, "digest": "d", "metrics": {"loss": 0.1}, "libraries": {}, "hardware": "h",
    "wall_s": 1.5, "peak_rss_mb": None, "created": "now",
}  # fmt: skip
ENTRY = {"sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "size": 3}  # of `abc`
NAMES = [
    "w",
    "a/w",
    "../w",
    "../../../w",
    "/tmp/w",
    "a\\..\\w",
    "..",
    ".",
    "",
    "a//w",
    "a/../../w",
    "manifest.json",
    "x" * 300,
    "a\0w",
    "w\n",
    "é",
    "w/w",
    "C:w",
]


def of(files: dict[str, Any]) -> bytes:
    """A manifest of these files, with a digest that fits them."""
    return json.dumps({**FACTS, "files": files, "digest": digest_of({name: FileEntry(**entry) for name, entry in files.items()})}).encode()


def files_in(data: bytes) -> dict[str, FileEntry]:
    """The files that a manifest names, whatever they are called; none, where it is no manifest."""
    try:
        return {name: FileEntry(**entry) for name, entry in json.loads(data)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


WHOLE = of({"w": ENTRY, "a/w": ENTRY})
MANIFESTS = st.dictionaries(st.sampled_from(NAMES), st.just(ENTRY), max_size=3).map(of)


@given(MANIFESTS | mutated(WHOLE))
@example(WHOLE)
@example(of({"../../../../w": ENTRY}))
@example(of({"w": ENTRY, "w/w": ENTRY}))
@example(of({"x" * 300: ENTRY}))
@example(json.dumps({**FACTS, "files": {"w": {**ENTRY, "size": 10**30}}}).encode())
@example(b"[" * DEEP)
def test_manifest(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    from fsspec.implementations.memory import MemoryFile

    from tasks.core.artifacts import Store

    top = tmp_path_factory.getbasetemp() / "manifests"
    there, here = Store("memory://fuzz", top / "a" / "home"), Store((top / "store").as_uri(), top / "home")
    there.fs.store.clear()
    files = files_in(data)
    for name in files:  # whatever a name leads to in that storage, there is a file
        path = f"{there.root}/{KIND}/{KEY}/{digest_of(files)}/{name}"
        there.fs.store[path] = MemoryFile(there.fs, path, b"abc")
    there.fs.pipe_file(f"{there.root}/{KIND}/{KEY}/{MANIFEST}", data)
    artefact = here.path(KIND, KEY)
    artefact.mkdir(parents=True, exist_ok=True)
    for name in ("w", "../w"):
        (artefact / name).write_bytes(b"abc")
    (artefact / MANIFEST).write_bytes(data)
    for store in (there, here):
        manifest, damage = store.find(KIND, KEY)
        assert (manifest is None) != (damage is None)
        assert manifest or data != WHOLE or store is here, damage  # what is right comes from there; here `a/w` is missing
        if manifest:
            assert all((store.path(KIND, KEY) / name).resolve().is_relative_to(store.path(KIND, KEY).resolve()) for name in manifest.files)
    there.remove(KIND, KEY)
    written = {path for path in (top / "a").rglob("*") if path.is_file()}
    assert all(path.is_relative_to(top / "a" / "home") for path in written) and not (top / "w").exists()


@given(
    mutated(b'{"run": {"run_id": "r"}, "given": {}}', b'{"result": [], "stages": []}') | JSON.map(lambda note: json.dumps(note).encode())
)
@example(b"[" * DEEP)
@example(b'{"run": 1}')
@example(b'{"given": {"unknown": 1}}')
@example(b"\xff")
def test_note_of_an_errand(folder: Path, data: bytes) -> None:
    from flows.errands import Errand, read_errand
    from flows.stages import measure
    from tasks.core.artifacts import Store

    store = Store("memory://fuzz-notes", folder)
    sha256 = hashlib.sha256(data).hexdigest()  # as if it had been left by who may
    for name in ("e", "e.result"):
        store.fs.pipe_file(f"{store.root}/notes/{name}.{sha256}.json", data)
    assert isinstance(answered(lambda: read_errand(store, "e", sha256, measure, store.uri)), UserError)
    found = answered(lambda: Errand("e", {}).result(store, measure, sha256))
    assert isinstance(found, UserError) or len(found) == 2
