"""Pages from the templates beside this file: autoescaped, self-contained, written whole or not at all."""

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
"""A value that a template reads and that was not given is an error, never an empty place."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its heading and how to read it; `title` and `caption` are plain text."""

    title: str
    chart: Chart
    caption: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """A number at the head of a page, all plain text."""

    name: str
    value: str
    before: str = ""
    """What `value` was at the start; empty if there is no start."""
    hint: str = ""


def write_page(path: Path, template: str, *, title: str, subtitle: str = "", **values: Any) -> Path:
    """Render a template that extends page.html and write it to `path`; a reader never sees half a page.

    Args:
        path: The .html file; its directory must exist.
        template: Name of a file in templates/.
        title: Heading and window title, plain text as all values are unless they are `Markup`.
        subtitle: Line below the heading.
        values: Variables of the template; one that the template reads and that is missing is an error.

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
