"""The plan of a capture: which sequences make up which unit, known before the first forward pass."""

from collections.abc import Sequence

from workbench.errors import InputError
from workbench.runs.schema import CHUNK, Layout, Unit


def plan_units(lengths: Sequence[int], unit_tokens: int = 16_384) -> Layout:
    """Return the units of a run: sequences are packed in their order until the next one does not fit.

    A sequence longer than a unit gets one of its own, of as many times the capacity as it needs. Order is kept so
    that a unit's sequences, and what is stored for them, are neighbours; what that wastes compresses to nothing.

    Raises:
        InputError: `unit_tokens` is not a multiple of a chunk, or a sequence is empty.
    """
    if unit_tokens < CHUNK or unit_tokens % CHUNK:
        raise InputError(
            f"--unit-tokens {unit_tokens}: a unit consists of complete chunks of {CHUNK:,} tokens, so a multiple of "
            "that"
        )
    if not lengths or min(lengths) < 1:
        raise InputError("there is nothing to capture: every sequence needs at least one token")
    groups: list[list[int]] = []
    room = 0
    for sequence, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = -(-length // unit_tokens) * unit_tokens
        groups[-1].append(sequence)
        room -= length
    units: list[Unit] = []
    offsets: list[int] = []
    start = 0
    for index, group in enumerate(groups):
        row = start
        for sequence in group:
            offsets.append(row)
            row += lengths[sequence]
        capacity = -(-(row - start) // unit_tokens) * unit_tokens
        units.append(Unit(index, start, capacity, tuple(group)))
        start += capacity
    return Layout(unit_tokens, tuple(units), tuple(offsets), tuple(int(n) for n in lengths))
