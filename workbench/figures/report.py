"""The report: the answers of all studies of a run first, then their figures, tables and methods, in one HTML page."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from workbench.bounded_json import parse_json
from workbench.counting import count_of
from workbench.errors import InputError
from workbench.figures import page
from workbench.figures.gallery import Gallery
from workbench.harmony.flags import counted_in
from workbench.outputs import MARKER, check_files, write_files
from workbench.registry import find, studies
from workbench.studies import run_study
from workbench.studies.comparison import Run
from workbench.studies.error_rate import statement
from workbench.studies.highlights import Highlight, Results, accuracy_sentences, highlights, is_comparison, untested

_FIGURES = 6  # of a study; `workbench figures` writes all of them
_COMPARISONS = 8  # rows of a study's table that are shown before it is unfolded
_SENTENCES = 3  # lines of a summary that are shown before it is unfolded
_FIRST = ("accuracy_by_tokens", "entropy_by_layer", "divergence_", "sizes", "routing_sizes", "sinks_sizes", "geometry")
_LAST = ("load_frame", "load_prompt", "mass_frame", "mass_prompt", "overrepresented_tokens")
_BARS = "Bars show the difference relative to the mean of the layer, with its 95 % interval; the line is zero."
_CHOSEN = (
    "These are the largest of many tested differences, relative to the mean of their layer, one of each comparison. "
    "Being chosen for their size, they are probably larger here than in new data. An association is not a cause: what "
    "an expert is needed for is measured by the experiments."
)


class Contents(NamedTuple):
    """What a report is made of: the run, the results by study and dataset, and why studies were skipped."""

    run: Run
    results: Results
    skipped: Sequence[str]


def write_report(
    run: Run,
    out: str | os.PathLike[str],
    *,
    results: Results | None = None,
    seed: int = 0,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write the report as HTML and, beside it, as Markdown; results: of experiments, to include (see `load`).

    inputs: paths that the report is made of, beside the run's. overwrite: replace an earlier report.

    Raises:
        InputError: the output is not an .html file or exists, or no study can be made of the run.
    """
    target = Path(out)
    if target.suffix != ".html" or target.name == ".html":
        raise InputError(f"{out}: expected a file that ends in .html; the Markdown is written beside it")
    if path := getattr(run, "path", None):
        inputs = [*inputs, path]
    names = [target.name, target.with_suffix(".md").name]
    marker = f".{target.name}{MARKER}"
    check_files(names, target.parent, command="report", inputs=inputs, overwrite=overwrite, marker=marker)
    contents = gather(run, results=results, seed=seed)
    files = dict(zip(names, (html(contents), markdown(contents)), strict=True))
    return write_files(files, target.parent, command="report", inputs=inputs, overwrite=overwrite, marker=marker)


def gather(run: Run, *, results: Results | None = None, seed: int = 0) -> Contents:
    """Return the results of all studies of a run, and those that are given, of experiments or of another record.

    Raises:
        InputError: no study can be made of the run.
    """
    made: dict[str, Mapping[str, xr.Dataset]] = {}
    skipped = []
    given = {find(name).name: sets for name, sets in (results or {}).items()}
    for study in studies(runs=1):
        try:
            made[study.name] = run_study(study.name, run, seed=seed)
        except InputError as error:
            if study.name not in given:
                skipped.append(f"{study.title}: {error}.")
    made |= {name: sets for name, sets in given.items() if name not in made}
    if not made:
        raise InputError(" ".join(skipped))
    return Contents(run, made, skipped)


def html(contents: Contents) -> str:
    """Return the report as one HTML page that fetches nothing."""
    title = f"Report on run {contents.run.digest[:16]}"
    return page.document(title, [f"<h1>{escape(title)}</h1>", *body(contents)])


