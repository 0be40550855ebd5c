"""What is trusted and what is not (docs/security.md): models, files and text of others. Secrets: tests/test_teach_runs.py."""

from __future__ import annotations

import ast
import contextlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.core import registered_files, registry
from tasks.core.artifacts import Store
from tasks.core.manifests import MANIFEST, Manifest, damage_of, describe_files, digest_of
from tasks.core.markdown import escape_markdown
from tasks.core.registry import champion_files
from tasks.core.settings import Settings, load_settings
from tasks.core.tracking import Tracker, open_parent
from tasks.domain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<script>alert(1)</script>"

# No code of others --------------------------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every call in our code: where, what (`Class.method`), and its keyword arguments as far as they are constants."""
    for path in sorted([*(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                words = {word.arg: getattr(word.value, "value", None) for word in node.keywords if word.arg}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), words


@pytest.mark.fast
def test_models_are_loaded_without_code_and_without_pickles() -> None:
    loaded = [call for call in calls() if call[1].split(".")[-1] in ("from_pretrained", "from_config") or call[1] == "GPTQModel.load"]
    assert len(loaded) > 15
    for where, name, words in loaded:
        if name.startswith(("Auto", "GPTQModel")) and not name.endswith("from_config"):
            assert words.get("trust_remote_code") is False, where
        if name.startswith("AutoModel") and name.endswith("from_pretrained"):
            assert words.get("use_safetensors") is True, where


@pytest.mark.fast
def test_nothing_is_unpickled_or_run() -> None:
    forbidden = re.compile(
        r"(^|\.)(pickle|cPickle|dill|joblib|cloudpickle|marshal|shelve)\.|^(eval|exec)$|^torch\.(load|jit\.load|hub\.load)$|^yaml\.(unsafe_|full_)?load(_all)?$|^os\.system$|\.pyfunc\.load_model$"
    )
    found = [
        f"{where} {name}" for where, name, words in calls() if forbidden.search(name) or words.get("shell") or words.get("allow_pickle")
    ]
    assert [line.partition(":")[0] for line in found] == ["tasks/domain/spec.py"], found  # yaml.load with a loader made from SafeLoader
    from tasks.domain.spec import LineLoader

    assert "python" not in " ".join(str(tag) for tag in LineLoader.yaml_constructors)
    assert not [tag for tag in LineLoader.yaml_multi_constructors if tag and "python" in tag]


def test_a_base_model_that_brings_code_or_pickles_is_refused(tmp_path: Path) -> None:
    from tasks.base_model import BaseModelConfig, base_model, resolve

    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    config = {
        "architectures": ["EvilForCausalLM"],
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (source / "config.json").write_text(json.dumps(config))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match="pickled weights are not loaded"):
        resolve(BaseModelConfig(source=str(source)))
    (source / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\nclass M: ...\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        base_model.function(BaseModelConfig(source=str(source)), {}, out)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["one is gone", "all have another name"])
def test_a_base_model_is_not_filled_up_with_random_weights(tmp_path: Path, change: str) -> None:
    from safetensors.torch import load_file, save_file

    from tasks.base_model import BaseModelConfig, base_model, random_llama

    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    model, tokenizer = random_llama()
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    base_model.function(BaseModelConfig(source=str(source)), {}, out)  # as it is, all are there, tied ones too
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    if change == "one is gone":
        del weights[name]
    else:
        weights = {f"language_model.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ weights of its architecture, the first is (model|lm_head)\."):
        base_model.function(BaseModelConfig(source=str(source)), {}, out)


def test_llama_cpps_converter_which_trusts_a_models_code_runs_none(tmp_path: Path) -> None:
    from transformers import Glm4Config, Glm4ForCausalLM

    from tasks.base_model import BaseModelConfig, base_model, random_llama
    from tasks.quantize_gguf import ConvertGgufConfig, convert_gguf, run_program

    source, made, converted = (tmp_path / name for name in ("source", "made", "converted"))
    for folder in (source, made, converted):
        folder.mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokenizer = random_llama()[1]
    Glm4ForCausalLM(Glm4Config(vocab_size=len(tokenizer), head_dim=16, pad_token_id=0, eos_token_id=2, **sizes)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    (source / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: ...\n")

    def name_code(folder: Path) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": [None, f"{source}--evil.Tok"]}, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    name_code(source)
    base_model.function(BaseModelConfig(source=str(source)), {}, made)
    assert "auto_map" not in (made / "tokenizer_config.json").read_text()
    name_code(made)  # as an earlier version left it
    with contextlib.suppress(Exception):  # llama.cpp may not know this tokenizer
        convert_gguf.function(ConvertGgufConfig(), {"model": made}, converted)
    trusting = tmp_path / "trusting.py"
    trusting.write_text(
        "import sys\nfrom transformers import AutoTokenizer\nAutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    with pytest.raises(RuntimeError, match=r"the model's own code, Tok of .*evil\.py, is not run"):
        run_program(trusting, str(made))
    assert not (tmp_path / "ran").exists()


# Files in the shared store ------------------------------------------------------------------------------------------


def committed(store: Store) -> Manifest:
    """An artefact of one file, as another machine would have put it there."""
    folder = store.partial("merge", "k")
    folder.mkdir(parents=True)
    (folder / "weights").write_text("w")
    files = describe_files(folder)
    facts = {"kind": "merge", "key": "k", "version": 1, "config": {}, "inputs": {}, "metrics": {}, "libraries": {}, "hardware": "h"}
    made = Manifest.model_validate(
        {**facts, "files": files, "digest": digest_of(files), "wall_s": 1.0, "peak_rss_mb": None, "created": "now"}
    )
    store.commit(folder, made)
    return made


@pytest.mark.fast
@pytest.mark.parametrize("name", ["../../../../loot", "/loot", "a/../../loot", "..\\loot", "C:\\loot", "./loot", "a//loot", MANIFEST])
def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    from fsspec.implementations.memory import MemoryFile

    there, here = (Store(f"memory://names-{tmp_path.name}", tmp_path / machine) for machine in ("there", "here"))
    made = committed(there)
    written = there.fs.cat_file(f"{there.root}/merge/k/{MANIFEST}").decode().replace('"weights"', json.dumps(name))
    there.fs.pipe_file(f"{there.root}/merge/k/{MANIFEST}", written.encode())
    loot = f"{there.root}/merge/k/{made.digest}/{name}"
    there.fs.store.setdefault(loot, MemoryFile(there.fs, loot, b"w"))
    before = set(tmp_path.rglob("*"))
    manifest, damage = here.find("merge", "k")
    assert manifest is None and damage and "cannot be read" in damage
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert all(path.is_relative_to(tmp_path / "here") for path in new) and not Path("/loot").exists()
    with pytest.raises(ValueError, match="plain name"):
        Manifest.model_validate({**made.model_dump(), "kind": "../merge"})


@pytest.mark.fast
def test_a_file_that_is_a_link_to_elsewhere_is_damage(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri(), tmp_path)
    made = committed(store)
    folder = store.path("merge", "k")
    assert damage_of(folder, made) is None
    (tmp_path / "elsewhere").write_text("w")
    (folder / "weights").unlink()
    (folder / "weights").symlink_to(tmp_path / "elsewhere")
    assert "link to a file elsewhere" in (store.find("merge", "k")[1] or "")


@pytest.mark.fast
def test_no_more_is_fetched_than_a_manifest_says(tmp_path: Path) -> None:
    there, here = (Store(f"memory://sizes-{tmp_path.name}", tmp_path / machine) for machine in ("there", "here"))
    made = committed(there)
    there.fs.pipe_file(f"{there.root}/merge/k/{made.digest}/weights", b"w" * 1000)
    assert "has 1000 bytes instead of 1" in (here.find("merge", "k")[1] or "")
    assert not list((tmp_path / "here").rglob("weights"))


# Registered models --------------------------------------------------------------------------------------------------

NAME = "shop-intent"


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Tracker]:
    """An MLflow with a champion that has files, without a model in them."""
    home = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTWRIGHT_HOME", str(home))
        settings = load_settings()
    for file in ("model.gguf", "spec.yaml"):
        (home / file).write_text("x")
    tracker = open_parent(settings, "domain/base", "key", "run", {})
    files = {"model": home / "model.gguf", "spec": home / "spec.yaml"}
    model = tracker.log_model(tracker.child("v", "v", "variant"), "v", "d", files, "llama_cpp")
    found = registry.Registry(settings)
    with pytest.raises(UserError, match=r"model\.gguf is not what was logged"):
        found.register(NAME, model, "d", {}, "", weights={"0" * 64})
    found.register(NAME, model, "d", {}, "")
    found.client.set_registered_model_alias(NAME, registry.CHAMPION, "1")
    return settings, tracker


def test_a_registered_model_is_loaded_only_with_the_files_that_were_registered(
    registered: tuple[Settings, Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.registered import problem_of

    settings = registered[0]
    monkeypatch.setenv("CARTWRIGHT_HOME", str(settings.home))
    path, runtime, _ = champion_files(settings, NAME)
    assert path.read_text() == "x" and runtime == "llama_cpp"
    top = next(folder for folder in path.parents if (folder / "MLmodel").is_file())
    for file in (path, top / "MLmodel", top / "code" / "tasks" / "api.py"):
        kept = file.read_bytes()
        file.write_bytes(kept + b"\n")
        with pytest.raises(UserError, match=rf"{re.escape(file.relative_to(top).as_posix())} has been changed since it was registered"):
            champion_files(settings, NAME, version="1")
        file.write_bytes(kept)
    more = top / "artifacts" / "adapter_config.json"  # transformers would load what it names
    more.write_text("{}")
    with pytest.raises(UserError, match=r"artifacts/adapter_config.json was not registered with it"):
        champion_files(settings, NAME)
    assert "adapter_config.json was not registered" in problem_of(NAME, "1")  # so it is not promoted either
    more.unlink()
    path.rename(more)
    with pytest.raises(UserError, match=r"its file artifacts/"):
        champion_files(settings, NAME)
    more.rename(path)
    assert champion_files(settings, NAME)[0] == path


def test_a_version_of_an_earlier_cartwright_is_loaded_once_its_files_were_noted(registered: tuple[Settings, Tracker]) -> None:
    settings, found = registered[0], registry.Registry(registered[0])
    for tag in [tag for tag in found.client.get_model_version(NAME, "1").tags if tag.startswith(registered_files.FILES)]:
        found.client.delete_model_version_tag(NAME, "1", tag)
    with pytest.raises(UserError, match=r"without the hashes of its files.*cartwright run"):
        champion_files(settings, NAME)
    assert found.register(NAME, "not looked at", "d", {}, "") == ("1", True)
    assert champion_files(settings, NAME)[1] == "llama_cpp"


# Text of others -----------------------------------------------------------------------------------------------------


def test_text_of_others_stays_text_where_people_read_it(
    registered: tuple[Settings, Tracker], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefect.artifacts

    from tasks import gate, report
    from tasks.ablation import Ablation, Arm, Outcome, table
    from tasks.config import load_config
    from tasks.rendering import render

    link = "[free](http://evil) https://evil.example"
    verdict = {"verdict": "hold", "champion": EVIL, "challenger": link, "checks": [{"name": f"{EVIL} | {link}", "passed": False}]}
    shown: dict[str, str] = {}
    for kind in ("link", "table", "image"):
        monkeypatch.setattr(prefect.artifacts, f"create_{kind}_artifact", lambda **given: None)
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", lambda key, markdown, **more: shown.update({key: markdown}))
    monkeypatch.setattr(report, "PICTURES", ())
    tracker = registered[1]
    found = {"run_id": "r", "variants": [], "gate": verdict, "recommendation": {"why": f"{EVIL} {link}", "cpu": None}}
    found |= {"wall_s": 1.0, "overhead": {"wall_s": 1.0}}
    render({name: part for name, part in found.items() if name != "overhead"}, home)
    report.show_in_prefect(found, home, tracker)
    shown["tables"] = shown["tables"].replace("](https://arxiv.org/abs/2510.21970)", "")
    tracker.log_summary(found)
    shown["note"] = tracker.client.get_run(tracker.parent).data.tags["mlflow.note.content"]
    shown["approval"] = gate.in_markdown(verdict)
    arm = Arm(EVIL, {}, load_config("smoke"))
    ablation = Ablation(name="a", profile="quick", base={}, seeds=(1,), arms=(arm,))
    shown["ablation"] = table(ablation, [Outcome(arm, problems=[f"{EVIL} {link}"])])
    assert set(shown) == {"gate", "recommendation", "tables", "note", "approval", "ablation"}
    for where, text in shown.items():
        assert "&lt;script&gt;" in text and "<script" not in text, where
        assert "](http" not in text.replace("\\](", "") and "https://evil.example" not in text, where


LINKS_OF = {  # what each takes for an address that stands bare; the two last look at the text that entities stand for
    "showdown (MLflow)": r"(?i)(?:https?|ftp)://|www\.|[a-z0-9!#$%&'*+-/=?^_`{|}~.]+@[-a-z0-9]+(?:\.[-a-z0-9]+)*\.[a-z]+",
    "marked (Prefect)": r"(?i)(?:ftp|https?)://|www\.|[a-z0-9._+-]+@[a-z0-9-_]+(?:\.[a-z0-9-_]*[a-z0-9])+",
    "cmark-gfm (GitHub)": r"(?i)(?:https?|ftp)://|www\.|[a-z0-9.+_-]+@[a-z0-9]",
    "remark-gfm (Prefect, MLflow)": r"(?i)https?://|www(?=\.)|[-.\w+]+@[-\w]+(?:\.[-\w]+)+",
}


@pytest.mark.fast
@pytest.mark.parametrize(
    "address",
    [
        "https://evil.example",
        "HTTP://evil.example",
        "(ftp://evil.example)",
        "www.evil.example",
        "WWW.evil.example",
        "me@evil.example",
        "mailto:me+you@evil.example",
        "&#104;ttps&#58;//evil.example",
        "https&colon;//evil.example",
    ],
)
def test_a_bare_address_of_others_is_no_link(address: str) -> None:
    said = escape_markdown(f"see {address} now")
    for renderer, links in LINKS_OF.items():
        assert not re.search(links, said) and not re.search(links, html.unescape(said)), renderer
    assert html.unescape(said).replace("\u200b", "") == f"see {address} now"  # which is what people see
    assert escape_markdown("s3://bucket/a file:///b") == "s3://bucket/a file:///b"


# Bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_what_has_no_end_is_read_to_its_bound_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import recent_texts
    from tasks.api import LONGEST_ANSWER
    from tasks.domain import files

    with pytest.raises(UserError, match=r"too large.*at most 1,000 bytes"):
        files.read_text("data", Path("/dev/zero"), 1000)
    monkeypatch.setattr(recent_texts, "MOST_BYTES", 10_000)
    monkeypatch.setattr(recent_texts, "MOST_BAD", 3)
    texts = tmp_path / "texts.jsonl"
    texts.write_bytes(b"x\n" * 50 + b'{"text": "a"}\n')
    found = recent_texts.read_texts(str(texts), 5)
    assert len(found.bad) == 3 and found.problems() == {"is not JSON": 50}
    texts.write_bytes(b"x" * 20_000)
    with pytest.raises(UserError, match="more than 10,000 bytes"):
        recent_texts.read_texts(str(texts), 5)
    assert len(str(UserError("field", "x" * 10**6, "is wrong"))) < 1000 < LONGEST_ANSWER


@pytest.mark.fast
def test_every_bound_of_the_documentation_is_that_of_the_code() -> None:
    """docs/security.md names each bound as `module.NAME` with its value."""
    import importlib

    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"\| ([\d,]+) [^|]*\| `(tasks[\w.]+)\.([A-Z_]+)`", page)
    assert len(named) >= 10
    for value, module, name in named:
        assert getattr(importlib.import_module(module), name) == int(value.replace(",", "")), f"{module}.{name}"
