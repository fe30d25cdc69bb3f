"""`workbench bench`: measure the CPU path, captures, the store, the dashboard and the kernels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Measure the CPU path, captures, the store, the dashboard, and the kernels.", no_args_is_help=True
)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file, if a benchmark wrote it and it was not changed since.")
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
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequence length; repeat for several. (default: 512, 2048, 4096)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each program.")] = 5,
    long: Annotated[int | None, typer.Option(min=1, help="Also run one recorded pass of this many tokens.")] = None,
    decode: Annotated[
        bool,
        typer.Option(
            "--decode",
            help="Compare decoding at batch 1 and 8, also with hooks, with torch, transformers and llama.cpp.",
        ),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder in the Hugging Face layout to use instead of two random layers."),
    ] = None,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare the time of two layers of gpt-oss-20b on the CPU with transformers; the passes alternate."""
    save = _output(out, overwrite)
    from workbench.bench.cpu import run

    lengths = tokens or (() if decode else (512, 2048, 4096))
    save(run(lengths, rounds, checkpoint=checkpoint, long=long, decode=decode))


@app.command()
def full(
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint folder, .gguf file, 'nano', ollama:NAME, or a Hugging Face id. "
            "(default: random weights in the shape of 20b (13 GB of disk))"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the captured sequence.")] = 1024,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, mps or cuda:0.")] = "cpu",
    limit: Annotated[str, typer.Option(help="Exit with 1 if the peak memory reaches this limit.")] = "18GB",
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Load, generate and capture with all of gpt-oss-20b's layers on this machine; measure times and peak memory."""
    save = _output(out, overwrite)
    from workbench.bench.full import run
    from workbench.model.memory import parse

    save(run(checkpoint, tokens=tokens, device=device, limit=parse(limit)))


@app.command()
def graph(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint folder, .gguf file, 'nano', ollama:NAME, or a Hugging Face id. "
            "(default: random weights in the shape of 20b (13 GB of disk))"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the explained sequence.")] = 256,
    layers: Annotated[
        int | None, typer.Option(min=1, max=24, help="Layers of the random weights. (default: all)")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, mps or cuda:0.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Graphs that are made.")] = 2,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure time and memory of an attribution graph of one target."""
    save = _output(out, overwrite)
    from workbench.bench.graph import run
    from workbench.errors import InputError

    if checkpoint is not None and layers is not None:
        raise InputError("--layers is for random weights: leave it out, or leave the checkpoint out")
    save(run(checkpoint, tokens=tokens, layers=layers, device=device, rounds=rounds))


@app.command()
def capture(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint folder, .gguf file, 'nano', ollama:NAME, or a Hugging Face id.")
    ] = "nano",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the sequence that is run.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Measured passes of each program.")] = 5,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure tokens per second of the forward pass, of a capture, and of other tools that are installed."""
    save = _output(out, overwrite)
    import torch

    from workbench.bench.capture import run
    from workbench.errors import InputError

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if dtype not in dtypes:
        raise InputError(f"--dtype {dtype!r}: choose one of {', '.join(dtypes)}")
    save(run(checkpoint, tokens, rounds, dtypes[dtype]))


@app.command()
def store(
    streams: Annotated[int, typer.Option(min=1, help="Layers whose residual streams are written.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare writing a unit of gpt-oss-20b's width with the defaults of zarr-python; the writes alternate."""
    save = _output(out, overwrite)
    from workbench.bench.store import run

    save(run(streams, rounds))


@app.command()
def reading(
    run: Annotated[str, typer.Argument(help="Run to read; a run of random numbers is written if it does not exist.")],
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens of the random run: 10 million are 2 GB.")] = 10_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each query.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of random numbers.")] = 0,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the queries of a dashboard on a run of millions of tokens."""
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
def studies(
    run: Annotated[str, typer.Argument(help="Run to study, such as one that `bench reading` wrote.")],
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how long each study of a run takes."""
    save = _output(out, overwrite)
    from workbench.bench.studies import measure

    save(measure(run))


@app.command()
def dashboard(
    run: Annotated[str, typer.Argument(help="Run to show, such as one that `bench reading` wrote.")],
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each page.")] = 3,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions that change a selection at the same time.")] = 5,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder in which results of studies are kept for another measurement. (default: none)"),
    ] = None,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure the dashboard of a large run in a browser: page loads, changes of selection, sessions, memory."""
    save = _output(out, overwrite)
    from workbench.bench.dashboard import run as measure

    save(measure(run, rounds, sessions, results))


@app.command()
def kernels(
    target: Annotated[
        list[str] | None, typer.Option(help="GPU target, such as sm_90 or gfx942; repeat for several. (default: all)")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Kernel, such as moe.gate_up; repeat for several. (default: all)")
    ] = None,
    write: Annotated[bool, typer.Option(help="Write kernels/gpu/REPORT.md.")] = False,
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Compile every kernel for every GPU, without a GPU; exit with 1 if one spills or misses the tensor cores."""
    save = _output(out, overwrite)
    from workbench.bench.kernels import run

    rows, wrong = run(target or (), kernel or (), write=write)
    save(rows)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def gpu(
    stage: Annotated[
        list[str] | None, typer.Option(help="kernels, models or baselines; repeat for several. (default: all)")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured launches of each kernel.")] = 20,
    assembler: Annotated[
        list[Path] | None, typer.Option(help="Also measure the kernels assembled by this ptxas; repeat for several.")
    ] = None,
    autotune: Annotated[
        Path | None,
        typer.Option(help="Search for better tiles and write them to this file, which WORKBENCH_TILES reads."),
    ] = None,
    first: Annotated[
        bool,
        typer.Option("--first", help="Run all checks of a new GPU: correctness, then timings; see docs/howto/h100.md."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --first: list the steps and run none.")] = False,
    device: Annotated[str, typer.Option(help="With --first: the GPU.")] = "cuda:0",
    out: Json = None,
    overwrite: Overwrite = False,
) -> None:
    """Check and measure the kernels and both models on this machine's GPU; wrong results stop the measurement."""
    save = _output(out, overwrite)
    if first or dry_run:
        from workbench.bench.first import start

        raise typer.Exit(start(device, out, dry_run=dry_run, overwrite=overwrite))
    from workbench.bench.gpu import STAGES, run

    save_tiles = _output(autotune, overwrite)
    result = run(stages=stage or STAGES, repeats=repeats, assemblers=assembler or (), tune=autotune is not None)
    save_tiles(result.get("tiles"))
    save(result)
