"""The arrangement of the live page: prompt and interventions on the left, answers on the right, where there is room.

The answers stay in sight while the left column is scrolled. In a narrow window the parts are below each other: the
prompt, the answers, the interventions.
"""

from typing import Any

import panel as pn

_TWO_COLUMNS = 800  # pixels of the main area from which on there are two columns
_HEADER = 58  # pixels of the page's header and the margin below it
# The container is measured, not the window: in a dashboard a sidebar takes a part of it.
_MEASURED_CSS = ":host{container-type:inline-size}"
_GRID_CSS = f"""
:host{{display:grid!important;grid-template-columns:minmax(0,1fr);align-items:start;
grid-template-areas:"prompt" "answers" "experts"}}
.lv-prompt-area{{grid-area:prompt}}.lv-answers-area{{grid-area:answers}}.lv-experts-area{{grid-area:experts}}
@container (min-width:{_TWO_COLUMNS}px){{
:host{{grid-template-columns:minmax(330px,3fr) minmax(0,5fr);grid-template-rows:auto 1fr;
grid-template-areas:"prompt answers" "experts answers"}}
.lv-answers-area{{position:sticky;top:{_HEADER}px}}
:host(.lv-wide){{grid-template-columns:minmax(330px,5fr) minmax(0,6fr)}}
}}
"""


def arranged(prompt: list[Any], answers: list[Any], experts: list[Any], *, wide_map: bool = False) -> pn.Column:
    """Return the parts of the page in one or two columns, whichever the width allows.

    wide_map: whether the left column takes almost half of the width, for a map with many experts.
    """
    areas = {"prompt": prompt, "answers": answers, "experts": experts}
    columns = [
        pn.Column(*parts, sizing_mode="stretch_width", css_classes=[f"lv-{name}-area"]) for name, parts in areas.items()
    ]
    classes = ["lv-wide"] if wide_map else []
    grid = pn.Column(*columns, sizing_mode="stretch_width", stylesheets=[_GRID_CSS], css_classes=classes)
    return pn.Column(grid, sizing_mode="stretch_width", stylesheets=[_MEASURED_CSS])
