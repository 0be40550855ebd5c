"""Automations as code: `deployments/automations.yaml` on a Prefect server, no more and no less."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.core import settings as environment
from tasks.domain.errors import UserError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

AUTOMATIONS = Path(__file__).resolve().parents[1] / "deployments" / "automations.yaml"
OURS = "cartwright:as-code"  # the tag of what is installed from the file
WEBHOOK = "cartwright-alerts"  # the block that holds where alerts go
# `text` is what Slack, Mattermost and others show; the rest is for programs.
PAYLOAD = (
    "{{% set text %}}{alert}{{% endset %}}"
    '{{"text": {{{{ text | string | tojson }}}}, "automation": {{{{ automation.name | tojson }}}}, "event": {{{{ event.event | tojson }}}}, '
    '"resource": {{{{ event.resource.id | tojson }}}}, "details": {{{{ event.payload | tojson }}}}}}'
)


class Entry(BaseModel):
    """An automation of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    trigger: dict[str, Any]
    alert: str | None = None
    actions: tuple[dict[str, Any], ...] = ()
    enabled: bool = True


class Installed(BaseModel):
    """What `install` found and did, by the names of the automations."""

    model_config = ConfigDict(frozen=True)

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    alerts: bool

    def __str__(self) -> str:
        parts = [f"{len(names)} {kind}" for kind in ("added", "changed", "removed", "kept") if (names := getattr(self, kind))]
        where = f"alerts go to the webhook of the block {WEBHOOK}" if self.alerts else "nobody is told: set CARTWRIGHT_ALERT_WEBHOOK"
        return f"Automations: {', '.join(parts) or 'none'}; {where}"


def install(api_url: str | None = None, file: Path = AUTOMATIONS) -> Installed:
    """Make the server's automations those of the file; others, made by people, are left alone.

    Twice changes nothing. What a person switched on or off stays so. Alerts call the webhook of `CARTWRIGHT_ALERT_WEBHOOK`, which is
    kept on the server as a block and stays there when the variable is not set the next time; without a webhook they do nothing.

    Args:
        api_url: a Prefect API such as `http://127.0.0.1:4200/api`; without it, the one of Prefect's own settings.

    Raises:
        UserError: an entry of the file is not valid, or names a deployment that the server has not.
    """
    from prefect.client.orchestration import get_client
    from prefect.events.filters import AutomationFilter, AutomationFilterTags
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(updates={PREFECT_API_URL: api_url}) if api_url else nullcontext(), get_client(sync_client=True) as client:
        webhook = _webhook(client)
        wanted = {entry.name: _automation(entry, client, webhook, file) for entry in read(file)}
        ours = AutomationFilter(tags=AutomationFilterTags(all_=[OURS]))
        found = {known.name: known for known in client.read_automations(automations=ours)}
        changed = []
        for name, automation in wanted.items():
            if name not in found:
                client.create_automation(automation)
                continue
            automation = automation.model_copy(update={"enabled": found[name].enabled})
            if not _same(automation, found[name]):
                client.update_automation(found[name].id, automation)
                changed.append(name)
        removed = sorted(set(found) - set(wanted))
        for name in removed:
            client.delete_automation(found[name].id)
    return Installed(
        added=tuple(sorted(set(wanted) - set(found))),
        changed=tuple(changed),
        removed=tuple(removed),
        kept=tuple(sorted(set(wanted) & set(found) - set(changed))),
        alerts=webhook is not None,
    )


def read(file: Path = AUTOMATIONS) -> list[Entry]:
    """The automations of a file.

    Raises:
        UserError: a field is missing, unknown or of the wrong type, or a name is there twice.
    """
    entries: list[Entry] = []
    for raw in yaml.safe_load(file.read_text(encoding="utf-8"))["automations"]:
        try:
            entry = Entry.model_validate(raw)
        except ValidationError as error:
            raise _refused(file, raw.get("name"), error) from None
        if entry.name in {known.name for known in entries}:
            raise UserError(f"{file.name}: name", entry.name, "is there twice", mend="Give each automation a name of its own")
        entries.append(entry)
    return entries


def _refused(file: Path, name: str | None, error: ValidationError) -> UserError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return UserError(f"{file.name}: {name}: {field}", first["input"], first["msg"], mend="deployments/automations.yaml shows the form")


def _automation(entry: Entry, client: SyncPrefectClient, webhook: str | None, file: Path) -> AutomationCore:
    """An entry as Prefect has it, with ids for names."""
    from prefect.events.schemas.automations import AutomationCore

    actions = [_with_deployment(action, client, f"{file.name}: {entry.name}") for action in entry.actions]
    if entry.alert and webhook:
        actions.append({"type": "call-webhook", "block_document_id": webhook, "payload": PAYLOAD.format(alert=entry.alert)})
    fields = {
        "name": entry.name,
        "description": entry.description,
        "enabled": entry.enabled,
        "tags": [OURS],
        "trigger": entry.trigger,
        "actions": actions or [{"type": "do-nothing"}],
    }
    try:
        # Twice: an update sends the fields that were set, and the server wants defaults too, but no owner.
        return AutomationCore.model_validate(AutomationCore.model_validate(fields).model_dump(exclude={"owner_resource"}))
    except ValidationError as error:
        raise _refused(file, entry.name, error) from None


def _with_deployment(action: dict[str, Any], client: SyncPrefectClient, field: str) -> dict[str, Any]:
    from prefect.exceptions import ObjectNotFound

    name = action.get("deployment")
    if name is None:
        return action
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        raise UserError(f"{field}: deployment", name, "is not on the server", mend="Deploy it first, or mend its name") from None
    return {**{key: value for key, value in action.items() if key != "deployment"}, "deployment_id": str(found.id)}


def _webhook(client: SyncPrefectClient) -> str | None:
    """The id of the block with the webhook, which holds what the environment says; None where there is none."""
    from prefect.blocks.webhook import Webhook
    from prefect.exceptions import ObjectNotFound
    from pydantic import SecretStr

    url = environment.alert_webhook()
    try:
        known = client.read_block_document_by_name(WEBHOOK, "webhook", include_secrets=True)
    except ObjectNotFound:
        known = None
    if url and (known is None or known.data.get("url") != url):
        Webhook(url=SecretStr(url), headers={"Content-Type": "application/json"}).save(WEBHOOK, overwrite=True)
        known = client.read_block_document_by_name(WEBHOOK, "webhook")
    return str(known.id) if known else None


def _same(wanted: AutomationCore, known: AutomationCore) -> bool:
    """Whether the server's automation is the wanted one, but for the ids and defaults it has given."""
    from prefect.events.schemas.automations import AutomationCore

    return AutomationCore.model_validate(known.model_dump()).model_dump() == wanted.model_dump()
