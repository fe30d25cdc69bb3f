"""Receiver heads: heads whose attention from later sentences of an analysis gathers on few earlier ones.

Attention is averaged over the tokens of every pair of sentences. The vertical score of a sentence is the mean attention
that it receives from sentences at least `apart` after it; the score of a head is the kurtosis of its vertical scores.
Attention may first be ranked in each row, so that early and late rows count alike; with few sentences ranks hide how
much more attention one of them receives. Shuffled rows give the kurtosis of chance.

Reference: Bogdan et al. 2025, arXiv 2506.19143.
"""

from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments.branching import Analysis, analysis_of
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.progress import progress
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect, prompt_means
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="receiver-heads",
    title="Receiver heads",
    question="Which heads gather the attention of later sentences of an analysis on few earlier ones?",
    compute="one forward pass over the sequences, with the attention patterns of one layer at a time in memory",
    cost={"passes": 1},
    options={
        "apart": "Sentences between which attention counts are at least this many apart (default: 4).",
        "max_sentences": "Most sentences of an analysis; longer ones are grouped (default: 40).",
        "scores": "attention (default), or ranks of it within each row.",
        "heads": "Heads with the largest scores whose attention to each sentence is returned (default: 16).",
        "shuffles": "Shuffles of the rows for the kurtosis of chance, at least 20 (default: 100).",
    },
    figures="workbench.figures.receiver_heads",
    order=128,
)
LEAST = 4  # sentences with a vertical score, of which a kurtosis is computed
METHOD = (
    "Attention is averaged over the tokens of both sentences and (scores=ranks) ranked within the row of the later "
    "one, among the sentences far enough before it. Vertical score of a sentence: the mean of its column. kurtosis: "
    "Fisher's, of the vertical scores of an analysis. change: kurtosis less the mean kurtosis after shuffling each "
    "row; mean over prompts, bootstrap-t interval; q: Benjamini–Hochberg over all heads. first: share of analyses "
    "whose first sentence has the largest vertical score, mean over prompts. score of a sentence: its "
    "vertical score in standard deviations of those of its analysis, mean over the heads with the largest change, "
    "which are chosen on the same analyses."
)
NOT_CONTROLLED = (
    "A sentence that is attended to need not decide the answer: sentence-importance measures that. A head that "
    "attends to one place, such as the first sentence of every analysis, has as much kurtosis as one that attends to "
    "a sentence for its meaning: see `first`. Windowed layers see only near tokens, so that their far rows are ties."
)


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    apart: int = 4,
    max_sentences: int = 40,
    scores: str = "attention",
    heads: int = 16,
    shuffles: int = 100,
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return by layer and head how much kurtosis vertical scores have beyond chance, with intervals over prompts.

    Dataset `heads`, over layer and head: change, low, high, p, q, kurtosis, shuffled, first. `sentences`, over
    sentence: score, how much the heads with the largest change attend to it, with its conversation, number and text.

    Raises:
        InputError: an option is not possible, or fewer than five prompts have an analysis that is long enough.
    """
    if apart < 1 or shuffles < 20 or max_sentences < apart + LEAST:
        raise InputError(
            f"apart={apart}, shuffles={shuffles}, max_sentences={max_sentences}: expected at least 1, 20 and apart + "
            f"{LEAST}"
        )
    if scores not in ("ranks", "attention") or heads < 1:
        raise InputError(f"scores={scores!r}, heads={heads}: expected ranks or attention, and at least 1")
    every = [analysis_of(row, model.tokenizer, max_sentences) for row in rows]
    chosen = [one for one in every if one is not None and one.n_sentences >= apart + LEAST]
    units = [one.row.prompt_id for one in chosen]
    if (n := len(set(units))) < MIN_PROMPTS:
        raise InputError(
            f"{n} prompts have an analysis of {apart + LEAST} sentences or more, and an interval needs {MIN_PROMPTS}: "
            "use more sequences, or a smaller apart"
        )
    values, vertical = np.empty((2, model.cfg.n_layers, model.cfg.n_heads, len(chosen))), list[np.ndarray]()
    rng = np.random.default_rng(seed)
    with progress("receiver heads", len(chosen), "sequences") as advance:
        for number, one in enumerate(chosen):
            rows_by_layer = [_scored_rows(a, apart, scores == "ranks") for a in sentence_attention(model, one)]
            for layer, scored in enumerate(rows_by_layer):
                values[:, layer, :, number] = kurtosis(scored, apart, shuffles, rng)
            vertical.append(np.stack([vertical_scores(scored, apart) for scored in rows_by_layer]))
            advance(1)
    effect = mean_effect(values[0] - values[1], units, seed=seed)
    cells = ("layer", "head")
    variables = {name: (cells, getattr(effect, name)) for name in ("change", "low", "high", "p")}
    first = np.stack([scores.argmax(-1) == 0 for scores in vertical], -1).astype(np.float64)
    variables["q"] = (cells, false_discovery(effect.p))
    for name, of_sequences in (("kurtosis", values[0]), ("shuffled", values[1]), ("first", first)):
        variables[name] = (cells, prompt_means(of_sequences, units).mean(-1))
    result = xr.Dataset(variables)
    about = {
        "rests_on": f"{count_of(len(chosen), 'analysis', 'analyses')} of {count_of(n, 'prompt')}",
        "prompts": n,
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    result.attrs = about | {"title": "Kurtosis of vertical attention scores beyond chance", "units": "1"}
    result.attrs["summary"] = _summary(result)
    largest = np.argsort(-effect.change, axis=None)[:heads]
    sentences = _sentences(model, chosen, vertical, largest, int(_shown(result).ravel()[largest].sum()))
    sentences.attrs |= about | {"title": "Sentences that the heads with the largest kurtosis attend to"}
    return {"heads": result, "sentences": sentences}


def _sentences(
    model: GptOss,
    chosen: Sequence[Analysis],
    vertical: Sequence[np.ndarray],
    heads: Int[np.ndarray, " head"],
    shown: int,
) -> xr.Dataset:
    """Return the mean standardised vertical score of each sentence over some heads (numbers of layer × head).

    shown: how many of these heads are shown to have more kurtosis than shuffled rows.
    """
    conversation, number, text, score = [], [], [], []
    for one, values in zip(chosen, vertical, strict=True):
        own = values.reshape(-1, values.shape[-1])[heads]
        spread = own.std(-1, keepdims=True)
        standard = np.divide(own - own.mean(-1, keepdims=True), spread, out=np.zeros_like(own), where=spread > 1e-9)
        for i, value in enumerate(standard.mean(0)):
            conversation.append(one.row.id)
            number.append(i)
            text.append(model.tokenizer.decode(one.sentence(i)).strip())
            score.append(float(value))
    labels = [f"{c}: {n + 1}. {t}" for c, n, t in zip(conversation, number, text, strict=True)]
    coords = {"conversation": conversation, "number": number, "text": text}
    about = {"long_name": "attention received", "units": "standard deviations"}
    result = xr.Dataset(
        {"score": ("sentence", score, about)},
        {"sentence": labels} | {name: ("sentence", values) for name, values in coords.items()},
    )
    order = np.argsort(-np.array(score))[:5]
    lines = [
        f"The {len(heads)} heads with the largest change, of which {shown} are shown to have more kurtosis than "
        "shuffled rows, attend most to:"
    ]
    lines += [f"  {conversation[i]}, sentence {number[i] + 1}, {text[i][:60]!r}: {signed(score[i], 2)}" for i in order]
    return result.assign_attrs(summary="\n".join(lines))


@torch.no_grad()
def sentence_attention(model: GptOss, one: Analysis) -> list[Float[np.ndarray, "head sentence sentence"]]:
    """Return for each layer the mean attention of the tokens of a sentence (row) to those of another (column)."""
    start, stop = one.cuts[0], one.cuts[-1]
    lengths = torch.tensor(np.diff(one.cuts), device=model.device)
    member = torch.zeros(stop - start, one.n_sentences, device=model.device)
    member[torch.arange(stop - start), torch.repeat_interleave(torch.arange(one.n_sentences), lengths.cpu())] = 1
    by_layer: list[np.ndarray] = []

    def keep(pattern: Tensor, hook: object) -> None:
        inside = pattern[0, :, start:stop, start:stop].float()
        summed = torch.einsum("hqk,qi,kj->hij", inside, member, member)
        by_layer.append((summed / (lengths[:, None] * lengths[None])).cpu().numpy())

    tokens = torch.from_numpy(one.row.tokens[:stop].astype(np.int64))[None].to(model.device)
    hooks = [(f"blocks.{layer}.attn.hook_pattern", keep) for layer in range(model.cfg.n_layers)]
    model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
    return by_layer


def far_sentences(n: int, apart: int) -> Bool[np.ndarray, "sentence sentence"]:
    """Return which sentences (columns) are far enough before a sentence (row); a row with only one has none."""
    far = np.subtract.outer(np.arange(n), np.arange(n)) >= apart
    far[far.sum(1) < 2] = False
    return far


def _scored_rows(
    attention: Float[np.ndarray, "head sentence sentence"], apart: int, ranked: bool
) -> Float[np.ndarray, "head sentence sentence"]:
    """Return the attention to sentences that are far enough, NaN elsewhere; ranked: as ranks within each row, to 1."""
    far = far_sentences(attention.shape[-1], apart)
    scored = np.full(attention.shape, np.nan)
    for row in np.flatnonzero(far.any(1)):
        own = attention[:, row, far[row]]
        scored[:, row, far[row]] = scipy.stats.rankdata(own, axis=-1) / own.shape[-1] if ranked else own
    return scored


def vertical_scores(
    scored: Float[np.ndarray, "head sentence sentence"], apart: int
) -> Float[np.ndarray, "head sentence"]:
    """Return the mean of each column that has a value, of the first sentences."""
    far = far_sentences(scored.shape[-1], apart)
    return np.asarray(np.nanmean(scored[:, far.any(1)][:, :, far.any(0)], axis=1))


def kurtosis(
    scored: Float[np.ndarray, "head sentence sentence"], apart: int, shuffles: int, rng: np.random.Generator
) -> Float[np.ndarray, "2 head"]:
    """Return the kurtosis of each head's vertical scores, and its mean over shuffles of the rows."""
    far = far_sentences(scored.shape[-1], apart)
    drawn = np.empty((shuffles, len(scored)))
    for i in range(shuffles):
        shuffled = scored.copy()
        for row in np.flatnonzero(far.any(1)):
            shuffled[:, row, far[row]] = rng.permuted(scored[:, row, far[row]], axis=-1)
        drawn[i] = _kurtosis_of(vertical_scores(shuffled, apart))
    return np.stack([_kurtosis_of(vertical_scores(scored, apart)), drawn.mean(0)])


