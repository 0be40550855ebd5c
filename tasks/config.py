"""A run's whole configuration: profiles, overrides, and one clear message for whatever does not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tasks.base_model import BaseModelConfig, base_model, size_16bit
from tasks.benchmark import BenchmarkConfig
from tasks.core.artifacts import Store
from tasks.core.file_hash import sha256_file
from tasks.core.manifests import canonical_json
from tasks.decide import DecideConfig
from tasks.domain.errors import UserError
from tasks.domain.labelled import read_labelled, read_training
from tasks.domain.spec import line_of, load_spec, load_yaml
from tasks.evaluate import EvaluateConfig
from tasks.evaluate_api import EvaluateApiConfig
from tasks.evaluate_api import check as check_apis
from tasks.fidelity import ReferenceLogitsConfig
from tasks.gate import RegisterConfig
from tasks.importance import ImportanceConfig
from tasks.llama_bench import program as llama_bench_program
from tasks.merge import MergeConfig
from tasks.overrides import explained, with_overrides
from tasks.qlora import FinetuneConfig
from tasks.quantize_awq import QuantizeAwqConfig
from tasks.quantize_gguf import UNWEIGHTED, GgufFormat, converter
from tasks.quantize_gptq import QuantizeGptqConfig, choose_group_size
from tasks.search_gguf import SearchGgufConfig
from tasks.synthesize import SynthesizeConfig, domain_digest, make_generator
from tasks.teach import TeacherConfig, check_teacher
from tasks.trim_vocabulary import VocabularyConfig, check_source

Measured = TypeVar("Measured", EvaluateConfig, BenchmarkConfig)
Asked = TypeVar("Asked", EvaluateConfig, tuple[EvaluateApiConfig, ...])
RUN_KEY = 4  # characters of a configuration's key in the name of a run
EVALUATED = ("test", "hard", "validation")
MEASURED_BESIDE = {"constrained": "constrained", "mmap": "benchmark.mapped_too"}  # the switch for what is no variant's usual way
BAD_LINES_SHOWN = 20  # of each labelled file
PROFILES = Path(__file__).resolve().parents[1] / "deployments" / "profiles"


class RunConfig(BaseModel):
    """Everything a run depends on. Profiles in `deployments/profiles/` are values of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str
    base_model: BaseModelConfig = BaseModelConfig()
    data: SynthesizeConfig = SynthesizeConfig()
    teacher: TeacherConfig = TeacherConfig()
    vocabulary: VocabularyConfig = VocabularyConfig()
    train: FinetuneConfig = FinetuneConfig()
    merge: MergeConfig = MergeConfig()
    gguf: tuple[GgufFormat, ...] = Field(
        ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0"), min_length=1, description="GGUF formats to make"
    )
    gguf_importance: Literal["without", "with", "both"] = Field(
        "with", description="Make GGUF formats below 8 bits with an importance matrix, without, or both to compare them"
    )
    importance: ImportanceConfig = ImportanceConfig()
    gguf_search: SearchGgufConfig | None = Field(
        None,
        description="Make a GGUF file of mixed precision too: `{}` the smallest there is, `{max_kld: 0.006}` the smallest that diverges no more",
    )
    gptq: tuple[QuantizeGptqConfig, ...] = Field((QuantizeGptqConfig(),), description="GPTQ variants to make")
    awq: tuple[QuantizeAwqConfig, ...] = Field((), description="AWQ variants to make; `[{}]` makes one with the usual settings")
    baselines: tuple[Literal["float32", "bfloat16"], ...] = Field((), description="Further precisions to measure the 16-bit model in")
    constrained: bool = Field(False, description="Measure GGUF variants once more with every answer kept to the grammar of the domain")
    base_few_shot: int = Field(0, ge=0, le=32, description="Ask the base model once more, with so many examples; 0 leaves that out")
    api: tuple[EvaluateApiConfig, ...] = Field((), description="Models behind an API to ask the same rows, for contrast")
    evaluate: EvaluateConfig = EvaluateConfig()
    fidelity: ReferenceLogitsConfig = ReferenceLogitsConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    decide: DecideConfig = DecideConfig()
    registry: RegisterConfig = RegisterConfig()

    @field_validator("evaluate", "api")
    @classmethod
    def _splits_are_those_of_a_data_set(cls, value: Asked) -> Asked:
        for asked in value if isinstance(value, tuple) else (value,):
            if "test" not in asked.splits or set(asked.splits) - set(EVALUATED):
                raise ValueError(
                    f"splits = {list(asked.splits)}: some of {', '.join(EVALUATED)}, with `test`, by which variants are compared"
                )
        return value

    @field_validator("evaluate", "benchmark")
    @classmethod
    def _what_each_variant_decides_is_not_set(cls, value: Measured) -> Measured:
        for name in ("runtime", "zero_shot", "few_shot", *(("dtype", "run") if isinstance(value, BenchmarkConfig) else ("kernel",))):
            if getattr(value, name) != type(value).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(value, name)!r} is filled in for each variant and cannot be set")
        for name, instead in MEASURED_BESIDE.items():
            if getattr(value, name, False):
                raise ValueError(f"{name} = True is measured of GGUF variants, beside the usual. Set {instead}=true")
        return value

    @field_validator("decide")
    @classmethod
    def _what_decides_is_measured(cls, value: DecideConfig, info: ValidationInfo) -> DecideConfig:
        if (benchmark := info.data.get("benchmark")) is None:  # it has an error of its own
            return value
        loads = sorted({min(load, benchmark.batched_requests) for load in (1, benchmark.parallel, *benchmark.loads)})
        if value.at_a_time is not None and value.at_a_time not in loads:
            raise ValueError(
                f"at_a_time = {value.at_a_time}: what is measured is {', '.join(map(str, loads))} at a time. "
                f"Set benchmark.loads=[{value.at_a_time}] and benchmark.batched_requests to as many or more"
            )
        return value

    @field_validator("gguf", "gptq", "awq", "baselines")
    @classmethod
    def _no_variant_stands_twice(cls, value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        names = [item if isinstance(item, str) else gptq_name(str(info.field_name), item) for item in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"{twice} is listed twice" + ("" if isinstance(value[0], str) else "; its variants differ by bits and group_size")
            )
        return value

    def gguf_kinds(self) -> list[tuple[GgufFormat, bool]]:
        """The GGUF variants to make: format, and whether an importance matrix weights its rounding."""
        wanted = {"without": (False,), "with": (True,), "both": (False, True)}[self.gguf_importance]
        return [(kind, weighted) for kind in self.gguf for weighted in ((False,) if kind in UNWEIGHTED else wanted)]

    def key(self) -> str:
        """Hash of the whole configuration: what makes two pipeline runs the same one."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()[:16]


def gptq_name(format_: str, config: QuantizeGptqConfig | QuantizeAwqConfig) -> str:
    """What a variant of `gptq` or `awq` is called."""
    return f"{format_}-{config.bits}bit" + (f"-g{config.group_size}" if config.group_size else "")


def profiles() -> list[str]:
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_config(profile: str, overrides: dict[str, Any] | None = None) -> RunConfig:
    """The configuration of a profile with some fields changed.

    Args:
        overrides: values by dotted name, such as `{"train.epochs": 2}`.

    Raises:
        UserError: unknown profile or field, or a value that is not allowed; of a profile's file with its line.
    """
    if profile not in profiles():
        raise UserError("profile", profile, "is unknown", allowed=profiles())
    if "profile" in (overrides or {}):
        raise UserError("profile", (overrides or {})["profile"], "is not a field to set", mend="Choose it with --profile")
    values = {"profile": profile, **_fields_of(PROFILES / f"{profile}.yaml")}
    return with_overrides(RunConfig, values, overrides or {})


def _fields_of(path: Path) -> dict[str, Any]:
    """What a profile's file says, checked by itself, so that what is wrong in it is told from an override."""
    fields = load_yaml(path) or {}
    if not isinstance(fields, dict):
        raise UserError("file", f"{path}:1", "is not a mapping", mend="Write fields, such as `train: {epochs: 2}`")
    try:
        RunConfig.model_validate({"profile": path.stem, **fields})
    except ValidationError as error:
        where = f"{path}:{line_of(path, error.errors()[0]['loc'])}"
        raise UserError(where, None, str(explained(error, RunConfig))) from None
    return fields


@lru_cache(maxsize=1)
def _check_banks(data: SynthesizeConfig) -> None:
    """Once a process: a command checks before it starts servers, and so does the flow, which may have been started elsewhere."""
    make_generator(data)


def resolve(config: RunConfig, quantizes: bool = True) -> RunConfig:
    """Check what the configuration points at, before any work, and fill in the digests that make it exact.

    Args:
        quantizes: the model is to be quantized, as in a run; an ablation only trains.

    Raises:
        UserError: an unknown language or intent, a broken domain file, a base model that cannot be used, no GGUF
            converter, an unknown API, a misconfigured teacher.
    """
    from tasks.base_model import dimensions
    from tasks.base_model import resolve as resolve_base_model

    spec = load_spec(config.data.domain)
    if "languages" not in config.data.model_fields_set:
        config = config.model_copy(update={"data": config.data.model_copy(update={"languages": tuple(spec.languages)})})
    _known("data.languages", config.data.languages, spec.languages)
    _known("data.intents", config.data.intents, list(spec.intents))
    digest = domain_digest(config.data.domain)
    _check_banks(config.data.model_copy(update={"domain_sha256": digest}))
    if config.api:
        check_apis(config.api)
    check_teacher(config.data, config.teacher)
    if config.data.validation_rows <= config.fidelity.skip:
        problem = f"leaves out all of data.validation_rows = {config.data.validation_rows}, on which variants are judged"
        raise UserError("fidelity.skip", config.fidelity.skip, problem, mend="Take fewer")
    if config.gguf_search and config.data.validation_rows <= (seen := config.fidelity.skip + config.fidelity.rows):
        problem = f"leaves no row for gguf_search beside the {seen} by which variants are judged"
        raise UserError("data.validation_rows", config.data.validation_rows, problem, mend=f"Take more than {seen}, or fewer fidelity.rows")
    if quantizes:
        script = converter()  # there is always a GGUF format to make
        if config.vocabulary.tokens and not (script.parent / "conversion" / "base.py").is_file():
            problem = "has a converter that cannot be shown the tokenizer from before vocabulary.tokens"
            raise UserError("CARTWRIGHT_LLAMA_CPP", str(script.parent), problem, mend="Take a newer one, or set vocabulary.tokens=null")
    if config.benchmark.llama_bench:
        llama_bench_program()
    for field, path, rows, bad in _own_rows(config):
        if not rows:
            mend = 'Write lines such as {"text": "my cart", "gold": {"intent": "view_cart"}}'
            raise UserError(field, path, f"has no usable row{f' (line {bad[0][0]}: {bad[0][1]})' if bad else ''}", mend=mend)
    base_model = resolve_base_model(config.base_model)
    check_source(config.vocabulary, base_model)
    sizes = dimensions(base_model) if quantizes and (config.gptq or config.awq) else []
    for kind, wanted in (("gptq", [v.group_size for v in config.gptq]), ("awq", [v.group_size for v in config.awq])):
        for number, group_size in enumerate(wanted if sizes else ()):
            choose_group_size(group_size, sizes, f"{kind}.{number}.group_size")
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"domain_sha256": digest, "extra_sha256": tuple(map(_digest, config.data.extra))}),
            "base_model": base_model,
            "registry": config.registry.model_copy(
                update={
                    "own_rows": tuple(str(Path(path).absolute()) for path in config.registry.own_rows),
                    "own_rows_sha256": tuple(map(_digest, config.registry.own_rows)),
                }
            ),
        }
    )


