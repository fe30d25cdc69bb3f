"""The compare study: two runs on the same transcripts, token by token.

Two sizes, a fine-tune and its base, two precisions. Where expert numbers mean the same (the same architecture, one
made from the other) the routers' agreement is the share of chosen experts that both chose, and the load of every expert
is compared; where they do not, only distributions can be: how concentrated routing is, and what was predicted.

Differences of loads, sinks, log-probabilities and recorded features are those of the engine of all studies
(`contrast.run_contrasts`); agreement, sinks and log-probabilities are also given by effort (`compare_efforts`).

Reference: router saturation, OLMoE, arXiv 2409.02060.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS
from workbench.registry import Study
from workbench.studies import compare_efforts
from workbench.studies.comparison import UNSTATED
from workbench.studies.contrast import METHOD as CONTRAST_METHOD
from workbench.studies.contrast import run_contrasts
from workbench.studies.intervals import few_prompts, mean_of_prompts, within_bounds
from workbench.studies.matching import prompt_means
from workbench.studies.result import Definition, dataset, provenance
from workbench.studies.run_index import Block, TokenRun, independent_prompts, token_blocks
from workbench.studies.statistics import entropy, share
from workbench.studies.wording import wording

STUDY = Study(
    name="compare",
    title="Compare runs",
    question="Where do two models, or two versions of one, treat the same tokens differently?",
    requires=("routing", "logprobs"),
    compute="one pass over the tokens of both runs",
    options={"hook": "Recorded activation or features to compare as well, by channel (default: none)."},
    figures="workbench.figures.compare",
    runs=2,
    page="compare",
    order=50,
)
_CI = "95 %, Student's t over prompts corrected for skewness, within [0, 1]"
DEFINITIONS = {
    "agreement": Definition(
        "agreement of routers",
        "1",
        "|experts of a ∩ experts of b| / k, mean over the tokens of a sequence, a prompt's sequences, and prompts",
        ci=_CI,
        null="k/E",
    ),
    "beyond_load": Definition(
        "agreement beyond load",
        "1",
        "agreement less what two routers with these loads have by chance, over 1 less that",
    ),
    "effective_experts": Definition("effective experts", "experts", "exp of the entropy of the load, of either run"),
    "tokens": Definition("tokens", "tokens", "tokens of the channel"),
}
METHOD = (
    "The same tokens in two runs. Agreement is |top-k ∩ top-k| / k, beside what it would be if each router drew "
    "with its own load and no regard to the token. Means over the tokens of a sequence, then a prompt's sequences; "
    "intervals over prompts."
)
NOT_CONTROLLED = "Agreement supposes that expert numbers correspond; between models trained apart they do not."
_QUANTITIES = {"routing": "experts", "sinks": "sink", "logprob": "logprob"}


def study(run: TokenRun, other: TokenRun, *, hook: str = "", seed: int = 0) -> dict[str, xr.Dataset]:
    """Compare `run` (a) with `other` (b): routing agreement, and loads, sinks and predictions by channel and effort.

    hook: a hook point, or the features of an autoencoder, that both runs recorded.

    Raises:
        InputError: the runs hold different sequences, or one did not record the hook.
    """
    a, b = run.model, other.model
    keys = ("n_layers", "num_experts", "experts_per_token")
    same = all(a[k] == b[k] for k in keys) and a.get("layer_experts") == b.get("layer_experts")
    if list(run.sequences["id"]) != list(other.sequences["id"]):
        raise InputError("the two runs hold different sequences: capture the same transcripts with both")
    sums = _Sums(run, other, same)
    for x, y in _together(run, other, sums.reads):
        sums.add(x, y)
    compared, left_out = _differences(run, other, same, seed)
    if hook:
        compared |= {f"features_in_{c}": _noted(ds) for c, ds in run_contrasts(run, other, hook, seed=seed).items()}
    layers, variables = a["n_layers"], sums.variables(a["experts_per_token"])
    coords = {"channel": list(CHANNELS), "layer": np.arange(layers), "run": ["a", "b"]}
    attrs = provenance("compare", "Two runs, token by token", run.digest, seed, {"other": other.digest})
    result = dataset(variables, coords, DEFINITIONS, attrs)
    warning = few_prompts(len(np.unique(sums.number[sums.number >= 0])))
    words = [*([f"Warning: {warning}."] if warning else []), _words(result, compared), *left_out]
    result.attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": "\n".join(words)}
    return {"agreement": result, "efforts": _by_effort(run, other, sums, seed)} | compared


def _by_effort(run: TokenRun, other: TokenRun, sums: "_Sums", seed: int) -> xr.Dataset:
    """Return agreement and differences by effort and channel."""
    effort = np.full(len(sums.number), UNSTATED, dtype=object)
    effort[run.sequences.index] = run.sequences["effort"].where(run.sequences["effort"] != "", UNSTATED)
    written = sums.number >= 0
    quantities = {name: (total[written], count[written]) for name, (total, count) in sums.quantities().items()}
    efforts, variables = compare_efforts.variables(list(effort[written]), sums.number[written], quantities)
    counted = np.stack([sums.tokens[written][effort[written] == one].sum(0) for one in efforts])
    variables["tokens"] = (("effort", "channel"), counted.astype(np.int64))
    coords = {"effort": efforts, "channel": list(CHANNELS), "layer": np.arange(run.model["n_layers"])}
    attrs = provenance("compare", "Two runs by effort", run.digest, seed, {"other": other.digest})
    result = dataset(variables, coords, DEFINITIONS | compare_efforts.DEFINITIONS, attrs)
    return _noted(result).assign_attrs(summary=compare_efforts.summary(result))


def _differences(run: TokenRun, other: TokenRun, same: bool, seed: int) -> tuple[dict[str, xr.Dataset], list[str]]:
    """Return the differences of every quantity and channel by name, and why others have none."""
    datasets: dict[str, xr.Dataset] = {}
    left_out = [] if same else ["The architectures differ, so experts do not correspond: no agreement is given."]
    for label, what in _QUANTITIES.items():
        if what == "experts" and not same:
            continue
        if what == "sink" and not _has(run, other, "sinks"):
            left_out.append("Skipped: sinks, as not both runs recorded them.")
            continue
        try:
            compared = run_contrasts(run, other, what, seed=seed)
        except InputError as error:
            left_out.append(f"Skipped: {label}, as {error}.")
            continue
        datasets |= {f"{label}_in_{channel}": _noted(ds) for channel, ds in compared.items()}
    return datasets, left_out


def _noted(ds: xr.Dataset) -> xr.Dataset:
    """Return a difference of two runs with its method and what is not controlled."""
    return ds.assign_attrs(method=f"{METHOD} {CONTRAST_METHOD}", not_controlled=NOT_CONTROLLED)


class _Sums:
    """Of two runs' tokens, by sequence and channel: the experts that both chose, differences, and the load of either.

    agree: whether experts correspond.
    """

    def __init__(self, run: TokenRun, other: TokenRun, agree: bool) -> None:
        layers = run.model["n_layers"]
        self.number = independent_prompts(run)
        self.shape = (len(self.number), len(CHANNELS))
        self.tokens, self.predicted, self.logprob = (np.zeros(self.shape) for _ in range(3))
        self.agree = np.zeros((*self.shape, layers)) if agree else None
        sinks = agree and _has(run, other, "sinks") and run.model["n_heads"] == other.model["n_heads"]
        self.sink = np.zeros((*self.shape, layers)) if sinks else None
        self.loads = [np.zeros((len(CHANNELS), m["n_layers"], m["num_experts"])) for m in (run.model, other.model)]

    @property
    def reads(self) -> tuple[str, ...]:
        """Return the recorded quantities that `add` needs."""
        return ("experts", "logprob", *(["sink"] if self.sink is not None else []))

    def add(self, x: Block, y: Block) -> None:
        """Add the same tokens of both runs."""
        channel = x["channel"].astype(np.int64)
        place = x["sequence"].astype(np.int64) * len(CHANNELS) + channel
        self.tokens += self._by_place(place)
        for load, block in zip(self.loads, (x, y), strict=True):
            for layer, chosen in enumerate(block["experts"]):
                flat = (channel[:, None] * load.shape[2] + chosen).ravel()
                load[:, layer] += np.bincount(flat, minlength=load[:, layer].size).reshape(load[:, layer].shape)
        changed = x["logprob"].astype(np.float64) - y["logprob"].astype(np.float64)
        known = np.isfinite(changed)  # a first token has no prediction
        self.predicted += self._by_place(place[known])
        self.logprob += self._by_place(place[known], changed[known])
        if self.agree is not None:
            for layer, (one, two) in enumerate(zip(x["experts"], y["experts"], strict=True)):
                shared = (one[:, :, None] == two[:, None, :]).any(-1).mean(-1)
                self.agree[..., layer] += self._by_place(place, shared)
        if self.sink is not None:
            for layer, (one, two) in enumerate(zip(x["sink"], y["sink"], strict=True)):
                self.sink[..., layer] += self._by_place(place, (one.astype(np.float64) - two).mean(-1))

    def _by_place(
        self, place: Int[np.ndarray, " token"], values: Float[np.ndarray, " token"] | None = None
    ) -> Float[np.ndarray, "sequence channel"]:
        """Return the sums of values, by default of ones, over the tokens of each sequence and channel."""
        return np.bincount(place, values, self.tokens.size).reshape(self.shape).astype(np.float64)

    def quantities(self) -> dict[str, compare_efforts.Sums]:
        """Return the sums of everything that is compared by effort, with how many tokens they are of."""
        by_quantity: dict[str, compare_efforts.Sums] = {"logprob_difference": (self.logprob, self.predicted)}
        if self.agree is not None:
            by_quantity["agreement"] = (self.agree, self.tokens)
        if self.sink is not None:
            by_quantity["sink_difference"] = (self.sink, self.tokens)
        return by_quantity

    def variables(self, k: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """Return tokens, effective experts, and agreement with its interval. k: experts of a token."""
        data: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            "tokens": (("channel",), self.tokens.sum(0).astype(np.int64))
        }
        effective = [np.exp(entropy(share(load))) for load in self.loads]
        if effective[0].shape == effective[1].shape:
            data["effective_experts"] = (("run", "channel", "layer"), np.stack(effective))
        if self.agree is not None:
            cells = [shares_by_prompt(self.agree[:, c], self.tokens[:, c], self.number) for c in range(len(CHANNELS))]
            for end, values in zip(("", "_low", "_high"), zip(*cells, strict=True), strict=True):
                data[f"agreement{end}"] = (("channel", "layer"), np.stack(values))
            chance, value = _chance(self.loads[0], self.loads[1], k), data["agreement"][1]
            data["beyond_load"] = (("channel", "layer"), (value - chance) / (1 - chance))
        return data


def shares_by_prompt(
    sums: Float[np.ndarray, "sequence *cells"],
    tokens: Float[np.ndarray, " sequence"],
    number: Int[np.ndarray, " sequence"],
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """Return a share of tokens or choices, mean over prompts, and its interval. number: every sequence's prompt."""
    means = prompt_means(sums, tokens, number)
    value, low, high = mean_of_prompts(means)
    return value, *within_bounds(value, low, high, len(means))


