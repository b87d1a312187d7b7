"""A paper's table in the terminal, whatever its width."""

from __future__ import annotations

import textwrap

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table as RichTable

from .papers import PaperTable

GAP = 2
WIDE = 24  # a cell up to this is kept on one line; `74.2 [1] | 73.9 ± 0.2 (800 ep)` is longer


def show(t: PaperTable, console: Console) -> None:
    """Prints the table in as many blocks of columns as the width asks for, then its notes."""
    console.print(f"{t.name}: {t.common}\n" if t.common else f"{t.name}\n", markup=False)
    for block, widths in _blocks(t, console.width):
        table = RichTable(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        for i, width in zip(block, widths, strict=True):
            side: JustifyMethod = "left" if i < t.keys else "right"
            table.add_column(escape(t.header[i]), justify=side, width=width, overflow="fold")
        for row in t.rows:
            table.add_row(*(escape(row[i]) for i in block))
        console.print(table, soft_wrap=False)
        console.print()
    for note in t.notes:
        console.print(
            textwrap.fill(note, console.width, subsequent_indent="    ", break_on_hyphens=False), markup=False
        )


def _blocks(t: PaperTable, width: int) -> list[tuple[list[int], list[int]]]:
    """(columns, their widths) of each block. Every block has the key columns; the others are in as few blocks as
    `width` allows, as many in each.
    """
    least, most = zip(*(_extremes(t, i) for i in range(len(t.header))), strict=True)
    keys, others = list(range(t.keys)), list(range(t.keys, len(t.header)))

    def fits(block: list[int]) -> bool:
        return sum(least[i] + GAP for i in keys + block) - GAP <= width

    sizes = range(len(others), 0, -1)  # of a block; one column alone may be too wide, and is folded
    size = next((n for n in sizes if all(fits(others[i : i + n]) for i in range(0, len(others), n))), 1)
    size = -(-len(others) // -(-len(others) // size))  # no last block of a single column where they can share
    blocks = [keys + others[i : i + size] for i in range(0, len(others), size)]
    return [(block, _shared([least[i] for i in block], [most[i] for i in block], t.keys, width)) for block in blocks]


def _extremes(t: PaperTable, i: int) -> tuple[int, int]:
    """The least width of a column, which breaks no word and no short number, and the most that it can use."""
    cells = [row[i] for row in t.rows]
    words = [len(word) for text in (t.header[i], *cells) for word in text.split()]
    whole = [min(len(cell), WIDE) for cell in cells] if i >= t.keys else []
    return max([1, *words, *whole]), max(len(text) for text in (t.header[i], *cells))


def _shared(least: list[int], most: list[int], keys: int, width: int) -> list[int]:
    """Widths between least and most. Until all fit or none can, headers of numbers give way first, then row names; of
    either the widest.
    """
    widths = list(most)
    while sum(widths) + GAP * (len(widths) - 1) > width:
        slack = [(i >= keys, w, i) for i, w in enumerate(widths) if w > least[i]]
        if not slack:
            break
        widths[max(slack)[2]] -= 1
    return widths
