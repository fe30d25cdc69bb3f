"""What each expert responds to: example tokens in their context, over-represented tokens, position and partners.

    ds = wb.studies.expert_examples.load(run)
    ds["top_token"].sel(channel="analysis", layer=2, expert=5)

Examples are those of `workbench.runs.examples`, and labels those of `workbench.studies.expert_labels`. Over-represented
tokens are chosen in one half of the prompts and measured in the other one, so that the choice does not bias the
measurement. The load of experts by channel and effort, with intervals, is that of the study `routing`.

Reference: log-odds with a count added to each cell, Haldane 1956; delete-one jackknife over prompts, Efron & Tibshirani
1993, chapter 11.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int

from workbench.errors import InputError
from workbench.harmony.labels import CHANNELS, FRAME
from workbench.registry import Study
from workbench.runs import conversations, examples
from workbench.runs.schema import EXAMPLE_KINDS
from workbench.studies.expert_labels import read as read_labels
from workbench.studies.expert_labels import with_labels
from workbench.studies.intervals import MIN_PROMPTS, test_of_moments
from workbench.studies.result import Definition, Variables, dataset, provenance
from workbench.studies.run_index import independent_prompts

STUDY = Study(
    name="expert-examples",
    title="Experts by example",
    question="Which tokens, at which positions and with which other experts, does each expert process?",
    requires=("routing",),
    compute="two passes over the run's tokens; jackknife over prompts",
    figures="workbench.figures.expert_examples",
    page="expert-examples",
    order=15,
)
BEFORE, AFTER = 12, 4  # tokens of context
N_TOKENS = 5  # over-represented tokens of an expert
N_PARTNERS = 3
MIN_COUNT = 20  # occurrences of a token in the half in which it is chosen
_CI = "95 %, delete-one jackknife over the prompts of the other half, Student's t corrected for skewness"
_CI_SCORE = "95 %, Wilson, over texts"
_CI_ALL = "95 %, delete-one jackknife over prompts, Student's t corrected for skewness"

_EXAMPLE = {
    "gate": ("gate weight", "1", "softmax weight of the expert among the chosen ones"),
    "sequence": ("sequence", "1", "number of the sequence in the run; −1: fewer tokens than places"),
    "position": ("position", "tokens", "position of the token in its sequence; −1: fewer tokens than places"),
    "token": ("token", "text", "the token that was routed"),
    "before": ("text before", "text", f"up to {BEFORE} tokens before it, of the same sequence"),
    "after": ("text after", "text", f"up to {AFTER} tokens after it, of the same sequence"),
}
DEFINITIONS = {
    f"{kind}_{name}": Definition(f"{title} of {about}", units, definition)
    for kind, about in (("top", "the largest gate weights"), ("random", "a random sample"))
    for name, (title, units, definition) in _EXAMPLE.items()
} | {
    "token_id": Definition("over-represented token", "1", "id of the token; −1: none is frequent enough"),
    "token_text": Definition("over-represented token", "text", "its text"),
    "token_log_odds": Definition(
        "log-odds of the token",
        "nat",
        "log of the odds that the token is routed to the expert over the odds of other tokens, half a count added",
        ci=_CI,
    ),
    "token_count": Definition("occurrences", "tokens", "occurrences of the token in the half that is measured"),
    "token_prompts": Definition("prompts", "prompts", "prompts of that half in which it occurs"),
    "position": Definition("mean position", "tokens", "mean position of the expert's tokens", ci=_CI_ALL),
    "tokens": Definition("tokens", "tokens", "tokens that were routed to the expert, by channel"),
    "channel_lift": Definition("load in the channel", "× all", "share of the channel's slots over that of all content"),
    "partner": Definition("co-activated expert", "1", "experts with the largest lift; −1: none"),
    "partner_given": Definition("co-activation", "1", "P(partner in the top k | expert in the top k), all content"),
    "partner_lift": Definition("lift of co-activation", "1", "P(both) / (P(expert) P(partner)), all content"),
    "label": Definition("label", "text", "that of the run's file of labels, else the automatic one"),
    "label_score": Definition(
        "detection score of the label",
        "1",
        "right answers on held-out texts of a proposed label; 0.5 is chance",
        ci=_CI_SCORE,
    ),
    "automatic_label": Definition("automatic label", "text", "over-represented tokens, channel and position"),
}
METHOD = (
    "Examples are the tokens of the largest gate weights and a uniform random sample, by channel. Over-represented "
    f"tokens occur at least {MIN_COUNT} times in a random half of the prompts, in which they have the largest lower "
    "limit of the log-odds; the log-odds and their interval are those of the other half. All but the examples are over "
    "content: tokens of the channel frame are left out."
)
NOT_CONTROLLED = (
    "Top examples show the extreme: compare them with the random ones. Tokens of a kind also share positions and "
    "neighbours, which the log-odds do not separate."
)


@dataclass(frozen=True)
class _Counts:
    """Sums by prompt that the estimates need. token: places in `chosen` [layer expert rank] are the tokens' numbers."""

    routed: Int[np.ndarray, "prompt layer expert"]
    positions: Float[np.ndarray, "prompt layer expert"]
    tokens: Int[np.ndarray, " prompt"]
    chosen_routed: Int[np.ndarray, "prompt layer expert rank"]
    chosen_tokens: Int[np.ndarray, "prompt layer expert rank"]


