"""Duplicates and leaks: texts that were seen, texts that are nearly others, and splits that share what they must not."""

from __future__ import annotations

import hashlib
import itertools
import re
import sqlite3
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.core.rows import rows_of
from tasks.domain.scoring import normalise
from tasks.domain.utterances import Split

NEAR_DUPLICATE = 0.9  # rapidfuzz's ratio (0 to 1) of folded texts from which two rows count as the same
ORDER: tuple[Split, ...] = ("test", "hard", "validation", "train")  # no split may have a near-duplicate in one before it
GRAM = 4  # characters; of 2 to 4 the one that leaves least to do
BUCKETS = 2**18  # that grams are hashed into
PAIRS = 1_000_000  # compared at a time, which bounds the memory
NEAR, TWICE = "near_duplicate_of_evaluation", "duplicate"


class LeakError(ValueError):
    """Two splits share a text, a product or a pattern of `hard`; the message names the rows."""


def comparable(text: str) -> str:
    """A text as exact duplicates are looked for; emoji-only texts, of which nothing would be left, stay as they are."""
    return str(normalise(text)) or text


_SPELT_OUT = re.compile(r"([aou])e|dj")  # "zurueck", "medju": a mark written as a letter, or a letter that looks like that
_NO_WORD = re.compile(r"[\W_]+")
_NO_MARK_TO_TAKE_AWAY = str.maketrans("đłøœæ", "dlooa")


def folded(text: str) -> str:
    """A text as near-duplicates are looked for: letters and digits alone, without case, diacritics, or their spelt-out forms."""
    plain = text.casefold()
    if not plain.isascii():
        decomposed = unicodedata.normalize("NFKD", plain)
        plain = "".join(char for char in decomposed if not unicodedata.combining(char)).translate(_NO_MARK_TO_TAKE_AWAY)
    return _NO_WORD.sub(" ", _SPELT_OUT.sub(lambda found: found[1] or "d", plain)).strip() or text


