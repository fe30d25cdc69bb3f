"""The scripts of a page: those that it needs at once, and plotly, which is loaded when it is needed.

Panel asks for every script of Bokeh and the whole of plotly, 10 MB, before a page shows anything. No text of ours has
TeX and no figure is one of Bokeh's, so MathJax and WebGL are left out. Figures need the part of plotly for two axes,
which a browser runs in less than half of the time; it is loaded at once on a page that begins with a figure, and on
other pages by their first figure, when the text around it is on the screen.

`plotly-cartesian-3.1.0.min.js` comes from the npm package plotly.js-cartesian-dist-min in the version of Panel's plotly.
"""

import json
from collections.abc import Sequence
from typing import ClassVar

import panel as pn
from bokeh.embed.bundle import URL
from bokeh.resources import Component
from bokeh.server.views.static_handler import StaticHandler
from panel.io.resources import Resources, bundle_resources, component_resource_path

# types of traces that the part of plotly draws; for a figure with others all of plotly is loaded
TRACES = (
    "scatter",
    "scatterternary",
    "bar",
    "box",
    "heatmap",
    "histogram",
    "histogram2d",
    "histogram2dcontour",
    "image",
    "pie",
    "contour",
    "violin",
)
_COMPONENTS: Sequence[Component] = ("bokeh", "bokeh-widgets", "bokeh-tables")
_PLOTLY = "/plotlyplot/"  # in the address of Panel's script of plotly
# An object in place of plotly takes the calls of Panel's figures, which wait for their results, until it is loaded.
_LOAD_LATER = """
(() => {
  const load = address => new Promise((resolve, reject) => {
    const script = document.createElement("script"), own = window.Plotly;
    script.src = address;
    script.onload = () => { const loaded = window.Plotly; window.Plotly = own; resolve(loaded); };
    script.onerror = () => reject(new Error(`${address} could not be loaded`));
    document.head.append(script);
  });
  const known = new Set(TRACES);
  let plotly = null, all = false;
  const call = name => (...values) => (plotly ||= load(PART)).then(loaded => loaded[name](...values));
  const draw = name => (figure, content, ...rest) => {
    const traces = Array.isArray(content) ? content : content.data;
    if (!all && !traces.every(trace => known.has(trace.type || "scatter"))) { all = true; plotly = load(ALL); }
    return call(name)(figure, content, ...rest);
  };
  window.Plotly = {newPlot: draw("newPlot"), react: draw("react")};
  for (const name of ["relayout", "restyle", "addFrames", "purge", "toImage", "downloadImage"])
    window.Plotly[name] = call(name);
  if (AT_ONCE) plotly = load(PART);
})();
"""


class PageScripts:
    """The scripts of this package, which Panel's server gives out to those who ask for one by name."""

    __javascript__: ClassVar[list[str]] = ["plotly-cartesian-3.1.0.min.js"]


def page_scripts(figure_first: bool) -> str:
    """Return the script elements of a page of this server. figure_first: the page begins with a figure."""
    resources = Resources(mode="server", components=list(_COMPONENTS), path_versioner=StaticHandler.append_version)
    bundle = bundle_resources(None, resources, enable_mathjax=False)
    addresses = [_lasting(str(url)) for url in bundle.js_files]
    plotly = [address for address in addresses if _PLOTLY in address]
    bundle.js_files = [URL(address) for address in addresses if address not in plotly]
    if plotly:
        part = _lasting(component_resource_path(PageScripts, "__javascript__", PageScripts.__javascript__[0]))
        values = {"TRACES": TRACES, "PART": part, "ALL": plotly[0], "AT_ONCE": figure_first}
        code = _LOAD_LATER
        for name, value in values.items():
            code = code.replace(name, json.dumps(value))
        bundle.js_raw = [code, *bundle.js_raw]
    scripts, _ = bundle
    return str(scripts)


def _lasting(address: str) -> str:
    """Return the address with a version: only what has one is stored by browsers without asking again."""
    return address if "?v=" in address else f"{address}?v={pn.__version__}"
