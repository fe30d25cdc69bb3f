"""A quantity of the user's own: a function of the activations at a hook point, recorded like the built-in ones.

    def expert_norm(x):  # [batch pos slot d_model] → [batch pos slot]
        return x.norm(dim=-1)

    norms = wb.Recorder("expert_norm", hook="mlp.experts.hook_out", reduce=expert_norm, dims=("slot",), layers="0-3")
    wb.capture(model, "answers.jsonl", "run.zarr", record=["routing", norms])

The command line takes one of a Python file: `--record my_records.py:norms`. The file is executed, because the user
names it; no code comes from a run or a checkpoint. A run holds the name, the dimensions and a digest of the function's
source, and a job that resumes it must have the same.
"""

import hashlib
import importlib.util
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import InputError

FEATURES = "features:"  # before the folder of an autoencoder, in a record
Numbers = int | str | Iterable[int] | None
Names = str | Iterable[str] | None


@dataclass(frozen=True)
class Recorder:
    """A record with a name of its own.

    hook: a hook point of the blocks, as "mlp.experts.hook_out". reduce: a function of its activations [batch pos …]
    that returns [batch pos, dims…], each token by itself (a pass packs several sequences), or one of raw, norm, mean,
    moments. dims: names of the dimensions that the function returns after pos; one of the model's own names (slot,
    expert, head, kv, d_model, d_head, d_mlp) has the model's size. dtype: in the store, float32 or float16. The other
    fields select layers ("0-3,7"), heads, experts and tokens, as `--record` does; description and unit are stored for
    readers.
    """

    name: str
    hook: str
    reduce: Callable[[Any], Any] | str = "raw"
    dims: tuple[str, ...] = ()
    layers: Numbers = None
    heads: Numbers = None
    experts: Numbers = None
    slots: Numbers = None
    role: Names = None
    channel: Names = None
    part: Names = None
    message: Numbers = None
    position: Numbers = None
    every: int | None = None
    last: int | None = None
    dtype: str = "float32"
    description: str = ""
    unit: str = ""
    digest: str = field(default="", repr=False)  # of the function's source, for workers that do not have the source

    def __post_init__(self) -> None:
        if isinstance(self.dims, str):
            object.__setattr__(self, "dims", tuple(self.dims.split(",")))
        for item in fields(self):  # lists and ranges, so that a recorder can be sent to workers and compared
            value = getattr(self, item.name)
            if isinstance(value, Iterable) and not isinstance(value, str | tuple):
                object.__setattr__(self, item.name, tuple(value))

    def with_options(self, options: dict[str, Any]) -> "Recorder":
        """Return the recorder with other options, as those of the command line."""
        return replace(self, **options)


def from_file(text: str) -> Recorder:
    """Return the recorder that "FILE.py:NAME" or "MODULE:NAME" names; the file is executed.

    Raises:
        InputError: there is no such file or name, the file fails, or the name is not a recorder.
    """
    path, name = _file_of(text)
    if not path.is_file():
        raise InputError(
            f"--record {text}: there is no file {str(path)!r}; give a Python file, as in my_records.py:{name}"
        )
    module = _executed(path.resolve(), text)
    recorder = getattr(module, name, None)
    if not isinstance(recorder, Recorder):
        others = sorted(key for key, value in vars(module).items() if isinstance(value, Recorder))
        known = f"its recorders are {', '.join(others)}" if others else "define it as wb.Recorder(…) there"
        raise InputError(f"--record {text}: {str(path)!r} has no recorder {name!r}: {known}")
    return recorder


def for_workers(record: str | Recorder) -> str | Recorder:
    """Return a record as processes need it that run in another folder and do not have a function's source."""
    if isinstance(record, Recorder):
        return replace(record, digest=source_digest(record.reduce)) if callable(record.reduce) else record
    if record.startswith(FEATURES):
        return f"{FEATURES}{Path(record.removeprefix(FEATURES)).absolute()}"
    name, *options = record.split()
    path, own = _file_of(name)
    is_own = own.isidentifier() and (path.is_file() or f"{path}:{own}" == name)
    return " ".join((f"{path.absolute()}:{own}", *options)) if is_own else record


