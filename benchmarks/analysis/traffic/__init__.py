"""Launches and bytes of a training or sampling step, counted without a GPU: `python -m benchmarks.analysis.traffic`.

torch.compile runs whole for CUDA on fake tensors (`fake_cuda.py`), in a process of its own, and what Inductor
generates is counted (`inductor.py`): a kernel moves each element of each buffer that it touches once. Operations of
dit_fast stand in the compiled graph as calls; their launchers are run on meta tensors and what they launch is
counted by the same rule (`ours.py`). Matrix products and attention are launches without bytes, on both sides.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SUPPORTED_TORCH = "2.13"
MODES = ("bf16", "autocast", "copies")
COMPILED_MODES = MODES[:2]
"""Those that the compiler's plain block has too; it has no optimizer that writes copies."""
PHASES = ("forward", "backward")

MEMORY_BOUND = ("inductor", "dit_fast", "torch", "epilogue")
"""Kinds whose bytes are counted: Inductor's kernels, ours, PyTorch's own between them, and what the epilogue of a
matrix product or attention of ours moves beside its operands and result (which is no launch of its own)."""


class TrafficError(Exception):
    """The count cannot be made here; the message says why in one line."""


@dataclass(frozen=True)
class Program:
    """What to count. `factory` is "module:function"; called with (program, **settings) it returns a `Workload`.

    choices: what stands for the tuned tables, such as {"mlp": "triton"}; tables themselves are not read.
    batch, tokens, width, heads: the shape of the token tensors; blocks: how many; mode: "bf16" (weights and
    activations), "autocast" (float32 weights and residual stream under bfloat16 autocast) or "copies" (the same, with
    weights that are the optimizer's bfloat16 copies, as in training by default). `compiled` False: what
    PyTorch launches without a compiler, one operation after another, without autocast.
    """

    factory: str
    settings: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    mode: str = "bf16"
    batch: int = 256
    tokens: int = 256
    width: int = 1152
    heads: int = 16
    blocks: int = 1
    compiled: bool = True

    @property
    def unit(self) -> int:
        """Bytes of one bfloat16 token tensor, U."""
        return self.batch * self.tokens * self.width * 2


@dataclass(frozen=True)
class Pass:
    """One launch or epilogue: bytes read and written. `kind`: MEMORY_BOUND, "gemm", "attention" or "convolution"."""

    phase: str
    kind: str
    name: str
    read: int
    write: int

    @property
    def moved(self) -> int:
        """Bytes that count: 0 for matrix products and attention."""
        return self.read + self.write if self.kind in MEMORY_BOUND else 0


@dataclass(frozen=True)
class Traffic:
    """The launches of a program, and the bytes its backward pass is handed: activations, and parameters beside them.

    Both are of distinct storages, the incoming gradient left out; `weights` are parameters as they are, so that
    they cost no memory of their own.
    """

    passes: Counter[Pass]
    kept: int = 0
    weights: int = 0

    def moved(self, phase: str | None = None) -> int:
        """Bytes to and from memory, of one phase or of both."""
        return sum(one.moved * count for one, count in self.passes.items() if phase in (None, one.phase))

    def launches(self, phase: str | None = None, kinds: Sequence[str] | None = None) -> int:
        """How many launches, of one phase and some kinds or of all."""
        chosen = (
            (one, count)
            for one, count in self.passes.items()
            if phase in (None, one.phase) and one.kind != "epilogue" and (kinds is None or one.kind in kinds)
        )
        return sum(count for _, count in chosen)

    def __sub__(self, other: "Traffic") -> "Traffic":
        """What this one has beyond `other`; a launch that `other` has more of counts negatively."""
        difference = self.passes.copy()
        difference.subtract(other.passes)
        passes = Counter({one: count for one, count in difference.items() if count})
        return Traffic(passes, self.kept - other.kept, self.weights - other.weights)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "kept": self.kept,
            "weights": self.weights,
            "passes": [{**asdict(one), "launches": count} for one, count in self.passes.items()],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Traffic":
        """The inverse of `as_json`."""
        passes: Counter[Pass] = Counter()
        for row in value["passes"]:
            launches = row.pop("launches")
            passes[Pass(**row)] += launches
        return cls(passes, value["kept"], value["weights"])


def count(programs: Sequence[Program]) -> list[Traffic]:
    """The traffic of each program, counted in one process of its own; nothing is changed in the caller's.

    Raises TrafficError where it cannot be counted: no g++, another PyTorch, a program that does not compile.
    """
    root = Path(__file__).parents[3]
    with tempfile.TemporaryDirectory() as scratch:
        request, answer = Path(scratch, "programs.json"), Path(scratch, "traffic.json")
        request.write_text(json.dumps([asdict(program) for program in programs]))
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch, "inductor")),
            "TRITON_INTERPRET": "0",
        }
        command = [sys.executable, "-m", "benchmarks.analysis.traffic.worker", str(request), str(answer)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode:
            lines = [line for line in ran.stderr.splitlines() if line.strip()]
            raise TrafficError(lines[-1] if lines else f"the counting process ended with {ran.returncode}")
        return [Traffic.from_json(value) for value in json.loads(answer.read_text())]


def steady_state(program: Program) -> tuple[Program, Program]:
    """Two programs whose difference is one block in the middle of a network: one block more, and as given."""
    longer = {**asdict(program), "blocks": program.blocks + 1}
    return Program(**longer), program
