"""Text of others within Markdown: reports, Prefect's artifacts and MLflow's notes are shown to people as pages."""

from __future__ import annotations

import re


def escape_markdown(text: object) -> str:
    """`text` as one line that cannot end a table cell, open a link or become HTML."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", line)
