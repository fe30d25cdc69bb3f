"""The activations of a pass by hook name or by short name, as in `cache["sink", 1]`.

TransformerLens' ActivationCache, with the names of a mixture of experts, and with what its methods need of one: the
contribution of every neuron of every expert, and the experts' biases, which depend on the routing.

Reference: TransformerLens 4.3, ActivationCache.py.
"""

from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache as _ActivationCache

from workbench.errors import InputError
from workbench.hooks.names import closest_names, full_name


class ActivationCache(_ActivationCache):
    """Activations by name; `cache["resid_post", -1]` is the last layer's, `cache["router", 0]` its router logits."""

    def __getitem__(self, key: Any) -> Tensor:
        """Return an activation. Raises: InputError for a name that is not in the cache, with the nearest ones."""
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        name = full_name(key, self.model.cfg.n_layers)
        if name not in self.cache_dict:
            raise MissingActivationError(
                f"{key!r} is not in the cache"
                + (f" (its hook point is {name!r})" if name != key else "")
                + f"; {closest_names(name, self.cache_dict)}"
            )
        return self.cache_dict[name]


class MissingActivationError(InputError, KeyError):
    """A name that is not in a cache."""

    __str__ = ValueError.__str__
