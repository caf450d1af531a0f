"""The pytest plugin of a worker of `benchmarks.gpu.parallel_tests`: takes tests and notes what came out."""

import faulthandler
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.parallel_tests import BROKEN, GOOD, KERNELS, append, read_log

LONGEST = 60
"""Lines of a failure that are shown."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("worker of benchmarks.gpu.parallel_tests")
    group.addoption("--claims", type=Path, required=True)
    group.addoption("--log", type=Path, required=True)
    group.addoption("--test-limit", type=float, required=True)
    group.addoption("--worker", type=int, required=True)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Turn(config), "turn")


class Turn:
    """One worker's part of the tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.claims: Path = config.getoption("--claims")
        self.log: Path = config.getoption("--log")
        self.limit: float = config.getoption("--test-limit")
        self.worker: int = config.getoption("--worker")
        self.reports: list[pytest.TestReport] = []
        # While a test runs, pytest has put a file of its own in the place of standard error.
        self.said = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")  # type: ignore[union-attr]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the kernels' tests and those marked gpu that have not passed yet."""
        kernels = config.rootpath / KERNELS
        known = {test for test, item in read_log(self.log).items() if item["outcome"] in GOOD}
        items[:] = [
            item
            for item in items
            if (kernels in item.path.parents or item.get_closest_marker("gpu")) and item.nodeid not in known
        ]

    def claim(self, item: pytest.Item) -> bool:
        """Take a test that no other worker has taken."""
        place = self.claims / f"claim-{hashlib.sha256(item.nodeid.encode()).hexdigest()}"
        try:
            descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{self.worker} {item.nodeid}")
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        mine: Iterator[pytest.Item] = (item for item in session.items if self.claim(item))
        item = next(mine, None)
        while item is not None:
            # Which test follows decides what is torn down: it is claimed before this one runs.
            following = next(mine, None)
            self.run(item, following)
            item = following
        return True

    def run(self, item: pytest.Item, following: pytest.Item | None) -> None:
        """Run one test under the watchdog, which ends this process: a wait for the device heeds nothing else."""
        self.reports = []
        start = time.time()
        append(self.log, test=item.nodeid, outcome="started", worker=self.worker, at=start)
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.said)
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        finally:
            faulthandler.cancel_dump_traceback_later()
        outcome, why, story = self.outcome()
        seconds = round(time.time() - start, 2)
        append(self.log, test=item.nodeid, outcome=outcome, seconds=seconds, why=why)
        sys.__stdout__.flush()  # type: ignore[union-attr]
        for line in (f"{outcome.upper()} {item.nodeid} ({seconds} s)", *story):
            print(line, file=self.said, flush=True)
        if outcome == "failed" and context_is_broken():
            os._exit(BROKEN)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def outcome(self) -> tuple[str, str, list[str]]:
        """What the reports of a test come to, the reason in a line, and the story of a failure."""
        for report in self.reports:
            if report.failed:
                crash: Any = getattr(report.longrepr, "reprcrash", None)
                lines = str(report.longrepr).splitlines()
                said = (crash.message if crash is not None else lines[-1] if lines else "").splitlines()
                return "failed", said[0] if said else "", lines[-LONGEST:]
        for report in self.reports:
            if report.skipped:
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                return "skipped", reason.removeprefix("Skipped: "), []
        return "passed", "", []


def context_is_broken() -> bool:
    """Whether an illegal access or an assertion on the device has left this process without a usable CUDA context."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
