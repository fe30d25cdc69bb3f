"""Commands of the live page: serve a model to browsers, and run a saved recipe."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import (
    Adapter,
    Address,
    AllowOrigin,
    BasicAuth,
    Device,
    Dtype,
    IgnoreField,
    Model,
    Overwrite,
    Port,
    Recipes,
    Saes,
    Show,
    Vectors,
    load_model,
)
from workbench.errors import InputError
from workbench.outputs import check_files, check_output

app = typer.Typer()


@app.command()
def live(
    model: Model,
    port: Port = 5007,
    address: Address = "localhost",
    show: Show = False,
    allow_origin: AllowOrigin = None,
    basic_auth: BasicAuth = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=10**6, help="Limit of the new tokens of an answer.")] = 2048,
    max_samples: Annotated[int, typer.Option(min=1, max=256, help="Limit of the samples of a prompt.")] = 16,
    max_seconds: Annotated[float, typer.Option(min=1, max=1e6, help="Longest time of one request.")] = 120,
    vector: Vectors = None,
    sae: Saes = None,
    recipes: Recipes = None,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
) -> None:
    """Serve a page that generates live: interventions by click, original and edited answers side by side."""
    from workbench.live.app import Limits, serve
    from workbench.live.recipe_folder import RecipeFolder
    from workbench.research.steering_sources import read_sources

    sources = read_sources(vector or (), sae or ())
    folder = RecipeFolder(recipes) if recipes is not None else None
    loaded = load_model(model, device, dtype, ignore_field, adapter)
    limits = Limits(max_new_tokens, max_samples, max_seconds)
    serve(
        loaded,
        model,
        limits=limits,
        sources=sources,
        recipes=folder,
        port=port,
        address=address,
        show=show,
        allow_origin=allow_origin or (),
        basic_auth=basic_auth,
    )


@app.command()
def apply(
    recipe: Annotated[Path, typer.Argument(help="Recipe (JSON), as the live page saves it.")],
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to use. (default: the one that the recipe names)")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL of prompts: compare accuracy on them without and with the interventions.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    controls: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1000,
            help="With --prompts: compare with this many random interventions of the same kind and size (0: none).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --controls: write the tables (CSV, JSON) and the summary to this folder.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Write the answers as transcripts (JSONL) to this file, for `workbench capture`."),
    ] = None,
    vector: Vectors = None,
    sae: Saes = None,
    overwrite: Overwrite = False,
    python: Annotated[
        bool, typer.Option("--python", help="Print the recipe as a Python program, and run nothing.")
    ] = False,
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
) -> None:
    """Run a recipe of the live page: print the original and the edited answer, and how they differ."""
    from workbench.research.recipe import Recipe
    from workbench.research.recipe_python import recipe_python
    from workbench.research.steering_sources import read_sources
    from workbench.row_output import written_by

    _check_together(python, prompts, controls, out, answers)
    read = Recipe.from_file(recipe)
    if python:
        print(recipe_python(read), end="")
        return
    inputs = [path for path in (recipe, prompts) if path is not None]
    if answers is not None:
        check_output(answers, command="apply", inputs=inputs, overwrite=overwrite, owned=written_by("apply"))
    if out is not None:
        check_files(["generated-answers.txt"], out, command="study", inputs=inputs, overwrite=overwrite)
    sources = read_sources(vector or (), sae or ())
    loaded = load_model(model or read.model, device, dtype, ignore_field, adapter)
    if prompts is not None and controls is not None:
        from workbench.research.recipe_study import recipe_study
        from workbench.studies import save, summary

        study = recipe_study(loaded, read, prompts, controls=controls, sources=sources, seed=read.seed)
        if out is not None:
            save(study, out, inputs=inputs, overwrite=overwrite)
        print(summary(study))
        return
    if prompts is not None:
        from workbench.live.prompts import accuracy_table

        table = accuracy_table(loaded, read, prompts, sources)
        print(table.to_string(index=False, na_rep="-", float_format="{:.3f}".format))
        return
    from workbench.harmony.transcripts import row_of, write_rows
    from workbench.live.experiment import Experiment
    from workbench.live.result import result_of, text_of, transcripts_of

    experiment = Experiment(loaded, read, sources=sources)
    for _ in experiment.steps():
        pass
    if json:
        from json import dumps

        print(dumps(result_of(experiment), ensure_ascii=False))
    else:
        print(text_of(experiment))
    if answers is not None:
        rows = map(row_of, transcripts_of(experiment))
        write_rows(answers, rows, overwrite=overwrite, command="apply", inputs=inputs)


def _check_together(
    python: bool, prompts: Path | None, controls: int | None, out: Path | None, answers: Path | None
) -> None:
    """Refuse options of `apply` that have nothing to do beside the others.

    Raises:
        InputError: an option would have no effect.
    """
    if python and answers is not None:
        raise InputError("--python runs nothing, so that there are no answers: remove --answers")
    if controls is not None and prompts is None:
        raise InputError("--controls needs many prompts: add --prompts with a file of prompts")
    if out is not None and controls is None:
        raise InputError("--out takes the results of --controls: add --controls 20")
    if answers is not None and prompts is not None:
        raise InputError("--answers takes the answers to the recipe's own prompt: remove --prompts")
