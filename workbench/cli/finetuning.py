"""The command that trains an adapter."""

import os
from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.options import Device, Dtype, IgnoreField, Model, Overwrite, Seed, load_model
from workbench.counting import count_of

app = typer.Typer()


@app.command()
def finetune(
    model: Model,
    data: Annotated[Path, typer.Argument(help="JSONL of transcripts or of messages, as `workbench capture` reads.")],
    out: Annotated[Path, typer.Option(help="PEFT folder to write.")],
    part: Annotated[
        list[str] | None,
        typer.Option(help="attention, router or experts; repeat for several. (default: attention, experts)"),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Rank of the updates.")] = 8,
    alpha: Annotated[float, typer.Option(help="Updates are scaled by alpha / rank.")] = 16.0,
    channel: Annotated[
        list[str] | None,
        typer.Option(help="Teach only messages in this channel; repeat for several. (default: all of an answer)"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps. (default: one pass over the data)")] = None,
    batch: Annotated[int, typer.Option(min=1, max=10**6, help="Conversations of a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate of AdamW.")] = 2e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="Weight decay of AdamW.")] = 0.0,
    adapter: Annotated[Path | None, typer.Option(help="PEFT folder to continue from.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    ignore_field: IgnoreField = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a LoRA adapter on conversations; the weights stay packed. Rerun the command to resume."""
    from workbench.adapters.finetune import Schedule, state_path
    from workbench.adapters.finetune import finetune as train
    from workbench.adapters.trainable import Options
    from workbench.outputs import check_output

    options = Options(tuple(part or Options.parts), rank, alpha)
    schedule = Schedule(steps, batch, learning_rate, weight_decay, seed=seed)
    replaced = overwrite or os.path.exists(state_path(out))  # perhaps of this training: `train` compares them
    check_output(out, command="finetune", inputs=[data, *([adapter] if adapter else [])], overwrite=replaced)
    loaded = load_model(model, device, dtype, ignore_field)
    done = train(
        loaded, data, out, options=options, schedule=schedule, channels=channel, adapter=adapter, overwrite=overwrite
    )
    print(
        f"{out}: {count_of(len(done['losses']), 'step')}, {done['tokens']:,} tokens, last loss {done['losses'][-1]:.4f}"
    )