def body(contents: Contents) -> Iterator[str]:
    """Yield the HTML of the report below its title: answers, a section for each study, and where it comes from."""
    yield f"<p>{escape('. '.join(_facts(contents.run)))}.</p>{links_to_sections(contents)}"
    yield from answers(contents)
    for name, sets in contents.results.items():
        yield from section(name, sets)
    yield _origin(contents)


def links_to_sections(contents: Contents) -> str:
    """Return the HTML of links to the sections of all studies on the same page."""
    links = "".join(f'<a href="#{escape(n)}">{escape(find(n).title)}</a>' for n in contents.results)
    return f'<nav aria-label="sections">{links}</nav>'


def overview(contents: Contents, *, findings: str) -> Iterator[str]:
    """Yield the HTML of a page of answers. findings: address of the page with a section for each study."""
    yield f"<h1>Run {escape(contents.run.digest[:16])}</h1><p>{escape('. '.join(_facts(contents.run)))}.</p>"
    yield from answers(contents, findings)
    yield _origin(contents, published=True)


def _origin(contents: Contents, *, published: bool = False) -> str:
    """Return where the numbers come from; a published page does not name the folder and the machine."""
    rows = [(k, v) for k, v in _provenance(contents) if not (published and k in ("run", "captured"))]
    table = page.table(("", ""), rows)
    return f"<h2>Provenance</h2>{page.folded('Run, checkpoint and software', table)}"


def answers(contents: Contents, findings: str = "") -> Iterator[str]:
    """Yield the HTML of the answers: accuracy, the largest verified differences, and what could not be tested.

    findings: address of the page with the sections of studies, if it is another one.
    """
    yield "<h2>Answers</h2>"
    for sets in contents.results.values():
        if {"gain", "cost"} <= set(sets):
            yield _accuracy_table(sets["cost"])
    yield "".join(f"<p>{escape(text)}</p>" for text in accuracy_sentences(contents.results))
    effects = highlights(contents.results)
    yield "<h3>Largest verified differences</h3>"
    if effects:
        widest = 1.1 * max(max(abs(h.low), abs(h.high)) / h.level for h in effects)
        items = "".join(f"<li>{_highlight(h, widest, findings)}</li>" for h in effects)
        yield f'<ul class="highlights">{items}</ul><p class="note">{escape(_BARS)} {escape(_CHOSEN)}</p>'
    else:
        yield "<p>No difference is shown within prompts and at equal position.</p>"
    yield f'<p class="note">{escape(statement(contents.results))}</p>'
    if problems := _problems(contents.run):
        yield f"<h3>Irregular or excluded data</h3>{page.table(('', ''), problems)}"
    if missing := [*untested(contents.results), *contents.skipped]:
        yield page.folded(f"Not tested ({len(missing)})", page.paragraphs("\n".join(missing)))


def _highlight(h: Highlight, widest: float, findings: str) -> str:
    source = f'<a href="{escape(findings)}#{escape(h.study)}">{escape(find(h.study).title)}</a>'
    bar = page.bar(h.difference / h.level, h.low / h.level, h.high / h.level, widest)
    return f"{bar}<span>{escape(h.sentence)} {source}</span>"


def section(name: str, sets: Mapping[str, xr.Dataset]) -> Iterator[str]:
    """Yield the HTML of a study: its question, its first figure, a table of comparisons, and the rest folded."""
    record = find(name)
    yield f'<h2 id="{escape(name)}">{escape(record.title)}</h2><p class="question">{escape(record.question)}</p>'
    first, *others = _figures(name, sets) or [""]
    yield first
    yield _comparison_table(sets)
    described = [_described(ds) for ds in sets.values() if not is_comparison(ds)]
    yield from described[:1]
    if len(described) > 1:
        yield page.folded(f"{len(described) - 1} more result{'s' * (len(described) > 2)}", *described[1:])
    if compared := [ds for ds in sets.values() if is_comparison(ds)]:
        full = "".join(f"<h3>{escape(d.attrs['title'])}</h3><pre>{escape(d.attrs['summary'])}</pre>" for d in compared)
        yield page.folded("Comparisons in full", full)
    if others:
        yield page.folded(f"{len(others)} more figure{'s' * (len(others) != 1)}", *others)
    notes = "".join(f"<p><b>{escape(k)}.</b> {escape(v)}</p>" for k, v in _notes(sets))
    yield page.folded("Methods", notes)


