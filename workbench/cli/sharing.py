"""Commands that make pages to share: a conversation as one file, and a run as a folder of static pages."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.damage import names_damage
from workbench.cli.options import Exclude, Overwrite, RunPath, Seed
from workbench.counting import count_of
from workbench.errors import InputError

app = typer.Typer()


@app.command()
@names_damage
def conversation(
    run: RunPath,
    id: Annotated[str, typer.Argument(help="Id or number of a sequence, or a range of numbers such as 0-4.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("conversation.html"),
    theme: Annotated[str, typer.Option(help="light or dark.")] = "light",
    overwrite: Overwrite = False,
) -> None:
    """Write a conversation of a run as one HTML file to send to others; it loads nothing from the network."""
    from workbench.dashboards.conversation import sequence_numbers, shared_page
    from workbench.figures.template import THEMES
    from workbench.outputs import check_output, staged
    from workbench.runs import open_run

    if theme not in THEMES:
        raise InputError(f"--theme {theme}: choose one of {', '.join(THEMES)}")
    check_output(out, command="conversation", inputs=[run], overwrite=overwrite)
    opened = open_run(run)
    numbers = sequence_numbers(opened, id)
    page = shared_page(opened, numbers, theme)
    with staged(out, command="conversation", inputs=[run], overwrite=overwrite) as part:
        part.write_text(page, encoding="utf-8")
    print(f"{out}: {count_of(len(numbers), 'conversation')}")


@app.command()
@names_damage
def publish(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("site"),
    conversations: Annotated[
        str,
        typer.Option(
            help="Conversations to include with their text: numbers such as 0-4, ids, separated by commas; none; all."
        ),
    ] = "0-4",
    results: Annotated[
        Path | None, typer.Option(help="Folder with results of experiments (`workbench study … --out`) to include.")
    ] = None,
    data: Annotated[bool, typer.Option(help="Include the numbers of all studies as JSON and CSV.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the sizes and write nothing.")] = False,
    seed: Seed = 0,
    exclude: Exclude = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a run as static pages that open from a folder or any web host, without a server."""
    from workbench.dashboards.publish import described, site
    from workbench.outputs import check_output, staged
    from workbench.runs import open_run
    from workbench.studies.result import load

    inputs: list[str | Path] = [run] if results is None else [run, results]
    check_output(out, command="publish", inputs=inputs, overwrite=overwrite)
    opened = open_run(run, exclude=exclude or ())
    given = None if results is None else load(results)
    files = site(opened, conversations=conversations, results=given, seed=seed, data=data)
    print(*described(files), sep="\n")
    if dry_run:
        return
    with staged(out, command="publish", inputs=inputs, overwrite=overwrite) as part:
        for name, content in files.items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    print(f"open {out / 'index.html'}")
