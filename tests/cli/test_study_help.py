"""Options of studies are JSON where they can be, and the help lists every study and experiment of the registry."""

import pytest

from workbench.cli.study_help import describe, parse_options
from workbench.errors import InputError
from workbench.registry import Experiment, records


def test_a_value_is_json_where_it_can_be() -> None:
    assert parse_options(["controls=20", "names=[1, 2]", "kind=raw", "flag=true"]) == {
        "controls": 20,
        "names": [1, 2],
        "kind": "raw",
        "flag": True,
    }


@pytest.mark.parametrize("pairs", [["controls"], ["=3"], ["a=1", "a=2"], ["seed=1"], ["a b=1"]])
def test_a_wrong_pair_is_refused(pairs: list[str]) -> None:
    with pytest.raises(InputError, match="expected NAME=VALUE, each name once"):
        parse_options(pairs)


def test_every_record_is_described_with_what_it_needs() -> None:
    described = {record.name: describe(record) for record in records()}
    for record in records():
        text = described[record.name]
        assert text.startswith(f"{record.name}: {record.question}")
        assert ("--model" in text) == isinstance(record, Experiment)
        assert all(f"--option {name}=" in text for name in record.options)
