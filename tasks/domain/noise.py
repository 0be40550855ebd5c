"""Noise that looks like people. Each kind changes segments in place; labels follow the text, so a mistyped product is
the product. Numbers and codes keep what they say."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from random import Random

from tasks.domain.expansion import Segment

EMOJIS = ["🙂", "😊", "🙏", "👍", "😅", "🛒", "❤️", "😡", "🤔", "🎁", "🔥", "😭"]
# Rows of QWERTY and QWERTZ/AZERTY share most neighbours; these pairs are wrong keys on any of them.
NEIGHBOURS = {
    "a": "sq",
    "s": "ad",
    "d": "sf",
    "f": "dg",
    "g": "fh",
    "h": "gj",
    "j": "hk",
    "k": "jl",
    "l": "kö",
    "e": "wr",
    "r": "et",
    "t": "rz",
    "i": "uo",
    "o": "ip",
    "u": "zi",
    "n": "bm",
    "m": "n",
    "b": "vn",
    "c": "xv",
    "v": "cb",
    "p": "o",
    "w": "qe",
}
TRANSLITERATED = {"ä": "ae", "ö": "oe", "ü": "ue", "ß": "ss", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "đ": "dj", "Đ": "Dj"}
PLAIN = {"đ": "d", "Đ": "D", "ß": "ss"}

Noise = Callable[[list[Segment], Random], None]


def _lower(segments: list[Segment], rng: Random) -> None:
    for segment in segments:
        segment.text = segment.text.lower()


def _upper(segments: list[Segment], rng: Random) -> None:
    for segment in segments:
        segment.text = segment.text.upper()


def _no_punctuation(segments: list[Segment], rng: Random) -> None:
    """As dictated by voice: no sentence marks outside slots."""
    for segment in segments:
        if segment.slot is None and not segment.protected:
            segment.text = re.sub(r"[.,;:!?¿¡…—–\"„“”«»]+", " ", segment.text)


def _no_diacritics(segments: list[Segment], rng: Random) -> None:
    """`zurueck` or `zuruck`, `kosarica`: either all umlauts are written out or all marks are dropped."""
    table = TRANSLITERATED if rng.random() < 0.5 else PLAIN
    for segment in segments:
        text = "".join(table.get(char, char) for char in segment.text)
        decomposed = unicodedata.normalize("NFD", text)
        segment.text = "".join(char for char in decomposed if not unicodedata.combining(char))


def _change_words(segments: list[Segment], rng: Random, change: Callable[[str, Random], str], most: int) -> None:
    places = [(segment, match) for segment in segments if not segment.protected for match in re.finditer(r"[^\W\d_]{4,}", segment.text)]
    chosen = rng.sample(places, min(len(places), rng.randint(1, most)))
    for segment, match in sorted(chosen, key=lambda place: place[1].start(), reverse=True):
        segment.text = segment.text[: match.start()] + change(match.group(), rng) + segment.text[match.end() :]


def _slip(word: str, rng: Random) -> str:
    """Two letters swapped, one dropped, or one doubled; the first letter stays."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + (word[at] * 2 if kind == 1 else "") + word[at + 1 :]


def _wrong_key(word: str, rng: Random) -> str:
    places = [at for at, char in enumerate(word) if char.lower() in NEIGHBOURS]
    if not places:
        return word
    at = rng.choice(places)
    return word[:at] + rng.choice(NEIGHBOURS[word[at].lower()]) + word[at + 1 :]


def _typo(segments: list[Segment], rng: Random) -> None:
    _change_words(segments, rng, _slip, most=2)


def _emphasis(segments: list[Segment], rng: Random) -> None:
    """One to three words in capitals: "I said TWO"."""
    _change_words(segments, rng, lambda word, _: word.upper(), most=3)


def _keyboard(segments: list[Segment], rng: Random) -> None:
    _change_words(segments, rng, _wrong_key, most=2)


def _missing_space(segments: list[Segment], rng: Random) -> None:
    places = [
        (segment, match.start())
        for segment in segments
        if segment.slot is None and not segment.protected
        for match in re.finditer(r"(?<=\w) (?=\w)", segment.text)
    ]
    if places:
        segment, at = rng.choice(places)
        segment.text = segment.text[:at] + segment.text[at + 1 :]


def _emoji(segments: list[Segment], rng: Random) -> None:
    emojis = rng.choice(EMOJIS) * rng.choice([1, 1, 1, 2, 3])
    if rng.random() < 0.8:
        segments.append(Segment(" " + emojis))
    else:
        segments.insert(0, Segment(emojis + " "))


KINDS: dict[str, Noise] = {
    "lower": _lower,
    "no_punctuation": _no_punctuation,
    "no_diacritics": _no_diacritics,
    "typo": _typo,
    "emoji": _emoji,
    "emphasis": _emphasis,
    "upper": _upper,
    "keyboard": _keyboard,
    "missing_space": _missing_space,
}


def add_noise(segments: list[Segment], kinds: list[str], rate: float, rng: Random) -> list[str]:
    """Apply some of `kinds` in place; each row gets noise with probability `rate`, then one to three kinds of it.

    Returns:
        The kinds applied, in order.
    """
    if not kinds or rng.random() >= rate:
        return []
    chosen = rng.sample(kinds, min(len(kinds), rng.choice([1, 1, 1, 2, 2, 3])))
    for kind in chosen:
        KINDS[kind](segments, rng)
    return chosen
