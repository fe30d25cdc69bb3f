"""Recorders: hooks that store activations on the CPU, one tensor for each hook point, tokens on the first axis.

A recorder sees the model as any other hook does, so recording costs what hooking costs and nothing else.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from workbench.hooks.hook_points import recomputing

HookFunction = Callable[..., None]


class Recorder:
    """Keeps the activations of named hook points, in the dtype asked for, until `take`.

    Several forward passes in a row are concatenated along the tokens.
    """

    def __init__(self, wanted: Mapping[str, torch.dtype]) -> None:
        self.wanted = dict(wanted)
        self._recorded: dict[str, list[Tensor]] = {name: [] for name in wanted}
        self._devices: set[torch.device] = set()  # GPUs that may still be copying

    @property
    def fwd_hooks(self) -> list[tuple[str, HookFunction]]:
        """Return the hooks for `model.hooks(fwd_hooks=…)` or `run_with_hooks`."""
        return [(name, partial(self._keep, dtype=dtype)) for name, dtype in self.wanted.items()]

    def _keep(self, activation: Shaped[Tensor, "batch pos *feature"], hook: HookPoint, dtype: torch.dtype) -> None:
        if recomputing():
            return
        assert hook.name is not None
        self._recorded[hook.name].append(_to_host(activation.detach().flatten(0, 1), dtype))
        if activation.is_cuda:
            self._devices.add(activation.device)

    def take(self) -> dict[str, Shaped[Tensor, "tokens *feature"]]:
        """Return the values that were recorded since the last call.

        Raises:
            RuntimeError: a hook point was not reached, as no pass ran while the hooks were on the model.
        """
        silent = [name for name, parts in self._recorded.items() if not parts]
        if silent:
            raise RuntimeError(f"these hook points never fired: {silent}; run a pass while the hooks are on the model")
        for device in self._devices:
            torch.cuda.synchronize(device)
        # Pinned memory is used again: what is returned is a copy.
        taken = {
            name: parts[0] if len(parts) == 1 and not parts[0].is_pinned() else torch.cat(parts)
            for name, parts in self._recorded.items()
        }
        self._recorded = {name: [] for name in self.wanted}
        return taken


def _to_host(x: Shaped[Tensor, "tokens *feature"], dtype: torch.dtype) -> Shaped[Tensor, "tokens *feature"]:
    """Return a copy on the CPU; a GPU goes on while it copies, in the order of its work, into pinned memory."""
    if not x.is_cuda:
        return x.to("cpu", dtype, copy=True)
    return torch.empty(x.shape, dtype=dtype, pin_memory=True).copy_(x.to(dtype), non_blocking=True)


class SequenceRecorder:
    """The same for every sequence by itself, whatever the passes are: a padded batch, a packed row, a generation.

    A model that generates runs every token but the last: what is recorded ends one before the transcript.
    """

    def __init__(self, model: Any, wanted: Mapping[str, torch.dtype]) -> None:
        self._model = model
        self._recorder = Recorder(wanted)
        self._sequences: dict[str, list[Tensor]] = {name: [] for name in wanted}

    @property
    def fwd_hooks(self) -> list[tuple[str, HookFunction]]:
        """Return the hooks for `model.hooks(fwd_hooks=…)` or `run_with_hooks`."""
        return [(name, partial(self._keep, keep=keep)) for name, keep in self._recorder.fwd_hooks]

    def _keep(self, activation: Shaped[Tensor, "batch pos *feature"], hook: HookPoint, keep: HookFunction) -> None:
        if recomputing():
            return
        assert hook.name is not None
        self._sequences[hook.name].append(self._model.context.sequence.flatten())
        keep(activation, hook)

    def take(self) -> list[dict[str, Shaped[Tensor, "pos *feature"]]]:
        """Return the values that were recorded since the last call, of every sequence in its order."""
        taken = self._recorder.take()
        owners = {name: torch.cat(parts) for name, parts in self._sequences.items()}
        self._sequences = {name: [] for name in owners}
        n = max((int(owner.max()) + 1 for owner in owners.values()), default=0)
        return [{name: taken[name][owners[name] == i] for name in taken} for i in range(n)]
