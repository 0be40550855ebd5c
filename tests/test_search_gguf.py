"""The search for a mixture of precisions: on a tiny real model, and the choice of parts by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.core.stage import Stage, StageConfig, run
from tasks.fidelity import NoNumbersError, ReferenceLogitsConfig, read_reference, reference_logits
from tasks.importance import ImportanceConfig, importance
from tasks.quantize_gguf import MODEL_FILE, ConvertGgufConfig, convert_gguf, quantize
from tasks.search_gguf import COARSEST, FINE, Part, SearchGgufConfig, cheapest, cost_of, mean_divergence, parts, search_gguf
from tasks.synthesize import SynthesizeConfig, synthesize
from tasks.weights import gguf_weights, open_gguf


class World:
    """A tiny model and what its search reads."""

    def __init__(self, home: Path) -> None:
        self.store, self.logs = Store((home / "store").as_uri(), home), home / "logs"
        data = SynthesizeConfig(languages=("en", "hr"), train_rows=40, validation_rows=12, test_rows=12, hard_rows=12)
        dataset = self.make(synthesize, data)
        model = self.make(base_model, BaseModelConfig(source=TINY))
        gguf = self.make(convert_gguf, ConvertGgufConfig(), model=model)
        matrix = self.make(importance, ImportanceConfig(rows=20), model=model, dataset=dataset, gguf=gguf)
        reference = self.make(reference_logits, ReferenceLogitsConfig(rows=6), model=model, dataset=dataset)
        self.inputs = {"gguf": gguf, "importance": matrix, "reference": reference}

    def make(self, stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return run(stage, config, inputs, self.store, self.logs)[0]

    def path(self, manifest: Manifest) -> Path:
        return self.store.path(manifest.kind, manifest.key)

    @property
    def source(self) -> Path:
        return self.path(self.inputs["gguf"]) / MODEL_FILE


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("search"))


def test_types_of_single_tensors_are_what_was_asked_for_and_the_others_what_they_were(world: World, tmp_path: Path) -> None:
    quantize(world.source, tmp_path / "m.gguf", "Q8_0", types={"blk.0.attn_q.weight": "Q4_0", "token_embd.weight": "Q4_0"})
    found = {tensor.name: tensor.tensor_type.name for tensor in open_gguf(tmp_path / "m.gguf").tensors}
    assert found.pop("blk.0.attn_q.weight") == found.pop("token_embd.weight") == "Q4_0"
    assert {kind for name, kind in found.items() if "norm" not in name} == {"Q8_0"}


def test_the_parts_are_all_the_matrices(world: World) -> None:
    found = parts(world.source)
    assert sorted(name for part in found for name in part.tensors) == sorted(gguf_weights(world.source))
    assert {"blk.0.attn", "blk.0.ffn", "token_embd"} <= {part.name for part in found}
    assert sum(part.weights for part in found) == sum(read().size for read in gguf_weights(world.source).values())


def test_what_is_found_is_smaller_and_diverges_no_more_than_allowed(world: World, tmp_path: Path) -> None:
    asked, reference = read_reference(world.path(world.inputs["reference"]))
    fine = world.make(search_gguf, SearchGgufConfig(max_kld=1e-12), **world.inputs)
    assert fine.metrics["coarse_parts"] == 0 and set(fine.metrics["tensor_types"]) == {"F32", FINE}  # nothing smaller will do
    every_tensor = {name: "IQ4_NL" for part in parts(world.source) for name in part.tensors}
    quantize(world.source, tmp_path / "coarse.gguf", "Q8_0", types=every_tensor)
    allowed = mean_divergence(tmp_path / "coarse.gguf", asked, reference) / 2
    made = world.make(search_gguf, SearchGgufConfig(max_kld=allowed), **world.inputs)
    file = world.path(made) / MODEL_FILE
    assert made.metrics["trials_measured"] == made.metrics["trials"] == 2 * made.metrics["parts"]
    assert made.metrics["coarse_parts"] > 0 and made.metrics["size_mb"] < fine.metrics["size_mb"]
    assert mean_divergence(file, asked, reference) == pytest.approx(made.metrics["mean_kld"], rel=1e-3)
    assert made.metrics["mean_kld"] <= allowed
    kept = json.loads((world.path(made) / "search.json").read_text())
    assert set(kept["costs"]) == {part.name for part in parts(world.source)}


def test_where_no_mixture_keeps_to_the_limit_one_part_that_does_is_better_than_none(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, reference = read_reference(world.path(world.inputs["reference"]))
    everything = {part.name: "IQ4_NL" for part in parts(world.source)}
    quantize(
        world.source, tmp_path / "coarse.gguf", "Q8_0", types={name: "IQ4_NL" for part in parts(world.source) for name in part.tensors}
    )
    allowed = mean_divergence(tmp_path / "coarse.gguf", asked, reference) / 2
    monkeypatch.setattr("tasks.search_gguf.cheapest", lambda *_: everything)
    folders = {name: world.path(manifest) for name, manifest in world.inputs.items()}
    found = search_gguf.function(SearchGgufConfig(max_kld=allowed), folders, tmp_path)
    assert (found["mixtures_tried"], found["mixture_kept_to_limit"], found["coarse_parts"]) == (1, False, 1)
    assert found["mean_kld"] <= allowed


def test_without_a_limit_everything_has_the_fewest_bits_and_nothing_need_be_tried(world: World) -> None:
    made = world.make(search_gguf, SearchGgufConfig(), **world.inputs)
    assert (made.metrics["coarse_parts"], made.metrics["trials"]) == (made.metrics["parts"], 0)
    assert set(made.metrics["tensor_types"]) == {"F32", COARSEST} and made.metrics["max_kld"] == made.metrics["mean_kld"]
    same = world.make(search_gguf, SearchGgufConfig(max_kld=2 * made.metrics["mean_kld"]), **world.inputs)
    assert same.metrics["tensor_types"] == made.metrics["tensor_types"]


def test_a_smallest_mixture_that_computes_no_numbers_is_passed_over_where_there_is_a_limit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Path] = []

    def broken_first(file: Path, *rows: Any) -> float:
        measured.append(file)
        if len(measured) == 1:
            raise NoNumbersError("what it foretells are no numbers")
        return mean_divergence(file, *rows)

    monkeypatch.setattr("tasks.search_gguf.mean_divergence", broken_first)
    folders = {name: world.path(manifest) for name, manifest in world.inputs.items()}
    assert search_gguf.function(SearchGgufConfig(max_kld=1e-12), folders, tmp_path)["coarse_parts"] == 0
    measured.clear()
    with pytest.raises(NoNumbersError):
        search_gguf.function(SearchGgufConfig(), folders, tmp_path)


def test_when_the_time_is_up_the_rest_keeps_its_bits_and_the_result_says_so(world: World) -> None:
    made = world.make(search_gguf, SearchGgufConfig(seconds=0.001, max_kld=1e-4), **world.inputs)
    assert made.metrics["trials_measured"] == 0 and made.metrics["coarse_parts"] == 0
    assert (world.path(made) / MODEL_FILE).is_file()


def test_a_file_that_ends_within_its_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(world.source.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"short\.gguf ends within its metadata"):
        open_gguf(tmp_path / "short.gguf")


@pytest.mark.fast
def test_each_part_takes_the_type_that_is_worth_it_within_the_budget() -> None:
    known = [Part("large", ("a",), 1000), Part("small", ("b",), 10), Part("dear", ("c",), 1000), Part("unmeasured", ("d",), 9999)]
    costs = {
        "large": {"Q8_0": 0.0, "Q5_0": 0.02, "IQ4_NL": 0.2},
        "small": {"Q8_0": 0.0, "Q5_0": 0.001, "IQ4_NL": 0.001},
        "dear": {"Q8_0": 0.0, "Q5_0": 0.5, "IQ4_NL": 0.6},
        "unmeasured": {"Q8_0": 0.0},
    }
    assert cheapest(known, costs, 0.05) == {"large": "Q5_0", "small": "IQ4_NL"}
    assert cheapest(known, costs, 0.0) == cheapest(known, costs, -1.0) == {}
    assert cheapest(known, costs, 0.002) == {"small": "IQ4_NL"}  # though `large` saves more for its cost
    assert cheapest(known, costs, 10.0) == {"large": "IQ4_NL", "small": "IQ4_NL", "dear": "IQ4_NL"}
    assert cost_of({"large": "Q5_0", "small": "Q8_0"}, costs) == 0.02
