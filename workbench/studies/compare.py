"""The compare study: two runs on the same transcripts, token by token.

Two sizes, a fine-tune and its base, two precisions. Where expert numbers mean the same (the same architecture, one
made from the other) the routers' agreement is the share of chosen experts that both chose; where they do not, only
distributions can be compared: how concentrated routing is, and what was predicted.

Reference: router saturation, OLMoE, arXiv 2409.02060.
"""

from collections.abc import Iterator

import numpy as np
import xarray as xr

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.registry import Study
from workbench.studies.contrast import Block, TokenRun
from workbench.studies.intervals import ratio_test
from workbench.studies.matching import independent_prompts, token_blocks
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.statistics import entropy, false_discovery, share

STUDY = Study(
    name="compare",
    title="Comparison of two runs",
    question="Where do two models, or two versions of one, treat the same tokens differently?",
    requires=("routing", "logprobs"),
    compute="one pass over the tokens of both runs",
    figures="workbench.figures.compare",
    runs=2,
    page="compare",
    page_title="Compare runs",
    order=50,
)
ALPHA = 0.05
_CI = "95 %, delete-one jackknife over prompts, corrected for skewness"
DEFINITIONS = {
    "agreement": Definition(
        "agreement of routers", "1", "|experts of a ∩ experts of b| / k, mean over tokens", ci=_CI, null="k/E"
    ),
    "agreement_low": Definition("agreement, lower limit", "1", "lower limit", ci=_CI),
    "agreement_high": Definition("agreement, upper limit", "1", "upper limit", ci=_CI),
    "beyond_load": Definition(
        "agreement beyond load",
        "1",
        "agreement less what two routers with these loads have by chance, over 1 less that",
    ),
    "effective_experts": Definition("effective experts", "experts", "exp of the entropy of the load, of either run"),
    "sink_difference": Definition("difference of sink attention", "1", "a − b, mean over tokens", ci=_CI),
    "sink_difference_low": Definition("difference of sink attention, lower limit", "1", "lower limit", ci=_CI),
    "sink_difference_high": Definition("difference of sink attention, upper limit", "1", "upper limit", ci=_CI),
    "logprob_difference": Definition("difference of log-probability", "nat", "a − b, mean over tokens", ci=_CI),
    "logprob_difference_low": Definition("difference of log-probability, lower limit", "nat", "lower limit", ci=_CI),
    "logprob_difference_high": Definition("difference of log-probability, upper limit", "nat", "upper limit", ci=_CI),
    "tokens": Definition("tokens", "tokens", "tokens of the channel"),
}
for _name, _label in (("sink_difference", "sink attention"), ("logprob_difference", "log-probability")):
    DEFINITIONS |= {
        f"{_name}_p": Definition(f"p of the difference of {_label}", "1", "two-sided, over prompts"),
        f"{_name}_q": Definition(f"q of the difference of {_label}", "1", "Benjamini–Hochberg over all of its cells"),
        f"{_name}_different": Definition(f"{_label} differs", "1", f"q < {ALPHA} and the interval excludes zero"),
    }
METHOD = (
    "The same tokens in two runs. Agreement is |top-k ∩ top-k| / k, beside what it would be if each router drew "
    "with its "
    "own load and no regard to the token; sums by prompt, intervals by the jackknife over prompts. Differences have q "
    "(Benjamini–Hochberg over channels, layers and heads)."
)
NOT_CONTROLLED = "Agreement supposes that expert numbers correspond; between models trained apart they do not."


