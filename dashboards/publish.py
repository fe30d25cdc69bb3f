"""A run as a folder of static pages, which open from the folder or from any static host, without a server.

Nothing in the folder refers to anything outside it: plotly.js is one of its files. Conversations are shown in frames
that cannot reach the other pages, and every text is escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from workbench.counting import count_of
from workbench.dashboards.conversation import frame, sequence_numbers
from workbench.dashboards.conversation_table import GRADES
from workbench.dashboards.search import vocabulary
from workbench.errors import InputError
from workbench.figures import page, quick_look, report
from workbench.figures.export import PLOTLY_JS
from workbench.figures.template import ThemeName
from workbench.harmony.labels import CHANNELS
from workbench.runs import Run
from workbench.studies import quick_look as sums
from workbench.studies.highlights import Results
from workbench.studies.result import files_of

PAGES = ("overview", "findings", "experts", "conversations")
_TITLES = {"overview": "Overview", "findings": "Findings", "experts": "Experts", "conversations": "Conversations"}
_COLUMNS = ("id", "task", "effort", "length", "answer", "correct")
_HEADINGS = ("id", "task", "effort", "tokens", "expected answer", "grade")  # of the columns


def site(
    run: Run, *, conversations: str = "0-4", results: Results | None = None, seed: int = 0, data: bool = True
) -> dict[str, bytes]:
    """Return the files of a published run by their path in the folder; `index.html` is the overview.

    conversations: ids, numbers or ranges of numbers, separated by commas; "none"; or "all". results: of experiments.
    data: add the numbers of all studies as JSON and CSV.

    Raises:
        InputError: the run has no such conversation, or no study can be made of it.
    """
    numbers = chosen(run, conversations)
    contents = report.gather(run, results=results, seed=seed)
    contents = contents._replace(skipped=[text.replace(str(run.path), "this run") for text in contents.skipped])
    shown = [name for name in PAGES if _has(name, run, numbers)]
    files = {_file(name): _page(name, shown, _body(name, contents, run, numbers)) for name in shown}
    vocab = vocabulary(run) if numbers else None
    for at, number in enumerate(numbers):
        beside = numbers[at - 1] if at else None, numbers[at + 1] if at + 1 < len(numbers) else None
        body = [_navigation("", shown, "../"), _head(run, number, *beside), frame(run, number, vocab, "auto")]
        title = f"Conversation {run.sequences.loc[number, 'id']!s}"
        files[f"conversations/{number}.html"] = page.document(title, body, plotly="").encode()
    if data:
        made = {name: text for sets in contents.results.values() for name, text in files_of(sets).items()}
        files |= {f"data/{name}": text.encode() for name, text in made.items()}
    return files | {PLOTLY_JS: get_plotlyjs().encode()}


def chosen(run: Run, conversations: str) -> list[int]:
    """Return the numbers of the sequences that a text such as "0-4,17,prompt-3/high", "none" or "all" names.

    Raises:
        InputError: the run has no such sequence.
    """
    known = [int(number) for number in run.sequences.index]
    if conversations in ("none", "all"):
        return known if conversations == "all" else []
    numbers: dict[int, None] = {}
    for part in conversations.split(","):
        if not part.strip():
            raise InputError(f"--conversations {conversations!r}: expected numbers such as 0-4, ids, none or all")
        numbers |= dict.fromkeys(sequence_numbers(run, part.strip()))
    return list(numbers)


def described(files: Mapping[str, bytes]) -> Iterator[str]:
    """Yield lines with the number and size of the files by kind, and their sum."""
    sizes: dict[str, list[int]] = {}
    for name, content in files.items():
        folder = name.rpartition("/")[0]
        sizes.setdefault(folder or ("plotly.js" if name == PLOTLY_JS else "pages"), []).append(len(content))
    for kind, lengths in sizes.items():
        yield f"{kind}: {count_of(len(lengths), 'file')}, {sum(lengths) / 1e6:.1f} MB"
    yield f"total: {count_of(len(files), 'file')}, {sum(map(len, files.values())) / 1e6:.1f} MB"


def _has(name: str, run: Run, numbers: Sequence[int]) -> bool:
    return {"experts": "routing" in run.recorded, "conversations": bool(numbers)}.get(name, True)


def _file(name: str) -> str:
    return "index.html" if name == "overview" else f"{name}.html"


def _page(name: str, shown: Sequence[str], body: Iterator[str]) -> bytes:
    return page.document(_TITLES[name], [_navigation(name, shown), *body], plotly=PLOTLY_JS).encode()


def _navigation(current: str, shown: Sequence[str], folder: str = "") -> str:
    """Return the links to the pages. folder: where they are, as seen from this page."""
    links = "".join(
        f'<a href="{folder}{_file(other)}"{" aria-current=page" if other == current else ""}>{_TITLES[other]}</a>'
        for other in shown
    )
    return f"<nav>{links}</nav>"


def _head(run: Run, number: int, before: int | None, after: int | None) -> str:
    """Return the title and the facts of a conversation, and links to the published ones before and after it."""
    row = _row(run, number)
    expected = f"expected answer {row['answer']}" if str(row["answer"]) else ""
    known = [f"{name} {row[name]}" for name in ("task", "effort") if str(row[name])]
    facts = " · ".join(
        filter(None, [*known, count_of(int(run.sequences["length"][number]), "token"), expected, str(row["correct"])])
    )
    links = "".join(
        f'<a href="{other}.html">{escape(text)}</a>'
        for other, text in ((before, "← Previous conversation"), (after, "Next conversation →"))
        if other is not None
    )
    return (
        f"<h1>Conversation {escape(str(row['id']))}</h1><p class='note'>{escape(facts)}</p>"
        f"<nav aria-label='conversations'>{links}</nav>"
    )


def _row(run: Run, number: int) -> dict[str, object]:
    """Return what is known of a conversation, its grade in words."""
    row: dict[str, Any] = {str(name): value for name, value in run.sequences.loc[number].items()}
    return row | {"correct": GRADES.get(int(row["correct"]), "not graded")}


def _body(name: str, contents: report.Contents, run: Run, numbers: Sequence[int]) -> Iterator[str]:
    if name == "overview":
        yield from report.overview(contents, findings=_file("findings"))
    elif name == "findings":
        yield f"<h1>Findings</h1>{report.links_to_sections(contents)}"
        for study, sets in contents.results.items():
            yield from report.section(study, sets)
    elif name == "experts":
        yield from _experts(run)
    else:
        yield from _conversations(run, numbers)


def _experts(run: Run) -> Iterator[str]:
    """Yield the load of experts in all content and, relative to it, in each channel and effort."""
    text = (
        "Expert load (fraction of routed slots) of all content, then the load of each channel and effort relative to it"
    )
    yield f"<h1>Experts</h1><p>{text}. Loads are pooled over tokens.</p>"
    yield page.figure("load_all", _heatmap(run, "load", {}))
    choices = sums.options(run)
    selections = [{"channel": c} for c in choices["channel"] if c in CHANNELS and c != "frame"]
    selections += [{"effort": e} for e in choices["effort"] if e != sums.ALL]
    for selection in selections:
        (label,) = selection.values()
        yield page.figure(f"lift_{label}", _heatmap(run, "lift", selection))
    yield f"<p class='note'>{escape(sums.METHOD)} {escape(sums.NOT_CONTROLLED)}</p>"


def _heatmap(run: Run, measure: quick_look.Measure, selection: Mapping[str, str]) -> page.Draw:
    def draw(theme: ThemeName = "light") -> go.Figure:
        return quick_look.heatmap(sums.routing(run, **selection), measure, theme=theme)

    return draw


def _conversations(run: Run, numbers: Sequence[int]) -> Iterator[str]:
    """Yield a table of the published conversations, each a link."""
    table = run.sequences
    yield (
        f"<h1>Conversations</h1><p>{len(numbers):,} of {count_of(len(table), 'conversation')} of the run "
        f"are published.</p>"
    )
    rows = []
    for number in numbers:
        row = _row(run, number)
        rows.append([page.Link(str(row["id"]), f"conversations/{number}.html"), *(row[c] for c in _COLUMNS[1:])])
    yield page.table(_HEADINGS, rows, numbers=("tokens",))