class SeenTexts:
    """A set of texts on disk: eight bytes of hash each, in a temporary SQLite database whose cache stays at 2 MB.

    Of two million texts, two share a hash with a probability of one in ten million; the second would then be left out.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # no name: a file of its own, gone when it is closed
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE seen (hash INTEGER PRIMARY KEY)")
        self._database.execute("BEGIN")

    def add(self, text: str) -> bool:
        """Whether the text is new."""
        digest = hashlib.blake2b(comparable(text).encode(), digest_size=8).digest()
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", [int.from_bytes(digest, "big", signed=True)]).rowcount == 1


class NearDuplicates:
    """Finds every text of a growing collection that is nearly a given one, whatever their languages.

    Nearly: rapidfuzz's ratio of the folded texts is at least `NEAR_DUPLICATE`. Before it is computed, pairs that cannot reach it are
    left out by counting common character n-grams (Gravano et al. 2001, "Approximate string joins in a database (almost) for free"),
    which loses none: of the L + q - 1 grams of a padded text of length L, a deleted character takes at most q and an inserted one
    at most q - 1. With lengths of S in all and at most d = (1 - ratio) S such edits, S/2 + q - 1 - (q - 1/2) d grams are left.

    Memory: about 2 kB a text.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer

        self._grams = HashingVectorizer(
            analyzer="char", ngram_range=(GRAM, GRAM), n_features=BUCKETS, norm=None, alternate_sign=False, lowercase=False, dtype="float32"
        )
        self._texts: list[str] = []
        self._index: Any = None  # grams x texts
        self._lengths: Any = None
        self.add(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, texts: Iterable[str]) -> None:
        """Put texts into the collection; they are numbered in the order in which they come."""
        import numpy as np
        from scipy import sparse

        new = [folded(text) for text in texts]
        if new:
            self._texts += new
            columns = [self._index, self._counted(new).T] if self._index is not None else [self._counted(new).T]
            self._index = sparse.hstack(columns, format="csr")
            self._lengths = np.array([len(text) for text in self._texts])

    def pairs(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        """(position in `texts`, number in the collection) of every pair that is nearly the same."""
        size = max(1, PAIRS // max(1, len(self)))
        for start in range(0, len(texts) if len(self) else 0, size):
            yield from ((start + row, number) for row, number in self._pairs([folded(text) for text in texts[start : start + size]]))

    def _pairs(self, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
        import numpy as np
        from rapidfuzz import fuzz, process

        common = (self._counted(texts) @ self._index).tocoo()
        lengths = np.array([len(text) for text in texts])[common.row] + self._lengths[common.col]
        needed = lengths / 2 + GRAM - 1 - (GRAM - 0.5) * (1 - NEAR_DUPLICATE) * lengths
        possible = common.data >= needed - 1e-3
        rows, numbers = common.row[possible].tolist(), common.col[possible].tolist()
        scores = process.cpdist(
            [texts[row] for row in rows], [self._texts[number] for number in numbers], scorer=fuzz.ratio, score_cutoff=100 * NEAR_DUPLICATE
        )
        yield from ((row, number) for row, number, score in zip(rows, numbers, scores, strict=True) if score)

    def _counted(self, texts: Sequence[str]) -> Any:
        padding = "\x02" * (GRAM - 1)
        return self._grams.transform(f"{padding}{text}{padding}" for text in texts)


class Admission:
    """Lets rows into the splits: no text twice, and none that is nearly a row of an evaluation split.

    `rejected` counts, by reason, what was not let in.
    """

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        self._seen = SeenTexts()
        self._held_out = NearDuplicates()

    def hold_out(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """From now on nothing may be nearly one of these rows."""
        self._held_out.add(row["text"] for row in rows)

    def admit(self, rows: Sequence[Mapping[str, Any]], prefix: str = "") -> list[bool]:
        """Which of the rows may come in; `prefix` is put before the reasons of the others."""
        near = {position for position, _ in self._held_out.pairs([row["text"] for row in rows])}
        admitted = []
        for position, row in enumerate(rows):
            reason = NEAR if position in near else "" if self._seen.add(row["text"]) else TWICE
            if reason:
                self.rejected[prefix + reason] += 1
            admitted.append(not reason)
        return admitted

    def counts(self) -> dict[str, Any]:
        """What was not let in: exact duplicates, near-duplicates of evaluation rows, and every reason by itself."""
        near, twice = (sum(n for reason, n in self.rejected.items() if reason.endswith(word)) for word in (NEAR, TWICE))
        return {"duplicates_removed": twice, "near_duplicates_removed": near, "rejected": dict(sorted(self.rejected.items()))}


def check_leakage(folder: Path) -> None:
    """Compare every split with every other, as written: near-duplicate texts, products, and the phrase patterns of `hard`.

    Reads `train` in parts, so that memory does not grow with it.

    Raises:
        LeakError: names the rows that leak.
    """
    held_out, ids = NearDuplicates(), list[str]()
    users: dict[str, dict[str, str]] = {"product": {}, "pattern": {}}  # which split has it
    leaks: list[str] = []
    for split in ORDER:
        rows_of_split: list[tuple[str, str]] = []
        for part in batched(rows_of(folder / f"{split}.jsonl"), 1000):
            leaks += [f"{ids[number]} ~ {part[row]['id']}" for row, number in held_out.pairs([row["text"] for row in part])]
            leaks += [f"{row['id']} ({shared})" for row in part for shared in _shared(row, split, users)]
            if split != "train":
                rows_of_split += [(row["text"], row["id"]) for row in part]
        held_out.add(text for text, _ in rows_of_split)
        ids += [name for _, name in rows_of_split]
    if leaks:
        raise LeakError(f"{len(leaks)} leaks between {', '.join(ORDER)}: {', '.join(leaks[:10])}")


def _shared(row: Mapping[str, Any], split: str, users: dict[str, dict[str, str]]) -> Iterator[str]:
    """What a row has that belongs to an earlier split: its product, or its pattern if either split is `hard`."""
    for kind, value in (("product", row["product"]), ("pattern", row["origin"])):
        user = users[kind].get(value, split) if split == "train" else users[kind].setdefault(value, split)
        if value and user != split and (kind == "product" or "hard" in (user, split)):
            yield f"{kind} {value} of {user}"


def batched(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Lists of at most `size` rows (`itertools.batched` of Python 3.12)."""
    iterator = iter(rows)
    while part := list(itertools.islice(iterator, size)):
        yield part
