"""Links that leave docs/ lead nowhere on the site: they become the path of the file, which must exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>(?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """`[the card](../assets/x.md)` → "the card (`assets/x.md`)"; links within docs/ stay."""
    docs = Path(config["docs_dir"]).resolve()
    here = (docs / page.file.src_uri).parent

    def replace(found: re.Match[str]) -> str:
        target = (here / found["target"]).resolve()
        if target.is_relative_to(docs):
            return found[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri}: {found['target']} does not exist")
        path = f"`{target.relative_to(docs.parent).as_posix()}`"
        return path if found["text"] == path else f"{found['text']} ({path})"

    return _LINK.sub(replace, markdown)
