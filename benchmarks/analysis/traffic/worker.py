"""The process that counts: `python -m benchmarks.analysis.traffic.worker PROGRAMS.json TRAFFIC.json` (see `count`)."""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from benchmarks.analysis.traffic import MODES, Program, Traffic, TrafficError, fake_cuda


def workload_factory(path: str) -> Any:
    """The function that "module:function" names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TrafficError(f"factory {path!r}: {error}; expected module:function") from None


def count_all(programs: list[Program]) -> list[Traffic]:
    """Compile and count one program after another."""
    for program in programs:
        if program.mode not in MODES:
            raise TrafficError(f"mode {program.mode!r}: choose {', '.join(MODES)}")
    fake_cuda.load()
    fake_cuda.describe()
    from benchmarks.analysis.traffic import inductor

    with inductor.recording() as recorder:
        return [inductor.count(program, workload_factory(program.factory), recorder) for program in programs]


def main() -> None:
    request, answer = map(Path, sys.argv[1:])
    programs = [Program(**value) for value in json.loads(request.read_text())]
    try:
        counted = count_all(programs)
    except TrafficError as error:
        sys.exit(str(error))
    except Exception as error:
        traceback.print_exc()
        sys.exit(
            f"the program could not be counted: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        )
    answer.write_text(json.dumps([traffic.as_json() for traffic in counted]))


if __name__ == "__main__":
    main()
