"""Commands about models: what one needs, and random checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import Dtype, IgnoreField, Record, Seed, UnitTokens, torch_dtype
from workbench.errors import InputError

app = typer.Typer()


@app.command()
def info(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, .gguf file, 'nano', ollama:NAME, a Hugging Face id, or 20b, 120b for the "
            "published shapes."
        ),
    ],
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a forward pass. [default: 4096, or the context length if smaller]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences generated together.")] = 1,
    memory: Annotated[str, typer.Option(help="Memory of one GPU, as in 80GB or 24GiB.")] = "80GB",
    record: Record = None,
    unit_tokens: UnitTokens = 16_384,
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
) -> None:
    """Show the sizes, memory plan and hook points of a model without loading it."""
    from workbench.capture import recording
    from workbench.capture.compute import FORWARD_TOKENS, LOGIT_ROWS
    from workbench.model.info import Plan, describe, subject
    from workbench.model.memory import parse

    about = subject(model, ignore_field or ())
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


@app.command()
def random(
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    size: Annotated[str, typer.Option(help="Published shape: 20b or 120b.")] = "20b",
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers. [default: as published]")] = None,
    vocab: Annotated[int | None, typer.Option(min=72, help="Vocabulary size. [default: as published]")] = None,
    seed: Seed = 0,
) -> None:
    """Write a checkpoint with random weights in a published shape, for tests and benchmarks."""
    from dataclasses import replace

    from workbench.model.config import PUBLISHED
    from workbench.model.export import save_random

    if size not in PUBLISHED:
        raise InputError(f"--size {size!r}: choose one of {', '.join(PUBLISHED)}")
    cfg = PUBLISHED[size]
    n_layers = layers or cfg.n_layers
    windows = tuple(cfg.windows[layer % 2] for layer in range(n_layers))
    save_random(out, replace(cfg, n_layers=n_layers, windows=windows, d_vocab=vocab or cfg.d_vocab), seed=seed)