def left_out(config: RunConfig) -> Iterator[str]:
    """What a person is told of lines of labelled files that a run will not use: the first of each file, and how many there are."""
    for field, path, _, bad in _own_rows(config):
        for line, problem in bad[:BAD_LINES_SHOWN]:
            yield f"{field} {path}, line {line}: {problem}"
        if len(bad) > BAD_LINES_SHOWN:
            yield f"{field} {path}: {len(bad) - BAD_LINES_SHOWN} more lines cannot be used"


def _own_rows(config: RunConfig) -> Iterator[tuple[str, str, list[dict[str, Any]], list[tuple[int, str]]]]:
    """Of each labelled file its field, path, usable rows, and the lines that are none."""
    spec = load_spec(config.data.domain)
    for path in config.data.extra:
        yield ("data.extra", path, *read_training(Path(path), spec, "data.extra"))
    for path in config.registry.own_rows:
        yield ("registry.own_rows", path, *read_labelled(Path(path), spec, "registry.own_rows"))


def _digest(path: str) -> str:
    return sha256_file(Path(path))


def disk_needed(config: RunConfig) -> int:
    """About how many bytes a run adds to the disk: base, merged model and checkpoints, every variant, and MLflow's copies."""
    return size_16bit(config.base_model) * (
        4 + len(config.gguf_kinds()) + bool(config.gguf_search) + bool(config.vocabulary.tokens) + len(config.gptq) + len(config.awq)
    )


def check_room(config: RunConfig, store: Store, home: Path) -> None:
    """Whether the store can be written and has room for a run.

    One that has begun was asked before, and has taken some of it since. Of another one with the same base model much may be there, or
    nothing: only an adapter and a merged model are asked for, so that a changed limit is not refused on a small disk.

    Raises:
        UserError: it cannot, or has not.
    """
    known = store.path("base_model", base_model.key(config.base_model, {})).exists()
    begun = known and any((home / "logs").glob(f"*-{config.profile}-{config.key()[:RUN_KEY]}"))
    store.check_writable(0 if begun else 2 * size_16bit(config.base_model) if known else disk_needed(config))


def _known(field: str, values: tuple[str, ...], allowed: list[str]) -> None:
    for value in values:
        if value not in allowed:
            raise UserError(field, value, "is unknown", allowed=allowed)
        if values.count(value) > 1:
            raise UserError(field, value, "is listed twice", mend="Name it once")


def dump(config: RunConfig) -> str:
    """The configuration as JSON, to be shown and kept."""
    return json.dumps(config.model_dump(mode="json"), indent=2)
