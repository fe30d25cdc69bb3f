"""The routing agreement study: the experts a host chose against those the router chooses on the host's path.

Engines and repeated passes of one engine route the same tokens differently (arXiv 2510.11370). The run must be captured
with `--routing host`: its experts are the host's, and beside them are the router's own choices, made on the host's
path, and the margin between the k-th and the (k+1)-th router logit. Precisions, batch sizes and repeated passes are
compared by the study of two runs, see `workbench.studies.routing_agreement_runs`.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Num

from workbench.counting import count_of
from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.harmony.messages import EFFORTS
from workbench.registry import Study
from workbench.studies.compare import shares_by_prompt
from workbench.studies.intervals import mean_of_prompts
from workbench.studies.matching import prompt_means
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import Block, TokenRun, independent_prompts, token_blocks

STUDY = Study(
    name="routing-agreement",
    title="Routing agreement with the host",
    question="Where does the host that generated the tokens route them to other experts than this model?",
    requires=("host_routing",),
    compute="one pass over the tokens; jackknife over prompts",
    page="experts",
    order=60,
)
POSITIONS = (0, 64, 256, 1024, 4096)
MARGINS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_EFFORTS = (*EFFORTS, "")  # "": no effort is stated
_SHARE = "|experts of both| / k"
_CI = "95 %, Student's t over prompts corrected for skewness"


DEFINITIONS = {
    "agreement": Definition("routing agreement", "1", f"{_SHARE}, mean over tokens", ci=_CI),
    "agreement_effort": Definition(
        "routing agreement by effort", "1", f"{_SHARE}, mean over tokens and layers", ci=_CI
    ),
    "agreement_position": Definition(
        "routing agreement by position", "1", f"{_SHARE}, mean over tokens and layers", ci=_CI
    ),
    "agreement_margin": Definition(
        "routing agreement by margin", "1", f"{_SHARE}, mean over choices of this margin", ci=_CI
    ),
    "logprob_agree": Definition(
        "log-probability where layers agree", "nat", "mean over tokens without a difference", ci=_CI
    ),
    "logprob_disagree": Definition(
        "log-probability where one disagrees", "nat", "mean over tokens with a difference", ci=_CI
    ),
    "first_disagreement": Definition("first layer that disagrees", "tokens", "tokens that first disagree in the layer"),
    "first_position": Definition(
        "first position that disagrees", "tokens", "of each sequence the first position with a disagreement, -1 if none"
    ),
    "tokens": Definition("tokens", "tokens", "tokens that were compared"),
    "choices": Definition("choices", "choices", "tokens times layers of this margin"),
}
METHOD = (
    "For every token and layer, the share of the k experts that both chose. Means over the tokens of a sequence, then "
    "over a prompt's sequences; intervals over prompts. The margin is the k-th less the (k+1)-th router logit of this "
    "model."
)
NOT_CONTROLLED = (
    "The router's own choice is made on the path that was forced up to its layer, so disagreement does not accumulate "
    "over layers as it does in a free pass."
)


def study(run: TokenRun, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return how far the host's experts agree with the router's own, by layer, channel, effort, position, margin."""
    blocks = (
        (block, block["own_experts"], block["experts"], block["router_margin"], block["forced"].astype(bool))
        for block in token_blocks(
            run, "routing agreement", "experts", "own_experts", "router_margin", "forced", "logprob"
        )
    )
    attrs = provenance("routing-agreement", "Routing agreement with the host", run.digest, seed, {})
    return {"agreement": agreement(run, blocks, attrs, "host and own router")}


Compared = tuple[Block, np.ndarray, np.ndarray, np.ndarray | None, Bool[np.ndarray, " token"]]


def agreement(run: TokenRun, blocks: Iterator[Compared], attrs: dict[str, object], what: str) -> xr.Dataset:
    """Return the dataset for blocks of tokens with two choices of experts [layer, token, slot] each.

    A block also has the margin of the first choice [layer, token], or None, and which tokens are compared.

    Raises:
        InputError: no token was routed by both.
    """
    sums = _Sums(run)
    for compared in blocks:
        sums.add(*compared)
    if not sums.tokens.any():
        raise InputError(
            "no token was routed by both, so nothing can be compared: capture the same transcripts with both"
        )
    variables = sums.variables()
    coords = {
        "channel": list(CHANNELS),
        "layer": np.arange(run.model["n_layers"]),
        "effort": list(_EFFORTS),
        "position": list(POSITIONS),
        "margin": list(MARGINS),
        "sequence": list(map(str, run.sequences["id"])),
    }
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": _words(result, what)}
    return result


