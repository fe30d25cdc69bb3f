"""Receiver heads: heads whose attention from later sentences of an analysis gathers on few earlier ones.

Attention is averaged over the tokens of every pair of sentences, and ranked in each row, so that long and late rows
count alike. The vertical score of a sentence is the mean rank that it has in the rows of sentences at least `apart`
after it; the score of a head is the kurtosis of its vertical scores. Shuffled rows give the kurtosis of chance.

Reference: Bogdan et al. 2025, arXiv 2506.19143.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import InputError
from workbench.experiments.branching import Analysis, analysis_of
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.registry import Experiment
from workbench.studies.difference_tests import ALPHA
from workbench.studies.intervals import MIN_PROMPTS, mean_effect
from workbench.studies.statistics import false_discovery

EXPERIMENT = Experiment(
    name="receiver-heads",
    title="Receiver heads",
    question="Which heads gather the attention of later sentences of an analysis on few earlier ones?",
    compute="one forward pass over the sequences, with the attention patterns of one layer at a time in memory",
    cost={"passes": 1},
    options={
        "apart": "Smallest distance, in sentences, between two sentences whose attention counts (default: 4).",
        "max_sentences": "Most sentences of an analysis; longer ones are grouped (default: 40).",
        "shuffles": "Shuffles of the rows for the kurtosis of chance, at least 20 (default: 100).",
    },
    order=128,
)
LEAST = 4  # sentences with a vertical score, of which a kurtosis is computed
METHOD = (
    "Attention is averaged over the tokens of both sentences and ranked within the row of the later one, among the "
    "sentences far enough before it. Vertical score of a sentence: the mean of its ranks. kurtosis: Fisher's, of the "
    "vertical scores of an analysis. change: kurtosis less the mean kurtosis after shuffling each row; mean over "
    "prompts, bootstrap-t interval; q: Benjamini–Hochberg over all heads."
)
NOT_CONTROLLED = (
    "A sentence that is attended to need not decide the answer: sentence-importance measures that. Windowed layers see "
    "only near tokens, so that their far rows are ties."
)


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    apart: int = 4,
    max_sentences: int = 40,
    shuffles: int = 100,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return by layer and head how much kurtosis vertical scores have beyond chance, with intervals over prompts.

    Raises:
        InputError: an option is not possible, or fewer than five prompts have an analysis that is long enough.
    """
    if apart < 1 or shuffles < 20 or max_sentences < apart + LEAST:
        raise InputError(
            f"apart={apart}, shuffles={shuffles}, max_sentences={max_sentences}: expected at least 1, 20 and apart + "
            f"{LEAST}"
        )
    every = [analysis_of(row, model.tokenizer, max_sentences) for row in rows]
    chosen = [one for one in every if one is not None and one.n_sentences >= apart + LEAST]
    units = [one.row.prompt_id for one in chosen]
    if (n := len(set(units))) < MIN_PROMPTS:
        raise InputError(
            f"{n} prompts have an analysis of {apart + LEAST} sentences or more, and an interval needs {MIN_PROMPTS}: "
            "use more sequences, or a smaller apart"
        )
    scores = np.empty((2, model.cfg.n_layers, model.cfg.n_heads, len(chosen)))
    rng = np.random.default_rng(seed)
    with progress("receiver heads", len(chosen), "sequences") as advance:
        for number, one in enumerate(chosen):
            for layer, attention in enumerate(sentence_attention(model, one)):
                scores[:, layer, :, number] = kurtosis(attention, apart, shuffles, rng)
            advance(1)
    found = mean_effect(scores[0] - scores[1], units, seed=seed)
    cells = ("layer", "head")
    variables = {name: (cells, getattr(found, name)) for name in ("change", "low", "high", "p")}
    variables |= {"q": (cells, false_discovery(found.p)), "kurtosis": (cells, scores[0].mean(-1))}
    result = xr.Dataset(variables | {"shuffled": (cells, scores[1].mean(-1))})
    result.attrs = {
        "title": "Kurtosis of vertical attention scores beyond chance",
        "units": "1",
        "rests_on": f"{len(chosen)} analyses of {n} prompts",
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    return {"heads": result.assign_attrs(summary=_summary(result))}


@torch.no_grad()
def sentence_attention(model: GptOss, one: Analysis) -> list[Float[np.ndarray, "head sentence sentence"]]:
    """Return for each layer the mean attention of the tokens of a sentence (row) to those of another (column)."""
    start, stop = one.cuts[0], one.cuts[-1]
    lengths = torch.tensor(np.diff(one.cuts), device=model.device)
    member = torch.zeros(stop - start, one.n_sentences, device=model.device)
    member[torch.arange(stop - start), torch.repeat_interleave(torch.arange(one.n_sentences), lengths.cpu())] = 1
    found: list[np.ndarray] = []

    def keep(pattern: Tensor, hook: object) -> None:
        inside = pattern[0, :, start:stop, start:stop].float()
        summed = torch.einsum("hqk,qi,kj->hij", inside, member, member)
        found.append((summed / (lengths[:, None] * lengths[None])).cpu().numpy())

    tokens = torch.from_numpy(one.row.tokens[:stop].astype(np.int64))[None].to(model.device)
    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    return found


def kurtosis(
    attention: Float[np.ndarray, "head sentence sentence"], apart: int, shuffles: int, rng: np.random.Generator
) -> Float[np.ndarray, "2 head"]:
    """Return the kurtosis of each head's vertical scores, and its mean over shuffles of the rows."""
    n = attention.shape[-1]
    far = np.subtract.outer(np.arange(n), np.arange(n)) >= apart
    ranks = np.full(attention.shape, np.nan)
    for row in range(apart + 1, n):  # a row with one column has nothing to rank
        ranks[:, row, far[row]] = scipy.stats.rankdata(attention[:, row, far[row]], axis=-1) / far[row].sum()
    drawn = np.empty((shuffles, len(attention)))
    for i in range(shuffles):
        shuffled = ranks.copy()
        for row in range(apart + 1, n):
            shuffled[:, row, far[row]] = rng.permuted(ranks[:, row, far[row]], axis=-1)
        drawn[i] = _of_columns(shuffled, far)
    return np.stack([_of_columns(ranks, far), drawn.mean(0)])


def _of_columns(
    ranks: Float[np.ndarray, "head sentence sentence"], far: Bool[np.ndarray, "sentence sentence"]
) -> Float[np.ndarray, " head"]:
    """Return the kurtosis over the columns of the mean rank in each; 0 where all means are equal."""
    columns = far.any(0)
    means = np.nanmean(ranks[:, far.sum(1) > 1][:, :, columns], axis=1)
    varies = means.std(-1) > 1e-9
    out = np.zeros(len(ranks))
    out[varies] = scipy.stats.kurtosis(means[varies], axis=-1)
    return out


def _summary(result: xr.Dataset) -> str:
    shown = (result["q"].values <= ALPHA) & (result["low"].values > 0)
    lines = [
        f"{result.attrs['rests_on']}. {int(shown.sum())} of {shown.size} heads have more kurtosis than shuffled rows "
        f"(q of at most {ALPHA})."
    ]
    size = np.where(shown, result["change"].values, -np.inf)
    for flat in np.argsort(-size, axis=None)[: min(5, int(shown.sum()))]:
        layer, head = np.unravel_index(flat, size.shape)
        one = result.isel(layer=int(layer), head=int(head))
        change, low, high = (float(one[name]) for name in ("change", "low", "high"))
        lines.append(f"  layer {layer} head {head}: {change:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)
