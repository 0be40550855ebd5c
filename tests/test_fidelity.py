"""Whether a variant still is the fine-tuned model: every verdict, on real files of a tiny model and with planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flows.session import Run
from tasks import runtimes
from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.benchmark import SAMPLES
from tasks.config import load_config
from tasks.core.artifacts import Store
from tasks.core.child import StageError
from tasks.core.manifests import MANIFEST, Manifest
from tasks.core.stage import Stage, StageConfig, run
from tasks.decide import DecideConfig, decide
from tasks.domain.prompt import Message
from tasks.fidelity import (
    ASKED,
    LOGITS,
    Asked,
    Divergence,
    FidelityConfig,
    ReferenceLogitsConfig,
    _not_made_by_rounding,
    _verdict,
    divergence,
    fidelity,
    judge,
    reference_logits,
)
from tasks.quantize_gguf import MODEL_FILE, ConvertGgufConfig, GgufFormat, QuantizeGgufConfig, convert_gguf, quantize_gguf
from tasks.runtimes.llama_cpp import LlamaCppRuntime
from tasks.synthesize import SynthesizeConfig, synthesize
from tasks.variants import Variant
from tasks.weights import BrokenFileError, Comparison, Weights, compare, gptq_weights


@dataclass
class World:
    """A base model whose weights lie on the grid of Q4_1, as the offline one's do; a tuned one, a small step away; and their files."""

    store: Store
    logs: Path
    base: Manifest
    tuned: Manifest
    dataset: Manifest
    base_gguf: Manifest
    tuned_gguf: Manifest
    reference: Manifest

    def make(self, stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return run(stage, config, inputs, self.store, self.logs)[0]

    def path(self, manifest: Manifest) -> Path:
        return self.store.path(manifest.kind, manifest.key)

    def quantized(self, kind: GgufFormat) -> Manifest:
        return self.make(quantize_gguf, QuantizeGgufConfig(format=kind), gguf=self.tuned_gguf)

    def inputs(self, model: Manifest) -> dict[str, Manifest]:
        return {"model": model, "reference": self.reference, "tuned": self.tuned_gguf, "base": self.base_gguf}

    def check(self, model: Manifest) -> dict[str, Any]:
        return self.make(fidelity, FidelityConfig(), **self.inputs(model)).metrics

    def asked(self) -> tuple[list[Asked], list[np.ndarray]]:
        rows = [Asked(**row) for row in json.loads((self.path(self.reference) / ASKED).read_text())]
        with np.load(self.path(self.reference) / LOGITS) as kept:
            return rows, [kept[str(i)].astype(np.float32) for i in range(len(rows))]


class TuneConfig(StageConfig):
    share: float = 0.03


def _tune(config: TuneConfig, inputs: Any, out_dir: Path) -> dict[str, Any]:
    """What stands for fine-tuning: every layer's weights moved by a share of their size, far less than a step of four bits."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.domain.spec import load_spec
    from tasks.tokenization import set_template

    model: Any = AutoModelForCausalLM.from_pretrained(inputs["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(inputs["base"])
    set_template(tokenizer, load_spec(str(inputs["dataset"])))
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "layers" in name and weight.dim() == 2:
            weight.data += config.share * weight.data.std() * torch.randn_like(weight)
    model.half().save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("fidelity")
    store = Store((home / "store").as_uri(), home)

    def make(stage: Stage, config: StageConfig, **inputs: Manifest) -> Manifest:
        return run(stage, config, inputs, store, home / "logs")[0]

    data = SynthesizeConfig(languages=("en", "hr"), train_rows=24, validation_rows=12, test_rows=12, hard_rows=12)
    dataset = make(synthesize, data)
    random = make(base_model, BaseModelConfig(source=TINY))
    rounded = make(quantize_gguf, QuantizeGgufConfig(format="Q4_1"), gguf=make(convert_gguf, ConvertGgufConfig(), model=random))
    published = store.path(rounded.kind, rounded.key) / MODEL_FILE
    base = make(base_model, BaseModelConfig(source=str(published)))
    tuned = make(Stage("tune", 1, _tune, isolated=False), TuneConfig(), base=base, dataset=dataset)
    return World(
        store,
        home / "logs",
        base,
        tuned,
        dataset,
        make(convert_gguf, ConvertGgufConfig(), model=base),
        make(convert_gguf, ConvertGgufConfig(), model=tuned),
        make(reference_logits, ReferenceLogitsConfig(rows=6), model=tuned, dataset=dataset),
    )


def test_the_16_bit_file_is_the_model(world: World) -> None:
    found = world.check(world.quantized("F16"))
    assert found["verdict"] == "ok" and found["prompt_ids_match"] is True
    assert found["mean_kld"] < 1e-3 and found["top1_agreement"] > 0.95 and found["weight_rel_error"] < 1e-6
    assert found["delta_retained"] == pytest.approx(1, abs=1e-3)
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=0.01)
    assert set(found["delta_retained_by_layer"]) == {"0", "1"}


def test_a_format_on_whose_grid_the_base_model_lies_erases_the_fine_tuning_and_another_does_not(world: World) -> None:
    erased, kept = world.check(world.quantized("Q4_1")), world.check(world.quantized("Q8_0"))
    assert erased["verdict"] == "erased" and erased["delta_retained"] < 0.2 and "of what fine-tuning changed is left" in erased["why"]
    assert kept["verdict"] != "erased" and kept["delta_retained"] == pytest.approx(1, abs=0.1)
    assert erased["weight_rel_error"] > kept["weight_rel_error"] > 0


def test_a_flipped_byte_is_found_and_the_file_named(world: World, tmp_path: Path) -> None:
    model = world.quantized("Q5_1")
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in world.path(model).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with (folder / MODEL_FILE).open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 0x40]))
    assert (folder / MANIFEST).is_file()
    paths = {name: world.path(manifest) for name, manifest in world.inputs(model).items()} | {"model": folder}
    found = fidelity.function(FidelityConfig(), paths, tmp_path)
    assert found["verdict"] == "file-broken" and str(folder / MODEL_FILE) in found["why"] and found["mean_kld"] is None


class TwoLayersSwapped:
    """A runtime that runs the right weights in a wrong order."""

    def __init__(self, folder: Path) -> None:
        from tasks.runtimes.transformers import TransformersRuntime

        self.right: Any = TransformersRuntime(folder, 1, "float32")
        layers = self.right.model.model.layers
        layers[0], layers[1] = layers[1], layers[0]
        layers[0].self_attn.layer_idx, layers[1].self_attn.layer_idx = 0, 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)


def test_a_runtime_that_swaps_two_layers_is_told_from_a_bad_format(world: World) -> None:
    rows, reference = world.asked()
    folder = world.path(world.tuned)
    exact = Comparison(weight_rel_error=0.001, delta_retained=1.0)

    def right() -> Any:
        return runtimes.load("transformers", folder, 1, "float32")

    swapped: Any = TwoLayersSwapped(folder)
    found = judge(swapped, exact, right, rows, reference)
    assert found["verdict"] == "runtime-broken" and "The weights are right and the answers are not" in found["why"]
    # The same answers, and transformers gives them too: then it is the format.
    assert judge(swapped, exact, lambda: swapped, rows, reference)["verdict"] == "degraded"
    assert judge(right(), exact, right, rows, reference)["verdict"] == "ok"
    folded = judge(swapped, None, None, rows, reference)
    assert folded["verdict"] == "degraded" and "Whether the format or its kernel costs that was not checked" in folded["why"]

    def unknown() -> Any:
        raise ValueError("GGUF model with architecture granite is not supported yet")

    found = judge(swapped, exact, unknown, rows, reference)
    assert found["verdict"] == "degraded" and "could not be checked in transformers: ValueError: GGUF model" in found["why"]
    assert found["mean_kld"] > 0

    def crowded() -> Any:
        raise MemoryError("can't allocate memory")

    with pytest.raises(MemoryError):  # passes: the next run looks again
        judge(swapped, exact, crowded, rows, reference)


def test_answers_that_are_no_numbers_are_the_runtime_s_fault_where_the_weights_are_sound(world: World) -> None:
    rows, reference = world.asked()

    class Overflown(TwoLayersSwapped):
        def completion_logits(self, prompt: list[int], completion: list[int]) -> Any:
            return self.right.completion_logits(prompt, completion) * np.nan

    model: Any = Overflown(world.path(world.tuned))
    found = judge(model, Comparison(weight_rel_error=0.001, delta_retained=1.0), lambda: model, rows, reference)
    assert found["verdict"] == "runtime-broken" and "no numbers" in found["why"] and found["weight_rel_error"] == 0.001
    assert judge(model, Comparison(weight_rel_error=0.1, delta_retained=0.1), lambda: model, rows, reference)["verdict"] == "erased"
    with pytest.raises(BrokenFileError, match="no numbers"):  # nothing is known of the weights
        judge(model, None, lambda: model, rows, reference)


@pytest.mark.parametrize(
    "template",
    ["{bos}{text}{eos}", "{bos}{bos}{{{{ messages[0]['content'] }}}}{eos}", "<|im_start|>user\n{{{{ messages[0]['content'] }}}}<|im_end|>"],
)
def test_a_wrong_template_or_a_doubled_first_token_is_found(world: World, template: str) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    rows, reference = world.asked()
    model = LlamaCppRuntime(world.path(world.quantized("F16")) / MODEL_FILE, 1)
    model._formatter = Jinja2ChatFormatter(template.format(bos="<|im_start|>", eos="<|im_end|>", text="hello"), "", "")
    found = judge(model, Comparison(0.0, 1.0), lambda: model, rows, reference)
    assert found["verdict"] == "runtime-broken" and f"{len(rows)} of {len(rows)} prompts" in found["why"]
    assert found["prompt_ids_match"] is False


def test_the_dequantized_file_runs_in_transformers(world: World) -> None:
    from tasks.fidelity import _in_transformers

    model = world.quantized("Q8_0")
    rows, _ = world.asked()
    elsewhere = _in_transformers(world.path(model) / MODEL_FILE)
    here = LlamaCppRuntime(world.path(model) / MODEL_FILE, 1)
    logits = [[runtime.completion_logits(row.prompt, row.completion) for row in rows] for runtime in (elsewhere, here)]
    assert divergence(logits[0], logits[1], rows).mean_kld < 1e-2


@pytest.mark.fast
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("format_", ["gptq", "gptq_v2"])
def test_gptq_weights_are_unpacked_as_the_format_defines_them(tmp_path: Path, bits: int, format_: str) -> None:
    """Two groups of 32 inputs in any order, 32 outputs; packed here bit by bit."""
    from safetensors.numpy import save_file

    def packed(numbers: Any) -> np.ndarray:
        """Words of the numbers of each row, one after the other, the lowest bit first."""
        rows = [sum(int(number) << bits * at for at, number in enumerate(row)) for row in numbers]
        words = [[row >> 32 * word & 0xFFFFFFFF for word in range(len(numbers[0]) * bits // 32)] for row in rows]
        return np.array(words, np.uint32).view(np.int32)

    rng = np.random.default_rng(2)
    whole, zeros = rng.integers(0, 1 << bits, (32, 64)), rng.integers(0, 1 << bits, (2, 32))
    scales, group = rng.uniform(0.01, 0.1, (2, 32)).astype(np.float16), rng.permutation(np.repeat([0, 1], 32)).astype(np.int32)
    stored = zeros if format_ == "gptq_v2" else (zeros - 1) % (1 << bits)
    tensors = {"qweight": packed(whole).T, "qzeros": packed(stored), "scales": scales, "g_idx": group}
    embeddings = rng.normal(size=(5, 4)).astype(np.float16)
    parts = {f"model.layers.0.q.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file({**parts, "model.embed.weight": embeddings, "model.norm.weight": np.ones(4, np.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": bits, "checkpoint_format": format_}}))
    with gptq_weights(tmp_path) as found:
        assert set(found) == {"model.layers.0.q.weight", "model.embed.weight"}
        expected = (whole - zeros[group].T) * scales.astype(np.float32)[group].T
        np.testing.assert_allclose(found["model.layers.0.q.weight"](), expected, rtol=1e-6)
        np.testing.assert_array_equal(found["model.embed.weight"](), embeddings.astype(np.float32))
    del parts["model.layers.0.q.g_idx"]
    save_file(parts, tmp_path / "model.safetensors")
    with gptq_weights(tmp_path) as found, pytest.raises(BrokenFileError, match=r"q\.g_idx is missing"):
        found["model.layers.0.q.weight"]()


def _weights(**matrices: np.ndarray) -> Weights:
    def reader(matrix: np.ndarray) -> Callable[[], np.ndarray]:
        return lambda: matrix

    return {f"blk.0.{name}": reader(np.asarray(matrix, np.float32)) for name, matrix in matrices.items()}


@pytest.mark.fast
def test_what_is_kept_is_the_projection_on_the_change() -> None:
    base, delta = np.ones((2, 2)), np.array([[1.0, 0.0], [0.0, -1.0]])
    off = np.array([[0.0, 3.0], [0.0, 0.0]])  # rounding noise, orthogonal to the change
    found = compare(_weights(q=base + 0.25 * delta + off), _weights(q=base + delta), _weights(q=base))
    assert found.delta_retained == pytest.approx(0.25) and found.by_layer == {"0": pytest.approx(0.25)}
    assert found.worst_tensor[0] == "blk.0.q"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("mine", "problem"),
    [({}, "blk.0.q is missing"), ({"q": np.ones((3, 2))}, "has the shape"), ({"q": np.array([[1, np.nan], [0, 0]])}, "are no numbers")],
)
def test_a_file_that_cannot_be_right_is_refused(mine: dict[str, np.ndarray], problem: str) -> None:
    whole = _weights(q=np.ones((2, 2)))
    with pytest.raises(BrokenFileError, match=problem):
        compare(_weights(**mine), whole, whole)


@pytest.mark.fast
@pytest.mark.parametrize("held", [np.zeros((64, 64)), np.ones((64, 64))], ids=["zeros", "something else"])
def test_a_tensor_that_is_further_off_than_rounding_makes_it_is_no_matter_of_the_format(held: np.ndarray) -> None:
    """Zeros have none of the fine-tuning left either, and the base model does not lie on them."""
    rng = np.random.default_rng(1)
    base, change = rng.normal(size=(2, 64, 64))
    tuned = base + 0.01 * change
    one_bit = np.sign(tuned) * np.abs(tuned).mean()
    sound = _weights(k=tuned, q=one_bit)
    broken = _weights(k=tuned, q=held)
    found = [compare(weights, _weights(k=tuned, q=tuned), _weights(k=base, q=base)) for weights in (sound, broken)]
    assert _not_made_by_rounding(found[0]) is None and found[0].worst_tensor[1] > 0.5
    verdict, why = _not_made_by_rounding(found[1]) or ("ok", "")
    assert verdict == "file-broken" and "The tensor blk.0.q is off by 1" in why and "leave the format out" in why


@pytest.mark.fast
def test_divergence_is_zero_for_equal_logits_and_counts_tokens() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32))
    other = np.log(np.array([[0.7, 0.2, 0.1], [0.8, 0.1, 0.1]], np.float32))
    row = Asked([Message()], [1], [0, 1])
    same, changed = divergence([logits], [logits], [row]), divergence([other], [logits], [row])
    assert same.mean_kld == pytest.approx(0, abs=1e-6) and same.top1_agreement == 1
    assert same.perplexity == same.reference_perplexity == pytest.approx(1 / np.sqrt(0.7 * 0.8), rel=1e-5)
    assert changed.mean_kld == pytest.approx((0.8 * np.log(8) + 0.1 * np.log(1 / 8)) / 2, rel=1e-4) and changed.top1_agreement == 0.5
    with pytest.raises(BrokenFileError, match="foretells 2 tokens"):
        divergence([logits[:, :2]], [logits], [row])


def _artefact(folder: Path, kind: str, metrics: dict[str, Any], right: list[bool] | None = None) -> Path:
    folder.mkdir(parents=True)
    if right is not None:
        (folder / "test.jsonl").write_text("\n".join(json.dumps({"correct": one}) for one in right))
    manifest = {
        "kind": kind, "key": folder.name, "version": 1, "config": {}, "inputs": {}, "files": {}, "digest": folder.name, "metrics": metrics,
        "libraries": {}, "hardware": "", "wall_s": 1, "peak_rss_mb": None, "created": "2026-11-25T00:00:00+00:00",
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def _decision(folder: Path, verdict: str, right: list[bool]) -> dict[str, Any]:
    """What is decided about a 16-bit reference and two formats, of which the faster one has this verdict and these right answers."""
    exact = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 60}
    speeds = {"tuned-fp16": 1.0, "gguf-Q8_0": 2.0, "gguf-Q4_1": 3.0}
    variants, inputs = [], {}
    for name, speed in speeds.items():
        candidate = name != "tuned-fp16"
        variants.append(
            Variant(
                name=name,
                format="gguf" if candidate else "hf",
                bits=16,
                runtime="llama_cpp" if candidate else "transformers",
                role="candidate" if candidate else "reference",
            )
        )
        dtypes = {"evaluate": None, "benchmark": None} if candidate else {"evaluate": "bfloat16", "benchmark": "float16"}
        performance = {"device": "cpu", "threads": 2, "kernel": None, "dtype": dtypes["benchmark"], "requests_s": speed, "requests_s_batched": speed, "requests_s_by_load": {}, "rss_mb": 9 - speed, "peak_rss_mb": 9.0, "private_mb": 8 - speed, "others_cores": 0.0, "stolen_cores": 0.0}  # fmt: skip
        inputs[f"model:{name}"] = _artefact(folder / f"m{name}", "merge", {})
        rows = right if name == "gguf-Q4_1" else [True] * 60
        inputs[f"evaluate:{name}"] = _artefact(
            folder / f"e{name}", "evaluate", {"test": {"exact_match": exact}, "dtype": dtypes["evaluate"]}, rows
        )
        inputs[f"benchmark:{name}:0"] = _artefact(folder / f"b{name}", "benchmark", performance)
        samples = {"latency_s": [1 / speed], "first_token_s": [0.1], "tokens": [1], "prefill_tok_s": [1.0], "decode_tok_s": [1.0]}
        (inputs[f"benchmark:{name}:0"] / SAMPLES).write_text(json.dumps(samples))
    inputs["fidelity:gguf-Q4_1"] = _artefact(folder / "f", "fidelity", {"verdict": verdict, "why": "Because."})
    decide.function(DecideConfig(variants=tuple(variants)), inputs, folder)
    return json.loads((folder / "decision.json").read_text())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("agreement", "retained", "verdict"),
    [(0.95, 0.5, "ok"), (0.949, 0.5, "degraded"), (0.95, 0.499, "erased")],
)
def test_where_the_verdicts_begin(agreement: float, retained: float, verdict: str) -> None:
    """95% of next tokens and half of the fine-tuning, as the README says."""
    assert _verdict(Divergence(0.1, 0.2, agreement, 1.0, 1.0), Comparison(0.1, retained), 9, 9, None)[0] == verdict


@pytest.mark.fast
@pytest.mark.parametrize("verdict", ["erased", "runtime-broken", "file-broken", "degraded", "ok"])
def test_what_is_broken_is_never_recommended_however_fast_it_is(tmp_path: Path, verdict: str) -> None:
    decision = _decision(tmp_path, verdict, [True] * 60)
    usable = verdict in ("ok", "degraded")
    assert decision["recommendation"]["cpu"] == ("gguf-Q4_1" if usable else "gguf-Q8_0")
    assert ("gguf-Q4_1" in decision["pareto"]) == usable
    variant = decision["variants"][2]
    assert variant["fidelity"]["verdict"] == verdict and (f"{verdict}: Because." in variant["notes"]) == (verdict != "ok")
    assert decision["variants"][0]["notes"] == ["its accuracy is that of bfloat16, which is quicker here, its speed that of float16"]
    assert decision["variants"][0]["performance"]["mapped_reason"] == "of GGUF files only"  # and not what its notes say of something else
    assert "mapped_reason" not in decision["variants"][1]["performance"]
    assert decision["variants"][1]["fidelity"] is None and decision["variants"][1]["fidelity_reason"] == "not measured"


@pytest.mark.fast
def test_a_variant_that_is_significantly_less_often_right_is_degraded(tmp_path: Path) -> None:
    variant = _decision(tmp_path / "much", "ok", [False] * 8 + [True] * 52)["variants"][2]
    assert variant["fidelity"]["verdict"] == "degraded" and "13.3 percentage points less often" in variant["fidelity"]["why"]
    assert _decision(tmp_path / "little", "ok", [False] * 3 + [True] * 57)["variants"][2]["fidelity"]["verdict"] == "ok"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("broken", "unchecked"),
    [("reference_logits", {"gptq-4bit", "gguf-Q4_0"}), ("convert_gguf", {"gguf-Q4_0"}), ("fidelity", {"gptq-4bit", "gguf-Q4_0"})],
)
def test_what_cannot_be_checked_stands_unchecked_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, broken: str, unchecked: set[str]
) -> None:
    from flows import stages

    manifest: Any = SimpleNamespace(metrics={"left_out_too_long": 0})

    def call(stage: Stage, *_: Any, **__: Any) -> Any:
        if stage.name == broken:
            raise StageError(f"{broken}: no memory left")
        return manifest

    monkeypatch.setattr(stages, "runner", lambda run: call)
    monkeypatch.setattr(stages, "replace", lambda call, **_: call)
    names = {"gptq-4bit": ("gptq", "transformers"), "gguf-Q4_0": ("gguf", "llama_cpp")}
    variants = [Variant(name=n, format=f, bits=4, runtime=r, role="candidate") for n, (f, r) in names.items()]  # type: ignore[arg-type]
    run: Any = Run(run_id="x", mlflow_run="m", config=load_config("smoke"), started="", resumed=False)
    *_, reference = stages.train.fn(run, manifest)
    checked, found = stages.check.fn(run, variants, dict.fromkeys(names, manifest), reference, manifest, manifest, manifest, manifest, {})
    assert set(found) == unchecked and set(checked) == set(names) - unchecked
    assert set(found.values()) == {f"{broken}: no memory left"}
