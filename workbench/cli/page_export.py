"""What `workbench export RUN neuronpedia` writes: pages of experts, and of chosen neurons and features."""

import re
from pathlib import Path
from typing import Any

from workbench.cli.options import load_model
from workbench.counting import count_of
from workbench.errors import InputError


def experts_of(names: list[str]) -> list[tuple[int, int]]:
    """Return layer and expert of each name, as 2.5.

    Raises:
        InputError: a name has another form.
    """
    for name in names:
        if not re.fullmatch(r"\d{1,6}\.\d{1,6}", name):
            raise InputError(f"--neurons {name}: expected a layer and the number of an expert, as in 2.5")
    return [(int(layer), int(expert)) for layer, expert in (name.split(".") for name in dict.fromkeys(names))]


def write(
    run: str,
    out: Path,
    model: str | None,
    sequences: int,
    experts: list[tuple[int, int]],
    features: str | None,
    overwrite: bool,
) -> None:
    """Write the pages of a run's experts, of the neurons of some, and of features of its autoencoder."""
    from workbench.outputs import check_output
    from workbench.runs import open_run
    from workbench.studies import expert_examples, feature_examples, feature_pages, neuron_examples

    check_output(out, command="export", inputs=[run], overwrite=overwrite)
    opened, logits = open_run(run), None
    own = [neuron_examples.load(opened, layer=layer, expert=expert) for layer, expert in experts]
    effects: list[Any] = [None] * len(own)
    if model is not None:
        from workbench.experiments import expert_logits
        from workbench.experiments.from_run import transcripts
        from workbench.experiments.registry import chosen_sequences

        loaded = load_model(model, "auto", "bfloat16")
        if opened.checkpoint["digest"] != loaded.checkpoint.digest:
            raise InputError(
                f"{run} was captured from another checkpoint than {model}: give the checkpoint that was captured"
            )
        rows = transcripts(opened, chosen_sequences(opened, loaded.cfg.n_ctx, sequences))
        logits = expert_logits.load(loaded, rows)
        effects = [expert_logits.neuron_logits(loaded, layer, expert) for layer, expert in experts]
    neurons = [p for ds, e in zip(own, effects, strict=True) for p in feature_pages.neuron_pages(opened, ds, e)]
    of_features = []
    if features is not None:
        chosen = feature_examples.load(opened, feature_examples.numbers_of(features))
        of_features = list(feature_pages.dictionary_pages(opened, chosen, feature_examples.table(opened)))
    examples, others = expert_examples.load(opened), [*neurons, *of_features]
    n = feature_pages.write_pages(opened, out, examples, logits, neurons=others, overwrite=overwrite)
    shown = f"pages of {count_of(n - len(others), 'expert')}" + (
        f" and {count_of(len(neurons), 'neuron')}" if neurons else ""
    )
    shown += f" and {count_of(len(of_features), 'feature')}" if of_features else ""
    print(f"{out}: {shown}" + ("" if logits is not None else ", without logits: give --model for them"))
