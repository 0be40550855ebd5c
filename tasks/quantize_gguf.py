"""Stages `convert_gguf` and `quantize_gguf`: Hugging Face folder -> F16 GGUF -> smaller formats, by llama.cpp's own tools."""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import runpy
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

from tasks.base_model import NAME_CLASSES, name_no_code
from tasks.core import hardware, progress, settings
from tasks.core.file_hash import sha256_file
from tasks.core.manifests import checksum
from tasks.core.stage import StageConfig, stage
from tasks.domain.errors import UserError
from tasks.importance import as_parameter
from tasks.weights import open_gguf

GgufFormat = Literal["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K"]
UNWEIGHTED = ("F16", "Q8_0")  # formats which an importance matrix changes nothing of
MODEL_FILE = "model.gguf"
TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] ")  # how llama.cpp (llama-quant.cpp) begins what it says of a tensor, before it quantizes it
LOG_LINES = 8  # of what llama.cpp said last, for an error


class ConvertGgufConfig(StageConfig):
    """Nothing to choose: every format is made from F16.

    `converter` is the digest of another converter than was installed, see `convert_config`. Without one it is not in the key, which is that of
    the time before there was this field.
    """

    converter: str = ""

    def in_key(self) -> dict[str, Any]:
        return super().in_key() if self.converter else {}


def convert_config() -> ConvertGgufConfig:
    """The configuration for the converter of this machine: one that `CARTWRIGHT_LLAMA_CPP` names may make other files."""
    tree = settings.load_settings().llama_cpp
    if tree.resolve() == settings.installed_llama_cpp().resolve():
        return ConvertGgufConfig()
    files = [tree / "convert_hf_to_gguf.py", *tree.glob("conversion/**/*.py"), *tree.glob("gguf-py/**/*.py")]
    said = {path.relative_to(tree).as_posix(): sha256_file(path) for path in files if path.is_file()}
    return ConvertGgufConfig(converter=checksum(said))


class QuantizeGgufConfig(StageConfig):
    format: GgufFormat


def converter() -> Path:
    """llama.cpp's converter, of the same commit as the runtime.

    Raises:
        UserError: it is not installed.
    """
    script = settings.load_settings().llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise UserError("CARTWRIGHT_LLAMA_CPP", str(script.parent), "has no convert_hf_to_gguf.py", mend="Run `make install`")
    return script