def _file_of(text: str) -> tuple[Path, str]:
    """Return the file and the name of "FILE.py:NAME" or "MODULE:NAME"."""
    where, _, name = text.rpartition(":")
    return Path(where if where.endswith(".py") else f"{where.replace('.', '/')}.py"), name


def _executed(path: Path, text: str) -> types.ModuleType:
    name = f"workbench_records_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where `inspect` finds the source of its functions
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        del sys.modules[name]
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"--record {text}: {str(path.name)!r} fails: {type(error).__name__}: {line}") from error
    return module


def source_digest(function: Callable[..., Any]) -> str:
    """Return a digest of a function's source and of the values that it reads from outside itself.

    Raises:
        InputError: the function reads an object whose content cannot be digested.
    """
    digest = hashlib.sha256()
    _add(digest, function, set())
    return digest.hexdigest()[:16]


def _add(digest: Any, value: Any, seen: set[int]) -> None:
    """Add a value to a digest: functions by source, arrays by content, plain values by their text."""
    if id(value) in seen:
        return
    if isinstance(value, types.FunctionType):
        seen.add(id(value))
        digest.update(_source(value))
        outside = inspect.getclosurevars(value)
        read = {**outside.globals, **outside.nonlocals}
        _add(digest, (value.__defaults__, value.__kwdefaults__, [(name, read[name]) for name in sorted(read)]), seen)
    elif isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
        digest.update(f"{getattr(value, '__module__', '')}.{value.__name__}".encode())
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
        digest.update(repr(value).encode())
    elif isinstance(value, tuple | list | set | frozenset):
        parts = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        digest.update(f"{type(value).__name__}{len(parts)}".encode())
        for part in parts:
            _add(digest, part, seen)
    elif isinstance(value, dict):
        _add(digest, list(value.items()), seen)
    elif hasattr(value, "detach") and hasattr(value, "numpy"):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().float().cpu().numpy().tobytes())
    elif hasattr(value, "tobytes") and hasattr(value, "dtype"):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif hasattr(value, "func") and hasattr(value, "keywords"):  # functools.partial
        _add(digest, (value.func, value.args, value.keywords), seen)
    elif type(value).__module__.split(".")[0] in ("torch", "numpy") and not hasattr(value, "state_dict"):
        # a dtype, a device, a function of theirs
        digest.update(str(getattr(value, "__name__", value)).encode())
    else:
        _add_object(digest, value, seen)


def _add_object(digest: Any, value: Any, seen: set[int]) -> None:
    """Add an object to a digest: a method, a module of torch by class, weights and settings, or a dataclass."""
    if isinstance(value, types.MethodType):  # as `sae.encode`
        digest.update(value.__func__.__qualname__.encode())
        _add(digest, value.__self__, seen)
    elif hasattr(value, "state_dict") and hasattr(value, "named_modules"):
        seen.add(id(value))
        for kind in dict.fromkeys(type(module) for module in value.modules()):
            digest.update(_class_source(kind))
        settings = {name: own for name, own in vars(value).items() if not name.startswith("_") and name != "training"}
        _add(digest, (dict(value.state_dict()), settings), seen)
    elif is_dataclass(value):
        _add(digest, (type(value), [(f.name, getattr(value, f.name)) for f in fields(value)]), seen)
    else:
        raise InputError(
            f"the recorder's function reads {type(value).__name__!r} from outside, whose content cannot be compared "
            "when the job resumes: use functions, numbers, text, tensors, arrays or modules of torch"
        )


def _class_source(kind: type) -> bytes:
    """Return the source of a class and of those that it inherits from, without torch's."""
    own = [c for c in kind.__mro__ if c.__module__.split(".")[0] not in ("torch", "builtins")]
    texts = [f"{kind.__module__}.{kind.__qualname__}"]
    for ancestor in own:
        try:
            texts.append(inspect.getsource(ancestor))
        except (OSError, TypeError):  # no source, as in an interpreter
            texts.append(f"{ancestor.__module__}.{ancestor.__qualname__}")
    return "\n".join(texts).encode()


def _source(function: types.FunctionType) -> bytes:
    """Return a function's source, or its compiled code where there is no source, as in an interpreter."""
    try:
        return textwrap.dedent(inspect.getsource(function)).encode()
    except (OSError, TypeError):
        code = function.__code__
        return code.co_code + repr((code.co_names, [c for c in code.co_consts if not hasattr(c, "co_code")])).encode()
