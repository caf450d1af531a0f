"""Errors that a user can correct.

Every message is one line: what was found, where, and what to do. The command line prints it and exits with status 1; a
program catches `DitFastError`, or the built-in class that each error also derives from.
"""


class DitFastError(Exception):
    """Base class of all errors of dit_fast."""


class ConfigError(DitFastError, ValueError):
    """An option, or a combination of options, that is not supported."""


class DataError(DitFastError, ValueError):
    """Training data that are missing, unreadable or contradict the configuration."""


class CheckpointError(DitFastError, ValueError):
    """A checkpoint that is damaged, unsafe, of another format or of another configuration."""


class OutputError(DitFastError, OSError):
    """An output that cannot be written: no space, no permission, or an existing file."""


class NonFiniteError(DitFastError, ArithmeticError):
    """A loss or gradient that is NaN or infinite; raised before the optimizer step."""


class RankError(DitFastError, RuntimeError):
    """Another process of a distributed run that hangs, exited or failed."""


class MissingExtraError(DitFastError, ImportError):
    """An optional package that is not installed; the message names the extra that installs it."""
