"""The importance matrix: what it is, whether llama.cpp uses it, and what it brings to the inputs that matter."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.calibration import calibration_examples
from tasks.config import load_config
from tasks.core import progress
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.core.stage import Stage, StageConfig, run
from tasks.domain.errors import UserError
from tasks.importance import IMPORTANCE, ImportanceConfig, gguf_names, importance
from tasks.quantize_gguf import MODEL_FILE, ConvertGgufConfig, GgufFormat, QuantizeGgufConfig, convert_gguf, quantize, quantize_gguf
from tasks.synthesize import SynthesizeConfig, synthesize
from tasks.weights import gguf_weights, open_gguf


@dataclass(frozen=True)
class World:
    """A tiny model, as transformers and llama.cpp have it, and its importance matrix on a few rows."""

    store: Store
    logs: Path
    model: Manifest
    dataset: Manifest
    gguf: Manifest
    matrix: Manifest

    def make(self, stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return run(stage, config, inputs, self.store, self.logs)[0]

    def path(self, manifest: Manifest) -> Path:
        return self.store.path(manifest.kind, manifest.key)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("importance")
    store = Store((home / "store").as_uri(), home)

    def make(stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return run(stage, config, inputs, store, home / "logs")[0]

    dataset = make(synthesize, SynthesizeConfig(languages=("en", "hr"), train_rows=40, validation_rows=12, test_rows=12, hard_rows=12))
    model = make(base_model, BaseModelConfig(source=TINY))
    converted = make(convert_gguf, ConvertGgufConfig(), model=model)
    matrix = make(importance, ImportanceConfig(rows=20), model=model, dataset=dataset, gguf=converted)
    return World(store, home / "logs", model, dataset, converted, matrix)


def kept(world: World) -> dict[str, np.ndarray]:
    with np.load(world.path(world.matrix) / IMPORTANCE) as found:
        return {name: found[name] for name in found.files}


def test_it_is_the_mean_square_of_what_a_layer_reads(world: World) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = world.path(world.model)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = calibration_examples(world.path(world.dataset), AutoTokenizer.from_pretrained(folder), 20, ImportanceConfig().seed)
    first = model.get_decoder().layers[0]
    with torch.inference_mode():  # row by row: padding must not have counted
        read = torch.cat([first.input_layernorm(model.get_input_embeddings()(torch.tensor(row))) for row in rows])
    expected = read.double().square().mean(0).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(kept(world)[f"blk.0.{name}.weight"], expected, rtol=1e-4)
    assert world.matrix.metrics["tokens"] == sum(map(len, rows))


def test_every_matrix_of_every_layer_has_its_importance_and_the_head_has_none(world: World) -> None:
    weights = gguf_weights(world.path(world.gguf) / MODEL_FILE)
    assert set(kept(world)) == {name for name in weights if name.startswith("blk.")}
    for name, values in kept(world).items():
        assert values.shape == (weights[name]().shape[1],) and np.isfinite(values).all() and (values > 0).any()


def weighted_error(world: World, kind: GgufFormat, **more: Manifest) -> float:
    """Mean square error of a format's layers, each input weighted by its importance."""
    made = world.make(quantize_gguf, QuantizeGgufConfig(format=kind), gguf=world.gguf, **more)
    found, exact = (gguf_weights(world.path(m) / MODEL_FILE) for m in (made, world.gguf))
    return float(np.mean([((found[name]() - exact[name]()) ** 2 * values).mean() for name, values in kept(world).items()]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q2_K"])
def test_rounding_errors_are_smaller_where_they_matter(world: World, kind: GgufFormat) -> None:
    assert weighted_error(world, kind, importance=world.matrix) < 0.99 * weighted_error(world, kind)


def test_a_layer_llama_cpp_does_not_know_is_named(world: World) -> None:
    names = gguf_names(world.path(world.gguf) / MODEL_FILE, 2)
    assert names("model.layers.1.mlp.down_proj") == "blk.1.ffn_down.weight"
    with pytest.raises(ValueError, match=r"no tensor for layer model\.layers\.0\.mystery"):
        names("model.layers.0.mystery")


def test_too_few_rows_to_calibrate_on_are_refused(world: World, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    dataset = world.path(world.dataset)
    (tmp_path / "spec.yaml").write_bytes((dataset / "spec.yaml").read_bytes())
    lines = (dataset / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    with pytest.raises(UserError, match=r"calibration_rows.*3.*data\.train_rows"):
        calibration_examples(tmp_path, AutoTokenizer.from_pretrained(world.path(world.model)), 20, 7)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        ("without", [("F16", False), ("Q4_0", False)]),
        ("with", [("F16", False), ("Q4_0", True)]),
        ("both", [("F16", False), ("Q4_0", False), ("Q4_0", True)]),
    ],
)
def test_a_run_makes_formats_with_it_without_it_or_both(choice: str, kinds: list[tuple[str, bool]]) -> None:
    assert load_config("smoke", {"gguf": ["F16", "Q4_0"], "gguf_importance": choice}).gguf_kinds() == kinds


@pytest.mark.fast
def test_a_file_that_cannot_be_quantized_is_an_error_that_says_what_llama_cpp_said(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RuntimeError, match=r"cannot quantize to Q4_0: .*failed to load model"):
        quantize(tmp_path / "broken.gguf", tmp_path / "out.gguf", "Q4_0")


@pytest.mark.fast
def test_without_links_f16_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gguf", "linked", "copied"):
        (tmp_path / name).mkdir()
    writer = gguf.GGUFWriter(tmp_path / "gguf" / MODEL_FILE, "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    def made(folder: str) -> Path:
        quantize_gguf.function(QuantizeGgufConfig(format="F16"), {"gguf": tmp_path / "gguf"}, tmp_path / folder)
        return tmp_path / folder / MODEL_FILE

    source = tmp_path / "gguf" / MODEL_FILE
    assert made("linked").samefile(source)
    monkeypatch.setattr(os, "link", refuse)
    copy = made("copied")
    assert not copy.samefile(source) and copy.read_bytes() == source.read_bytes()


@pytest.mark.slow
def test_quantizing_says_how_many_tensors_are_finished(tiny_gguf: Path, tmp_path: Path) -> None:
    events: list[progress.Event] = []
    progress.listen(events.append)
    try:
        quantize_gguf.function(QuantizeGgufConfig(format="Q8_0"), {"gguf": tiny_gguf.parent}, tmp_path)
    finally:
        progress.listen()
    total = len(open_gguf(tiny_gguf).tensors)
    assert [event["done"] for event in events] == list(range(total)) and {event["total"] for event in events} == {total}
