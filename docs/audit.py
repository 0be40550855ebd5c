"""Known vulnerabilities of all that is pinned, by pip-audit and osv.dev. Exit code 0: none; 1: some; 3: nobody knows, and why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTHING, FOUND, UNKNOWN = 0, 1, 3


def requirements() -> str:
    """Everything that is pinned, once and without hashes, which pip-audit does not compare: both locks, and torch, which they leave out."""
    torch = re.search(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    locks = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "requirements-build.lock"))
    pins = {f"{name}=={version}" for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.+!-]+)", locks, re.MULTILINE)}
    return "".join(f"{pin}\n" for pin in sorted(pins | ({torch[1]} if torch else set())))


def audit(wanted: str, options: list[str]) -> tuple[int, str]:
    """Audit pinned requirements.

    PyPI's own advisories are not asked: where a mirror has none, pip-audit skips every package and says that nothing is known.

    Returns:
        An exit code, and what to say.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(wanted)
        file.flush()
        asked = ["--no-deps", "--disable-pip", "-r", file.name, "--vulnerability-service", "osv", "--format", "json"]
        command = [sys.executable, "-m", "pip_audit", *asked, "--progress-spinner", "off", *options]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        audited: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        why = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1].partition(": Max retries")[0]
        return UNKNOWN, f"Not audited: the advisories could not be had ({why}). Try again where osv.dev can be reached."
    if skipped := [f"{package['name']} ({package['skip_reason']})" for package in audited if "skip_reason" in package]:
        return UNKNOWN, f"Not audited: {', '.join(skipped)}."
    found = [(package, hole) for package in audited for hole in package["vulns"]]
    lines = [
        f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'no version yet'}. {hole['description']}"
        for package, hole in found
    ]
    return (FOUND if found else NOTHING), "\n".join([*lines, f"{len(audited)} packages audited, {len(found)} known vulnerabilities."])


if __name__ == "__main__":
    code, said = audit(requirements(), sys.argv[1:])
    print(said, file=sys.stdout if code == NOTHING else sys.stderr)
    sys.exit(code)
