"""The scripts of a page, `workbench.dashboards.page_scripts`: only those that it needs, and plotly with a figure."""

import re
from collections.abc import Sequence

from panel.io.resources import Resources, bundle_resources
from playwright.sync_api import Browser

from tests.dashboards.browsing import Session

FIGURE = """async () => {
  const figure = document.body.appendChild(document.createElement("div"));
  const bars = {data: [{type: "bar", x: ["a", "b"], y: [1, 2]}]};
  await window.Plotly.newPlot(figure, bars);
  const before = figure.getAttribute("role");  // without a title
  await window.Plotly.react(figure, {...bars, layout: {title: {text: "Load<br>by <i>layer</i>"}}});
  window.figureName = [before, figure.getAttribute("role"), figure.getAttribute("aria-label")];
  return figure.querySelectorAll(".bars .point").length;
}"""


def unneeded(addresses: Sequence[str]) -> list[str]:
    """Return the scripts that no page of ours needs."""
    return [a for a in addresses if re.search(r"bokeh-(mathjax|gl|api)\.", a)]


def opened(browser: Browser, address: str, text: str) -> tuple[Session, list[str]]:
    """Return a session whose page shows a text, and the addresses of the scripts that it asks for."""
    session, scripts = Session(browser, "about:blank"), list[str]()
    session.page.on("request", lambda r: scripts.append(r.url) if r.resource_type == "script" else None)
    session.page.goto(address)
    session.page.get_by_text(text).first.wait_for()
    return session, scripts


def test_a_page_without_a_figure_asks_for_plotly_when_the_first_one_is_drawn(demo: str, browser: Browser) -> None:
    session, scripts = opened(browser, f"{demo}/transcript", "Expected")
    assert any("panel.min.js" in address for address in scripts)
    assert unneeded(scripts) == []
    assert not any("plotly" in address for address in scripts)
    assert session.errors == []
    assert session.page.evaluate(FIGURE) == 2
    assert session.page.evaluate("window.figureName") == [None, "figure", "Load by layer "], "for screen readers"
    assert len([address for address in scripts if "plotly" in address]) == 1
    assert session.errors == []


def test_a_page_with_figures_asks_once_for_plotly(demo: str, browser: Browser) -> None:
    session, scripts = opened(browser, f"{demo}/experts", "Statistical tests")
    session.drawn(2)
    assert unneeded(scripts) == []
    (plotly,) = [address for address in scripts if "plotly" in address]
    assert "?v=" in plotly
    assert session.errors == []


def test_panel_alone_would_ask_for_scripts_that_are_not_needed() -> None:
    """Negative control of `unneeded`, and a notice if Panel comes to choose them itself."""
    urls = bundle_resources(None, Resources(mode="server"), enable_mathjax=True).js_files
    assert len(unneeded([str(url) for url in urls])) >= 2
