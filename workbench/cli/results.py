"""Commands about finished runs: studies, experiments, summary, report, figures and the dashboard."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from workbench.cli.damage import names_damage
from workbench.cli.options import (
    MAX_SEED,
    Adapter,
    Address,
    AllowOrigin,
    BasicAuth,
    Device,
    Dtype,
    Exclude,
    IgnoreField,
    Overwrite,
    Port,
    Recipes,
    RunPath,
    Saes,
    Seed,
    Show,
    Vectors,
    load_model,
)
from workbench.cli.study_help import StudyCommand, parse_options
from workbench.errors import InputError

app = typer.Typer()


@app.command(cls=StudyCommand)
@names_damage
def study(
    name: Annotated[str, typer.Argument(help="Name of the study or experiment; see the list below.")],
    run: RunPath,
    other: Annotated[str | None, typer.Argument(help="The second run, for a study that compares two.")] = None,
    model: Annotated[str | None, typer.Option(help="The captured checkpoint, which experiments need.")] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Base URL of an OpenAI-compatible API that generates, if the experiment only does that; "
            "--model is then the model's name there."
        ),
    ] = None,
    key_env: Annotated[str, typer.Option(help="Environment variable with the API key of the host.")] = "OPENAI_API_KEY",
    sequences: Annotated[int, typer.Option(min=2, help="Use at most this many sequences in an experiment.")] = 200,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE of an option of the study; repeat for several.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of resampling and of random controls.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the tables (CSV, JSON) and the summary to this folder.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
    adapter: Adapter = None,
    exclude: Exclude = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a study or an experiment: print its summary and write its tables."""
    from workbench.outputs import check_files
    from workbench.registry import Experiment, find
    from workbench.runs import open_run
    from workbench.studies import run_study, save
    from workbench.studies import summary as summarize

    record, options = find(name), parse_options(option or ())
    if host is not None and not (isinstance(record, Experiment) and record.host):
        raise InputError(f"{record.name} does not use a host: leave --host out")
    if adapter is not None and (host is not None or not isinstance(record, Experiment)):
        raise InputError(f"--adapter {str(adapter)!r}: {record.name} loads no model here: leave it out")
    if isinstance(record, Experiment) and model is None:
        raise InputError(f"the experiment {record.name} needs the model: add --model with the captured checkpoint")
    if isinstance(record, Experiment) and other is not None:
        raise InputError(f"the experiment {record.name} takes one run, and {other!r} is a second one: give one run")
    inputs = [path for path in (run, other, None if host else model, adapter) if path is not None]
    runs = [open_run(path, exclude=exclude or ()) for path in (run, other) if path is not None]
    if out is not None:
        check_files([f"{record.name}.txt"], out, command="study", inputs=inputs, overwrite=overwrite)
    if model is not None and isinstance(record, Experiment):
        from workbench.experiments.branch_hosts import connected
        from workbench.experiments.registry import run_experiment

        loaded: Any
        with ExitStack() as held:
            if host is None:
                loaded = load_model(model, device, dtype, ignore_field, adapter)
            else:
                loaded = held.enter_context(connected(host, model, runs[0], key_env=key_env))
            results = run_experiment(name, loaded, runs[0], sequences=sequences, seed=seed, **options)
    else:
        results = run_study(name, *runs, seed=seed, **options)
    if out is not None:
        save(results, out, inputs=inputs, overwrite=overwrite)
    print(summarize(results))


@app.command()
@names_damage
def summary(run: RunPath, exclude: Exclude = None) -> None:
    """Summarize a run in the terminal."""
    from rich.console import Console

    from workbench.cli.tables import summary as tables
    from workbench.runs import open_run

    Console().print(tables(open_run(run, exclude=exclude or ())))


@app.command()
@names_damage
def report(
    run: RunPath,
    out: Annotated[
        Path, typer.Option(help="HTML file to write; the same text as Markdown is written beside it.")
    ] = Path("report.html"),
    results: Annotated[
        Path | None, typer.Option(help="Folder with results of experiments (`workbench study … --out`) to include.")
    ] = None,
    seed: Seed = 0,
    exclude: Exclude = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the results of all studies of a run as one self-contained HTML page."""
    from workbench.figures.report import write_report
    from workbench.runs import open_run
    from workbench.studies.result import load

    opened = open_run(run, exclude=exclude or ())
    given = None if results is None else load(results)
    for path in write_report(opened, out, results=given, seed=seed, inputs=[run], overwrite=overwrite):
        print(path)


@app.command()
@names_damage
def figures(
    run: RunPath,
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    format: Annotated[
        list[str] | None, typer.Option(help="svg, pdf, png or html; repeat for several. (default: all)")
    ] = None,
    column: Annotated[str, typer.Option(help="screen, single (89 mm) or double (183 mm).")] = "screen",
    which: Annotated[str, typer.Option("--set", help="all, main (for the text) or supplement.")] = "all",
    exclude: Exclude = None,
    overwrite: Overwrite = False,
) -> None:
    """Write all figures of a run, each with its numbers (CSV), caption and provenance."""
    from workbench.figures.export import FORMATS, write_all
    from workbench.runs import open_run

    formats = tuple(format or FORMATS)
    for path in write_all(
        open_run(run, exclude=exclude or ()),
        out,
        formats,
        column=cast(Any, column),
        which=cast(Any, which),
        inputs=[run],
        overwrite=overwrite,
    ):
        print(path)


@app.command()
@names_damage
def dashboard(
    runs: Annotated[list[str], typer.Argument(help="Runs to show, as folders or URLs.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that the runs were captured from, for attention patterns, ablations and the page Live. "
            "(default: nano's patterns for its runs, no page Live)"
        ),
    ] = None,
    vector: Vectors = None,
    sae: Saes = None,
    recipes: Recipes = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    port: Port = 5006,
    address: Address = "localhost",
    show: Show = False,
    allow_origin: AllowOrigin = None,
    basic_auth: BasicAuth = None,
) -> None:
    """Serve the dashboard of one or several runs."""
    from workbench.dashboards.app import serve

    options: dict[str, Any] = {"port": port, "address": address, "show": show}
    access: dict[str, Any] = {"allow_origin": allow_origin or (), "basic_auth": basic_auth}
    if model is None:
        given = {"--vector": vector, "--sae": sae, "--recipes": recipes}
        if unused := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{unused[0]} is for the model of the pages: add --model, or leave {unused[0]} out")
        serve(runs, **options, **access)
        return
    from workbench.capture.recorder import source_digest
    from workbench.live.app import dashboard_page
    from workbench.live.model_server import ModelServer
    from workbench.live.recipe_folder import RecipeFolder
    from workbench.research.steering_sources import read_sources
    from workbench.runs import open_run

    sources = read_sources(vector or (), sae or ())
    folder = RecipeFolder(recipes) if recipes is not None else None
    options["autoencoders"] = {
        source_digest(sources.saes[name].encode): Path(path).absolute()
        for name, _, path in (text.partition("=") for text in sae or ())
    }
    server = ModelServer(load_model(model, device, dtype, None), model, sources=sources, recipes=folder)
    server.warm_up()
    digest = server.model.checkpoint.digest
    if others := [path for path in runs if open_run(path).checkpoint["digest"] != digest]:
        print(f"note: {', '.join(others)} was captured from another checkpoint than {model}", file=sys.stderr)
    try:
        serve(runs, model=model, extra={"live": dashboard_page(server)}, **options, **access)
    finally:
        server.close()
