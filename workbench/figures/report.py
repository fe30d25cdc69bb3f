"""The report: results, figures and methods of all studies of a run in one self-contained HTML page."""

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
import xarray as xr
from plotly.offline import get_plotlyjs

from workbench.errors import InputError
from workbench.figures.export import PAGE_CONFIG
from workbench.figures.gallery import Gallery
from workbench.harmony.flags import counted_in
from workbench.outputs import MARKER, check_files, write_files
from workbench.registry import find, studies
from workbench.studies import run_study
from workbench.studies.comparison import Run
from workbench.studies.error_rate import statement

_SHOWN = 6  # figures of a study; all are written by `workbench figures`
_FIRST = ("accuracy_by_tokens", "entropy_by_layer", "divergence_", "sizes", "routing_sizes", "sinks_sizes", "geometry")
_LAST = ("load_frame", "load_prompt", "mass_frame", "mass_prompt")
_STYLE = """
body{font:16px/1.55 Inter,Helvetica,Arial,sans-serif;max-width:980px;margin:2rem auto;padding:0 1rem;
color:#1f2430;background:#fff}
h1{font-size:1.7rem}h2{margin-top:2.6rem;border-bottom:1px solid #d4d7dc;padding-bottom:.2rem}
h3{font-size:1.02rem;margin:1.4rem 0 .2rem}
pre{white-space:pre-wrap;font:inherit;margin:.2rem 0 .8rem}table{border-collapse:collapse;font-size:.92rem}
td,th{border-bottom:1px solid #e3e7ec;padding:.25rem .7rem;text-align:left;vertical-align:top}
.note{color:#5b6472;font-size:.92rem}nav a{margin-right:1rem}figure{margin:1.2rem 0;overflow-x:auto}
"""


