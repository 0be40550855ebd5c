"""Parsing and scoring of answers."""

from __future__ import annotations

import json

import pytest

from tasks.domain.prompt import messages, pick_examples, zero_shot_prompt
from tasks.domain.scoring import answer_text, compact_json, exact_match, parse_answer, proportion, score, wilson_interval
from tasks.domain.spec import Intent, SlotDefault, Spec, load_spec
from tasks.teaching.prompts import PROMPT_VERSION, system_message

pytestmark = pytest.mark.fast
SPEC = load_spec("ecommerce")


def test_answer_is_compact_json_with_the_intent_first() -> None:
    assert compact_json({"product": "Öl", "intent": "search_product"}) == '{"intent":"search_product","product":"Öl"}'


def test_examples_take_turns_and_are_shown_as_earlier_answers() -> None:
    rows = [
        {"text": f"{i}-{lang}", "gold": {"intent": i}, "language": lang} for lang in ("de", "en") for i in ("view_cart", "search_product")
    ]
    picked = pick_examples(rows, SPEC, 3)
    assert [(row["gold"]["intent"], row["language"]) for row in picked[:1]] == [("search_product", "en")]
    assert len({row["text"] for row in picked}) == 3 and len(pick_examples(rows, SPEC, 9)) == 4
    asked = messages(SPEC, "my cart", zero_shot=True, examples=picked[:1])
    assert [m["role"] for m in asked] == ["system", "user", "assistant", "user"]
    assert asked[2]["content"] == '{"intent":"search_product"}' and asked[3]["content"] == " my cart"


def test_what_a_model_is_taught_is_parsed_into_the_label() -> None:
    gold = {"intent": "add_to_cart", "product": "tamna čokolada", "quantity": 2}
    assert answer_text(gold, SPEC) == "add\np tamna čokolada\nq2"
    json_spec = SPEC.model_copy(update={"answer": "json"})
    assert answer_text(gold, json_spec) == '{"intent":"add_to_cart","product":" tamna čokolada","quantity":2}'
    for spec in (SPEC, json_spec):
        assert parse_answer(answer_text(gold, spec), SPEC).answer == gold


def test_short_codes_are_words_and_letters_that_tell_names_apart() -> None:
    assert len(set(SPEC.intent_codes.values())) == len(SPEC.intents) and SPEC.intent_codes["add_to_cart"] == "add"
    assert SPEC.slot_codes == {"product": "p", "quantity": "q", "order_id": "o", "coupon_code": "c"}
    data = {**SPEC.model_dump(), "path": SPEC.path}
    slots = {name: {"type": "code", "formats": ["A9"]} for name in ("color", "colour", "size")}
    intents = {"view_cart": {}, "view_order": {}, "checkout": {"fallback": True}}
    alike = Spec.model_validate({**data, "slots": slots, "intents": intents})
    assert alike.intent_codes == {"view_cart": "view_cart", "view_order": "view_order", "checkout": "checkout"}
    assert alike.slot_codes == {"color": "color", "colour": "colou", "size": "s"}
    nested = Spec.model_validate(
        {
            **data,
            "slots": {key: {"type": "code", "formats": ["A9"]} for key in ("order", "order_id")},
            "intents": {"track": {"slots": {"order": "optional", "order_id": "optional"}}, "other": {"fallback": True}},
        }
    )
    gold = {"intent": "track", "order_id": "55", "order": "shoes"}
    assert parse_answer(answer_text(gold, nested), nested).answer == gold


def test_a_fine_tuned_model_is_asked_with_the_text_alone_or_as_a_chat() -> None:
    assert messages(SPEC, "my cart") == [{"role": "user", "content": " my cart"}]
    assert [m["role"] for m in messages(SPEC.model_copy(update={"prompt": "chat"}), "my cart")] == ["system", "user"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no_json"),
        ("hello", "no_json"),
        ('{"intent":"view_cart"', "no_json"),
        ("[1]", "no_json"),
        ('{"a":1}', "no_intent"),
        ('{"intent":5}', "no_intent"),
        ('{"intent":"fly"}', "unknown_intent"),
        ('{"intent":"view_cart","product":"x"}', "unknown_slot"),
        ('{"intent":"add_to_cart","product":"x","quantity":"2"}', "bad_value"),
        ('{"intent":"add_to_cart","product":"x","quantity":true}', "bad_value"),
        ('{"intent":"add_to_cart","product":3,"quantity":2}', "bad_value"),
        ("{" * 5000, "no_json"),
        ('{"a":' * 50_000, "no_json"),
        ("add\np x\nqtwo", "bad_value"),
        ("view\np x", "unknown_slot"),
        ("add\nand more", "unknown_slot"),
    ],
)
def test_unparseable_answers_are_named(text: str, problem: str) -> None:
    parsed = parse_answer(text, SPEC)
    assert parsed.answer is None and parsed.problem == problem


