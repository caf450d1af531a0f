"""docs/adding-a-kernel.md, followed to the letter in a copy of the tree: what it adds passes the proofs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreter import interpreter_only

pytestmark = interpreter_only

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adding-a-kernel.md"
BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PROOFS = {
    "test_float64_agrees": "B2-T1-D72 or B1-T9-D1152", "test_programs_that_walk_several_tiles": "film",
    "test_as_accurate_as_torch": "autocast-film", "test_empty": "film", "test_hard_rows": "NaN",
    "test_layout_does_not_matter": "film", "test_gradcheck": "film", "test_opcheck": "film",
    "test_runs_agree_to_the_bit": "D72", "test_misfits_are_refused": "film", "test_strangers_are_refused": "film",
    "test_width_limit": "film",
    "test_an_entry_is_named_as_its_operation": "film",
}  # fmt: skip
COMPLETE = ("test_every_exported_operation_is_proven", "test_every_registered_operation_is_proven")


def apply(kind: str, file: Path, text: str) -> None:
    """A diff replaces the lines that it quotes, which must be there once; another block is a new file."""
    if kind != "diff":
        assert not file.exists(), f"{file.name} is there already"
        file.write_text(text)
        return
    lines = text.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    content = file.read_text()
    assert content.count(old) == 1, f"the page quotes what {file.name} does not have:\n{old}"
    file.write_text(content.replace(old, new))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the operation of the page."""
    copy = tmp_path_factory.mktemp("checkout")
    unused = shutil.ignore_patterns("__pycache__", "results")
    for name in ("dit_fast", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unused)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) == 7
    for kind, name, text in blocks:
        apply(kind, copy / name, text)
    return copy


def call(tree: Path, *command: str, interpret: bool = True) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_it_passes_the_proofs(tree: Path) -> None:
    files = [
        "tests/kernels/test_ops.py",
        "tests/kernels/test_refusals.py",
        "tests/operations/test_kernel_proofs.py",
    ]
    cases = " or ".join(f"({proof} and ({case}))" for proof, case in PROOFS.items())
    options = ["-v", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", f"film and ({cases}) or is_proven"]
    said = call(tree, "pytest", *options, *files)
    for proof in (*PROOFS, *COMPLETE):
        assert re.search(rf"::{proof}\b.* PASSED", said), f"{proof} was not run:\n{said}"


def test_its_files_are_in_order(tree: Path) -> None:
    pytest.importorskip("ruff")
    call(tree, "ruff", "check", "kernels")
    call(tree, "ruff", "format", "--check", "kernels")


@pytest.mark.slow
def test_it_compiles_for_gpus(tree: Path) -> None:
    corner = ["--capability", "90", "--dtypes", "bf16", "--width", "1152", "--jobs", "1"]
    call(tree, "benchmarks.compile.static_report", "--op", "film", "--check", *corner, interpret=False)
