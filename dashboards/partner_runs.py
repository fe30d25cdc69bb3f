"""The other runs of a dashboard, those that hold the same transcripts first: they can be compared token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from workbench.counting import count_of
from workbench.dashboards.session import Session
from workbench.errors import InputError
from workbench.runs import Run


@dataclass(frozen=True)
class Partner:
    """Another run with `n_own` conversations. n_shared: of both runs, by id and length, of the `n` of the one shown.

    same: both hold the same conversations in the same order, which the studies of two runs need. problem: why the run
    cannot be read, or "".
    """

    name: str
    n_shared: int
    n: int
    n_own: int
    same: bool
    problem: str = ""

    def reason(self) -> str:
        """Return one sentence about what both runs hold."""
        if self.problem:
            return f"{self.name} cannot be read: {self.problem}"
        if self.same:
            return f"{self.name} holds the same {count_of(self.n, 'transcript')}, so both are compared token by token."
        shared = "none" if not self.n_shared else f"{self.n_shared:,}"
        more = ""
        if self.n_shared == self.n:
            more = " in another order" if self.n_own == self.n else f" beside {count_of(self.n_own - self.n, 'other')}"
        return (
            f"{self.name} holds {shared} of the {count_of(self.n, 'transcript')} of this run{more}, so they cannot be "
            "compared token by token."
        )


def partners(session: Session) -> list[Partner]:
    """Return the other runs of the dashboard: those with the same transcripts, then those that share most."""
    own = _keys(session.run)
    listed = [_partner(session, name, own) for name in session.registry.names if name != session.name]
    return sorted(listed, key=lambda one: (not one.same, -one.n_shared))  # equal ones stay in the given order


def chosen_partner(session: Session, listed: Sequence[Partner]) -> Partner | None:
    """Return the run that the address names, otherwise the first one; None if there is no other run."""
    name = session.choice.get("with", [one.name for one in listed])
    return next((one for one in listed if one.name == name), None)


def sentence(partner: Partner, listed: Sequence[Partner]) -> str:
    """Return why a run is the one to compare with, and which would be a better one, if any is."""
    better = next((one for one in listed if one.same), None)
    if partner.same or better is None:
        return partner.reason()
    return f"{partner.reason()} {better.reason()}"


def _keys(run: Run) -> "pd.MultiIndex":
    table = run.sequences
    return pd.MultiIndex.from_frame(table[["id", "length", "n_prompt"]])


def _partner(session: Session, name: str, own: "pd.MultiIndex") -> Partner:
    try:
        keys = _keys(session.other_run(name))
    except InputError as error:
        return Partner(name, 0, len(own), 0, same=False, problem=str(error))
    return Partner(name, int(own.isin(keys).sum()), len(own), len(keys), same=own.equals(keys))
