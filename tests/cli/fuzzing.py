"""How many cases a random test makes, how it is ended after some minutes, and what it lists at its end."""

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from tests.cli.checks import TooLongError


class TimeIsUpError(KeyboardInterrupt):
    """A long test has had its time; hypothesis lets this error through, as it tries again after others."""


class Failures:
    """The failures of a long test by where they were raised: the first of each, with its case."""

    def __init__(self) -> None:
        self.by_origin: dict[str, str] = {}

    def add(self, error: BaseException, case: Any) -> None:
        """Keep the failure unless another was raised at the same line."""
        *_, last = traceback.extract_tb(error.__traceback__)
        text = "".join(traceback.format_exception(error)[-4:])
        self.by_origin.setdefault(f"{type(error).__name__} at {last.filename}:{last.lineno}", f"{case!r:.2000}\n{text}")

    def check(self) -> None:
        """Fail if there are any, with all of them."""
        assert not self.by_origin, "\n\n".join(f"{name}: {text}" for name, text in self.by_origin.items())


def cases(n: int, *, long: bool, times: int = 30) -> Callable[[Any], Any]:
    """Return a decorator for a test of hypothesis: `n` cases, or a multiple of them; the same ones every time.

    The long test goes on after a failure and lists all of them at its end. FUZZ_MINUTES in the environment ends it
    after that time; how many cases there were is printed.
    """
    given_cases = n * (times if long else 1)
    configured = settings(
        max_examples=given_cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # a smaller failing case takes longer to find than to read
        suppress_health_check=list(HealthCheck),
    )
    minutes = float(os.environ.get("FUZZ_MINUTES", "inf")) if long else float("inf")

    def decorate(test: Any) -> Callable[[], None]:
        check, begun, done, failures = test.hypothesis.inner_test, time.monotonic(), 0, Failures()

        def counted(*arguments: Any, **options: Any) -> None:
            nonlocal done
            if time.monotonic() - begun > 60 * minutes:
                raise TimeIsUpError
            try:
                check(*arguments, **options)
            except (Exception, SystemExit, TooLongError) as error:
                if not long or type(error).__module__.startswith("hypothesis"):
                    raise
                failures.add(error, options or arguments)
            done += 1

        test.hypothesis.inner_test = counted
        run = configured(test)

        def every() -> None:
            try:
                with contextlib.suppress(TimeIsUpError):
                    run()
            finally:
                print(f"{done:,} of {given_cases:,} cases in {time.monotonic() - begun:.0f} s")
            failures.check()

        return every

    return decorate