def study(run: Any, *, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the examples, tokens, positions and partners of every expert."""
    return {"examples": load(run, seed=seed)}


def load(run: Any, *, seed: int = 0, tokenizer: Any = None) -> xr.Dataset:
    """Return the tokens that each expert processes most, by layer and expert, and its examples by channel.

    seed: of the halves in which tokens are chosen and measured. tokenizer: if that of the run is not installed.

    Raises:
        InputError: the run has no routing of single tokens, no sequence, or an unknown tokenizer.
    """
    if "routing" not in getattr(run, "recorded", ()) or not hasattr(run, "blocks"):  # sums have no single tokens
        raise InputError("examples of experts need a stored run with its routing: capture with --record routing")
    if not len(run.sequences):
        raise InputError(f"{run.path} holds no sequence yet; a study needs at least one: wait for its capture")
    known = conversations.tokenizer(run, tokenizer)
    lists = examples.of_run(run)
    channels = [c for c, name in enumerate(CHANNELS) if (lists["top_sequence"][c] >= 0).any()]
    by_channel = ("channel", "layer", "expert", "example")
    variables: Variables = {name: (by_channel, values[channels]) for name, values in lists.items()}
    variables |= {name: (by_channel, values[channels]) for name, values in _contexts(run, lists, known).items()}
    variables |= _tokens_and_positions(run, known, seed)
    variables |= _loads(run, channels) | _partners(run)
    coords = {
        "channel": [CHANNELS[c] for c in channels],
        "layer": np.arange(run.model["n_layers"]),
        "expert": np.arange(run.model["num_experts"]),
    }
    labels = _labels(variables, [CHANNELS[c] for c in channels])
    variables |= {name: (("layer", "expert"), labels) for name in ("label", "automatic_label")}
    unscored = np.full(labels.shape, np.nan)
    variables |= {f"label_score{limit}": (("layer", "expert"), unscored) for limit in ("", "_low", "_high")}
    attrs = provenance("expert-examples", STUDY.title, run.digest, seed, {"examples": lists["top_gate"].shape[-1]})
    attrs |= {"method": METHOD, "not_controlled": NOT_CONTROLLED, "summary": _summary(variables)}
    return with_labels(dataset(variables, coords, DEFINITIONS, attrs), read_labels(run))


def _contexts(run: Any, lists: Mapping[str, np.ndarray], tokenizer: Any) -> dict[str, np.ndarray]:
    """Return the token of every example [channel layer expert example], and the text before and after it."""
    texts = contexts(run, np.concatenate([_places(lists, kind) for kind in EXAMPLE_KINDS]), tokenizer)
    columns = {}
    for kind in EXAMPLE_KINDS:
        shape = lists[f"{kind}_sequence"].shape
        rows = np.array([texts[s, p] for s, p in _places(lists, kind).tolist()], dtype=object)
        for column, name in enumerate(("token", "before", "after")):
            columns[f"{kind}_{name}"] = rows[:, column].reshape(shape)
    return columns


def contexts(run: Any, places: Int[np.ndarray, "place 2"], tokenizer: Any) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return the token at each place (sequence, position), the text before it and the text after it.

    The place (−1, −1) has empty texts.
    """
    blocks = [(block["sequence"], block["id"]) for block in run.blocks("id")]
    owner, ids = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    wanted = np.unique(places, axis=0)
    texts: dict[tuple[int, int], tuple[str, ...]] = {(-1, -1): ("", "", "")}
    for sequence, position in wanted[wanted[:, 0] >= 0].tolist():
        start, stop = np.searchsorted(owner, (sequence, sequence + 1))
        own = ids[start:stop].tolist()
        spans = (own[max(0, position - BEFORE) : position], own[position : position + 1], own[position + 1 :][:AFTER])
        before, token, after = (tokenizer.decode(span) for span in spans)
        texts[sequence, position] = (token, before, after)
    return texts


def _places(lists: Mapping[str, np.ndarray], kind: str) -> Int[np.ndarray, "place 2"]:
    return np.stack([lists[f"{kind}_{name}"].ravel() for name in ("sequence", "position")], axis=1)


def _tokens_and_positions(run: Any, tokenizer: Any, seed: int) -> Variables:
    """Return over-represented tokens [layer expert token_rank] and mean positions [layer expert], with intervals."""
    number = independent_prompts(run)
    n_prompts = int(number.max()) + 1
    choosing = np.random.default_rng(seed).permutation(n_prompts) % 2 == 0
    blocks = _Content(run, number)
    vocabulary = np.unique(np.concatenate([np.unique(block["id"]) for block in blocks]))
    chosen = _chosen_tokens(run, blocks, vocabulary, choosing)
    counts = _counted(blocks, vocabulary, chosen, n_prompts)
    log_odds, low, high, prompts = _log_odds_interval(counts, ~choosing)
    none = chosen < 0
    ids = np.where(none, -1, vocabulary[np.maximum(chosen, 0)])
    text = np.array([tokenizer.decode([i]) if i >= 0 else "" for i in ids.ravel().tolist()], dtype=object)
    by_rank = ("layer", "expert", "token_rank")
    measured = {"token_log_odds": log_odds, "token_log_odds_low": low, "token_log_odds_high": high}
    variables: Variables = {name: (by_rank, np.where(none, np.nan, values)) for name, values in measured.items()}
    variables |= {
        "token_id": (by_rank, ids),
        "token_text": (by_rank, text.reshape(ids.shape)),
        "token_count": (by_rank, np.where(none, 0, counts.chosen_tokens[~choosing].sum(0))),
        "token_prompts": (by_rank, np.where(none, 0, prompts)),
    }
    position, position_low, position_high = _jackknifed(
        lambda total, n: np.divide(total, n, out=np.full(np.shape(total), np.nan), where=np.asarray(n) > 0),
        (counts.positions, counts.routed.astype(np.float64)),
        (counts.routed > 0).sum(0),
    )
    for name, values in (("", position), ("_low", position_low), ("_high", position_high)):
        variables[f"position{name}"] = (("layer", "expert"), values)
    return variables


class _Content:
    """Blocks of a run's content: `prompt`, `id`, `position` and `experts` of the tokens outside of the frame."""

    def __init__(self, run: Any, prompt: Int[np.ndarray, " sequence"]) -> None:
        self._run, self._prompt = run, prompt

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for block in self._run.blocks("experts", "id"):
            content = block["channel"] != FRAME
            selected = {name: block[name][content] for name in ("id", "position")}
            prompt = self._prompt[block["sequence"][content]]
            yield selected | {"prompt": prompt, "experts": block["experts"][:, content].astype(np.int64)}


def _chosen_tokens(
    run: Any, blocks: _Content, vocabulary: Int[np.ndarray, " word"], choosing: Bool[np.ndarray, " prompt"]
) -> Int[np.ndarray, "layer expert rank"]:
    """Return the words with the largest lower limits of the log-odds, counted in the choosing prompts; −1 for none."""
    layers, n_experts = run.model["n_layers"], run.model["num_experts"]
    size = len(vocabulary)
    routed = np.zeros((layers, n_experts * size), dtype=np.int64)
    words = np.zeros(size, dtype=np.int64)
    for block in blocks:
        own = choosing[block["prompt"]]
        word = np.searchsorted(vocabulary, block["id"][own])
        words += np.bincount(word, minlength=size)
        for layer in range(layers):
            cell = block["experts"][layer, own] * size + word[:, None]
            routed[layer] += np.bincount(cell.ravel(), minlength=n_experts * size)
    chosen = np.full((layers, n_experts, N_TOKENS), -1)
    rank = min(N_TOKENS, size)
    for layer in range(layers):
        counts = routed[layer].reshape(n_experts, size)
        log_odds, error = _log_odds(counts, words, counts.sum(1)[:, None], words.sum())
        lower = np.where(words >= MIN_COUNT, log_odds - 1.96 * error, -np.inf)
        order = np.argsort(-lower, axis=1, kind="stable")[:, :rank]
        above = np.take_along_axis(lower, order, 1) > 0
        chosen[layer, :, :rank] = np.where(above, order, -1)
    return chosen


def _log_odds(
    both: np.ndarray, word: np.ndarray, expert: np.ndarray, every: Any
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """Return log-odds of words at experts from counts [*cells], and their standard error for independent tokens."""
    table = [both, word - both, expert - both, every - word - (expert - both)]
    # ranks that hold no word have no table: their cells are missing
    possible = np.logical_and.reduce([np.asarray(part) >= 0 for part in table])
    a, b, c, d = (np.where(possible, np.asarray(part, dtype=np.float64) + 0.5, np.nan) for part in table)
    return np.log(a * d / (b * c)), np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)


def _counted(
    blocks: _Content,
    vocabulary: Int[np.ndarray, " word"],
    chosen: Int[np.ndarray, "layer expert rank"],
    n_prompts: int,
) -> _Counts:
    """Return the sums of each prompt; of words only those that were chosen."""
    layers, n_experts, ranks = chosen.shape
    shape = (n_prompts, layers, n_experts)
    routed, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    tokens = np.zeros(n_prompts, dtype=np.int64)
    used = np.unique(chosen[chosen >= 0])
    place = np.full(len(vocabulary), -1)  # of a word among the used ones
    place[used] = np.arange(len(used))
    words = np.zeros((n_prompts, len(used) + 1), dtype=np.int64)  # the last one is of no word
    chosen_routed = np.zeros((n_prompts, layers, n_experts, ranks), dtype=np.int64)
    rank_of = _ranks(chosen, place, len(used))
    for block in blocks:
        prompt, word = block["prompt"], place[np.searchsorted(vocabulary, block["id"])]
        tokens += np.bincount(prompt, minlength=n_prompts)
        np.add.at(words, (prompt, word), 1)
        for layer, expert in enumerate(block["experts"]):
            cell = prompt[:, None] * n_experts + expert
            size = n_prompts * n_experts
            routed[:, layer] += np.bincount(cell.ravel(), minlength=size).reshape(n_prompts, n_experts)
            where = np.repeat(block["position"], expert.shape[1]).astype(np.float64)
            positions[:, layer] += np.bincount(cell.ravel(), where, size).reshape(n_prompts, n_experts)
            rank = rank_of[layer, expert, word[:, None]]
            own = (cell * ranks + rank)[rank >= 0]
            chosen_routed[:, layer] += np.bincount(own, minlength=size * ranks).reshape(n_prompts, n_experts, ranks)
    return _Counts(routed, positions, tokens, chosen_routed, words[:, np.where(chosen >= 0, place[chosen], -1)])


def _ranks(
    chosen: Int[np.ndarray, "layer expert rank"], place: Int[np.ndarray, " word"], n_used: int
) -> Int[np.ndarray, "layer expert used"]:
    """Return the rank of every used word at every expert, −1 where it was not chosen; the last is of no word."""
    ranks = np.full((*chosen.shape[:2], n_used + 1), -1)
    layer, expert, rank = np.nonzero(chosen >= 0)
    ranks[layer, expert, place[chosen[layer, expert, rank]]] = rank
    return ranks


def _log_odds_interval(counts: _Counts, measured: Bool[np.ndarray, " prompt"]) -> tuple[np.ndarray, ...]:
    """Return log-odds [layer expert rank] over these prompts, both limits, and the prompts in which a word occurs."""
    own = counts.chosen_routed[measured], counts.chosen_tokens[measured]
    of_expert = counts.routed[measured][..., None]
    every = counts.tokens[measured][:, None, None, None]
    prompts = (own[1] > 0).sum(0)
    log_odds = _jackknifed(lambda *sums: _log_odds(*sums)[0], (*own, of_expert, every), prompts)
    return (*log_odds, prompts)


def _jackknifed(
    estimate: Any, sums: Sequence[np.ndarray], units: Int[np.ndarray, "*cells"]
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
    """Return an estimate from sums [prompt *cells] and its limits, from leaving out one prompt after another.

    units: prompts that have something in a cell; with fewer than `MIN_PROMPTS` it has no limits. Cells that some prompt
    alone fills have no estimate without it, and no limits either.
    """
    totals = [part.sum(0) for part in sums]
    full_estimate = np.asarray(estimate(*totals))
    n = len(sums[0])
    mean, square, cube = (np.zeros(full_estimate.shape) for _ in range(3))
    for unit in range(n):
        # what the prompt adds to the estimate
        part_of = full_estimate - np.asarray(estimate(*(t - part[unit] for t, part in zip(totals, sums, strict=True))))
        mean, square, cube = mean + part_of / n, square + part_of**2 / n, cube + part_of**3 / n
    variance = np.maximum(square - mean**2, 0)
    third = (cube - 3 * mean * square + 2 * mean**3) * n * (max(n - 1, 0) / max(n, 1)) ** 1.5
    tested = test_of_moments(full_estimate, np.sqrt(variance * (n - 1)), third, np.maximum(units - 1, 1))
    enough = units >= MIN_PROMPTS
    return full_estimate, np.where(enough, tested.low, np.nan), np.where(enough, tested.high, np.nan)


def _loads(run: Any, channels: Sequence[int]) -> Variables:
    """Return tokens and the lift of the load [channel layer expert]."""
    counts = run.total("expert_count").sum("group").values.astype(np.float64)
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    content = counts[[c for c in range(len(CHANNELS)) if c != FRAME]].sum(0)
    everything = content / np.maximum(content.sum(-1, keepdims=True), 1)
    lift = np.divide(share, everything, out=np.full(share.shape, np.nan), where=everything > 0)
    dims = ("channel", "layer", "expert")
    return {"tokens": (dims, counts[channels].astype(np.int64)), "channel_lift": (dims, lift[channels])}


def _partners(run: Any) -> Variables:
    """Return the experts of the largest lift of co-activation [layer expert partner_rank]."""
    content = [c for c in range(len(CHANNELS)) if c != FRAME]
    counts = run.summary("coactivation").values[content].sum(0).astype(np.float64)
    tokens = float(run.summary("tokens").sum("sequence").values[content].sum())
    single = np.diagonal(counts, axis1=-2, axis2=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        given = counts / single[..., None]
        lift = given * tokens / single[..., None, :]
    rare = (single < MIN_COUNT)[..., None] | (single < MIN_COUNT)[..., None, :]
    ranked = np.where(rare | np.eye(counts.shape[-1], dtype=bool), -np.inf, lift)
    order = np.argsort(-ranked, axis=-1, kind="stable")[..., :N_PARTNERS]
    none = np.take_along_axis(ranked, order, -1) == -np.inf
    dims = ("layer", "expert", "partner_rank")
    variables: Variables = {"partner": (dims, np.where(none, -1, order))}
    for name, values in (("partner_given", given), ("partner_lift", lift)):
        variables[name] = (dims, np.where(none, np.nan, np.take_along_axis(values, order, -1)))
    return variables


def _labels(variables: Variables, channels: Sequence[str]) -> np.ndarray:
    """Return a line on each expert [layer expert]: tokens whose interval is above 0, channel and position."""
    low, text = variables["token_log_odds_low"][1], variables["token_text"][1]
    content = [c for c, name in enumerate(channels) if name != "frame"]
    lift, position = variables["channel_lift"][1], variables["position"][1]
    texts = np.full(position.shape, "", dtype=object)
    for layer, expert in np.ndindex(*position.shape):
        parts = []
        words = [repr(str(word)) for word in text[layer, expert][np.nan_to_num(low[layer, expert], nan=-1) > 0]]
        if words:
            parts.append(f"tokens {' '.join(words)}")
        own = np.nan_to_num(lift[content, layer, expert])
        if content and own.max() > 0:
            best = int(own.argmax())
            parts.append(f"{channels[content[best]]} ({own[best]:.1f} × its mean load)")
        if np.isfinite(position[layer, expert]):
            parts.append(f"mean position {position[layer, expert]:.0f}")
        texts[layer, expert] = "; ".join(parts) or "no tokens"
    return texts


def _summary(variables: Variables) -> str:
    low = variables["token_log_odds_low"][1]
    with_token = int((np.nan_to_num(low, nan=-1) > 0).any(-1).sum())
    idle = int((variables["tokens"][1].sum(0) == 0).sum())
    size = low.shape[0] * low.shape[1]
    best = np.unravel_index(np.argmax(np.nan_to_num(low, nan=-np.inf)), low.shape)
    lines = [f"{with_token} of {size} experts have a token that is over-represented in prompts it was not chosen in."]
    if with_token:
        value, word = variables["token_log_odds"][1][best], variables["token_text"][1][best]
        lines.append(
            f"Most: {str(word)!r} at expert {best[1]} of layer {best[0]}, log-odds {value:.1f} (lower limit "
            f"{low[best]:.1f})."
        )
    return " ".join([*lines, f"{idle} experts have no token."])
