"""Open a checkpoint folder in either published layout as canonical tensors: validated, memory-mapped, packed.

Everything that can be checked without reading the weights is checked before the first of them is used: which files
there are, that each is complete, and that every tensor of the config is present once with its shape and dtype.
"""

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from itertools import accumulate
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from workbench import harmony
from workbench.bounded_json import read_json
from workbench.errors import InputError
from workbench.model.config import Config
from workbench.model.config_file import read_config, ties_embeddings
from workbench.model.formats import gguf_reader, gguf_split, mlx, ollama
from workbench.model.lazy_tensors import LazyTensor, Tensors
from workbench.model.names import LAYOUTS, name_in, shapes
from workbench.model.opened_checkpoint import Checkpoint
from workbench.model.safetensors_file import FLOATS, Entry, SafetensorsFile
from workbench.model.separate_experts import stack_experts
from workbench.model.stored_names import Stored, hugging_face_names

BUNDLED = {"nano": Path(__file__).parents[1] / "data" / "nano"}
_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


def open_checkpoint(source: str | Path, *, ignore_fields: Collection[str] = ()) -> Checkpoint:
    """Open and validate a checkpoint, a folder or a .gguf file; weights are read when they are used.

    Raises:
        InputError: a file or tensor is missing, unexpected, truncated, or of another shape or dtype than in the config.
    """
    given = Path(source)
    if parts := gguf_split.find_files(given):
        return gguf_reader.open_gguf(parts)
    root = _root(given)
    for name in ("config.json", _INDEX):
        _check_link(root, root / name)
    cfg = read_config(root, ignore_fields)
    paths, notes = _weight_files(root)
    files = [SafetensorsFile.open(path) for path in paths]
    stored = _stored_tensors(root, files)
    _check_index(root, stored)
    stored_tensors, notes_of_names = hugging_face_names(root, stored)
    notes += notes_of_names
    stored_tensors = stack_experts(root, stored_tensors)
    layout = next((n for n in LAYOUTS if name_in(n, "embed.weight") in stored_tensors), None)
    if layout is None:
        raise InputError(
            f"{root}: no embedding called {' or '.join(name_in(n, 'embed.weight') for n in LAYOUTS)} in its files"
        )
    if layout == "huggingface" and ties_embeddings(root):
        notes += _tie(stored_tensors)
    _check_expert_counts(root, cfg, layout, stored_tensors)
    dense = layout == "huggingface" and name_in(layout, "blocks.0.mlp.experts.down.weight") in stored_tensors
    experts = "dense" if dense else "mxfp4"
    if mlx.is_mlx(stored_tensors):
        layout = "mlx"
        experts, entries = mlx.mlx_tensors(root, cfg, stored_tensors)
    else:
        entries = _locations(root, cfg, layout, experts, stored_tensors)
    tensors = Tensors(entries)
    return Checkpoint(
        root,
        cfg,
        layout,
        experts,
        tensors,
        _digest(root, files),
        lambda: harmony.tokenizer(given),
        tuple(notes),
        tuple(ignore_fields),
    )


def _root(folder: Path) -> Path:
    """Return the folder with the weights: this one, or the folder `original` in it."""
    try:
        if not folder.is_dir():
            raise InputError(
                f"{folder} is {'a file' if folder.exists() else 'not there'}: give the folder of a checkpoint"
            )
        original = folder / "original"
        return original if (original / "config.json").exists() and not any(folder.glob("*.safetensors")) else folder
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error


def _weight_files(root: Path) -> tuple[list[Path], list[str]]:
    """Return the files that hold the model, and notes about the others.

    An index names them; without one it is model.safetensors, or every file that is not an adapter.
    """
    paths = sorted(root.glob("*.safetensors"))
    if not paths:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in root.glob(pattern))
        if pickles:
            raise InputError(
                f"{root}: {pickles[0]} is a pickle, which can run code when it is read; convert it to safetensors"
            )
        raise InputError(f"{root} has a config.json but no *.safetensors: the weights are missing: download them")
    names = {path.name for path in paths}
    if (root / _INDEX).exists():
        wanted = names & {str(file) for file in _index(root).values()}
    elif "model.safetensors" in names:
        wanted = {"model.safetensors"}
    else:
        wanted = {name for name in names if not name.startswith("adapter_")}
    if not wanted and (root / _INDEX).exists():
        raise InputError(f"{root}: the files that {_INDEX} names are missing: download them again")
    if not wanted:
        raise InputError(f"{root} holds an adapter and no model: load the base model with adapter={str(root)!r}")
    for name in sorted(wanted):
        _check_link(root, root / name)
    left = sorted(names - wanted)
    reason = "its index does not name them" if (root / _INDEX).exists() else "they are not files of the model"
    notes = [f"files are ignored, as {reason}: {_listed(left)}"] if left else []
    if beside := sorted(path.name for path in root.glob("*.gguf")):
        notes.append(f"GGUF files are ignored, as there are safetensors: {_listed(beside)}")
    return [root / name for name in sorted(wanted)], notes


