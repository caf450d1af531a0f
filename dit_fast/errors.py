"""What goes wrong for a reason that the user can mend.

Every message is one line: what was found, where, and what to do. The command line prints it and exits
with status 1; a library caller catches `DitFastError` or the built-in class beside it.
"""


class DitFastError(Exception):
    """Base class of all errors below."""


class ConfigError(DitFastError, ValueError):
    """An option or a combination of options that cannot work."""


class DataError(DitFastError, ValueError):
    """Training data that is missing, unreadable or contradicts the configuration."""


class CheckpointError(DitFastError, ValueError):
    """A checkpoint that is truncated, foreign, unsafe, or of another configuration."""


class OutputError(DitFastError, OSError):
    """A result that cannot be written: no space, no permission, a file in the way."""


class NonFiniteError(DitFastError, ArithmeticError):
    """A loss or gradient that is NaN or infinite; raised before the optimiser step."""


class RankError(DitFastError, RuntimeError):
    """Another process of a distributed run that hangs, is gone or failed."""


class MissingExtraError(DitFastError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""
