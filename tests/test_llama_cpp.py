"""The runtimes: what guessing tokens and sharing a prefix change (the number of passes) and what they do not (the answers)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.asking import Asked, Found, ask
from tasks.core.settings import installed_llama_cpp
from tasks.domain.spec import load_spec
from tasks.quantize_gguf import ConvertGgufConfig, convert_config, convert_gguf
from tasks.runtimes.guesses import Guesses
from tasks.runtimes.llama_cpp import FEW, LlamaCppRuntime

QUESTIONS = ["two olive oils please", "where is order 4711", "dvije boce maslinovog ulja, molim", "bye", "two olive oils please"]


class Counting(LlamaCppRuntime):
    passes = 0

    def _logits(self, entries: Any) -> Any:
        self.passes += 1
        return super()._logits(entries)


def answers(file: Path, guesses: int, parallel: int, max_tokens: int = 40) -> tuple[list[tuple[str, int]], int]:
    model = Counting(file, 1, guesses)
    found = list(model.generate([[{"role": "user", "content": text}] for text in QUESTIONS], max_tokens, parallel))
    model.close()
    return [(c.text, c.completion_tokens) for c in sorted(found, key=lambda c: c.index)], model.passes


@pytest.mark.parametrize("parallel", [1, 3])
def test_guesses_change_no_answer_and_save_passes(tiny_gguf: Path, parallel: int) -> None:
    plain, many = answers(tiny_gguf, 0, parallel)
    guessed, few = answers(tiny_gguf, 4, parallel)
    assert guessed == plain
    assert few < 0.8 * many


def test_many_conversations_are_answered_without_guesses_until_few_are_left(tiny_gguf: Path) -> None:
    plain, many = answers(tiny_gguf, 0, 5)
    guessed, few = answers(tiny_gguf, 4, 5)
    assert FEW < 5 and guessed == plain and few <= many


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_an_answer_is_never_longer_than_asked_for(tiny_gguf: Path, max_tokens: int) -> None:
    plain, _ = answers(tiny_gguf, 0, 2, max_tokens)
    guessed, _ = answers(tiny_gguf, 4, 2, max_tokens)
    assert guessed == plain and all(length <= max_tokens for _, length in guessed)


@pytest.mark.fast
def test_a_guess_is_what_followed_in_the_prompt_or_in_an_earlier_answer() -> None:
    guesses = Guesses(3)
    assert guesses.after([1, 2, 3, 4, 5, 6], [9, 2]) == [3, 4, 5]  # copied
    assert guesses.after([1, 2, 3, 4, 2, 8], [9, 2]) == [8]  # from the last place
    assert guesses.after([1, 2, 3], [7]) == []
    guesses.learn([7, 50, 51, 2, 60])
    assert guesses.after([1, 3], [7]) == [50, 51, 2]
    assert guesses.after([1, 2, 3], [51, 2]) == [60]  # two tokens seen before say more than one that is in the prompt
    assert guesses.after([51, 2, 3], [51, 2]) == [3]  # and two of the prompt more than both
    assert Guesses(0).after([1, 2, 3], [1]) == []


def test_answers_are_the_same_with_the_prefix_read_for_every_prompt_and_with_the_file_mapped(tiny_gguf: Path) -> None:
    asked = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": text}] for text in QUESTIONS]
    found = []
    for mmap, share in ((False, True), (False, False), (True, True)):
        model = LlamaCppRuntime(tiny_gguf, 1, mmap=mmap)
        model.share_prefix = share
        found.append(sorted((c.index, c.text) for c in model.generate(asked, 20, 3)))
        model.close()
    assert found[0] == found[1] == found[2]


def test_transformers_answers_the_same_whether_it_reads_the_prefix_once_or_for_every_prompt(tiny_gguf: Path) -> None:
    from tasks.runtimes.transformers import WORTH_SHARING, TransformersRuntime

    model = TransformersRuntime(tiny_gguf.parents[1] / "hf", 1, "float32")
    read: list[int] = []
    model.model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].numel()), with_kwargs=True)
    rules = {"role": "system", "content": "be brief " * WORTH_SHARING}
    asked = [[rules, {"role": "user", "content": text}] for text in QUESTIONS]

    def answered(share: bool, parallel: int) -> tuple[list[tuple[int, tuple[int, ...]]], int]:
        model.share_prefix = share
        model.forget()
        read.clear()
        return sorted((c.index, c.tokens) for c in model.generate(asked, 20, parallel)), sum(read)

    alone, most = answered(False, 1)
    for parallel in (1, 3, 5):
        together, fewer = answered(True, parallel)
        assert together == alone and fewer < most - 3 * WORTH_SHARING, parallel


def test_the_context_has_room_for_the_longest_that_are_answered_at_a_time_and_no_more(tiny_gguf: Path) -> None:
    conversations = [[{"role": "user", "content": text}] for text in (*QUESTIONS[:4], "please " * 400, "thanks")]
    model = LlamaCppRuntime(tiny_gguf, 1)
    together = {c.index: c.text for c in model.generate(conversations, 8, 4)}
    longest = max(len(model.encode(conversation)) for conversation in conversations)
    assert longest < model._shape[1] < 2 * longest  # and not four times that
    assert together == {index: next(model.generate([asked], 8, 1)).text for index, asked in enumerate(conversations)}
    model.close()


def test_a_grammar_that_cannot_be_read_is_an_error(tiny_gguf: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the grammar"):
        LlamaCppRuntime(tiny_gguf, 1, grammar="root ::= (")


def test_a_file_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "no-such-architecture")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    with pytest.raises(ValueError, match=r"cannot load .*model\.gguf: .*unknown model architecture: 'no-such-architecture'"):
        LlamaCppRuntime(tmp_path / "model.gguf", 1)
    (tmp_path / "model.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match="invalid magic"):
        LlamaCppRuntime(tmp_path / "model.gguf", 1)


@pytest.mark.parametrize("runtime", ["llama_cpp", "transformers"])
def test_a_text_that_is_too_long_gets_no_answer_and_the_others_theirs(tiny_gguf: Path, runtime: Any) -> None:
    spec = load_spec("ecommerce")
    path = tiny_gguf if runtime == "llama_cpp" else tiny_gguf.parents[1] / "hf"
    found = Found(path, runtime, spec, spec.path)

    def asked_of(*texts: str) -> Asked:
        with ask(found, list(texts)) as asked:
            return asked

    asked = asked_of(QUESTIONS[0], "please " * 30_000, QUESTIONS[1])
    assert asked.answers[1] == "" and len(asked.failed) == 1 and "text 2 has" in asked.failed[0] and "at most 2,048" in asked.failed[0]
    alone = [asked_of(text).answers[0] for text in QUESTIONS[:2]]
    assert all(alone) and [asked.answers[0], asked.answers[2]] == alone
    assert asked.latency_p50_s > 0
    assert asked_of("please " * 30_000).answers == [""]


@pytest.mark.fast
def test_another_converter_is_in_the_key_and_the_installed_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CARTWRIGHT_LLAMA_CPP", raising=False)
    assert convert_config().in_key() == {}  # as before there was such a field: what was made then is found
    monkeypatch.setenv("CARTWRIGHT_LLAMA_CPP", str(installed_llama_cpp()))
    assert convert_config().in_key() == {}
    monkeypatch.setenv("CARTWRIGHT_LLAMA_CPP", str(tmp_path))
    keys = {convert_gguf.key(ConvertGgufConfig(), {})}
    for file in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/constants.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
        keys.add(convert_gguf.key(convert_config(), {}))
    assert len(keys) == 4


def test_transformers_decodes_greedily_whatever_a_models_makers_set(tiny_gguf: Path, tmp_path: Path) -> None:
    from tasks.runtimes.transformers import TransformersRuntime

    folder = shutil.copytree(tiny_gguf.parents[1] / "hf", tmp_path / "hf")
    stored = json.loads((folder / "generation_config.json").read_text())
    made = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(stored | made))
    asked: Any = [[{"role": "user", "content": "one two one two one two"}]]
    plain, other = (TransformersRuntime(path, 1, "float32") for path in (tiny_gguf.parents[1] / "hf", folder))
    (before,), (after,) = (list(model.generate(asked, 16, 1)) for model in (plain, other))
    assert after.tokens == before.tokens and len(set(before.tokens)) < len(before.tokens)  # a penalty would have shown
