"""Compute experts in parallel: a thread computes one expert, instead of all threads sharing its small matmuls.

Unpacking and a matmul of a few dozen rows do not spread over cores by themselves. Measured, two threads (Zen 4),
a layer of gpt-oss-20b's width: 64 tokens 1.45 × as fast, 512 tokens 1.3 ×, 2,048 tokens 1.15 ×.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_map(run: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return `run` of every item, in order, computed on as many threads as torch may use, without gradients."""

    inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():  # a thread has its own modes
            return run(item)

    return list(_pool(torch.get_num_threads()).map(alone, items))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "experts", _one_thread)
    all_begun = threading.Barrier(threads)  # a thread that ends its first task early must not take another's
    for future in [pool.submit(all_begun.wait) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(threads)  # what a thread sets for itself is also the default of threads to come
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # torch takes the default at the first question in every thread, here
    torch.set_num_threads(1)
