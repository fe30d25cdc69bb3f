"""Labels of experts that a language model proposes, each with a detection score on examples it has not seen.

The model reads some examples of an expert's tokens, and over-represented tokens, and writes a label. Then it reads the
label and texts of other prompts with one marked token each, half of them of the expert and half of other experts of the
layer in the same channel, and states which fit. The score is the share of right answers with a 95 % interval; 0.5 is
chance.

Reference: detection scoring, Paulo et al. 2024, arXiv 2410.13928.
"""

import json
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int
from statsmodels.stats.proportion import proportion_confint

from workbench.bounded_json import parse_json
from workbench.errors import InputError, JobError
from workbench.harmony.hosts import answers
from workbench.harmony.hosts.client import HostError
from workbench.studies.label_files import cleaned
from workbench.studies.run_index import independent_prompts

SHOWN = 12  # examples from which a label is proposed
SCORED = 8  # held-out texts of the expert, and as many of others
Ask = Callable[[str], str]
_PROPOSE = (
    "Each line is a text in which one token is marked <<like this>>. One part of a language model processes the marked "
    "tokens. Describe what they have in common, the token or its context, in at most 12 words. Answer with the "
    "description only.\n\n"
)
_DETECT = (
    "A part of a language model is said to process tokens of this kind: {label}\nFor each numbered text, does its "
    "marked token <<like this>> fit? Answer with a JSON list of the numbers that fit, such as [2, 5], and nothing "
    "else.\n\n"
)


@dataclass(frozen=True)
class _Example:
    """An example in its context: `text` has the token marked."""

    sequence: int
    position: int
    text: str
    channel: str


def asker(host: Any, model: str, *, max_tokens: int | None = None) -> Ask:
    """Return a function from a prompt to the text that the model at a host answers."""

    def ask(prompt: str) -> str:
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        body |= {} if max_tokens is None else {"max_tokens": max_tokens}
        message = answers.first_choice(host.post("/chat/completions", body)).get("message")
        content = message.get("content") if isinstance(message, dict) else None
        return content if isinstance(content, str) else ""

    return ask


def propose(
    run: Any,
    examples: xr.Dataset,
    ask: Ask,
    *,
    name: str,
    layers: Sequence[int] = (),
    seed: int = 0,
    known: Container[tuple[int, int]] = (),
) -> Iterator[dict[str, Any]]:
    """Yield a row for each expert: proposed label, detection score with its interval, and the number of texts scored.

    examples: of `expert_examples.load`. ask: answers a prompt. name: of the model, kept beside the label. known: layer
    and expert of labels that are left out. So are experts with fewer than two examples, and those for which no answer
    can be read. What an expert is asked does not depend on the others.

    Raises:
        JobError: the host refuses a request or gives up.
    """
    routed, prompt = _Routing(run, examples), independent_prompts(run)
    for layer in layers or examples["layer"].values.tolist():
        for expert in examples["expert"].values.tolist():
            if (layer, expert) in known:
                continue
            rng = np.random.default_rng([seed, layer, expert])
            own = _examples(examples, layer, expert)
            if len(own) < 2:
                continue
            shown, held_out = _held_out(own, prompt)
            try:
                label = cleaned(ask(_PROPOSE + _listed(shown) + _tokens(examples, layer, expert)))
                if not label:
                    continue
                others = routed.others(layer, expert, held_out, rng)
                right, n = _detected(label, held_out, others, ask, rng)
            except (HostError, answers.NoAnswerError) as error:
                raise JobError(f"layer {layer} expert {expert}: {error}") from error
            low, high = proportion_confint(right, n, method="wilson") if n else (np.nan, np.nan)
            yield {
                "layer": layer,
                "expert": expert,
                "proposed": label,
                "proposed_by": cleaned(name),
                "score": right / n if n else np.nan,
                "score_low": float(low),
                "score_high": float(high),
                "scored": float(n),
            }


def proposed_by(labels: pd.DataFrame, name: str) -> set[tuple[int, int]]:
    """Return layer and expert of the labels that a model proposed."""
    own = labels[(labels["proposed"] != "") & (labels["proposed_by"] == cleaned(name))]
    return set(zip(own["layer"].tolist(), own["expert"].tolist(), strict=True))


