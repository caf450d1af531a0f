"""Training on several ranks: equal to one process, whichever way the model is shared."""

import torch

from dit_fast.interop import load_model
from tests.distributed import equal
from tests.distributed.ranks import Forked, train
from tests.small_models import small_model
from tests.tolerance import assert_close


def test_two_ranks_equal_one_process_and_their_checkpoints_fit_any(tmp_path) -> None:
    with Forked(tmp_path / "said", [(equal.main, (tmp_path,))] * 2) as ranks:
        ended = ranks.wait()
    assert ended.codes == [0, 0], ended.text
    assert all("all equal" in output for output in ended.outputs), ended.text


def test_frozen_and_initial_weights_are_those_of_one_process(tmp_path) -> None:
    small_model(3, depth=2, in_channels=1, num_classes=3).save_pretrained(tmp_path / "weights")
    sizes = ("--hidden-size", 32, "--depth", 2, "--num-heads", 2, "--patch-size", 2, "--batch-size", 8)
    start = ("--init-from", tmp_path / "weights", "--freeze", "blocks.0", "t_embedder", "--seed", 5)
    common = ("--data", "digits", "--device", "cpu", "--steps", 2, *sizes, *start)
    states = []
    for size in (1, 2):
        run = tmp_path / str(size)
        ended = train(tmp_path / f"said-{size}", size, [*common, "--out", run])
        assert set(ended.codes) == {0}, ended.text
        states.append(load_model(run, weights="model")[0].state_dict())
    assert_close(states[1], states[0])
    kept = small_model(3, depth=2, in_channels=1, num_classes=3).state_dict()
    frozen = [name for name in kept if name.startswith(("blocks.0.", "t_embedder."))]
    assert all(torch.equal(state[name], kept[name]) for name in frozen for state in states)
