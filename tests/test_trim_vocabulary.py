"""A base model without the tokens that nobody writes: same answers, same tokens, in transformers and in llama.cpp."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.session import Run
from tasks.base_model import TINY, BaseModelConfig, base_model
from tasks.config import load_config, resolve
from tasks.core.stage import Stage
from tasks.domain.errors import UserError
from tasks.quantize_gguf import MODEL_FILE, ConvertGgufConfig, convert_gguf
from tasks.synthesize import SynthesizeConfig, read_rows, synthesize
from tasks.tokenization import encode, prompt_text
from tasks.trim_vocabulary import (
    VocabularyConfig,
    check_trimmable,
    choose_tokens,
    trim_vocabulary,
    trimmed_tokenizer,
)

TOKENS = 2000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny model, a small data set, the model with 2,000 tokens, and what the stage says of it."""
    folder = tmp_path_factory.mktemp("trim")
    found: dict[str, Any] = {name: folder / name for name in ("base_model", "dataset", "trimmed")}
    for path in found.values():
        path.mkdir()
    base_model.function(BaseModelConfig(source=TINY), {}, found["base_model"])
    data = SynthesizeConfig(languages=("en", "hr"), train_rows=200, validation_rows=24, test_rows=24, hard_rows=24)
    synthesize.function(data, {}, found["dataset"])
    found["told"] = trim_vocabulary.function(VocabularyConfig(tokens=TOKENS), found, found["trimmed"])
    return found


def tokenizers(made: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(made[name]) for name in ("base_model", "trimmed"))
    return before, after


