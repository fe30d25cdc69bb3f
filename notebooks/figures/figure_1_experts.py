"""Figure 1: the expert load of the analysis and final channels, and how uniform it is.

python notebooks/figures/figure_1_experts.py RUN OUT [svg|pdf|png|html …]
"""

from functools import partial

from workbench import studies
from workbench.figures import export, routing
from workbench.figures.gallery import GalleryItem, numbers
from workbench.runs import Run, open_run


def draw(run: Run) -> dict[str, GalleryItem]:
    """Return the panels by name."""
    load = studies.routing.load(run)
    effort = str(load["effort"].values[-1])
    items = {
        "figure_1a_entropy": GalleryItem(
            partial(routing.entropy_by_layer, load), numbers(load, "channel_effort_layer"), load
        )
    }
    for panel, channel in (("b", "analysis"), ("c", "final")):
        cell = load.sel(channel=channel, effort=effort)
        drawing = partial(routing.load_heatmap, load, channel, effort)
        items[f"figure_1{panel}_{channel}"] = GalleryItem(drawing, numbers(cell, "layer_expert"), load)
    return items


if __name__ == "__main__":
    export.script(draw, open_run, column="double")
