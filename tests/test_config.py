"""Profiles, overrides, and the message for whatever does not fit: exit code 2, no traceback, nothing started."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from flows.cli import dashboards, main
from flows.doctor import checks_of, machine_facts
from tasks.asking import find_model
from tasks.base_model import OFFLINE, TINY, BaseModelConfig, base_model, check_unchanged, offline_gguf, resolve
from tasks.config import PROFILES, check_room, disk_needed, dump, load_config, profiles
from tasks.config import resolve as resolve_run
from tasks.core import hardware
from tasks.core import stage as seam
from tasks.core.artifacts import Store
from tasks.core.settings import given_credentials, load_settings
from tasks.domain.errors import UserError
from tasks.overrides import parse_overrides
from tasks.quantize_gptq import choose_group_size, layer_sizes

pytestmark = pytest.mark.fast
Cartwright = Callable[..., subprocess.CompletedProcess[str]]


def test_every_profile_is_valid() -> None:
    assert profiles() == ["overnight", "paper", "quick", "smoke", "standard"]
    assert len(list(PROFILES.iterdir())) == len([load_config(name) for name in profiles()])


def test_overrides_change_the_key_and_nothing_else_does() -> None:
    assert load_config("quick").key() == load_config("quick").key()
    changed = load_config("quick", parse_overrides(["train.epochs=2", "gguf=[F16, Q4_0]"]))
    assert changed.key() != load_config("quick").key()
    assert changed.train.epochs == 2 and changed.gguf == ("F16", "Q4_0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "quik"], "profile = 'quik': is unknown. Allowed: overnight, paper, quick, smoke, standard."),
        (["--set", "train.epocs=2"], "train.epocs = 2: is an unknown field. Allowed: method, precision, epochs"),
        (["--set", "trian.epochs=2"], "trian = {'epochs': 2}: is an unknown field. Allowed: profile, base_model"),
        (["--set", "train.epochs=0"], "train.epochs = 0: Input should be greater than 0"),
        (["--set", "train.epochs=many"], "train.epochs = 'many'"),
        (["--set", "train.method=full"], "train.method = 'full': Input should be 'qlora' or 'lora'. Allowed: 'qlora' or 'lora'"),
        (["--set", "gguf=[F16,Q9_9]"], "gguf.1 = 'Q9_9'"),
        (["--set", "gguf=[]"], "gguf = []"),
        (["--set", "data.intents=[fly]"], "data.intents = 'fly': is unknown. Allowed: search_product"),
        (["--set", "data.languages=[en,xx]"], "data.languages = 'xx': is unknown. Allowed: en, de"),
        (["--set", "data.held_out_noise=[rain]"], "unknown noise 'rain'"),
        (["--set", "data.domain=toys"], "domain = 'toys': has no spec.yaml. Allowed: ecommerce"),
        (["--set", "data.test_rows=1"], "data.test_rows = 1: Input should be greater than or equal to 12"),
        (["--set", "base_model.source=nowhere"], "base_model.source = 'nowhere': does not exist"),
        (["--set", "base_model.source=/nowhere/model.gguf"], "does not exist"),
        (["--set", "train.epochs"], "is not of the form field=value"),
        (["--set", "gptq=[{bits: 5}]"], "gptq.0.bits = 5"),
        (
            ["--profile", "quick", "--set", "gptq=[{group_size: 128}]"],
            "gptq.0.group_size = 128: does not divide the model's dimensions [576, 1536]",
        ),
        (
            ["--profile", "quick", "--set", "awq=[{group_size: 128}]"],
            "awq.0.group_size = 128: does not divide the model's dimensions [576, 1536]. Allowed: 64, 32, 16",
        ),
        (
            ["--set", "gptq=[{group_size: 128}]"],
            "gptq.0.group_size = 128: does not divide the model's dimensions [64, 128]. Allowed: 64, 32",
        ),
        (["--set", "gptq.0.group_size=64"], "gptq.0.group_size = 64: gptq has no fields to set one by one. Give all of it"),
        (["--set", "train.epochs.most=1"], "train.epochs.most = 1: train.epochs has no fields"),
        (["--set", "decide.max_size_mb=.inf"], "decide.max_size_mb = inf: Input should be a finite number"),
        (["--set", "base_model.source=2024-13-45"], "base_model.source = '2024-13-45': is not a YAML value"),
        (["--set", "gguf=[Q4_0,F16,Q4_0]"], "Q4_0 is listed twice"),
        (
            ["--set", "gptq=[{bits: 4}, {bits: 4, calibration_rows: 32}]"],
            "gptq-4bit is listed twice; its variants differ by bits and group_size",
        ),
        (["--set", "profile=nosuch"], "profile = 'nosuch': is not a field to set. Choose it with --profile"),
        (["--set", "gptq=[{group_size: 48}]"], "gptq.0.group_size = 48: Input should be 0, 16, 32"),
        (["--set", "train.seed=4294967296"], "train.seed = 4294967296: Input should be less than or equal to 4294967295"),
        (["--set", "fidelity.skip=24"], "fidelity.skip = 24: leaves out all of data.validation_rows = 24"),
        (["--set", "evaluate.runtime=transformers"], "runtime = 'transformers' is filled in for each variant"),
        (["--set", "decide.at_a_time=9"], "at_a_time = 9: what is measured is 1, 8 at a time. Set benchmark.loads=[9]"),
        (["--set", "benchmark.dtype=float32"], "dtype = 'float32' is filled in for each variant"),
        (["--set", "evaluate.constrained=true"], "constrained = True is measured of GGUF variants, beside the usual. Set constrained=true"),
        (
            ["--set", "benchmark.constrained=true"],
            "constrained = True is measured of GGUF variants, beside the usual. Set constrained=true",
        ),
        (["--set", "benchmark.mmap=true"], "mmap = True is measured of GGUF variants, beside the usual. Set benchmark.mapped_too=true"),
        (["--set", "data.languages=en,de"], "data.languages = 'en,de': is not a list. Write [en, de]"),
        (["--set", "gptq={bits: 4}"], "gptq = {'bits': 4}: is not a list. Write [{bits: 4}]"),
        (["--set", "gguf=null"], "gguf: is not a list. Write it in brackets"),
        (["--set", "gptq=[4]"], "gptq.0 = 4: is not a mapping of fields. Allowed: bits, group_size"),
        (["--set", "api=[{few_shot: 2}]"], "api.0.model: is not given. Give it, as in `model: ...`"),
        (["--set", "data.languages=[en,de,en]"], "data.languages = 'en': is listed twice"),
        (["--set", "registry.name=.."], "registry.name = '..': String should match pattern"),
        (["--set", "evaluate.splits=[hard]"], "splits = ['hard']: some of test, hard, validation, with `test`"),
        (["--set", "evaluate.splits=[tset]"], "splits = ['tset']: some of test, hard, validation"),
        (["--set", "benchmark.prefill_tokens=4096"], "benchmark.prefill_tokens = 4096: Input should be less than or equal to 2048"),
    ],
)
def test_bad_input_stops_before_any_work(
    home: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cartwright", "run", *(() if arguments[0] == "--profile" else ("--profile", "smoke")), *arguments])
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2, said.err
    assert message in said.err
    assert "Traceback" not in said.err + said.out and "secret" not in said.err
    assert said.err.startswith("Error: ") and len(said.err.strip().splitlines()) == 1
    assert not home.exists()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("data: {seed: 3\ntrain: {", r"file = '.*mine\.yaml:2': is not valid YAML"),
        ("- data\n- train\n", r"file = '.*mine\.yaml:1': is not a mapping"),
        ("data: {seed: 3}\n\ntrain:\n  epocs: 2\n", r"mine\.yaml:4: train\.epocs = 2: is an unknown field\. Allowed: method"),
        ("gguf: [F16]\ngptq: [{bits: 4},\n  {bits: 5}]\n", r"mine\.yaml:3: gptq\.1\.bits = 5"),
        ("data: {seed: 3}\ndata: {seed: 4}\n", r"mine\.yaml:2': is not valid YAML: 'data' stands twice"),
    ],
)
def test_what_is_wrong_in_a_profile_is_said_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, said: str) -> None:
    monkeypatch.setattr("tasks.config.PROFILES", tmp_path)
    (tmp_path / "mine.yaml").write_text(written)
    with pytest.raises(UserError, match=said):
        load_config("mine", {"train.epochs": 2})


def test_a_profile_without_a_field_is_the_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.config.PROFILES", tmp_path)
    (tmp_path / "mine.yaml").write_text("# nothing yet\n")
    assert load_config("mine", {"train.epochs": 2}).train.epochs == 2


def test_so_does_a_converter_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CARTWRIGHT_LLAMA_CPP", "/wrong")
    message = "CARTWRIGHT_LLAMA_CPP = '/wrong': has no convert_hf_to_gguf.py. Run `make install`"
    test_bad_input_stops_before_any_work(home, ["--set", "gguf=[F16]"], message, monkeypatch, capsys)
    assert resolve_run(load_config("smoke"), quantizes=False).data.domain_sha256  # who only trains needs none


@pytest.mark.slow
@pytest.mark.parametrize(
    ("api", "message"),
    [
        ("[{model: nobody/knows}]", "api.0.model = 'nobody/knows': is no model id LiteLLM knows"),
        ("[{model: openai/m}, {model: openai/m, few_shot: 2}]", "api.0.model = 'openai/m': is listed twice"),
        ("[{model: openai/of-our-own, max_usd: 2}]", "api.0.max_usd = 2.0: cannot be kept: LiteLLM has no price"),
        ("[{model: anthropic/m}]", "'anthropic/m': needs a key. Set the provider's key in the environment, such as ANTHROPIC_API_KEY"),
        ("[{model: openai/m, api_base: somewhere}]", "api.0.api_base = 'somewhere'"),
        ("[{model: openai/m, api_base: 'http://me:secret@here'}]", "api.0.api_base: has a user name or a query"),
        ("[{model: openai/m, splits: [hard]}]", "splits = ['hard']: some of test, hard, validation, with `test`"),
    ],
)
def test_so_does_an_api_that_cannot_be_asked(
    home: Path, api: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_bad_input_stops_before_any_work(home, ["--set", f"api={api}"], message, monkeypatch, capsys)


def test_the_configuration_can_be_shown_before_anything_is_made(cartwright: Cartwright, home: Path) -> None:
    shown = cartwright("run", "--profile", "smoke", "--set", "train.epochs=2", "--show-config")
    assert shown.returncode == 0 and not home.exists()
    assert (
        shown.stdout == dump(resolve_run(load_config("smoke", {"train.epochs": 2}))) + "\n"
        and json.loads(shown.stdout)["train"]["epochs"] == 2
    )


def test_so_does_the_command_itself(cartwright: Cartwright, home: Path) -> None:
    result = cartwright("run", "--profile", "quik")
    assert result.returncode == 2 and not result.stdout and not home.exists()
    assert result.stderr.startswith("Error: ") and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_an_unwritable_home_stops_before_any_work(cartwright: Cartwright, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = cartwright("run", "--profile", "smoke", CARTWRIGHT_HOME=str(tmp_path / "file" / "home"))
    assert result.returncode == 2 and f"is below {tmp_path}/file, which is no folder" in result.stderr and "Traceback" not in result.stderr


def test_only_a_run_that_has_not_begun_is_asked_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config = Store((tmp_path / "store").as_uri(), tmp_path), resolve_run(load_config("smoke"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"has 0\.0 GB free, and the run may need"):
        check_room(config, store, tmp_path)
    (tmp_path / "logs" / f"20260101-000000-smoke-{config.key()[:4]}").mkdir(parents=True)  # as its first stage leaves it
    with pytest.raises(UserError, match="may need"):  # of a store that is gone
        check_room(config, store, tmp_path)
    store.path("base_model", base_model.key(config.base_model, {})).mkdir(parents=True)
    check_room(config, store, tmp_path)
    other = resolve_run(load_config("smoke", {"decide.max_rss_mb": 500}))
    with pytest.raises(UserError, match="may need"):
        check_room(other, store, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=disk_needed(config) // 2))
    check_room(other, store, tmp_path)


@pytest.mark.parametrize(
    ("prefect", "mlflow", "shown"),
    [
        ("", "", ("env 'PREFECT_HOME={home}/prefect' ", "--backend-store-uri 'sqlite:///{home}/mlflow.db'")),
        ("http://127.0.0.1:4200/api", "http://me:secret@127.0.0.1:5000", ("http://127.0.0.1:4200", "http://127.0.0.1:5000")),
    ],
)
def test_dashboards_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect: str, mlflow: str, shown: tuple[str, str]
) -> None:
    home = tmp_path / "a home"
    for name, value in (("CARTWRIGHT_HOME", str(home)), ("PREFECT_API_URL", prefect), ("MLFLOW_TRACKING_URI", mlflow)):
        monkeypatch.setenv(name, value)
    lines = dashboards(load_settings())
    if prefect:
        assert lines[0] == shown[0] and lines[1].endswith(shown[1].removeprefix("http://")) and "secret" not in lines[1]
    else:
        assert lines[0].startswith(shown[0].format(home=home)) and lines[1].endswith(shown[1].format(home=home))
        monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
        assert dashboards(load_settings())[0].startswith("env PREFECT_HOME=/elsewhere ")


@pytest.mark.parametrize(
    "given",
    [
        "teacher.api_key=gsk_planted0123456789",
        "teacher.password=1234509876",
        "teacher={API-Token: gsk_planted0123456789}",
        "techer={api_key: gsk_planted0123456789}",
        "api=[{model: openai/m, api_key: gsk_planted0123456789}]",
        "api={model: openai/m, api_key: gsk_planted0123456789}",
        "profile.client_secret=gsk_planted0123456789",
        "data.teacher.credentials=[gsk_planted0123456789]",
        "teacher.api_key:gsk_planted0123456789",
        "teacher.api_key={gsk_planted0123456789",
        "api=[{api_key: gsk_planted0123456789",
        "teacher.api_base=ftp://ana:gsk_planted0123456789@host",
        "teacher.api_base=ana:gsk_planted0123456789@host",
        "teacher.api_base=[ftp://ana:gsk_planted0123456789@host]",
        "api=[{model: openai/m, api_base: 'ftp://ana:gsk_planted0123456789@host'}]",
        "teacher.adress=https://ana:gsk_planted0123456789@host",
    ],
)
def test_no_error_shows_a_key_that_was_given_in_the_wrong_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["cartwright", "run", "--profile", "smoke", "--set", given])
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and "***" in said.err
    assert "planted" not in said.err + said.out and "1234509876" not in said.err + said.out and not home.exists()


def test_an_unknown_field_that_is_no_secret_is_shown_as_it_was_given() -> None:
    with pytest.raises(UserError, match=r"teacher\.max_tokns = 500: is an unknown field"):
        load_config("smoke", {"teacher.max_tokns": 500})
    with pytest.raises(UserError, match=r"vocabulary\.token = 512: is an unknown field. Allowed: tokens"):
        load_config("smoke", {"vocabulary.token": 512})
    with pytest.raises(UserError, match=r"train\.tokenizer = 'mine': is an unknown field"):
        load_config("smoke", {"train.tokenizer": "mine"})
    with pytest.raises(UserError, match=r"api\.0\.tokens = 500: is an unknown field"):
        load_config("smoke", {"api": [{"model": "openai/m", "tokens": 500}]})


def test_passwords_are_taken_out_of_addresses(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p%40ss@mlflow.test:5000/x")
    monkeypatch.setenv("PREFECT_API_URL", "http://you:word@127.0.0.1:4200/api")
    for _ in range(2):
        settings = load_settings()
        assert settings.mlflow_uri == os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.test:5000/x"
        assert settings.prefect_api_url == os.environ["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")
        assert os.environ["PREFECT_API_AUTH_STRING"] == "you:word"
    assert given_credentials() == ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"]
    for address in ("HTTP://other:p@ss@mlflow.test/a@b?x=c@d", "http://mlflow.test/a@b?x=c@d"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert load_settings().mlflow_uri == "http://mlflow.test/a@b?x=c@d"
        assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")  # said before


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgres://ana:planted-pw@db/x", "postgres:"),
        ("postgres:///ana:planted-pw@db/x", "postgres:"),
        ("postgres://db/x?user=ana&password=planted-pw", "postgres:"),
        ("postgresql+a+b://ana:planted-pw@db/x", "postgresql+a+b:"),
        ("oracle:ana:planted-pw@db", "oracle:"),
        ("planted-token@mlflow.test:5000", ""),
    ],
)
def test_an_address_that_mlflow_does_not_know_is_refused_without_its_password(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str, shown: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(sys, "argv", ["cartwright", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = "".join(capsys.readouterr())
    assert ended.value.code == 2 and said.startswith(f"Error: MLFLOW_TRACKING_URI = '{shown}...': is of a kind that MLflow does not know")
    assert "Allowed: http, https, databricks, postgresql, mysql" in said and "planted" not in said and not home.exists()


@pytest.mark.parametrize(
    "address",
    ["", "mlruns", "/a/b:c", "file:///a", "https://h", "databricks", "databricks://p", "sqlite:///a.db", "mssql://h/d",
     "mysql+pymysql://u:p@h/d", "PostgreSQL+psycopg2://u:p@h/d"],
)  # fmt: skip
def test_addresses_that_mlflow_knows_stay(monkeypatch: pytest.MonkeyPatch, home: Path, address: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert load_settings().mlflow_uri == (address or f"sqlite:///{home / 'mlflow.db'}")


@pytest.mark.parametrize(("name", "problem"), [("nowhere/figures.json", "does not exist"), (".", "is a folder")])
def test_figures_that_could_not_be_saved_are_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, problem: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["cartwright", "evaluate", "--output", str(tmp_path / name)])
    with patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--output" in (said := capsys.readouterr().err) and problem in said


@pytest.mark.slow
def test_doctor_says_what_is_wrong_and_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> dict[str, bool]:
        return {name: good for good, name, _ in checks_of(load_settings())}

    good = looked()
    assert good["store can be written"] and good["offline base model"] and good["profile quick"]
    monkeypatch.setenv("CARTWRIGHT_STORE", "foo://somewhere")
    bad = looked()
    assert not bad["store can be written"] and bad | {"store can be written": True} == good
    monkeypatch.delenv("CARTWRIGHT_STORE")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the base model's package is not there
    lacking = looked()
    assert set(lacking) == set(good) and not lacking["offline base model"] and not lacking["room for a quick run"]


@pytest.mark.parametrize(
    ("flags", "has", "training"),
    [
        ({"amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni"}, ["yes", "yes", "yes"], "by AMX"),
        ({"avx512_bf16", "avx512_vnni"}, ["no", "yes", "yes"], "8-bit integers"),
        ({"avx512_bf16"}, ["no", "yes", "no"], "slower than with AMX"),
        ({"avx_vnni"}, ["no", "no", "yes"], "float32"),
        (set(), ["no", "no", "no"], "float32"),
    ],
)
def test_doctor_says_what_the_processor_multiplies_and_how_it_trains(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], has: list[str], training: str
) -> None:
    monkeypatch.setattr(hardware, "cpu_flags", lambda: flags)
    monkeypatch.setattr(hardware, "gpu", lambda: None)
    facts = machine_facts()
    assert re.findall("yes|no", facts["instructions"]) == has and training in facts["training"]


@pytest.mark.parametrize(("lacks", "words"), [([], "used in training"), (["g++", "Python.h"], "needs g++ and Python.h")])
def test_doctor_says_what_training_cannot_be_compiled_with(monkeypatch: pytest.MonkeyPatch, lacks: list[str], words: str) -> None:
    monkeypatch.setattr(hardware, "lacks_to_compile", lambda: lacks)
    assert words in machine_facts()["torch.compile"]


SAFETENSORS = b"\x02\0\0\0\0\0\0\0{}"  # without a tensor


def model_folder(folder: Path, architecture: str = "LlamaForCausalLM", template: bool = True, weights: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"} if template else {}))
    (folder / "tokenizer.json").write_text("{}")
    if weights:
        (folder / "model.safetensors").write_bytes(SAFETENSORS)
    return folder


def test_a_base_model_folder_is_checked_and_digested(tmp_path: Path) -> None:
    good = model_folder(tmp_path / "good")
    revision = resolve(BaseModelConfig(source=str(good))).revision
    (good / "README.md").write_text("what a page says of it")
    assert revision == resolve(BaseModelConfig(source=str(good))).revision
    seen = {revision}
    for name in ("model.safetensors", "generation_config.json", "merges.txt", "tokenizer.model"):
        (good / name).write_bytes(b"\x03\0\0\0\0\0\0\0{ }" if name.endswith("safetensors") else b"{}")
        seen.add(resolve(BaseModelConfig(source=str(good))).revision)
    assert len(seen) == 5


def test_a_base_model_that_changed_after_the_run_began_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "shop")
    for source in (OFFLINE, TINY, str(offline_gguf()), str(folder)):
        began = resolve(BaseModelConfig(source=source))
        check_unchanged(began)
        with pytest.raises(UserError, match="has changed since the run began"):
            check_unchanged(began.model_copy(update={"revision": "ab" * 32}))
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"base_model\.source = .*shop.*has changed since the run began"):
        check_unchanged(began)
    check_unchanged(BaseModelConfig(source="a/m", revision="ab" * 20))  # a commit


@pytest.mark.slow
def test_nothing_is_stored_of_a_base_model_that_changed_after_the_run_began(tmp_path: Path) -> None:
    store, began = Store((tmp_path / "store").as_uri(), tmp_path), BaseModelConfig(source=TINY, revision="ab" * 32)
    with pytest.raises(UserError, match="has changed since the run began"):
        seam.run(replace(base_model, isolated=False), began, {}, store, tmp_path / "logs")
    assert store.find("base_model", base_model.key(began, {})) == (None, None)


def test_where_a_base_model_is_makes_it_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(source: Path | str) -> str:
        return base_model.key(resolve(BaseModelConfig(source=str(source))), {})

    here = model_folder(tmp_path / "here")
    there = Path(shutil.copytree(here, tmp_path / "there"))
    monkeypatch.chdir(tmp_path)
    assert key(here) == key(there) == key("./here")
    (there / "merges.txt").write_text("a b")
    assert key(here) != key(there)
    named = [base_model.key(BaseModelConfig(source=source, revision="ab" * 32), {}) for source in (OFFLINE, TINY, "m.gguf", "m")]
    of_the_hub = [base_model.key(BaseModelConfig(source=source, revision="ab" * 20), {}) for source in ("a/m", "b/m")]
    assert len({*named, *of_the_hub}) == 6


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": "BertForMaskedLM"}, "BertForMaskedLM, not a causal language model"),
        ({"template": False}, "has no chat template"),
        ({"weights": False}, "has no .safetensors weights"),
    ],
)
def test_an_unusable_base_model_folder_is_refused(tmp_path: Path, options: dict[str, object], problem: str) -> None:
    folder = model_folder(tmp_path / "model", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=problem):
        resolve(BaseModelConfig(source=str(folder)))


@pytest.mark.parametrize("content", [b"", b"weights", SAFETENSORS[:-1], b"\xff" * 8 + b"{}"])
def test_weights_that_are_not_all_there_are_refused_before_any_work(tmp_path: Path, content: bytes) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors': is not a readable safetensors file.*Download it again"):
        resolve(BaseModelConfig(source=str(folder)))
    (folder / "model.safetensors").write_bytes(SAFETENSORS)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\. Allowed: tokenizer\.json"):
        resolve(BaseModelConfig(source=str(folder)))


def test_a_shard_that_is_missing_is_noticed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", weights=False)
    (folder / "model-00001-of-00002.safetensors").write_bytes(SAFETENSORS)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors': is not a readable safetensors file \(No such file"):
        resolve(BaseModelConfig(source=str(folder)))
    (folder / "model-00002-of-00002.safetensors").write_bytes(SAFETENSORS)
    resolve(BaseModelConfig(source=str(folder)))
    for content, problem in (("[]", "is not valid JSON"), ("{}", "is not an index of weights")):
        index.write_text(content)
        with pytest.raises(UserError, match=problem):
            resolve(BaseModelConfig(source=str(folder)))


@pytest.mark.parametrize("name", ["deep/w.bin", "w.bin", "deep/w.safetensors", "../w.safetensors", ".."])
def test_weights_are_read_from_where_they_were_checked_only(tmp_path: Path, name: str) -> None:
    """transformers opens whatever the index names; a file beside it that is called like the last part of that proves nothing."""
    folder = model_folder(tmp_path / "model")
    (folder / "w.bin").write_bytes(SAFETENSORS)
    (folder / "w.safetensors").write_bytes(SAFETENSORS)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for refused in (lambda: resolve(BaseModelConfig(source=str(folder))), lambda: find_model(load_settings(), str(folder))):
        with pytest.raises(UserError, match=rf"'{name}' is no \.safetensors file beside it"):
            refused()


def test_a_config_does_not_name_its_weights_itself(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    named = {"architectures": ["LlamaForCausalLM"], "transformers_weights": "deep/w.safetensors.index.json"}
    (folder / "config.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match=r"config\.json': names the file of its weights itself.*Call the weights model\.safetensors"):
        resolve(BaseModelConfig(source=str(folder)))


@pytest.mark.parametrize("said", [{}, {"model_type": None}, {"model_type": "evil"}, {"model_type": ["llama"]}])
def test_a_model_that_transformers_does_not_know_is_refused_before_any_work(tmp_path: Path, said: dict[str, object]) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"architectures": ["EvilForCausalLM"], **said}))
    with pytest.raises(UserError, match=r"this version of transformers does not know \(`model_type` in config\.json: .*code of its own"):
        resolve(BaseModelConfig(source=str(folder)))


@pytest.mark.parametrize(("architectures", "said"), [("LlamaModel", "LlamaModel"), (5, "of no known architecture"), (None, "of no known")])
def test_an_architecture_that_is_no_list_is_told_as_it_is(tmp_path: Path, architectures: object, said: str) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(UserError, match=f"is {said}.*, not a causal language model"):
        resolve(BaseModelConfig(source=str(folder)))


def test_an_adapter_beside_the_weights_is_not_loaded_with_them(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    for refused in (lambda: resolve(BaseModelConfig(source=str(folder))), lambda: find_model(load_settings(), str(folder))):
        with pytest.raises(UserError, match=r"adapter_config\.json.*Merge it into the model first"):
            refused()


@pytest.mark.parametrize("content", [b"", b"not gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60)])
def test_a_damaged_gguf_base_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a readable GGUF file"):
        resolve(BaseModelConfig(source=str(path)))


def test_group_size_divides_the_dimensions() -> None:
    assert choose_group_size(0, [576, 1536]) == 64
    assert choose_group_size(0, [2048, 8192]) == 128
    assert choose_group_size(32, [576, 1536]) == 32
    with pytest.raises(UserError, match=r"gptq.group_size = 128: does not divide.*Allowed: 64, 32, 16"):
        choose_group_size(128, [576, 1536])


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_model_that_does_not_say_its_sizes_is_one_message(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "hidden_size": 64}')
    with pytest.raises(UserError, match=rf"{kind} = 'gpt2': .*does not say 'intermediate_size'.*--set {kind}=\[\]"):
        layer_sizes(tmp_path, kind)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_model_that_no_group_size_divides_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    folder = model_folder(tmp_path / "model")
    sizes = {"hidden_size": 100, "intermediate_size": 256}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}))
    changes = {"base_model.source": str(folder), "gptq": [], kind: [{}]}
    with pytest.raises(UserError, match=rf"{kind}\.0\.group_size = 0: finds none of 128.*\[100, 256\].*: --set {kind}=\[\]"):
        resolve_run(load_config("smoke", changes))
    resolve_run(load_config("smoke", {"base_model.source": str(folder), "gptq": []}))


def test_help_explains_itself(cartwright: Cartwright) -> None:
    text = cartwright("run", "--help").stdout
    assert "--profile" in text and "--set" in text and "not run again" in text
    commands = cartwright("--help").stdout
    assert all(name in commands for name in ("run", "evaluate", "predict", "report", "doctor"))


@pytest.mark.slow
def test_commands_before_any_run_say_what_to_do(cartwright: Cartwright) -> None:
    for arguments in (["report"], ["predict", "hello"], ["evaluate"]):
        result = cartwright(*arguments)
        assert result.returncode == 2 and "Run `cartwright run` first" in result.stderr
