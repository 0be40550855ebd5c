"""Drift: recent texts against what the champion was trained on. A real tiny champion in a real registry; texts of the same generator."""

from __future__ import annotations

import functools
import gzip
import json
import lzma
import random
import sqlite3
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.champion import champion_with_dataset
from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.core.settings import load_settings
from tasks.core.stage import run as run_stage
from tasks.domain.errors import UserError
from tasks.drift import Answer, DriftConfig, DriftOptions, answer_columns, confidence, drift, held_out, read_result, samples
from tasks.drift_columns import Column, compare, visible_from
from tasks.overrides import with_overrides
from tasks.recent_texts import PART, read_texts
from tasks.synthesize import SynthesizeConfig, make_generator, synthesize

Cartwright = Callable[..., subprocess.CompletedProcess[str]]
NAME = "shop-intent"
DATA = SynthesizeConfig(train_rows=480, validation_rows=72, test_rows=72, hard_rows=12, patterns_per_intent=12, noise_rate=0.1)


@dataclass(frozen=True)
class Shop:
    """A home whose registry has a tiny champion, and whose store its data set."""

    home: Path
    dataset: Manifest
    folder: Path
    model: Path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Iterator[Shop]:
    from tasks.core.registry import Registry
    from tasks.core.tracking import open_parent

    home = tmp_path_factory.mktemp("drift") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARTWRIGHT_HOME", str(home))
        settings = load_settings()
        store = Store(settings.store_uri, home)
        dataset, _ = run_stage(synthesize, DATA, {}, store, home / "logs")
        folder = store.path(dataset.kind, dataset.key)
        tracker, registry = open_parent(settings, "ecommerce/tiny", "key", "a run", {}), Registry(settings)
        variant = tracker.child("gguf-F16", "variant", "variant")
        files = {"model": tiny_gguf, "spec": folder / "spec.yaml"}
        logged = tracker.log_model(variant, "gguf-F16", "d1", files, "llama_cpp")
        tags = {"cartwright.kind": "quantize_gguf", "cartwright.key": "k", "cartwright.variant": "gguf-F16"}
        version, known = registry.register(NAME, logged, "d1", tags, "a model")
        assert not known and registry.register(NAME, logged, "d1", {**tags, "cartwright.dataset_key": dataset.key}, "a model") == (
            version,
            True,
        )
        assert registry.promote(NAME, version, lambda: "") == ""
        tracker.end("FINISHED")
    yield Shop(home, dataset, folder, tiny_gguf)


@functools.cache
def rows_like_training(rows: int) -> list[dict[str, Any]]:
    """Rows of the generator that made the data set, which are not in it."""
    generator = make_generator(DATA)
    return [generator.row("train", 10_000 + turn) for turn in range(rows)]


def texts_like_training(rows: int) -> list[str]:
    return [row["text"] for row in rows_like_training(900)[:rows]]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def check(shop: Shop, texts: Path, **options: Any) -> dict[str, Any]:
    """The stage alone; what it wrote."""
    out = texts.with_suffix(".out")
    out.mkdir()
    filled = {"texts": str(texts), "texts_sha256": read_texts(str(texts), 0).sha256, "model": str(shop.model), "model_digest": "d1"}
    metrics = drift.function(DriftConfig(**filled, **{"max_asked": 20, "max_tokens": 4, **options}), {"dataset": shop.folder}, out)
    found = read_result(out)
    assert metrics["verdict"] == found["verdict"] and (out / "drift.html").is_file() and (out / "drift.md").is_file()
    return found | {"out": out}


def drifted(found: dict[str, Any]) -> set[str]:
    return {column["name"] for column in found["columns"] if column["drift"]}


# Columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_difference_must_be_large_and_no_chance() -> None:
    draw = np.random.default_rng(1)

    def numbers(size: int, shift: float, allowed: float = 0.2, worse: Any = None) -> dict[str, Any]:
        return compare(Column("x", "X", "number", draw.normal(0, 1, size), draw.normal(shift, 1, size), allowed, worse), 0.001, 7)

    assert numbers(300, 1)["drift"] and numbers(300, 1, worse="higher")["drift"] and numbers(300, -1, worse="lower")["drift"]
    assert not numbers(300, -1, worse="higher")["drift"] and not numbers(300, 1, worse="lower")["drift"]
    small = numbers(20_000, 0.2)
    assert small["p"] < 1e-6 and not small["drift"] and small["distance"] < 0.2  # no chance, but nobody minds
    few = numbers(20, 0.3, allowed=0.05)
    assert few["distance"] > 0.05 and not few["drift"]  # looks large, but may be chance
    assert numbers(19, 5)["drift"] is None and "19 recent texts" in numbers(19, 5)["words"]
    limit = visible_from(300, 300, 0.001)
    assert 0.15 < limit < 0.17
    assert numbers(300, 0.0)["distance"] < limit < numbers(300, 1)["distance"]


@pytest.mark.fast
def test_labels_and_shares_are_compared_and_put_in_words() -> None:
    before, now = ["en"] * 80 + ["de"] * 20, ["en"] * 30 + ["de"] * 20 + ["other"] * 50
    found = compare(Column("language", "Languages", "category", before, now, 0.15), 0.001, 7)
    assert found["drift"] and found["distance"] == pytest.approx(0.5) and found["p"] == pytest.approx(1e-4)
    assert found["words"].startswith("en 30% against 80%, other 50% against 0%")
    same = compare(Column("language", "Languages", "category", before, before, 0.15), 0.001, 7)
    assert not same["drift"] and same["distance"] == 0 and same["p"] == 1
    one = compare(Column("language", "Languages", "category", ["en"] * 30, ["en"] * 40, 0.15), 0.001, 7)
    assert (one["drift"], one["distance"]) == (False, 0)
    worse = Column("unparseable", "U", "share", [False] * 95 + [True] * 5, [False] * 70 + [True] * 30, 0.05, "higher")
    found = compare(worse, 0.001, 7)
    assert found["drift"] and found["distance"] == pytest.approx(0.25) and found["words"] == "30% against 5% in training"
    better = compare(Column("unparseable", "U", "share", worse.recent, worse.reference, 0.05, "higher"), 0.001, 7)
    assert not better["drift"] and better["distance"] == 0


@pytest.mark.fast
def test_what_the_champion_answers_drifts_with_it() -> None:
    draw = np.random.default_rng(2)

    def side(size: int, failed: float, sure: float, intents: list[str]) -> list[Answer]:
        chosen = [None if draw.random() < failed else intents[i % len(intents)] for i in range(size)]
        return [Answer(f"t{i}", intent, "", float(draw.beta(20 * sure, 20 * (1 - sure)))) for i, intent in enumerate(chosen)]

    config = DriftConfig(texts="", texts_sha256="", model="", model_digest="")
    usual = ["view_cart", "checkout", "track_order"]

    def found(recent: list[Answer]) -> set[str]:
        return {c.name for c in answer_columns(config, side(150, 0.02, 0.9, usual), recent) if compare(c, 0.001, 7)["drift"]}

    assert found(side(150, 0.02, 0.9, usual)) == set()
    assert found(side(150, 0.5, 0.6, usual)) == {"unparseable", "confidence"}
    assert found(side(150, 0.02, 0.9, ["view_cart"])) == {"intent"}
    answers = [Answer("sure", "checkout", "{}", 0.9), Answer("none", None, "?", 0.8), Answer("unsure", "checkout", "{}", 0.2)]
    assert [s["text"] for s in samples(answers * 2, 2)] == ["none", "unsure"] and samples(answers, 0) == []


@pytest.mark.fast
def test_confidence_is_the_geometric_mean_of_the_tokens_probabilities() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    assert confidence(np.log(probabilities).astype(np.float32) + 100, [0, 2]) == pytest.approx((0.5 * 0.125) ** 0.5, rel=1e-4)


def with_dictionary(data: bytes, size: int) -> bytes:
    """An .xz whose header asks for another dictionary: 37 is one of 1.5 GiB (the .xz file format, 5.3.1)."""
    packed = bytearray(lzma.compress(data, check=lzma.CHECK_NONE, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 4096}]))
    end = 12 + 4 * packed[12]  # of the block's header, behind that of the stream
    packed[16] = size
    packed[end : end + 4] = zlib.crc32(packed[12:end]).to_bytes(4, "little")
    return bytes(packed)


# Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_lines_that_cannot_be_used_are_counted_with_their_reason_and_without_what_they_say(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "two milk", "customer": 5}',
        b"",
        b"secret words",
        b'{"txt": "secret"}',
        b'{"text": "  "}',
        b'{"text": "\\ud83d secret"}',
        b'{"text": "caf\xe9"}',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 1_000_000 + b'"}',
        b'["text"]',
        b'{"text": "a line\\u2028of two"}',
    ]
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = read_texts(str(path), 10)
    assert (found.usable, found.texts) == (2, ["two milk", "a line\u2028of two"])
    assert [line.line for line in found.bad] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert found.problems() == {
        "has no `text`": 2,
        "is not JSON": 1,
        "has an empty `text`": 1,
        "has half a character": 1,
        "is not UTF-8": 1,
        "is nested too deeply": 1,
        "is longer than 1000000 bytes": 1,
    }
    assert "secret" not in repr(found.bad)


@pytest.mark.fast
def test_texts_are_read_from_several_files_packed_ones_and_other_storage(tmp_path: Path) -> None:
    import fsspec

    write(tmp_path / "a.jsonl", ["one", "two"])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "three"}\nbroken\n')
    found = read_texts(f"{tmp_path}/*.jsonl*", 10)
    assert (found.files, found.usable, sorted(found.texts)) == (2, 3, ["one", "three", "two"])
    (bad,) = found.bad
    assert bad.file.endswith("b.jsonl.gz") and bad.line == 2
    parts = [lzma.compress(line) for line in (b'{"text": "four"}\n', b'{"text": "five"}\n')]
    (tmp_path / "c.jsonl.xz").write_bytes(b"\0\0\0\0".join(parts))
    assert read_texts(str(tmp_path / "c.jsonl.xz"), 10).texts == ["four", "five"]
    (tmp_path / "d.jsonl.xz").write_bytes(parts[0].ljust(PART, b"\0") + parts[1])  # zeros up to the end of what is read at a time
    assert read_texts(str(tmp_path / "d.jsonl.xz"), 10).texts == ["four", "five"]
    with fsspec.open("memory://chat/today.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n{"text": "two"}\n')
    assert read_texts("memory://chat/*.jsonl", 10).texts == read_texts(str(tmp_path / "a.jsonl"), 10).texts == ["one", "two"]
    many = read_texts(str(write(tmp_path / "many.jsonl", [str(n) for n in range(1000)])), 100, seed=3)
    assert many.usable == 1000 and len(set(many.texts)) == 100 and 350 < np.mean([int(text) for text in many.texts]) < 650


@pytest.mark.fast
@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "names no file"),
        ("{tmp}/nowhere.jsonl", "does not exist"),
        ("{tmp}/*.json", "matches no file"),
        ("{tmp}", "is a folder. Name the files in it: {tmp}/*.jsonl"),
        ("{tmp}/empty.jsonl", "has no usable line among 0 (it is empty). Give JSONL in UTF-8"),
        ("{tmp}/table.csv", "has no usable line among 2 (line 1 is not JSON"),
        ("{tmp}/broken.gz", "cannot be read (Not a gzipped file"),
        ("{tmp}/torn.xz", "cannot be read (the file ends before its end)"),
        ("{tmp}/huge.xz", "has a file that needs more than 100,000,000 bytes of memory to be unpacked. Pack it as `xz -9` does"),
        ("nonsense://x/y", "Protocol not known"),
        ("ftp://me:hunter2@host/x.jsonl", "'ftp://***@host/x.jsonl': holds a user, a password or a query"),
        ("simplecache::https://me:hunter2@host/x.jsonl", "'simplecache::https://***@host/x.jsonl': holds a user, a password or a query"),
        ("https://TOKEN@host/x.jsonl", "'https://***@host/x.jsonl': holds a user"),
        ("https://host/x.jsonl?X-Signature=abc", "'https://host/x.jsonl': holds a user, a password or a query"),
    ],
)
def test_texts_that_cannot_be_read_are_one_message(tmp_path: Path, uri: str, message: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "table.csv").write_text("text,time\nmy cart,1\n")
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    (tmp_path / "torn.xz").write_bytes(lzma.compress(b'{"text": "one"}')[:-20])
    (tmp_path / "huge.xz").write_bytes(with_dictionary(b'{"text": "one"}', 37))
    with pytest.raises(UserError) as caught:
        read_texts(uri.replace("{tmp}", str(tmp_path)), 10)
    assert message.replace("{tmp}", str(tmp_path)) in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allowed.langauge": 0.3}, "allowed.langauge = 0.3: is an unknown field. Allowed: language, characters"),
        ({"max_askd": 3}, "max_askd = 3: is an unknown field. Allowed: allowed, alpha"),
        ({"allowed.language": 3}, "allowed.language = 3: Input should be less than or equal to 1"),
        ({"min_texts": 1}, "min_texts = 1: Input should be greater than or equal to 20"),
    ],
)
def test_an_option_that_is_not_allowed_is_one_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        with_overrides(DriftOptions, {}, change)
    assert message in str(caught.value)


