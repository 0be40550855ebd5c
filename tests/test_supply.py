"""What is installed: locked with hashes, under licences that are allowed."""

from __future__ import annotations

import functools
import re
import tomllib
from pathlib import Path

import pytest

from docs import audit, licences
from tasks.core.packages import Package, installed, normalised

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
DOCKERFILE = re.sub(r"^#.*\n", "", (ROOT / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")


@functools.cache
def locked() -> dict[str, tuple[str, set[str]]]:
    """Version and hashes by name."""
    found = {}
    for entry in re.split(r"\n(?=\w)", LOCK.replace("\\\n", " ").strip()):
        pin = re.match(r"([\w.-]+)==([\w.]+) ", entry)
        assert pin, entry
        assert normalised(pin[1]) not in found, pin[1]
        found[normalised(pin[1])] = (pin[2], set(re.findall(r"--hash=sha256:([0-9a-f]{64})(?!\w)", entry)))
    return found


def test_the_lock_has_a_version_and_hashes_of_everything_but_torch() -> None:
    lock, project = locked(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(lock) > 200 and all(hashes for _, hashes in lock.values())
    wanted = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    names = {normalised(re.split(r"[\[=<>]", line)[0]) for line in wanted} - {"cartwright"}
    assert names - set(lock) == {"torch"}
    for line in wanted:
        if pin := re.fullmatch(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line):
            assert pin[1] == "torch" or lock[normalised(pin[1])][0] == pin[2], line
    assert len(lock["numpy"][1]) > 10  # wheels for other systems and Pythons too


def test_what_is_installed_is_what_is_locked() -> None:
    """But for developers' other tools, and for what pip itself is."""
    lock = locked()
    different = {
        package.name: package.version for package in installed() if package.key in lock and lock[package.key][0] != package.version
    }
    assert not set(different) - {"pip", "setuptools"}


def test_makefile_and_images_install_nothing_without_a_hash_that_could_have_one() -> None:
    lock, makefile = locked(), (ROOT / "Makefile").read_text()
    base = re.search(r"BASE_MODEL := ([\w-]+)==([\d.]+)", makefile)
    assert base and lock[base[1]][0] == base[2]
    source = re.search(r'echo "llama-cpp-python==([\d.]+) --hash=sha256:(\w+)" >llama.txt', DOCKERFILE)
    assert source and lock["llama-cpp-python"] == (source[1], {source[2]})
    checked = r"-c requirements\.lock|\$\(LOCKED\)|\$\(SOURCE\)|-r llama\.txt|-c \$\(BUILT_WITH\)"
    # What has no hash: torch, pip itself, what was compiled from a source with one, and this project.
    without = r"torch==|\$\(TORCH\)|pip==26\.3|\$\(PIP\)|wheels/\*\.whl|\$\(WHEELS\)/\*\.whl|-e \."
    calls = re.findall(r"pip (?:install|wheel|download) [^\n&]*", DOCKERFILE + makefile.replace("\\\n", " "))
    assert len(calls) > 20
    for call in calls:
        assert re.search(checked, call) or re.search(without, call), call
    assert makefile.index("pip install --quiet $(PIP)") < makefile.index("pip install --quiet --no-compile $(LOCKED)")
    for call in calls:  # and what llama.cpp is built with has one too
        assert "--no-binary" not in call or "--build-constraint requirements-build.lock" in call, call
    source_line = next(line for line in makefile.splitlines() if line.startswith("SOURCE :="))
    assert "--build-constraint $(BUILT_WITH)" in source_line and "BUILT_WITH := requirements-build.lock" in makefile
    build = (ROOT / "requirements-build.lock").read_text()
    assert all(re.search(rf"^{name}==[\d.]+ .*\\\n    --hash=sha256:", build, re.M) for name in ("scikit-build-core", "cmake", "ninja"))
    for step in re.split(r"\nFROM ", DOCKERFILE):  # an older pip takes the hash of a constraint for that of nothing
        if "-c requirements.lock" in step:
            assert step.index("pip install pip==26.3") < step.index("-c requirements.lock")


# Licences.


def test_every_licence_is_allowed_and_every_exception_is_needed() -> None:
    here = {package.key: package for package in installed() if package.key in locked() or package.key == "torch"}
    assert len(here) > 200 and licences.refused(list(here.values())) == []
    for name in licences.EXCEPTIONS:
        assert not licences.is_allowed(licences.licence_of(here[name])), name
    assert not [name for name in licences.READ if here[name].licence]


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [("MIT", True), ("Apache-2.0 AND MIT", True), ("GPL-3.0 OR MIT", True), ("MPL-2.0 AND (Apache-2.0 OR MIT)", True),
     ("Apache-2.0 WITH LLVM-exception", True), ("GPL-3.0", False), ("MIT AND AGPL-3.0-only", False), ("(GPL-3.0 OR SSPL-1.0) AND MIT", False),
     ("GPL-3.0 WITH Classpath-exception-2.0", False), ("Ask Me Ltd", False), ("", False), ("MIT AND", False)],
)  # fmt: skip
def test_a_licence_is_allowed_if_one_way_to_take_it_is(licence: str, allowed: bool) -> None:
    assert licences.is_allowed(licence) == allowed
    said = licences.refused([Package("shop", "1.0", licence)])
    assert bool(said) != allowed and all("shop 1.0" in line and repr(licence) in line and "EXCEPTIONS" in line for line in said)


def test_the_page_of_licences_is_that_of_the_lock() -> None:
    pins = licences.pinned()
    assert set(pins) == {*locked(), "torch"}
    listed = re.findall(r"^(?:\| ([\w.-]+) \| ([\w.]+) \|| *- ([\w.-]+) ([\w.]+)$)", licences.PAGE.read_text(), flags=re.MULTILINE)
    shown = {normalised(row[0] or row[2]): row[1] or row[3] for row in listed if row[0] != "package"}
    assert shown == pins, "run `make licences`"


# Known vulnerabilities.


def test_an_audit_asks_for_the_whole_lock_and_torch() -> None:
    asked = audit.requirements().splitlines()
    names = [line.partition("==")[0] for line in asked]
    assert {normalised(name) for name in names} >= {*locked(), "torch", "cmake", "scikit-build-core"}
    assert len(set(names)) == len(names)  # pip-audit takes no name twice
