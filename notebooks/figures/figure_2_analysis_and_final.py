"""Figure 2: what differs between analysis and final beyond position, by layer and by expert.

python notebooks/figures/figure_2_analysis_and_final.py RUN OUT [svg|pdf|png|html …]
"""

from workbench import studies
from workbench.figures import channels, export
from workbench.figures.gallery import GalleryItem
from workbench.runs import Run, open_run


def draw(run: Run) -> dict[str, GalleryItem]:
    """Return the panels by name."""
    gallery = channels.gallery(studies.run_study("channels", run))
    panels = {"a_by_layer": "routing_sizes", "b_experts": "routing_analysis_vs_final_matched", "c_sinks": "sinks_sizes"}
    return {f"figure_2{panel}": gallery[name] for panel, name in panels.items() if name in gallery}


if __name__ == "__main__":
    export.script(draw, open_run)