def with_proposals(labels: pd.DataFrame, proposals: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return labels with these proposals, which are also what is shown."""
    by_expert = labels.set_index(["layer", "expert"])
    for row in proposals:
        place = (row["layer"], row["expert"])
        for name, value in row.items():
            if name not in ("layer", "expert"):
                by_expert.loc[place, name] = value
        by_expert.loc[place, "label"] = row["proposed"]
    return by_expert.reset_index()[list(labels.columns)]


def _examples(examples: xr.Dataset, layer: int, expert: int) -> list[_Example]:
    """Return examples of an expert's content: top and random ones of each channel in turn, each token once."""
    columns = [
        _column(examples, kind, c, layer, expert)
        for c, channel in enumerate(examples["channel"].values.tolist())
        if channel != "frame"
        for kind in ("top", "random")
    ]
    by_place: dict[tuple[int, int], _Example] = {}
    for rank in range(max(map(len, columns), default=0)):
        for column in columns:
            if rank < len(column):
                by_place.setdefault((column[rank].sequence, column[rank].position), column[rank])
    return list(by_place.values())


def _held_out(
    own: Sequence[_Example], prompt: Int[np.ndarray, " sequence"]
) -> tuple[Sequence[_Example], Sequence[_Example]]:
    """Return examples to show, and others to score with: of other prompts, as the texts of one are alike."""
    prompts = [int(prompt[e.sequence]) for e in own]
    known = set(prompts[:SHOWN])
    held_out = [e for e, number in zip(own, prompts, strict=True) if number not in known]
    if held_out:
        return own[:SHOWN], held_out[:SCORED]
    scored = set(list(dict.fromkeys(prompts))[1::2])  # few prompts: half of them are held out
    parts = [[e for e, n in zip(own, prompts, strict=True) if (n in scored) == side] for side in (False, True)]
    return parts[0][:SHOWN], parts[1][:SCORED]


def _column(examples: xr.Dataset, kind: str, channel: int, layer: int, expert: int) -> list[_Example]:
    names = ("sequence", "position", "before", "token", "after")
    rows = (examples[f"{kind}_{name}"].values[channel, layer, expert].tolist() for name in names)
    name = str(examples["channel"].values[channel])
    return [_Example(s, p, f"{t0}<<{t1}>>{t2}", name) for s, p, t0, t1, t2 in zip(*rows, strict=True) if s >= 0]


def _listed(rows: Sequence[_Example]) -> str:
    return "\n".join(json.dumps(row.text, ensure_ascii=False) for row in rows)


def _tokens(examples: xr.Dataset, layer: int, expert: int) -> str:
    texts, lows = (examples[name].values[layer, expert].tolist() for name in ("token_text", "token_log_odds_low"))
    words = [str(text) for text, low in zip(texts, lows, strict=True) if low > 0]
    return f"\n\nMore often than elsewhere: {json.dumps(words, ensure_ascii=False)}" if words else ""


class _Routing:
    """The experts of each example token, to draw texts of other experts from."""

    def __init__(self, run: Any, examples: xr.Dataset) -> None:
        layers, experts = examples["layer"].values.tolist(), examples["expert"].values.tolist()
        self._pool = {
            layer: list({(e.sequence, e.position): e for x in experts for e in _examples(examples, layer, x)}.values())
            for layer in layers
        }
        places = np.unique([(e.sequence, e.position) for pool in self._pool.values() for e in pool], axis=0)
        self._experts: dict[tuple[int, int], np.ndarray] = {}
        for block in run.blocks("experts"):
            key = block["sequence"].astype(np.int64) << 32 | block["position"].astype(np.int64)
            wanted = places[:, 0].astype(np.int64) << 32 | places[:, 1].astype(np.int64) if len(places) else key[:0]
            for at in np.flatnonzero(np.isin(key, wanted)).tolist():
                self._experts[int(block["sequence"][at]), int(block["position"][at])] = block["experts"][:, at]

    def others(
        self, layer: int, expert: int, like: Sequence[_Example], rng: np.random.Generator
    ) -> list[_Example | None]:
        """Return for each example one of the layer's other experts in its channel, at a token that did not go to this.

        None where the channel has no more of them.
        """
        free: dict[str, list[_Example]] = {}
        for i in rng.permutation(len(self._pool[layer])).tolist():
            e = self._pool[layer][i]
            if expert not in self._experts[e.sequence, e.position][layer]:
                free.setdefault(e.channel, []).append(e)
        return [free[e.channel].pop() if free.get(e.channel) else None for e in like]


def _detected(
    label: str, own: Sequence[_Example], others: Sequence[_Example | None], ask: Ask, rng: np.random.Generator
) -> tuple[int, int]:
    """Return right answers and texts, as many of the expert as of others, in random order; none if unreadable."""
    pairs = [(mine, other) for mine, other in zip(own, others, strict=True) if other is not None]
    texts = [(mine.text, True) for mine, _ in pairs] + [(other.text, False) for _, other in pairs]
    mixed = [texts[i] for i in rng.permutation(len(texts)).tolist()]
    if not mixed:
        return 0, 0
    lines = "\n".join(f"{i}. {json.dumps(text, ensure_ascii=False)}" for i, (text, _) in enumerate(mixed, 1))
    chosen_numbers = _numbers(ask(_DETECT.format(label=json.dumps(label, ensure_ascii=False)) + lines))
    if chosen_numbers is None:
        return 0, 0
    return sum((i in chosen_numbers) == is_own for i, (_, is_own) in enumerate(mixed, 1)), len(mixed)


def _numbers(text: str) -> set[int] | None:
    """Return the numbers in the last list of a reply, or None if there is none."""
    lists = re.findall(r"\[[\d,\s]*\]", text)
    if not lists:
        return None
    try:
        return {int(i) for i in parse_json(lists[-1])}
    except (InputError, TypeError, ValueError):
        return None
