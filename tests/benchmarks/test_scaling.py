"""The scaling model's counts against real models, its physics at the ends, and the document against the model."""

from pathlib import Path

import pytest
import torch

from benchmarks.analysis.scaling import Machine, Model, best, estimate, paper_models, tables
from dit_fast.models import DiT, DiT_models


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2", "7B"])
def test_counts_are_those_of_the_model(name) -> None:
    counted = paper_models()[name]
    with torch.device("meta"):
        real = (
            DiT(hidden_size=3072, depth=40, num_heads=24) if name == "7B" else DiT_models[name](input_size=32)
        )
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counted.step.parameters == trained
    flops = counted.depth * (counted.gemm_flops + counted.attention_flops)
    # The embedders and the final layer are left out of the time, not of the bytes.
    assert flops == pytest.approx(2 * real.macs(), rel=2e-3)


def test_collectives_of_nothing_and_of_one() -> None:
    machine = Machine()
    assert machine.gather(1e9, 1) == 0.0
    assert machine.reduce_between(1e9, 1) == 0.0
    assert machine.gather(1e9, 8) == pytest.approx(1e9 * 7 / 8 / 370e9 + 7 * 2e-6)
    assert machine.gather(0, 16) == pytest.approx(14 * 2e-6 + 6e-6)


def test_more_shards_take_less_memory_and_more_latency() -> None:
    model = paper_models()["7B"]
    found = [estimate(model, gpus, 8, "fsdp") for gpus in (8, 64, 256)]
    assert found[0].memory > found[1].memory > found[2].memory
    assert found[0].communication < found[1].communication < found[2].communication
    assert estimate(model, 1, 8, "none").limit == "memory: does not fit"
    assert best(model, 1024, 32).mode == "hsdp"
    tiny = Model("tiny", 2, 64)
    assert estimate(tiny, 1, 1, "none").limit == "the host (launches)"


def test_the_document_holds_the_tables_of_today() -> None:
    document = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert document.endswith(tables() + "\n")
