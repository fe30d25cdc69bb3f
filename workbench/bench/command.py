"""`workbench bench`: the CPU beside transformers, the kernels compiled without a card, the kernels on a card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure: the CPU path, the compiled kernels, a GPU.", no_args_is_help=True)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file of numbers that a benchmark wrote and nobody changed.")
]


def _output(path: Path | None, overwrite: bool) -> Callable[[Any], None]:
    """Return a function that writes numbers as JSON; the file is checked at once, before anything is measured."""
    from workbench.outputs import check_output, staged

    if path is not None:
        check_output(path, command="bench", overwrite=overwrite)

    def write(result: Any) -> None:
        if path is not None:
            with staged(path, command="bench", overwrite=overwrite) as part:
                part.write_text(json.dumps(result, indent=1) + "\n")

    return write


@app.command()
def cpu(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Lengths; repeat. [default: 512, 2048, 4096]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each.")] = 5,
    long: Annotated[int | None, typer.Option(min=1, help="Also one recorded pass of so many tokens.")] = None,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="Decoding at batch 1 and 8, also recorded and edited, beside torch, transformers and llama.cpp.",
        ),
    ] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="A folder to use instead of two random layers.")] = None,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Two layers of gpt-oss-20b on the CPU beside transformers, in turn."""
    save = _output(out, overwrite)
    from workbench.bench.cpu import run

    lengths = tokens or (() if decode else (512, 2048, 4096))
    save(run(lengths, rounds, checkpoint=checkpoint, long=long, decode=decode))


@app.command()
def full(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder to use instead of a random 20b, 13 GB of disk.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the captured sequence.")] = 1024,
    device: Annotated[str, typer.Option(help="As for capture.")] = "cpu",
    limit: Annotated[str, typer.Option(help="Exit with 1 if the peak is not below.")] = "18GB",
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """gpt-oss-20b's shape whole, on this machine: load, generate, capture, and the most memory that took."""
    save = _output(out, overwrite)
    from workbench.bench.full import run
    from workbench.model.memory import parse

    save(run(checkpoint, tokens=tokens, device=device, limit=parse(limit)))


@app.command()
def capture(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint as everywhere.")] = "nano",
    tokens: Annotated[int, typer.Option(min=2, help="Of the one sequence that is run.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each.")] = 5,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Tokens a second: forward only, our capture, and other tools' recording where they are installed."""
    save = _output(out, overwrite)
    import torch

    from workbench.bench.capture import run

    save(run(checkpoint, tokens, rounds, {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]))


@app.command()
def store(
    streams: Annotated[int, typer.Option(min=1, help="Layers whose residual streams are written.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Measured times of each.")] = 5,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Writing a unit of gpt-oss-20b's width, beside zarr-python's own defaults, in turn."""
    save = _output(out, overwrite)
    from workbench.bench.store import run

    save(run(streams, rounds))


@app.command()
def reading(
    run: Annotated[str, typer.Argument(help="The run to ask; one of random numbers is made where there is none.")],
    tokens: Annotated[int, typer.Option(min=1000, help="Of a run that is made: 10 million are 2 GB.")] = 10_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Times each question is asked.")] = 5,
    seed: int = 0,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Open a run of millions of tokens and answer what dashboards ask of it, timed."""
    save = _output(out, overwrite)
    from workbench.bench.reading import ask, make
    from workbench.errors import InputError
    from workbench.runs import open_run

    try:
        complete = open_run(run).status == "complete"
    except InputError:
        complete = False
    if not complete:
        make(run, tokens, seed)
    save(ask(run, rounds))


@app.command()
def dashboard(
    run: Annotated[str, typer.Argument(help="The run to look at, as `bench reading` makes one.")],
    rounds: Annotated[int, typer.Option(min=1, help="Times each is measured.")] = 3,
    sessions: Annotated[int, typer.Option(min=1, help="That change something at once.")] = 5,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """The dashboard of a large run in a real browser: pages, changes of selection, sessions at once, memory."""
    save = _output(out, overwrite)
    from workbench.bench.dashboard import run as measure

    save(measure(run, rounds, sessions))


@app.command()
def kernels(
    target: Annotated[list[str] | None, typer.Option(help="sm_90, gfx942 …; repeat. [default: all]")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="moe.gate_up …; repeat. [default: all]")] = None,
    write: Annotated[bool, typer.Option(help="Write kernels/gpu/REPORT.md.")] = False,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Compile every kernel for every GPU, no card needed; exits with 1 if one spills or misses the tensor cores."""
    save = _output(out, overwrite)
    from workbench.bench.kernels import run

    rows, wrong = run(target or (), kernel or (), write=write)
    save(rows)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def gpu(
    stage: Annotated[list[str] | None, typer.Option(help="kernels, models, peers; repeat. [default: all]")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured launches of each.")] = 20,
    assembler: Annotated[
        list[Path] | None, typer.Option(help="Also measure the kernels as this ptxas assembles them; repeat.")
    ] = None,
    autotune: Annotated[
        Path | None, typer.Option(help="Search for better tiles and write them here, as WORKBENCH_TILES reads them.")
    ] = None,
    first: Annotated[
        bool,
        typer.Option("--first", help="The first run on a card: correctness, then timings; see docs/howto/h100.md."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --first: list the steps and run none.")] = False,
    device: Annotated[str, typer.Option(help="With --first: the GPU.")] = "cuda:0",
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """The kernels and both models on this machine's GPU, as fractions of its limits; wrong results stop it first."""
    save = _output(out, overwrite)
    if first or dry_run:
        from workbench.bench.first import start

        raise typer.Exit(start(device, out, dry_run=dry_run, overwrite=overwrite))
    from workbench.bench.gpu import STAGES, run

    save_tiles = _output(autotune, overwrite)
    result = run(stages=stage or STAGES, repeats=repeats, assemblers=assembler or (), tune=autotune is not None)
    save_tiles(result.get("tiles"))
    save(result)
