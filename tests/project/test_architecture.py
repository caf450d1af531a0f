"""What the code may import, read and do, held by reading it (ast) and by importing it under watch."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Packages from the bottom to the top: a file imports its own package and those before it. "" is dit_fast itself.
LAYERS = (
    "", "errors", "utils", "kernels", "model", "models", "diffusion", "sampling", "distributed", "checkpoint",
    "download", "encoders", "interop", "data", "evaluation", "training", "cli", "__main__",
)  # fmt: skip
HEAVY = frozenset(
    ("diffusers", "flash_attn", "apex", "nvtx", "tensorboard", "wandb", "torch_fidelity", "matplotlib")
    + ("sklearn", "mlxtend", "torchvision", "timm", "transformers", "accelerate")
)
# Of torchrun, Slurm, C++ builds and OpenMP; there are no variables of our own.
ENVIRONMENT = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID",
    "TORCHELASTIC_USE_AGENT_STORE", "CXX", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT",
}  # fmt: skip

# Calls that read or write files past dit_fast/utils/files.py.
FILE_CALLS = re.compile(
    r"(^|\.)open$|\.(read_text|read_bytes|write_text|write_bytes|tofile|savefig|memmap)$"
    r"|^(np|numpy)\.(load|save|savez|savez_compressed|fromfile|loadtxt|genfromtxt)$|^json\.(load|dump)$"
)
# Functions that hand a temporary path to what is written within their call.
WRITERS = ("write_atomically", "publish")
MAY_OPEN = {
    "dit_fast.utils.files": "the reader and the writer",
    "dit_fast.errors": "the record of the package's origin, by importlib.metadata",
    "dit_fast.utils.terminal": "/dev/null, in the place of a stream that is closed",
    "dit_fast.utils.locks": "the lock's own file, without following links; /proc/self/mountinfo",
    "dit_fast.distributed.world": "/proc/PID/cmdline of the parent",
    "dit_fast.data.decode": "Pillow opens images, which the listing found to be files, by format",
    "dit_fast.data.image_files": "the first bytes of a file, which the listing found to be one",
    "dit_fast.data.shards": "the temporary file of publish",
    "dit_fast.sampling.shards": "arrays in memory, within write_atomically; SampleShards.open",
    "dit_fast.cli.sample": "SampleShards.open",
    "dit_fast.cli.sample_request": "SampleShards.open",
    "dit_fast.evaluation.images": (
        "members of a zip archive, whose file was checked; the temporary path that write_atomically gives"
    ),
    "dit_fast.checkpoint.weight_file": "members of a zip archive, whose file was checked",
    "dit_fast.training.log": "appends to the run's log, unbuffered; the grid that the run has just drawn",
    "dit_fast.checkpoint.manifest": "a file of a checkpoint's temporary folder; bytes of a checked file",
    "dit_fast.kernels.tuned": "the package's own table; kernels import nothing of ours",
    "dit_fast.download": "a partial download, put in place once its SHA-256 holds",
}


def module_files() -> list[Path]:
    """Files of the package, each kernel file once, as kernels/*.py."""
    inside = [
        path for path in (ROOT / "dit_fast").rglob("*.py") if path.parts[len(ROOT.parts) + 1] != "kernels"
    ]
    return sorted([*inside, *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("dit_fast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def imports(path: Path, top_level_only: bool = False) -> Iterator[tuple[ast.stmt, str]]:
    """Absolute names that a file imports; `from dit_fast import x` counts as dit_fast.x."""
    here = tree(path)
    lazy = {
        inner
        for outer in ast.walk(here)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(here):
        if top_level_only and node in lazy:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}: relative import"
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}" if node.module == "dit_fast" else str(node.module)


def level(name: str) -> int:
    """Level of dit_fast.<part>...; an attribute of dit_fast itself, such as __version__, is level 0."""
    part = (name.split(".") + [""])[1]
    return LAYERS.index(part) if part in LAYERS or not part.startswith("__") else 0


# Each rule yields what a file breaks; a test goes through all files and reports every fault at once.


def wrong_way(path: Path) -> Iterator[str]:
    own = module_name(path)
    if own == "dit_fast":
        return  # it hands on names of every package; `__getattr__` imports them when they are used
    for node, name in imports(path):
        root = name.split(".")[0]
        if root in ("benchmarks", "tests", "kernels"):
            yield f"{where(path, node)} imports {name}"
        if root == "dit_fast" and level(name) > level(own):
            yield f"{where(path, node)}: {own} imports {name}, which is above it"
        if own.startswith("dit_fast.kernels"):
            allowed = root in ("torch", "triton") or root in sys.stdlib_module_names
            if not (allowed or name.startswith("dit_fast.kernels")):
                yield f"{where(path, node)} imports {name}"


def heavy_imports(path: Path) -> Iterator[str]:
    for node, name in imports(path, True):
        if name.split(".")[0] in HEAVY:
            yield f"{where(path, node)}: {name} is imported with the file, not where it is used"


def unpickled_or_atomic(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            re.search(r"(pickle|dill|joblib)\.(load|loads|Unpickler)$", called)
            or keywords.get("weights_only", "True") != "True"
            or keywords.get("allow_pickle", "False") != "False"
            or (called == "torch.load" and "weights_only" not in keywords)
        ):
            yield f"{where(path, node)}: {called} may unpickle"
        if called.startswith("tl.atomic_"):
            yield f"{where(path, node)}: {called} sums in no fixed order"


def own_environment(path: Path) -> Iterator[str]:
    lines = path.read_text().splitlines()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield f"{where(path, node)}: a name imported from os"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            read = re.search(
                r"os\.(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\()\"(\w+)\"", lines[node.lineno - 1]
            )
            if read is None:
                yield f"{where(path, node)}: the environment is read as a whole or written"
            elif read[1] not in ENVIRONMENT:
                yield f"{where(path, node)}: the environment variable {read[1]}"


def own_files(path: Path) -> Iterator[str]:
    here = tree(path)
    given = {
        inner
        for outer in ast.walk(here)
        if isinstance(outer, ast.Call) and ast.unparse(outer.func).rpartition(".")[2] in WRITERS
        for argument in outer.args
        if isinstance(argument, ast.Lambda)
        for inner in ast.walk(argument)
    }
    for node in ast.walk(here):
        if isinstance(node, ast.Call) and node not in given and module_name(path) not in MAY_OPEN:
            called = ast.unparse(node.func)
            if FILE_CALLS.search(called) and called not in ("os.open", "webbrowser.open"):
                yield f"{where(path, node)}: {called} reads or writes a file past dit_fast/utils/files.py"


def test_every_exception_is_one() -> None:
    """A file that opens nothing by itself any more is taken off the list."""
    needless = set(MAY_OPEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "MAY_OPEN", {})
        for path in module_files():
            if any(own_files(path)):
                needless.discard(module_name(path))
    assert not needless - {"dit_fast.utils.files"}


@pytest.mark.parametrize("rule", [wrong_way, heavy_imports, unpickled_or_atomic, own_environment, own_files])
def test_every_file_keeps_the_rule(rule: Callable[[Path], Iterator[str]]) -> None:
    files = module_files()
    assert len(files) > 50
    faults = [fault for path in files for fault in rule(path)]
    assert not faults, "\n".join(faults)


PLANTED = """
import os
import benchmarks.tool
import dit_fast.cli.main
import numpy
import matplotlib
from os import path
import torch, pickle

pickle.loads(b"")
torch.load("x", weights_only=False)
torch.load("x")
numpy.load("x", allow_pickle=True)
tl.atomic_add(p, x)
os.environ.get("DIT_FAST_MODE")
everything = os.environ
os.environ["RANK"]


def late():
    import diffusers


def files():
    open("x")
    Path("x").write_text("")
    write_atomically(Path("x"), lambda temporary: temporary.write_text(""))
    np.load("x")
    json.load(file)
    figure.savefig("x")
"""


def test_the_rules_see_planted_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernels" / "planted.py"
    path.parent.mkdir()
    path.write_text(PLANTED)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)

    def lines(rule: Callable[[Path], Iterator[str]]) -> list[int]:
        return [int(re.findall(r":(\d+)", fault)[0]) for fault in rule(path)]

    # The line of benchmarks breaks two rules; a kernel file imports neither numpy nor what is above it.
    assert sorted(lines(wrong_way)) == [3, 3, 4, 4, 5, 6, 21]
    assert lines(heavy_imports) == [6]
    assert sorted(lines(unpickled_or_atomic)) == [10, 11, 12, 13, 14]
    assert sorted(lines(own_files)) == [13, 25, 26, 28, 29, 30]
    assert sorted(lines(own_environment)) == [7, 15, 16]


WATCHED_IMPORT = """
import importlib, os, sys
import numpy, PIL.Image, safetensors.torch, torch, torch._dynamo, tqdm, triton, triton.language

def refuse(what):
    def call(*args, **kwargs):
        raise AssertionError(f"{what} at import: {args}")
    return call

for name in ("_lazy_init", "init", "current_device", "is_available", "device_count", "get_device_capability"):
    setattr(torch.cuda, name, refuse(f"torch.cuda.{name}"))

def hook(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "tempfile", "shutil") or event in (
        "os.system", "os.mkdir", "os.rename", "os.remove", "os.putenv", "os.unsetenv"
    ):
        raise AssertionError(f"{event} at import: {args}")
    if event == "open":
        path, _, flags = args
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise AssertionError(f"{path} opened for writing at import")
        if not str(path).endswith((".py", ".pyc", ".so")):
            raise AssertionError(f"{path} read at import")

sys.dont_write_bytecode = True
environment = dict(os.environ)
threads, random = torch.get_num_threads(), torch.get_rng_state()
sys.addaudithook(hook)
for module in sys.argv[1:]:
    importlib.import_module(module)
assert dict(os.environ) == environment, "an import changed os.environ"
assert torch.get_num_threads() == threads, "an import changed the number of threads"
assert torch.equal(torch.get_rng_state(), random), "an import drew random numbers"
heavy = sorted({name.split(".")[0] for name in sys.modules} & set(%r))
assert not heavy, f"imported with dit_fast: {heavy}"
print("imported", len(sys.argv) - 1)
"""


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """A path for each file that can be reached from itself."""
    found = []
    for start in sorted(edges):
        paths, seen = [(start,)], set()
        while paths:
            path = paths.pop()
            for target in sorted(edges.get(path[-1], ())):
                if target == start:
                    found.append(" -> ".join((*path, start)))
                    paths = []
                    break
                if target not in seen:
                    seen.add(target)
                    paths.append((*path, target))
    return found


def test_no_file_imports_itself_through_others() -> None:
    """Imports inside functions and for type checkers count."""
    files = {module_name(path): path for path in module_files()}
    edges: dict[str, set[str]] = {}
    for own, path in files.items():
        for node, name in imports(path):
            names = (
                [f"{name}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            )
            edges.setdefault(own, set()).update(n if n in files else name for n in names or [name])
    # A package's __init__ gathers the names of its files: only what is imported from it by others counts.
    assert not cycles({own: targets & files.keys() - {own} for own, targets in edges.items()})


def test_cycles_are_seen() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b", "c -> b -> c"]
    assert not cycles({"a": {"b", "c"}, "b": {"c"}})


def test_importing_touches_no_device_network_or_disk() -> None:
    modules = [module_name(path) for path in module_files() if path.name != "__main__.py"]
    result = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT % sorted(HEAVY), *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["imported", str(len(modules))]


def missing_extra_messages() -> list[tuple[str, str]]:
    """(place, message) of every MissingExtraError that is raised; {} where a value is filled in."""
    found = []
    for path in module_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingExtraError":
                parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                found.append((where(path, node), "".join(str(part.value) for part in parts)))
    return found


def test_extras_that_errors_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    messages = missing_extra_messages()
    assert messages
    for place, message in messages:
        match = re.search(
            r"([\w-]+)(?:, [^;]+,)? is not installed; pip install 'dit-fast\[([\w-]+)\]'", message
        )
        assert match is not None, f"{place}: {message}"
        package, extra = match.groups()
        names = {re.split(r"[^\w-]", requirement)[0] for requirement in extras.get(extra, ())}
        assert package in names, f"{place}: the extra {extra} does not install {package}"


class ProgramIds:
    """Follows program ids through a @triton.jit function, and lists where one is scaled while still int32.

    A sample's or a tile's index times a stride passes 2^31 for large tensors. `pid % n` is bounded by n and
    counts as an offset within a sample, which may be int32; so does `tl.program_id(1) * BLOCK`, since a grid has
    at most 65535 programs on its second and third axes.
    """

    def __init__(self, function: ast.FunctionDef, helpers: dict[str, "ProgramIds"]):
        self.helpers = helpers
        self.wide: set[str] = set()
        self.narrow: set[str] = {"pid"} & {argument.arg for argument in function.args.args}
        self.returned: list[tuple[bool, bool]] = []
        self.faults: list[tuple[ast.AST, str]] = []
        for statement in function.body:
            self.visit(statement)

    def visit(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            self.check(node.value)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                self.assign(target, node.value, isinstance(node, ast.AugAssign))
        elif isinstance(node, ast.Return) and node.value is not None:
            self.check(node.value)
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            self.returned = [(self.is_wide(value), self.is_narrow(value)) for value in values]
        elif isinstance(node, ast.Expr):
            self.check(node.value)
        for name in ("body", "orelse"):
            for inner in getattr(node, name, ()):
                self.visit(inner)

    def assign(self, target: ast.expr, value: ast.expr, added: bool) -> None:
        if isinstance(target, ast.Tuple):
            if isinstance(value, ast.Call) and (helper := self.helpers.get(ast.unparse(value.func))):
                states = helper.returned
                if len(states) != len(target.elts):
                    states = [(False, self.is_narrow(value))] * len(target.elts)
            elif isinstance(value, ast.Tuple):
                states = [(self.is_wide(part), self.is_narrow(part)) for part in value.elts]
            else:
                return
            for part, state in zip(target.elts, states, strict=True):
                self.note(ast.unparse(part), *state)
            return
        name = ast.unparse(target)
        if added and name.endswith("_ptr"):
            if self.is_narrow(value):
                self.faults.append((value, f"{name} += {ast.unparse(value)}"))
            return
        if added:
            value = ast.BinOp(ast.Name(name), ast.Add(), value)
        self.note(name, self.is_wide(value), self.is_narrow(value))

    def note(self, name: str, wide: bool, narrow: bool) -> None:
        for names, member in ((self.wide, wide), (self.narrow, narrow)):
            names.add(name) if member else names.discard(name)

    def check(self, value: ast.expr) -> None:
        for node in ast.walk(value):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and self.is_narrow(node):
                self.faults.append((node, ast.unparse(node)))

    def is_wide(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return ast.unparse(node.func).endswith(".to") and ast.unparse(node.args[0]) == "tl.int64"
        if isinstance(node, ast.BinOp):
            return self.is_wide(node.left) or self.is_wide(node.right)
        return isinstance(node, ast.Name) and node.id in self.wide

    def is_narrow(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if helper := self.helpers.get(function):
                return any(narrow for _, narrow in helper.returned)
            return function == "tl.program_id"
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Mod) or self.is_wide(node):
                return False
            if re.fullmatch(r"tl\.program_id\([12]\) \* BLOCK\w*", ast.unparse(node)):
                return False
            return self.is_narrow(node.left) or self.is_narrow(node.right)
        return isinstance(node, ast.Name) and node.id in self.narrow


def unscaled_program_ids(modules: list[ast.Module]) -> list[tuple[ast.AST, str]]:
    helpers: dict[str, ProgramIds] = {}
    functions = [
        node
        for module in modules
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    ]
    # Functions are defined before they are called; a second pass serves helpers from files read later.
    for _ in range(2):
        for function in functions:
            helpers[function.name] = ProgramIds(function, helpers)
    return [fault for analysis in helpers.values() for fault in analysis.faults]


def test_program_ids_are_int64_before_they_are_scaled() -> None:
    paths = sorted((ROOT / "kernels").rglob("*.py"))
    faults = [text for _, text in unscaled_program_ids([tree(path) for path in paths])]
    assert not faults
    assert any("tl.program_id" in path.read_text() for path in paths)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("x_ptr += tl.program_id(0) * stride", True),
        ("b = pid // n\n    x_ptr += b * stride", True),
        ("b = pid // n\n    x_ptr += (b * T + pid % n) * D", True),
        ("row = pid\n    x = tl.load(x_ptr + row * stride)", True),
        ("b, o = rows(tl.program_id(0), n)\n    x_ptr += b * stride", True),
        ("x_ptr += tl.program_id(1) * stride", True),
        ("o = tl.program_id(0) * BLOCK", True),
        ("o = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)\n    x = tl.load(x_ptr + o)", False),
        ("b = (pid // n).to(tl.int64)\n    x_ptr += (b * T + pid % n) * D", False),
        ("o = (pid % n) * ROWS + tl.arange(0, ROWS)\n    x = tl.load(x_ptr + o)", False),
    ],
)
def test_the_program_id_rule_sees_planted_faults(body: str, fault: bool) -> None:
    helper = "@triton.jit\ndef rows(pid, n):\n    return pid // n, pid % n\n"
    kernel = f"@triton.jit\ndef kernel(x_ptr, n, stride, T):\n    pid = tl.program_id(0)\n    {body}\n"
    assert bool(unscaled_program_ids([ast.parse(helper + kernel)])) is fault
