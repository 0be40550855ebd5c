"""What is installed here: name, version and licence of every distribution, by its own metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata

HEADER = re.compile(r"^(Name|Version|License-Expression|License|Classifier): +(.*)$", re.MULTILINE)
TERM = r"\(*(?:MIT|ISC|[A-Za-z]+-[\w.-]+)\)*"
EXPRESSION = re.compile(rf"{TERM}(?: (?:AND|OR|WITH) {TERM})*")  # of SPDX, as far as packages use it
# What packages without an SPDX expression call their licence. `BSD` alone does not say which of the two.
SPDX = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD",
    "bsd 3-clause license": "BSD-3-Clause",
    "bsd license": "BSD",
    "isc license": "ISC",
    "isc license (iscl)": "ISC",
    "mit licence": "MIT",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "the mit license (mit)": "MIT",
}


@dataclass(frozen=True)
class Package:
    """An installed distribution; `licence` is an SPDX expression where its metadata allow one, else their words, else empty."""

    name: str
    version: str
    licence: str

    @property
    def key(self) -> str:
        """The normalised name, by which a package index knows it."""
        return normalised(self.name)

    @property
    def is_spdx(self) -> bool:
        """Whether the licence is an SPDX expression and not the package's own words."""
        return bool(EXPRESSION.fullmatch(self.licence))


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it (packaging.python.org, name normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> list[Package]:
    """All distributions, by name; of those with one name the one that is imported."""
    found: dict[str, Package] = {}
    for distribution in metadata.distributions():
        # Only the headers that are wanted: the parser of importlib.metadata also reads the long description, which takes seconds.
        text = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").partition("\n\n")[0]
        package = _package(HEADER.findall(text))
        if package.name:
            found.setdefault(package.key, package)
    return [found[key] for key in sorted(found)]


def _package(headers: list[tuple[str, str]]) -> Package:
    fields = dict(reversed(headers))  # the first of each, as the parser has it
    classifiers = [value.rpartition(" :: ")[2] for name, value in headers if name == "Classifier" and value.startswith("License :: ")]
    return Package(fields.get("Name", ""), fields.get("Version", ""), _licence(fields, classifiers))


def _licence(fields: dict[str, str], classifiers: list[str]) -> str:
    """An expression before words, words that name a licence before classifiers, and all of these before the beginning of a whole text."""
    words = fields.get("License", "").strip()
    if expression := fields.get("License-Expression"):
        return expression
    if words.lower() in SPDX or EXPRESSION.fullmatch(words):
        return SPDX.get(words.lower(), words)
    named = [SPDX.get(name.lower(), name) for name in classifiers if name not in ("OSI Approved", "DFSG approved")]
    return " OR ".join(dict.fromkeys(named)) or words
