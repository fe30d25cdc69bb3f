"""Edits: the functions of an intervention at hook points, applied to a model within a context.

`with applied(model, edit, …) as report:` holds for whatever runs inside: a forward pass, packed or padded, a capture,
every step of a generation. Edits at one point act in the order given; hooks added inside see what is left of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.hook_points import recomputing

TokenSet = Callable[[Int[np.ndarray, " pos"]], Bool[np.ndarray, " pos"]]  # of a sequence's ids, which are in the set
Tokens = TokenSet | Sequence[int] | slice | None  # a set (see harmony.token_set), positions, or every token


class PassContext(Protocol):
    """What is known of the tokens of a pass; the model's `context`."""

    positions: Int[Tensor, "batch pos"]
    sequence: Int[Tensor, "batch pos"]

    def mask(self, members: TokenSet) -> Bool[Tensor, "batch pos"]: ...
    def key_mask(self, members: TokenSet) -> Bool[Tensor, "batch key"]: ...


class At(NamedTuple):
    """Where an edit acts: the model and layer, the tokens of the pass, and the choices of this layer's router.

    seen: the "input" of this layer's router before the norm's weight, its "logits" after all edits, the "unedited"
    choice of experts, and "experts", the choice after all edits. Only what is watched, as far as the pass has come.
    """

    model: Any
    layer: int
    context: PassContext
    seen: dict[str, Tensor]

    def selected(self, tokens: TokenSet) -> Bool[Tensor, "batch pos"]:
        """Return which tokens of the pass are in the set, on the CPU; padding never is."""
        return self.context.mask(tokens)


Act = Callable[[Tensor, At], tuple[Tensor, int, Tensor | int]]  # edited, tokens selected, entries changed


@dataclass(frozen=True)
class Edit:
    """Functions at hook points, and their description. `points` returns a model's hook points or refuses missing ones.

    watches: what the acts read of `At.seen`.
    """

    description: str
    points: Callable[[Any], list[tuple[str, Act]]]
    watches: tuple[str, ...] = ()


@dataclass
class Matched:
    """How many tokens an edit has matched, and how many entries it changed (slots, sinks, pairs, vectors)."""

    description: str
    tokens: int = 0
    _changed: dict[torch.device, Tensor] = field(default_factory=dict)

    def count(self, tokens: int, changed: Tensor | int) -> None:
        """Add the numbers of tokens of a pass and of changed ones (a number or a tensor [])."""
        self.tokens += tokens
        here = torch.as_tensor(changed)
        self._changed[here.device] = self._changed.get(here.device, 0) + here  # summed there: no wait for a GPU

    @property
    def changed(self) -> int:
        """Return how many entries were changed so far."""
        return sum(int(n) for n in self._changed.values())

    def __repr__(self) -> str:
        return f"{self.description}: {self.tokens:,} tokens, {self.changed:,} entries changed"


_SEEN_AT = {
    "input": "ln2.hook_normalized",
    "logits": "mlp.router.hook_out",
    "unedited": "mlp.hook_expert_indices",
    "experts": "mlp.hook_expert_indices",
}


@contextmanager
def applied(model: Any, *edits: Edit, need_match: bool = True) -> Iterator[list[Matched]]:
    """Apply edits to the model within the context, and yield how many tokens each has matched so far.

    need_match: refuse an edit that met no token. Switch it off where the report is shown instead.

    Raises:
        InputError: an edit has matched no token by the end of the context, or returns a tensor of another shape.
    """
    report = [Matched(edit.description) for edit in edits]
    seen: dict[int, dict[str, Tensor]] = {}
    acts = [
        (name, act, matched) for edit, matched in zip(edits, report, strict=True) for name, act in edit.points(model)
    ]
    watched = {(_layer(name), what) for edit in edits for name, _ in edit.points(model) for what in edit.watches}

    def hook(act: Act, matched: Matched, layer: int) -> Callable[..., Tensor]:
        def run(tensor: Tensor, hook: Any) -> Tensor:
            out, tokens, changed = act(tensor, At(model, layer, model.context, seen.setdefault(layer, {})))
            if out.shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)} became {tuple(out.shape)}"
                raise InputError(f"{matched.description}: {shapes}; return a tensor of the shape that the edit got")
            if not recomputing():
                matched.count(tokens, changed)
            return out.to(tensor.dtype)

        return run

    def look(layer: int, what: str) -> Callable[..., None]:
        def record_hook(tensor: Tensor, hook: Any) -> None:
            seen.setdefault(layer, {})[what] = tensor

        return record_hook

    looks = [(f"blocks.{layer}.{_SEEN_AT[what]}", look(layer, what), what) for layer, what in sorted(watched)]
    before = [(name, record) for name, record, what in looks if what == "unedited"]
    after = [(name, record) for name, record, what in looks if what != "unedited"]
    between = [(name, hook(act, matched, _layer(name))) for name, act, matched in acts]
    with model.hooks(fwd_hooks=[*before, *between, *after]):
        yield report
    if need_match and (unmatched := [matched.description for matched in report if not matched.tokens]):
        raise InputError(
            f"no token matched {'; '.join(unmatched)}: either no pass ran inside the context, or the token set is "
            "empty: check it with token_set(ids)"
        )


def _layer(name: str) -> int:
    """Return the layer of a hook point; −1 for those outside the blocks."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


class Positions:
    """Positions as a token set; negative ones count from a sequence's end."""

    def __init__(self, which: Sequence[int] | slice) -> None:
        self._which = which if isinstance(which, slice) else list(which)

    def __call__(self, ids: Int[np.ndarray, " pos"]) -> Bool[np.ndarray, " pos"]:
        n = len(ids)
        if isinstance(self._which, slice):
            chosen = np.zeros(n, dtype=bool)
            chosen[self._which] = True
            return chosen
        return np.isin(np.arange(n), [i % n for i in self._which if -n <= i < n])


EVERY_TOKEN = Positions(slice(None))  # one object, by which a pass recognises it and reads no token


def as_set(tokens: Tokens) -> TokenSet:
    """Return a token set from any form in which tokens can be given."""
    if tokens is None:
        return EVERY_TOKEN
    if isinstance(tokens, slice | Sequence):
        return Positions(tokens)
    return tokens
