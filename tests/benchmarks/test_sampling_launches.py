"""The launch count of a sampling step: hoisting takes its products and a third of the weights out of the loop."""

from benchmarks.analysis.traffic import Program
from benchmarks.models.sampling_launches import DEPTH, fused_eager, of_all_blocks, weight_bytes


def test_hoisting_removes_two_launches_a_block_and_a_third_of_the_weights():
    counts = {
        hoisted: [fused_eager(Program("", batch=2, blocks=blocks), hoisted) for blocks in (1, 2)]
        for hoisted in (True, False)
    }
    hoisted, plain = (of_all_blocks(*counts[flag]) for flag in (True, False))
    # SiLU and product of each block and of the final layer, the embeddings and their addition.
    assert plain - hoisted > 2 * DEPTH
    assert counts[True][1] - counts[True][0] == 8, "two norms, attention, three products, the MLP's two"
    everything, loop = weight_bytes()
    # Matrices and biases of the blocks (qkv, proj, fc1, fc2), then patch embedding, positions and final projection.
    blocks = DEPTH * (12 * 1152**2 + (3 + 1 + 4 + 1) * 1152)
    assert loop == 2 * (blocks + (16 + 1) * 1152 + 256 * 1152 + (1152 + 1) * 32)
    assert 0.65 < loop / everything < 0.68