class _Sums:
    """Sums by sequence of the share of experts that both choices have."""

    def __init__(self, run: TokenRun) -> None:
        table = run.sequences
        size, layers = int(table.index.max()) + 1, int(run.model["n_layers"])
        self.prompt = independent_prompts(run)
        self.effort = np.full(size, len(_EFFORTS) - 1)
        self.effort[table.index] = [_EFFORTS.index(e) if e in _EFFORTS else len(_EFFORTS) - 1 for e in table["effort"]]
        self.order = table.index
        n = size
        self.tokens = np.zeros((n, len(CHANNELS)))
        self.shared = np.zeros((n, len(CHANNELS), layers))
        self.by: dict[str, tuple[np.ndarray, np.ndarray]] = {
            name: (np.zeros((n, cells)), np.zeros((n, cells)))
            for name, cells in (("effort", len(_EFFORTS)), ("position", len(POSITIONS)), ("margin", len(MARGINS)))
        }
        self.logprob = np.zeros((2, n))
        self.n_logprob = np.zeros((2, n))
        self.first_layer = np.zeros(layers, dtype=np.int64)
        self.first_position = np.full(size, -1, dtype=np.int64)

    def add(
        self,
        block: Block,
        first: Num[np.ndarray, "layer token slot"],
        second: Num[np.ndarray, "layer token slot"],
        margin: Num[np.ndarray, "layer token"] | None,
        compared: Bool[np.ndarray, " token"],
    ) -> None:
        """Add the tokens of a block."""
        sequence, position = block["sequence"][compared], block["position"][compared]
        channel = block["channel"][compared].astype(np.int64)
        shared = np.stack(
            [
                (a[:, :, None] == b[:, None, :]).any(-1).mean(-1)
                for a, b in zip(first[:, compared], second[:, compared], strict=True)
            ]
        )
        place = sequence.astype(np.int64) * len(CHANNELS) + channel
        self.tokens += np.bincount(place, minlength=self.tokens.size).reshape(self.tokens.shape)
        for layer, values in enumerate(shared):
            self.shared[..., layer] += np.bincount(place, values, self.tokens.size).reshape(self.tokens.shape)
        mean = shared.mean(0)
        self._by("effort", sequence, self.effort[sequence], mean)
        self._by("position", sequence, np.searchsorted(POSITIONS, position, side="right") - 1, mean)
        if margin is not None:
            for layer, values in zip(shared, margin[:, compared], strict=True):
                self._by("margin", sequence, np.searchsorted(MARGINS, values, side="right") - 1, layer)
        differs = shared < 1
        any_layer = differs.any(0)
        np.add.at(self.first_layer, differs.argmax(0)[any_layer], 1)
        for number in np.unique(sequence[any_layer]):
            earliest = int(position[any_layer & (sequence == number)].min())
            before = int(self.first_position[number])
            self.first_position[number] = earliest if before < 0 else min(before, earliest)
        if "logprob" in block:
            logprob = block["logprob"][compared]
            known = np.isfinite(logprob)
            for row, mask in enumerate((~any_layer & known, any_layer & known)):
                np.add.at(self.logprob[row], sequence[mask], logprob[mask])
                np.add.at(self.n_logprob[row], sequence[mask], 1)

    def _by(self, name: str, sequence: np.ndarray, cell: np.ndarray, values: np.ndarray) -> None:
        sums, counts = self.by[name]
        place = sequence.astype(np.int64) * sums.shape[1] + np.maximum(cell, 0)
        sums += np.bincount(place, values, sums.size).reshape(sums.shape)
        counts += np.bincount(place, minlength=sums.size).reshape(sums.shape)

    def variables(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Everything that was summed, with intervals."""
        variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            "tokens": (("channel",), self.tokens.sum(0).astype(np.int64)),
            "choices": (("margin",), self.by["margin"][1].sum(0).astype(np.int64)),
            "first_disagreement": (("layer",), self.first_layer),
            "first_position": (("sequence",), self.first_position[self.order]),
        }
        by_channel = [self._shares(self.shared[:, c], self.tokens[:, c]) for c in range(len(CHANNELS))]
        cells: dict[str, tuple[tuple[str, ...], list[Any]]] = {"agreement": (("channel", "layer"), by_channel)}
        for name, (sums, counts) in self.by.items():
            values = [self._shares(sums[:, i], counts[:, i]) for i in range(sums.shape[1])]
            cells[f"agreement_{name}"] = ((name,), values)
        for name, (dims, values) in cells.items():
            for index, end in enumerate(("", "_low", "_high")):
                variables[name + end] = (dims, np.stack([value[index] for value in values]))
        for row, name in enumerate(("logprob_agree", "logprob_disagree")):
            means = prompt_means(self.logprob[row], self.n_logprob[row], self.prompt)
            for end, value in zip(("", "_low", "_high"), mean_of_prompts(means), strict=True):
                variables[name + end] = ((), np.asarray(value))
        return variables

    def _shares(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return shares_by_prompt(sums, counts, self.prompt)


def _words(result: xr.Dataset, what: str) -> str:
    lines = []
    for channel in map(str, result["channel"].values):
        cell = result.sel(channel=channel)
        if int(cell["tokens"]):
            worst = int(np.argmin(cell["agreement"].values))
            lines.append(
                f"{channel} ({int(cell['tokens']):,} tokens): {what} agree on {float(cell['agreement'].mean()):.1%} of "
                f"choices, least in layer {worst} ({float(cell['agreement'][worst]):.1%})."
            )
    clean = int((result["first_position"] < 0).sum())
    lines.append(f"{clean} of {count_of(result.sizes['sequence'], 'sequence')} agree at every token and layer.")
    if int(result["choices"].sum()):
        small, large = (result["agreement_margin"].dropna("margin").values[i] for i in (0, -1))
        lines.append(f"Agreement is {small:.1%} at the smallest margins of the router and {large:.1%} at the largest.")
    return "\n".join(lines)
