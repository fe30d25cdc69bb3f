"""Examples of the features of an attached autoencoder in one unit, kept while the model runs.

    --record features:saes/layer2

For each channel and feature there are `N_FEATURE_EXAMPLES` tokens with the largest activations, as many random ones of
the tokens that have the feature (an activation above 0), and their number. The size of the lists does not depend on the
number of tokens, and tokens are encoded a few at a time. The random order is that of `workbench.runs.examples`.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt64
from torch import Tensor

from workbench.capture.own_record import axis_sizes
from workbench.capture.recorder import FEATURES, source_digest
from workbench.errors import InputError, JobError
from workbench.harmony.labels import CHANNELS
from workbench.hooks.names import BLOCK
from workbench.hooks.sae import SAE, load_sae
from workbench.model.config import Config
from workbench.runs.examples import sample_keys
from workbench.runs.schema import EXAMPLE_KINDS, FEATURE_FIELDS, N_FEATURE_EXAMPLES, FeatureLists

ENCODED_VALUES = 1 << 22  # at a time, tokens times features
_NO_KEY = np.uint64(2**64 - 1)  # above every key of a token
_HOOK = re.compile(r"blocks\.(\d{1,5})\.(.+)")


def is_record(text: str) -> bool:
    """Return whether a record asks for the examples of an autoencoder's features."""
    return text == FEATURES.rstrip(":") or text.startswith((FEATURES, f"{FEATURES.rstrip(':')} "))


def parse(records: Sequence[str], cfg: Config) -> dict[FeatureLists, SAE]:
    """Return the lists of each record "features:FOLDER", with the autoencoder in its folder.

    Raises:
        InputError: a folder is not named or holds no autoencoder, or its hook point is not named, not the model's, of
            another width, or that of another record.
    """
    autoencoders: dict[FeatureLists, SAE] = {}
    for text in records:
        where, folder = f"--record {text}", text.removeprefix(FEATURES)
        if not text.startswith(FEATURES) or not folder:
            raise InputError(f"{where}: name the folder of an autoencoder, as in {FEATURES}saes/layer2")
        sae = load_sae(folder)
        hook = _checked_hook(where, sae, cfg)
        if hook in {lists.hook for lists in autoencoders}:
            raise InputError(f"{where}: two autoencoders read {hook}: record them in two runs")
        autoencoders[FeatureLists(hook, sae.cfg.d_sae, source_digest(sae.encode))] = sae
    return autoencoders


def _checked_hook(where: str, sae: SAE, cfg: Config) -> str:
    """Return the hook point that an autoencoder names, which the model has in the width that it reads."""
    name = sae.cfg.hook_name
    match = _HOOK.fullmatch(name or "")
    if match is None or not BLOCK.get(match[2], "").startswith("batch pos "):
        raise InputError(
            f"{where}: its configuration names {name!r}, expected a hook point of single tokens as "
            "blocks.2.hook_resid_post: add it to the configuration as hook_name"
        )
    if int(match[1]) >= cfg.n_layers:
        raise InputError(f"{where}: it reads {name}, and the model has layers 0 to {cfg.n_layers - 1}: use its model")
    sizes = list(axis_sizes(BLOCK[match[2]].split()[2:], cfg).values())
    together = sae.cfg.reshape_activations == "hook_z"
    width = int(np.prod(sizes)) if together else sizes[-1]
    if len(sizes) != (2 if together else 1) or width != sae.cfg.d_in:
        raise InputError(f"{where}: it reads a width of {sae.cfg.d_in} at {name}, where the model has {sizes}")
    return str(name)


