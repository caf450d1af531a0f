"""The comparison of what calls cost the host: two processes take turns, and no kernel runs."""

import pytest

from benchmarks.ops.host_time import OPS, PASSES, ROOT, document, measure


def test_two_trees_take_turns() -> None:
    times = measure(ROOT, ROOT, turns=1, repeats=1)
    assert list(times) == [(name, word) for name in OPS for word in PASSES]
    assert all(old > 0 and new > 0 for old, new in times.values())


def test_a_worker_that_does_not_start_is_named(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=f"the worker in {tmp_path} did not start"):
        measure(tmp_path, ROOT, turns=1, repeats=1)


def test_the_table_has_ratios() -> None:
    text = document("abc1234", {("gelu", "forward"): (40.0, 10.0)}, 3)
    assert "| operation | pass | abc1234 | here | here / abc1234 |" in text
    assert "| gelu | forward | 40.0 | 10.0 | 0.25 |" in text
