"""README, documentation and docstrings use the field's words: a few phrases that need a second reading are refused."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("dit_fast", "kernels", "benchmarks")

# Phrase: what to write.
PHRASES = {
    r"\btold\b(?! apart)": "conditioned on, specified",
    r"\b(make|made|makes|making)( \w+)? again\b": "recompute, recreate",
    r"\b(goes|gone|going) on\b": "resumes, continues",
    r"\b(stands? in for|stand-ins?)\b": "mock, stub, drop-in for",
    r"\bcarr(y|ied|ies) out\b": "execute",
    r"\b(of nothing(?! else)|nothing of it)\b": "none, not used",
    r"(?<!there )\b(is|are) no (?!longer\b|more\b|less\b|later\b)[a-z]": "is not a",
    r"\b(?<!about )(one|numbers?|bytes|images|launches|tokens|barriers|instructions) an? "
    r"(step|rank|image|sample|parameter|token|tile|row|GPU|second|block|hop)\b": "per step, per rank",
    r"\b(\w*optimis|initialis|normalis|specialis|colour|behaviour|neighbour|labelled|grey)\w*": "American spelling",
}


def without_code(text: str) -> str:
    """Text without code blocks, code in backticks, and the targets of links."""
    text = re.sub(r"^( *)```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", "`x`", text)


def faults(text: str) -> Iterator[str]:
    prose = without_code(text)
    for phrase, better in PHRASES.items():
        for match in re.finditer(phrase, prose, re.IGNORECASE):
            near = " ".join(prose[max(0, match.start() - 40) : match.end() + 30].split())
            yield f"{match[0]!r} ({better}): ...{near}..."


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages(page: Path) -> None:
    assert not list(faults(page.read_text()))


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path)
        for fault in faults(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "The model is told the class.",
        "The activation is made again in the backward pass.",
        "A run that goes on is bitwise identical.",
        "A stand-in for the decoder.",
        "This is no checkpoint.",
        "38 bytes a parameter.",
        "The optimiser's state.",
    ],
)
def test_planted_phrases_are_found(text: str) -> None:
    assert len(list(faults(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "There is no mask, and there are no others; it is no longer read.",
        "`told` and `optimiser.pt` are names. See [this](https://example.org/behaviour).",
        "```\ngoes on\n```\nOne image at a time, a batch of images of one size.",
    ],
)
def test_ordinary_sentences_pass(text: str) -> None:
    assert not list(faults(text))
