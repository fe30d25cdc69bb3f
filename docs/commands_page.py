"""Generated parts of the documentation: the commands as `--help` shows them, studies, and dashboard timings."""

import json
from pathlib import Path
from typing import Any

import typer

from workbench import registry

HERE = Path(__file__).parent


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return a page of the site with its generated part made anew."""
    return generated(page.file.src_uri, markdown)


def generated(name: str, markdown: str) -> str:
    """Return the text of a page with its generated part made anew; other pages are returned as they are."""
    if name == "commands.md":
        return markdown[: markdown.index("## workbench ")] + commands()
    if name == "benchmarks.md":
        start, decoding, end = (markdown.index(f"## {h}") for h in ("The dashboard of", "Decoding on", "On the CPU"))
        first, second = (markdown[at : markdown.index("\n", at)] for at in (start, decoding))
        parts = (markdown[:start] + first, dashboard_table(), second, decode_table(), markdown[end:])
        return "\n\n".join(parts)
    if name == "studies.md":
        return markdown[: markdown.index("| `workbench study")] + studies_table()
    return markdown


def commands() -> str:
    """Every command with its arguments and options."""
    from workbench.cli import app

    parts: list[str] = []

    def tell(command: Any, path: str) -> None:  # typer brings a click of its own
        context = command.context_class(command, info_name=path)
        if hasattr(command, "list_commands"):
            for name in command.list_commands(context):
                tell(command.get_command(context, name), f"{path} {name}")
            return
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"## {path}\n\n{command.help or ''}\n\n`{path} {usage}`\n")
        known = {}
        for parameter in command.params:
            shown = parameter.opts[-1] if parameter.opts[-1].startswith("-") else parameter.name.upper()
            if shown != "--help":
                default = parameter.default
                plain = isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""
                known[shown] = (parameter.help or "") + (f" (default: {default})" if plain else "")
        if known:
            lines = [f"| `{name}` | {text} |".replace("\n", " ") for name, text in known.items()]
            parts.append("\n".join(["| | |", "|---|---|", *lines]) + "\n")

    tell(typer.main.get_command(app), "workbench")
    return "\n".join(parts).rstrip() + "\n"


def studies_table() -> str:
    """Return the registry of studies and experiments as a table; the page of studies holds it."""
    rows = ["| `workbench study …` | question | a run must have recorded | model | cost |", "|---|---|---|---|---|"]
    for record in registry.records():
        model = "yes" if isinstance(record, registry.Experiment) else "no"
        needs = " and ".join(record.requires) or "any"
        rows.append(f"| `{record.name}` | {record.question} | {needs} | {model} | {record.compute} |")
    return "\n".join(rows) + "\n"


def dashboard_table() -> str:
    """What `workbench bench dashboard` wrote, as tables."""
    measured = json.loads((HERE / "bench_dashboard.json").read_text())
    pages = [
        f"| {page} | {seconds:.2f} | {measured['page_s'][page]:.2f} | {measured['next_page_s'][page]:.2f} |"
        for page, seconds in measured["first_visit_s"].items()
    ]
    many = next(name for name in measured if name.startswith("change_of_"))
    slowest = measured["slowest_change_s"]
    changes = [
        f"| {name} | {s:.2f} | {measured[many][name]:.2f} | {slowest[name]:.2f} |"
        for name, s in measured["change_s"].items()
    ]
    return "\n".join(
        [
            f"{measured['machine']}; browser and server share it: its load average was {measured['load_average'][0]} "
            f"before and {measured['load_average'][1]} after. The server's peak was {measured['server_peak_gb']:.2f} "
            "GB. A visit ends when the main result of the page is shown; the first visit of the overview, *Analysis "
            "vs. final* and *Effort* ends when what needs no study is there. Browsers come without stored scripts, but "
            "for the last column, of visitors who come from the overview.",
            "",
            "| page | first visit, s | later, s | after the overview, s |",
            "|---|---|---|---|",
            *pages,
            "",
            f"| change of selection | one session, s | {many.split('_')[2]} at once, s | slowest of them, s |",
            "|---|---|---|---|",
            *changes,
            "",
            studies_times(),
        ]
    )


def studies_times() -> str:
    """What `workbench bench studies` wrote, as a table."""
    measured = json.loads((HERE / "bench_studies.json").read_text())
    rows = [f"| {row['study']} | {row['seconds']:.0f} |" for row in measured["studies"]]
    about = (
        f"Studies of that run, {measured['tokens']:,} tokens of {measured['sequences']:,} sequences, on "
        f"{measured['processor']}, measured by `workbench bench studies RUN`. The last one reads the run twice, as the "
        "two that it compares."
    )
    return "\n".join([about, "", "| study | s |", "|---|---|", *rows])


def decode_table(path: Path = HERE / "bench_decode.json") -> str:
    """What `workbench bench cpu --decode --json` wrote, as a table."""
    command = "`workbench bench cpu --decode --json docs/bench_decode.json`"
    if not path.exists():
        return f"{command} measures it; **no numbers of a quiet machine are committed yet.**"
    from workbench.bench.decode import table  # late: torch

    measured = json.loads(path.read_text())["decoding"]
    about = (
        f"{measured['processor']}, {measured['threads']} threads, {measured['layers']} layers of the width of "
        f"gpt-oss-20b, kernels {measured['kernels']}; memory is read at "
        f"{measured['memory_bytes_per_s'] / 1e9:.0f} GB/s. Measured by {command}; "
        "in parentheses our speed beside the baseline's."
    )
    return f"{about}\n\n{table(measured)}"


if __name__ == "__main__":  # python -m docs.commands_page: write the generated parts into the pages of the repository
    for path in (HERE / "commands.md", HERE / "benchmarks.md", HERE / "studies.md"):
        path.write_text(generated(path.name, path.read_text()))
