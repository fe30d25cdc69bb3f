"""Numbers, dtypes and options of studies as the command line reads them."""

import pytest
import torch
import typer

from tests.cli.random_commands import without_long_work
from tests.cli.running import run_command
from tests.conftest import DATA
from workbench.cli.options import torch_dtype, whole_number
from workbench.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"), [("5000000", 5_000_000), ("5_000_000", 5_000_000), ("5e6", 5_000_000), (7, 7)]
)
def test_a_whole_number_is_read_in_every_form(text: str | int, value: int) -> None:
    assert whole_number(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "inf", "nan", "1e99", ""])
def test_another_number_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected a positive whole number"):
        whole_number(text)


def test_two_dtypes_are_offered() -> None:
    assert (torch_dtype("bfloat16"), torch_dtype("float32")) == (torch.bfloat16, torch.float32)
    with pytest.raises(InputError, match="--dtype 'float16': choose one of bfloat16, float32"):
        torch_dtype("float16")


@pytest.mark.parametrize("option", ["--recipes", "--vector", "--sae"])
def test_options_of_the_page_live_need_a_model(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_command("dashboard", str(DATA / "demo.zarr"), option, "a=b")
    assert (done.code, done.problem()) == (2, "")
    assert f"{option} is for the model of the pages: add --model" in done.err
    without_long_work(monkeypatch)
    served = run_command("dashboard", str(DATA / "demo.zarr"), "--port", "45006")
    assert "the test ends here" in served.err, "negative control: without the option it is served"
