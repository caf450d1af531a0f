"""Errors that a user can correct.

Every message is one line: what was found, where, and what to do. The command line prints it and exits with status 1; a
program catches `DitFastError`, or the built-in class that each error also derives from.
"""

import importlib.metadata
import json
import re
import shlex
from pathlib import Path


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
    """An optional package that is not installed; the message names the extra that installs it.

    Args:
        message: ends with "pip install 'dit-fast[NAME]'"; replaced by a command that installs the extra from where this
            package came from: a checkout, a wheel, a repository or an index.
    """

    def __init__(self, message: str):
        super().__init__(_INSTALL.sub(lambda found: _install_command(found[1]), message))


_INSTALL = re.compile(r"pip install 'dit-fast\[([\w-]+)\]'")


def _install_command(extra: str) -> str:
    """The command that installs an extra; see PEP 610 for the record of a package's origin."""
    checkout = Path(__file__).parents[1]
    if (checkout / "pyproject.toml").exists():
        return f"pip install -e {shlex.quote(f'{checkout}[{extra}]')}"
    try:
        text = importlib.metadata.distribution("dit-fast").read_text("direct_url.json")
        origin = json.loads(text) if text else None
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = None
    if not isinstance(origin, dict) or "url" not in origin:
        return f"pip install 'dit-fast[{extra}]'"
    source = str(origin["url"])
    if isinstance(origin.get("vcs_info"), dict):
        revision = origin["vcs_info"].get("requested_revision")
        source = f"{origin['vcs_info'].get('vcs', 'git')}+{source}" + (f"@{revision}" if revision else "")
    return f"pip install {shlex.quote(f'dit-fast[{extra}] @ {source}')}"
