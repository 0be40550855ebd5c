"""Templates of pages, filled in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks.core.markdown import escape_markdown

TEMPLATES = Path(__file__).parent / "templates"


def fill(name: str, values: Mapping[str, Any]) -> str:
    """A template of `tasks/templates`. In HTML everything is escaped, in Markdown what goes through the filter `md`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape_markdown
    return environment.get_template(name).render(values).strip() + "\n"
