"""The command in an error about a missing extra works where the package came from."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from dit_fast import errors
from dit_fast.errors import MissingExtraError

MESSAGE = "--x: peft is not installed; pip install 'dit-fast[lora]'"
ROOT = Path(__file__).parents[2]


class Installed:
    def __init__(self, origin):
        self.text = origin if origin is None or isinstance(origin, str) else json.dumps(origin)

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.text


def test_from_a_checkout():
    assert str(MissingExtraError(MESSAGE)) == (f"--x: peft is not installed; pip install -e '{ROOT}[lora]'")


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'dit-fast[lora]'"),
        ("{torn", "pip install 'dit-fast[lora]'"),
        ("[1]", "pip install 'dit-fast[lora]'"),
        (
            {"url": "file:///w/dit_fast-0.1.0.whl", "archive_info": {}},
            "pip install 'dit-fast[lora] @ file:///w/dit_fast-0.1.0.whl'",
        ),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            "pip install 'dit-fast[lora] @ git+https://host/x.git@v1'",
        ),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'dit-fast[lora] @ git+https://host/x.git'",
        ),
    ],
)
def test_from_elsewhere(origin, command, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "dit_fast" / "errors.py"))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(origin))
    assert str(MissingExtraError(MESSAGE)) == f"--x: peft is not installed; {command}"
