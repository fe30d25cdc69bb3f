"""Compile interventions of a recipe to the library's edits (see `workbench.hooks.interventions`)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import InputError
from workbench.harmony import token_set
from workbench.harmony.messages import EFFORTS
from workbench.harmony.transcripts import Transcript
from workbench.hooks import interventions as library
from workbench.hooks.edits import Edit
from workbench.model.transformer import GptOss
from workbench.research.directions import direction
from workbench.research.intervention import CELL_KINDS, CHANNEL_DIRECTIONS, STEERING_KINDS, Intervention
from workbench.research.steering_sources import SteeringSources

Prompt = Callable[[str, str], list[int]]  # user message and effort (empty: the recipe's own) → ids of the prompt


def edits_of(
    one: Intervention,
    model: GptOss,
    transcripts: Sequence[Transcript] | None,
    sources: SteeringSources,
    prompt: Prompt,
) -> list[Edit]:
    """Return the edits of an intervention: of cells and directions one for each layer.

    Raises:
        InputError: a source is not known, a direction has no tokens, or the other prompt has another length.
    """
    tokens = one.scope.token_set(model.tokenizer)
    if one.kind in CELL_KINDS:
        return _expert_edits(one, model)
    if one.kind == "scale_sinks":
        return [library.scale_sinks(one.layers, one.strength, one.heads or None, tokens)]
    if one.kind == "scale_heads":
        return [library.scale_heads(one.layers, one.strength, one.heads or None, tokens)]
    if one.kind == "knockout":
        return [library.knockout(one.layers, tokens, one.keys.token_set(model.tokenizer), one.heads or None)]
    if one.kind == "patch":
        return [_patch(one, model, prompt)]
    vectors = vectors_of(one, model, transcripts, sources, prompt)
    return [library.steer(point, vector, one.strength, tokens) for point, vector in vectors.items()]


def check_intervention(one: Intervention, model: GptOss, sources: SteeringSources, prompt: Prompt) -> None:
    """Check an intervention against a model, without a pass over any tokens.

    Raises:
        InputError: the model lacks a layer, head or expert, a source is not known, or the other prompt has another
            length.
    """
    if missing := [layer for layer in one.layers if layer >= model.cfg.n_layers]:
        raise InputError(f"layer {missing[0]}: the model has layers 0 to {model.cfg.n_layers - 1}")
    if one.kind == "patch":
        _prompts_to_patch(one, prompt)
    elif one.kind != "steer":  # whose directions are means over tokens
        for edit in edits_of(one, model, None, sources, prompt):
            edit.points(model)


def vectors_of(
    one: Intervention,
    model: GptOss,
    transcripts: Sequence[Transcript] | None,
    sources: SteeringSources,
    prompt: Prompt,
) -> dict[str, Float[Tensor, " d"]]:
    """Return hook point → direction of an intervention that steers; strength 1 adds the direction as it is.

    Raises:
        InputError: a source is not known or does not name its hook point, or the means of channels have no transcripts.
    """
    assert one.kind in STEERING_KINDS
    points = [f"blocks.{layer}.hook_resid_post" for layer in one.layers]
    if one.kind == "vector":
        return dict.fromkeys(points, sources.vector(one.source))
    if one.kind == "feature":
        vector = sources.feature(one.source, one.feature)
        own = sources.sae(one.source).cfg.hook_name
        if not points and own is None:
            raise InputError(f"SAE {one.source!r} does not name its hook point: give the intervention layers")
        return dict.fromkeys(points or [str(own)], vector)
    labels: tuple[dict[str, str], ...] = tuple({"channel": name} for name in (one.toward, one.away))
    if one.toward in EFFORTS:  # the means of the same prompt at two efforts
        rows = [np.array(prompt("", effort), dtype=np.int32) for effort in (one.toward, one.away)]
        pair = zip((one.toward, one.away), rows, strict=True)
        transcripts = [Transcript(effort, "prompt", effort, ids, len(ids)) for effort, ids in pair]
        labels = tuple({"effort": name} for name in (one.toward, one.away))
    if transcripts is None:
        raise InputError("a recipe that steers needs transcripts, from which the means of channels are taken")
    _check_channels(one, model, transcripts)
    return {
        point: direction(model, "resid_post", layer, a=labels[0], b=labels[1], transcripts=transcripts)
        for point, layer in zip(points, one.layers, strict=True)
    }


def _check_channels(one: Intervention, model: GptOss, transcripts: Sequence[Transcript]) -> None:
    """Check that both channels of a direction have tokens, before a pass over the transcripts."""
    for name in (one.toward, one.away):
        if name not in CHANNEL_DIRECTIONS:
            continue
        tokens = token_set(tokenizer=model.tokenizer, channel=(name,))
        if not any(tokens(row.tokens).any() for row in transcripts):
            raise InputError(
                f"the answer has no token in the channel {name!r}, whose mean the direction needs: generate more new "
                "tokens, or choose other channels"
            )


def _expert_edits(one: Intervention, model: GptOss) -> list[Edit]:
    tokens = one.scope.token_set(model.tokenizer)
    layers: dict[int, list[int]] = {}
    for layer, expert in one.cells:
        layers.setdefault(layer, []).append(expert)
    if one.kind == "reweight":
        return [library.reweight(layer, experts, one.strength, tokens) for layer, experts in sorted(layers.items())]
    function = library.forbid if one.kind == "forbid" else library.force
    return [function(layer, experts, tokens) for layer, experts in sorted(layers.items())]


def _prompts_to_patch(one: Intervention, prompt: Prompt) -> list[int]:
    """Return the ids of the other prompt, after checking that it has as many tokens as the recipe's own."""
    own, other = prompt("", ""), prompt(one.source, one.source_effort)
    if len(own) != len(other):
        raise InputError(
            f"the prompt to patch from has {len(other):,} tokens and this one {len(own):,}: states are exchanged "
            "position by position, so choose a message with as many tokens"
        )
    return other


@torch.no_grad()
def _patch(one: Intervention, model: GptOss, prompt: Prompt) -> Edit:
    """Return the edit that gives the prompt the states of the other one, position by position."""
    other = _prompts_to_patch(one, prompt)
    points = [f"blocks.{layer}.hook_resid_post" for layer in one.layers]
    if missing := [layer for layer in one.layers if layer >= model.cfg.n_layers]:
        raise InputError(f"layer {missing[0]} to patch: the model has layers 0 to {model.cfg.n_layers - 1}")
    _, cache = model.run_with_cache(torch.tensor([other], device=model.device), names_filter=points)
    states = {point: cache[point] for point in points}
    return library.patch(points, states, one.scope.token_set(model.tokenizer))
