"""HTML pages of figures: they fetch nothing, escape what they show, and hold each figure for both themes."""

import json
import re

import plotly.graph_objects as go

from workbench.figures import page
from workbench.figures.template import THEMES, ThemeName


def _draw(theme: ThemeName = "light") -> go.Figure:
    title = "</script><script>alert(1)</script>"
    return go.Figure(layout={"title": {"text": title}, "height": 300, "paper_bgcolor": THEMES[theme].paper})


def test_a_figure_is_embedded_for_both_themes() -> None:
    text = page.figure("load", _draw)
    for theme, colours in THEMES.items():
        match = re.search(rf'<script type="application/json" id="load-{theme}">(.*?)</script>', text, re.DOTALL)
        assert match is not None
        assert json.loads(match[1])["layout"]["paper_bgcolor"] == colours.paper


def test_the_data_of_a_figure_cannot_end_its_element() -> None:
    assert page.figure("load", _draw).count("</script>") == len(THEMES)
    assert _draw().to_json().count("</script>") or "\\u003c" in _draw().to_json(), "plotly alone keeps or escapes it"


def test_text_is_escaped_everywhere() -> None:
    bad = "<img src=x>"
    made = [
        page.table((bad,), [(bad,)]),
        page.folded(bad),
        page.paragraphs(bad),
        page.document(bad, []),
        page.figure("a", _draw),
    ]
    assert not any(bad in text for text in made)
    assert all("&lt;img src=x&gt;" in text for text in made[:4])


def test_a_page_fetches_nothing_unless_it_is_given_the_library_beside_it() -> None:
    alone = page.document("t", [])
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=""", alone)
    assert '<script src="plotly.min.js">' in page.document("t", [], plotly="plotly.min.js")


def test_a_bar_stays_on_its_axis_and_names_its_interval() -> None:
    text = page.bar(-2.0, -3.0, -1.0, 2.0)
    assert 'aria-label="-2, interval from -3 to -1"' in text
    ends = [float(v) for v in re.findall(r'(?:x1|x2|cx)="([0-9.]+)"', text)]
    assert min(ends) == 5
    assert max(ends) <= 145
