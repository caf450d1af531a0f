"""No operation escapes the proofs: what is exported or registered has an entry in the registry, or a reason."""

import importlib
import pkgutil
import re
import subprocess
import sys
from inspect import isfunction
from pathlib import Path

import pytest
import torch

import dit_fast.kernels
from benchmarks.ops.registry import DUALS, REGISTRY

ROOT = Path(__file__).resolve().parents[2]
# Exported functions that are no operations.
CHOICES = {"uses_triton", "choose_backend", "jvp"}
# Operations without an OpSpec: why, and the file that proves them instead.
PROVEN_ELSEWHERE = {
    "adamw_ema": ("changes its tensors in place, has no gradient", "tests/kernels/test_adamw_ema.py"),
    "grad_square_sum": ("sums over a list of tensors, has no gradient", "tests/kernels/test_adamw_ema.py"),
    "adaln_from_moments": ("part of a backward pass, has no gradient", "tests/kernels/test_recompute.py"),
    "attention_flash4": ("calls the flash-attn package, no kernel of ours", "kernels/attention/backends.py"),
}


def registered() -> set[str]:
    """Names in torch.ops.dit_fast once every kernel module is imported."""
    for module in pkgutil.walk_packages(dit_fast.kernels.__path__, "dit_fast.kernels."):
        importlib.import_module(module.name)
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("dit_fast::").split(".")[0] for name in names if name.startswith("dit_fast::")}


def escaping(names: set[str]) -> list[str]:
    """Operations that no proof reaches; the backward of a proven operation is proven with it."""
    known = REGISTRY.keys() | PROVEN_ELSEWHERE.keys() | {f"{spec.name}_dual" for spec in DUALS.values()}
    return sorted(name for name in names if name not in known and name.removesuffix("_backward") not in known)


def test_every_exported_operation_is_proven() -> None:
    exported = {name for name in dit_fast.kernels.__all__ if isfunction(getattr(dit_fast.kernels, name))}
    assert exported >= {"adaln_modulate", *CHOICES}
    assert not escaping(exported - CHOICES)


def test_every_registered_operation_is_proven() -> None:
    names = registered()
    assert names >= {"adaln_modulate", "adaln_modulate_backward", "patch_embed"}
    assert not escaping(names)


def test_an_operation_without_an_entry_is_seen() -> None:
    library = torch.library.Library("dit_fast", "FRAGMENT")
    library.define("planted_without_entry(Tensor x) -> Tensor")
    try:
        assert escaping(registered()) == ["planted_without_entry"]
    finally:
        library._destroy()
    assert escaping({"gelu_forward", "attention_dropout", "gelu_backward"}) == [
        "attention_dropout",
        "gelu_forward",
    ]


def test_exceptions_have_their_proof() -> None:
    assert not REGISTRY.keys() & PROVEN_ELSEWHERE.keys()
    for name, (reason, file) in PROVEN_ELSEWHERE.items():
        assert len(reason.split()) > 3
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} does not mention {name}"
    assert PROVEN_ELSEWHERE.keys() <= registered() | set(dit_fast.kernels.__all__)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_is_named_as_its_operation(name: str) -> None:
    """A variant is its operation, and its reference, with a keyword."""
    spec = REGISTRY[name]
    op, text = (getattr(function, "func", function) for function in (spec.op, spec.reference))
    assert spec.name == op.__name__ == text.__name__ == name.split("-")[0]
    assert spec.name in registered()
    assert bool(spec.variant) == (op is not spec.op) == (text is not spec.reference)


def test_triton_is_required() -> None:
    """No silent fall-back: without Triton the import fails and says what is missing (it is a plain dependency)."""
    program = (
        "import sys\nsys.modules['triton'] = None\n"
        "try:\n    import dit_fast.kernels\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "triton" in result.stdout
    assert '"triton>=' in (ROOT / "pyproject.toml").read_text()
