"""Files of one JSON object per line that a run appends to: log.jsonl and spikes.jsonl.

A crash of the machine leaves anything at their end, and a full disk a part of a line: readers leave out what is no
record of a step, with a warning, and a writer takes back what it could not write in full.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_fast.errors import DataError
from dit_fast.files import MOST_LIST_BYTES, parse_json, read_bytes, sync, write_atomically

MOST_WAITING = 10_000
"""Lines that are kept for a disk that takes none; the oldest are dropped first."""
Line = dict[str, Any]
logger = logging.getLogger(__name__)


def read_lines(path: Path) -> list[Line]:
    """Records of a file, in its order: JSON objects with a `step` from 0; one warning for all other lines.

    A file that is not there holds none.

    Raises:
        DataError: `path` is not a regular file, or cannot be read
    """
    if not os.path.lexists(path):
        return []
    records, odd = [], []
    content = read_bytes(path, DataError, MOST_LIST_BYTES, "a log of a run")
    for number, text in enumerate(content.split(b"\n"), start=1):
        record = _record(text)
        if record is not None:
            records.append(record)
        elif text.strip():
            odd.append(number)
    if odd:
        which = ", ".join(map(str, odd[:4])) + (", ..." if len(odd) > 4 else "")
        logger.warning("%s: left out what is no record of a step: line %s", path, which)
    return records


def _record(text: bytes) -> Line | None:
    try:
        record = parse_json(text, "", DataError)
    except DataError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


class LineFile:
    """Appends to `path`, whose lines are first reduced to those that `keeps` is true of.

    The file is changed by `append` alone, which raises OSError where that fails. Lines that could not be written are
    then written by a later one that can be.
    """

    def __init__(self, path: Path, keeps: Callable[[Line], bool]):
        self.path = path
        self._keeps = keeps
        self._reduced = False
        self._waiting: deque[Line] = deque(maxlen=MOST_WAITING)

    def reduce(self) -> None:
        """Drop what a continuation does again; nothing if that was done."""
        if not self._reduced and os.path.lexists(self.path):
            kept = {}
            for line in read_lines(self.path):
                if self._keeps(line):
                    # Versions before this one could write a step twice.
                    kept[line["step"], "extractor" in line] = line
            text = "".join(map(_text, kept.values()))
            write_atomically(self.path, lambda temporary: temporary.write_text(text))
        self._reduced = True

    def append(self, line: Line) -> None:
        """Write a line, after those that wait."""
        self._waiting.append(line)
        self.reduce()
        left = "".join(map(_text, self._waiting)).encode()
        # Unbuffered: what does not fit must not come later, in part.
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
        self._waiting.clear()

    def sync(self) -> None:
        """Have what was written on the disk."""
        if self.path.is_file():
            sync(self.path)


def _text(line: Line) -> str:
    return json.dumps(line) + "\n"
