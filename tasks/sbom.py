"""The bill of materials of a run: what was installed, what it started from and what it made, as CycloneDX 1.6 JSON.

The format: https://cyclonedx.org/docs/1.6/json/. A test holds it against the schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tasks.base_model import OFFLINE, TINY, BaseModelConfig
from tasks.core.manifests import Manifest
from tasks.core.packages import Package, installed

SBOM = "sbom.cdx.json"
MODEL = "machine-learning-model"
OFFLINE_LICENCE = "Apache-2.0"  # of SmolLM2-135M-Instruct, by the card of HuggingFaceTB/SmolLM2-135M-Instruct
Json = dict[str, Any]


def write_sbom(
    path: Path, report: Mapping[str, Any], base: BaseModelConfig, dataset: Manifest, adapter: Manifest, models: Mapping[str, Manifest]
) -> None:
    """Write the bill of materials of the run that `report` is about.

    Packages are those of this process; stages on workers have environments of their own, of which their manifests name the libraries.
    """
    bill = sbom(report, installed(), base, dataset, adapter, models)
    path.write_text(json.dumps(bill, indent=1, ensure_ascii=False), encoding="utf-8")


def sbom(
    report: Mapping[str, Any],
    packages: Iterable[Package],
    base: BaseModelConfig,
    dataset: Manifest,
    adapter: Manifest,
    models: Mapping[str, Manifest],
) -> Json:
    """A CycloneDX document: packages as libraries, the base model's source, and each artefact with the SHA-256 of its files.

    Args:
        report: `run_id`, `finished`, `git` and `environment` of the report contract.
        models: artefacts by the variants that use them; one artefact may serve several.
    """
    libraries = [_library(package) for package in packages]
    source = _source(base)
    made: dict[str, Json] = {_ref(dataset): _artefact("data", "dataset", dataset), _ref(adapter): _artefact(MODEL, "adapter", adapter)}
    for name, manifest in models.items():
        component = made.setdefault(_ref(manifest), _artefact(MODEL, name, manifest))
        component["properties"].append(_property("variant", name))
    run, manifests = f"cartwright:{report['run_id']}", (dataset, adapter, *models.values())
    refs = {manifest.digest: _ref(manifest) for manifest in manifests}
    needs = {_ref(manifest): {refs[digest] for digest in manifest.inputs.values() if digest in refs} for manifest in manifests}
    # Made from what is not listed, as a GGUF file is from its 16-bit conversion: then its property `input` tells, and no edge says "nothing".
    needs = {_ref(manifest): needs[_ref(manifest)] for manifest in manifests if needs[_ref(manifest)] or not manifest.inputs}
    needs |= {_ref(manifest): {source["bom-ref"]} for manifest in manifests if manifest.kind == "base_model"}
    if adapter.inputs.get("base_model") not in refs:  # trained with another vocabulary: made from the base model all the same
        needs.setdefault(_ref(adapter), set()).add(source["bom-ref"])
    needs[run] = {*(library["bom-ref"] for library in libraries), *made}
    git, machine = report["git"], report["environment"]
    facts = {
        "git.commit": git["commit"],
        "git.dirty": git["dirty"],
        "python": machine["python"],
        "cpu": machine["cpu"],
        "gpu": machine["gpu"],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, run)}",
        "version": 1,
        "metadata": {
            "timestamp": report["finished"],
            "component": {"type": "application", "bom-ref": run, "name": "cartwright", "version": report["run_id"]},
            "properties": [_property(name, value) for name, value in facts.items() if value is not None],
        },
        "components": [*libraries, source, *made.values()],
        "dependencies": [{"ref": ref, "dependsOn": sorted(those)} for ref, those in needs.items()],
    }


def _library(package: Package) -> Json:
    address = f"pkg:pypi/{package.key}@{quote(package.version, safe='')}"
    component: Json = {"type": "library", "bom-ref": address, "name": package.name, "version": package.version, "purl": address}
    if not package.licence:
        return component
    told = {"expression": package.licence} if package.is_spdx else {"license": {"name": package.licence}}
    return component | {"licenses": [told]}


def _source(base: BaseModelConfig) -> Json:
    """Where the weights come from. The revision of a file is its SHA-256, of a folder one of all its files, of a hub's model a commit."""
    component: Json = {"type": MODEL, "bom-ref": f"source:{base.revision}", "name": base.source, "version": base.revision}
    if base.source == OFFLINE:
        component |= {"licenses": [{"license": {"id": OFFLINE_LICENCE}}]}
    if base.source == OFFLINE or base.source.endswith(".gguf"):
        component |= {"hashes": _sha256(base.revision)}
    if base.source == TINY:
        component |= {"description": "Random weights; the tokenizer is that of SmolLM2-135M-Instruct"}
    return component


def _artefact(kind: str, name: str, manifest: Manifest) -> Json:
    files = [
        {"type": "file", "bom-ref": f"{_ref(manifest)}/{path}", "name": path, "hashes": _sha256(entry.sha256),
         "properties": [_property("bytes", entry.size)]}
        for path, entry in sorted(manifest.files.items())
    ]  # fmt: skip
    facts = [_property("stage", manifest.kind), _property("key", manifest.key)]
    facts += [_property(f"input.{role}", digest) for role, digest in sorted(manifest.inputs.items())]
    return {"type": kind, "bom-ref": _ref(manifest), "name": name, "version": manifest.digest, "properties": facts, "components": files}


def _ref(manifest: Manifest) -> str:
    return f"{manifest.kind}:{manifest.digest}"


def _sha256(digest: str) -> list[Json]:
    return [{"alg": "SHA-256", "content": digest}]


def _property(name: str, value: object) -> Json:
    return {"name": f"cartwright:{name}", "value": str(value)}
