"""Pages from the templates in this package: autoescaped, self-contained, written atomically."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from nemo_mapo.files import write_text
from nemo_mapo.reports.charts import Chart, plotly_js

TEMPLATES = Environment(
    loader=PackageLoader("nemo_mapo.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""A value that a template reads but was not given is an error, never an empty string."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its heading and an explanation; `title` and `caption` are plain text."""

    title: str
    chart: Chart
    caption: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """Charts and tables under one heading, all plain text; `lead` stands before them and `note` after."""

    name: str
    title: str
    lead: str = ""
    figures: Sequence[Figure]
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    """Header and rows."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A number at the top of a page; all plain text."""

    name: str
    value: str
    before: str = ""
    """`value` at the start of the run; empty if not known."""
    hint: str = ""


def write_page(path: Path, template: str, *, title: str, subtitle: str = "", **values: Any) -> Path:
    """Render a template that extends page.html and write it to `path`, atomically.

    Args:
        path: The .html file; its directory must exist.
        template: Name of a file in templates/.
        title: Heading and window title, plain text as all values are unless they are `Markup`.
        subtitle: Line below the heading.
        values: Variables of the template; if one that it reads is missing, that is an error.

    Returns:
        `path`.

    Example:
        >>> write_page(Path("data.html"), "data.html", title="Data", cards=[], clips=[])
        PosixPath('data.html')
    """
    text = TEMPLATES.get_template(template).render(
        {"title": title, "subtitle": subtitle, "plotly_js": plotly_js, "refresh_seconds": None, **values}
    )
    return write_text(path, text)
