"""Colours can be read in both themes, and figures lie on cards of their own colour."""

import pytest

from workbench.dashboards import theme
from workbench.figures.template import THEMES, ThemeName


@pytest.mark.parametrize("name", theme.TOKENS)
def test_text_and_edges_have_the_contrast_of_wcag(name: ThemeName) -> None:
    tokens = theme.TOKENS[name]
    for text, ground, least in theme.PAIRS:
        assert theme.contrast(tokens[text], tokens[ground]) >= least, (text, ground)


def test_contrast_is_that_of_the_standard() -> None:
    assert theme.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert theme.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the grey that just fails
    assert theme.contrast("#ffffff", "#777777") == theme.contrast("#777777", "#ffffff")


def test_both_themes_have_the_same_tokens_and_use_no_other() -> None:
    light, dark = theme.TOKENS["light"], theme.TOKENS["dark"]
    assert light.keys() == dark.keys()
    assert {name for text, ground, _ in theme.PAIRS for name in (text, ground)} <= light.keys()
    for name in theme.TOKENS:
        assert theme.TOKENS[name]["surface"] == THEMES[name].paper
        css = theme.style(name) + theme.CARD_CSS + theme.TABULATOR_CSS
        defined = {part.partition(":")[0] for part in theme.variables(name).replace("{", ";").split(";")}
        used = {part.partition(")")[0].partition(",")[0] for part in css.split("var(")[1:]}
        assert used - {"--share"} <= defined, "all but what an element sets itself"
        assert "url(" not in css, "nothing is fetched"


def test_text_of_parts_is_escaped() -> None:
    for made in (theme.tile("<b>", "<i>"), theme.note("<b>"), theme.note("text", "<b>")):
        assert "<b>" not in made.removeprefix('<div class="wb-tile"><b>')
        assert "&lt;" in made
