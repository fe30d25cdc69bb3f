"""Serve the live page, alone or in a dashboard: one model, many viewers.

Everything a page needs comes from this server.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import panel as pn

from workbench.dashboards.app import ExtraPage
from workbench.dashboards.layout import PageTemplate, page_template
from workbench.dashboards.server import checked_address, listen
from workbench.errors import InputError
from workbench.figures.template import ThemeName
from workbench.live.model_server import Limits, ModelServer
from workbench.live.page import REFRESH_MS, LivePage
from workbench.live.recipe_folder import RecipeFolder
from workbench.model.transformer import GptOss
from workbench.research.recipe import Recipe
from workbench.research.steering_sources import SteeringSources

__all__ = ["Limits", "dashboard_page", "live_page", "serve"]

_MAX_ADDRESS = 16_000  # characters of a recipe in an address; browsers and proxies refuse much longer ones
_AWAY_MS = 5_000  # a browser that has not reconnected after this time has left, and its request is cancelled
_EXAMPLES = {"nano": "24*29"}  # of the tasks it was trained on


def dashboard_page(server: ModelServer) -> ExtraPage:
    """Return the live page as one of a dashboard's pages."""
    return ExtraPage("Live", lambda titles, absent: live_page(server, titles, absent)())


def live_page(
    server: ModelServer, titles: Mapping[str, str] | None = None, absent: Collection[str] = ()
) -> Callable[[], PageTemplate]:
    """Return a function that makes the page of one session.

    titles: of the pages beside it, by their address. absent: addresses of those for which the run recorded nothing.
    """

    def show() -> PageTemplate:
        given = {name: values[0].decode("utf-8", "replace") for name, values in (pn.state.session_args or {}).items()}
        theme: ThemeName = "dark" if given.get("theme") == "dark" else "light"
        recipe, problem = recipe_of_address(given.get("recipe", ""), server)
        others = {name: value for name, value in given.items() if name not in ("theme", "recipe")}  # of other pages

        def remember(recipe: Recipe) -> None:
            if pn.state.location:
                pn.state.location.search = "?" + address_of_recipe(recipe, theme, others)

        page = LivePage(server, recipe, theme, remember, problem)
        document = pn.state.curdoc

        def refresh() -> None:
            if _has_left(document):
                page.viewer.leave()
            if pn.state.loaded and _is_connected(document):  # other changes would be lost, see `widgets.when_shown`
                page.refresh()

        pn.state.on_session_destroyed(lambda _: page.viewer.leave())
        pn.state.add_periodic_callback(refresh, period=REFRESH_MS)
        own = (
            address_of_recipe(recipe, theme, others)
            if given.get("recipe") and not problem
            else urlencode(others | ({"theme": theme} if theme == "dark" else {}))
        )
        return page_template(
            "live",
            titles or {"live": "Live"},
            server.title,
            sidebar=[],
            main=page.main(),
            query=own,
            theme=theme,
            absent=absent,
        )

    return show


def _has_left(document: Any) -> bool:
    """Return whether the browser of a session has been disconnected for some seconds."""
    context = getattr(document, "session_context", None)
    session = getattr(context, "session", None)
    if session is None or session.connection_count:
        return False
    return bool(session.milliseconds_since_last_unsubscribe > _AWAY_MS)


def _is_connected(document: Any) -> bool:
    """Return whether a browser is connected to a session."""
    session = getattr(getattr(document, "session_context", None), "session", None)
    return session is None or session.connection_count > 0


def address_of_recipe(recipe: Recipe, theme: ThemeName, others: Mapping[str, str] | None = None) -> str:
    """Return the part of an address after the question mark; a recipe that is too long for it is left out.

    others: values of other pages, which links to them take along.
    """
    text = recipe.to_json(indent=None)
    values = {**(others or {}), **({"theme": theme} if theme == "dark" else {})}
    return urlencode(values | ({"recipe": text} if len(text) <= _MAX_ADDRESS else {}))


def recipe_of_address(text: str, server: ModelServer) -> tuple[Recipe, str]:
    """Return the recipe of an address, or a first one and what is wrong with that of the address."""
    first = Recipe(
        user=_EXAMPLES.get(Path(server.name).name, ""),
        model=server.name,
        max_new_tokens=min(256, server.limits.max_new_tokens),
    )
    if not text:
        return first, ""
    try:
        return Recipe.from_json(text), ""
    except InputError as error:
        return first, f"The recipe in the address cannot be used: {error}"


def serve(
    model: GptOss,
    name: str,
    *,
    limits: Limits | None = None,
    sources: SteeringSources | None = None,
    recipes: RecipeFolder | None = None,
    port: int = 5007,
    address: str = "localhost",
    show: bool = False,
    allow_origin: Sequence[str] = (),
    basic_auth: Path | None = None,
) -> None:
    """Serve the live page until interrupted. Only pages from `address`, and of the origins allowed, may connect.

    name: how `wb.load` finds the model. sources: vectors and autoencoders to steer along. recipes: a folder that
    viewers read and save recipes in. basic_auth: a JSON file of names and passwords; without it everybody who reaches
    the address may use the model.
    """
    at = checked_address(address, port, allow_origin, basic_auth)
    pn.extension(notifications=False, inline=True)  # nothing from another host
    server = ModelServer(model, name, limits, sources, recipes)
    server.warm_up()
    page = live_page(server)
    try:
        listen({"/": page, "live": page}, at, show=show)
    finally:
        server.close()
