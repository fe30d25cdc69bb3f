"""Recognize errors that come from a lack of memory, whatever a library makes of it, and limits that are too small."""

import errno
import resource
import signal
import threading
from collections.abc import Iterator

from workbench.errors import InputError, JobError

_LEAST_BYTES = 768 * 2**20  # below, numpy's OpenBLAS ends the process or sends itself SIGINT when it is imported
MODEL_BYTES = 5 * 2**29  # of addresses, which threads reserve: with less, a pass of a model ends the process
_TEXTS = (
    "allocate memory",
    "not enough memory",
    "failed to map segment",
    "can't start new thread",
    "without setting an exception",  # what Python makes of a failed allocation in an extension: a SystemError
    "error return without exception set",
)


def lack_of_memory(error: BaseException) -> BaseException | None:
    """Return the error, or the one that it follows from, that is a lack of memory on this machine or its GPU."""
    return next((one for one in _chain(error) if _is_lack(one)), None)


def _is_lack(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, InputError | JobError):  # what they state is about numbers, such as an estimate's
        return False
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in _TEXTS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def raise_if_limited(error: BaseException) -> None:
    """Raise an error that is a lack of memory in a process whose memory is limited, so that it is not taken for damage.

    Without a limit it is not raised: damaged metadata can claim to be larger than any machine.

    Raises:
        MemoryError: it is one.
    """
    lack = lack_of_memory(error)
    if lack is not None and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        raise MemoryError(str(lack)) from error


def refuse_small_limit(least: int = _LEAST_BYTES) -> None:
    """Check that the limit of this process' memory leaves room for the libraries.

    Raises:
        InputError: it is smaller than `least` bytes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= limit < least:
        raise InputError(
            f"memory is limited to {limit // 2**20:,} MiB (ulimit -v); this command needs at least "
            f"{least // 2**20:,} MiB: raise the limit"
        )


def end_within(seconds: int) -> None:
    """End the process by SIGALRM if it waits longer than this for its threads when it exits.

    A thread that lacked memory, or could not be started, may be waited for without end: a command then stays after
    its error.
    """
    # what `concurrent.futures` uses: it is called before the threads are waited for, `atexit` only afterwards
    threading._register_atexit(signal.alarm, seconds)  # type: ignore[attr-defined]
