"""Errors that a user can mend; the command line prints their message without a traceback."""

from __future__ import annotations


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do."""


class TeacherLost(RunError):
    """The teacher does not answer this rank any more; the others do not know it yet."""


class GivenUp(RunError):
    """One rank cannot go on, and every rank knows it: they stop at the same place, where they can still save."""
