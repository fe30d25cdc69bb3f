"""Sink ablation: attention without the learned sinks, in all layers, in one kind of layers, or in one layer."""

from collections.abc import Sequence

import xarray as xr

from workbench.experiments.final_channel import final_effects
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.hooks.interventions import remove_sinks, scale_sinks
from workbench.model.transformer import GptOss
from workbench.registry import Experiment

EXPERIMENT = Experiment(
    name="sink-ablation",
    title="Sink ablation",
    question="What does the final answer lose when heads have no attention sink?",
    compute="forward passes over the sequences: one for each layer and four more",
    cost={"passes": 4, "layer_passes": 1},
    aliases=("silence",),
    order=150,
)


def experiment(model: GptOss, rows: Sequence[Transcript], *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the effects of removing or halving the sinks on the final channel."""
    layers = list(range(model.cfg.n_layers))
    windowed = [i for i in layers if model.cfg.windows[i] is not None]
    full = [i for i in layers if model.cfg.windows[i] is None]
    what: dict[str, Edit | Sequence[Edit]] = {
        "no sinks": remove_sinks(layers),
        "sinks halved": scale_sinks(layers, 0.5),
    }
    what |= {"no sinks, full layers": remove_sinks(full)} if full else {}
    what |= {"no sinks, window layers": remove_sinks(windowed)} if windowed else {}
    what |= {f"no sinks, layer {layer}": remove_sinks([layer]) for layer in layers}
    return {"sinks": final_effects(model, rows, what, seed, "Answers without attention sinks")}
