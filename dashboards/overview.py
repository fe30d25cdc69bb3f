"""The overview: a summary of the run, accuracy and tokens by effort, the largest verified differences, and problems."""

from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
import panel as pn
import xarray as xr

from workbench import registry
from workbench.counting import count_of
from workbench.dashboards import content, python_code, theme, widgets
from workbench.dashboards.session import Page, Session
from workbench.dashboards.study_jobs import Answer
from workbench.errors import InputError
from workbench.figures import effort as draw_effort
from workbench.harmony.flags import SEQUENCE_FLAGS
from workbench.runs import Run
from workbench.studies import quick_look
from workbench.studies.comparison import in_order
from workbench.studies.highlights import Highlight, accuracy_sentences, highlights, untested
from workbench.studies.quick_look import ALL

_STUDIES = ("channels", "effort")  # whose comparisons are paired within prompts
_COLUMNS = {"experts": "expert", "sink": "head"}  # of a cell, by the page that shows it in detail


def overview(session: Session) -> Page:
    """Return the page that answers first: the run in one sentence, its numbers, differences and problems."""
    run, name = session.run, session.name
    head = widgets.html(_head(run))

    def refresh() -> None:
        try:
            head.object = _head(session.run)
        except InputError as error:
            head.object = theme.note(str(error), "danger")

    if run.status != "complete":
        widgets.when_shown(lambda: pn.state.add_periodic_callback(refresh, period=2000))

    def accuracy() -> Any:
        rows = content.accuracy_by_effort(run)
        known = set(run.sequences["task"])
        links = [session.link("transcript", task=task) if task in known else "" for task in rows["task"]]
        return widgets.table("Accuracy by effort", rows, f"{name}-accuracy", {"task": links})

    def tokens() -> Any:
        return widgets.table("Tokens by channel and effort", quick_look.tokens(run).reset_index(), f"{name}-tokens")

    def roles() -> Any:
        return widgets.table("Content tokens by role and channel", content.tokens_by_role(run), f"{name}-roles")

    return Page(
        [],
        [
            head,
            widgets.card(
                "Largest verified differences",
                _differences(session),
                note="Relative to the mean of the quantity in the layer",
            ),
            widgets.card("Problems", widgets.html(problems(run))),
            widgets.beside(*_curve(session), widgets.guarded(accuracy)),
            widgets.beside(widgets.guarded(tokens), widgets.later(roles)),
            widgets.card("Provenance", widgets.html(content.provenance(run)), collapsed=True),
        ],
    )


def _head(run: Run) -> str:
    """Return the sentence about the run and its numbers as tiles."""
    tiles = "".join(theme.tile(value, label) for label, value in numbers(run).items())
    progress = "" if run.status == "complete" else content.progress(run)
    return f"<p class='wb-lead'>{escape(sentence(run))}</p><div class='wb-tiles'>{tiles}</div>{progress}"


def sentence(run: Run) -> str:
    """Return one sentence that states what the run is."""
    table, model = run.sequences, run.model
    efforts = in_order([effort for effort in table["effort"].unique() if effort])
    prompts = table["prompt_id"].replace("", pd.NA).nunique() or len(table)
    experts = content.number_of_experts(model)
    size = f"{model['n_layers']} layers, {experts} experts, {model['experts_per_token']} per token"
    at = f" at {', '.join(efforts)} effort" if efforts else ""
    quantities = ", ".join(run.recorded)
    return (
        f"{count_of(len(table), 'conversation')} of {count_of(prompts, 'prompt')}{at}, recorded with "
        f"{run.checkpoint['name']} ({size}): "
        f"{quantities}."
    )


def numbers(run: Run) -> dict[str, str]:
    """Return the numbers that a reader looks for first, by label."""
    table = run.sequences
    tiles = {"tokens": f"{int(table['length'].sum()):,}"}
    graded = table[table["correct"] >= 0]
    efforts = in_order([effort for effort in graded["effort"].unique() if effort])
    ends = list(dict.fromkeys([*efforts[:1], *efforts[-1:]]))
    if ends:
        shares = [f"{100 * graded.loc[graded['effort'] == effort, 'correct'].mean():.1f} %" for effort in ends]
        tiles[f"accuracy, {' → '.join(ends)} effort"] = " → ".join(shares)
    efforts = in_order([effort for effort in table["effort"].unique() if effort])
    ends = list(dict.fromkeys([*efforts[:1], *efforts[-1:]]))
    if ends:
        new = table["length"] - table["n_prompt"]
        means = [f"{new[table['effort'] == effort].mean():,.0f}" for effort in ends]
        tiles[f"new tokens per answer, {' → '.join(ends)} effort"] = " → ".join(means)
    return tiles


def problems(run: Run) -> str:
    """Return HTML that lists what a reader should know before using the numbers."""
    table, lines = run.sequences, list[tuple[str, str]]()
    done, total = run.progress
    if done < total:
        lines.append((f"The run is in progress: {done} of {count_of(total, 'unit')} are recorded.", "warning"))
    if ungraded := int((table["correct"] < 0).sum()):
        lines.append(
            (
                f"{ungraded:,} of {count_of(len(table), 'conversation')} are not graded; accuracy does not "
                f"include them.",
                "",
            )
        )
    flags = pd.Series([flag for text in table.get("flags", ()) for flag in str(text).split()], dtype=str)
    for flag, count in flags.value_counts().items():
        description = SEQUENCE_FLAGS.get(str(flag), str(flag))
        lines.append(
            (
                f"{count:,} of {count_of(len(table), 'conversation')}: "
                f"{description}{_by_effort(table, str(flag))}. They can be excluded in the sidebar.",
                "warning",
            )
        )
    if run.exclusion:
        lines.append((f"Excluded: {run.exclusion}", "warning"))
    if not lines:
        return theme.note("No irregular, truncated or ungraded conversations; all units are complete.", "good")
    return "".join(theme.note(text, kind) for text, kind in lines)


