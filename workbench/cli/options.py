"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from workbench.errors import InputError
from workbench.memory import MODEL_BYTES, refuse_small_limit

Model = Annotated[str, typer.Argument(help="Checkpoint folder, .gguf file, 'nano', ollama:NAME, or a Hugging Face id.")]
RunPath = Annotated[str, typer.Argument(help="Run written by `workbench capture`: a folder, or a URL such as s3://….")]
Prompts = Annotated[Path, typer.Argument(help="JSON Lines with id and messages, and optionally expected and meta.")]
Efforts = Annotated[list[str] | None, typer.Option(help="low, medium, high; repeat for several. (default: all three)")]
Samples = Annotated[int, typer.Option(min=1, max=10**6, help="Samples for each prompt and effort.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, cuda:0, or several devices as in cuda:0,cuda:1.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, or float32 for all arithmetic in float32.")]


IgnoreField = Annotated[
    list[str] | None, typer.Option(help="Unknown field of config.json to accept; repeat for several.")
]
Adapter = Annotated[Path | None, typer.Option(help="PEFT folder with a LoRA adapter for the model.")]
Vectors = Annotated[
    list[str] | None,
    typer.Option(
        "--vector", help="NAME=FILE (.npy, .safetensors, .pt) of a vector to steer along; repeat for several."
    ),
]
Saes = Annotated[
    list[str] | None,
    typer.Option(
        "--sae", help="NAME=FOLDER of a sparse autoencoder (SAELens, dictionary_learning); repeat for several."
    ),
]
Recipes = Annotated[
    Path | None, typer.Option(help="Folder of recipes (*.json) that the page Live lists and viewers may save in.")
]
Record = Annotated[
    list[str] | None,
    typer.Option(
        help="routing, router_logits, sinks, sink_sums, logprobs, examples, neurons, features:FOLDER, a hook point, or "
        "FILE.py:NAME of a recorder, with options as in 'resid_post layers=0-3'; see `workbench capture`. "
        "(default: routing, sinks, logprobs)"
    ),
]
Exclude = Annotated[str | None, typer.Option(help="Leave sequences with these flags out, as in irregular,truncated.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace an output that exists, if this command wrote it and it was not changed since."
    ),
]
Port = Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")]
Address = Annotated[str, typer.Option(help="Address to listen on; any but localhost is open to other machines.")]
Show = Annotated[bool, typer.Option(help="Open a browser.")]
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(help="HOST:PORT of another origin that may connect, such as a proxy; repeat for several."),
]
BasicAuth = Annotated[Path | None, typer.Option(help="JSON file of user names and passwords.")]
MAX_SEED = 2**31 - 1
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of random numbers.")]
UnitTokens = Annotated[
    int, typer.Option(min=1, max=2**31 - 1, help="Tokens of a unit, which is computed and committed at once.")
]


TokensPerSecond = Annotated[
    float | None,
    typer.Option(min=1e-3, max=1e9, help="Plan with this speed. (default: measured, or estimated for an H100)"),
]


def whole_number(text: str | int) -> int:
    """Return the number of a text such as 5000000, 5_000_000 or 5e6.

    Raises:
        BadParameter: it is not a positive whole number.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value <= 1e15 or value != int(value):
        raise typer.BadParameter(f"{text!r}: expected a positive whole number, such as 5000000 or 5e6")
    return int(value)


def torch_dtype(name: str) -> Any:
    """Return the torch dtype of a name.

    Raises:
        InputError: the name is not one of those the command line takes.
    """
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if name not in dtypes:
        raise InputError(f"--dtype {name!r}: choose one of {', '.join(dtypes)}")
    return dtypes[name]


def load_model(
    model: str, device: str, dtype: str, ignore_fields: list[str] | None = None, adapter: Path | None = None
) -> Any:
    """Load a checkpoint as the options of a command specify."""
    refuse_small_limit(MODEL_BYTES)
    from workbench.model import load

    return load(model, device=device, dtype=torch_dtype(dtype), adapter=adapter, ignore_fields=ignore_fields or ())
