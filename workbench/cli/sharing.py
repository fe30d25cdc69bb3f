"""Commands that make one file to share: a conversation with what was recorded of it."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.damage import names_damage
from workbench.cli.options import Overwrite, RunPath
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
    """Write a conversation of a run as one HTML file that fetches nothing, to send to others."""
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
    print(f"{out}: {len(numbers)} conversation{'s' * (len(numbers) > 1)}")