# The stage -------------------------------------------------------------------------------------------------------


def test_texts_of_the_same_generator_have_not_drifted(shop: Shop, tmp_path: Path) -> None:
    found = check(shop, write(tmp_path / "like.jsonl", texts_like_training(200)))
    assert (found["verdict"], found["drift"], drifted(found)) == ("none", False, set())
    assert found["texts"]["usable"] == found["texts"]["compared"] == 200 and found["texts"]["asked"] == 20
    columns = {column["name"]: column for column in found["columns"]}
    assert set(columns) == {"language", "characters", "words", "unknown_words", "unparseable", "confidence", "intent"}
    assert columns["confidence"]["distance"] is not None and 0 < columns["confidence"]["recent"]["mean"] < 1
    rows = shop.dataset.metrics["counts"]["train"]
    assert found["visible_from"] == pytest.approx(visible_from(rows, 200, 0.01 / 6))  # six are compared, and share what may go wrong
    assert columns["intent"]["drift"] is None and any("Intents" in reason for reason in found["reasons"])  # it answers nonsense
    assert all(text not in json.dumps(found["columns"]) for text in texts_like_training(200) if len(text) > 20)
    assert found["samples"] == [] and "drift_confidence" not in (found["out"] / "drift.html").read_text()
    assert "<svg" in (found["out"] / "drift.html").read_text()


def test_the_reasons_name_what_has_changed(shop: Shop, tmp_path: Path) -> None:
    usual = texts_like_training(600)
    spoken = [row["text"] for row in rows_like_training(900) if row["language"] == "hr"]
    croatian = check(shop, write(tmp_path / "hr.jsonl", spoken))
    assert croatian["verdict"] == "found" and "language" in drifted(croatian) and not drifted(croatian) & {"words", "unknown_words"}
    assert any(reason.startswith("Languages: hr 9") for reason in croatian["reasons"])
    long = check(shop, write(tmp_path / "long.jsonl", [" ".join(usual[at : at + 4]) for at in range(0, 600, 4)]))
    assert {"characters", "words"} <= drifted(long) and "unknown_words" not in drifted(long)
    draw = random.Random(5)
    letters = ["".join(draw.choices("bcdfghjklmnpqrstvwxz", k=7)) for _ in range(2000)]
    gibberish = check(shop, write(tmp_path / "xx.jsonl", [" ".join(draw.choices(letters, k=6)) for _ in range(100)]), samples=2)
    assert {"language", "unknown_words"} <= drifted(gibberish)
    assert any(reason.startswith("Unknown words: mean 100% against ") for reason in gibberish["reasons"])
    assert len(gibberish["samples"]) == 2 and gibberish["samples"][0]["text"] in (gibberish["out"] / "drift.html").read_text()
    asked_for = check(shop, write(tmp_path / "hr2.jsonl", spoken), allowed={"language": 1})
    assert asked_for["verdict"] == "none"


