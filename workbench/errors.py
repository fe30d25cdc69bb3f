"""Errors a user can mend: one line that says what was got, what was wanted and the remedy."""


class InputError(ValueError):
    """Refused input or wrong usage; the command line prints it as one line and exits with 2."""


class JobError(RuntimeError):
    """A job that began and could not go on; the command line prints it as one line and exits with 1."""
