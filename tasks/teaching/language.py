"""Whether a text may be in a language: only what is surely another one is turned away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LIKELY = 0.1  # below this probability a text counts as another language; 0.7% of the phrase banks' own texts are below, 97% of the others'
NEIGHBOURS = ("en", "de", "fr", "es")  # what a model slips into, so that a domain of one language has something to be told from


class Languages:
    """Tells the languages of a domain apart, with py3langid (Lui and Baldwin 2012), which runs offline.

    Measured on 2,400 utterances of six languages: see `docs/experiments.md`. A language it does not know is never turned away.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = {str(name) for name in self._identifier.nb_classes}
        self.known = sorted(known & {*languages, *NEIGHBOURS})
        self._identifier.set_languages(self.known)

    def may_be(self, text: str, language: str) -> bool:
        """Whether a text may be in `language`; of a few letters nobody can say."""
        if language not in self.known or sum(map(str.isalpha, text)) < 8:
            return True
        return float(dict(self._identifier.rank(text))[language]) >= LIKELY
