"""Sentence importance: which sentences of an analysis decide the answer, by sampling the rest again from each.

Continuations from before a sentence write another sentence in its place, or a similar one. The answers of those whose
sentence differs are set against those after the kept sentence. Forced answers close the analysis after each sentence:
they show from where on the answer is settled.

Reference: Bogdan et al. 2025, arXiv 2506.19143 (counterfactual importance); Lanham et al. 2023, arXiv
2307.13702 (early answering, filler); arXiv 2510.27484.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int

from workbench.capture.generation import final_text
from workbench.errors import InputError
from workbench.experiments.branch_importance import (
    Importance,
    commitment,
    difference_of_shares,
    importance,
    similarity,
)
from workbench.experiments.branching import (
    Analysis,
    Branches,
    BranchPoint,
    Kind,
    analysis_of,
    branch_points,
    sample,
    sentence_ends,
)
from workbench.experiments.final_channel import ALPHA
from workbench.experiments.sampling import spread_rows
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect, wilson
from workbench.studies.statistics import false_discovery

EXPERIMENT = Experiment(
    name="sentence-importance",
    title="Importance of the sentences of the analysis",
    question="Which sentences of the analysis decide the answer, and from which sentence on is it settled?",
    compute="sampled continuations: for each conversation, twice `samples` from every sentence of its analysis",
    options={
        "conversations": "Conversations, spread over tasks and efforts (default: 10).",
        "samples": "Continuations from each sentence, at least 10 (default: 50).",
        "temperature": "Temperature of sampling (default: 1).",
        "similar": "Edit similarity from which a resampled sentence counts as kept (default: 1, equal).",
        "edits": "Also replace each sentence: filler, removed, or both separated by commas (default: none).",
        "max_sentences": "Most sentences of an analysis; longer ones are grouped (default: 20).",
        "max_new_tokens": "Most tokens of a continuation (default: 512).",
        "store": "JSONL file for the continuations; the same command resumes from it (default: none).",
    },
    figures="workbench.figures.sentence_importance",
    aliases=("branching", "anchors"),
    order=115,
)
METHOD = (
    "From before every sentence of the analysis, and after the last, `samples` continuations to the end of the "
    "answer. kept: those after the sentence, and those from before it that wrote a similar one (edit similarity of "
    "tokens of at least `similar`); other: those from before it that wrote another. effect: probability of the "
    "conversation's own answer, kept less other (Agresti–Caffo interval over samples). kl: divergence of other's "
    "answers from kept's, nats, counts smoothed by 0.5, tested against shuffled samples; q: Benjamini–Hochberg over "
    "all sentences. forced: share of the own answer when the analysis is closed after the sentence and the final "
    "message opened. committed: the share of sentences after which the most frequent forced answer is the own one and "
    "stays so. Unfinished answers are an answer of their own."
)
NOT_CONTROLLED = (
    "Similarity is one of tokens, not of meaning: a paraphrase counts as another sentence, which makes effects "
    "smaller. A forced answer takes the model off its policy. Intervals of a sentence are over its samples, so that "
    "they hold for this conversation; only `committed` has an interval over prompts."
)
_LEAST = 10
_UNFINISHED = "(unfinished)"


def experiment(
    model: GptOss,
    rows: Sequence[Transcript],
    *,
    conversations: int = 10,
    samples: int = 50,
    temperature: float = 1.0,
    similar: float = 1.0,
    edits: str = "",
    max_sentences: int = 20,
    max_new_tokens: int = 512,
    store: str = "",
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the importance of every sentence, and for every conversation from where on its answer is settled.

    Dataset `sentences`, over sentence: effect, low, high, kl, kl_null, p, q, accuracy_change (where the expected text
    is known), forced with its interval before and after, samples kept and other, and `start` and `stop`, the tokens of
    the sentence in its sequence. `conversations`: sentences, committed.

    Raises:
        InputError: an option is not possible, or no sequence has an analysis of two sentences and a final message.
    """
    if samples < _LEAST or not 0 < similar <= 1:
        raise InputError(f"samples={samples}, similar={similar:g}: expected at least {_LEAST}, and 0 < similar <= 1")
    kinds = _edit_kinds(edits)
    known = [a for row in rows if (a := analysis_of(row, model.tokenizer, max_sentences)) and a.n_sentences > 1]
    if not known:
        raise InputError("no sequence has an analysis of at least two sentences and a finished final message")
    chosen = [known[i] for i in spread_rows([one.row for one in known], conversations)]
    filler = _filler(model) if "filler" in kinds else None
    points = {one.row.id: branch_points(one, kinds, filler) for one in chosen}
    every = [p for own in points.values() for p in own]
    options: dict[str, Any] = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    branches = sample(model, every, **options, seed=seed, store=store or None)
    rng = np.random.default_rng(seed)
    found = [Answered(model, one, points[one.row.id], branches, similar) for one in chosen]
    sentences = _sentences(found, kinds, rng)
    by_conversation = _conversations(found, seed)
    about = {
        "rests_on": f"{len(chosen)} conversations, {sentences.sizes['sentence']} sentences, {samples} samples each",
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    sentences.attrs |= about | {"title": "Importance of the sentences of the analysis"}
    by_conversation.attrs |= about | {"title": "From where on the answer is settled"}
    sentences.attrs["summary"] = _sentence_summary(sentences)
    by_conversation.attrs["summary"] = _conversation_summary(by_conversation)
    return {"sentences": sentences, "conversations": by_conversation}


def _edit_kinds(text: str) -> list[Kind]:
    kinds: list[Kind] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in ("filler", "removed"):
            raise InputError(f"edits={text!r}: expected filler, removed, or both separated by a comma")
        kinds.append("filler" if name == "filler" else "removed")
    return kinds


def _filler(model: GptOss) -> int:
    """Return the token of dots, or of the sign in the vocabulary that says least."""
    for text in (" ...", "...", ".", " ", ";"):
        try:
            ids = model.tokenizer.encode(text)
        except InputError:  # a small vocabulary lacks it
            continue
        if len(ids) == 1:
            return int(ids[0])
    raise InputError("edits=filler: the vocabulary has no token of dots, a space or a semicolon")


class Answered:
    """A conversation with the answers of its branches, as category numbers; 0 is its own answer."""

    def __init__(
        self, model: GptOss, one: Analysis, points: Sequence[BranchPoint], branches: Branches, similar: float
    ) -> None:
        self.one, self._codes = one, {one.answer: 0}
        self.answers: dict[tuple[Kind, int], np.ndarray] = {}
        self.alike: dict[int, np.ndarray] = {}  # whether a continuation's first sentence is like the one it replaces
        for point in points:
            new = branches[point.id]
            texts = [final_text([*point.ids, *ids], model.tokenizer) for ids in new]
            codes = [self._codes.setdefault(_UNFINISHED if t is None else t, len(self._codes)) for t in texts]
            self.answers[point.kind, point.sentence] = np.array(codes)
            if point.kind == "continue" and point.sentence < one.n_sentences:
                own = one.sentence(point.sentence)
                firsts = [first_sentence(model, ids, one.header[0]) for ids in new]
                self.alike[point.sentence] = np.array([similarity(own, first) >= similar for first in firsts])
        self.texts = [model.tokenizer.decode(one.sentence(i)).strip() for i in range(one.n_sentences)]

    def sides(self, number: int) -> tuple[Int[np.ndarray, " kept"], Int[np.ndarray, " other"]]:
        """Return the answers with the sentence kept or rewritten alike, and those with another in its place."""
        before, alike = self.answers["continue", number], self.alike[number]
        return np.concatenate([self.answers["continue", number + 1], before[alike]]), before[~alike]

    def expected(self) -> int | None:
        """Return the category of the expected text; −1 where no branch gave it, None where it is not known."""
        return None if self.one.row.answer is None else self._codes.get(self.one.row.answer, -1)

    def forced(self, number: int) -> tuple[float, float, float]:
        """Return the share of the own answer, with its interval, when the analysis is closed before a sentence."""
        own = (self.answers["forced", number] == 0).astype(np.float64)
        share, low, high = wilson(own, len(own))
        return float(share), float(low), float(high)

    def committed(self) -> float:
        """Return the share of sentences after which the forced answer is settled."""
        points = range(self.one.n_sentences + 1)
        modes = [Counter(self.answers["forced", i].tolist()).most_common(1)[0][0] == 0 for i in points]
        return commitment(modes) / self.one.n_sentences if modes[-1] else float("nan")


def first_sentence(model: GptOss, ids: Sequence[int], end: int) -> list[int]:
    """Return the first sentence that a continuation writes; it also ends with the token that ends the analysis."""
    own = [int(t) for t in ids]
    own = own[: own.index(end)] if end in own else own
    texts: list[str] = []
    for i, token in enumerate(own):
        texts.append(model.tokenizer.decode([token]))
        ends = sentence_ends([*texts, *([model.tokenizer.decode([own[i + 1]])] if i + 1 < len(own) else [])])
        if ends[0] <= i + 1:
            return own[: ends[0]]
    return own


def _sentences(found: Sequence[Answered], kinds: Sequence[Kind], rng: np.random.Generator) -> xr.Dataset:
    columns: dict[str, list[Any]] = {}

    def put(**values: Any) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    for one in found:
        expected = one.expected()
        for i, text in enumerate(one.texts):
            kept, other = one.sides(i)
            result = importance(kept, other, 0, rng)
            forced, low, high = one.forced(i + 1)
            put(conversation=one.one.row.id, number=i, text=text, kept=len(kept), other=len(other))
            put(start=one.one.cuts[i], stop=one.one.cuts[i + 1])
            put(**{name: getattr(result, name) for name in Importance._fields})
            put(forced_before=one.forced(i)[0], forced=forced, forced_low=low, forced_high=high)
            right = float("nan")
            if expected is not None and len(kept) and len(other):
                right = float((kept == expected).mean() - (other == expected).mean())
            put(accuracy_change=right)
            for kind in kinds:
                put(**_edited(one, kind, i, rng))
    coords = {name: ("sentence", columns.pop(name)) for name in ("conversation", "number", "text")}
    labels = [f"{c}: {n + 1}. {t}" for c, n, t in zip(*(coords[k][1] for k in coords), strict=True)]
    result_set = xr.Dataset({k: ("sentence", np.array(v)) for k, v in columns.items()}, {**coords, "sentence": labels})
    result_set["q"] = ("sentence", false_discovery(result_set["p"].values))
    return result_set


def _edited(one: Answered, kind: Kind, i: int, rng: np.random.Generator) -> dict[str, float]:
    """Return what an edit of the sentence does to the own answer: kept less edited, with interval and p."""
    kept = one.answers["continue", i + 1]
    if (kind, i + 1) not in one.answers:
        return {f"{kind}_{name}": float("nan") for name in ("effect", "low", "high", "p")}
    edited = one.answers[kind, i + 1]
    if kind == "removed":  # the next sentence is kept on both sides
        kept = one.answers["continue", i + 2]
    effect, low, high = difference_of_shares(int((kept == 0).sum()), len(kept), int((edited == 0).sum()), len(edited))
    p = importance(kept, edited, 0, rng).p
    return {f"{kind}_effect": effect, f"{kind}_low": low, f"{kind}_high": high, f"{kind}_p": p}


def _conversations(found: Sequence[Answered], seed: int) -> xr.Dataset:
    committed = np.array([one.committed() for one in found])
    prompts = [one.one.row.prompt_id for one in found]
    whole = [one.answers["continue", one.one.n_sentences] for one in found]
    result = xr.Dataset(
        {
            "committed": ("conversation", committed, {"long_name": "share of sentences before commitment"}),
            "sentences": ("conversation", [one.one.n_sentences for one in found]),
            "own_answer": ("conversation", [float((codes == 0).mean()) for codes in whole]),
        },
        coords={"conversation": [one.one.row.id for one in found], "prompt": ("conversation", prompts)},
    )
    known = np.isfinite(committed)
    if len({p for p, k in zip(prompts, known, strict=True) if k}) >= MIN_PROMPTS:
        mean = mean_effect(committed, prompts, seed=seed)
        for name, value in zip(("mean", "low", "high"), mean[:3], strict=True):
            result[f"committed_{name}"] = ((), float(np.clip(value, 0, 1)) if np.isfinite(value) else np.nan)
    return result


def _sentence_summary(result: xr.Dataset) -> str:
    q, effect = result["q"].values, result["effect"].values
    tested = np.isfinite(q)
    decisive = [int(i) for i in np.argsort(-np.nan_to_num(np.abs(effect))) if tested[i] and q[i] <= ALPHA]
    lines = [
        f"{result.attrs['rests_on']}. {int(tested.sum())} sentences could be tested: the others were hardly ever "
        f"written otherwise. Of these, {len(decisive)} change the distribution of answers."
    ]
    for i in decisive[:8]:
        one = result.isel(sentence=i)
        text = str(one["text"].item())
        lines.append(
            f"  {one['conversation'].item()}, sentence {int(one['number']) + 1}, {text[:60]!r}: own answer "
            f"{float(one['effect']):+.2f} [{float(one['low']):+.2f}, {float(one['high']):+.2f}] with it; divergence "
            f"{float(one['kl']):.2f} nats ({float(one['kl_null']):.2f} by chance), q {float(one['q']):.3f}."
        )
    return "\n".join(lines)


def _conversation_summary(result: xr.Dataset) -> str:
    known = np.isfinite(result["committed"].values)
    text = (
        f"The forced answer is settled after {np.nanmean(result['committed'].values):.0%} of the sentences on average"
        if known.any()
        else "The forced answer is never the own one"
    )
    if "committed_low" in result and np.isfinite(float(result["committed_low"])):
        text += f" [{float(result['committed_low']):.0%}, {float(result['committed_high']):.0%}]"
    return f"{text}; {int(known.sum())} of {len(known)} conversations end with their own answer when forced."
