"""README, CONTRIBUTING and docs/ say what is so: links, code, commands, paths, names, tests, operations."""

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dit_fast
from benchmarks.ops.registry import REGISTRY
from dit_fast.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
RUNS = "<!-- runs -->\n"
"""Stands before the Python blocks that are run here, not only compiled."""
# Of torchrun, pytest and mkdocs.
FOREIGN_OPTIONS = {
    "--signals-to-handle",
    "--max-restarts",
    "--nproc-per-node",
    "--benchmark-compare",
    "--strict",
}
TOP_FOLDERS = ("kernels", "dit_fast", "benchmarks", "tests", "docs")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(what stands before, code) of the fenced blocks of a language."""
    text = page.read_text()
    return [
        (text[: match.start()], match[3])
        for match in FENCE.finditer(text)
        if match[2] in (languages or ("",))
    ]


def inline(page: Path) -> list[str]:
    """What stands between single backticks outside of blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def indented(page: Path) -> list[str]:
    """Lines of indented blocks."""
    return re.findall(r"^ {4}(\S.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings' names in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name}: {target} does not exist"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}: no such heading"


@each_page
def test_python_blocks_compile(page: Path) -> None:
    for before, code in blocks(page, "python"):
        compile(code, f"{page.name}:{before.count(chr(10)) + 2}", "exec")


def runnable() -> list[Any]:
    return [
        pytest.param(code, id=f"{page.stem}-{before.count(chr(10)) + 1}")
        for page in PAGES
        for before, code in blocks(page, "python")
        if before.endswith(RUNS)
    ]


@pytest.mark.parametrize("code", runnable())
def test_blocks_that_are_marked_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of every `dit-fast` command line, in blocks and in the text; placeholders "..." left out."""
    lines = [line for _, code in blocks(page, "", "text", "bash") for line in code.splitlines()]
    for line in [*lines, *indented(page), *inline(page)]:
        found = re.search(r"(?:^|[ /])(?:dit-fast|-m dit_fast(?:\.cli)?) ([a-z].*)$", line)
        if found:
            yield [argument for argument in shlex.split(found[1], comments=True) if argument != "..."]


@each_page
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments in commands(page):
        name = arguments[0]
        assert name in COMMANDS, f"{page.name}: dit-fast {name}"
        if len(arguments) == 1:
            continue
        monkeypatch.setattr(importlib.import_module(f"dit_fast.cli.{name}"), "run", lambda options: 0)
        try:
            status: Any = main(arguments)
        except SystemExit as ended:
            status = ended.code
        assert not status, f"{page.name}: dit-fast {shlex.join(arguments)}: {capsys.readouterr().err}"


@pytest.fixture(scope="module")
def options() -> set[str]:
    """All options of all commands and of benchmarks."""
    known = set(FOREIGN_OPTIONS)
    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"dit_fast.cli.{name}").add_arguments(parser)
        known |= {option for action in parser._actions for option in action.option_strings}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r"\"(--[\w-]+)\"", path.read_text()))
    return known


@each_page
def test_options_exist(page: Path, options: set[str]) -> None:
    for text in inline(page):
        for option in re.findall(r"(?:^| )(--[a-z][\w-]+)", text):
            assert option in options, f"{page.name}: `{text}`: no command has {option}"


@each_page
def test_paths_modules_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        file = ROOT.joinpath(*module.split("."))
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{page.name}: {module}"
    for quoted in inline(page):
        path, _, test = quoted.partition("::")
        if path.split("/")[0] not in TOP_FOLDERS or not re.fullmatch(r"[\w./*-]+/[\w./*-]*", path):
            continue
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: {path} does not exist"
        if test:
            defined = f"def {test}(" in (ROOT / path).read_text()
            assert defined, f"{page.name}: {path} has no {test}"


@each_page
def test_names_of_the_package_exist(page: Path) -> None:
    for name in inline(page):
        if not re.fullmatch(r"dit_fast(\.\w+)+(\(.*\))?", name):
            continue
        parts = name.partition("(")[0].split(".")
        found: Any = importlib.import_module(parts[0])
        for number, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:number]))
            found = getattr(found, part)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1800


def test_every_operation_has_its_section_and_its_bytes() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    sections = re.findall(r"^## `(\w+)`$", text, re.MULTILINE)
    assert set(sections) >= {spec.name for spec in REGISTRY.values()}
    assert len(sections) == len(set(sections))
    rows = dict(re.findall(r"^\| (`\w+`) \| (\d+ \| \d+) \|", text, re.MULTILINE))
    B, T, D = 2, 64, 40
    for spec in REGISTRY.values():
        # What is left of a count that grows with the batch is weights; unpatchify's tokens have P P C = 32 columns.
        unit = B * T * (32 if spec.name == "unpatchify" else D)
        counts = (
            count(2 * B, T, D) - count(B, T, D) for count in (spec.forward_elements, spec.backward_elements)
        )
        assert rows[f"`{spec.name}`"] == " | ".join(f"{count / unit:g}" for count in counts), spec.key


def test_the_profile_that_is_read_is_the_recorded_one() -> None:
    recorded = (ROOT / "benchmarks" / "results" / "profile_cpu.txt").read_text()
    ((_, shown),) = blocks(ROOT / "docs" / "profiling.md", "text")
    assert shown == recorded


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "docs")) for path in DOCS)


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert pages >= {path.relative_to(ROOT / "docs").with_suffix("") for path in DOCS}
    # Resources that a browser would fetch from elsewhere; links are not.
    for page in site.rglob("*.html"):
        assert not re.findall(
            r'<(?:script|img|iframe)[^>]+src="https?:|<link rel="stylesheet" href="https?:', page.read_text()
        )
    # The API pages have every public name with its signature.
    reference = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    entries = {name.rpartition(".")[2] for name in re.findall(r'<h[2-4] id="([\w.]+)"', reference)}
    assert entries >= {*dit_fast.__all__, *(spec.name for spec in REGISTRY.values())} - {"DiT_models"}
    assert "input_size" in reference
