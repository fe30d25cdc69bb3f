"""Items are computed in threads of one, in order, without gradients; an error of one item is the caller's."""

import threading

import pytest
import torch

from workbench.kernels.parallel import parallel_map


def test_results_are_in_the_order_of_the_items() -> None:
    x = torch.randn(40, 5)
    sums = parallel_map(lambda row: float(x[row].sum()), range(40))
    assert sums == [float(row.sum()) for row in x]
    assert parallel_map(lambda row: row, []) == []


def test_items_run_without_gradients_in_threads_of_their_own() -> None:
    weight = torch.ones(3, requires_grad=True)

    def run(_: int) -> tuple[bool, bool, int]:
        return (
            (weight * 2).requires_grad,
            threading.current_thread() is threading.main_thread(),
            torch.get_num_threads(),
        )

    before = torch.get_num_threads()
    assert set(parallel_map(run, range(8))) == {(False, False, 1)}
    assert torch.get_num_threads() == before
    assert (weight * 2).requires_grad  # the caller's mode is unchanged


def test_an_error_reaches_the_caller() -> None:
    def run(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with pytest.raises(ValueError, match="item 3"):
        parallel_map(run, range(5))
