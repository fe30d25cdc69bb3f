"""Commands about features of sparse autoencoders."""

from pathlib import Path
from typing import Annotated

import typer

from workbench.cli.damage import names_damage
from workbench.cli.options import Adapter, Device, Dtype, IgnoreField, Overwrite, RunPath, Seed, load_model

app = typer.Typer()


@app.command()
@names_damage
def feature_ablation(
    run: RunPath,
    feature: Annotated[int, typer.Argument(min=0, help="Number of the feature.")],
    model: Annotated[str, typer.Option(help="The captured checkpoint.")],
    sae: Annotated[Path, typer.Option(help="Folder of the autoencoder, whose features the run recorded.")],
    out: Annotated[
        Path | None, typer.Option(help="Write the tables (CSV, JSON) and the summary to this folder.")
    ] = None,
    examples: Annotated[int, typer.Option(min=1, max=1000, help="Tokens of each kind: largest and random.")] = 12,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "float32",
    ignore_field: IgnoreField = None,
    adapter: Adapter = None,
    overwrite: Overwrite = False,
) -> None:
    """Ablate a feature of an autoencoder in the model, and measure it at examples that a run recorded.

    The run recorded examples with `--record features:FOLDER`. At its largest activations and at a random sample, the
    feature is set to zero over the text so far; printed is what the predictions of the next token lose, beside a random
    direction of the same size. The dashboard's page Features by example runs this command.
    """
    from workbench.experiments.feature_ablation import load_autoencoder, measure
    from workbench.outputs import check_files
    from workbench.runs import open_run
    from workbench.studies import save, summary

    opened = open_run(run)
    inputs: list[str | Path] = [run, sae, *([adapter] if adapter else [])]
    if out is not None:
        check_files(["feature-ablation.txt"], out, command="study", inputs=inputs, overwrite=overwrite)
    autoencoder = load_autoencoder(sae, opened)
    loaded = load_model(model, device, dtype, ignore_field, adapter)
    results = {f"feature-{feature}": measure(loaded, autoencoder, opened, feature, examples=examples, seed=seed)}
    if out is not None:
        save(results, out, inputs=inputs, overwrite=overwrite)
    print(summary(results), end="")
