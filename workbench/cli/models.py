"""Commands about models: what one needs, GGUF files, and random checkpoints."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import (
    Dtype,
    IgnoreField,
    Model,
    Overwrite,
    Record,
    Seed,
    TokensPerSecond,
    UnitTokens,
    torch_dtype,
    whole_number,
)
from workbench.errors import InputError

app = typer.Typer()


@app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, .gguf file, 'nano', ollama:NAME, a Hugging Face id, or 20b, 120b for the "
            "published shapes. openai/gpt-oss-20b and -120b are not downloaded."
        ),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a forward pass. (default: 4096, or the context length if smaller)"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences generated together.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory of one GPU, as in 80GB or 24GiB.")] = "80GB",
    record: Record = None,
    unit_tokens: UnitTokens = 16_384,
    tokens_total: Annotated[
        int | None,
        typer.Option(parser=whole_number, metavar="N", help="Also plan a capture of this many tokens, as in 5e6."),
    ] = None,
    sequence_tokens: Annotated[
        int, typer.Option(min=10, help="Tokens of a sequence of that capture, or of an experiment.")
    ] = 1000,
    tokens_per_second: TokensPerSecond = None,
    experiments: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Also estimate the time of every experiment on N sequences of --sequence-tokens, on one H100.",
        ),
    ] = None,
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
) -> None:
    """Show the sizes, memory plan and hook points of a model without loading it.

    With --tokens-total, also show the disk of each record, the host memory and the time of a capture; with
    --experiments, the tokens and the time of every experiment.
    """
    from workbench.capture import estimate, recording
    from workbench.capture.compute import LOGIT_ROWS
    from workbench.capture.shape_model import ShapeModel, published_name
    from workbench.experiments import costs
    from workbench.model.info import Plan, describe, subject
    from workbench.model.memory import parse
    from workbench.model.packing import FORWARD_TOKENS

    size = published_name(model)
    about = subject(size or model, ignore_field or ())
    spec = recording.parse(record or recording.DEFAULT, about.cfg)
    plan = Plan(
        tokens=tokens or min(FORWARD_TOKENS, about.cfg.n_ctx),
        batch=batch,
        room=parse(memory),
        recorded=recording.wanted(spec, about.cfg),
        predictions=LOGIT_ROWS if spec.logprobs else 0,
        unit_tokens=unit_tokens,
        dtype=torch_dtype(dtype),
    )
    describe(about, plan)
    if tokens_total is not None:
        shape = ShapeModel(about.name, about.cfg, about.tokenizer(), plan.dtype)
        capture = estimate.for_tokens(
            shape,
            spec,
            tokens_total,
            sequence_tokens=sequence_tokens,
            unit_tokens=unit_tokens,
            tokens_per_second=tokens_per_second,
        )
        estimate.show(capture, f"A capture of sequences of {sequence_tokens:,} tokens")
    if experiments is not None:
        costs.show(size, sequences=experiments, sequence_tokens=sequence_tokens)


@app.command("convert-weights")
def convert_weights(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File to write; its name ends in .gguf.")],
    ignore_field: IgnoreField = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp, LM Studio and Ollama; no value changes."""
    from workbench.model.checkpoint import open_checkpoint, resolve
    from workbench.model.formats.gguf_writer import write_gguf
    from workbench.model.memory import human
    from workbench.outputs import check_output, staged

    if out.suffix != ".gguf":
        raise InputError(f"{out}: expected the name of a file that ends in .gguf")
    check_output(out, command="convert-weights", inputs=[model], overwrite=overwrite)
    checkpoint = open_checkpoint(resolve(model), ignore_fields=ignore_field or ())
    inputs: list[str | Path] = [model, checkpoint.path]
    for note in checkpoint.notes:
        print(f"{checkpoint.path}: {note}", file=sys.stderr)
    with staged(out, command="convert-weights", inputs=inputs, overwrite=overwrite) as part:
        write_gguf(checkpoint, part)
    print(f"{out}: {len(checkpoint.tensors):,} tensors, {human(out.stat().st_size)}")


@app.command()
def random(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    size: Annotated[str, typer.Option(help="Published shape: 20b or 120b.")] = "20b",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers. (default: as published)")] = None,
    vocab: Annotated[int | None, typer.Option(min=72, help="Vocabulary size. (default: as published)")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with random weights in a published shape, for tests and benchmarks."""
    from dataclasses import replace

    from workbench.model.config import PUBLISHED
    from workbench.model.export import save_random
    from workbench.outputs import staged

    if size not in PUBLISHED:
        raise InputError(f"--size {size!r}: choose one of {', '.join(PUBLISHED)}")
    cfg = PUBLISHED[size]
    n_layers = layers or cfg.n_layers
    windows = tuple(cfg.windows[layer % 2] for layer in range(n_layers))
    shape = replace(cfg, n_layers=n_layers, windows=windows, d_vocab=vocab or cfg.d_vocab)
    with staged(out, command="random", overwrite=overwrite) as part:
        save_random(part, shape, seed=seed)
