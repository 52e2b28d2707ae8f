"""One self-contained HTML page of tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from moediff.errors import OptionError
from moediff.storage import write_atomic

INSTALL = "Install what draws it: pip install moediff[report]."

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 86rem; margin: 2rem auto;
        padding: 0 1rem; }
 h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
 .wide { overflow-x: auto; }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
 th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #dde3ea; }
 th:first-child, td:first-child { text-align: left; }
 td { white-space: nowrap; }
 thead th { border-bottom: 2px solid #8a97a8; vertical-align: bottom; }
 img { max-width: 100%; height: auto; } p.note { color: #55606e; max-width: 60rem; }
</style></head><body>
<h1>{{ title }}</h1><p class="note">{{ summary }}</p>
{% for table in tables %}{% if table.title %}<h2>{{ table.title }}</h2>{% endif %}
<div class="wide"><table><thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}
</tr></thead><tbody>{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
{% endfor %}
{% for figure in figures %}
<h2>{{ figure.title }}</h2><p class="note">{{ figure.note }}</p>
<img alt="{{ figure.title }}" src="data:image/png;base64,{{ figure.png }}">{% endfor %}
</body></html>
"""


@attrs.frozen
class Figure:
    """A picture of the page: title, note and a PNG in base 64."""

    title: str
    note: str
    png: str = attrs.field(repr=False)


@attrs.frozen
class Table:
    """A table of the page; the first may go without a title."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


def write_page(
    path: Path, title: str, summary: str, tables: Sequence[Table], figures: Sequence[Figure]
) -> None:
    """Write the page; it loads nothing from elsewhere.

    Raises:
        OptionError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise OptionError(f"report: {error}. {INSTALL}") from error

    template = jinja2.Environment(autoescape=True).from_string(PAGE)
    html = template.render(title=title, summary=summary, tables=tables, figures=figures)
    write_atomic(path, lambda target: target.write_text(html, encoding="utf-8"))