def _described(ds: xr.Dataset) -> str:
    """Return the title of a dataset and the first lines of its summary, the others folded."""
    lines = str(ds.attrs["summary"]).splitlines()
    text = f"<h3>{escape(ds.attrs['title'])}</h3>{page.paragraphs(chr(10).join(lines[:_SENTENCES]), 'line')}"
    more = len(lines) - _SENTENCES
    rest = page.paragraphs("\n".join(lines[_SENTENCES:]))
    return text + (page.folded(f"{count_of(more, 'more line')}", rest) if more > 0 else "")


def _accuracy_table(cost: xr.Dataset) -> str:
    """Return accuracy and analysis tokens of each effort over all tasks, with intervals."""
    header = ("effort", "accuracy (%)", "analysis tokens per answer", "sequences")
    rows = []
    for effort in map(str, cost["effort"].values):
        one = cost.sel(task="all", effort=effort)
        accuracy, tokens = _interval(one, "accuracy", 100), _interval(one, "analysis_tokens", 1)
        rows.append((effort, accuracy, tokens, f"{int(one['sequences']):,}"))
    return page.table(header, rows, numbers=header[1:])


def _interval(one: xr.Dataset, name: str, factor: float) -> str:
    value, low, high = (factor * float(one[n]) for n in (name, f"{name}_low", f"{name}_high"))
    if not np.isfinite(value):
        return "not graded"
    return f"{value:,.1f} [{low:,.1f}, {high:,.1f}]" if np.isfinite(low) else f"{value:,.1f}"


def _comparison_table(sets: Mapping[str, xr.Dataset]) -> str:
    """Return a row for each comparison: how many cells differ within prompts and at equal position."""
    header = ("comparison", "prompts", "cells that differ", "at equal position")
    rows = []
    for ds in sets.values():
        if is_comparison(ds) and "none" in ds["control"].values:
            plain = ds.sel(control="none")
            matched = ds.sel(control="position") if "position" in ds["control"].values else None
            cells = [_differing(plain), "–" if matched is None else _differing(matched)]
            rows.append((ds.attrs["title"], int(plain["prompts"]), *cells))
    if not rows:
        return ""
    shown, rest = (page.table(header, part, numbers=header[1:]) for part in (rows[:_COMPARISONS], rows[_COMPARISONS:]))
    more = len(rows) - _COMPARISONS
    return shown + (page.folded(f"{count_of(more, 'more comparison')}", rest) if more > 0 else "")


def _differing(one: xr.Dataset) -> str:
    tested = int(np.isfinite(one["low"].values).sum())
    return f"{int(one['different'].values.sum())} of {tested}" if tested else "cannot be tested"


def _figures(name: str, sets: Mapping[str, xr.Dataset]) -> list[str]:
    """Return the most important figures of a study as HTML."""
    figures: Gallery = find(name).load_figures().gallery(sets)

    def rank(label: str) -> tuple[int, int]:
        first = next((i for i, start in enumerate(_FIRST) if label.startswith(start)), len(_FIRST))
        last = label.startswith(_LAST) or label.endswith("naive")
        return (len(_FIRST) + 1 if last else first, list(figures).index(label))

    chosen = sorted(figures, key=rank)[:_FIGURES]
    return [page.figure(f"{name}_{label}", figures[label].draw) for label in chosen]


