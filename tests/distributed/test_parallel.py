"""Training on several ranks: equal to one process, whichever way the model is shared."""

from tests.distributed import equal
from tests.distributed.ranks import Forked


def test_two_ranks_equal_one_process_and_their_checkpoints_fit_any(tmp_path) -> None:
    with Forked(tmp_path / "said", [(equal.main, (tmp_path,))] * 2) as ranks:
        ended = ranks.wait()
    assert ended.codes == [0, 0], ended.text
    assert all("all equal" in output for output in ended.outputs), ended.text
