"""The programs that guard what is installed: pip compares hashes, an audit that could not ask does not pass. Seconds, by processes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from docs import audit

LOCK = (Path(__file__).resolve().parents[1] / "requirements.lock").read_text()


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


WANTED = "".join(f"{line}\n" for line in audit.requirements().splitlines() if line.startswith(("six==", "numpy==")))


def test_an_audit_names_what_is_known_and_where_it_is_mended(advisories: Callable[[dict[str, str]], str], tmp_path: Path) -> None:
    code, said = audit.audit(WANTED, ["--osv-url", advisories({"six": "1.18.0"}), "--cache-dir", str(tmp_path)])
    assert code == audit.FOUND and "six 1.17.0: PYSEC-2026-1, mended in 1.18.0. Lets anybody in." in said
    assert "2 packages audited, 1 known vulnerabilities." in said


def test_all_that_is_pinned_can_be_asked(advisories: Callable[[dict[str, str]], str], tmp_path: Path) -> None:
    wanted = audit.requirements()
    code, said = audit.audit(wanted, ["--osv-url", advisories({}), "--cache-dir", str(tmp_path)])
    assert (code, said) == (audit.NOTHING, f"{len(wanted.splitlines())} packages audited, 0 known vulnerabilities.")


def test_an_audit_that_could_not_ask_says_so_and_does_not_pass(tmp_path: Path) -> None:
    code, said = audit.audit(WANTED, ["--osv-url", "http://127.0.0.1:1/v1/query", "--cache-dir", str(tmp_path)])
    assert code == audit.UNKNOWN and said.startswith("Not audited: ") and "127.0.0.1" in said and said.count("\n") == 0
