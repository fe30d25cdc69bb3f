"""Features of autoencoders in a frozen pass: which are active at each token, and what each passes on.

An autoencoder reads the residual stream at a hook point and writes features times decoder rows; what it does not
reconstruct, its decoder bias included, is an error that is added back and is constant in a frozen pass. An active
feature is linear in the stream: which features are active is frozen, as experts are.

Reference: error nodes of attribution graphs, Marks et al. 2024, arXiv 2403.19647; Ameisen et al. 2025.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import InputError
from workbench.hooks.sae import SAE, load_sae
from workbench.model.config import Config

_HOOK = re.compile(r"blocks\.(\d{1,5})\.hook_resid_(pre|mid|post)")
_STEP = {"pre": -0.5, "mid": 0.5, "post": 1.5}  # attention of a layer is at 2 · layer, its experts at 2 · layer + 1


def places(cfg: Config, saes: Mapping[str, SAE]) -> dict[float, str]:
    """Return the hook points of autoencoders by their place in the order of a pass.

    Raises:
        InputError: a hook point is not of the residual stream, two are the same place or in one layer, or an
            autoencoder normalizes its input or has another width.
    """
    by_order: dict[float, str] = {}
    for name, sae in saes.items():
        match = _HOOK.fullmatch(name)
        if match is None or int(match[1]) >= cfg.n_layers:
            raise InputError(
                f"autoencoder at {name!r}: a graph takes those of the residual stream, as blocks.0.hook_resid_post "
                f"(layers 0 to {cfg.n_layers - 1}; resid_pre, resid_mid or resid_post)"
            )
        if sae.cfg.d_in != cfg.d_model or sae.cfg.reshape_activations != "none":
            raise InputError(f"autoencoder at {name!r} reads width {sae.cfg.d_in}; the stream has {cfg.d_model}")
        if sae.cfg.normalize_activations != "none":
            raise InputError(
                f"autoencoder at {name!r} normalizes its input ({sae.cfg.normalize_activations}), which a graph does "
                "not follow: use one with normalize_activations none"
            )
        order = 2 * int(match[1]) + _STEP[match[2]]
        if order in by_order or any(layer_of(other) == int(match[1]) for other in by_order.values()):
            raise InputError(f"autoencoders at {name!r} and another point of the same layer: attach one in a layer")
        by_order[order] = name
    return by_order


def layer_of(name: str) -> int:
    """Return the layer of a hook point."""
    return int(name.split(".")[1])


def load_autoencoders(folders: Sequence[Path], device: torch.device) -> dict[str, SAE]:
    """Return autoencoders by the hook points that their folders name.

    Raises:
        InputError: a folder is damaged or names no hook point, or two name the same one.
    """
    autoencoders: dict[str, SAE] = {}
    for folder in folders:
        loaded = load_sae(folder, device=device)
        name = loaded.cfg.hook_name
        if name is None or name in autoencoders:
            problem = "names no hook point" if name is None else f"is the second one at {name}"
            raise InputError(f"autoencoder {folder}: its configuration {problem}: give folders of one point each")
        autoencoders[name] = loaded
    return autoencoders


@dataclass
class FeatureFlow:
    """What active features pass on to the target: `values` [active], of it `constants`, and the errors' [pos].

    `reads` are the directions at the stream before the autoencoder that the features read.
    """

    values: Float[Tensor, " active"]
    constants: Float[Tensor, " active"]
    reads: Float[Tensor, "active d_model"]
    errors: Float[Tensor, " pos"]


@dataclass
class ActiveFeatures:
    """The features of one autoencoder that are active in a pass, with what each reads and writes."""

    name: str
    pos: Int[Tensor, " active"]
    feature: Int[Tensor, " active"]
    activation: Float[Tensor, " active"]
    encoder: Float[Tensor, "active d_model"]  # the activation is encoder · stream + constant
    constant: Float[Tensor, " active"]
    decoder: Float[Tensor, "active d_model"]
    error: Float[Tensor, "pos d_model"]

    def backward(self, g: Float[Tensor, "pos d_model"]) -> tuple[FeatureFlow, Float[Tensor, "pos d_model"]]:
        """Return the flow to a direction after the autoencoder, and the direction before it."""
        gain = (self.decoder * g[self.pos]).sum(-1)
        reads = gain[:, None] * self.encoder
        before = torch.zeros_like(g).index_add_(0, self.pos, reads)
        errors = (g * self.error).sum(-1)
        return FeatureFlow(gain * self.activation, gain * self.constant, reads, errors), before

    def find(self, pos: Int[Tensor, " node"], feature: Int[Tensor, " node"]) -> Int[Tensor, " node"]:
        """Return the places in this list of features at positions; all of them are active."""
        width = int(self.feature.max()) + 1
        return torch.searchsorted(self.pos * width + self.feature, pos * width + feature)

    def writes(self, active: Int[Tensor, " node"]) -> Float[Tensor, "node d_model"]:
        """Return what active features, by their numbers in this list, add to the stream."""
        return self.activation[active, None] * self.decoder[active]


def active_features(name: str, sae: SAE, stream: Float[Tensor, "pos d_model"]) -> ActiveFeatures:
    """Return the active features of an autoencoder at a stream, and its error."""
    sae = sae.to(stream.device)
    acts = sae.encode(stream).to(stream.dtype)
    pos, feature = acts.nonzero(as_tuple=True)
    activation = acts[pos, feature]
    decoder, encoder = sae.W_dec[feature].to(stream.dtype), sae.W_enc[:, feature].mT.to(stream.dtype)
    if sae.cfg.architecture == "gated":
        encoder = encoder * sae.r_mag[feature].exp().to(stream.dtype)[:, None]
    if sae.cfg.rescale_acts_by_decoder_norm:  # the activation has the decoder row's norm, which is taken off again
        norm = sae.W_dec[feature].norm(dim=-1).to(stream.dtype)[:, None]
        if sae.cfg.architecture == "topk":
            encoder = encoder * norm
        decoder = decoder / norm
    constant = activation - (encoder * stream[pos]).sum(-1)
    written = torch.zeros_like(stream).index_add_(0, pos, activation[:, None] * decoder)
    return ActiveFeatures(name, pos, feature, activation, encoder, constant, decoder, stream - written)
