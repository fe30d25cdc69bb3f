"""The frame of a page: header with the run, navigation, sidebar and main area. The look is in `theme`."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, ClassVar

import panel as pn
import param
from panel.template.base import BasicTemplate
from panel.theme import Design

from workbench.dashboards import theme as look
from workbench.figures.template import ThemeName


class PageTemplate(BasicTemplate):
    """A page whose links, theme and history follow its address; see the script in page.html."""

    design = param.ClassSelector(class_=Design, default=look.WorkbenchDesign, is_instance=False, instantiate=False)
    _css: ClassVar[list[Any]] = []
    _template = Path(__file__).with_name("page.html")
    texts = param.Dict(default={}, doc="HTML by the name that page.html has for it; the template escapes nothing.")

    def _update_vars(self, *args: Any) -> None:
        super()._update_vars(*args)
        self._render_variables.update(self.texts)


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
) -> PageTemplate:
    """Return a page in its frame.

    titles: of all pages by address. query: of the page's own address. one_path: the page is named in the query.
    """
    links = "".join(
        f'<a data-page="{escape(path)}" href="./{escape(path)}"{" aria-current=page" if path == page else ""}>'
        f"{look.icon(path)}{escape(title)}</a>"
        for path, title in titles.items()
    )
    return PageTemplate(
        title=escape(f"{run_name}: {titles[page]} – gpt-oss workbench"),
        sidebar=sidebar,
        main=main,
        raw_css=[look.style(theme)],
        theme=pn.theme.DarkTheme if theme == "dark" else pn.theme.DefaultTheme,
        meta_viewport="width=device-width, initial-scale=1",
        texts={
            "page_title": escape(titles[page]),
            "run_name": escape(run_name),
            "other_theme": "light" if theme == "dark" else "dark",
            "page_links": links,
            "query": escape(query),
            "one_path": "true" if one_path else "false",
        },
    )


def missing_page(titles: Mapping[str, str]) -> str:
    """Return the document for an address that is no page: it says so and links to those that are. titles: of them."""
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
