"""Figure 3: mean sink attention, and sink attention by position in a full and in a windowed layer.

python notebooks/figures/figure_3_sinks.py RUN OUT [svg|pdf|png|html …]
"""

from functools import partial

from workbench import studies
from workbench.figures import export, sinks
from workbench.figures.gallery import GalleryItem, numbers
from workbench.runs import Run, open_run


def draw(run: Run) -> dict[str, GalleryItem]:
    """Return the panels by name."""
    mass = studies.sinks.mass(run)
    effort = str(mass["effort"].values[-1])
    cell = mass.sel(channel="analysis", effort=effort)
    items = {
        "figure_3a_mass": GalleryItem(
            partial(sinks.mass_heatmap, mass, "analysis", effort), numbers(cell, "layer_head"), mass
        )
    }
    position = studies.sinks.by_position(run)
    for panel, layer in (("b_full", 1), ("c_window", 2)):
        table = numbers(position.sel(layer=layer), "channel_bin")
        items[f"figure_3{panel}"] = GalleryItem(partial(sinks.by_position, position, layer), table, position)
    return items


if __name__ == "__main__":
    export.script(draw, open_run)
