"""The scripts of a page: those that it needs at once, and plotly, which is loaded when it is needed.

Panel asks for every script of Bokeh and for plotly, 10 MB, before a page shows anything. No text of ours has TeX and no
figure is one of Bokeh's, so MathJax and WebGL are left out. Plotly, half of the rest, is loaded at once on a page that
begins with a figure, and on other pages by their first figure, when the text around it is on the screen.
"""

import json
from collections.abc import Sequence

import panel as pn
from bokeh.embed.bundle import URL
from bokeh.resources import Component
from bokeh.server.views.static_handler import StaticHandler
from panel.io.resources import Resources, bundle_resources

_COMPONENTS: Sequence[Component] = ("bokeh", "bokeh-widgets", "bokeh-tables")
_PLOTLY = "/plotlyplot/"  # in the address of Panel's script of plotly
# An object in place of plotly takes the calls of Panel's figures, which wait for their results, until it is loaded.
# Plotly gives its figures no name for screen readers: theirs is the title.
_LOAD_LATER = """
(() => {
  let plotly = null;
  const name = figure => {
    const title = figure.layout?.title, texts = [title?.text, title?.subtitle?.text].filter(Boolean);
    if (!texts.length) return;
    figure.setAttribute("role", "figure");
    figure.setAttribute("aria-label", texts.join(". ").replace(/<[^>]*>/g, " ").replace(/\\s+/g, " "));
  };
  const naming = draw => async (...values) => { const figure = await draw(...values); name(figure); return figure; };
  const load = () => plotly ||= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = ADDRESS;
    script.onload = () => {
      for (const draw of ["newPlot", "react"]) window.Plotly[draw] = naming(window.Plotly[draw]);
      resolve(window.Plotly);
    };
    script.onerror = () => reject(new Error(`${ADDRESS} could not be loaded`));
    document.head.append(script);
  });
  window.Plotly = {};
  for (const name of ["newPlot", "react", "relayout", "restyle", "addFrames", "purge", "toImage", "downloadImage"])
    window.Plotly[name] = (...values) => load().then(loaded => loaded[name](...values));
  if (AT_ONCE) load();
})();
"""


def page_scripts(figure_first: bool) -> str:
    """Return the script elements of a page of this server. figure_first: the page begins with a figure."""
    resources = Resources(mode="server", components=list(_COMPONENTS), path_versioner=StaticHandler.append_version)
    bundle = bundle_resources(None, resources, enable_mathjax=False)
    addresses = [_lasting(str(url)) for url in bundle.js_files]
    plotly = [address for address in addresses if _PLOTLY in address]
    bundle.js_files = [URL(address) for address in addresses if address not in plotly]
    if plotly:
        code = _LOAD_LATER.replace("ADDRESS", json.dumps(plotly[0])).replace("AT_ONCE", json.dumps(figure_first))
        bundle.js_raw = [code, *bundle.js_raw]
    scripts, _ = bundle
    return str(scripts)


def _lasting(address: str) -> str:
    """Return the address with a version: only what has one is stored by browsers without asking again."""
    return address if "?v=" in address else f"{address}?v={pn.__version__}"
