"""Python that draws a figure of the dashboard again, to be copied into a notebook."""

from collections.abc import Mapping, Sequence

from workbench import registry
from workbench.figures.template import ThemeName
from workbench.runs import Run
from workbench.studies.quick_look import ALL


def study_figure(record: registry.Record, runs: Sequence[Run], figure: str, exclude: str, theme: ThemeName) -> str:
    """Return code that runs a study and draws one figure of its gallery.

    runs: one or, for a comparison, two. figure: its name in the gallery. exclude: flags of sequences to leave out.
    """
    names = ["run"] if len(runs) == 1 else [f"run_{letter}" for letter in "ab"]
    opened = [f"{name} = {_open(run, exclude)}" for name, run in zip(names, runs, strict=True)]
    drawn = f"wb.figures.{record.attribute}.gallery(results)[{figure!r}].draw({_options(theme)})"
    return _code(*opened, f"results = wb.studies.run_study({record.name!r}, {', '.join(names)})", drawn)


def accuracy_figure(run: Run, task: str, exclude: str, theme: ThemeName) -> str:
    """Return code that draws accuracy against tokens of a task, or of all tasks, by effort."""
    return _code(
        f"run = {_open(run, exclude)}",
        'results = wb.studies.run_study("effort", run)',
        f'wb.figures.effort.accuracy_by_tokens(results["cost"], {task!r}{_more(theme)})',
    )


def selection_heatmap(
    run: Run,
    quantity: str,
    measure: str,
    cell: Mapping[str, str],
    exclude: str,
    theme: ThemeName,
    **options: tuple[int, int] | float,
) -> str:
    """Return code that draws the heat map of a selection.

    quantity: the function of `workbench.studies.quick_look` that sums it. cell: the selected channel, effort and task.
    options: of the figure.
    """
    chosen = "".join(f", {name}={value!r}" for name, value in cell.items() if value != ALL)
    more = "".join(f", {name}={value!r}" for name, value in options.items()) + _more(theme)
    return _code(
        f"run = {_open(run, exclude)}",
        f"selection = wb.studies.quick_look.{quantity}(run{chosen})",
        f"wb.figures.quick_look.heatmap(selection, {measure!r}{more})",
    )


def _open(run: Run, exclude: str) -> str:
    return f"wb.open_run({str(run.path)!r}{f', exclude={exclude!r}' if exclude else ''})"


def _options(theme: ThemeName) -> str:
    return "" if theme == "light" else f"theme={theme!r}"


def _more(theme: ThemeName) -> str:
    return f", {_options(theme)}" if _options(theme) else ""


def _code(*lines: str) -> str:
    return "\n".join(["import workbench as wb", "", *lines, ""])
