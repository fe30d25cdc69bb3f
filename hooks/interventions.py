"""Interventions: change activations, attention or routing of a model within a context.

    with applied(model, forbid(3, [1, 7], tokens=analysis), remove_sinks(range(4))) as report:
        model.generate(prompts)

Every function here makes an `Edit`; `applied` states how they compose, end, and fail when they match no token. `tokens`
is a token set (see `workbench.harmony.token_set`), positions, a slice of them, or None for every token.

An expert can be taken away in several ways that are different experiments; name the one you used:

| what | the other gates | who takes the slot |
|---|---|---|
| `forbid` | softmax over the new choice | the next-best expert |
| `ablate(how="zero")` | as they were | nobody: the expert writes nothing, not even its bias |
| `ablate(how="renormalise")` | scaled up to sum to what they summed to | nobody |
| `ablate(how="mean")` | as they were | the expert's mean output over its own tokens (`expert_means`) |
| `ablate(how="resample")` | as they were | the expert's output on another of its tokens in this pass |
"""

from workbench.hooks.activations import patch, replace, resample, steer
from workbench.hooks.attention import knockout, remove_sinks, scale_heads, scale_sinks, set_sinks
from workbench.hooks.edits import applied
from workbench.hooks.experts import ablate, expert_means, forbid, force, reweight, route

__all__ = [
    "ablate",
    "applied",
    "expert_means",
    "forbid",
    "force",
    "knockout",
    "patch",
    "remove_sinks",
    "replace",
    "resample",
    "reweight",
    "route",
    "scale_heads",
    "scale_sinks",
    "set_sinks",
    "steer",
]
