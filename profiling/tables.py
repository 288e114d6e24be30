"""Tables on a console of any width: no word and no figure of them is cut."""

from __future__ import annotations

from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table


def print_table(console: Console, table: Table) -> None:
    """Print a table whole. On a terminal cells fold between words, and lines run over its edge where whole words need that; what is no
    terminal, a file or a pipe, has no edge, and every row is one line."""
    options = console.options.update(width=10_000)
    if not console.is_terminal:
        needed = console.measure(table, options=options).maximum
    else:
        # Rich takes room from the widest columns, whatever their words need, and cuts those that then do not fit.
        for column in table.columns:
            cells = measure_renderables(console, options, [column.header, *column.cells])
            column.min_width = cells.maximum if column.no_wrap else cells.minimum
        needed = console.measure(table, options=options).minimum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)