def _listed(names: list[str]) -> str:
    """Return the first names of a list for a message, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stored_tensors(root: Path, files: Collection[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    """Return stored name → file."""
    by_name: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in by_name:
                raise InputError(
                    f"tensor {name!r} is both in {by_name[name].path.name} and in {file.path.name} of {root}: "
                    "remove one of them"
                )
            by_name[name] = file
    return by_name


def _check_link(root: Path, path: Path) -> None:
    """Allow links inside the folder, or to the blobs of the hub cache to which the folder belongs."""
    target = Path(os.path.realpath(path))
    real_root = Path(os.path.realpath(root))
    snapshots = [p for p in real_root.parents if p.name == "snapshots"]
    allowed = [real_root, *(p.parent / "blobs" for p in snapshots)]
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise InputError(f"{path} is a link out of the checkpoint folder; copy the file there if you trust it")


def _index(root: Path) -> dict[str, Any]:
    """Return the files of the tensors as the index lists them: tensor → file."""
    path = root / _INDEX
    try:
        listed = read_json(path)["weight_map"]
        return dict(listed.items())
    except InputError as error:
        raise InputError(f"{path} is not an index of tensors: {error}") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not an index of tensors: {error!r}") from error


def _check_index(root: Path, stored: Mapping[str, SafetensorsFile]) -> None:
    path = root / _INDEX
    if not path.exists():
        _check_shards(root, {file.path.name for file in stored.values()})
        return
    for name, file in _index(root).items():
        if name not in stored:
            state = "lacks it" if (root / Path(str(file)).name).exists() else "is missing: download it again"
            raise InputError(f"{path} states that tensor {name!r} is in {file!r}, which {state}")
        if file != stored[name].path.name:
            raise InputError(
                f"{path} states that tensor {name!r} is in {file!r}, but it is in {stored[name].path.name!r}"
            )


def _check_shards(root: Path, names: set[str]) -> None:
    """Check the number of shards from names like `…-00002-of-00007…` when there is no index."""
    for name in sorted(names):
        if match := re.search(r"-of-(\d+)", name):
            wanted = int(match.group(1))
            if len(names) < wanted:
                raise InputError(f"{root} holds {len(names)} of {wanted} shards: download the missing ones")


def _tie(stored: dict[str, Stored]) -> list[str]:
    """Give the unembedding the embedding's weight where the config ties them and the file has only one.

    A file with both is read as transformers 5 reads it: the unembedding is its own.
    """
    embed, unembed = (name_in("huggingface", name) for name in ("embed.weight", "unembed.weight"))
    if unembed not in stored and embed in stored:
        stored[unembed] = stored[embed]
        return []
    both = [stored[name].tensor() for name in (embed, unembed) if name in stored]
    if len(both) < 2 or both[0].shape != both[1].shape or torch.equal(*both):
        return []
    return [f"tie_word_embeddings is true, but {unembed} differs from the embedding: it is used"]


def _check_expert_counts(root: Path, cfg: Config, layout: str, stored: Mapping[str, Stored]) -> None:
    """Refuse routers of other numbers of experts than the config's, as of a pruned model with the config from before.

    Raises:
        InputError: a router has another number of experts.
    """
    layers = range(cfg.n_layers)
    routers = [stored.get(name_in(layout, f"blocks.{layer}.mlp.router.weight")) for layer in layers]
    counts = [router.entry.shape[0] for router in routers if router is not None and len(router.entry.shape) == 2]
    if len(counts) < cfg.n_layers or counts == [cfg.experts_of(layer) for layer in layers]:
        return
    stated = cfg.num_experts if cfg.layer_experts is None else list(cfg.layer_experts)
    if len(set(counts)) == 1:
        held, remedy = f"{counts[0]} experts in every layer", f"write {counts[0]} as the number in config.json"
    elif layout == "original":
        held, remedy = (
            f"layers with {counts} experts",
            "the original layout has one number: use the Hugging Face layout",
        )
    else:
        held, remedy = f"layers with {counts} experts", "write this list as num_local_experts in config.json"
    raise InputError(f"{root} has {held}, and its config states {stated}: if the model was pruned, {remedy}")


def _locations(
    root: Path, cfg: Config, layout: str, experts: str, available: Mapping[str, Stored]
) -> dict[str, LazyTensor]:
    """Return every tensor of the config; refuse missing, unexpected or misshapen ones."""
    places: dict[str, LazyTensor] = {}
    fused: dict[str, list[tuple[str, int]]] = {}
    wanted = shapes(cfg, experts)
    for name, shape in wanted.items():
        fused.setdefault(name_in(layout, name), []).append((name, shape[0]))
    for stored, parts in fused.items():
        shape = (sum(rows for _, rows in parts), *wanted[parts[0][0]][1:])
        if stored not in available:
            raise InputError(f"{root}: tensor {stored!r} {shape} is missing{_explanation(stored, available)}")
        location = available[stored]
        _check_entry(location.file.path, location.name, location.entry, shape, parts[0][0])
        tensor = LazyTensor(location.name, shape, _precision(stored, location.entry), location.tensor)
        ends = accumulate(rows for _, rows in parts)
        for (name, rows), end in zip(parts, ends, strict=True):
            places[name] = tensor if len(parts) == 1 else tensor.rows(end - rows, end)
    if left := sorted(set(available) - set(fused)):
        path = available[left[0]].file.path
        raise InputError(
            f"{path}: tensor {left[0]!r} is not part of a gpt-oss of this config ({len(left)} unexpected tensors)"
        )
    return {name: places[name] for name in wanted}


def _precision(stored: str, entry: Entry) -> str:
    return "MXFP4" if stored.endswith(("blocks", "scales")) else entry.dtype


def _explanation(stored: str, available: Collection[str]) -> str:
    """Return what a missing tensor may mean, for the error message."""
    if stored == name_in("huggingface", "unembed.weight"):
        return (
            ": this is a backbone or a classifier without an unembedding; save the GptOssForCausalLM, or set "
            "tie_word_embeddings in config.json if its unembedding is the embedding"
        )
    stem = re.sub(r"_(blocks|scales)$", "", stored)
    if other := next((name for name in (f"{stem}_blocks", stem) if name != stored and name in available), None):
        return f", but {other!r} is there: all experts must be packed, or all dense"
    return ""


def _check_entry(path: Path, name: str, entry: Entry, shape: tuple[int, ...], canonical: str) -> None:
    packed = canonical.endswith((".blocks", ".scales"))
    dtypes = ("U8",) if packed else FLOATS
    if entry.shape != shape:
        raise InputError(f"{path}: tensor {name!r} has shape {list(entry.shape)}, the config requires {list(shape)}")
    if entry.dtype not in dtypes:
        raise InputError(f"{path}: tensor {name!r} has dtype {entry.dtype}, expected {' or '.join(dtypes)}")


def _digest(root: Path, files: Collection[SafetensorsFile]) -> str:
    """Return a fingerprint of config and weights: headers, sizes, and 64 evenly spaced 64-KiB blocks of each file.

    Files up to 4 MiB are covered completely. The fingerprint distinguishes checkpoints; it does not prove them
    unmodified.
    """
    total = hashlib.sha256((root / "config.json").read_bytes())
    parts = []
    for file in files:
        part = hashlib.sha256(file.header + str(file.path.stat().st_size).encode())
        for block in file.samples():
            part.update(block)
        parts.append(part.digest())
    for digest in sorted(parts):  # whatever the files are called
        total.update(digest)
    return total.hexdigest()


def resolve(source: str | Path, *, revision: str | None = None) -> Path:
    """Return the path of a checkpoint given a path, a bundled model's name, `ollama:NAME`, or a hub id.

    A hub id is downloaded if it is not cached.

    Raises:
        InputError: there is no such folder or model, or the hub cannot be reached.
    """
    name = str(source)
    if name.startswith(ollama.PREFIX):
        return ollama.find_model(name.removeprefix(ollama.PREFIX))
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None and ".." not in name
    try:
        there = name != "" and Path(source).exists()
    except OSError as error:
        raise InputError(f"{short(name)} cannot be read: {error.strerror}") from error
    if name in BUNDLED or there or not hub_id:
        if revision is not None:
            raise InputError(
                f"revision {revision!r}: only models on the hub have revisions, and {short(name)} is not the id of one"
            )
        if not (name in BUNDLED or there):
            raise InputError(
                f"{short(name)} is neither a folder nor {' or '.join(BUNDLED)}, nor a hub id such as openai/gpt-oss-20b"
            )
        return BUNDLED.get(name) or Path(source)
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision):
        raise InputError(f"revision {short(revision)} is not a branch, a tag or a commit: check its name on the hub")
    folder = _download(name, revision, allow=_HUB_FILES, ignore=["*/*"])
    if not any(folder.glob("*.safetensors")):
        folder = _download(name, revision, allow=[f"original/{pattern}" for pattern in _HUB_FILES], ignore=None)
        if not any(folder.glob("original/*.safetensors")):
            raise InputError(f"{name} has no safetensors; download one of its GGUF files, and give that file")
    return folder


def _download(source: str, revision: str | None, *, allow: list[str], ignore: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download  # late: half a second
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=allow, ignore_patterns=ignore))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"the hub has no {source}{at}, or it requires a login: check the name, or run `hf auth login`"
        ) from error
    except Exception as error:  # a network error is one of the HTTP library's own, and that library changes
        cause = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise InputError(
            f"{source} is incomplete in the local cache and cannot be downloaded ({cause}); download it elsewhere and "
            "give its folder, or point HF_HOME at a cache that has it"
        ) from error
