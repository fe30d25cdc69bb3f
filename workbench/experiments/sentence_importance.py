"""Sentence importance: which sentences of an analysis decide the answer, by sampling the rest again from each.

Continuations from before a sentence write another sentence in its place, or a similar one. The answers of those whose
sentence differs are set against those after the kept sentence (counterfactual importance); those that never write it
again are set against them, too (resilience: continuations that write it are sampled again from there). Forced answers
close the analysis after each sentence: they show from where on the answer is settled.

Reference: Bogdan et al. 2025, arXiv 2506.19143 (counterfactual importance, resilience); Lanham et al. 2023, arXiv
2307.13702 (early answering, filler, mistakes, paraphrases); arXiv 2510.27484.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from workbench.counting import count_of, signed, signed_interval
from workbench.errors import InputError
from workbench.experiments import branch_edits
from workbench.experiments.branch_answers import Answered, Suppressed, suppressed
from workbench.experiments.branch_edits import EditKind, Editor, Paraphrases
from workbench.experiments.branch_hosts import HostModel
from workbench.experiments.branch_importance import Importance, difference_of_shares, importance
from workbench.experiments.branching import Unit, analysis_of, branch_points, sample
from workbench.experiments.sampling import spread_rows
from workbench.harmony.transcripts import Transcript
from workbench.model.transformer import GptOss
from workbench.registry import Experiment
from workbench.studies.intervals import MIN_PROMPTS, mean_effect
from workbench.studies.statistics import ALPHA, false_discovery

EXPERIMENT = Experiment(
    name="sentence-importance",
    title="Importance of the sentences of the analysis",
    question="Which sentences of the analysis decide the answer, and from which sentence on is it settled?",
    compute="sampled continuations: for each conversation, twice `samples` from every sentence of its analysis",
    cost={"new_tokens": 5120000},
    options={
        "conversations": "Conversations, spread over tasks and efforts (default: 10).",
        "samples": "Continuations from each sentence, at least 10 (default: 50).",
        "temperature": "Temperature of sampling (default: 1).",
        "unit": "sentence (default), or token to continue from every token.",
        "similar": "Edit similarity from which a resampled sentence counts as kept (default: 1, equal).",
        "rounds": "Sample again, so often, where a continuation writes the replaced sentence later (default: 0).",
        "edits": "Also replace each sentence: filler, removed, mistake, paraphrase, separated by commas (default: "
        "none).",
        "paraphrases": "JSONL of sentence and paraphrase, or host to ask the host (default: a fixed list).",
        "max_sentences": "Most sentences of an analysis; longer ones are grouped (default: 20).",
        "max_new_tokens": "Most tokens of a continuation (default: 512).",
        "store": "JSONL file of the continuations, from which the same command resumes; empty for none (default: "
        "RUN.branches.jsonl beside the run).",
    },
    host=True,
    figures="workbench.figures.sentence_importance",
    aliases=("branching", "anchors"),
    order=115,
)
METHOD = (
    "From before every sentence of the analysis, and after the last, `samples` continuations to the end of the "
    "answer. kept: those after the sentence, and those from before it that wrote a similar one (edit similarity of "
    "tokens of at least `similar`); other: those from before it that wrote another. effect: probability of the "
    "conversation's own answer, kept less other (Agresti–Caffo interval over samples). kl: divergence of other's "
    "answers from kept's, nats, counts smoothed by 0.5 (interval: bootstrap of samples from the smoothed shares, "
    "shifted by its bias), tested against shuffled samples; q: Benjamini–Hochberg over all sentences. absent: "
    "continuations that write the sentence nowhere, set against kept in the same way; returned: share of other that "
    "writes it later; resamplings: mean number until it stays out, at most `rounds`. Edits: kept less edited; a "
    "mistake changes one number, letter or verb. forced: share of the own answer when the analysis is closed after "
    "the sentence and the final message opened. committed: the share of sentences after which the most frequent "
    "forced answer is the own one and stays so; boundary: their number. Unfinished answers are an answer of their own."
)
NOT_CONTROLLED = (
    "Similarity is one of tokens, not of meaning: a paraphrase counts as another sentence, which makes effects "
    "smaller. Without `rounds`, absent holds the continuations that happen not to write the sentence. A forced answer "
    "takes the model off its policy. Intervals of a sentence are over its samples, so that "
    "they hold for this conversation; only `committed` has an interval over prompts."
)
_LEAST = 10


def experiment(
    model: GptOss | HostModel,
    rows: Sequence[Transcript],
    *,
    conversations: int = 10,
    samples: int = 50,
    temperature: float = 1.0,
    unit: str = "sentence",
    similar: float = 1.0,
    rounds: int = 0,
    edits: str = "",
    paraphrases: str = "",
    max_sentences: int = 20,
    max_new_tokens: int = 512,
    store: str = "",
    seed: int = 0,
) -> dict[str, xr.Dataset]:
    """Return the importance of every sentence, and for every conversation from where on its answer is settled.

    Dataset `sentences`, over sentence: effect, low, high, kl, kl_low, kl_high, kl_null, p, q, accuracy_change (where
    the expected text is known), forced with its interval before and after, samples kept and other, the tokens
    `start` to `stop` of the sentence in its sequence; the same of continuations without the sentence as absent_effect
    and so on, returned, resamplings; of every edit NAME_effect and so on. `conversations`: sentences, committed,
    boundary.

    Raises:
        InputError: an option is not possible, or no sequence has an analysis of two sentences and a final message.
    """
    if samples < _LEAST or not 0 < similar <= 1:
        raise InputError(f"samples={samples}, similar={similar:g}: expected at least {_LEAST}, and 0 < similar <= 1")
    if unit not in ("sentence", "token") or rounds < 0:
        raise InputError(f"unit={unit!r}, rounds={rounds}: expected sentence or token, and no negative number")
    of: Unit = "token" if unit == "token" else "sentence"
    kinds, editor = _edit_kinds(edits), Editor(model.tokenizer, _paraphrases(model, paraphrases), seed)
    known = [a for row in rows if (a := analysis_of(row, model.tokenizer, max_sentences, of)) and a.n_sentences > 1]
    if not known:
        raise InputError("no sequence has an analysis of at least two sentences and a finished final message")
    chosen = [known[i] for i in spread_rows([one.row for one in known], conversations)]
    points = {one.row.id: branch_points(one, kinds, editor) for one in chosen}
    every = [p for own in points.values() for p in own]
    options: dict[str, Any] = {"samples": samples, "temperature": temperature, "max_new_tokens": max_new_tokens}
    options |= {"seed": seed, "store": store or None}
    branches = sample(model, every, **options)
    answered = [Answered(model.tokenizer, one, points[one.row.id], branches, similar) for one in chosen]
    absent = suppressed(model, answered, rounds, options)
    sentences = _sentences(answered, kinds, absent, np.random.default_rng(seed))
    by_conversation = _conversations(answered, seed)
    n = len(chosen)
    about: dict[str, Any] = {
        "rests_on": f"{count_of(n, 'conversation')}, {count_of(sentences.sizes['sentence'], 'sentence')}, "
        f"{count_of(samples, 'sample')} each",
        "prompts": len({one.row.prompt_id for one in chosen}),
        "method": METHOD,
        "not_controlled": NOT_CONTROLLED,
    }
    sentences.attrs |= about | {"title": "Importance of the sentences of the analysis", "intervals_over": "samples"}
    by_conversation.attrs |= about | {"title": "From where on the answer is settled"}
    sentences.attrs["summary"] = _sentence_summary(sentences)
    by_conversation.attrs["summary"] = _conversation_summary(by_conversation)
    return {"sentences": sentences, "conversations": by_conversation}


def _edit_kinds(text: str) -> list[EditKind]:
    names = [name for part in text.split(",") if (name := part.strip())]
    if unknown := [name for name in names if name not in branch_edits.KINDS]:
        raise InputError(f"edits={unknown[0]!r}: expected {', '.join(branch_edits.KINDS)}, separated by commas")
    return [kind for kind in branch_edits.KINDS if kind in names]


def _paraphrases(model: GptOss | HostModel, text: str) -> Paraphrases | None:
    """Return the source of paraphrases that an option names; None is the fixed list.

    Raises:
        InputError: a host is named and the model is loaded here, or the file cannot be read.
    """
    if text == "host":
        if not isinstance(model, HostModel):
            raise InputError("paraphrases=host needs a model at a host: add --host, or name a file")
        return branch_edits.asked_paraphrases(model.ask)
    return branch_edits.read_paraphrases(text).get if text else None


def _sentences(
    conversations: Sequence[Answered],
    kinds: Sequence[EditKind],
    absent: dict[tuple[int, int], Suppressed],
    rng: np.random.Generator,
) -> xr.Dataset:
    columns: dict[str, list[Any]] = {}

    def put(**values: Any) -> None:
        for name, value in values.items():
            columns.setdefault(name, []).append(value)

    for number, one in enumerate(conversations):
        expected = one.expected()
        for i, text in enumerate(one.texts):
            with_sentence, other = one.sides(i)
            result = importance(with_sentence, other, 0, rng)
            forced, low, high = one.forced(i + 1)
            put(conversation=one.one.row.id, number=i, text=text, kept=len(with_sentence), other=len(other))
            put(start=one.one.cuts[i], stop=one.one.cuts[i + 1])
            put(**{name: getattr(result, name) for name in Importance._fields})
            put(forced_before=one.forced(i)[0], forced=forced, forced_low=low, forced_high=high)
            right = float("nan")
            if expected is not None and len(with_sentence) and len(other):
                right = float((with_sentence == expected).mean() - (other == expected).mean())
            put(accuracy_change=right, **_without(with_sentence, absent.get((number, i)), rng))
            for kind in kinds:
                put(**_edited(one, kind, i, rng))
    coords = {name: ("sentence", columns.pop(name)) for name in ("conversation", "number", "text")}
    labels = [f"{c}: {n + 1}. {t}" for c, n, t in zip(*(coords[k][1] for k in coords), strict=True)]
    result_set = xr.Dataset({k: ("sentence", np.array(v)) for k, v in columns.items()}, {**coords, "sentence": labels})
    result_set["q"] = ("sentence", false_discovery(result_set["p"].values))
    return result_set


def _without(with_sentence: np.ndarray, absent: Suppressed | None, rng: np.random.Generator) -> dict[str, float]:
    """Return what continuations without the sentence change: kept less absent; NaN where the unit is a token."""
    names = ("effect", "low", "high", "kl", "kl_low", "kl_high", "p")
    if absent is None:
        return dict.fromkeys(("returned", "resamplings", "absent", *(f"absent_{n}" for n in names)), float("nan"))
    result = importance(with_sentence, absent.answers, 0, rng)
    values = {f"absent_{name}": float(getattr(result, name)) for name in names}
    return {"returned": absent.returned, "resamplings": absent.resamplings, "absent": len(absent.answers)} | values


def _edited(one: Answered, kind: EditKind, i: int, rng: np.random.Generator) -> dict[str, float]:
    """Return what an edit of the sentence does to the own answer: kept less edited, with interval and p."""
    answers = one.answers["continue", i + 1]
    if (kind, i + 1) not in one.answers:
        return {f"{kind}_{name}": float("nan") for name in ("effect", "low", "high", "p")}
    edited = one.answers[kind, i + 1]
    if kind == "removed":  # the next sentence is kept on both sides
        answers = one.answers["continue", i + 2]
    effect, low, high = difference_of_shares(
        int((answers == 0).sum()), len(answers), int((edited == 0).sum()), len(edited)
    )
    p = importance(answers, edited, 0, rng).p
    return {f"{kind}_effect": effect, f"{kind}_low": low, f"{kind}_high": high, f"{kind}_p": p}


def _conversations(conversations: Sequence[Answered], seed: int) -> xr.Dataset:
    after = [one.boundary() for one in conversations]
    boundary = np.array([np.nan if n is None else n for n in after], dtype=np.float64)
    committed = boundary / np.array([one.one.n_sentences for one in conversations])
    prompts = [one.one.row.prompt_id for one in conversations]
    last_answers = [one.answers["continue", one.one.n_sentences] for one in conversations]
    result = xr.Dataset(
        {
            "committed": ("conversation", committed, {"long_name": "share of sentences before commitment"}),
            "boundary": ("conversation", boundary, {"long_name": "sentences before commitment"}),
            "sentences": ("conversation", [one.one.n_sentences for one in conversations]),
            "own_answer": ("conversation", [float((codes == 0).mean()) for codes in last_answers]),
        },
        coords={"conversation": [one.one.row.id for one in conversations], "prompt": ("conversation", prompts)},
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
        f"{result.attrs['rests_on']}. Sentences that could be tested: {int(tested.sum())}; the others were hardly ever "
        f"written otherwise. Of these, {len(decisive)} change{'s' * (len(decisive) == 1)} the distribution of answers."
    ]
    for i in decisive[:8]:
        one = result.isel(sentence=i)
        text = str(one["text"].item())
        lines.append(
            f"  {one['conversation'].item()}, sentence {int(one['number']) + 1}, {text[:60]!r}: own answer "
            f"{signed_interval(float(one['effect']), float(one['low']), float(one['high']), 2)} with it; divergence "
            f"{float(one['kl']):.2f} nats [{float(one['kl_low']):.2f}, {float(one['kl_high']):.2f}] "
            f"({float(one['kl_null']):.2f} by chance), q {float(one['q']):.3f}."
            + (f" Written later by {float(one['returned']):.0%} of the others." if one["returned"] > 0 else "")
        )
    return "\n".join([*lines, *_edits_summary(result)])


def _edits_summary(result: xr.Dataset) -> list[str]:
    """Return a line for every edit: at how many sentences it changes the probability of the own answer."""
    lines = []
    for kind in (kind for kind in branch_edits.KINDS if f"{kind}_p" in result):
        effect, q = result[f"{kind}_effect"].values, false_discovery(result[f"{kind}_p"].values)
        n = int(np.isfinite(q).sum())
        mean = f"own answer {signed(np.nanmean(effect), 2)} kept less edited on average" if n else "nowhere possible"
        lines.append(f"  {kind}: {int((q <= ALPHA).sum())} of {count_of(n, 'sentence')} change the answers; {mean}.")
    return lines


def _conversation_summary(result: xr.Dataset) -> str:
    known = np.isfinite(result["committed"].values)
    text = (
        f"The forced answer is settled after {np.nanmean(result['committed'].values):.0%} of the sentences on average"
        if known.any()
        else "The forced answer is never the own one"
    )
    if "committed_low" in result and np.isfinite(float(result["committed_low"])):
        text += f" [{float(result['committed_low']):.0%}, {float(result['committed_high']):.0%}]"
    return (
        f"{text}; {int(known.sum())} of {count_of(len(known), 'conversation')} end with their own answer when forced."
    )
