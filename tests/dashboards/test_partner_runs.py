"""Which of several runs is compared first: the one that holds the same transcripts."""

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from workbench.dashboards.partner_runs import chosen_partner, partners, sentence
from workbench.dashboards.state import Selection
from workbench.errors import InputError


def run_of(ids: str, length: int = 20) -> Any:
    """Return a run with a conversation for each letter."""
    columns = {"id": list(ids), "length": [length] * len(ids), "n_prompt": [5] * len(ids)}
    return SimpleNamespace(sequences=pd.DataFrame(columns))


RUNS = {
    "shown": run_of("abc"),
    "foreign": run_of("xyz"),
    "part": run_of("abz"),
    "other order": run_of("cba"),
    "larger": run_of("abcd"),
    "longer": run_of("abc", length=21),
    "same": run_of("abc"),
    "same too": run_of("abc"),
}


def session(**query: str) -> Any:
    def other_run(name: str) -> Any:
        if name == "damaged":
            raise InputError("zarr.json is missing")
        return RUNS[name]

    registry = SimpleNamespace(names=["damaged", *RUNS])
    return SimpleNamespace(
        name="shown", run=RUNS["shown"], registry=registry, other_run=other_run, choice=Selection(query)
    )


def test_the_run_with_the_same_transcripts_comes_first() -> None:
    listed = partners(session())
    names = [one.name for one in listed]
    assert names[:5] == ["same", "same too", "other order", "larger", "part"]
    assert set(names[5:]) == {"damaged", "foreign", "longer"}
    assert names != session().registry.names, "negative control: not the order of the command line"
    first = chosen_partner(session(), listed)
    assert first is not None
    assert sentence(first, listed) == "same holds the same 3 transcripts, so both are compared token by token."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("part", "part holds 2 of the 3 transcripts of this run, so they cannot be compared token by token."),
        ("other order", "other order holds 3 of the 3 transcripts of this run in another order, so they"),
        ("larger", "larger holds 3 of the 3 transcripts of this run beside 1 other, so they cannot be compared"),
        ("longer", "longer holds none of the 3 transcripts of this run, so they"),
        ("damaged", "damaged cannot be read: zarr.json is missing"),
    ],
)
def test_the_run_that_an_address_names_is_taken_and_the_better_one_is_named(name: str, text: str) -> None:
    listed = partners(session())
    chosen = chosen_partner(session(**{"with": name}), listed)
    assert chosen is not None
    assert chosen.name == name
    assert sentence(chosen, listed).startswith(text)
    assert sentence(chosen, listed).endswith("same holds the same 3 transcripts, so both are compared token by token.")
    assert sentence(chosen, [chosen]) == chosen.reason(), "negative control: no run is better"


def test_a_single_run_has_no_partner() -> None:
    alone = session()
    alone.registry.names = ["shown"]
    assert chosen_partner(alone, partners(alone)) is None
