"""Who the ranks are, what they tell each other in a step, and how signals are taken: without starting any."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from dit_fast.distributed import world as world_module
from dit_fast.distributed.agreement import Agreed, Agreement
from dit_fast.distributed.sharding import choose_parallel, rank_rows
from dit_fast.distributed.signals import STOPPING, StopRequest
from dit_fast.distributed.world import (
    World,
    choose_device,
    is_lost_connection,
    join_world,
    ranks,
    warn_of_slurm,
)
from dit_fast.errors import ConfigError, OutputError, RankError
from tests.distributed.ranks import free_port
from tests.patience import PATIENCE


def test_one_process_is_a_world_of_its_own(monkeypatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    with join_world("cpu") as alone:
        assert (alone.rank, alone.size, alone.device, alone.attempt) == (0, 1, torch.device("cpu"), 0)
        assert alone.gather("x") == ["x"]
        assert alone.broadcast(3) == alone.first(lambda: 3) == 3
        assert alone.mean(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        with pytest.raises(OutputError, match="full"):
            alone.first(lambda: (_ for _ in ()).throw(OutputError("full")))
        # An error of one process is its own.
        with pytest.raises(RuntimeError, match="gloo"), alone.watch(lambda: "step 1"):
            raise RuntimeError("gloo: connection reset")


def test_an_environment_that_torchrun_did_not_make(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK is 'first': torchrun sets a number there"), join_world("cpu"):
        pass
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is 2 and WORLD_SIZE 2: torchrun counts ranks from 0"):
        ranks()
    monkeypatch.setenv("RANK", "1")
    assert ranks() == (1, 2)


def test_a_torchrun_that_is_gone_is_not_waited_for(monkeypatch) -> None:
    """Its store would have listened before the rank was started; PyTorch tries to connect for a whole timeout."""
    for variable, value in {
        "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(world_module, "AGENT_TIMEOUT", 1.0)
    with pytest.raises(RankError, match=r"^rank 1 did not reach .* after 1000ms") as caught:
        join_world("cpu", start_timeout=10 * PATIENCE).__enter__()
    assert "\n" not in str(caught.value)


def test_devices_by_local_rank(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == choose_device("cuda", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="LOCAL_RANK is 2, and this machine shows 2 CUDA devices"):
        choose_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", 2) == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda: this PyTorch sees no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("mode", "world", "message"),
    [
        ("zero3", World(), "--parallel zero3: choose one of auto, none, ddp, fsdp, hsdp"),
        ("none", World(size=2), "--parallel none with 2 ranks: each would train a model of its own"),
        ("fsdp", World(), "--parallel fsdp needs several processes: start it with torchrun"),
        ("hsdp", World(size=6, local_size=4), "6 ranks do not divide into machines of 4"),
    ],
)
def test_ways_of_sharing_that_cannot_be(mode, world, message) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_parallel(mode, world)


def test_ways_of_sharing() -> None:
    two_machines = World(size=8, local_size=4)
    assert choose_parallel("auto", World()) == "none"
    assert choose_parallel("auto", two_machines) == "fsdp"
    assert choose_parallel("hsdp", two_machines) == "hsdp"


def test_rows_of_ranks_are_a_partition() -> None:
    for size in (1, 2, 4):
        rows = [row for rank in range(size) for row in range(24)[rank_rows(24, 3, World(rank, size=size))]]
        assert rows == list(range(24))
    with pytest.raises(ConfigError, match=r"--batch-size 24 does not divide by 5 ranks x --accumulate 2"):
        rank_rows(24, 2, World(size=5))


def test_what_a_lost_rank_looks_like() -> None:
    assert is_lost_connection(
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc] Connection closed by peer")
    )
    assert is_lost_connection(torch.distributed.DistBackendError("NCCL error"))
    assert not is_lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_connection(RankError("step 3: rank 1 does not answer: it hangs or is gone"))


def test_slurm_without_the_signal_is_warned_of_once_a_machine(monkeypatch, caplog, tmp_path) -> None:
    launchers = {
        "plain": b"python\0-m\0torch.distributed.run\0train.py\0",
        "told": b"torchrun\0--signals-to-handle\0SIGTERM,SIGUSR1\0train.py\0",
    }
    opened = open

    def fake_open(path, *arguments, **options):
        return opened(tmp_path / "cmdline" if str(path).startswith("/proc/") else path, *arguments, **options)

    monkeypatch.setattr(world_module, "open", fake_open, raising=False)
    for job, local_rank, launcher, warned in (
        ("7", "0", "plain", True),
        ("7", "0", "told", False),
        ("7", "1", "plain", False),
        (None, "0", "plain", False),
    ):
        (tmp_path / "cmdline").write_bytes(launchers[launcher])
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        if job:
            monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        caplog.clear()
        warn_of_slurm()
        assert ("start it with --signals-to-handle SIGTERM,SIGINT,SIGUSR1" in caplog.text) == warned


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_is_a_request(number) -> None:
    # A shell's background job ignores Ctrl-C, and so would we have without StopRequest.
    before_all = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        expect_a_request(number)
    finally:
        signal.signal(signal.SIGINT, before_all)


def expect_a_request(number) -> None:
    before = [signal.getsignal(each) for each in STOPPING]
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal is number
        # Schedulers signal twice, and the first is what is answered to.
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal is number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(each) for each in STOPPING] == before


@pytest.mark.parametrize("number", STOPPING)
def test_what_a_process_was_started_to_ignore_stays_ignored(number) -> None:
    """SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            assert signal.getsignal(number) is signal.SIG_IGN
            os.kill(os.getpid(), number)
            assert stop.signal is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_with_other_ranks_a_second_ctrl_c_does_not_break_the_save() -> None:
    with StopRequest(alone=False) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT


def test_ranks_agree_on_what_any_of_them_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks, of which the others report nothing."""
    monkeypatch.setattr(World, "maximum", lambda world, tensor: tensor)
    request = StopRequest()
    agreement = Agreement(World(rank=3, size=4), request)
    yes, no = torch.tensor(True), torch.tensor(False)
    assert [bool(flag) for flag in agreement.exchange(no, no)] == [False, False]
    assert (agreement.read(1.0), agreement.bad_rank) == (Agreed(None, False, False), None)
    agreement.report(save_failed=True)
    request.signal = signal.SIGUSR1
    assert [bool(flag) for flag in agreement.exchange(yes, no)] == [True, False]
    assert (agreement.read(1.0), agreement.bad_rank) == (Agreed(signal.SIGUSR1, True, False), 3)
    agreement.report(data_ends=True)
    request.signal = None
    assert [bool(flag) for flag in agreement.exchange(no, yes)] == [False, True]
    assert (agreement.read(1.0), agreement.bad_rank) == (Agreed(None, False, True), 3)


def test_one_process_agrees_with_itself_at_once() -> None:
    request = StopRequest()
    agreement = Agreement(World(), request)
    agreement.report(save_failed=True)
    # A signal that arrives within the step is read after it.
    request.signal = signal.SIGTERM
    assert agreement.read(0.0) == Agreed(signal.SIGTERM, True, False)


def test_ranks_that_do_not_meet_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of torchrun that was killed while they started."""

    def lost(*arguments, **options):
        raise dist.DistNetworkError(
            "Failed to recv, got 0 bytes. Connection was likely closed.\nException raised from"
        )

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lost)
    with (
        pytest.raises(RankError, match="rank 1 did not reach the other ranks at the start") as caught,
        join_world("cpu", remedy="run the command again"),
    ):
        pass
    assert str(caught.value).endswith("; run the command again")
    assert "\n" not in str(caught.value)