def test_new_words_are_named_when_several_texts_have_them(shop: Shop, tmp_path: Path) -> None:
    usual = texts_like_training(60)
    five, four = [f"{text} vjetrenjača" for text in usual[:5]], [f"{text} Mirjanić" for text in usual[5:9]]
    pasted = [f"{usual[9]} Novaković"] * 9  # of one text
    found = check(shop, write(tmp_path / "new.jsonl", [*five, *four, *pasted, *usual[10:]]))
    assert {"word": "vjetrenjača", "texts": 5} in found["new_words"]
    written = (found["out"] / "drift.json").read_text().casefold()
    assert "vjetrenjača" in written and "mirjanić" not in written and "novaković" not in written


def test_too_few_texts_are_inconclusive_and_bad_lines_are_kept(shop: Shop, tmp_path: Path) -> None:
    path = write(tmp_path / "few.jsonl", texts_like_training(30))
    path.write_text(path.read_text() + "nonsense\n{}\n", encoding="utf-8")
    found = check(shop, path)
    assert (found["verdict"], found["drift"], found["columns"]) == ("inconclusive", None, [])
    assert found["reasons"] == ["30 usable texts are too few to compare, at least 50 are needed"]
    assert found["texts"]["bad"] == 2 and found["problems"] == {"is not JSON": 1, "has no `text`": 1}
    kept = [json.loads(line) for line in (found["out"] / "bad_lines.jsonl").read_text().splitlines()]
    assert [line["line"] for line in kept] == [31, 32]


def test_a_text_too_long_for_the_champion_is_compared_and_not_asked(shop: Shop, tmp_path: Path) -> None:
    found = check(shop, write(tmp_path / "novel.jsonl", [*texts_like_training(49), "my cart " * 2000]), max_asked=50)
    assert (found["texts"]["compared"], found["texts"]["asked"], found["texts"]["too_long"]) == (50, 49, 1)


def test_texts_that_change_while_they_are_read_are_refused(shop: Shop, tmp_path: Path) -> None:
    path = write(tmp_path / "now.jsonl", texts_like_training(20))
    filled = {"texts": str(path), "texts_sha256": "of before", "model": str(shop.model), "model_digest": "d1"}
    with pytest.raises(UserError, match="was written to while it was read"):
        drift.function(DriftConfig(**filled), {"dataset": shop.folder}, tmp_path)


def test_reference_answers_are_to_rows_that_were_not_trained_on_with_the_intents_of_training(shop: Shop) -> None:
    from collections import Counter

    texts = held_out(shop.folder, 1000, 7)
    rows = {split: [json.loads(line) for line in (shop.folder / f"{split}.jsonl").open()] for split in ("train", "validation", "test")}
    assert not {row["text"] for row in rows["train"]} & set(texts)
    intent = {row["text"]: row["gold"]["intent"] for split in ("validation", "test") for row in rows[split]}
    picked, trained = Counter(intent[text] for text in texts), Counter(row["gold"]["intent"] for row in rows["train"])
    assert all(abs(picked[name] / len(texts) - count / trained.total()) < 0.03 for name, count in trained.items())
    assert 30 <= len(held_out(shop.folder, 30, 7)) <= 30 + len(trained)


# The flow --------------------------------------------------------------------------------------------------------


def query(database: Path, text: str, *values: str) -> list[Any]:
    with sqlite3.connect(database) as opened:
        return opened.execute(text, values).fetchall()


