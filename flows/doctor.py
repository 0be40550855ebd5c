"""What `cartwright doctor` looks at."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from tasks.core.settings import Settings, asked_threads
from tasks.domain.errors import UserError


def checks_of(settings: Settings) -> Iterator[tuple[bool, str, str]]:
    """Each check: whether it is good, its name, and a word on it."""
    from tasks.base_model import offline_gguf
    from tasks.config import disk_needed, load_config, profiles
    from tasks.core import hardware
    from tasks.core.artifacts import Store
    from tasks.quantize_gguf import converter

    def attempt(name: str, action: Callable[[], Any]) -> tuple[bool, str, str]:
        try:
            return True, name, str(action() or "")
        except UserError as error:
            return False, name, str(error)

    facts = hardware.environment()
    slow = "multiplies no bfloat16: training takes about six times as long"
    multiplies = "multiplies bfloat16" if hardware.native_bf16() else slow
    yield (
        True,
        "processor",
        f"{facts['cpu']}, {facts['cores']} cores{' (OMP_NUM_THREADS)' if asked_threads() else ''}, {facts['ram_gb']} GB, {multiplies}",
    )
    yield True, "GPU", facts["gpu"] or "none: GPTQ runs on the CPU, no GPU figures"
    for library, version in hardware.versions().items():
        yield version != "missing", library, version
    yield attempt("offline base model", offline_gguf)
    yield attempt("GGUF converter", converter)
    yield attempt("store can be written", lambda: Store(settings.store_uri, settings.home).check_writable())
    existing = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = shutil.disk_usage(existing).free / 1e9
    needed = disk_needed(load_config("quick")) / 1e9
    yield free > needed, "disk", f"{free:.1f} GB free; a quick run asks for {needed:.1f}"
    for profile in profiles():
        if profile != "paper":  # its base model is on a hub
            yield attempt(f"profile {profile}", functools.partial(_valid_profile, profile))


def _valid_profile(profile: str) -> str:
    from tasks.config import load_config, resolve

    return "valid, key " + resolve(load_config(profile)).key()
