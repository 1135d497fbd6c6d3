"""What can go wrong, sorted by whose turn it is: the caller's (exit code 2) or the job's (exit code 1)."""

from __future__ import annotations

import errno

__all__ = ["DISK_FULL", "HesperError", "Interrupted", "JobError", "OutOfReach", "Unverified", "UsageError"]

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class HesperError(Exception):
    """Any failure hesper explains in one sentence; ``exit_code`` is what the command line ends with.

    >>> UsageError("no such folder").exit_code, JobError("the disk is full").exit_code
    (2, 1)
    """

    exit_code: int = 1


class UsageError(HesperError):
    """The request or its input is wrong: the caller can mend it."""

    exit_code: int = 2


class JobError(HesperError):
    """The request was right, but the job could not be done."""

    exit_code: int = 1


class OutOfReach(JobError):
    """No plan among those tried keeps the budget, however much they cut."""


class Interrupted(JobError):
    """The job was stopped from outside, and the same request, made again, goes on with what is finished."""


class Unverified(UserWarning):
    """Something runs where nothing was measured on images that fitted nothing."""
