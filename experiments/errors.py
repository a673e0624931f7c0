"""The three ways a command can refuse, and the exit status of each.

    raise UsageError("fault.bit: got 40, allowed 0..31 for float32")   # exit status 2, nothing written

>>> "fault.bitt" + nearest("fault.bitt", ["fault.bit", "fault.kind"])
"fault.bitt; did you mean 'fault.bit'?"
"""

from __future__ import annotations

from fault_injection.names import nearest

__all__ = ["CheckRefusedError", "MissingResourceError", "TooFewWindowsError", "UsageError", "nearest"]


class UsageError(ValueError):
    """The user's request is not valid: an unknown key, a wrong type, a value out of range."""

    exit_status = 2


class TooFewWindowsError(UsageError):
    """The source has too little text for the requested windows."""


class MissingResourceError(RuntimeError):
    """Something the request needs is not here: a file, a model, a program, the network."""

    exit_status = 3


class CheckRefusedError(RuntimeError):
    """A check that guards the meaning of the results failed; further numbers could not be trusted."""

    exit_status = 1