def _by_effort(table: pd.DataFrame, flag: str) -> str:
    """Return how many conversations of each effort have a flag, as " (low 200, high 20)"; "" without efforts."""
    own = table[[flag in str(text).split() for text in table["flags"]]]
    counts = own["effort"].value_counts()
    efforts = in_order([effort for effort in counts.index if effort])
    return f" ({', '.join(f'{effort} {counts[effort]:,}' for effort in efforts)})" if efforts else ""


def _differences(session: Session) -> pn.Column:
    """Return the verified differences as sentences with links, when the studies are ready."""
    asks = {name: session.registry.study(name, session.name, exclude=session.exclude) for name in _STUDIES}
    known = {record.name for record in registry.studies(runs=1)}
    asks = {name: ask for name, ask in asks.items() if name in known}

    def ask() -> Answer:
        answers = {name: asked() for name, asked in asks.items()}
        waiting = [a.seconds for a in answers.values() if a.datasets is None and not a.reason]
        if waiting:
            return Answer(seconds=max(waiting))
        results = {f"{name}/{key}": ds for name, a in answers.items() for key, ds in (a.datasets or {}).items()}
        if results:
            return Answer(results)
        reasons = [f"Skipped: {a.reason.removeprefix('Skipped: ')}" for a in answers.values() if a.reason]
        return Answer(reason=" ".join(reasons))

    def show(datasets: Mapping[str, xr.Dataset]) -> list[Any]:
        results: dict[str, dict[str, xr.Dataset]] = {}
        for key, ds in datasets.items():
            study, _, name = key.partition("/")
            results.setdefault(study, {})[name] = ds
        return [widgets.html(answers(session, results)), *_difference_map(session, results)]

    return widgets.awaited(ask, show)


def _difference_map(session: Session, results: Mapping[str, Mapping[str, xr.Dataset]]) -> list[Any]:
    """Return the map of the tested differences of expert load between analysis and final, if it was made."""
    ds = results.get("channels", {}).get("routing_analysis_vs_final")
    gallery = registry.find("channels").load_figures().gallery(results["channels"]) if ds is not None else {}
    item = gallery.get("routing_analysis_vs_final_matched")
    if item is None:
        return []
    name = f"{session.name}-routing_analysis_vs_final_matched"
    record, figure = registry.find("channels"), "routing_analysis_vs_final_matched"
    code = python_code.study_figure(record, [session.run], figure, session.exclude, session.theme)
    return [widgets.deferred(lambda: widgets.figure(item.draw(theme=session.theme), name, item.table, python=code))]


def answers(session: Session, results: Mapping[str, Mapping[str, xr.Dataset]], most: int = 3) -> str:
    """Return HTML: the gain of accuracy, the largest verified differences with links, and what was not tested."""
    items = [
        f"<li>{escape(text)} <a href='{escape(session.link('effort'))}'>Effort</a></li>"
        for text in accuracy_sentences(results)
    ]
    for highlight in highlights(results, most):
        address, title = _shows(session, results, highlight)
        link = f"<a href='{escape(address)}'>{escape(title)}</a>"
        rest = highlight.sentence.removeprefix(title)
        text = link + escape(rest) if rest != highlight.sentence else f"{escape(highlight.sentence)} {link}"
        items.append(f"<li>{text}</li>")
    if not items:
        return theme.note("No difference was verified: every interval includes zero, or nothing could be paired.")
    text = f"<ul class='wb-answers'>{''.join(items)}</ul>"
    text += (
        "<p class='wb-muted'>The strongest difference of each comparison, ordered by the limit of its interval that is "
        "nearest to zero, divided by the mean of the quantity in the layer: few points are a strong difference where "
        "the quantity is small. Being chosen for their size, differences are probably larger here than in new data. "
        "Paired within prompts; square brackets: 95 % intervals. A difference is verified if it also holds at equal "
        "position, where that could be tested.</p>"
    )
    return text + content.not_tested(untested(results))


def _shows(session: Session, results: Mapping[str, Mapping[str, xr.Dataset]], highlight: Highlight) -> tuple[str, str]:
    """Return the address and the title of the page that shows a difference."""
    what = str(results[highlight.study][highlight.dataset].attrs["what"])
    page = {"experts": "experts", "sink": "sinks"}.get(what)
    if page is not None and _COLUMNS[what] in highlight.cell:
        cell = {name: str(number) for name, number in highlight.cell.items()}
        return session.link(page, **cell), f"Layer {cell['layer']}, {_COLUMNS[what]} {cell[_COLUMNS[what]]}"
    record = registry.find(highlight.study)
    return session.link(getattr(record, "page", "") or record.name), record.title


def _curve(session: Session) -> list[Any]:
    """Return the figure of accuracy against tokens, if the run has several efforts."""
    if len(session.registry.efforts(session.name, session.exclude)) < 2:
        return []

    def show(costs: Mapping[str, xr.Dataset]) -> list[Any]:
        drawn = draw_effort.accuracy_by_tokens(costs["cost"], theme=session.theme)
        rows = costs["cost"].to_dataframe().reset_index()
        code = python_code.accuracy_figure(session.run, ALL, session.exclude, session.theme)
        return [widgets.figure(drawn, f"{session.name}-accuracy_by_tokens", lambda: rows, python=code)]

    return [widgets.later(lambda: widgets.awaited(session.registry.ask_costs(session.name, session.exclude), show))]
