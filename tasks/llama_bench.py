"""Stage `llama_bench`: llama.cpp's own benchmark on a GGUF file, a check on `benchmark`'s prefill and decode."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tasks.core import hardware, settings
from tasks.core.lifetime import tied
from tasks.core.stage import MEASURED, StageConfig, stage
from tasks.domain.errors import UserError
from tasks.quantize_gguf import MODEL_FILE

PROGRAM = "llama-bench"


class LlamaBenchConfig(StageConfig):
    """The lengths are those of `benchmark`, whose figures are compared."""

    prefill_tokens: int = Field(512, ge=16, le=8192)
    decode_tokens: int = Field(128, ge=8, le=8192)
    repeats: int = Field(5, ge=1, le=100)
    run: int = Field(0, ge=0, description="Which of the runs this is; filled in by the flow")


def program() -> Path:
    """llama-bench, compiled from the sources and with the flags of the libraries that serve the model.

    Raises:
        UserError: it was not built.
    """
    path = settings.load_settings().llama_cpp / PROGRAM
    if not path.is_file():
        raise UserError("benchmark.llama_bench", True, f"needs {path}, which is not there", mend="Build it with `make llama-bench`")
    return path


@stage("llama_bench", version=1, libraries=("llama-cpp-python",), measures=True, varies=MEASURED)
def llama_bench(config: LlamaBenchConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Run llama-bench on `inputs["model"]`, weights read and not mapped, as our runtime does; writes its own `llama-bench.json`."""
    lengths = ["-p", str(config.prefill_tokens), "-n", str(config.decode_tokens), "-r", str(config.repeats)]
    command = tied(str(program()), "-m", str(inputs["model"] / MODEL_FILE), *lengths)
    settled = ["-t", str(hardware.cores()), "-ngl", "0", "-lm", "none", "-o", "json"]
    done = subprocess.run([*command, *settled], capture_output=True, text=True, env=settings.child_environment())
    if done.returncode:
        raise RuntimeError(f"llama-bench ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    (out_dir / "llama-bench.json").write_text(done.stdout, encoding="utf-8")
    found = json.loads(done.stdout)
    prefill = next(test for test in found if test["n_prompt"])
    decode = next(test for test in found if test["n_gen"])
    return {
        "prefill_tok_s": prefill["avg_ts"],
        "prefill_stddev": prefill["stddev_ts"],
        "decode_tok_s": decode["avg_ts"],
        "decode_stddev": decode["stddev_ts"],
        "build_commit": prefill["build_commit"],
        "threads": prefill["n_threads"],
    }