def study(run: TokenRun, other: TokenRun, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Compare `run` (a) with `other` (b): routing agreement, sinks and predictions, by channel and layer.

    Raises:
        InputError: the runs hold different sequences.
    """
    a, b = run.model, other.model
    keys = ("n_layers", "num_experts", "experts_per_token")
    same = all(a[k] == b[k] for k in keys) and a.get("layer_experts") == b.get("layer_experts")
    heads = a["n_layers"] == b["n_layers"] and a["n_heads"] == b["n_heads"]
    table = run.sequences
    if list(table["id"]) != list(other.sequences["id"]):
        raise InputError("the two runs hold different sequences: capture the same transcripts with both")
    sums = _Sums(run, other, same, heads and _has(run, other, "sinks"))
    for x, y in _together(run, other, sums.sinks is not None):
        sums.add(x, y)
    tokens, layers, n_channels = sums.tokens, a["n_layers"], len(CHANNELS)
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        "tokens": (("channel",), tokens.sum(0).astype(np.int64))
    }

    def put(name: str, values: np.ndarray, counts: np.ndarray, *dims: str) -> None:
        found = [ratio_test(values[:, c], counts[:, c]) for c in range(n_channels)]
        cells = {"": np.stack([value for value, _ in found])}
        cells |= {f"_{part}": np.stack([getattr(tested, part) for _, tested in found]) for part in ("low", "high")}
        if name.endswith("difference"):
            cells["_p"] = np.stack([tested.p for _, tested in found])
            cells["_q"] = np.asarray(false_discovery(cells["_p"]))
            cells["_different"] = (cells["_q"] < ALPHA) & (cells["_low"] * cells["_high"] > 0)
        for end, of_cells in cells.items():
            variables[name + end] = (("channel", *dims), of_cells)

    effective = [np.exp(entropy(share(load))) for load in sums.loads]
    if effective[0].shape == effective[1].shape:
        variables["effective_experts"] = (("run", "channel", "layer"), np.stack(effective))
    if sums.agree is not None:
        put("agreement", sums.agree, tokens, "layer")
        chance = _chance(sums.loads[0], sums.loads[1], a["experts_per_token"])
        value = variables["agreement"][1]
        variables["beyond_load"] = (("channel", "layer"), (value - chance) / (1 - chance))
    if sums.sinks is not None:
        put("sink_difference", sums.sinks, tokens, "layer", "head")
    if sums.n_logprobs.any():
        put("logprob_difference", sums.logprob_sum, sums.n_logprobs)
    coords = {"channel": list(CHANNELS), "layer": np.arange(layers), "run": ["a", "b"]}
    attrs = provenance("compare", "Two runs, token by token", run.digest, seed, {"other": other.digest})
    result = dataset(variables, coords, DEFINITIONS, attrs)
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": _words(result, same)}
    return {"agreement": result}


class _Sums:
    """Of two runs' tokens, by prompt and channel: what they share and how they differ."""

    def __init__(self, run: TokenRun, other: TokenRun, agree: bool, sinks: bool) -> None:
        a = run.model
        self.number = independent_prompts(run)
        self.shape = (int(self.number.max()) + 1, len(CHANNELS))
        self.tokens = np.zeros(self.shape)
        self.logprob_sum, self.n_logprobs = np.zeros((2, *self.shape))
        self.agree = np.zeros((*self.shape, a["n_layers"])) if agree else None
        self.sinks = np.zeros((*self.shape, a["n_layers"], a["n_heads"])) if sinks else None
        self.loads = [np.zeros((len(CHANNELS), m["n_layers"], m["num_experts"])) for m in (a, other.model)]

    def add(self, x: Block, y: Block) -> None:
        """The same tokens of both runs."""
        channel = x["channel"].astype(np.int64)
        place = self.number[x["sequence"]] * len(CHANNELS) + channel

        def by_cell(values: np.ndarray | None = None, of: np.ndarray | slice = slice(None)) -> np.ndarray:
            n = self.shape[0] * self.shape[1]
            return np.bincount(place[of], values, n).reshape(self.shape)

        self.tokens += by_cell()
        for load, block in zip(self.loads, (x, y), strict=True):
            for layer, chosen in enumerate(block["experts"]):
                flat = (channel[:, None] * load.shape[2] + chosen).ravel()
                load[:, layer] += np.bincount(flat, minlength=load[:, layer].size).reshape(load[:, layer].shape)
        if self.agree is not None:
            for layer, (one, two) in enumerate(zip(x["experts"], y["experts"], strict=True)):
                self.agree[..., layer] += by_cell((one[:, :, None] == two[:, None, :]).any(-1).mean(-1))
        if self.sinks is not None:
            change = x["sink"].astype(np.float64) - y["sink"]
            for layer, head in np.ndindex(self.sinks.shape[2:]):
                self.sinks[..., layer, head] += by_cell(change[layer, :, head])
        known = np.isfinite(x["logprob"]) & np.isfinite(y["logprob"])
        self.logprob_sum += by_cell((x["logprob"] - y["logprob"])[known].astype(np.float64), known)
        self.n_logprobs += by_cell(None, known)


def _has(run: TokenRun, other: TokenRun, name: str) -> bool:
    return all(name in getattr(r, "recorded", [name]) for r in (run, other))


def _together(run: TokenRun, other: TokenRun, sinks: bool) -> Iterator[tuple[Block, Block]]:
    names = ("id", "experts", "logprob", *(("sink",) if sinks else ()))
    for x, y in zip(token_blocks(run, "compare runs", *names), other.blocks(*names), strict=True):
        if not np.array_equal(x["id"], y["id"]):
            raise InputError(
                "the two runs are laid out differently: capture the same transcripts with the same --unit-tokens"
            )
        yield x, y


def _chance(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Expected |∩| / k if either router chose k experts by its load alone: Σ P_a(e) P_b(e) / k with P = k · share."""
    return k * (np.nan_to_num(share(a)) * np.nan_to_num(share(b))).sum(-1)


def _words(result: xr.Dataset, same: bool) -> str:
    lines = []
    for channel in map(str, result["channel"].values):
        cell = result.sel(channel=channel)
        if not int(cell["tokens"]):
            continue
        sentences = [f"{channel} ({int(cell['tokens']):,} tokens):"]
        if "agreement" in cell:
            worst = int(np.argmin(cell["agreement"].values))
            one = cell.isel(layer=worst)
            sentences.append(
                f"routers agree on {float(cell['agreement'].mean()):.1%} of choices, least in layer {worst} "
                f"({float(one['agreement']):.1%} [{float(one['agreement_low']):.1%}, "
                f"{float(one['agreement_high']):.1%}]);"
            )
        if "logprob_difference" in cell:
            low, high = float(cell["logprob_difference_low"]), float(cell["logprob_difference_high"])
            verdict = "no difference of log-probability shown:" if np.isfinite(low) else "too few prompts for a test:"
            if cell["logprob_difference_different"]:
                verdict = "log-probability differs by"
            sentences.append(
                f"{verdict} {float(cell['logprob_difference']):+.4f} nat a token [{low:+.4f}, {high:+.4f}]."
            )
        lines.append(" ".join(sentences))
    if not same:
        lines.append("The architectures differ, so experts do not correspond: no agreement is given.")
    return "\n".join(lines)
