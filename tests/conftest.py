"""What every test starts from: the same random numbers, one thread, compiler caches of its own."""

import multiprocessing
import os
import random
import signal
import subprocess
import tempfile

import numpy as np
import pytest
import torch

# Tensors here are small and pytest-xdist uses the cores; OMP_NUM_THREADS asks for another number.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)
# OpenMP's threads do not survive a fork, and a child that needs them waits for ever.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="without slow tests, new interpreters and compilations"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "nightly" not in config.option.markexpr:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]
    if config.option.fast:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


SETTINGS = (
    "PYTEST_ADDOPTS",
    "PYTEST_PLUGINS",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD",
    "PYTEST_THEME",
    "PYTEST_THEME_MODE",
)
SETTINGS += ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PY_COLORS", "PYTHONWARNINGS", "PYTHONIOENCODING")


@pytest.fixture(autouse=True, scope="session")
def environment():
    """What a shell sets for its own pytest, Python or terminal changes nothing in the tests' children."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def signals():
    """A shell starts jobs in the background, or by nohup, with signals ignored, which the tests' children inherit."""
    ignored = [
        number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True, scope="session")
def fast(request: pytest.FixtureRequest):
    """With --fast, a test is skipped when it begins what takes seconds: so no list of such tests is kept."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.option.fast:
            for owner, name in (
                (subprocess.Popen, "__init__"),
                (multiprocessing.process.BaseProcess, "start"),
                (torch, "compile"),
            ):
                patch.setattr(
                    owner, name, lambda *_, name=name, **__: pytest.skip(f"{name}: left to make test")
                )
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """Inductor's cache does not notice that an operation of the same name is another one now: begin empty.

    The workers of a run share it: its first compilation makes a header that takes ten seconds.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(request.config, "workerinput") else base
    with pytest.MonkeyPatch.context() as patch:
        folder = str(shared / "inductor")
        if " " not in folder:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
            yield
            return
        # Inductor does not quote the names of the files that it compiles, and keeps headers in TMPDIR itself.
        patch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
        with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as other:
            patch.setenv("TORCHINDUCTOR_CACHE_DIR", other)
            yield