def _facts(run: Run) -> list[str]:
    """Return what the run is, in short sentences."""
    facts = []
    if provenance := getattr(run, "provenance", {}):
        transcripts = provenance.get("transcripts", {}).get("name", "transcripts")
        facts.append(f"{run.checkpoint.get('name', 'A model')} on {transcripts}")  # type: ignore[attr-defined]
    table = run.sequences  # type: ignore[attr-defined]
    return [*facts, f"{count_of(len(table), 'sequence')}, {count_of(int(table['length'].sum()), 'token')}"]


def _problems(run: Run) -> list[tuple[str, str]]:
    """Return what a reader should know before the numbers: unfinished units, flags and exclusions."""
    rows = []
    done, total = getattr(run, "progress", (0, 0))
    if done != total:
        rows.append(("Not finished", f"{done} of {count_of(total, 'unit')} are captured"))
    if flags := counted_in(run.sequences):  # type: ignore[attr-defined]
        rows.append(("Flags", flags))
    if exclusion := getattr(run, "exclusion", ""):
        rows.append(("Excluded", exclusion))
    return rows


def _provenance(contents: Contents) -> Iterator[tuple[str, str]]:
    run = contents.run
    yield "run", str(getattr(run, "path", run.digest))
    yield "digest", run.digest
    if provenance := getattr(run, "provenance", {}):
        started, host, dtype = (provenance.get(n, "") for n in ("started", "host", "dtype"))
        yield "captured", f"{started} on {host}, {dtype}"
        checkpoint = run.checkpoint  # type: ignore[attr-defined]
        yield "checkpoint", f"{checkpoint.get('name', '')} ({str(checkpoint['digest'])[:16]})"
        yield "transcripts", str(provenance.get("transcripts", {}).get("name", ""))
        done, total = run.progress  # type: ignore[attr-defined]
        yield "units", f"{done} of {total}"
    first = next(iter(next(iter(contents.results.values())).values())).attrs
    yield "workbench", f"{first['workbench_version']}, seed {first['seed']}"


def _notes(sets: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, str]]:
    for heading, attribute in (("Method", "method"), ("Not controlled", "not_controlled"), ("Command", "command")):
        texts = dict.fromkeys(str(ds.attrs[attribute]) for ds in sets.values() if ds.attrs.get(attribute))
        yield from ((heading, text) for text in texts)
    if sample := parse_json(next((ds.attrs["sample"] for ds in sets.values() if ds.attrs.get("sample")), "{}")):
        groups = ", ".join(f"{name.replace(', ', ' at ')} {n}" for name, n in sample.items())
        yield "Sample", f"{count_of(sum(sample.values()), 'sequence')}: {groups}."


def markdown(contents: Contents) -> str:
    """Return the report as Markdown, without figures; texts of the run are escaped, as Markdown may hold HTML."""
    lines = [f"# Report on run {contents.run.digest[:16]}", "", f"{_text('. '.join(_facts(contents.run)))}.", ""]
    lines += ["## Answers", ""]
    lines += [f"- {_text(text)}" for text in accuracy_sentences(contents.results)]
    lines += [f"- {_text(h.sentence)}" for h in highlights(contents.results)]
    lines += ["", _CHOSEN, "", _text(statement(contents.results)), ""]
    lines += [f"- {name}: {_text(text)}" for name, text in _problems(contents.run)]
    lines += [f"- Not tested: {_text(text)}" for text in (*untested(contents.results), *contents.skipped)]
    for name, sets in contents.results.items():
        lines += ["", f"## {find(name).title}", "", find(name).question, ""]
        for ds in sets.values():
            summary = str(ds.attrs["summary"]).replace("```", "` ` `")  # it ends no block of code
            lines += [f"### {_text(ds.attrs['title'])}", "", "```", summary, "```", ""]
        lines += [text for k, v in _notes(sets) for text in (f"*{k}.* {_text(v)}", "")]
    lines += ["## Provenance", "", *(f"- {k}: {_text(v)}" for k, v in _provenance(contents)), ""]
    return "\n".join(lines)


def _text(value: str) -> str:
    return escape(" ".join(value.split()), quote=False)
