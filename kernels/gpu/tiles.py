"""Every tile choice in one place: by kernel, problem size and target, with the reason beside it.

A tile is the constants a kernel is compiled with. The resources each takes on every target are in REPORT.md, made by
`workbench bench kernels`; `workbench bench gpu --autotune` measures the alternatives on a card.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Block sizes by name (the kernel's constexprs), warps and software pipeline stages."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
