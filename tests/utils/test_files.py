"""One reader and one writer for files from outside: pipes, devices, endless and deep files, links, permissions."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_fast.errors import CheckpointError, DataError, OutputError
from dit_fast.utils.files import (
    check_file,
    check_output,
    open_file,
    parse_json,
    read_bytes,
    read_json,
    read_npy,
    read_object,
    read_text,
    utf8_name,
    write_atomically,
)

READERS = (check_file, open_file, read_bytes, read_text, read_json, read_object, read_npy)


def make_pipe(path):
    os.mkfifo(path)
    return "a pipe"


def make_folder(path):
    path.mkdir()
    return "a folder"


def make_link_to_zeros(path):
    path.symlink_to("/dev/zero")
    return "a device"


def make_link_to_pipe(path):
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))
    return "a pipe"


def make_dangling(path):
    path.symlink_to(path.with_suffix(".gone"))
    return "no such file"


def make_loop(path):
    path.symlink_to(path)
    return "Too many levels of symbolic links"


def make_too_large(path):
    with path.open("wb") as file:
        file.truncate(2**40)
    return "refused: 1099511627776 bytes, expected at most 67108864"


@pytest.mark.parametrize(
    "make",
    [make_pipe, make_folder, make_link_to_zeros, make_link_to_pipe, make_dangling, make_loop, make_too_large],
)
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_of_bounded_size_are_read(tmp_path, reader, make):
    path = tmp_path / "manifest.json"
    found = make(path)
    bound = {"most": 64 * 2**20} if reader in (check_file, open_file, read_npy) else {}
    for raises in (DataError, CheckpointError):
        with pytest.raises(raises) as error:
            reader(path, raises, **bound)
        assert str(error.value).startswith(f"{path}: ")
        assert found in str(error.value)
        assert "\n" not in str(error.value)


def test_names_that_no_file_can_have_get_one_line():
    for name in ("a\0b", "x" * 300):
        with pytest.raises(DataError, match="cannot be read") as error:
            read_bytes(name, DataError)
        assert "\n" not in str(error.value)
        assert "\0" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged or not JSON"),
        (b"{", "damaged or not JSON"),
        (b'{"a": 1}\xff', "damaged or not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "damaged or not JSON"),
        (b"[" * 500 + b"]" * 500, "nested deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b'{"a": ' + b"9" * 5000 + b"}", "damaged or not JSON"),
    ],
)
def test_json_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_json(path, CheckpointError)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_json_as_editors_write_it_is_read(tmp_path):
    path = tmp_path / "config.json"
    content = {"a": [1, {"b": None}], "é": "\N{SNOWMAN}"}
    for text in (json.dumps(content).encode(), json.dumps(content, ensure_ascii=False).encode("utf-8-sig")):
        path.write_bytes(text)
        assert read_object(path, DataError) == content
    assert parse_json("[" * 64 + "]" * 64, "here", DataError)
    path.write_text("[]")
    with pytest.raises(DataError, match="holds a JSON array, expected an object"):
        read_object(path, DataError)


def test_a_file_that_grows_is_read_as_it_was(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("1\n")
    with open_file(path, DataError) as file:
        path.write_text("1\n2\n")
        assert file.read() == b"1\n2\n"
    assert read_text(path, DataError) == "1\n2\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"not text in UTF-8 \(byte 2\)"):
        read_text(path, DataError)


# Writing


def save_word(path):
    path.write_text("word")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize(
    "write", [save_word, lambda path: save_file({"a": torch.zeros(2)}, path)], ids=["text", "safetensors"]
)
def test_new_files_follow_the_umask(tmp_path, umask, write):
    """safetensors itself makes files that only their owner reads."""
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "new.safetensors", write)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, save_word)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("word", 0o640)


def test_links_stay_and_their_targets_are_written(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "target.json", tmp_path / "link.json"
    link.symlink_to("there/target.json")
    for old in (None, "old"):
        if old is not None:
            target.write_text(old)
        write_atomically(link, save_word)
        assert link.is_symlink()
        assert target.read_text() == "word"
    assert [path.name for path in target.parent.iterdir()] == ["target.json"]


def test_a_device_gets_the_bytes_and_stays(tmp_path):
    link = tmp_path / "null.json"
    link.symlink_to("/dev/null")
    for path in (link, tmp_path / "node"):
        if path.name == "node":
            if os.geteuid():
                continue
            os.mknod(path, 0o20666, os.makedev(1, 3))
        check_output(path)
        write_atomically(path, save_word)
        assert path.is_char_device()
    assert link.is_symlink()
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        write_atomically(full, save_word)


def test_a_pipe_gets_the_bytes_and_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(pipe)
    with pytest.raises(OutputError, match="the pipe has no reader"):
        write_atomically(pipe, save_word)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, save_word)
    assert os.read(reader, 100) == b"word"
    os.close(reader)
    assert pipe.is_fifo()


def test_more_than_a_pipe_holds_is_written_whole(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)

    def read():
        with open(reader, "rb") as file:
            got.append(len(file.read()))

    # The writer's end must be there before the first read, which would be the end of the file otherwise.
    keep = os.open(pipe, os.O_WRONLY)
    thread = threading.Thread(target=read)
    thread.start()
    write_atomically(pipe, lambda path: path.write_bytes(bytes(2**20)))
    os.close(keep)
    thread.join()
    assert got == [2**20]


def test_stdout_is_written_to_and_not_replaced(tmp_path):
    """`--out /dev/stdout > all.txt`: what was printed before and after stays."""
    code = (
        "from dit_fast.utils.files import write_atomically as w; from pathlib import Path\n"
        "print('before'); w(Path('/dev/stdout'), lambda p: p.write_text('word\\n')); print('after')\n"
        "w(Path('/dev/fd/2'), lambda p: p.write_text('other\\n'))"
    )
    with (tmp_path / "all.txt").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "other\n")
    assert (tmp_path / "all.txt").read_text() == "before\nword\nafter\n"


@pytest.mark.parametrize("make", [make_folder, make_loop])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, make):
    path = tmp_path / "out.json"
    make(path)
    for call in (check_output, lambda path: write_atomically(path, save_word)):
        with pytest.raises(OutputError, match=r"cannot write .*out\.json"):
            call(path)
    assert os.listdir(tmp_path) == ["out.json"]


def test_nothing_half_written_stays(tmp_path):
    """A library's own error class is one too, and an interrupt leaves no temporary file."""
    path = tmp_path / "model.safetensors"
    with pytest.raises(OutputError, match="cannot write"):
        write_atomically(path, lambda temporary: save_file({"a": torch.zeros(2)}, temporary / "below"))

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert os.listdir(tmp_path) == []
    with pytest.raises(OutputError, match=os.strerror(errno.ENAMETOOLONG)):
        check_output(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["plain", "caf\u00e9", os.fsdecode(b"caf\xe9")])
