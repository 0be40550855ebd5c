"""The bill of materials: true to what is installed and made, and to the schema of CycloneDX."""

from __future__ import annotations

import copy
import functools
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tasks.base_model import OFFLINE, BaseModelConfig
from tasks.core import packages
from tasks.core.manifests import Manifest, describe_files, digest_of
from tasks.core.packages import Package, installed
from tasks.sbom import SBOM, sbom, write_sbom

pytestmark = pytest.mark.fast
SCHEMAS = Path(str(metadata.distribution("cyclonedx-python-lib").locate_file("cyclonedx/schema/_res")))
REPORT = {"run_id": "20261126-smoke", "finished": "2026-11-26T05:34:21+00:00", "git": {"commit": "0a1b", "dirty": False},
          "environment": {"python": "3.11.2", "cpu": "AMD EPYC", "gpu": None}}  # fmt: skip
BASE = BaseModelConfig(source=OFFLINE, revision="ab" * 32)


def manifest(folder: Path, kind: str, text: str, **inputs: Manifest) -> Manifest:
    """An artefact of one file, as a stage leaves it."""
    (folder / kind).mkdir()
    (folder / kind / "model.gguf").write_text(text)
    files = describe_files(folder / kind)
    return Manifest(kind=kind, key="f" * 64, version=1, config={}, inputs={name: made.digest for name, made in inputs.items()}, files=files,
                    digest=digest_of(files), metrics={}, libraries={}, hardware="", wall_s=1, peak_rss_mb=None, created="")  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Manifest]:
    dataset = manifest(tmp_path, "synthesize", "rows")
    base = manifest(tmp_path, "base_model", "base")
    adapter = manifest(tmp_path, "finetune", "adapter", base=base, dataset=dataset)
    return {"dataset": dataset, "base": base, "adapter": adapter, "tuned": manifest(tmp_path, "merge", "tuned", base=base, adapter=adapter)}


def bill_of(made: dict[str, Manifest], packages: list[Package]) -> dict[str, Any]:
    models = {"base-bf16": made["base"], "base-bf16-few-shot": made["base"], "tuned-fp16": made["tuned"]}
    return sbom(REPORT, packages, BASE, made["dataset"], made["adapter"], models)


@functools.cache
def validator() -> Any:
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT7

    names = {"spdx": "spdx.SNAPSHOT.schema.json", "jsf-0.82": "jsf-0.82.SNAPSHOT.schema.json"}
    others = {
        f"http://cyclonedx.org/schema/{name}.SNAPSHOT.schema.json": json.loads((SCHEMAS / file).read_text()) for name, file in names.items()
    }
    registry: Registry[Any] = Registry().with_resources([(uri, Resource(contents=s, specification=DRAFT7)) for uri, s in others.items()])
    return Draft7Validator(json.loads((SCHEMAS / "bom-1.6.SNAPSHOT.schema.json").read_text()), registry=registry)


def test_the_bill_of_this_environment_fits_the_schema(made: dict[str, Manifest]) -> None:
    bill = bill_of(made, installed())
    assert not [error.message for error in validator().iter_errors(bill)]
    wrong = copy.deepcopy(bill)
    wrong["components"][0]["type"] = "package"
    wrong["components"][-1]["components"][0]["hashes"][0]["content"] = "no digest"
    assert len(list(validator().iter_errors(wrong))) == 2
    refs = [component["bom-ref"] for component in bill["components"]]
    assert len(refs) == len(set(refs))
    known = {*refs, bill["metadata"]["component"]["bom-ref"]}
    assert all({edge["ref"], *edge["dependsOn"]} <= known for edge in bill["dependencies"])


