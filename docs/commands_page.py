"""A hook of the site's generator: the page of commands is what `--help` says, and the table of the dashboard its JSON."""

import json
from pathlib import Path
from typing import Any

import click
import typer

HERE = Path(__file__).parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put what is made where a page says so."""
    if page.file.src_uri == "commands.md":
        return markdown.replace("COMMANDS", commands())
    if page.file.src_uri == "benchmarks.md":
        return markdown.replace("DASHBOARD_TABLE", dashboard_table())
    return markdown


def commands() -> str:
    """Every command with its arguments and options."""
    from workbench.cli import app

    parts: list[str] = []

    def tell(command: click.Command, path: str) -> None:
        context = click.Context(command, info_name=path)
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                tell(found, f"{path} {name}")
            return
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"## {path}\n\n{command.help or ''}\n\n`{path} {usage}`\n")
        rows = [parameter.get_help_record(context) for parameter in command.params]
        known = [row for row in rows if row and "--help" not in row[0]]
        for parameter in command.params:
            if isinstance(parameter, click.Argument) and getattr(parameter, "help", None):
                known.insert(0, (parameter.make_metavar(context), str(parameter.help)))
        if known:
            lines = [f"| `{name}` | {text} |".replace("\n", " ") for name, text in dict(known).items()]
            parts.append("\n".join(["| | |", "|---|---|", *lines]) + "\n")

    tell(typer.main.get_command(app), "workbench")
    return "\n".join(parts)


def dashboard_table() -> str:
    """What `workbench bench dashboard` wrote, as tables."""
    found = json.loads((HERE / "bench_dashboard.json").read_text())
    pages = [f"| {p} | {s:.2f} | {found['page_s'][p]:.2f} |" for p, s in found["first_visit_s"].items()]
    many = next(name for name in found if name.startswith("change_of_"))
    changes = [f"| {name} | {s:.2f} | {found[many][name]:.2f} |" for name, s in found["change_s"].items()]
    studies = [f"| {name} | {s:.0f} |" for name, s in found["studies_s"].items()]
    return "\n".join(
        [
            f"{found['machine']}; browser and server share it. The server's peak was {found['server_peak_gb']:.2f} GB.", "",
            "| page | first visit, s | later, s |", "|---|---|---|", *pages, "",
            f"| change of selection | one session, s | {many.split('_')[2]} at once, s |", "|---|---|---|", *changes, "",
            "| study, made beside the server | s |", "|---|---|", *studies,
        ]
    )  # fmt: skip
