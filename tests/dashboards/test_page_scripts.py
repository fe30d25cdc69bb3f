"""The scripts of a page: none that it does not need, and plotly only where there is a figure."""

import re
from collections.abc import Sequence
from pathlib import Path

from panel.io.resources import Resources, bundle_resources
from panel.models.plotly import PLOTLY_VERSION

from tests.dashboards.browsing import Browser, Session
from workbench.dashboards import page_scripts
from workbench.dashboards.page_scripts import TRACES, PageScripts

OTHER_FIGURE = """async () => {
  const figure = document.body.appendChild(document.createElement("div"));
  await window.Plotly.newPlot(figure, {data: [{type: "sunburst", labels: ["a", "b"], parents: ["", "a"]}]});
  return figure.querySelectorAll(".sunburstlayer .slice").length;
}"""


def unneeded(addresses: Sequence[str]) -> list[str]:
    """Return the scripts that no page of ours needs."""
    return [a for a in addresses if re.search(r"bokeh-(mathjax|gl|api)\.|/plotlyplot/", a)]


def opened(browser: Browser, address: str, text: str) -> tuple[Session, list[str]]:
    """Return a session whose page shows a text, and the addresses of the scripts that it asks for."""
    session, scripts = Session(browser, "about:blank"), list[str]()
    session.page.on("request", lambda r: scripts.append(r.url) if r.resource_type == "script" else None)
    session.page.goto(address)
    session.page.get_by_text(text).first.wait_for()
    return session, scripts


def test_a_page_without_a_figure_asks_for_no_script_of_figures(demo: str, browser: Browser) -> None:
    session, scripts = opened(browser, f"{demo}/transcript", "Expected")
    assert any("panel.min.js" in address for address in scripts)
    assert unneeded(scripts) == [] and not any("plotly" in address for address in scripts)
    assert session.errors == []
    # all of plotly is loaded for a figure that its part cannot draw
    assert session.page.evaluate(OTHER_FIGURE) == 2
    assert [address for address in scripts if "plotly" in address] == unneeded(scripts)
    assert len(unneeded(scripts)) == 1 and session.errors == []


def test_a_page_with_figures_asks_once_for_the_part_of_plotly_that_draws_them(demo: str, browser: Browser) -> None:
    session, scripts = opened(browser, f"{demo}/experts", "Statistical tests")
    session.drawn(2)
    assert unneeded(scripts) == []
    (part,) = [address for address in scripts if "plotly" in address]
    assert "?v=" in part
    assert session.errors == []


def test_panel_alone_would_ask_for_scripts_that_are_not_needed() -> None:
    """Negative control of `unneeded`, and a notice if Panel comes to choose them itself."""
    urls = bundle_resources(None, Resources(mode="server"), enable_mathjax=True).js_files
    assert len(unneeded([str(url) for url in urls])) >= 3


def test_the_part_of_plotly_has_these_traces_in_the_version_of_panel() -> None:
    (name,) = PageScripts.__javascript__
    text = Path(page_scripts.__file__).with_name(name).read_text("utf-8")
    assert set(re.findall(r'moduleType:"trace",name:"([a-z0-9]+)"', text)) == set(TRACES)
    assert f"v{PLOTLY_VERSION}" in text[:100] and PLOTLY_VERSION in name
