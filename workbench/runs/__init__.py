"""Runs: the store that a capture writes and everything else reads. Never imports torch."""

from workbench.runs.reader import Run, open_run

__all__ = ["Run", "open_run"]
