"""Items are computed in threads of one, in order, without gradients; an error of one item is the caller's."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from workbench.kernels import parallel
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


def test_items_write_into_tensors_of_inference_mode() -> None:
    """Negative control: a thread that is not in that mode may not."""

    def write(n: int) -> None:
        result[n] = n

    with torch.inference_mode():
        result = torch.zeros(4)
        parallel_map(write, range(4))
        with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="inference tensor"):
            other.submit(write, 0).result()
    assert result.tolist() == [0, 1, 2, 3]


class NoBarrier:
    """Let every thread through at once."""

    def __init__(self, parties: int) -> None:
        pass

    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("barrier", "default"), [(threading.Barrier, 2), (NoBarrier, 1)], ids=["right", "control"])
def test_a_thread_that_begins_late_leaves_the_default_to_the_caller(
    monkeypatch: pytest.MonkeyPatch, barrier: type, default: int
) -> None:
    """The negative control does not wait for the second thread, which then sets the default of new threads to 1."""
    first = threading.Semaphore(1)
    one_thread, both_run = parallel._one_thread, threading.Barrier(2)

    def begin() -> None:
        if not first.acquire(blocking=False):
            time.sleep(0.3)
        one_thread()

    monkeypatch.setattr(parallel, "_one_thread", begin)
    monkeypatch.setattr(threading, "Barrier", barrier)
    before = torch.get_num_threads()
    try:
        pool = parallel._pool.__wrapped__(2)
        both = pool.submit(both_run.wait), pool.submit(both_run.wait)
        assert {future.result() for future in both} == {0, 1}, "each thread has begun"
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == default
        assert set(pool.map(lambda _: torch.get_num_threads(), range(4))) == {1}
    finally:
        torch.set_num_threads(before)


def test_an_error_reaches_the_caller() -> None:
    def run(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    with pytest.raises(ValueError, match="item 3"):
        parallel_map(run, range(5))
