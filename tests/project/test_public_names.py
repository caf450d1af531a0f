"""The names of `dit_fast`: listed once for readers, once for type checkers, imported when they are used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dit_fast

ROOT = Path(__file__).resolve().parents[2]


def test_every_name_is_what_its_module_has() -> None:
    assert dit_fast.__all__ == sorted(set(dit_fast.__all__))
    assert set(dit_fast.__all__) == dit_fast._MODULES.keys() - {"ModelMixin"}
    assert set(dit_fast.__all__) < set(dir(dit_fast))
    for name in dit_fast.__all__:
        value = getattr(dit_fast, name)
        assert vars(sys.modules[dit_fast._MODULES[name]])[name] is value
        assert inspect.getdoc(value), f"dit_fast.{name} has no docstring"
    with pytest.raises(AttributeError, match="'dit_fast' has no attribute 'train_model'"):
        dit_fast.train_model  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "dit_fast" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {name: dit_fast._MODULES[name] for name in dit_fast.__all__}


def test_importing_the_package_loads_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import dit_fast; dir(dit_fast); dit_fast.__version__\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['dit_fast']\n"


@pytest.mark.parametrize("module", ["dit_fast", "dit_fast.cli"])
def test_the_module_is_the_command(module: str) -> None:
    command = [sys.executable, "-m", module]
    help_text = subprocess.run(
        [*command, "plot", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert help_text.stdout.startswith("usage: dit-fast plot ")
    wrong = subprocess.run([*command, "plto"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("dit-fast: error: ")
