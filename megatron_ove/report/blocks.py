"""Draws the general blocks of `sections.py` as HTML; every text is escaped, every picture becomes a data URI."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import assert_never

from megatron_ove import __version__
from megatron_ove.errors import DataError
from megatron_ove.report.pictures import data_uri, is_picture_name, picture_size
from megatron_ove.report.sections import (
    GalleryBlock,
    Picture,
    PictureBlock,
    Section,
    TableBlock,
    WordBlock,
    WordColumn,
)

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""All is escaped; should some text get through all the same, a browser neither runs nor fetches anything."""


def draw_page(title: str, parts: Sequence[str]) -> str:
    """Returns a whole page.

    Args:
        title: of the window.
        parts: HTML of the body; "" is left out.
    """
    style = resources.files("megatron_ove.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{chr(10).join(part for part in parts if part)}\n"
        f"<footer>megatron_ove {escape(__version__)}</footer>\n</body>\n</html>\n"
    )


def draw_header(title: str, introduction: str = "", highlights: Sequence[tuple[str, str]] = ()) -> str:
    """Returns the head of a page; `highlights` are (figure, what it is), shown large."""
    paragraph = f"<p>{escape(introduction)}</p>" if introduction else ""
    figures = "".join(f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd></div>" for figure, what in highlights)
    listing = f'<dl class="highlights">{figures}</dl>' if figures else ""
    return f"<header><h1>{escape(title)}</h1>{paragraph}{listing}</header>"


def draw_section(section: Section, folder: Path) -> str:
    """Returns a section as HTML; `folder` holds the pictures.

    Raises:
        DataError: a picture is missing.
    """
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in section.text.split("\n\n") if paragraph]
    for block in section.blocks:
        match block:
            case PictureBlock():
                items = "".join(_picture(item, folder) for item in block.items)
                parts.append(f'<div class="pictures {block.size}">{items}</div>')
            case GalleryBlock():
                parts.append(_gallery(block, folder))
            case WordBlock():
                columns = "".join(_word_column(column) for column in block.columns)
                parts.append(f'<div class="columns">{columns}</div>')
            case TableBlock():
                parts.append(draw_table(block.header, block.rows, block.note))
            case _:
                assert_never(block)
    return f"<section>{''.join(parts)}</section>"


def draw_table(header: list[str], rows: list[list[str]], note: str = "") -> str:
    """Returns a table whose first column names the row; wide ones scroll sideways on a phone."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    caption = f'<p class="quiet">{escape(note)}</p>' if note else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>{caption}'


def _picture(item: Picture, folder: Path) -> str:
    path = (folder / item.file).resolve()
    if not path.is_relative_to(folder.resolve()) or not is_picture_name(path):
        raise DataError(
            f"the report names the picture {item.file}, which is no picture in {folder}; whoever made this run folder "
            "may want a file of yours in the page, so look into its report/"
        )
    if not path.is_file():
        raise DataError(
            f"the report names the picture {path}, which does not exist; run the program that made the report again"
        )
    width, height = picture_size(path)
    mark = {None: "", True: " right", False: " wrong"}[item.right]
    image = f'<img src="{data_uri(path)}" width="{width}" height="{height}" alt="{escape(item.alt)}">'
    caption = f"<figcaption>{_mark(item.right)}{escape(item.caption)}</figcaption>" if item.caption or mark else ""
    return f'<figure class="picture{mark}">{image}{caption}</figure>'


def _gallery(block: GalleryBlock, folder: Path) -> str:
    rows = []
    for row in block.rows:
        found = "".join(_picture(item, folder) for item in row.found)
        label = f'<p class="row-label">{escape(row.label)}</p>'
        query = f'<div class="query">{_picture(row.query, folder)}</div>'
        rows.append(
            f'<div class="gallery-row">{label}<div class="strip">{query}<div class="found">{found}</div></div></div>'
        )
    return f'<div class="gallery">{"".join(rows)}</div>'


def _word_column(column: WordColumn) -> str:
    words = "".join(
        f'<li class="{"right" if word.right else "wrong"}">{_mark(word.right)}'
        f'<span lang="und">{escape(word.text)}</span><span class="quiet">{escape(word.note)}</span></li>'
        for word in column.words
    )
    return f'<div><h3>{escape(column.title)}</h3><ol class="words">{words}</ol></div>'


def _mark(right: bool | None) -> str:
    """Right and wrong are told by a sign as well as by colour, for print and for the colour-blind."""
    if right is None:
        return ""
    sign, text = ("✓", "right") if right else ("✗", "wrong")
    return f'<span class="mark" role="img" aria-label="{text}">{sign}</span> '
