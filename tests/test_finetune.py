"""On which weights an adapter is trained: NF4 values first, at last the 16-bit weights it is merged into."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.session import Run
from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.checkpoints import SEAL
from tasks.config import load_config
from tasks.core.artifacts import Store
from tasks.core.manifests import CHECKPOINTS, Manifest
from tasks.core.stage import run
from tasks.domain.errors import UserError
from tasks.domain.spec import load_spec
from tasks.finetune import finetune
from tasks.frozen import BASE_LAYER, Int8Linear, restore_16bit, unpack_nf4
from tasks.qlora import FinetuneConfig, build_model, load_base
from tasks.synthesize import SynthesizeConfig, read_rows, synthesize
from tasks.tokenization import NO_DATE, set_template

TRAINING = {"precision": "fp32", "batch_size": 8, "learning_rate": 0.01, "rank": 4, "compile": False, "checkpoints": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    home = tmp_path_factory.mktemp("finetune")
    return Store((home / "store").as_uri(), home)


@pytest.fixture(scope="module")
def inputs(store: Store) -> dict[str, Manifest]:
    data = SynthesizeConfig(languages=("en",), train_rows=48, validation_rows=12, test_rows=12, hard_rows=12)
    made = {
        "base_model": run(base_model, BaseModelConfig(source=TINY), {}, store, Path(store.root) / "logs"),
        "dataset": run(synthesize, data, {}, store, Path(store.root) / "logs"),
    }
    return {name: manifest for name, (manifest, *_) in made.items()}


def validation_loss(store: Store, inputs: dict[str, Manifest], adapter: Manifest, packed: bool) -> float:
    """Loss of an adapter on NF4 values, or on the 16-bit weights."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from tasks.completions import completion_loss, encode_rows, pad
    from tasks.domain.spec import load_spec

    base, data = (store.fetch(inputs[name]) for name in ("base_model", "dataset"))
    model = load_base(FinetuneConfig(**TRAINING, method="qlora" if packed else "lora"), base)
    if packed:
        unpack_nf4(model, int8=False)
    folder = store.fetch(adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = encode_rows(read_rows(data / "validation.jsonl"), tokenizer, load_spec(str(data)), 256)
    with torch.no_grad():
        return float(completion_loss(PeftModel.from_pretrained(model, folder).eval(), pad(rows, tokenizer.pad_token_id)))


@pytest.mark.parametrize("style", ["short", "json"])
def test_the_loss_of_the_intent_can_count_more(store: Store, inputs: dict[str, Manifest], style: str) -> None:
    from transformers import AutoTokenizer

    from tasks.completions import IGNORED, encode_rows
    from tasks.domain.scoring import intent_text
    from tasks.domain.spec import load_spec

    base, data = (store.fetch(inputs[name]) for name in ("base_model", "dataset"))
    tokenizer, rows = AutoTokenizer.from_pretrained(base), read_rows(data / "train.jsonl")
    spec = load_spec(str(data)).model_copy(update={"answer": style})
    assert all("weights" not in example for example in encode_rows(rows, tokenizer, spec, 256))
    for row, example in zip(rows, encode_rows(rows, tokenizer, spec, 256, intent_weight=4.0), strict=True):
        ids, weights = example["input_ids"], example["weights"]
        assert tokenizer.decode([token for token, weight in zip(ids, weights, strict=True) if weight == 4]) == intent_text(
            row["gold"], spec
        )
        assert {weight for weight, label in zip(weights, example["labels"], strict=True) if label == IGNORED} == {0.0}
        assert {weight for weight, label in zip(weights, example["labels"], strict=True) if label != IGNORED} == {1.0, 4.0}


def test_rows_that_are_all_too_long_are_said_before_the_model_is_loaded(
    store: Store, inputs: dict[str, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: store.fetch(manifest) for name, manifest in inputs.items()}
    folders["dataset"] = Path(shutil.copytree(folders["dataset"], tmp_path / "data"))
    spec = folders["dataset"] / "spec.yaml"
    spec.write_text(spec.read_text().replace("prompt: short", "prompt: chat"))
    monkeypatch.setattr("tasks.finetune.build_model", None)
    with pytest.raises(
        UserError, match=r"max_length = 16: leaves 0 of 48 rows of train and 0 of 12 of validation.*set train.max_length="
    ) as error:
        finetune.function(FinetuneConfig(**TRAINING, workers=1, max_length=16), folders, tmp_path)
    longest = int(str(error.value).partition("longest row has ")[2].split()[0])
    monkeypatch.setattr("tasks.finetune.build_model", lambda config, folder: pytest.fail("loaded"))
    with pytest.raises(pytest.fail.Exception, match="loaded"):
        finetune.function(FinetuneConfig(**TRAINING, workers=1, max_length=longest), folders, tmp_path)


@pytest.mark.fast
def test_rows_that_are_left_out_are_counted_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import stages

    said: list[str] = []
    display = SimpleNamespace(say=said.append)

    @dataclass
    class Call:
        display: Any
        meanwhile: Any = None

        def __call__(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(metrics={"left_out_too_long": 87, "examples": 9})

    monkeypatch.setattr(stages, "runner", lambda run: Call(display))
    config = load_config("smoke", {"train.max_length": 16})
    stages.train.fn(Run(run_id="x", mlflow_run="m", config=config, started="", resumed=False), None)
    assert said == ["87 of 96 training rows have more tokens than train.max_length=16: left out."]


def test_the_intent_is_found_behind_what_a_template_puts_before_an_answer(store: Store, inputs: dict[str, Manifest]) -> None:
    from transformers import AutoTokenizer

    from tasks.completions import where
    from tasks.tokenization import encode

    tokenizer = AutoTokenizer.from_pretrained(store.fetch(inputs["base_model"]))
    ids = encode(tokenizer, "<think>\n\n</think>\n\nadd\np shoes to add")
    said = where(tokenizer, ids, "add")
    assert "add" in tokenizer.decode([ids[token] for token in said]) and said.stop < len(ids) - 4
    assert tokenizer.decode(ids[: said.start]).rstrip() == "<think>\n\n</think>"
    assert not where(tokenizer, ids, "return")


def trained(store: Store, inputs: dict[str, Manifest], share: float, workers: int = 2) -> Manifest:
    config = FinetuneConfig(**TRAINING, epochs=4, finish_in_16bit=share, workers=workers)
    return run(finetune, config, inputs, store, Path(store.root) / "logs")[0]


@pytest.mark.parametrize("share", [0, 0.5])
def test_training_ends_on_the_weights_that_are_merged(store: Store, inputs: dict[str, Manifest], share: float) -> None:
    adapter = trained(store, inputs, share)
    said = adapter.metrics["validation_loss"]
    trained_on, other = (validation_loss(store, inputs, adapter, packed) for packed in ((False, True) if share else (True, False)))
    assert abs(said - trained_on) < abs(said - other) / 3  # some units in the last place of a tiny, random model


def test_the_last_steps_are_taken_on_those_weights(store: Store, inputs: dict[str, Manifest]) -> None:
    digests = [trained(store, inputs, share).files["adapter_model.safetensors"].sha256 for share in (0.5, 0.25, 0.01, 0)]
    assert len(set(digests[:3])) == 3
    assert digests[2] == digests[3]  # of 24 steps, a hundredth is none: the same training twice gives the same adapter


def test_a_long_training_is_saved_between_its_evaluations_and_goes_on_there(
    store: Store, inputs: dict[str, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FinetuneConfig(**TRAINING, epochs=1, workers=1)
    folders = {name: store.fetch(manifest) for name, manifest in inputs.items()}
    found = {}
    for name, every in (("seldom", 1e9), ("always", 0.0)):
        monkeypatch.setattr("tasks.finetune.SAVED_EVERY_S", every)
        made = tmp_path / name
        made.mkdir()
        finetune.function(config, folders, made)
        found[name] = sorted(path.name for path in (made / CHECKPOINTS).iterdir())
        assert all((made / CHECKPOINTS / checkpoint / SEAL).is_file() for checkpoint in found[name])
    assert found == {"seldom": ["checkpoint-6"], "always": ["checkpoint-5", "checkpoint-6"]}
    shutil.rmtree(tmp_path / "always" / CHECKPOINTS / "checkpoint-6")
    again = finetune.function(config, folders, tmp_path / "always")
    assert again["resumed_from_step"] == 5
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in found}
    assert weights["seldom"] == weights["always"]


def test_processes_that_share_a_batch_go_on_with_the_same_weights(store: Store, inputs: dict[str, Manifest]) -> None:
    import torch

    from tasks.completions import IGNORED, completion_loss, pad
    from tasks.gradient_workers import GradientWorkers

    folder, config = store.fetch(inputs["base_model"]), FinetuneConfig(**TRAINING)
    pool = GradientWorkers(1, config, folder, autocast=False)
    model = build_model(config, folder)
    torch.manual_seed(3)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.normal_(std=0.05)
    batch = pad(
        [
            {
                "input_ids": list(range(5, 30 + row)),
                "labels": [IGNORED] * 4 + list(range(9, 30 + row)),
                "weights": [0.0] * 4 + [2.0] * (21 + row),
            }
            for row in range(4)
        ],
        0,
    )
    labels = int((batch["labels"][:, 1:] != IGNORED).sum())
    pool.follow(model)

    def gradient(shared: bool) -> torch.Tensor:
        model.zero_grad()
        completion_loss(model, pool.start(batch, labels) if shared else batch, labels).backward()
        if shared:
            pool.finish()
        return torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])

    try:
        before = gradient(shared=True)
        restore_16bit(model, folder)
        expected = gradient(shared=False)
        halfway = gradient(shared=True)
        pool.restore_16bit()
        torch.testing.assert_close(gradient(shared=True), expected, rtol=1e-4, atol=1e-6)
        for other in (before, halfway):
            assert (other - expected).norm() > 1e-3 * expected.norm()
    finally:
        pool.close()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_restored_layers_hold_the_weights_of_the_files(store: Store, inputs: dict[str, Manifest], precision: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = store.fetch(inputs["base_model"])
    model = build_model(FinetuneConfig(**{**TRAINING, "precision": precision}), folder).get_base_model()
    wanted = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).named_parameters())
    layers = {name.removesuffix(BASE_LAYER): layer for name, layer in model.named_modules() if name.endswith(BASE_LAYER)}
    weights = {name: layer.weight for name, layer in layers.items()}

    def differ() -> list[str]:
        return [name for name, weight in weights.items() if not torch.equal(weight, wanted[f"{name}.weight"])]

    assert len(layers) == 14 and len(differ()) == 14
    before = {name: layer.forward_int8.clone() for name, layer in layers.items() if isinstance(layer, Int8Linear)}
    holder = type("Adapted", (), {"get_base_model": lambda self: model})()
    restore_16bit(holder, folder)
    assert not differ()
    assert len(before) == (14 if precision == "int8" else 0)
    assert not [name for name, old in before.items() if torch.equal(layers[name].forward_int8, old)]
    assert not [layer for layer in layers.values() if layer.weight.requires_grad]


@pytest.mark.fast
def test_a_template_that_tells_the_date_tells_the_same_on_any_day() -> None:
    from datetime import datetime

    import jinja2

    template = (
        "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}Today is {{ day }}. {{ messages[0]['content'] }}"
    )
    tokenizer: Any = SimpleNamespace(chat_template=template)
    set_template(tokenizer, load_spec("ecommerce").model_copy(update={"prompt": "chat"}))
    environment = jinja2.Environment()
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    said = environment.from_string(tokenizer.chat_template).render(messages=[{"content": "hi"}])
    assert said == f"Today is {NO_DATE}. hi"