@stage("convert_gguf", version=1, libraries=("llama-cpp-python", "transformers", "torch"), preloaded=True)
def convert_gguf(config: ConvertGgufConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Convert `inputs["model"]` into `model.gguf` with 16-bit weights.

    `inputs["untrimmed"]` is the base model, if its vocabulary was trimmed: the converter knows a tokenizer by the ids it gives a certain
    text, and looks at the tokenizer from before.

    Raises:
        RuntimeError: the converter does not know the model; the log says what it lacks.
    """
    output = out_dir / MODEL_FILE
    model = out_dir / "model"  # the converter writes the folder's name into the file
    model.mkdir()
    for path in inputs["model"].iterdir():
        if path.name in NAME_CLASSES:
            shutil.copy(path, model)
        else:
            link_or_copy(os.symlink, path, model / path.name)
    name_no_code(model)  # an artefact of an earlier version may
    run_program(converter(), str(model), "--outtype", "f16", "--outfile", str(output), recognized_by=inputs.get("untrimmed"))
    shutil.rmtree(model)
    return {"format": "F16", **describe(output)}


def link_or_copy(link: Callable[[Path, Path], None], source: Path, target: Path) -> None:
    """Give a file a second name by `os.link` or `os.symlink`, or copy it: not every file system has links, or lets everyone make them."""
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_program(script: Path, *arguments: str, recognized_by: Path | None = None) -> None:
    """Run a Python program of llama.cpp in this process, which need not import torch and transformers anew for it.

    It brings its own gguf-py, of its commit, which must not be mixed with the installed one. It trusts the code that a model brings, as we
    do not: none is loaded.

    Args:
        recognized_by: folder of a tokenizer that the converter is to look at when it wants to know which kind the model has.
    """
    from transformers import dynamic_module_utils

    def refuse(class_name: str, module_path: str, **_: Any) -> NoReturn:
        raise RuntimeError(
            f"the model's own code, {class_name} of {module_path}, is not run; only what transformers itself knows is converted"
        )

    load_class = dynamic_module_utils.get_class_in_module
    brought = {"gguf", "conversion"}

    def take_out() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in brought}

    argv, path, installed = sys.argv, sys.path[:], take_out()
    try:
        sys.argv = [str(script), *arguments]
        sys.path.insert(0, str(script.parent))
        dynamic_module_utils.get_class_in_module = refuse
        if recognized_by:
            recognize_by(recognized_by)
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{script.name} gave up ({end.code})") from None
    finally:
        dynamic_module_utils.get_class_in_module = load_class
        take_out()
        sys.argv, sys.path[:] = argv, path
        sys.modules.update(installed)


def recognize_by(untrimmed: Path) -> None:
    """Let the converter, which is about to run, tell how texts are cut into words from this folder's tokenizer: a trimmed one cuts them alike."""
    from transformers import AutoTokenizer

    try:
        model: Any = importlib.import_module("conversion.base").TextModel
    except (ImportError, AttributeError):
        raise RuntimeError(
            "this llama.cpp's converter cannot be told which tokenizer was trimmed; the one that `make install` brings can"
        ) from None
    recognized = model.get_vocab_base_pre
    whole = AutoTokenizer.from_pretrained(untrimmed, trust_remote_code=False)
    model.get_vocab_base_pre = lambda self, tokenizer: recognized(self, whole)


@stage("quantize_gguf", version=1, libraries=("llama-cpp-python",))
def quantize_gguf(config: QuantizeGgufConfig, inputs: Mapping[str, Path], out_dir: Path) -> dict[str, Any]:
    """Quantize the F16 file `inputs["gguf"]` into `model.gguf`, weighted by `inputs["importance"]`, if that is given."""
    source, output = inputs["gguf"] / MODEL_FILE, out_dir / MODEL_FILE
    if config.format == "F16":
        link_or_copy(os.link, source, output)
        return {"format": "F16", **describe(output)}
    matrix, _kept = as_parameter(inputs["importance"]) if "importance" in inputs else (None, None)
    quantize(source, output, config.format, matrix, on_tensor=lambda done, total: progress.advance(done, total, "tensors"))
    return {"format": config.format, **describe(output)}


def quantize(
    source: Path,
    output: Path,
    kind: str,
    importance: Any = None,
    types: Mapping[str, str] | None = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Quantize a GGUF file.

    Args:
        importance: an importance matrix as llama.cpp takes it, see `tasks.importance.as_parameter`.
        types: type of single tensors by name, where it is not to be what `kind` gives them.
        on_tensor: told before each tensor how many are finished, and of how many.

    Raises:
        RuntimeError: llama.cpp cannot do it, and why.
    """
    import llama_cpp.llama_cpp as api

    said: deque[str] = deque(maxlen=LOG_LINES)

    @api.llama_log_callback
    def hear(level: int, text: bytes, user_data: Any) -> None:
        line = text.decode(errors="replace")
        said.append(line)
        sys.stderr.write(line)  # the stage's log
        if tensor := TENSOR.match(line):
            on_tensor(int(tensor[1]) - 1, int(tensor[2]))

    parameters = api.llama_model_quantize_default_params()
    parameters.nthread = hardware.cores()
    parameters.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if importance is not None:
        parameters.imatrix = importance
    overrides = (api.llama_model_tensor_override * (len(types or {}) + 1))()  # ends with an entry without a pattern
    for entry, (name, type_name) in zip(overrides, (types or {}).items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = getattr(api, f"GGML_TYPE_{type_name}")
    if types:
        parameters.tt_overrides = overrides
        for field, name in (("token_embedding_type", "token_embd.weight"), ("output_tensor_type", "output.weight")):
            if name in types:  # these two have settings of their own
                setattr(parameters, field, getattr(api, f"GGML_TYPE_{types[name]}"))
    before, data = api.llama_log_callback(), ctypes.c_void_p()
    api.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    api.llama_log_set(hear, ctypes.c_void_p(0))
    try:
        code = api.llama_model_quantize(str(source).encode(), str(output).encode(), parameters)
    finally:
        api.llama_log_set(before, data)  # before ours goes away
    if code:
        failures = [line for line in "".join(said).splitlines() if "failed" in line]
        raise RuntimeError(f"llama.cpp cannot quantize to {kind}: {failures[-1][-300:] if failures else 'it does not say why'}")


def describe(path: Path) -> dict[str, Any]:
    """What a GGUF file really holds: number of tensors by type, and bits per weight over all of them.

    llama.cpp falls back to another type where a dimension does not fit, so the name of a format is not enough.
    """
    tensors = open_gguf(path).tensors
    bits = sum(int(tensor.n_bytes) * 8 for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
    return {
        "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in tensors)),
        "bits_per_weight": round(bits, 3),
        "size_mb": round(path.stat().st_size / 1e6, 3),
    }
