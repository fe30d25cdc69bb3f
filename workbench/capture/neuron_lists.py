"""The largest activations of every expert neuron in one unit, kept while the model runs, on the model's device.

A list has room for `N_NEURON_EXAMPLES` tokens for each channel, layer, expert and neuron, so its size does not depend
on the number of tokens. Largest means by absolute value: an activation of SwiGLU has either sign. Beside them are the
activations at a random sample of `N_NEURON_RANDOM` tokens of each channel, layer and expert, which show what a neuron
does at most tokens. The sample is chosen as that of `workbench.runs.examples`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from workbench.harmony.labels import CHANNELS
from workbench.model.config import Config
from workbench.runs.examples import sample_keys, smallest
from workbench.runs.schema import N_NEURON_EXAMPLES, N_NEURON_RANDOM, NEURON_FIELDS, Spec

_NO_KEY = np.uint64(1 << 63)  # above every key of a token
_CHOSEN, _POST = "mlp.hook_expert_indices", "mlp.experts.hook_post"


class _Sample(NamedTuple):
    """The random sample of a layer: keys and rows of tokens, and the activations there; empty places have no row."""

    keys: UInt64[np.ndarray, "cell example"]
    rows: Int[np.ndarray, "cell example"]
    values: Float[Tensor, "cell example neuron"]


class NeuronLists:
    """The lists of a unit: `start` with its tokens, `begin` before each pass, `take` at the end."""

    def __init__(self, spec: Spec, cfg: Config) -> None:
        self._layers, self._cfg = spec.neuron_layers, cfg
        self._chosen: Int[Tensor, "pos slot"]
        self._at = slice(0, 0)

    @property
    def fwd_hooks(self) -> list[tuple[str, Any]]:
        """Return the hooks for `model.hooks(fwd_hooks=…)`."""
        return [
            (f"blocks.{layer}.{name}", hook)
            for layer in self._layers
            for name, hook in ((_CHOSEN, self._choose), (_POST, self._add))
        ]

    def start(self, tokens: dict[str, np.ndarray]) -> None:
        """Begin a unit of tokens: their `sequence`, `position` and `channel` [token]."""
        self._tokens, self._at = tokens, slice(0, 0)
        self._channel = torch.from_numpy(tokens["channel"].astype(np.int64))
        shape = (len(CHANNELS) * self._cfg.num_experts, N_NEURON_EXAMPLES, self._cfg.d_mlp)
        self._shape, self._values, self._rows = shape, {}, {}  # type: ignore[var-annotated]
        self._samples: dict[int, _Sample] = {}

    def begin(self, n: int) -> None:
        """Begin a pass over the next n tokens."""
        self._at = slice(self._at.stop, self._at.stop + n)

    def _choose(self, x: Tensor, hook: Any) -> None:
        self._chosen = x.detach()[0].long()

    @torch.no_grad()
    def _add(self, x: Tensor, hook: Any) -> None:
        """Take this pass's activations [1 pos slot neuron] of a layer into its lists."""
        layer = int(hook.name.split(".")[1])
        if layer not in self._values:
            self._values[layer] = torch.zeros(self._shape, dtype=torch.float16, device=x.device)
            self._rows[layer] = torch.full(self._shape, -1, dtype=torch.int32, device=x.device)
        values, rows = self._values[layer], self._rows[layer]
        post = x.detach()[0].flatten(0, 1).to(torch.float16)
        cell = self._channel[self._at].to(x.device)[:, None] * self._cfg.num_experts + self._chosen.to(x.device)
        order = cell.flatten().argsort(stable=True)
        counts = torch.bincount(cell.flatten(), minlength=len(values)).tolist()
        row_of = (order // cell.shape[1] + self._at.start).to(torch.int32)
        self._sample(layer, cell.flatten().cpu().numpy().astype(np.uint64), post)
        stop = 0
        for number, n in enumerate(counts):
            start, stop = stop, stop + n
            if n:
                self._merge(values[number], rows[number], post[order[start:stop]], row_of[start:stop])

    def _sample(self, layer: int, cell: UInt64[np.ndarray, " slot"], post: Float[Tensor, "slot neuron"]) -> None:
        """Take this pass's tokens of a layer into its random sample. cell: number of each slot's channel and expert."""
        if layer not in self._samples:
            shape = (self._shape[0], N_NEURON_RANDOM)
            empty = torch.zeros((*shape, self._cfg.d_mlp), dtype=torch.float16, device=post.device)
            self._samples[layer] = _Sample(np.full(shape, _NO_KEY), np.full(shape, -1), empty)
        sample = self._samples[layer]
        row = np.repeat(np.arange(self._at.start, self._at.stop), len(cell) // max(1, self._at.stop - self._at.start))
        expert = cell % np.uint64(self._cfg.num_experts)
        key = sample_keys(self._tokens["sequence"][row], self._tokens["position"][row], layer, expert)
        picked, there = smallest(cell, key, len(sample.keys), N_NEURON_RANDOM)
        keys = np.concatenate([sample.keys, np.where(there, key[picked], _NO_KEY)], axis=1)
        rows = np.concatenate([sample.rows, np.where(there, row[picked], -1)], axis=1)
        best = np.argsort(keys, axis=1, kind="stable")[:, :N_NEURON_RANDOM]
        both = torch.cat([sample.values, post[torch.from_numpy(picked).to(post.device)]], dim=1)
        index = torch.from_numpy(best).to(post.device)[..., None].expand(-1, -1, both.shape[-1])
        self._samples[layer] = _Sample(
            np.take_along_axis(keys, best, 1), np.take_along_axis(rows, best, 1), both.gather(1, index)
        )

    @staticmethod
    def _merge(
        values: Float[Tensor, "example neuron"],
        rows: Int[Tensor, "example neuron"],
        new: Float[Tensor, "token neuron"],
        new_rows: Int[Tensor, " token"],
    ) -> None:
        """Put the largest of old and new activations into a list, in place."""
        both = torch.cat([values, new])
        size = torch.cat([torch.where(rows >= 0, values.abs(), -1.0), new.abs()])
        best = size.topk(len(values), dim=0).indices
        from_rows = torch.cat([rows, new_rows[:, None].expand(-1, rows.shape[1])])
        values.copy_(both.gather(0, best))
        rows.copy_(from_rows.gather(0, best))

    def take(self) -> dict[str, np.ndarray]:
        """Return the lists [channel layer expert neuron example] by the names of their arrays.

        The places of the random sample are [channel layer expert example], the same for all neurons.
        """
        shape = (len(CHANNELS), self._cfg.num_experts, *self._shape[1:])
        values, rows = (
            np.stack([part[layer].cpu().numpy().reshape(shape).swapaxes(-1, -2) for layer in self._layers], axis=1)
            for part in (self._values, self._rows)
        )
        lists = {"activation": np.where(rows < 0, np.float16(0), values)}
        for name in ("sequence", "position"):
            lists[name] = np.where(rows < 0, -1, self._tokens[name][np.maximum(rows, 0)])
        samples = [self._samples[layer] for layer in self._layers]
        random_rows = np.stack([sample.rows.reshape(*shape[:2], -1) for sample in samples], axis=1)
        random_values = np.stack(
            [sample.values.cpu().numpy().reshape(*shape[:2], *sample.values.shape[1:]) for sample in samples], axis=1
        ).swapaxes(-1, -2)
        lists["random_activation"] = np.where(random_rows[..., None, :] < 0, np.float16(0), random_values)
        for name in ("sequence", "position"):
            lists[f"random_{name}"] = np.where(random_rows < 0, -1, self._tokens[name][np.maximum(random_rows, 0)])
        return {
            f"neurons/{kind}{name}": lists[f"{kind}{name}"].astype(dtype)
            for kind in ("", "random_")
            for name, (dtype, _) in NEURON_FIELDS.items()
        }
