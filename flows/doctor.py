"""What `cartwright doctor` looks at."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from tasks.core.settings import Settings, asked_threads, check_home
from tasks.domain.errors import UserError


def checks_of(settings: Settings) -> Iterator[tuple[bool, str, str]]:
    """Each check: whether it is good, its name, and a word on it."""
    from tasks.base_model import offline_gguf
    from tasks.config import profiles
    from tasks.core import hardware
    from tasks.core.artifacts import Store
    from tasks.quantize_gguf import converter

    def attempt(name: str, action: Callable[[], Any]) -> tuple[bool, str, str]:
        try:
            return True, name, str(action() or "")
        except UserError as error:
            return False, name, str(error)

    for name, fact in machine_facts().items():
        yield True, name, fact
    for library, version in hardware.versions().items():
        yield version != "missing", library, version
    yield attempt("offline base model", offline_gguf)
    yield attempt("GGUF converter", converter)
    yield attempt("store can be written", lambda: Store(settings.store_uri, settings.home).check_writable())
    yield attempt("room for a quick run", functools.partial(_room, settings))
    for profile in profiles():
        if profile != "paper":  # its base model is on a hub
            yield attempt(f"profile {profile}", functools.partial(_valid_profile, profile))


def machine_facts() -> dict[str, str]:
    """What the machine is and has, and what that means for training; nothing of it stops a run."""
    from tasks.core import hardware

    facts, lacks = hardware.environment(), hardware.lacks_to_compile()
    has = {"AMX": hardware.has_amx(), "bfloat16": hardware.native_bf16(), "8-bit integers (VNNI)": hardware.native_int8()}
    return {
        "processor": f"{facts['cpu']}, {facts['cores']} cores{' (OMP_NUM_THREADS)' if asked_threads() else ''}, {facts['ram_gb']} GB",
        "instructions": ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in has.items()),
        "GPU": facts["gpu"] or "none: GPTQ runs on the CPU, no GPU figures",
        "training": _training(),
        "torch.compile": f"not used, training is slower: it needs {' and '.join(lacks)}" if lacks else "used in training",
    }


def _training() -> str:
    """What training computes in here; the README says how long that takes."""
    from tasks.core import hardware
    from tasks.qlora import FinetuneConfig, resolve_precision

    if hardware.gpu():
        return "in bfloat16, on the GPU"
    if hardware.has_amx():
        return "in bfloat16 by AMX, the quickest on a processor"
    return {
        "int8": "in 8-bit integers and bfloat16, slower than with AMX",
        "bf16": "in bfloat16, slower than with AMX",
        "fp32": "in float32, three to four times as long as where bfloat16 is multiplied",
    }[resolve_precision(FinetuneConfig())]


def _room(settings: Settings) -> str:
    from tasks.config import disk_needed, load_config

    check_home(settings)
    existing = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free / 1e9, disk_needed(load_config("quick")) / 1e9
    if free < needed:
        raise UserError(
            "CARTWRIGHT_HOME", str(settings.home), f"has {free:.1f} GB free; a quick run asks for {needed:.1f}", mend="Free space"
        )
    return f"{free:.1f} GB free; a quick run asks for {needed:.1f}"


def _valid_profile(profile: str) -> str:
    from tasks.config import load_config, resolve

    return "valid, key " + resolve(load_config(profile)).key()
