"""Training on several ranks: equal to one process, whichever way the model is shared."""

from tests.distributed.ranks import launch


def test_two_ranks_equal_one_process_and_their_checkpoints_fit_any(tmp_path) -> None:
    ended = launch(["tests/distributed/equal.py", str(tmp_path)], 2)
    assert ended.codes == [0, 0], ended.text
    assert all("all equal" in output for output in ended.outputs), ended.text
