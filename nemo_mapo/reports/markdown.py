"""Tables in Markdown, and the pages that they are written into."""

import re
from collections.abc import Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers, without a newline at its end."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def fill(page: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- name -->` and `<!-- /name -->`; ValueError if the page has no such markers."""
    begin, end, found = f"<!-- {name} -->", f"<!-- /{name} -->", page.read_text(encoding="utf-8")
    if begin not in found or end not in found:
        raise ValueError(f"{page} has no {begin} ... {end} to fill")
    filled = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text.rstrip()}\n{end}", found, flags=re.DOTALL)
    page.write_text(filled, encoding="utf-8")
