"""Figure 4: accuracy vs. reasoning length, and the differences of routing at equal position.

python notebooks/figures/figure_4_effort.py RUN OUT [svg|pdf|png|html …]
"""

from workbench import studies
from workbench.figures import effort, export
from workbench.figures.gallery import GalleryItem
from workbench.runs import Run, open_run


def draw(run: Run) -> dict[str, GalleryItem]:
    """Return the panels by name."""
    gallery = effort.gallery(studies.run_study("effort", run))
    panels = {"a_accuracy": "accuracy_by_tokens", "b_routing": "routing_sizes"}
    return {f"figure_4{panel}": gallery[name] for panel, name in panels.items() if name in gallery}


if __name__ == "__main__":
    export.script(draw, open_run)