def test_a_check_is_published_everywhere_and_promotes_nothing(shop: Shop, cartwright: Cartwright, tmp_path: Path) -> None:
    aliases = query(shop.home / "mlflow.db", "select * from registered_model_aliases")
    path = write(tmp_path / "hr.jsonl", [f"gdje je moja narudžba broj {n}" for n in range(60)])
    path.write_text(path.read_text() + "nonsense\n", encoding="utf-8")
    done = cartwright(
        "drift", "--texts", str(path), "--set", "max_asked=20", "--set", "max_tokens=4", "--exit-code", CARTWRIGHT_HOME=str(shop.home)
    )
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Drift: recent texts are not" in done.stdout and "Languages: " in done.stdout and "1 is not JSON" in done.stdout
    folder = Path(next(line for line in done.stdout.splitlines() if line.startswith("Report: ")).removeprefix("Report: ")).parent
    found = read_result(folder)
    assert found["verdict"] == "found" and (folder / "bad_lines.jsonl").is_file() and not (folder / "manifest.json").exists()

    runs = """select runs.run_uuid, runs.status, experiments.name from runs join experiments using (experiment_id) join tags on tags.run_uuid = runs.run_uuid
              where tags.key = 'cartwright.kind' and tags.value = 'drift'"""
    ((run_id, status, experiment),) = query(shop.home / "mlflow.db", runs)
    assert (status, experiment) == ("FINISHED", "ecommerce/tiny")
    metrics = dict(query(shop.home / "mlflow.db", "select key, value from latest_metrics where run_uuid = ?", run_id))
    assert metrics["columns.language.drifted"] == 1 and metrics["texts.bad"] == 1 and metrics["drifted_columns"] >= 1
    assert dict(query(shop.home / "mlflow.db", "select key, value from tags where run_uuid = ?", run_id))["cartwright.drift"] == "found"
    assert list((shop.home / "mlflow-artifacts").rglob("drift/drift.html"))

    shown = dict(query(shop.home / "prefect" / "prefect.db", "select key, data from artifact"))
    assert "Drift: recent texts" in json.loads(shown["drift"]) and "Languages" in shown["drift-columns"]
    events = query(
        shop.home / "prefect" / "prefect.db", "select event, resource_id, payload from events where event like 'cartwright.drift.%'"
    )
    ((event, resource, payload),) = events
    assert (event, resource) == ("cartwright.drift.found", f"cartwright.model.{NAME}")
    assert json.loads(payload)["reasons"] == found["reasons"] and json.loads(payload)["texts"]["bad"] == 1
    assert query(shop.home / "mlflow.db", "select * from registered_model_aliases") == aliases


@pytest.mark.fast
@pytest.mark.slow
def test_what_cannot_be_checked_is_one_message_and_starts_nothing(cartwright: Cartwright, home: Path, tmp_path: Path) -> None:
    texts = str(write(tmp_path / "some.jsonl", ["my cart"]))
    assert cartwright("drift", CARTWRIGHT_TEXTS="/no.jsonl").stderr.startswith("Error: texts = '/no.jsonl': does not exist")
    for arguments, message in (
        (("--texts", texts), f"model = 'shop-intent': has no champion in sqlite:///{home}/mlflow.db. Run `cartwright run` first"),
        (("--texts", str(tmp_path / "no.jsonl")), f"texts = '{tmp_path}/no.jsonl': does not exist"),
        ((), f"texts = '{home}/texts/*.jsonl': matches no file"),
        (("--texts", texts, "--set", "samplez=1"), "samplez = 1: is an unknown field. Allowed: allowed, alpha"),
    ):
        done = cartwright("drift", *arguments)
        assert done.returncode == 2 and done.stderr.startswith(f"Error: {message}") and "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not home.exists()


def test_a_champion_whose_data_set_is_gone_or_unknown_is_one_message(shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CARTWRIGHT_HOME", str(shop.home))
    settings = load_settings()
    champion = champion_with_dataset(settings, NAME)
    assert (champion.dataset, champion.experiment) == (shop.dataset, "ecommerce/tiny")
    with pytest.raises(UserError, match="'sofas': has no champion"):
        champion_with_dataset(settings, "sofas")
    away = shop.folder.rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match=r"data set \w+ of the champion, version 1, is no longer in .*Run `cartwright run`"):
            champion_with_dataset(settings, NAME)
    finally:
        away.rename(shop.folder)

    from tasks.core.tracking import open_parent

    client = open_parent(settings, "ecommerce/tiny", "other", "x", {}).client
    client.delete_model_version_tag(NAME, "1", "cartwright.dataset_key")
    try:
        with pytest.raises(UserError, match="does not say what it was trained on"):
            champion_with_dataset(settings, NAME)
    finally:
        client.set_model_version_tag(NAME, "1", "cartwright.dataset_key", shop.dataset.key)
