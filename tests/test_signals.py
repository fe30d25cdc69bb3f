"""The first signal asks a job to stop, the second ends it at once, and afterwards signals are as before."""

import os
import signal
import threading

import pytest

from workbench.errors import JobError
from workbench.signals import StopSignal


def test_the_first_signal_asks_and_the_handlers_are_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal("the job") as stop:
        stop.check()  # negative control: nobody asked
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(JobError, match="the job was stopped by SIGTERM"):
            stop.check()
        assert signal.getsignal(signal.SIGTERM) == before, "a second signal stops at once"
    assert "once more stops at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with StopSignal("the job"):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
