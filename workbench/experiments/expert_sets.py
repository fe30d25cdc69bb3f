"""Sets of experts that routing associates with a group of sequences, and their control: random sets of equal load."""

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.experiments.effects import expert_load, load_matched, logprobs, paired
from workbench.experiments.final_channel import answered_rows, final_tokens, generated_tokens
from workbench.harmony.token_sets import TokenSet
from workbench.harmony.transcripts import Transcript
from workbench.hooks.edits import Edit
from workbench.model.transformer import GptOss

CONTROLS = 20  # load-matched random sets
_SIZE = 6  # experts of a named set


def group_of(row: Transcript) -> str:
    """What experts are named for: the domain of a task, or the task."""
    return str(row.meta.get("domain") or row.meta.get("task") or "all")


def named_experts(model: GptOss, rows: Sequence[Transcript], group: str, size: int = _SIZE) -> list[tuple[int, int]]:
    """The experts whose share of what a group writes exceeds most their share of what the others write."""
    written = generated_tokens(model)
    own, others = ([r for r in rows if (group_of(r) == group) is side] for side in (True, False))
    excess = np.nan_to_num(expert_load(model, own, written)) - np.nan_to_num(expert_load(model, others, written))
    return [
        (int(layer), int(e))
        for layer, e in zip(*np.unravel_index(np.argsort(-excess, axis=None)[:size], excess.shape), strict=True)
    ]


def experts_and_controls(
    model: GptOss, rows: Sequence[Transcript], seed: int
) -> dict[str, tuple[list[tuple[int, int]], list[list[tuple[int, int]]]]]:
    """For each group its named experts, and load-matched random ones."""
    groups = sorted({group_of(row) for row in rows})
    found = {}
    for group in groups if len(groups) > 1 else []:
        named = named_experts(model, rows, group)
        own = [r for r in rows if group_of(r) == group]
        load = np.nan_to_num(expert_load(model, own, generated_tokens(model)))
        for tolerance in (0.15, 0.25, 0.4, 0.6):
            try:
                found[group] = named, load_matched(load, named, CONTROLS, seed=seed, tolerance=tolerance)
                break
            except InputError:
                continue
    if not found:
        raise InputError(
            "the run's sequences name no two groups (meta: domain or task) whose experts could be compared"
        )
    return found


def change_experts(
    model: GptOss, rows: Sequence[Transcript], seed: int, change: Callable[[int, list[int], TokenSet], Edit], title: str
) -> dict[str, xr.Dataset]:
    """Named experts against random ones of like load, on the group they are named for and on the others."""
    rows, written, of = answered_rows(model, rows), generated_tokens(model), final_tokens(model)

    def edits(cells: Sequence[tuple[int, int]]) -> list[Edit]:
        return [change(layer, [e for c, e in cells if c == layer], written) for layer in sorted({c for c, _ in cells})]

    base = logprobs(model, rows, of)
    units = np.array([row.prompt_id for row in rows])
    groups = np.array([group_of(row) for row in rows])
    names, table, texts = [], [], []
    for group, (named, random_sets) in experts_and_controls(model, rows, seed).items():
        change_named = logprobs(model, rows, of, *edits(named)) - base
        change_random = np.stack([logprobs(model, rows, of, *edits(cells)) - base for cells in random_sets])
        own = groups == group
        parts = {
            "named, own group": change_named[own],
            "random of equal load, own group": change_random[:, own].mean(0),
            "named less random, own group": change_named[own] - change_random[:, own].mean(0),
            "named, other groups": change_named[~own],
        }
        row = [paired(v, units[own] if "own" in n else units[~own], seed=seed) for n, v in parts.items()]
        rank = float((change_random[:, own].mean(1) <= change_named[own].mean()).mean())
        names.append(group)
        table.append(np.array(row))
        said = ", ".join(f"{layer}.{e}" for layer, e in named)
        value, low, high = (float(v) for v in row[2])
        differs = "hurts more than" if high < 0 else "hurts less than" if low > 0 else "is not shown to differ from"
        texts.append(
            f"{group} (experts {said}): {float(row[0][0]):+.2f} nats [{float(row[0][1]):+.2f}, "
            f"{float(row[0][2]):+.2f}] on its own "
            f"prompts, random experts of equal load {float(row[1][0]):+.2f}; it {differs} those: {value:+.2f} "
            f"[{low:+.2f}, "
            f"{high:+.2f}]; {rank:.0%} of {len(random_sets)} random sets hurt as much. On the others "
            f"{float(row[3][0]):+.2f}."
        )
    values = np.stack(table)
    result = xr.Dataset(
        {n: (("group", "which"), values[..., i]) for i, n in enumerate(("change", "low", "high"))},
        coords={"group": names, "which": list(parts)},
    )
    return {"experts": result.assign_attrs(title=title, summary="\n".join(texts), units="nat")}
