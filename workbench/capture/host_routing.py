"""Capture with the routing of a host: every router's choice is replaced by the experts that the host selected.

Gates, sinks and activations then belong to the host's path. The router's own choice on this path is recorded beside
it, with the margin by which it was made: the k-th less the (k+1)-th router logit.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError
from workbench.harmony.hosts.routing import read_experts, sidecar
from workbench.harmony.transcripts import Transcript
from workbench.model.config import Config


def with_host_routes(rows: Sequence[Transcript], transcripts: str | Path, cfg: Config) -> list[Transcript]:
    """Return the transcripts with the experts that the host chose.

    Raises:
        InputError: a row has none, or those of another model.
    """
    if not sidecar(transcripts).exists():
        raise InputError(
            f"{sidecar(transcripts)} is missing: collect the transcripts with `workbench transcripts --routing`"
        )
    routed = []
    for row in rows:
        experts = read_experts(transcripts, row.id)
        shape = (cfg.n_layers, cfg.experts_per_token)
        own = np.array([cfg.experts_of(layer) for layer in range(cfg.n_layers)])[:, None]
        if experts.shape[1:] != shape or (experts >= own).any():
            raise InputError(
                f"the host's experts of {ascii(row.id)[:60]} have {experts.shape[1]} layers and {experts.shape[2]} "
                f"experts a token, up to number {int(experts.max())}; the model has {shape[0]} layers, {shape[1]} of "
                f"{cfg.num_experts} experts: is it the model that the host ran?"
            )
        if not len(row.tokens) - 1 <= len(experts) <= len(row.tokens):
            raise InputError(
                f"the host's experts of {ascii(row.id)[:60]} are of {len(experts)} tokens, the row has "
                f"{len(row.tokens)}"
            )
        routed.append(replace(row, experts=experts))
    return routed


class HostRoutes:
    """Hooks that force a host's experts, and the record of what the routers would have chosen."""

    def __init__(self, cfg: Config) -> None:
        self._k, self._n_layers = cfg.experts_per_token, cfg.n_layers
        self._dtype = np.uint8 if cfg.num_experts <= 256 else np.uint16
        self._experts: Tensor = torch.empty(0)
        self._forced: Tensor = torch.empty(0)
        self._choices: list[list[np.ndarray]] = [[] for _ in range(cfg.n_layers)]
        self._margins: list[list[np.ndarray]] = [[] for _ in range(cfg.n_layers)]
        self._masks: list[np.ndarray] = []

    @property
    def fwd_hooks(self) -> list[tuple[str, Any]]:
        """Return the hooks for `model.hooks(fwd_hooks=…)`, after hooks that record router logits."""
        return [(f"blocks.{layer}.mlp.router.hook_out", self._force(layer)) for layer in range(self._n_layers)]

    def begin(self, batch: Sequence[Transcript]) -> None:
        """The next pass runs these sequences, packed."""
        tables, masks = [], []
        for row in batch:
            assert row.experts is not None
            missing = len(row.tokens) - len(row.experts)  # the host never runs the last token
            tables.append(np.concatenate([row.experts, np.repeat(row.experts[:1], missing, 0)]))
            masks.append(np.arange(len(row.tokens)) < len(row.experts))
        self._experts = torch.from_numpy(np.concatenate(tables).astype(np.int64))
        self._forced = torch.from_numpy(np.concatenate(masks))
        self._masks.append(self._forced.numpy())

    def _force(self, layer: int) -> Any:
        def act(logits: Tensor, hook: Any) -> Tensor:
            best = logits[0].float().topk(self._k + 1, dim=-1)
            self._choices[layer].append(best.indices[:, : self._k].cpu().numpy().astype(self._dtype))
            margin = (best.values[:, -2] - best.values[:, -1]).cpu().numpy()
            self._margins[layer].append(margin.astype(np.float16))
            allowed = torch.zeros_like(logits[0], dtype=torch.bool)
            allowed.scatter_(1, self._experts[:, layer].to(logits.device), True)
            allowed |= ~self._forced.to(logits.device)[:, None]
            return logits.masked_fill(~allowed[None], float("-inf"))

        return act

    def take(self) -> dict[str, np.ndarray]:
        """Return the values that were recorded since the hooks were made, name → [layer token ...]."""
        return {
            "own_experts": np.stack([np.concatenate(choices) for choices in self._choices]),
            "router_margin": np.stack([np.concatenate(margins) for margins in self._margins]),
            "forced": np.concatenate(self._masks),
        }
