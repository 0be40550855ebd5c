"""Samples of what the banks say, as people who know the languages say it: articles, cases, numbers, elisions, agreement."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest

from tasks.domain.bank import Bank, load_bank, make_pattern
from tasks.domain.expansion import expand
from tasks.domain.spec import load_spec

pytestmark = pytest.mark.fast
SPEC = load_spec("ecommerce")
DRAWN = 400  # times; each of the numbers below then comes

# language, intent, pattern, product: what may come of it, and what never may
SAMPLES: list[tuple[str, str, str, str, list[str], list[str]]] = [
    ("en", "add_to_cart", "add {counted}", "frying pan 28 cm", ["add one frying pan 28 cm", "add two frying pans 28 cm"], ["add two frying pan 28 cms"]),
    ("en", "add_to_cart", "add {counted}", "banana", ["add one banana", "add two bunches of bananas", "add one bunch of bananas"], ["add one bananas"]),
    ("de", "add_to_cart", "Ich nehme {counted}", "roter Apfel",
     ["Ich nehme einen roten Apfel", "Ich nehme zwei rote Äpfel", "Ich nehme ein Kilo rote Äpfel", "Ich nehme neunzig rote Äpfel"], ["Ich nehme einen roter Apfel"]),
    ("de", "add_to_cart", "Ich nehme {counted}", "Spaghetti 500 g", ["Ich nehme eine Packung Spaghetti 500 g", "Ich nehme zwei Packungen Spaghetti 500 g"], []),
    ("de", "add_to_cart", "Ich nehme {counted}", "natives Olivenöl", ["Ich nehme eine Flasche natives Olivenöl"], ["Ich nehme ein natives Olivenöl"]),
    ("de", "return_item", "Mit {dem}{product.dat_d} stimmt etwas nicht", "roter Gartenstuhl aus Metall", ["Mit dem roten Gartenstuhl aus Metall stimmt etwas nicht"], []),
    ("de", "return_item", "{der}{product.nom_d} {ist}kaputt", "Feuerschale", ["die Feuerschale ist kaputt"], []),
    ("de", "return_item", "{der}{product.nom_d} {ist}kaputt", "Spaghetti 500 g", ["die Spaghetti 500 g sind kaputt"], []),
    ("fr", "add_to_cart", "Je prends {counted}", "corde à sauter", ["Je prends une corde à sauter", "Je prends deux cordes à sauter", "Je prends vingt et une cordes à sauter"], []),
    ("fr", "add_to_cart", "Je prends {counted}", "Orangina", ["Je prends une bouteille d'Orangina", "Je prends six canettes d'Orangina"], ["Je prends une bouteille de Orangina"]),
    ("fr", "search_product", "J'ai besoin {dun}{product}", "corde à sauter", ["J'ai besoin d'une corde à sauter"], []),
    ("fr", "search_product", "J'ai besoin {dun}{product}", "Orangina", ["J'ai besoin d'Orangina"], []),
    ("fr", "return_item", "{le}{product}, {il} {est} abîmé{e}", "bêche en acier", ["la bêche en acier, elle est abîmée"], []),
    ("fr", "return_item", "{le}{product}, {il} {est} abîmé{e}", "abat-jour en lin", ["l'abat-jour en lin, il est abîmé"], []),
    ("fr", "return_item", "{le}{product}, {il} {est} abîmé{e}", "bottes de neige Sorel", ["les bottes de neige Sorel, elles sont abîmées"], []),
    ("fr", "update_quantity", "{product.pl} au lieu de {quantity}", "corde à sauter",
     ["cordes à sauter au lieu de un", "cordes à sauter au lieu de douze"], ["cordes à sauter au lieu de une", "cordes à sauter au lieu de une douzaine"]),
    ("it", "add_to_cart", "Aggiungi {counted}", "pomodoro ciliegino", ["Aggiungi un pomodoro ciliegino", "Aggiungi due chili di pomodori ciliegini", "Aggiungi ventuno pomodori ciliegini"], []),
    ("it", "add_to_cart", "Aggiungi {counted}", "lampada da terra", ["Aggiungi un paio di lampade da terra", "Aggiungi due lampade da terra"], []),
    ("it", "add_to_cart", "Aggiungi {counted}", "Vans Old Skool",
     ["Aggiungi un paio di Vans Old Skool", "Aggiungi due paia di Vans Old Skool"], ["Aggiungi un paio di paia di Vans Old Skool"]),
    ("it", "remove_from_cart", "Togli {il}{product}", "attaccapanni da parete", ["Togli l'attaccapanni da parete"], []),
    ("it", "remove_from_cart", "Togli {i}{product.pl}", "attaccapanni da parete", ["Togli gli attaccapanni da parete"], []),
    ("it", "remove_from_cart", "{quantity} {dei10}{product.pl}, via", "ciotola antiscivolo", ["3 delle dieci ciotole antiscivolo, via"], []),
    ("it", "return_item", "{il}{product} non {va} bene, {lho} provat{o}", "figurine Calciatori Panini", ["le figurine Calciatori Panini non vanno bene, le ho provate"], []),
    ("es", "add_to_cart", "Pon {counted}", "plátano de Canarias",
     ["Pon un plátano de Canarias", "Pon dos kilos de plátanos de Canarias", "Pon veintiún plátanos de Canarias"], ["Pon una plátano de Canarias"]),
    ("es", "add_to_cart", "Pon {counted}", "pelota saltarina", ["Pon una pelota saltarina", "Pon veintiuna pelotas saltarinas"], ["Pon veintiún pelotas saltarinas"]),
    ("es", "return_item", "{el}{product} {llego} rot{o}", "cubiertos de acero inoxidable", ["los cubiertos de acero inoxidable llegaron rotos"], []),
    ("hr", "add_to_cart", "Dodaj {counted}", "crvena jabuka",
     ["Dodaj jednu crvenu jabuku", "Dodaj dvije crvene jabuke", "Dodaj pet crvenih jabuka", "Dodaj dvije kile crvenih jabuka",
      "Dodaj dvadeset jednu crvenu jabuku", "Dodaj dvadeset dvije crvene jabuke"], ["Dodaj dva crvene jabuke", "Dodaj pet crvene jabuke"]),
    ("hr", "add_to_cart", "Dodaj {counted}", "grčki jogurt", ["Dodaj jedan grčki jogurt", "Dodaj tri grčka jogurta", "Dodaj devedeset grčkih jogurta"], []),
    ("hr", "add_to_cart", "Dodaj {counted}", "maslinovo ulje", ["Dodaj jednu bocu maslinovog ulja", "Dodaj pet boca maslinovog ulja"], ["Dodaj jedno maslinovo ulje"]),
    ("hr", "return_item", "{tajn}{product.nom} {ostecen}", "crvena jabuka", ["ta crvena jabuka je oštećena"], []),
    ("hr", "return_item", "{tajn}{product.nom} {ostecen}", "špageti Barilla 500 g", ["ti špageti Barilla 500 g su oštećeni"], []),
    ("hr", "return_item", "Vraćam {ovaj}{product.acc}", "vrtne škare", ["Vraćam ove vrtne škare"], []),
]  # fmt: skip


@cache
def bank(language: str) -> Bank:
    return load_bank(SPEC, language)


@pytest.mark.parametrize(("language", "intent", "line", "name", "right", "wrong"), SAMPLES)
def test_words_agree_as_people_say_them(language: str, intent: str, line: str, name: str, right: list[str], wrong: list[str]) -> None:
    product = next(product for product in bank(language).products if product.name == name)
    pattern = make_pattern(line, language, intent)
    said = {
        " ".join("".join(segment.text for segment in expand(pattern, product, bank(language), SPEC, Random(seed), 0.0, drilled)[0]).split())
        for seed in range(DRAWN)
        for drilled in (False, True)
    }
    assert not set(right) - said, sorted(said)[:12]
    assert not set(wrong) & said


@pytest.mark.parametrize("language", SPEC.languages)
def test_every_number_up_to_thirty_and_every_ten_has_a_word(language: str) -> None:
    wanted = {*range(1, 31), *range(40, 101, 10)}
    assert wanted <= set(bank(language).numbers) and wanted <= set(bank(language).bare_numbers)
