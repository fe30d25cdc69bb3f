"""Turn a user's recorder into a record of the store: dimensions and dtype, checked before the job starts."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from workbench.capture import record_options
from workbench.capture.recorder import Recorder, source_digest
from workbench.errors import InputError
from workbench.hooks.names import BLOCK
from workbench.model.config import Config
from workbench.runs.schema import TOKEN_COLUMNS, Record

Function = Callable[[Tensor], Tensor]
_DTYPES = ("float32", "float16")
# names that the dataset has for other quantities
_TAKEN = {
    *TOKEN_COLUMNS,
    "logprob",
    "entropy",
    "experts",
    "gates",
    "router_logits",
    "sink",
    "layer",
    "token",
    "own_experts",
    "router_margin",
    "forced",
    "tokens",
    "coactivation",
    "transition",
    "expert_count",
}
_NAME = re.compile(r"[A-Za-z]\w*")
_TRIED = 3  # tokens of the trial


def axis_sizes(axes: Sequence[str], cfg: Config) -> dict[str, int]:
    """Return the sizes of a model's axes, such as head, slot or d_model, by name; that of length 1 is "scale"."""
    counted = {
        "head": cfg.n_heads,
        "kv": cfg.n_key_value_heads,
        "slot": cfg.experts_per_token,
        "expert": cfg.num_experts,
        "1": 1,
    }
    names = {"1": "scale"}
    return {names.get(axis, axis): counted.get(axis) or int(getattr(cfg, axis)) for axis in axes}


def check_expert_axis(where: str, axes: Mapping[str, int], layers: Sequence[int], cfg: Config) -> None:
    """Refuse the axis `expert` in layers whose numbers of experts are not the model's largest.

    Raises:
        InputError: a layer has fewer experts than the array would have.
    """
    narrow = [layer for layer in layers if cfg.experts_of(layer) < cfg.num_experts]
    if "expert" in axes and narrow:
        raise InputError(
            f"{where}: layers {narrow[:4]} have fewer than {cfg.num_experts} experts, and an array has one number for "
            "all: record 'router_logits' without options, or name layers= that have them"
        )


def parse(recorder: Recorder, cfg: Config) -> tuple[Record, Function | None]:
    """Return the record of a recorder and its function, if it reduces by one.

    Raises:
        InputError: a field is wrong, or the function fails, mixes tokens, or does not return what `dims` names.
    """
    where = f"recorder {recorder.name!r}"
    if not _NAME.fullmatch(str(recorder.name)) or recorder.name in _TAKEN:
        why = "is taken by another quantity" if recorder.name in _TAKEN else "is not letters, digits and underscores"
        raise InputError(f"{where}: its name {why}: choose another name")
    hook, inside = _hook(where, recorder.hook)
    options = {key: getattr(recorder, key) for key in ("layers", "heads", "experts", "slots", "message", "position")}
    options = {key: record_options.numbers(where, key, value) for key, value in options.items() if value is not None}
    names = {key: getattr(recorder, key) for key in ("role", "channel", "part") if getattr(recorder, key) is not None}
    options |= {key: value.split(",") if isinstance(value, str) else list(value) for key, value in names.items()}
    options |= {key: getattr(recorder, key) for key in ("every", "last") if getattr(recorder, key) is not None}
    layers = record_options.layers(where, options.pop("layers", ()) or inside, cfg.n_layers)
    per_token = BLOCK[hook].startswith("batch pos ")
    axes = axis_sizes(BLOCK[hook].split()[2:], cfg) if per_token else {"head": cfg.n_heads}
    check_expert_axis(where, axes, layers, cfg)
    index, index_dim = record_options.index(where, recorder.hook, axes, options)
    chosen = record_options.tokens(where, options)
    if recorder.dtype not in _DTYPES:
        raise InputError(f"{where}: dtype={recorder.dtype!r}: use one of {', '.join(_DTYPES)}")
    about = {"description": recorder.description, "unit": recorder.unit}
    sizes = {dim: len(index) if dim == index_dim else size for dim, size in axes.items()}
    if not callable(recorder.reduce):
        reduce = record_options.reduction(
            where, {"reduce": recorder.reduce}, record_options.OWN_REDUCTIONS, " or a function"
        )
        if not per_token:
            raise InputError(f"{where}: {recorder.hook} has a value for each pair of tokens: reduce it by a function")
        if recorder.dims and recorder.dims != tuple(sizes)[: -1 if reduce == "norm" else None]:
            raise InputError(f"{where}: reduce={reduce} gives the dimensions {', '.join(sizes)}: leave dims out")
        stored = dict(list(sizes.items())[:-1]) if reduce == "norm" else sizes
        record = Record(
            recorder.name,
            hook,
            layers,
            tuple(stored),
            tuple(stored.values()),
            recorder.dtype,
            index,
            index_dim,
            chosen,
            reduce,
            **about,
        )
        return record, None
    shape = _tried(where, recorder, hook, sizes)
    _check_sizes(where, recorder.dims, shape, sizes, cfg)
    digest = recorder.digest or source_digest(recorder.reduce)
    record = Record(
        recorder.name,
        hook,
        layers,
        recorder.dims,
        shape,
        recorder.dtype,
        index,
        index_dim,
        chosen,
        "own",
        digest,
        **about,
    )
    return record, recorder.reduce