def test_a_name_that_is_not_utf8_has_one_that_is_while_it_is_read(tmp_path, name):
    path = tmp_path / f"{name}.safetensors"
    save_file({"x": torch.arange(3.0)}, path)
    with utf8_name(path) as readable:
        os.fspath(readable).encode()
        tensors = load_file(readable)
    assert tensors["x"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("version", [None, (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "array",
    [
        np.array([7]),
        np.array(3.5),
        np.zeros((0, 4), np.float16),
        np.arange(24, dtype=">i4").reshape(2, 3, 4),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.array([True, False]),
    ],
    ids=["one", "scalar", "empty", "big-endian", "fortran", "bool"],
)
def test_npy_files_are_read_as_numpy_does_without_its_parser(tmp_path, monkeypatch, array, version):
    """`ast` is not safe in threads before Python 3.11.9: with it, 16 readers fail now and then."""
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    expected = np.load(path)
    monkeypatch.setattr("ast.parse", None)
    read = read_npy(path, DataError)
    assert read.dtype == expected.dtype
    assert np.array_equal(read, expected)


def test_npy_files_of_other_contents_are_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6.0))
    whole = path.read_bytes()
    structured = tmp_path / "b.npy"
    np.save(structured, np.zeros(2, [("a", "i4")]))
    objects = tmp_path / "c.npy"
    np.save(objects, np.array([{}]), allow_pickle=True)
    for content in (
        whole[:-1],
        whole + b"x",
        whole[:20],
        whole.replace(b"(6,)", b"(9,)"),
        b"PK\x03\x04" + whole,
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.npy cannot be read"):
            read_npy(path, DataError)
    for other in (structured, objects):
        with pytest.raises(DataError, match="cannot be read"):
            read_npy(other, DataError)


def test_of_two_writers_at_once_the_file_is_of_one(tmp_path):
    """`export`, `encode --vae none`, `evaluate --out` and `plot` take no lock: their file is whole, of the last one."""
    path = tmp_path / "out.bin"
    meet = threading.Barrier(2)

    def write(content: bytes) -> None:
        def fill(temporary):
            with temporary.open("wb") as file:
                for half in (content[:5000], content[5000:]):
                    file.write(half)
                    file.flush()
                    meet.wait(60)

        for _ in range(5):
            write_atomically(path, fill)

    threads = [threading.Thread(target=write, args=(letter * 10_000,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in (b"a" * 10_000, b"b" * 10_000)
    assert [file.name for file in tmp_path.iterdir()] == ["out.bin"]
