"""The frame of a page: header with the run, navigation, sidebar and main area. The look is in `theme`."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import panel as pn
import param
from bokeh.document import Document
from panel.io.resources import LOCAL_DIST
from panel.template.base import BasicTemplate
from panel.theme import Design

from workbench.dashboards import theme as look
from workbench.dashboards.page_scripts import page_scripts
from workbench.figures.template import ThemeName

# the navigation: headings, and the pages under each; pages that no group names, as of other packages, come last
GROUPS: Mapping[str, tuple[str, ...]] = {
    "": ("overview", "transcript", "live"),
    "Experts and neurons": ("experts", "expert-examples", "neuron-examples", "features", "router-prediction"),
    "Attention": ("sinks", "sink-difference", "attention"),
    "Comparisons": ("channels", "effort", "compare"),
    "Causes": ("causal", "graph"),
    "Probes": ("label-probes", "probe-trajectory"),
}


class PageTemplate(BasicTemplate):
    """A page whose links, theme and history follow its address; see the script in page.html."""

    design = param.ClassSelector(class_=Design, default=look.WorkbenchDesign, is_instance=False, instantiate=False)
    _css: ClassVar[list[Any]] = []
    _template = Path(__file__).with_name("page.html")
    texts = param.Dict(default={}, doc="HTML by the name that page.html has for it; the template escapes nothing.")

    def _update_vars(self, *args: Any) -> None:
        super()._update_vars(*args)
        self._render_variables.update(self.texts)

    def _init_doc(self, doc: Document | None = None, *args: Any, **options: Any) -> Document:
        """Fill the document; its models are collected once at the end, not again for each part of the page."""
        document = doc or pn.state.curdoc
        with document.models.freeze() if document is not None else nullcontext():
            return super()._init_doc(document, *args, **options)


def page_template(
    page: str,
    titles: Mapping[str, str],
    run_name: str,
    *,
    sidebar: list[Any],
    main: list[Any],
    query: str = "",
    theme: ThemeName = "light",
    one_path: bool = False,
    absent: Collection[str] = (),
    figure_first: bool = False,
) -> PageTemplate:
    """Return a page in its frame.

    titles: of all pages by address. query: of the page's own address. one_path: the page is named in the query.
    absent: addresses of pages for which the run recorded nothing. figure_first: the page begins with a figure.
    """
    served = pn.state.curdoc is not None and pn.state.curdoc.session_context is not None
    _load_styles_from_this_server()
    return PageTemplate(
        title=escape(f"{run_name}: {titles[page]} – gpt-oss workbench"),
        sidebar=sidebar,
        main=main,
        raw_css=[look.style(theme)],
        theme=pn.theme.DarkTheme if theme == "dark" else pn.theme.DefaultTheme,
        meta_viewport="width=device-width, initial-scale=1",
        busy_indicator=None,  # Panel's is switched for all sessions by each one; page.html has its own
        texts={
            "page_title": escape(titles[page]),
            "run_name": escape(run_name),
            "other_theme": "light" if theme == "dark" else "dark",
            "page_links": navigation(page, titles, absent),
            "query": escape(query),
            "one_path": "true" if one_path else "false",
            "alone": "wb-alone" if len(titles) == 1 and not sidebar else "",
            **({"scripts": page_scripts(figure_first)} if served else {}),
        },
    )


def _load_styles_from_this_server() -> None:
    """Set the address of Panel's style sheets for the document of this session.

    Panel sets it only when it writes the HTML of a page. If a session expires before its browser connects, as on a slow
    line, the browser gets a new session without HTML, and Panel would refer to the style sheets of another host.
    """
    if pn.state.curdoc is not None:
        address = f"{pn.state.rel_path}/{LOCAL_DIST}" if pn.state.rel_path else LOCAL_DIST
        pn.state.curdoc._template_variables.setdefault("dist_url", address)


def navigation(page: str, titles: Mapping[str, str], absent: Collection[str] = ()) -> str:
    """Return HTML with links to all pages under the headings of `GROUPS`; those of absent pages are folded below."""
    in_groups = {path for paths in GROUPS.values() for path in paths}
    groups = {**GROUPS, "More studies": tuple(path for path in titles if path not in in_groups)}
    parts, folded = [], []
    for heading, paths in groups.items():
        known = [path for path in paths if path in titles]
        folded += [path for path in known if path in absent]
        links = "".join(_page_link(path, titles[path], path == page) for path in known if path not in absent)
        parts.append((f"<h2>{escape(heading)}</h2>" if heading else "") + links if links else "")
    if folded:
        links = "".join(_page_link(path, titles[path], path == page, absent=True) for path in folded)
        opened = " open" if page in folded else ""
        parts.append(f"<details{opened}><summary>Not recorded ({len(folded)})</summary>{links}</details>")
    return "".join(parts)


def _page_link(path: str, title: str, current: bool, *, absent: bool = False) -> str:
    more = (" aria-current=page" if current else "") + (
        ' class="wb-absent" title="Not recorded in this run"' if absent else ""
    )
    return f'<a data-page="{escape(path)}" href="./{escape(path)}"{more}>{look.icon(path)}{escape(title)}</a>'


def missing_page(titles: Mapping[str, str]) -> str:
    """Return the document for an address that is not a page, with links to the pages. titles: of the pages."""
    links = "".join(
        f'<li><a href="/{escape(path)}">{look.icon(path)} {escape(title)}</a></li>' for path, title in titles.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>No such page – gpt-oss workbench</title><style>{look.style('light')}"
        f"@media(prefers-color-scheme:dark){{{look.variables('dark')}}}</style>"
        '<header class="wb-header"><a class="wb-brand" href="/overview">gpt-oss workbench</a></header>'
        '<main class="wb-main"><h1>There is no page at this address</h1><p>The pages of this dashboard are:</p>'
        f'<ul class="wb-answers">{links}</ul></main></html>'
    )