def test_packages_models_and_files_are_in_it_with_hashes_and_what_they_came_from(made: dict[str, Manifest]) -> None:
    bill = bill_of(made, [Package("torch", "2.13.0+cpu", "BSD-3-Clause"), Package("ruamel.yaml", "0.19.1", "BSD"), Package("x", "1", "")])
    found = {component["name"]: component for component in bill["components"]}
    assert found["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu" and found["torch"]["licenses"] == [{"expression": "BSD-3-Clause"}]
    assert found["ruamel.yaml"]["purl"] == "pkg:pypi/ruamel-yaml@0.19.1" and found["ruamel.yaml"]["licenses"] == [
        {"license": {"name": "BSD"}}
    ]
    assert "licenses" not in found["x"]
    assert found[OFFLINE]["hashes"] == [{"alg": "SHA-256", "content": "ab" * 32}]
    (file,) = found["tuned-fp16"]["components"]
    assert file["name"] == "model.gguf" and file["hashes"][0]["content"] == made["tuned"].files["model.gguf"].sha256
    assert "base-bf16-few-shot" not in found  # the same artefact as base-bf16
    assert {"name": "cartwright:variant", "value": "base-bf16-few-shot"} in found["base-bf16"]["properties"]
    needs = {edge["ref"]: edge["dependsOn"] for edge in bill["dependencies"]}
    ref = {name: component["bom-ref"] for name, component in found.items()}
    assert needs[ref["tuned-fp16"]] == sorted([ref["base-bf16"], ref["adapter"]])
    assert needs[ref["base-bf16"]] == [ref[OFFLINE]]


def test_a_file_made_from_what_is_not_listed_says_so_and_not_that_it_needs_nothing(made: dict[str, Manifest], tmp_path: Path) -> None:
    converted = manifest(tmp_path, "convert_gguf", "16 bit", model=made["tuned"])
    small = manifest(tmp_path, "quantize_gguf", "4 bit", gguf=converted)
    bill = sbom(REPORT, [], BASE, made["dataset"], made["adapter"], {"gguf-Q4_0": small})
    (component,) = [component for component in bill["components"] if component["name"] == "gguf-Q4_0"]
    assert {"name": "cartwright:input.gguf", "value": converted.digest} in component["properties"]
    assert component["bom-ref"] not in {edge["ref"] for edge in bill["dependencies"]}


def test_a_model_of_ones_own_has_neither_our_licence_nor_a_hash_that_is_none(made: dict[str, Manifest]) -> None:
    other = BaseModelConfig(source="meta-llama/Llama-3.2-1B-Instruct", revision="9213176")
    bill = sbom(REPORT, [], other, made["dataset"], made["adapter"], {"base": made["base"]})
    assert not {"licenses", "hashes"} & set(bill["components"][0])


def test_what_is_installed_is_what_importlib_says(made: dict[str, Manifest], tmp_path: Path) -> None:
    mine = {package.name: package for package in installed()}
    for name in ("numpy", "mlflow", "pydantic", "ruamel.yaml"):
        assert mine[name].version == metadata.version(name)
    assert mine["numpy"].licence.startswith("BSD") and mine["pydantic"].licence == "MIT"
    started = time.process_time()
    write_sbom(tmp_path / SBOM, REPORT, BASE, made["dataset"], made["adapter"], {"base": made["base"]})
    assert time.process_time() - started < 0.5  # 0.1 s; the e-mail parser of importlib.metadata would take it 1 s
    assert len(json.loads((tmp_path / SBOM).read_text())["components"]) > len(mine)


@pytest.mark.parametrize(
    ("headers", "licence"),
    [
        ([("License-Expression", "MIT AND PSF-2.0"), ("License", "MIT")], "MIT AND PSF-2.0"),
        ([("License", "Apache License, Version 2.0")], "Apache-2.0"),
        ([("License", "Copyright 2018 A. Body"), ("Classifier", "License :: OSI Approved :: MIT License")], "MIT"),
        ([("License", "Dual License"), ("Classifier", "License :: OSI Approved :: MIT License"),
          ("Classifier", "License :: OSI Approved :: BSD License")], "MIT OR BSD"),
        ([("License", "Ask Me Ltd")], "Ask Me Ltd"),
        ([("Classifier", "License :: OSI Approved")], ""),
        ([("Classifier", "Topic :: Licensing :: MIT License")], ""),
    ],
)  # fmt: skip
def test_a_licence_is_read_from_what_a_package_says(headers: list[tuple[str, str]], licence: str) -> None:
    assert packages._package([("Name", "some"), *headers]).licence == licence
