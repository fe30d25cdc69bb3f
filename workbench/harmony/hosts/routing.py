"""Routed experts that a host returns, checked, and stored beside the transcripts.

vLLM 0.21 returns nested lists, vLLM 0.22 a base64 .npy, sglang base64 int32. All of them can be wrong without an error:
a fused kernel that does not record its choices returns zeros, and cached prefixes return −1. Both are refused here.

Reference: https://github.com/vllm-project/vllm/pull/28284
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int, Int16

from workbench.errors import InputError

Experts = Int16[np.ndarray, "tokens layers slots"]
_NOT_RECORDED = (
    "the host's fused MXFP4 kernel does not record its choices: start vLLM with --moe-backend marlin, or sglang with "
    "--moe-runner-backend triton"
)


class RoutingError(ValueError):
    """Why routed experts cannot be used, in one line."""


def routed_experts(reply: Mapping[str, Any], *, n_tokens: int, experts_per_token: int = 4) -> Experts | None:
    """Return the experts of a reply's first choice, in any of the three encodings; None if the reply has none.

    n_tokens: prompt and answer. The host routes no token after the last one, so there are n_tokens or n_tokens − 1
    rows.

    Raises:
        RoutingError: experts were not recorded.
    """
    choice = reply["choices"][0] if reply.get("choices") else {}
    routed = choice.get("routed_experts")
    extension = _extension(choice) or _extension(reply)
    if extension is not None:
        experts = _int32(extension, n_tokens, experts_per_token)
    elif isinstance(routed, str):
        experts = _npy(routed)
    elif routed is not None:
        prompt = reply.get("prompt_routed_experts", choice.get("prompt_routed_experts"))
        experts = np.concatenate([_nested(part) for part in (prompt, routed) if part])
    else:
        return None
    check_experts(experts, n_tokens)
    return experts.astype(np.int16)


def _extension(where: Mapping[str, Any]) -> str | None:
    for holder in (where.get("sgl_ext"), where.get("meta_info")):
        if isinstance(holder, Mapping) and isinstance(holder.get("routed_experts"), str):
            return str(holder["routed_experts"])
    return None


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RoutingError(f"the routed experts are not base64: {error}") from error


def _int32(text: str, n_tokens: int, experts_per_token: int) -> Int[np.ndarray, "tokens layers slots"]:
    content = _bytes(text)
    if len(content) % 4:
        raise RoutingError(f"the routed experts are {len(content)} bytes, which are no 32-bit integers")
    values = np.frombuffer(content, dtype="<i4")
    for rows in (n_tokens - 1, n_tokens):
        if rows > 0 and values.size and values.size % (rows * experts_per_token) == 0:
            return values.reshape(rows, -1, experts_per_token)
    raise RoutingError(
        f"{values.size:,} routed experts do not fit {n_tokens} tokens of {experts_per_token} experts a layer"
    )


def _npy(text: str) -> Int[np.ndarray, "tokens layers slots"]:
    try:
        array = np.load(io.BytesIO(_bytes(text)), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:  # MemoryError: of a shape that is absurd
        raise RoutingError("the routed experts are not a .npy array of numbers") from error
    return _integers(array)


def _nested(values: Any) -> Int[np.ndarray, "tokens layers slots"]:
    try:
        return _integers(np.array(values))
    except ValueError as error:
        raise RoutingError("the routed experts are lists of different lengths") from error


def _integers(array: Any) -> Int[np.ndarray, "tokens layers slots"]:
    if not isinstance(array, np.ndarray) or array.ndim != 3 or not np.issubdtype(array.dtype, np.integer):
        raise RoutingError("the routed experts are not integers of shape [tokens, layers, experts per token]")
    return array


def check_experts(experts: Int[np.ndarray, "tokens layers slots"], n_tokens: int) -> None:
    """Refuse experts that no router chose.

    Raises:
        RoutingError: they cannot be a router's choice; the message names the option of the host to set.
    """
    if len(experts) not in (n_tokens, n_tokens - 1):
        raise RoutingError(f"the host returned experts of {len(experts)} tokens for {n_tokens} tokens")
    if not experts.size:
        raise RoutingError("the host returned no experts")
    if (unknown := (experts < 0).any((1, 2))).any():
        raise RoutingError(
            f"{int(unknown.sum())} of {len(experts)} tokens have no experts (-1), as their prefix was cached: start "
            "the host with --no-enable-prefix-caching (vLLM) or --disable-radix-cache (sglang)"
        )
    if not experts.any():
        raise RoutingError(f"all routed experts are 0: {_NOT_RECORDED}")
    ordered = np.sort(experts, axis=-1)
    if experts.shape[-1] > 1 and (ordered[..., 1:] == ordered[..., :-1]).any():
        raise RoutingError(f"a token has one expert twice in a layer: {_NOT_RECORDED}")
    if len(experts) > 1 and (constant := (ordered == ordered[:1]).all((0, 2))).any() and len(experts) >= 8:
        layer = int(np.flatnonzero(constant)[0])
        raise RoutingError(f"layer {layer} has the same experts at every token: {_NOT_RECORDED}")


def sidecar(transcripts: str | Path) -> Path:
    """Return the path of the routed experts of a file of transcripts: a Zarr group beside it."""
    return Path(f"{transcripts}.routing.zarr")


def write_experts(transcripts: str | Path, id: str, experts: Experts) -> None:
    """Store the experts of the transcript with this id."""
    group = zarr.open_group(str(sidecar(transcripts)), mode="a")
    group.create_array(_key(id), data=experts, overwrite=True)


def read_experts(transcripts: str | Path, id: str) -> Experts:
    """Return the experts of the transcript with this id.

    Raises:
        InputError: the host's experts were not stored.
    """
    path = sidecar(transcripts)
    try:
        array = zarr.open_group(str(path), mode="r")[_key(id)]
    except (FileNotFoundError, KeyError) as error:
        raise InputError(
            f"{path} has no routed experts of {ascii(id)[:60]}: collect the transcripts with --routing"
        ) from error
    assert isinstance(array, zarr.Array)
    return np.asarray(array[:], dtype=np.int16)


def _key(id: str) -> str:
    return hashlib.sha256(id.encode()).hexdigest()[:32]  # an id may hold anything, a path may not