class BoundedLists:
    """The entries with the n smallest keys of each cell. Its size does not depend on how many entries are added."""

    def __init__(self, n_cells: int, n: int) -> None:
        self.keys: UInt64[np.ndarray, "cell example"] = np.full((n_cells, n), _NO_KEY)
        self.rows: Int[np.ndarray, "cell example"] = np.full((n_cells, n), -1, dtype=np.int32)
        self.values: Float[np.ndarray, "cell example"] = np.zeros((n_cells, n), dtype=np.float32)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the lists."""
        return self.keys.nbytes + self.rows.nbytes + self.values.nbytes

    def add(
        self,
        cell: Int[np.ndarray, " entry"],
        key: UInt64[np.ndarray, " entry"],
        row: Int[np.ndarray, " entry"],
        value: Float[np.ndarray, " entry"],
    ) -> None:
        """Take entries into the lists of their cells."""
        below = key < self.keys[cell, -1]  # once a list is full, few entries are
        cell, key, row, value = cell[below], key[below], row[below], value[below]
        order = np.lexsort((key, cell))
        cells, start, group = np.unique(cell[order], return_index=True, return_inverse=True)
        rank = np.arange(len(order)) - start[group]
        order, group, rank = (entries[rank < self.keys.shape[1]] for entries in (order, group, rank))
        parts = []
        for stored, new in ((self.keys, key), (self.rows, row), (self.values, value)):
            fresh = np.full((len(cells), stored.shape[1]), _NO_KEY if stored is self.keys else -1, dtype=stored.dtype)
            fresh[group, rank] = new[order]
            parts.append(np.concatenate([stored[cells], fresh], axis=1))
        best = np.argsort(parts[0], axis=1, kind="stable")[:, : self.keys.shape[1]]
        for stored, both in zip((self.keys, self.rows, self.values), parts, strict=True):
            stored[cells] = np.take_along_axis(both, best, axis=1)


class FeatureRecorder:
    """The lists of a unit: `start` with its tokens, `begin` before each pass, `take` at the end."""

    def __init__(self, about: FeatureLists, sae: SAE) -> None:
        self._about, self._sae = about, sae
        self._at = slice(0, 0)

    @property
    def fwd_hooks(self) -> list[tuple[str, Any]]:
        """Return the hooks for `model.hooks(fwd_hooks=…)`."""
        return [(self._about.hook, self._add)]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all lists and counts."""
        return self._count.nbytes + sum(lists.nbytes for lists in self._lists.values())

    def start(self, tokens: dict[str, np.ndarray]) -> None:
        """Begin a unit of tokens: their `sequence`, `position` and `channel` [token], ascending."""
        self._tokens, self._at = tokens, slice(0, 0)
        n_cells = len(CHANNELS) * self._about.d_sae
        self._count = np.zeros(n_cells, dtype=np.uint32)
        self._lists = {kind: BoundedLists(n_cells, N_FEATURE_EXAMPLES) for kind in EXAMPLE_KINDS}

    def begin(self, n: int) -> None:
        """Begin a pass over the next n tokens."""
        self._at = slice(self._at.stop, self._at.stop + n)

    @torch.no_grad()
    def _add(self, x: Tensor, hook: Any) -> None:
        """Take the features of this pass's activations [1 pos ...] into the lists."""
        self._sae.to(x.device)
        step = max(1, ENCODED_VALUES // self._about.d_sae)
        for start in range(0, x.shape[1], step):
            acts = self._sae.encode(x.detach()[0, start : start + step]).float()
            if not acts.isfinite().all():
                raise JobError(f"features at {self._about.hook} are not finite: nothing was written; check the weights")
            token, feature = acts.nonzero(as_tuple=True)
            value = acts[token, feature]
            arrays = (part.cpu().numpy() for part in (token, feature, value))
            self._add_entries(self._at.start + start, *arrays)

    def _add_entries(
        self,
        first: int,
        token: Int[np.ndarray, " entry"],
        feature: Int[np.ndarray, " entry"],
        value: Float[np.ndarray, " entry"],
    ) -> None:
        """Take activations above 0 into the lists. first: row of token 0 in the unit."""
        above = value > 0
        row, feature, value = (first + token)[above], feature[above], value[above]
        cell = self._tokens["channel"][row].astype(np.int64) * self._about.d_sae + feature
        self._count += np.bincount(cell, minlength=len(self._count)).astype(np.uint32)
        # the bits of numbers above 0 rise with them; equal ones are in the order of the tokens
        descending = np.uint64(2**32 - 1) - value.view(np.uint32).astype(np.uint64)
        sequence, position = self._tokens["sequence"][row], self._tokens["position"][row]
        keys = {
            "top": descending << np.uint64(32) | row.astype(np.uint64),
            "random": sample_keys(sequence, position, self._about.layer, feature),
        }
        for kind, lists in self._lists.items():
            lists.add(cell, keys[kind], row, value)

    def take(self) -> dict[str, np.ndarray]:
        """Return the lists [channel feature example] and counts [channel feature] by the names of their arrays."""
        shape = (len(CHANNELS), self._about.d_sae)
        arrays: dict[str, np.ndarray] = {f"features/{self._about.hook}_count": self._count.reshape(shape)}
        for kind, lists in self._lists.items():
            rows, filled = np.maximum(lists.rows, 0), lists.rows >= 0
            values = {"activation": lists.values, **{n: self._tokens[n][rows] for n in ("sequence", "position")}}
            for name, (dtype, fill) in FEATURE_FIELDS.items():
                own = np.where(filled, values[name], fill).astype(dtype)
                arrays[f"features/{self._about.hook}_{kind}_{name}"] = own.reshape(*shape, -1)
        return arrays
