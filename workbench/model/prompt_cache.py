"""Keys and values of a conversation that later prompts reuse: the next turn, an edited answer, more samples.

    cache = PromptCache()
    for step in model.generate_stream(first, prompt_cache=cache): ...
    for step in model.generate_stream(second, prompt_cache=cache): ...  # reads only what differs from before

A prompt reuses the positions that it shares with what the cache holds, from the first token on. Nothing is reused that
was computed with other hooks, interventions included, or by another model: then the whole prompt is read. Hooks that
stay on the model do not see the positions that are reused. Weights that are changed in place are not noticed: make a
new cache. Layers with a window hold every position here, since a later prompt may begin to differ anywhere.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from workbench.errors import InputError
from workbench.model.cache import KVCache


def installed_hooks(model: Any) -> list[Any]:
    """Return the handles of all hooks that are on the model, in the order of the hook points."""
    points = model.hook_dict.values()
    return [handle for point in points for handle in (*point.fwd_hooks, *point.bwd_hooks)]


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids the two have in common from their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class PromptCache:
    """The key-value cache of one conversation, for one generation at a time."""

    def __init__(self) -> None:
        self._cache: KVCache | None = None
        self._model: Any = None
        self._hooks: list[Any] | None = None  # with which the cache was filled; None: it cannot be reused
        self._busy = False

    def acquire(self) -> None:
        """Take the cache for one generation, until `release`.

        Raises:
            InputError: a generation with this cache has not ended.
        """
        if self._busy:
            raise InputError(
                "the prompt cache is in use by a generation that has not ended: close that one, or use another cache"
            )
        self._busy = True

    def release(self) -> None:
        """Let another generation use the cache."""
        self._busy = False

    def prepare(self, model: Any, prompt: Sequence[int], capacity: int) -> tuple[KVCache, int]:
        """Return a cache of at least `capacity` positions, and how many tokens of the prompt it holds already.

        The last token of the prompt is always read again, for the logits after it.
        """
        hooks = installed_hooks(model)
        shared = 0
        if self._cache is not None and self._model is model and self._same(hooks):
            held = self._cache.tokens[0, : self._cache.host_lengths[0]].tolist()
            shared = min(shared_prefix(held, prompt), len(prompt) - 1)
        self._cache = self._of_capacity(model, capacity, shared)
        self._cache.truncate([shared])
        self._cache.fixed_end = None
        self._model, self._hooks = model, hooks
        return self._cache, shared

    def note_hooks(self, model: Any) -> None:
        """Check the hooks before a pass: if they have changed, later prompts reuse nothing of this one."""
        if not self._same(installed_hooks(model)):
            self._hooks = None

    def _same(self, hooks: list[Any]) -> bool:
        known = self._hooks
        return known is not None and len(known) == len(hooks) and all(a is b for a, b in zip(known, hooks, strict=True))

    def _of_capacity(self, model: Any, capacity: int, shared: int) -> KVCache:
        """Return the cache if it is large enough, else a larger one with its first `shared` positions."""
        old = self._cache
        if old is not None and self._model is model and old.capacity >= capacity:
            return old
        least = min(2 * old.capacity, model.cfg.n_ctx) if old is not None else 0  # so that turns do not copy each time
        size = max(capacity, least)
        new = KVCache(model.cfg, 1, size, dtype=model.dtype, device=model.devices, windowed=False)
        if old is not None and shared:
            for mine, theirs in zip((*new.keys, *new.values), (*old.keys, *old.values), strict=True):
                mine[:, :shared] = theirs[:, :shared]
            new.tokens[:, :shared] = old.tokens[:, :shared]
            new.advance(shared)
        return new
