"""A document of headings, text, tables and figures, as one HTML file and as Markdown."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape

from tabulate import tabulate

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff; }
h1 { font-size: 1.6em; margin-bottom: .2em; } h2 { font-size: 1.2em; margin: 2em 0 .4em;
  border-bottom: 1px solid #ddd; }
p { margin: .5em 0; max-width: 75em; } figure { margin: 1em 0; } img { max-width: 100%; }
figcaption, .note { color: #555; font-size: .9em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8em 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; white-space: nowrap; font-weight: 600; padding-bottom: .3em; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e5e5e5;
  vertical-align: top; }
th { background: #f6f6f6; } th:first-child, td:first-child, .words td,
.words th { text-align: left; }
small { color: #777; display: block; font-size: .78em; white-space: nowrap; }
.warning, .plain { padding: .5em .9em; margin: .5em 0; border-left: 4px solid #2a7;
  background: #eefaf3; }
.warning { border-color: #c33; background: #fdf0ef; }
"""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Notice:
    """A sentence that stands out; red where it is a warning."""

    text: str
    warning: bool


@dataclass(frozen=True)
class Table:
    """Cells are strings, or pairs of which the second is printed small."""

    title: str
    head: list[str]
    rows: list[list]
    words: bool = False  # all columns to the left


@dataclass(frozen=True, eq=False)
class Picture:
    """A matplotlib figure: as SVG, or as PNG where it is made of pixels."""

    figure: object
    caption: str
    pixels: bool = False


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list


def to_html(title: str, lead: str, sections: list[Section]) -> str:
    """One HTML page that needs no other file and no network."""
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(lead)}</p>"]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [_html(block) for block in section.blocks]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def to_markdown(title: str, lead: str, sections: list[Section]) -> str:
    """The same without the pictures."""
    parts = [f"# {title}", lead]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [text for block in section.blocks if (text := _markdown(block))]
    return "\n\n".join(parts) + "\n"


def _html(block) -> str:
    if isinstance(block, Text):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Notice):
        kind = "warning" if block.warning else "plain"
        mark = "<strong>Warning.</strong> " if block.warning else ""
        return f'<p class="{kind}">{mark}{escape(block.text)}</p>'
    if isinstance(block, Picture):
        return (
            f'<figure><img src="{_data_uri(block)}" alt="{escape(block.caption)}">'
            f"<figcaption>{escape(block.caption)}</figcaption></figure>"
        )
    head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in block.rows
    )
    kind = ' class="words"' if block.words else ""
    return (
        f'<div class="scroll"><table{kind}><caption>{escape(block.title)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def _cell(cell) -> str:
    if isinstance(cell, tuple):
        return f"{escape(cell[0])}<small>{escape(cell[1])}</small>"
    return escape(cell)


def _markdown(block) -> str:
    if isinstance(block, Text):
        return block.text
    if isinstance(block, Notice):
        return f"* **Warning.** {block.text}" if block.warning else f"* {block.text}"
    if isinstance(block, Picture):
        return ""
    rows = [[" ".join(c) if isinstance(c, tuple) else c for c in row] for row in block.rows]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    table = tabulate(rows, block.head, tablefmt="github", disable_numparse=True)
    return f"**{block.title}**\n\n{table}"


def _data_uri(picture: Picture) -> str:
    # Each SVG is a document of its own, or the ids inside would collide.
    kind = "png" if picture.pixels else "svg"
    with io.BytesIO() as file:
        # Without a date, the same figures give the same file.
        metadata = {} if picture.pixels else {"Date": None}
        picture.figure.savefig(file, format=kind, dpi=110, metadata=metadata)
        data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{'png' if picture.pixels else 'svg+xml'};base64,{data}"