def block_hook(point: str) -> str | None:
    """Return the hook point of a block with this name, in which `hook_` is optional, or None."""
    before, _, last = point.rpartition(".")
    hook = point if "hook_" in point else f"{before}.hook_{last}".strip(".")
    return hook if hook in BLOCK else None


def _hook(where: str, name: str) -> tuple[str, tuple[int, ...]]:
    """Return the hook point within its block, and the layer if the name has one."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(name))
    point = match[2] if match else str(name)
    hook = block_hook(point)
    if hook is None:
        raise InputError(f"{where}: {name!r} is not a hook point of the blocks: choose from {', '.join(sorted(BLOCK))}")
    return hook, (int(match[1]),) if match else ()


def _example(hook: str, sizes: Mapping[str, int], n: int, dtype: torch.dtype) -> Tensor:
    """Return numbers in the shape of a hook point's activations of n tokens."""
    generator = torch.Generator().manual_seed(0)
    if "key_pos" in BLOCK[hook]:
        return torch.rand((1, *sizes.values(), n, n), generator=generator).tril().to(dtype)
    if BLOCK[hook].endswith("slot") and "indices" in hook:
        return torch.arange(sizes["slot"]).expand(1, n, -1)
    return torch.randn((1, n, *sizes.values()), generator=generator).to(dtype)


def _tried(where: str, recorder: Recorder, hook: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of the values of a token, from a trial of the function."""
    assert callable(recorder.reduce)
    example = _example(hook, sizes, _TRIED, torch.float32)
    try:
        got = recorder.reduce(example.clone())
        fewer = recorder.reduce(example[:, : _TRIED - 1].clone()) if "key_pos" not in BLOCK[hook] else None
    except Exception as error:  # whatever the user's function raises
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{where}: its function fails on activations {tuple(example.shape)} of {hook} ({BLOCK[hook]}): "
            f"{type(error).__name__}: {line}"
        ) from error
    axes = "".join(f", {dim}" for dim in recorder.dims)
    if not isinstance(got, Tensor):
        raise InputError(f"{where}: its function returns {type(got).__name__!r}: return a tensor [batch, pos{axes}]")
    if got.ndim != 2 + len(recorder.dims) or tuple(got.shape[:2]) != (1, _TRIED):
        raise InputError(
            f"{where}: its function returns {tuple(got.shape)} of activations {tuple(example.shape)} ({BLOCK[hook]}); "
            "dims="
            f"{recorder.dims} means [batch, pos{axes}]: return that, or name the dimensions after pos in dims"
        )
    if got.is_complex():
        raise InputError(f"{where}: its function returns complex numbers: return real ones, such as x.abs()")
    if fewer is not None and not torch.allclose(got[:, : _TRIED - 1].float(), fewer.float(), atol=1e-4, equal_nan=True):
        raise InputError(
            f"{where}: its function mixes tokens (their values change with what follows), and a pass packs several "
            "sequences: reduce over the dimensions after pos only"
        )
    return tuple(got.shape[2:])


def _check_sizes(
    where: str, dims: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int], cfg: Config
) -> None:
    """Refuse a dimension that has the name of one of the model's and another size, or a name that is not a word."""
    known = axis_sizes(("head", "kv", "slot", "expert", "d_model", "d_head", "d_mlp"), cfg) | dict(sizes)
    for dim, size in zip(dims, shape, strict=True):
        if not _NAME.fullmatch(str(dim)) or dim in ("layer", "token", "channel", "sequence") or dims.count(dim) > 1:
            raise InputError(f"{where}: {dim!r} cannot be the name of a dimension: use a word that is not used yet")
        if dim in known and size != known[dim]:
            raise InputError(
                f"{where}: its function returns {size} values along {dim!r}, which has {known[dim]} in this model: "
                "give the dimension another name"
            )
        if not size:
            raise InputError(f"{where}: its function returns no value along {dim!r}: return at least one")
