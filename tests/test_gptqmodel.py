"""Formats that GPTQModel makes: AWQ, GPTQ of other widths, and the kernels that multiply by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.core import hardware
from tasks.core.artifacts import Store
from tasks.core.child import run_isolated
from tasks.core.manifests import Manifest
from tasks.core.stage import Stage, StageConfig, run
from tasks.domain.errors import UserError
from tasks.fidelity import FidelityConfig, ReferenceLogitsConfig, _opened, fidelity, judge, read_reference, reference_logits
from tasks.quantize_awq import QuantizeAwqConfig, check_outputs, quantize_awq
from tasks.quantize_gptq import QuantizeGptqConfig, quantize_gptq
from tasks.runtimes.transformers import TransformersRuntime
from tasks.synthesize import SynthesizeConfig, synthesize
from tasks.weights import gptq_weights

ASKED = [[{"role": "user", "content": " two olive oils please"}], [{"role": "user", "content": " bye"}]]


class World:
    """A tiny model all of whose matrices have 64 outputs or more, as those of real ones do."""

    def __init__(self, home: Path) -> None:
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

        self.store, self.logs = Store((home / "store").as_uri(), home), home / "logs"
        data = SynthesizeConfig(languages=("en", "hr"), train_rows=40, validation_rows=12, test_rows=12, hard_rows=12)
        self.dataset = self.make(synthesize, data)
        self.small = self.path(self.make(base_model, BaseModelConfig(source=TINY)))
        tokenizer = AutoTokenizer.from_pretrained(self.small)
        set_seed(7)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
        )  # fmt: skip
        source = home / "source"
        LlamaForCausalLM(config).save_pretrained(source)
        tokenizer.save_pretrained(source)
        self.tuned = self.make(base_model, BaseModelConfig(source=str(source)))

    def make(self, stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return run(stage, config, inputs, self.store, self.logs)[0]

    def path(self, manifest: Manifest) -> Path:
        return self.store.path(manifest.kind, manifest.key)


@pytest.fixture(autouse=True)
def enough_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What children get from `settings`; these tests also load models in their own process."""
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("gptqmodel"))


def test_awq_gives_the_same_file_twice_answers_and_is_checked_but_for_its_weights(world: World, tmp_path: Path) -> None:
    config = QuantizeAwqConfig(calibration_rows=8)
    made = world.make(quantize_awq, config, model=world.tuned, dataset=world.dataset)
    assert not list(Path.cwd().glob("logs"))  # GPTQModel's own
    assert made.metrics["group_size"] == 64 and made.metrics["calibration_rows"] == 8
    again = tmp_path / "again"
    again.mkdir()
    inputs = {"model": world.path(world.tuned), "dataset": world.path(world.dataset)}
    told: list[dict[str, Any]] = []
    run_isolated(quantize_awq, config, inputs, again, world.logs / "again.log", told.append, {})
    assert [event["done"] for event in told if event.get("note") == "blocks"] == [1, 2]
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in world.path(made).iterdir() if path.name != "manifest.json"
    }
    model = TransformersRuntime(world.path(made), 1, "float16")
    assert "Awq" in model.kernel and len(list(model.generate(ASKED, 5, 2))) == 2
    reference = world.make(reference_logits, ReferenceLogitsConfig(rows=6), model=world.tuned, dataset=world.dataset)
    compared = {"model": made, "reference": reference, "tuned": world.tuned, "base": world.tuned}
    found = world.make(fidelity, FidelityConfig(runtime="transformers", folded=True), **compared).metrics
    assert 0 < found["mean_kld"] < 0.05 and found["prompt_ids_match"] and found["verdict"] in ("ok", "degraded")
    assert found["weight_rel_error"] is None and "scales" in found["weight_rel_error_reason"]


def test_awq_of_a_model_that_it_cannot_round_says_so_before_it_begins(world: World) -> None:
    with pytest.raises(UserError, match=r"k_proj.* has 32 outputs.*multiple of 64.*awq=\[\]"):
        check_outputs(world.small)
    with pytest.raises(UserError, match=r"awq\.group_size"):
        quantize_awq.function(
            QuantizeAwqConfig(group_size=128), {"model": world.path(world.tuned), "dataset": world.path(world.dataset)}, world.logs
        )


def test_fewer_bits_of_gptq_are_smaller_and_further_from_the_16_bit_model(world: World) -> None:
    reference = world.make(reference_logits, ReferenceLogitsConfig(rows=6), model=world.tuned, dataset=world.dataset)
    found = []
    for bits in (3, 4):
        made = world.make(
            quantize_gptq,
            QuantizeGptqConfig.model_validate({"bits": bits, "calibration_rows": 8}),
            model=world.tuned,
            dataset=world.dataset,
        )
        inputs = {"model": made, "reference": reference, "tuned": world.tuned, "base": world.tuned}
        checked = world.make(fidelity, FidelityConfig(runtime="transformers"), **inputs).metrics
        found.append((made.metrics["size_mb"], -checked["mean_kld"], -checked["weight_rel_error"]))
        check_kernel(world.path(made))
    assert all(few < many for few, many in zip(*found, strict=True))


def check_kernel(folder: Path) -> None:
    """What the kernel multiplies by is what the file holds."""
    model = TransformersRuntime(folder, 1, "float32").model
    with gptq_weights(folder) as held, torch.inference_mode():
        layers = [(name, layer) for name, layer in model.named_modules() if f"{name}.weight" in held and hasattr(layer, "in_features")]
        assert len(layers) == 2 * 7
        for name, layer in layers:
            np.testing.assert_allclose(layer(torch.eye(layer.in_features)).T.numpy(), held[f"{name}.weight"](), atol=1e-3)


def test_a_kernel_that_multiplies_wrongly_is_told_from_a_bad_format(world: World) -> None:
    made = world.make(quantize_gptq, QuantizeGptqConfig(bits=4, calibration_rows=8), model=world.tuned, dataset=world.dataset)
    compared = {"model": made, "tuned": world.tuned, "base": world.tuned}
    reference = world.make(reference_logits, ReferenceLogitsConfig(rows=6), model=world.tuned, dataset=world.dataset)
    rows, logits = read_reference(world.path(reference))
    model, weights, unpacked = _opened(FidelityConfig(runtime="transformers"), {name: world.path(of) for name, of in compared.items()})
    right: Any = model
    for block in right.model.model.layers:
        block.mlp.down_proj.forward = lambda x, usual=block.mlp.down_proj.forward: -30 * usual(x)
    found = judge(model, weights, unpacked, rows, logits)
    assert found["verdict"] == "runtime-broken" and "run in transformers, the same weights agree" in found["why"]
    assert 0 < found["weight_rel_error"] < 0.5


@pytest.mark.skipif(hardware.gpu() is not None, reason="says what a CPU does")
def test_a_kernel_is_the_one_that_was_asked_for_or_an_error(world: World) -> None:
    made = world.make(quantize_gptq, QuantizeGptqConfig(bits=4, calibration_rows=8), model=world.tuned, dataset=world.dataset)
    assert made.metrics["calibration_rows"] == 8 < made.metrics["calibration_tokens"] and made.metrics["widest_layer"] > 0
    folder = world.path(made)
    usual, other = TransformersRuntime(folder, 1, "float16"), TransformersRuntime(folder, 1, "float16", kernel="torch")
    assert usual.kernel != other.kernel == "TorchLinear"
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert said["bits"] == 4 and said["dataset"] is None  # what it was calibrated on is not for who gets the model
    with pytest.raises(ValueError, match=r"(?i)marlin|device|cuda"):
        TransformersRuntime(folder, 1, "float16", kernel="marlin")