def _kurtosis_of(scores: Float[np.ndarray, "head sentence"]) -> Float[np.ndarray, " head"]:
    """Return Fisher's kurtosis over sentences; 0 where all scores are equal."""
    varies = scores.std(-1) > 1e-9
    out = np.zeros(len(scores))
    out[varies] = scipy.stats.kurtosis(scores[varies], axis=-1)
    return out


def _shown(result: xr.Dataset) -> Bool[np.ndarray, "layer head"]:
    return np.asarray((result["q"].values <= ALPHA) & (result["low"].values > 0))


def _summary(result: xr.Dataset) -> str:
    shown = _shown(result)
    lines = [
        f"{result.attrs['rests_on']}. {int(shown.sum())} of {shown.size} heads have more kurtosis than shuffled rows "
        f"(q of at most {ALPHA})."
    ]
    size = np.where(shown, result["change"].values, -np.inf)
    for flat in np.argsort(-size, axis=None)[: min(5, int(shown.sum()))]:
        layer, head = np.unravel_index(flat, size.shape)
        one = result.isel(layer=int(layer), head=int(head))
        change, low, high = (float(one[name]) for name in ("change", "low", "high"))
        lines.append(
            f"  layer {layer} head {head}: {signed_interval(change, low, high, 2)}; most to the first sentence in "
            f"{float(one['first']):.0%} of analyses"
        )
    return "\n".join(lines)
