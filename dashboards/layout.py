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
