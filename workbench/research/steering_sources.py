"""Saved vectors and sparse autoencoders that recipes steer along, by the names that a program was given for them.

    sources = read_sources(vectors=["happy=happy.npy"], saes=["resid=saes/layer12"])
    recipe.edits(model, sources=sources)

Recipes have the names and never a path, so that a recipe of somebody else reads no file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from workbench.errors import InputError, refuse_lfs_pointer
from workbench.hooks.sae import SAE, load_sae
from workbench.hooks.torch_file import read_torch_file
from workbench.inputs import open_regular

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_MAX_BYTES = 64_000_000
Source = TypeVar("Source")


@dataclass(frozen=True)
class SteeringSources:
    """Vectors and autoencoders by name."""

    vectors: Mapping[str, Float[Tensor, " d"]] = field(default_factory=dict)
    saes: Mapping[str, SAE] = field(default_factory=dict)

    def vector(self, name: str) -> Float[Tensor, " d"]:
        """Return a vector by its name.

        Raises:
            InputError: there is none of this name.
        """
        return _loaded(self.vectors, name, "vector", "--vector NAME=FILE")

    def sae(self, name: str) -> SAE:
        """Return an autoencoder by its name.

        Raises:
            InputError: there is none of this name.
        """
        return _loaded(self.saes, name, "SAE", "--sae NAME=FOLDER")

    def feature(self, name: str, feature: int) -> Float[Tensor, " d"]:
        """Return the decoder vector of a feature, in the scale of the activations that the autoencoder reads.

        Raises:
            InputError: there is no such autoencoder or feature, or its output depends on the activation's scale.
        """
        sae = self.sae(name)
        if feature >= len(sae.W_dec):
            raise InputError(f"feature {feature} of SAE {name!r}: it has features 0 to {len(sae.W_dec) - 1}")
        if sae.cfg.reshape_activations != "none" or sae.cfg.normalize_activations != "none":
            raise InputError(
                f"SAE {name!r} normalizes or flattens its input: its decoder vectors are not directions of the stream"
            )
        return sae.W_dec[feature].detach().float()


def _loaded(loaded: Mapping[str, Source], name: str, what: str, option: str) -> Source:
    if name not in loaded:
        known = ", ".join(sorted(loaded)) or "none"
        raise InputError(f"{what} {name!r} was not given (given: {known}): give it with {option}")
    return loaded[name]


def read_sources(vectors: Sequence[str] = (), saes: Sequence[str] = ()) -> SteeringSources:
    """Return the sources of `NAME=PATH` texts.

    Raises:
        InputError: a text has another form, a name is given twice, or a file cannot be read.
    """
    return SteeringSources(_read_all(vectors, "vector", read_vector), _read_all(saes, "sae", load_sae))


def _read_all(texts: Sequence[str], option: str, read: Callable[[Path], Any]) -> dict[str, Any]:
    sources: dict[str, Any] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not separator or not path or not _NAME.fullmatch(name):
            raise InputError(f"--{option} {text!r}: expected NAME=PATH with a name of letters, digits, _ . and -")
        if name in sources:
            raise InputError(f"--{option} {name!r} is given twice: use different names")
        sources[name] = read(Path(path))
    return sources


def read_vector(path: str | Path) -> Float[Tensor, " d"]:
    """Return the vector [d] in a .npy, .safetensors or .pt file, which has one array, as float32.

    Raises:
        InputError: the file cannot be read, has several arrays, or its values are not one finite vector.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Any]] = {
        ".npy": lambda file: torch.from_numpy(np.load(file, allow_pickle=False)),
        ".safetensors": lambda file: _only(load_file(file), path),
        ".pt": read_torch_file,
    }
    if path.suffix not in readers:
        raise InputError(f"{path}: expected a vector in a file that ends with {', '.join(readers)}")
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes, a vector at most {_MAX_BYTES:,}")
        with open_regular(path) as file:
            refuse_lfs_pointer(path, file.read(64))
        vector = readers[path.suffix](path)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, TypeError, MemoryError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} cannot be read as a vector: {reason}") from error
    if not isinstance(vector, Tensor) or vector.dim() != 1 or not vector.is_floating_point() or not len(vector):
        shape = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise InputError(f"{path} holds {shape}, expected one vector [d_model] of floating-point numbers")
    if not vector.isfinite().all():
        raise InputError(f"{path} holds NaN or infinity: save a vector of finite numbers")
    return vector.float()


def _only(tensors: dict[str, Tensor], path: Path) -> Tensor:
    if len(tensors) != 1:
        raise InputError(f"{path} holds {len(tensors)} tensors, expected one vector")
    return next(iter(tensors.values()))
