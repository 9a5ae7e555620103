"""What commands print, as JSON or as a table."""

from __future__ import annotations

from collections.abc import Sequence

import typer

__all__ = ["print_json", "print_table"]


def print_json(content: object) -> None:
    """Print as indented JSON; what JSON does not know as text."""
    import json

    typer.echo(json.dumps(content, indent=2, default=str))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; no header where all its titles are empty."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=any(header), box=None, pad_edge=False)
    for title in header:
        table.add_column(title, overflow="fold")  # a digest is of no use with an ellipsis
    for row in rows:
        table.add_row(*row)
    console = Console(emoji=False)
    if not console.is_terminal:
        # Pipes and log files have no width: a table there must not be cut to 80 columns.
        console = Console(width=240, emoji=False)
    console.print(table, markup=False)
