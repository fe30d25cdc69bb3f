"""Answers and comparisons as HTML. All text of a model or a viewer is escaped."""

from collections.abc import Sequence
from html import escape

import numpy as np

from workbench import harmony
from workbench.counting import count_of, signed
from workbench.dashboards.search import texts
from workbench.figures.template import THEMES, ThemeName
from workbench.live.experiment import Answer, Comparison, Experiment, SampleSummary, summarize
from workbench.studies.intervals import MIN_PROMPTS, wilson

_STRONG = 2.0  # nats at which the colour of a change is full
_MOST_COLOUR = (
    45  # percent of colour in the background of text, which stays readable in both themes (contrast above 4.5)
)
# what the colours of both answers mean, in the same colours
_LEGEND = (
    "<p class='wb-muted'>In the answers, the colour of a token is the change of its log-probability: "
    + ", ".join(
        f"<span class='lv-key' style='background:color-mix(in srgb,var(--wb-{colour}) {_MOST_COLOUR}%,transparent)'>"
        f"{text} probable</span>"
        for colour, text in (("accent", "more"), ("bad", "less"))
    )
    + f" with the interventions, full at {_STRONG:g} nats. "
    + "<span class='lv-key lv-first'>Framed</span>: the first token that differs.</p>"
)
ANSWER_CSS = """
.lv-key{border-radius:2px;padding:0 4px;color:var(--wb-ink)}
.lv-message{border-left:4px solid var(--lv-channel);background:color-mix(in srgb,var(--lv-channel) 9%,transparent);
border-radius:4px;padding:4px 10px;margin:0 0 8px}
.lv-head{font-size:var(--wb-small);color:var(--wb-muted);font-weight:600}
.lv-text{white-space:pre-wrap;overflow-wrap:anywhere;
font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}
.lv-text span{border-radius:2px}
.lv-given{color:var(--wb-muted)}
.lv-first{outline:2px solid var(--wb-bad);outline-offset:1px}
.lv-bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:4px 10px;align-items:center}
.lv-bars + .wb-table{margin-top:18px}
.lv-bar{height:12px;background:var(--wb-raised);border-radius:3px;overflow:hidden}
.lv-bar i{display:block;height:100%;background:var(--wb-accent)}
"""


def answer_html(
    experiment: Experiment,
    answer: Answer,
    theme: ThemeName,
    *,
    change: Sequence[float] = (),
    first_difference: int | None = None,
) -> str:
    """Return the first sample of an answer, a block for each message in the colour of its channel.

    What the answer began with, which the recipe gives, comes first and is grey.

    change: of every new token, what the interventions do to its log-probability; its colour shows it.
    """
    new, begin = list(answer.tokens), len(experiment.prompt)
    given = begin - experiment.n_begin
    if not new and given == begin:
        return '<p class="wb-muted">No token yet.</p>'
    tokenizer = experiment.model.tokenizer
    ids = [*experiment.prompt, *new]
    labels = harmony.label(ids, tokenizer=tokenizer, n_prompt=begin)
    words = texts(ids[given:], tokenizer)
    blocks = []
    for message in labels.messages:
        if message.end <= given or message.content < 0:
            continue
        start, stop = max(message.text_span.start, given), message.text_span.stop
        pieces = [
            _token(words[i - given], i - begin, list(answer.logprobs), change, first_difference)
            for i in range(start, max(stop, start))
        ]
        colour = THEMES[theme].channel.get(message.channel, THEMES[theme].channel["other"])
        head = " · ".join(
            filter(None, (message.role, message.channel, message.recipient and f"to {message.recipient}"))
        )
        blocks.append(
            f'<div class="lv-message" style="--lv-channel:{escape(colour)}"><div class="lv-head">{escape(head)}</div>'
            f'<div class="lv-text">{"".join(pieces)}</div></div>'
        )
    return "".join(blocks) or '<p class="wb-muted">The model writes the header of the first message.</p>'


def _token(
    text: str, number: int, logprobs: Sequence[float], change: Sequence[float], first_difference: int | None
) -> str:
    """Return one token with its numbers as a title, coloured by its change and framed if it is the first to differ.

    A token with a number below 0 was given, not generated.
    """
    if number < 0:
        return f'<span class="lv-given" title="given, not generated">{escape(text)}</span>'
    title = f"token {number}"
    if number < len(logprobs):
        title += f", log-probability {logprobs[number]:.3f}"
    style = ""
    if number < len(change):
        title += f", change {signed(change[number], 3)} nats"
        strength = round(_MOST_COLOUR * min(abs(change[number]) / _STRONG, 1))
        colour = "accent" if change[number] > 0 else "bad"
        if strength:
            style = f' style="background:color-mix(in srgb,var(--wb-{colour}) {strength}%,transparent)"'
    mark = ' class="lv-first"' if number == first_difference else ""
    return f'<span title="{escape(title)}"{mark}{style}>{escape(text)}</span>'