def _has(run: TokenRun, other: TokenRun, name: str) -> bool:
    return all(name in getattr(r, "recorded", [name]) for r in (run, other))


def _together(run: TokenRun, other: TokenRun, names: Sequence[str]) -> Iterator[tuple[Block, Block]]:
    names = ("id", *names)
    for x, y in zip(token_blocks(run, "compare runs", *names), other.blocks(*names), strict=True):
        if not np.array_equal(x["id"], y["id"]):
            raise InputError(
                "the two runs are laid out differently: capture the same transcripts with the same --unit-tokens"
            )
        yield x, y


def _chance(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Expected |∩| / k if either router chose k experts by its load alone: Σ P_a(e) P_b(e) / k with P = k · share."""
    return k * (np.nan_to_num(share(a)) * np.nan_to_num(share(b))).sum(-1)


def _words(result: xr.Dataset, compared: Mapping[str, xr.Dataset]) -> str:
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
        if (predicted := compared.get(f"logprob_in_{channel}")) is not None:
            sentences.append(_predictions(predicted.sel(control="none")))
        lines.append(" ".join(sentences))
    return "\n".join(lines)


def _predictions(cell: xr.Dataset) -> str:
    verdict = "no difference of log-probability shown:"
    if not np.isfinite(float(cell["p"])):
        verdict = "too few prompts for a test:"
    elif bool(cell["different"]):
        verdict = "log-probability differs, a − b, by"
    return f"{verdict} {wording('logprob').interval(*(float(cell[n]) for n in ('difference', 'low', 'high')))} a token."
