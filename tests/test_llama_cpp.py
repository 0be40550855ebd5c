"""The llama.cpp runtime: what guessing tokens changes (the number of passes) and what it does not (the answers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.quantize_gguf import MODEL_FILE, ConvertGgufConfig, convert_gguf
from tasks.runtimes.llama_cpp import FEW, Guesses, LlamaCppRuntime

QUESTIONS = ["two olive oils please", "where is order 4711", "dvije boce maslinovog ulja, molim", "bye", "two olive oils please"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name in ("hf", "gguf"):
        (folder / name).mkdir()
    base_model.function(BaseModelConfig(source=TINY), {}, folder / "hf")
    convert_gguf.function(ConvertGgufConfig(), {"model": folder / "hf"}, folder / "gguf")
    return folder / "gguf" / MODEL_FILE


class Counting(LlamaCppRuntime):
    passes = 0

    def _evaluate(self, entries: Any) -> Any:
        self.passes += 1
        return super()._evaluate(entries)


def answers(file: Path, guesses: int, parallel: int, max_tokens: int = 40) -> tuple[list[tuple[str, int]], int]:
    model = Counting(file, 1, guesses)
    found = list(model.generate([[{"role": "user", "content": text}] for text in QUESTIONS], max_tokens, parallel))
    model.close()
    return [(c.text, c.completion_tokens) for c in sorted(found, key=lambda c: c.index)], model.passes


@pytest.mark.parametrize("parallel", [1, 3])
def test_guesses_change_no_answer_and_save_passes(file: Path, parallel: int) -> None:
    plain, many = answers(file, 0, parallel)
    guessed, few = answers(file, 4, parallel)
    assert guessed == plain
    assert few < 0.8 * many


def test_many_conversations_are_answered_without_guesses_until_few_are_left(file: Path) -> None:
    plain, many = answers(file, 0, 5)
    guessed, few = answers(file, 4, 5)
    assert FEW < 5 and guessed == plain and few <= many


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_an_answer_is_never_longer_than_asked_for(file: Path, max_tokens: int) -> None:
    plain, _ = answers(file, 0, 2, max_tokens)
    guessed, _ = answers(file, 4, 2, max_tokens)
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
