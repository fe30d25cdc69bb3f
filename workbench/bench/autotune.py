"""Tune tiles by measurement: from each tile that a case uses, change one option at a time while the time falls."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from workbench.bench.cases import Case, row_error
from workbench.bench.timing import Clock
from workbench.kernels.gpu import tiles
from workbench.kernels.gpu.tiles import Tile

_GAIN = 0.97  # a change that wins less than 3 % is noise
_SAME = 2**-6  # the most that a row may differ when only the order of sums changed
_CAPS = (None, 128, 168)
Families = dict[str, Callable[..., Tile]]


def families() -> Families:
    """Return every function of `tiles` that chooses a tile, by name."""
    members = inspect.getmembers(tiles, inspect.isfunction)
    return {name: f for name, f in members if inspect.signature(f).return_annotation is Tile}


@contextmanager
def choosing(choose: Callable[[str, Tile], Tile]) -> Iterator[None]:
    """Launch, within the context, the tile that `choose` returns for a family's name and its own tile."""
    own = families()

    def chosen(name: str) -> Callable[..., Tile]:
        return lambda *args: choose(name, own[name](*args))

    for name in own:
        setattr(tiles, name, chosen(name))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(tiles, name, function)


def neighbours(tile: Tile) -> Iterator[Tile]:
    """Yield tiles one step away: a block doubled or halved, warps likewise, a stage more or less, another register cap.

    Tiles that no kernel can use are left out. A BLOCK_M of 8, for example, gave NaN when decoding two tokens at once.
    """
    for name, size in tile.blocks.items():
        for changed in (size * 2, size // 2):
            if tiles.fits(other := tile._replace(blocks={**tile.blocks, name: changed})):
                yield other
    for warps in (tile.num_warps * 2, tile.num_warps // 2):
        if 1 <= warps <= 16:
            yield tile._replace(num_warps=warps)
    for stages in (tile.num_stages + 1, tile.num_stages - 1):
        if stages:
            yield tile._replace(num_stages=stages)
    for cap in _CAPS:
        if cap != tile.max_registers:
            yield tile._replace(max_registers=cap)


def used(case: Case) -> list[tuple[str, Tile]]:
    """Return the families a case asks, and the tiles they answer with."""
    asked: list[tuple[str, Tile]] = []

    def note(name: str, own: Tile) -> Tile:
        if (name, own) not in asked:
            asked.append((name, own))
        return own

    with choosing(note):
        case.launch()
    return asked


def tune(clock: Clock, case: Case, family: str, own: Tile) -> tuple[Tile, float, float]:
    """Return the best tile found in place of `own`, its seconds and own's."""
    want = [t.double().cpu() if t.is_floating_point() else t.cpu() for t in case.launch()]

    def seconds(tile: Tile) -> float:
        """Return the time of a tile: infinite if it does not compile, does not fit, or computes something else."""
        with choosing(lambda name, its: tile if (name, its) == (family, own) else its):
            try:
                if any(row_error(g, w) > _SAME for g, w in zip(case.launch(), want, strict=True)):
                    return float("inf")
                return clock(case.launch)
            except Exception:  # a compiler's refusal has as many types as there are compilers
                return float("inf")

    best, tried = own, {str(own)}
    time = first = seconds(own)
    improved = True
    while improved:
        improved = False
        for tile in neighbours(best):
            if str(tile) not in tried:
                tried.add(str(tile))
                if (took := seconds(tile)) < time * _GAIN:
                    best, time, improved = tile, took, True
                    break
    return best, time, first


def autotune(clock: Clock, cases: Iterable[Case]) -> dict[str, Any]:
    """Return winners as `tiles.measured` reads them: target → family → pairs of own tile and replacement.

    Of several cases that use one tile the slowest decides, the one that a wrong choice would cost most.
    """
    slowest: dict[tuple[str, str], tuple[float, Case, Tile]] = {}
    for case in cases:
        took = clock(case.launch)
        for family, own in used(case):
            key = (family, str(own))
            if key not in slowest or took > slowest[key][0]:
                slowest[key] = (took, case, own)
    target, winners = tiles.target(torch.empty(0, device=clock.device)), dict[str, list[Any]]()
    for (family, _), (_, case, own) in slowest.items():
        best, time, first = tune(clock, case, family, own)
        print(f"{family} for {case.kernel}, {case.problem}: {first * 1e6:.1f} → {time * 1e6:.1f} µs with {best}")
        if best != own:
            winners.setdefault(family, []).append([own, best])
    return {target: winners}