def test_texts_have_the_same_tokens_and_the_model_the_same_logits(made: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    before, after = tokenizers(made)
    assert len(after) == TOKENS and made["told"]["tokens_before"] == len(before) > TOKENS
    assert made["told"]["tokens_in_use_left_out"] == made["told"]["share_of_text_left_out"] == 0
    kept = [before.convert_tokens_to_ids(token) for token in after.convert_ids_to_tokens(list(range(TOKENS)))]
    assert kept == sorted(set(kept))  # in the old order, each once
    models = [AutoModelForCausalLM.from_pretrained(made[name], dtype=torch.float32).eval() for name in ("base_model", "trimmed")]
    for row in read_rows(made["dataset"] / "train.jsonl")[:20]:
        text = f"{before.bos_token} {row['text']}{before.eos_token}"
        old, new = encode(before, text), encode(after, text)
        assert [kept[token] for token in new] == old
        with torch.inference_mode():
            logits, fewer = (model(torch.tensor([ids])).logits[0] for model, ids in zip(models, (old, new), strict=True))
        torch.testing.assert_close(fewer, logits[:, kept])


def test_ids_stand_for_the_same_tokens_in_every_file_of_any_model(made: dict[str, Any], tmp_path: Path) -> None:
    """One with its special tokens behind the others, two ends of an answer, an output head of its own, and more rows than tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer, learnt.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [row["text"] for row in read_rows(made["dataset"] / "train.jsonl")]
    learnt.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    first = learnt.get_vocab_size()
    learnt.add_special_tokens(["<s>", "</s>", "<end>"])
    learnt.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", first)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt, bos_token="<s>", eos_token="</s>", pad_token="<end>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "before")
    ends = [first + 1, first + 2]
    shape = LlamaConfig(
        vocab_size=first + 40, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        tie_word_embeddings=False, bos_token_id=first, eos_token_id=ends, pad_token_id=first + 2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.generation_config = GenerationConfig(bos_token_id=first, eos_token_id=ends, pad_token_id=first + 2, suppress_tokens=[first + 1])
    model.save_pretrained(tmp_path / "before")
    (tmp_path / "after").mkdir()
    trim_vocabulary.function(VocabularyConfig(tokens=600), made | {"base_model": tmp_path / "before"}, tmp_path / "after")

    after = AutoTokenizer.from_pretrained(tmp_path / "after")
    assert after("x")["input_ids"] == [after.bos_token_id, after.convert_tokens_to_ids("x")] and after.bos_token_id == 597
    assert after.convert_ids_to_tokens([597, 598, 599]) == ["<s>", "</s>", "<end>"] and len(after) == 600
    for name in ("config.json", "generation_config.json"):
        told = json.loads((tmp_path / "after" / name).read_text())
        assert (told["bos_token_id"], told["eos_token_id"], told["pad_token_id"]) == (
            597,
            [598, 599],
            599,
        ) and "suppress_tokens" not in told
    kept = [tokenizer.convert_tokens_to_ids(token) for token in after.convert_ids_to_tokens(list(range(600)))]
    trimmed = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    assert trimmed.lm_head.weight.shape == (600, 32) and trimmed.config.vocab_size == 600
    with torch.inference_mode():
        logits, fewer = model(torch.tensor([kept[::7]])).logits, trimmed(torch.tensor([list(range(0, 600, 7))])).logits
    torch.testing.assert_close(fewer, logits[..., kept], atol=1e-3, rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_can_still_be_written(made: dict[str, Any], text: str) -> None:
    before, after = tokenizers(made)
    assert after.decode(encode(after, text)) == before.decode(encode(before, text))


def test_llama_cpp_has_the_same_tokens(made: dict[str, Any], tmp_path: Path) -> None:
    import llama_cpp.llama_cpp as api

    from tasks import runtimes

    _, after = tokenizers(made)
    convert_gguf.function(ConvertGgufConfig(), {"model": made["trimmed"], "untrimmed": made["base_model"]}, tmp_path)
    runtime: Any = runtimes.load("llama_cpp", tmp_path / MODEL_FILE, 1)
    texts = [
        "Dodaj četiri jabuke u košaricu!",
        "ich möchte 2 iPhone 15 🙂",
        *(row["text"] for row in read_rows(made["dataset"] / "test.jsonl")),
    ]
    for text in texts:
        conversation: Any = [{"role": "user", "content": text}]
        assert runtime.encode(conversation) == encode(after, prompt_text(after, conversation))
        text_ = text.encode()
        room = (api.llama_token * (len(text_) + 8))()
        said = [
            list(room[: api.llama_tokenize(runtime._vocab, text_, len(text_), room, len(room), first, False)]) for first in (True, False)
        ]
        assert said == [encode(after, text)] * 2  # a server that adds a first token where the file wants one adds none


def test_the_converter_knows_no_trimmed_tokenizer_by_itself(made: dict[str, Any], tmp_path: Path) -> None:
    """Why `recognize_by` is needed."""
    with pytest.raises(NotImplementedError, match="pre-tokenizer"):
        convert_gguf.function(ConvertGgufConfig(), {"model": made["trimmed"]}, tmp_path)


def test_what_is_too_rare_to_be_kept_is_written_in_pieces(made: dict[str, Any], tmp_path: Path) -> None:
    told = trim_vocabulary.function(VocabularyConfig(tokens=600), made, tmp_path)
    assert told["tokens"] == 600 and told["tokens_in_use_left_out"] > 0 and 0 < told["share_of_text_left_out"] < 0.7


def described() -> dict[str, Any]:
    """A tokenizer of three bytes, a special token behind them, and merges."""
    merges = ["a b", "ab c", "b c", "a bc", "abc abc"]
    tokens = ["a", "b", "c", "ab", "abc", "bc", "abcabc", "<s>"]
    return {
        "added_tokens": [{"id": 7, "content": "<s>"}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]},
        "decoder": {"type": "ByteLevel"},
        "post_processor": {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}},
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges},
    }


def test_a_token_comes_with_all_it_is_merged_from() -> None:
    assert choose_tokens(described(), {4: 9}, 6) == [0, 1, 2, 3, 4, 7]  # abc with ab; not with bc, which it is never merged from
    assert choose_tokens(described(), {4: 9}, 5) == [0, 1, 2, 3, 7]  # has no room for both: what was learnt first
    kept = choose_tokens(described(), {5: 1}, 5)
    assert kept == [0, 1, 2, 5, 7]
    made = trimmed_tokenizer(described(), {old: new for new, old in enumerate(kept)})
    assert made["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "bc": 3, "<s>": 4} and made["model"]["merges"] == [["b", "c"]]
    assert made["added_tokens"] == [{"id": 4, "content": "<s>"}] and made["post_processor"]["special_tokens"]["<s>"]["ids"] == [4]


def test_a_word_that_is_a_token_without_merges_needs_none_where_words_are_looked_up_first() -> None:
    """As in Llama 3's tokenizer (`ignore_merges`)."""
    looked_up = described()
    looked_up["model"] |= {
        "ignore_merges": True,
        "vocab": {**looked_up["model"]["vocab"], "cab": 8},
        "merges": [*looked_up["model"]["merges"], "cb a"],
    }
    looked_up["model"]["merges"].append("ca b")  # made of a token that no merge makes
    assert 8 in choose_tokens(looked_up, {8: 5}, 6)
    assert 8 not in choose_tokens(looked_up | {"model": looked_up["model"] | {"ignore_merges": False}}, {8: 5}, 6)


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({}, 8, "leaves nothing out"),
        ({}, 3, "does not hold the tokenizer's bytes"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, 5, r"its tokenizer \(WordPiece\) is no byte-level BPE"),
        ({"pre_tokenizer": None, "decoder": None}, 5, "no byte-level BPE"),
        ({"post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 2]}}, 5, "RobertaProcessing"),
        ({"model": "x"}, 5, "not of the form that is known"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, 5, "not of the form that is known"),
        ({"added_tokens": [{}]}, 5, "not of the form that is known"),
        ({"post_processor": {}, "decoder": {"x": 1}}, 5, "not of the form that is known"),
    ],
)
def test_a_tokenizer_that_cannot_be_trimmed_is_refused(change: dict[str, Any], size: int, message: str) -> None:
    check_trimmable(described(), 6)
    with pytest.raises(UserError, match=message):
        check_trimmable(described() | change, size)


def test_a_model_with_another_place_for_each_token_is_refused(made: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM  # its output head has a bias

    AutoTokenizer.from_pretrained(made["base_model"]).save_pretrained(tmp_path / "phi")
    shape = PhiConfig(vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    PhiForCausalLM(shape).save_pretrained(tmp_path / "phi")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"its weight lm_head\.bias has a place for each token"):
        trim_vocabulary.function(VocabularyConfig(tokens=TOKENS), made | {"base_model": tmp_path / "phi"}, tmp_path / "out")


def test_a_run_is_refused_before_any_work(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(made["base_model"], tmp_path / "model")
    wanted = {"base_model.source": str(folder), "vocabulary.tokens": 1000}
    assert resolve(load_config("smoke", wanted)).vocabulary.tokens == 1000
    with pytest.raises(UserError, match="leaves nothing out"):
        resolve(load_config("smoke", wanted | {"vocabulary.tokens": 900_000}))
    with pytest.raises(UserError, match=r"vocabulary\.tokens"):
        load_config("smoke", {"vocabulary.tokens": 10})
    told = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(told | {"model": told["model"] | {"byte_fallback": True}}))
    with pytest.raises(UserError, match="no byte-level BPE"):
        resolve(load_config("smoke", wanted))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        resolve(load_config("smoke", wanted))
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(UserError, match=r"it has no tokenizer\.json"):
        resolve(load_config("smoke", wanted))
    older = tmp_path / "llama.cpp"
    older.mkdir()
    (older / "convert_hf_to_gguf.py").touch()
    monkeypatch.setenv("CARTWRIGHT_LLAMA_CPP", str(older))
    with pytest.raises(UserError, match=r"Take a newer one, or set vocabulary\.tokens=null"):
        resolve(load_config("smoke", {"vocabulary.tokens": 1000}))
    monkeypatch.delenv("CARTWRIGHT_LLAMA_CPP")
    with pytest.raises(UserError, match="The base model has 49,152 tokens"):  # of a GGUF file
        resolve(load_config("smoke", {"vocabulary.tokens": 49_152}))


def test_who_is_given_the_base_model_and_who_the_trimmed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import stages

    @dataclass
    class Call:
        display: Any
        meanwhile: Any = None

        def __call__(self, stage: Stage, config: Any, label: str = "", **inputs: Any) -> Any:
            given[label or stage.name] = {name: value.label for name, value in inputs.items()}
            metrics = {"left_out_too_long": 0, "tokens_in_use_left_out": 3, "tokens_in_use": 9, "share_of_text_left_out": 0.01}
            return SimpleNamespace(label=label or stage.name, metrics=metrics)

    given: dict[str, dict[str, str]] = {}
    said: list[str] = []
    monkeypatch.setattr(stages, "runner", lambda run: Call(SimpleNamespace(say=said.append)))
    config = load_config("smoke", {"vocabulary.tokens": 2000, "gguf": ["F16"]})
    run: Any = Run(run_id="x", mlflow_run="m", config=config, started="", resumed=False)
    dataset: Any = SimpleNamespace(label="dataset")
    base, trimmed, _, tuned, reference = stages.train.fn(run, dataset)
    assert said == [
        "vocabulary.tokens=2000 leaves out 3 of 9 tokens of the training rows, 1.00% of their text, which is written in smaller ones."
    ]
    variants, models, failed, converted = stages.make_gguf.fn(run, tuned, dataset, base)
    stages.check.fn(run, variants, models, reference, base, trimmed, tuned, converted, failed)
    assert given["trim_vocabulary"] == {"base_model": "base_model", "dataset": "dataset"}
    assert given["finetune"]["base_model"] == given["merge"]["base_model"] == "trim_vocabulary"
    assert given["convert to GGUF"] == {"model": "merge", "untrimmed": "base_model"}
    assert given["convert base to GGUF"] == {"model": "trim_vocabulary", "untrimmed": "base_model"}
    assert given["check gguf-F16"]["base"] == "convert base to GGUF"
