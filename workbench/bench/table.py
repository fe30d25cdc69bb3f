"""Tables of results: drawn on a terminal; Markdown elsewhere, where no text may be truncated."""

import os
from collections.abc import Sequence
from pathlib import Path


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], text: int = 0) -> str:
    """Return a table of Markdown whose first `text` columns stand left and the others right."""
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


def processor() -> str:
    """Return the cores that this process may use, and their name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {models[0]}" if models else f"{os.cpu_count()} cores"
