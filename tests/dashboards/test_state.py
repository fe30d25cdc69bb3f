"""The selection of a link, and what the sessions of a server share."""

from concurrent.futures import ThreadPoolExecutor
from urllib.parse import parse_qsl

from tests.conftest import DATA
from workbench.dashboards.state import RunRegistry, Selection


def test_a_choice_survives_its_link_and_has_only_its_names() -> None:
    choice = Selection({"channel": "final", "effort": "<script>", "evil": "x", "layer": "3"})
    assert choice.get("channel", ["analysis", "final"]) == "final"
    assert choice.get("effort", ["low", "high"], "high") == "high"
    assert choice.get("expert", ["0", "1"]) == "0"
    assert choice.get("expert", []) == ""
    choice.put(channel="analysis", layer="")
    again = Selection(dict(parse_qsl(choice.query(theme="dark"))))
    assert (again.text("channel"), again.text("layer"), again.text("theme"), again.text("evil")) == (
        "analysis",
        "",
        "dark",
        "",
    )
    assert "<" not in choice.query()


def test_two_sessions_wait_for_one_computation() -> None:
    registry = RunRegistry([DATA / "demo.zarr"])
    made: list[None] = []
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda _: registry._once(("x",), "d", lambda: made.append(1) or object()), range(8)))
    assert len(made) == 1
    assert len({id(f) for f in values}) == 1
