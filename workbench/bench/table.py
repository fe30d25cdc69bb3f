"""Tables for people: drawn on a terminal, lines of Markdown elsewhere, where nothing may be cut to fit."""

from collections.abc import Sequence


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], text: int = 0) -> str:
    """A table of Markdown whose first `text` columns stand left and the others right."""
    rule = "|" + "|".join("---" if i < text else "---:" for i in range(len(columns))) + "|"
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(f"{title}\n\n{markdown(columns, rows)}\n")
        return
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
