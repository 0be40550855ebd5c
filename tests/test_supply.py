"""What is installed: locked with hashes, under licences that are allowed, and audited or said not to be."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
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
    checked = r"-c requirements\.lock|\$\(LOCKED\)|\$\(SOURCE\)|-r llama\.txt"
    # What has no hash: torch, pip itself, what was compiled from a source with one, and this project.
    without = r"torch==|\(torch==|pip==26\.3|--upgrade 'pip>=26\.1'|wheels/\*\.whl|\$\(WHEELS\)/\*\.whl|-e \.|--quiet cmake ninja"
    calls = re.findall(r"pip (?:install|wheel|download) [^\n&]*", DOCKERFILE + makefile.replace("\\\n", " "))
    assert len(calls) > 20
    for call in calls:
        assert re.search(checked, call) or re.search(without, call), call
    for step in re.split(r"\nFROM ", DOCKERFILE):  # an older pip takes the hash of a constraint for that of nothing
        if "-c requirements.lock" in step:
            assert step.index("pip install pip==26.3") < step.index("-c requirements.lock")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with the wheels of two packages, of which `shop` needs `basket`."""
    for name, needs in (("shop", "Requires-Dist: basket\n"), ("basket", "")):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
            wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return tmp_path


def test_pip_refuses_a_dependency_that_is_not_the_one_that_was_locked(wheels: Path) -> None:
    """The way in which the Makefile installs: hashes in a constraints file, which pip checks from 26.1 on."""

    def install() -> subprocess.CompletedProcess[str]:
        lines = [f"{name}==1.0 --hash=sha256:{hashes[name]}\n" for name in ("shop", "basket")]
        (wheels / "lock").write_text("".join(lines))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--find-links", wheels, "-c", wheels / "lock", "shop"]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")} | {"PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(command, capture_output=True, text=True, env=env)

    hashes = {name: hashlib.sha256((wheels / f"{name}-1.0-py3-none-any.whl").read_bytes()).hexdigest() for name in ("shop", "basket")}
    right = install()
    assert right.returncode == 0 and "Would install basket-1.0 shop-1.0" in right.stdout, right.stderr
    hashes["basket"] = "0" * 64
    wrong = install()
    assert wrong.returncode == 1 and "DO NOT MATCH THE HASHES" in wrong.stderr and "basket" in wrong.stderr


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


@pytest.fixture
def advisories() -> Iterator[Callable[[dict[str, str]], str]]:
    """A server that answers as osv.dev does: an advisory for each package that is named, with the version in which it is mended."""
    holes: dict[str, str] = {}

    class Osv(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
            affected = [
                {"package": {"name": name, "ecosystem": "PyPI"}, "ranges": [{"type": "ECOSYSTEM", "events": [{"fixed": holes.get(name)}]}]}
            ]
            vulns = [{"id": "PYSEC-2026-1", "summary": "Lets anybody in.", "affected": affected}] if name in holes else []
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"vulns": vulns} if vulns else {}).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def with_holes(found: dict[str, str]) -> str:
        holes.update(found)
        return f"http://127.0.0.1:{server.server_port}/v1/query"

    yield with_holes
    server.shutdown()
    server.server_close()


WANTED = "".join(entry + "\n" for entry in re.split(r"\n(?=\w)", LOCK) if entry.startswith(("six==", "numpy==")))


def test_an_audit_names_what_is_known_and_where_it_is_mended(advisories: Callable[[dict[str, str]], str], tmp_path: Path) -> None:
    code, said = audit.audit(WANTED, ["--osv-url", advisories({"six": "1.18.0"}), "--cache-dir", str(tmp_path)])
    assert code == audit.FOUND and "six 1.17.0: PYSEC-2026-1, mended in 1.18.0. Lets anybody in." in said
    assert "2 packages audited, 1 known vulnerabilities." in said


def test_an_audit_that_could_not_ask_says_so_and_does_not_pass(tmp_path: Path) -> None:
    code, said = audit.audit(WANTED, ["--osv-url", "http://127.0.0.1:1/v1/query", "--cache-dir", str(tmp_path)])
    assert code == audit.UNKNOWN and said.startswith("Not audited: ") and "127.0.0.1" in said and said.count("\n") == 0


def test_an_audit_asks_for_the_whole_lock_and_torch() -> None:
    assert audit.requirements().startswith(LOCK) and audit.requirements().endswith("torch==2.13.0\n")