def test_text_around_the_answer_is_ignored() -> None:
    assert parse_answer('Sure: {"intent":"view_cart"} ok', SPEC).answer == {"intent": "view_cart"}


@pytest.mark.parametrize(
    ("mine", "same"),
    [
        ({"product": "Red  SHOES."}, True),
        ({"product": "red shoe"}, False),
        ({"product": "red shoes", "quantity": 3}, False),
        ({}, False),
    ],
)
def test_strings_are_compared_folded(mine: dict[str, object], same: bool) -> None:
    gold = {"intent": "add_to_cart", "product": "red shoes", "quantity": 2}
    answer = {"intent": "add_to_cart", "quantity": 2, **mine} if mine else None
    assert exact_match(gold, answer) is same


def test_composed_and_decomposed_letters_are_equal() -> None:
    assert exact_match({"intent": "search_product", "product": "caf\u00e9"}, {"intent": "search_product", "product": "cafe\u0301"})


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998 (doi:10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E), table I, method 3
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson_interval(0, 20)
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)
    for n in range(1, 400):  # rounding put a bound beyond what it is of, and no plot could be drawn
        for found in (proportion(0, n), proportion(n, n)):
            assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_score_counts_every_row() -> None:
    rows = [
        {"gold": {"intent": "view_cart"}, "language": "en"},
        {"gold": {"intent": "search_product", "product": "milk"}, "language": "de"},
        {"gold": {"intent": "search_product", "product": "milk"}, "language": "de"},
    ]
    outputs = ['{"intent":"view_cart"}', '{"intent":"search_product","product":"oat milk"}', "no idea"]
    result = score(rows, outputs, SPEC)
    assert result["exact_match"] == proportion(1, 3)
    assert result["intent_accuracy"] == pytest.approx(2 / 3)
    assert result["json_valid"] == pytest.approx(2 / 3)
    assert result["slot_f1"]["product"] == 0.0
    assert result["by_language"] == {"de": proportion(0, 2), "en": proportion(1, 1)}
    assert result["by_intent"] == {"search_product": proportion(0, 2), "view_cart": proportion(1, 1)}
    assert result["problems"] == {"no_json": 1}
    assert result["correct"] == [True, False, False]
    json.dumps(result)


def test_score_refuses_another_number_of_outputs() -> None:
    with pytest.raises(ValueError, match="1 rows, 2 outputs"):
        score([{"gold": {"intent": "view_cart"}}], ["", ""], SPEC)


def test_the_long_instructions_say_what_an_answer_must_have_to_be_right() -> None:
    """Whoever follows them is scored as right: a slot with a default is in every answer, also where nobody states it."""
    listed = dict(line.removeprefix("- ").split(": ", 1) for line in zero_shot_prompt(SPEC).splitlines() if line.startswith("- "))
    assert listed["add_to_cart"] == "product, quantity (1 when not stated)"
    assert listed["remove_from_cart"] == "product, quantity (only when stated)" and listed["view_cart"] == "no slots"
    slots = {**SPEC.intents["add_to_cart"].slots, "quantity": SlotDefault(default=2)}
    other = SPEC.model_copy(update={"intents": {**SPEC.intents, "add_to_cart": Intent(slots=slots)}})
    assert "- add_to_cart: product, quantity (2 when not stated)\n" in zero_shot_prompt(other)


def test_a_teachers_requests_are_the_same_ones_as_long_as_their_version_is() -> None:
    """What was paid for is found in the log by the words it was asked with."""
    assert PROMPT_VERSION == 1 and "- add_to_cart: product, quantity\n" in system_message(SPEC)["content"]
