"""The options of a record: which layers, heads, experts and tokens of a quantity, and how they are reduced."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workbench import harmony
from workbench.errors import InputError

OWN_REDUCTIONS = ("raw", "norm", "mean", "moments")  # of quantities with a name of their own
REDUCTIONS = (*OWN_REDUCTIONS, "message")
TOKENS = ("role", "channel", "part", "message", "position", "every", "last")
_INDEX = {"heads": ("head", "kv"), "experts": ("expert",), "slots": ("slot",)}  # option → axes that it selects from
_RANGE = re.compile(r"(-?\d+)(?:-(\d+))?")


def read(text: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the options that follow a name in `--record`, as "layers=0-3 channel=final".

    Raises:
        InputError: an option is unknown, has no value or a wrong one, or is given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        key = {"layer": "layers", "head": "heads", "expert": "experts", "slot": "slots", "channels": "channel"}.get(
            key, key
        )
        if key not in _READS:
            raise InputError(
                f"--record {text}: {key!r} is not an option: use {', '.join(f'{o}=' for o in _READS if o != 'index')}"
            )
        if not value:
            raise InputError(f"--record {text}: {key!r} has no value: write {key}={_EXAMPLES.get(key, '1')}")
        if key in options:
            raise InputError(f"--record {text}: {key}= is given twice: give it once, with commas between values")
        options[key] = _READS[key](f"--record {text}", key, value)
    return options


def _names(text: str, key: str, value: str) -> list[str]:
    return value.split(",")


def _integers(text: str, key: str, value: str) -> tuple[int, ...]:
    numbers: list[int] = []
    for part in value.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"{text}: {key} takes numbers and ranges, as in {key}=0-3,7; got {part!r}")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(numbers))


def _number(text: str, key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"{text}: {key} takes a number from 1, as in {key}=4; got {value!r}")
    return int(value)


def _word(text: str, key: str, value: str) -> str:
    return value


_READS: dict[str, Callable[[str, str, str], Any]] = {
    "layers": _integers,
    "heads": _integers,
    "experts": _integers,
    "slots": _integers,
    "index": _integers,
    "role": _names,
    "channel": _names,
    "part": _names,
    "message": _integers,
    "position": _integers,
    "every": _number,
    "last": _number,
    "reduce": _word,
    "sketch": _number,
}
_EXAMPLES = {"role": "assistant", "channel": "final", "part": "content", "layers": "0-3", "reduce": "norm"}


def numbers(where: str, key: str, value: Any) -> tuple[int, ...]:
    """Return numbers that are given as one, as several, or as text with ranges.

    Raises:
        InputError: the value is neither numbers nor ranges of numbers.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return _integers(where, key, value)
    if isinstance(value, bool) or not isinstance(value, int | Sequence):
        raise InputError(f"{where}: {key} takes numbers and ranges, as in {key}='0-3,7'; got {value!r}")
    return (value,) if isinstance(value, int) else tuple(dict.fromkeys(int(v) for v in value))


def layers(where: str, given: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """Return the layers in ascending order, all if none are given; −1 is the last.

    Raises:
        InputError: the model does not have a layer.
    """
    if missing := [layer for layer in given if not -n_layers <= layer < n_layers]:
        raise InputError(f"{where}: no layer {missing[0]}; the model has layers 0 to {n_layers - 1}")
    return tuple(sorted({layer % n_layers for layer in given})) or tuple(range(n_layers))


def index(where: str, what: str, axes: Mapping[str, int], options: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """Take the options that select heads, experts or slots; return the numbers and their axis.

    axes: of a token's values, name → size. `index`, an older name, selects from the first axis.

    Raises:
        InputError: the quantity has no such axis, or fewer entries.
    """
    given = [(key, options.pop(key)) for key in (*_INDEX, "index") if key in options]
    if not given:
        return (), ""
    if len(given) > 1:
        raise InputError(f"{where}: {given[0][0]} and {given[1][0]} are two selections of one axis: give one of them")
    key, chosen = given[0]
    allowed = tuple(axes)[:1] if key == "index" else _INDEX[key]
    axis = next(
        (name for name in axes if name in allowed and name in {n for names in _INDEX.values() for n in names}), None
    )
    if axis is None:
        has = [option for option, names in _INDEX.items() if any(name in axes for name in names)]
        instead = f"use {has[0]}=" if has else f"leave {key}= out"
        raise InputError(f"{where}: {what} has no {'heads or slots' if key == 'index' else key}: {instead}")
    if wrong := [i for i in chosen if not 0 <= i < axes[axis]]:
        name = {"kv": "key-value head"}.get(axis, axis)
        raise InputError(f"{where}: {key}={wrong[0]}, but {what} has {name}s 0 to {axes[axis] - 1}")
    return tuple(sorted(chosen)), axis


def tokens(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take the options that select tokens, as arguments of `harmony.token_set`.

    Raises:
        InputError: a role, channel or part is unknown.
    """
    chosen = {key: options.pop(key) for key in TOKENS if key in options}
    chosen = {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}
    try:
        harmony.check_token_set(**chosen)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return chosen


def reduction(where: str, options: dict[str, Any], allowed: Sequence[str] = REDUCTIONS, why: str = "") -> str:
    """Take `reduce`, "raw" if it is not given.

    Raises:
        InputError: it is unknown, or this quantity does not have it.
    """
    reduce = str(options.pop("reduce", "raw"))
    if reduce not in allowed:
        raise InputError(f"{where}: reduce={reduce}: use one of {', '.join(allowed)}{why}")
    return reduce
