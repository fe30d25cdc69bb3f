"""Options of a record as text and as Python values; what the model does not have is named."""

from typing import Any

import pytest

from workbench.capture import record_options as options
from workbench.errors import InputError


def test_options_are_numbers_ranges_and_names() -> None:
    words = ["layers=0-2,5", "heads=1", "channel=analysis,final", "every=4", "reduce=norm"]
    assert options.read("z", words) == {
        "layers": (0, 1, 2, 5),
        "heads": (1,),
        "channel": ["analysis", "final"],
        "every": 4,
        "reduce": "norm",
    }
    assert options.read("z", ["layer=1", "expert=2"]) == {"layers": (1,), "experts": (2,)}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["layrs=1"], "'layrs' is not an option"),
        (["layers"], "'layers' has no value: write layers=0-3"),
        (["layers=1", "layer=2"], "layers= is given twice"),
        (["layers=3-1"], "takes numbers and ranges"),
        (["layers=a"], "takes numbers and ranges"),
        (["every=0"], "takes a number from 1"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], reason: str) -> None:
    with pytest.raises(InputError, match=f"^--record z: .*{reason}"):
        options.read("z", words)


def test_layers_are_sorted_and_count_from_the_end() -> None:
    assert options.layers("x", (-1, 0, 0), 4) == (0, 3)
    assert options.layers("x", (), 4) == (0, 1, 2, 3)
    with pytest.raises(InputError, match="no layer 4; the model has layers 0 to 3"):
        options.layers("x", (4,), 4)


@pytest.mark.parametrize("value", [None, 3, [3, 3, 5], "3,5"])
def test_numbers_are_given_in_any_form(value: Any) -> None:
    assert options.numbers("x", "layers", value) == {None: (), 3: (3,)}.get(
        value if not isinstance(value, list) else 0, (3, 5)
    )


def test_a_selection_needs_an_axis_and_an_entry() -> None:
    axes = {"head": 8, "d_head": 16}
    given: dict[str, Any] = {"heads": (5, 1), "reduce": "raw"}
    assert options.index("x", "z", axes, given) == ((1, 5), "head")
    assert given == {"reduce": "raw"}, "options that were used are taken out"
    with pytest.raises(InputError, match="heads=8, but z has heads 0 to 7"):
        options.index("x", "z", axes, {"heads": (8,)})
    with pytest.raises(InputError, match="z has no experts: use heads="):
        options.index("x", "z", axes, {"experts": (0,)})
    with pytest.raises(InputError, match="two selections of one axis"):
        options.index("x", "z", axes, {"heads": (0,), "index": (0,)})


def test_tokens_and_reductions_are_checked() -> None:
    given = {"channel": ["final"], "last": 2, "layers": (0,)}
    assert options.tokens("x", given) == {"channel": ["final"], "last": 2}
    assert given == {"layers": (0,)}
    with pytest.raises(InputError, match=r"^x: "):
        options.tokens("x", {"channel": ["finale"]})
    assert options.reduction("x", {}) == "raw"
    with pytest.raises(InputError, match="reduce=median: use one of raw, norm"):
        options.reduction("x", {"reduce": "median"})
