# SPDX-License-Identifier: Apache-2.0
"""What can go wrong, as a tree under :class:`OffsiteError`.

A message has the offending value, what is allowed, and the next step, on one line. The command line
prints it without a traceback and exits with :attr:`OffsiteError.exit_status`.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class OffsiteError(Exception):
    """Anything that this package refuses; the base of the tree."""

    exit_status: int = 2
    """Process exit status: 2 is the user's mistake, 1 anything else."""


class ConfigError(OffsiteError):
    """A flag, a YAML key or a value that no stage accepts."""


class PlanError(OffsiteError):
    """A split plan that the full model cannot follow."""


class FamilyError(OffsiteError):
    """A model family whose blocks cannot be found or may not be separated."""


class BundleError(OffsiteError):
    """A bundle of the wrong kind, or one whose parts contradict each other."""


class IntegrityError(BundleError):
    """A bundle that is not whole or not unaltered."""


class PlugInError(BundleError):
    """An adapter bundle that does not fit the full model."""


class DataError(OffsiteError):
    """Text, a dataset or a tokenizer that cannot be used as asked."""


class CacheError(OffsiteError):
    """A teacher cache of something else than what is distilled, or a damaged one."""


class StorageError(OffsiteError):
    """A path that cannot be read or written: missing, in the way, or no space left."""


class ClusterError(OffsiteError):
    """Work on Ray that cannot go on: workers lost, or failed for no reason of the user's."""

    exit_status = 1


class JobError(ClusterError):
    """A job that did not come to a good end; this process ends as it did."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        """Say what is wrong, and with which status the job ended."""
        super().__init__(message)
        self.exit_status = exit_status


class UnfitError(OffsiteError):
    """A machine or a cluster on which not all is as it must be."""

    exit_status = 1


class TrainingError(OffsiteError):
    """A run that cannot go on: a worker lost, an engine that failed."""

    exit_status = 1


class DivergedError(TrainingError):
    """A loss that is not a number; to go on from a checkpoint would lead there again."""


class RequestError(OffsiteError):
    """A request that a served model cannot answer as it is."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        """Say what is wrong, and with which parameter of the request."""
        super().__init__(message)
        self.parameter = parameter


class BusyError(OffsiteError):
    """More requests than the service holds; the same one may be answered a moment later."""

    exit_status = 1


class RegistryError(OffsiteError):
    """A tenant, a version or a key that cannot be as asked."""


class MissingError(RegistryError):
    """A tenant, a version or a key that there is not."""


class LostError(OffsiteError):
    """A replica that was lost while it answered; the same request may succeed on another."""

    exit_status = 1


class ResumeError(TrainingError):
    """A checkpoint of another run than the one that is to go on."""

    exit_status = 2


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, cut to one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


_MANY = 20
"""Names that one line can list beside a better answer."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the one-line message for a name that is in no registry.

    Args:
        kind: What the name stands for, e.g. ``"fine-tuning method"``.
        name: The offending name.
        known: Every allowed name; listed, unless they are many and one of them is meant.
    """
    names = sorted(known)
    meant = did_you_mean(name, names)
    listed = f" (known: {', '.join(names)})" if not meant or len(names) <= _MANY else ""
    return f"unknown {kind} {name!r}{meant}{listed}"