def write_report(
    run: Run,
    out: str | os.PathLike[str],
    *,
    results: Mapping[str, Mapping[str, xr.Dataset]] | None = None,
    seed: int = 0,
    inputs: Iterable[str | Path] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write the report as HTML and, beside it, as Markdown; results: of experiments, to include (see `load`).

    inputs: paths that the report is made of, beside the run's. overwrite: replace an earlier report.

    Raises:
        InputError: the output is no .html file or exists, or no study can be made of the run.
    """
    target = Path(out)
    if target.suffix != ".html" or target.name == ".html":
        raise InputError(f"{out}: a report is an .html file, its Markdown is written beside it")
    if path := getattr(run, "path", None):
        inputs = [*inputs, path]
    names = [target.name, target.with_suffix(".md").name]
    marker = f".{target.name}{MARKER}"
    check_files(names, target.parent, command="report", inputs=inputs, overwrite=overwrite, marker=marker)
    told: dict[str, Mapping[str, xr.Dataset]] = {}
    left_out = []
    for study in studies(runs=1):
        try:
            told[study.name] = run_study(study.name, run, seed=seed)
        except InputError as error:
            left_out.append(f"{study.title}: {error}.")
    given = {find(name).name: sets for name, sets in (results or {}).items()}
    told |= {name: sets for name, sets in given.items() if name not in told}
    if not told:
        raise InputError(" ".join(left_out))
    page, text = _html(run, told, left_out), _markdown(run, told, left_out)
    files = dict(zip(names, (page, text), strict=True))
    return write_files(files, target.parent, command="report", inputs=inputs, overwrite=overwrite, marker=marker)


def _figures(name: str, sets: Mapping[str, xr.Dataset]) -> list[tuple[str, go.Figure]]:
    """The most telling figures of a study."""
    figures: Gallery = find(name).load_figures().gallery(sets)

    def rank(label: str) -> tuple[int, int]:
        first = next((i for i, start in enumerate(_FIRST) if label.startswith(start)), len(_FIRST))
        return (
            len(_FIRST) + 1 if label.startswith(_LAST) or label.endswith("naive") else first,
            list(figures).index(label),
        )

    return [(label, figures[label].draw()) for label in sorted(figures, key=rank)[:_SHOWN]]


def _about(run: Run) -> list[tuple[str, str]]:
    rows = [("run", str(getattr(run, "path", run.digest))), ("digest", run.digest)]
    provenance = getattr(run, "provenance", {})
    if provenance:
        rows += [
            (
                "captured",
                f"{provenance.get('started', '')} on {provenance.get('host', '')}, {provenance.get('dtype', '')}",
            ),
            ("checkpoint", f"{run.checkpoint.get('name', '')} ({str(run.checkpoint['digest'])[:16]})"),  # type: ignore[attr-defined]
            ("transcripts", str(provenance.get("transcripts", {}).get("name", ""))),
        ]
        done, total = run.progress  # type: ignore[attr-defined]
        rows.append(("units", f"{done} of {total}" + ("" if done == total else ": this run is not finished")))
        rows.append(("sequences", f"{len(run.sequences):,}"))  # type: ignore[attr-defined]
        if found := counted_in(run.sequences):  # type: ignore[attr-defined]
            rows.append(("flags", found))
        if run.exclusion:  # type: ignore[attr-defined]
            rows.append(("excluded", run.exclusion))  # type: ignore[attr-defined]
    return rows


def _notes(sets: Mapping[str, xr.Dataset]) -> list[tuple[str, str]]:
    notes = []
    for heading, attribute in (("Method", "method"), ("Not controlled", "not_controlled")):
        notes += [
            (heading, text)
            for text in dict.fromkeys(str(ds.attrs[attribute]) for ds in sets.values() if ds.attrs.get(attribute))
        ]
    return notes


def _html(run: Run, told: Mapping[str, Mapping[str, xr.Dataset]], left_out: Sequence[str]) -> str:
    safe = html.escape
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Report on {safe(run.digest)}</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script>",
        "<h1>Report on this run</h1><table>",
        *(f"<tr><th>{safe(k)}</th><td>{safe(v)}</td></tr>" for k, v in _about(run)),
        "</table><nav>",
        *(f'<a href="#{safe(name)}">{safe(find(name).title)}</a>' for name in told),
        "</nav><p class='note'>Nothing is called different whose interval includes zero; differences come first "
        "without, then with the control of position. Association is not causation: what an expert is used for and what "
        f"it is needed for are told apart by the experiments.</p><p class='note'>{safe(statement(told))}</p>",
    ]
    for name, sets in told.items():
        parts.append(f'<h2 id="{safe(name)}">{safe(find(name).title)}</h2>')
        for ds in sets.values():
            parts.append(f"<h3>{safe(ds.attrs['title'])}</h3><pre>{safe(ds.attrs['summary'])}</pre>")
        for label, figure in _figures(name, sets):
            drawn = figure.to_html(
                full_html=False, include_plotlyjs=False, div_id=f"{name}_{label}", config=PAGE_CONFIG
            )
            parts.append(f"<figure>{drawn}</figure>")
        parts += [f"<p class='note'><b>{safe(k)}.</b> {safe(v)}</p>" for k, v in _notes(sets)]
    if left_out:
        parts.append("<h2>Skipped</h2>" + "".join(f"<p>{safe(text)}</p>" for text in left_out))
    first = next(iter(next(iter(told.values())).values())).attrs
    parts.append(f"<p class='note'>workbench {safe(str(first['workbench_version']))}, seed {first['seed']}.</p></html>")
    return "\n".join(parts)


def _markdown(run: Run, told: Mapping[str, Mapping[str, xr.Dataset]], left_out: Sequence[str]) -> str:
    lines = ["# Report on this run", "", *(f"- {k}: {v}" for k, v in _about(run)), "", statement(told), ""]
    for name, sets in told.items():
        lines += [f"## {find(name).title}", ""]
        for ds in sets.values():
            lines += [f"### {ds.attrs['title']}", "", "```", str(ds.attrs["summary"]), "```", ""]
        lines += [text for k, v in _notes(sets) for text in (f"*{k}.* {v}", "")]
    if left_out:
        lines += ["## Skipped", "", *left_out, ""]
    return "\n".join(lines)
