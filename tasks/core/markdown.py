"""Text of others within Markdown: reports, Prefect's artifacts and MLflow's notes are shown to people as pages."""

from __future__ import annotations

import re

# What GitHub, Prefect and MLflow make a link of without any markup (GFM, section 6.9). An entity does not help: remark looks for addresses
# in the text that entities stand for (mdast-util-gfm-autolink-literal), cmark-gfm for those of mail. A space without width does.
ADDRESSES = re.compile(r"(?<=http:)(?=//)|(?<=https:)(?=//)|(?<=ftp:)(?=//)|(?<=www)(?=\.)|(?=@)", re.IGNORECASE)
APART = "\u200b"


def escape_markdown(text: object) -> str:
    """`text` as one line that cannot end a table cell, open a link, be one as a bare address, or become HTML."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return ADDRESSES.sub(APART, re.sub(r"([\\`*|\[\]])", r"\\\1", line))