def speed_html(answer: Answer) -> str:
    """Return the length of an answer, how fast it was generated, and how much of the prompt was reused."""
    shared = f", {count_of(answer.shared_tokens, 'prompt token')} reused" if answer.shared_tokens else ""
    return (
        f'<div class="wb-muted">{count_of(answer.speed.tokens, "new token")}, {escape(str(answer.speed))}{shared}</div>'
    )


def cut_off_sentence(experiment: Experiment) -> str:
    """Return a sentence about answers without a token that ends them; empty if there are none."""
    cut = {
        name: experiment.n_cut_off(answer)
        for name, answer in (("original", experiment.original), ("edited", experiment.edited))
        if answer is not None
    }
    names = " and ".join(name for name, count in cut.items() if count)
    if not names:
        return ""
    if experiment.recipe.samples > 1:
        return (
            f"{sum(cut.values())} of {count_of(len(cut) * experiment.recipe.samples, 'answer')} were cut off ({names})."
        )
    length = len((experiment.original if cut["original"] else experiment.edited or experiment.original).tokens)
    plural = "answers were" if " and " in names else "answer was"
    return f"The {names} {plural} cut off after {length:,} new tokens."


def history_html(history: Sequence[tuple[str, str]]) -> str:
    """Return the earlier turns of a conversation."""
    turns = [
        f'<div class="lv-head">user</div><div class="lv-text">{escape(asked)}</div>'
        f'<div class="lv-head">assistant · final</div><div class="lv-text">{escape(answered)}</div>'
        for asked, answered in history
    ]
    return "".join(f'<div class="lv-message" style="--lv-channel:var(--wb-line)">{turn}</div>' for turn in turns)


def comparison_html(experiment: Experiment, comparison: Comparison) -> str:
    """Return the comparison: the first token that differs, log-probabilities, and exchanged experts by layer."""
    at = comparison.first_difference
    first = "Both answers are equal." if at is None else f"The answers differ from new token {at} on."
    total, n_tokens = sum(comparison.original_change), len(comparison.original_change)
    sentences = [
        first,
        f"The interventions change the log-probability of the original answer by {signed(total, 2)} nats "
        f"({signed(total / max(n_tokens, 1), 3)} per token).",
    ]
    bars = "".join(
        f'<span>layer {layer}</span><span class="lv-bar"><i style="width:{share:.1%}"></i></span>'
        f"<span>{share:.1%}</span>"
        for layer, share in enumerate(comparison.routing_change)
    )
    unmatched = "".join(
        f'<div class="wb-note warning">No token is in the scope of: '
        f"{escape(experiment.recipe.interventions[number].describe())}</div>"
        for number in experiment.unmatched
    )
    listed = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences) + _LEGEND
    heading = (
        "<h3>Exchanged experts by layer</h3><p class='wb-muted'>Share of the selected experts that the interventions "
        "replace while the model reads the original answer</p>"
    )
    return f'{unmatched}{listed}{heading}<div class="lv-bars">{bars}</div>'


def difference_html(experiment: Experiment) -> str:
    """Return the comparison and, of several samples or with a known answer, the summary of both sides; "" for none."""
    text = comparison_html(experiment, experiment.comparison) if experiment.comparison else ""
    n = experiment.recipe.samples
    sides = {"original": experiment.original} | ({"edited": experiment.edited} if experiment.edited else {})
    if (n > 1 or experiment.recipe.expected) and all(all(side.finished) for side in sides.values()):
        text += samples_html({name: summarize(experiment, side) for name, side in sides.items()}, n)
    return text


def _share(right: int, n: int) -> str:
    """Return how many of n samples are right, from five on with the 95 % interval over samples of this prompt."""
    if n < MIN_PROMPTS:  # too few for an interval
        return f"{right} of {n}"
    _, low, high = wilson(np.arange(n) < right, n)
    return f"{right} of {n} ({low:.0%} to {high:.0%})"


def samples_html(summaries: dict[str, SampleSummary], n: int) -> str:
    """Return a table of the final answers of all samples, for each side."""
    answers = list(dict.fromkeys(text for summary in summaries.values() for text, _ in summary.answers))
    heads = "".join(f"<th>{escape(name)}</th>" for name in summaries)
    counts = {name: dict(summary.answers) for name, summary in summaries.items()}

    def row(title: str, values: Sequence[str]) -> str:
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        return f"<tr><td>{escape(title)}</td>{cells}</tr>"

    rows = [row(repr(text), [str(counts[name].get(text, 0)) for name in summaries]) for text in answers[:20]]
    if any(summary.correct is not None for summary in summaries.values()):
        rows.append(row("correct", [_share(summary.correct or 0, n) for summary in summaries.values()]))
    rows.append(row("not complete", [str(n - summary.complete) for summary in summaries.values()]))
    rows.append(row("mean new tokens", [f"{summary.mean_tokens:.1f}" for summary in summaries.values()]))
    return f'<div class="wb-table"><table><tr><th>Final answer</th>{heads}</tr>{"".join(rows)}</table></div>'
