"""The registered champion, and the data set it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.core.artifacts import Store
from tasks.core.manifests import Manifest
from tasks.core.registry import find_champion
from tasks.core.settings import Settings, shown_uri
from tasks.domain.errors import UserError

AGAIN = "Run `cartwright run` with its configuration once more"


@dataclass(frozen=True)
class Champion:
    """Tags and version of a registered model's champion, the experiment it was made in, and the data set it was trained on."""

    name: str
    tags: dict[str, str]
    experiment: str
    dataset: Manifest


def champion_with_dataset(settings: Settings, name: str) -> Champion:
    """The champion of a registered model.

    Raises:
        UserError: there is none, it does not say what it was trained on, or that is gone.
    """
    tags, experiment = find_champion(settings, name)
    if "cartwright.dataset_key" not in tags:
        problem = f"the champion, version {tags['version']}, does not say what it was trained on"
        raise UserError("model", name, problem, mend=f"{AGAIN}, which notes it")
    key, store = tags["cartwright.dataset_key"], Store(settings.store_uri, settings.home)
    dataset, damage = store.look_up("synthesize", key)
    if not dataset:
        problem = f"the data set {key} of the champion, version {tags['version']}, is no longer in {shown_uri(settings.store_uri)}"
        raise UserError("model", name, problem + (f" ({damage})" if damage else ""), mend=f"{AGAIN}: it makes the same data set again")
    return Champion(name, tags, experiment or f"{Path(dataset.config['domain']).name}-drift", dataset)
