"""Triton's interpreter with bfloat16 as the hardware has it, and functions run in a child process."""

import dataclasses
import faulthandler
import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike, NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.patience import PATIENCE

INTERPRETED = triton.knobs.runtime.interpret
interpreter_only = pytest.mark.skipif(
    not INTERPRETED, reason="host memory can be protected or left sparse; compiled kernels read the device's"
)


def widen(bits: ArrayLike) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bit patterns."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: ArrayLike) -> NDArray[np.uint16]:
    """bfloat16 bit patterns of float32 values, rounded to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().view(torch.uint16).numpy()


@contextmanager
def rounding_bfloat16() -> Iterator[None]:
    """The interpreter truncates float32 to bfloat16 and multiplies bfloat16 bit patterns; round and widen instead."""
    cast, convert, dot = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
        InterpreterBuilder.create_dot,
    )

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), target.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), target.scalar)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), target.scalar)
        return convert(self, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = TensorHandle(widen(a.data), tl.float32), TensorHandle(widen(b.data), tl.float32)
        return dot(self, a, b, total, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
        patch.setattr(InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@contextmanager
def indexing_by_one_element() -> Iterator[None]:
    """Triton 3.6 gives a loop's bound as int(array), which NumPy 2.4 refuses for an array of shape (1,)."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_index)
        yield


@contextmanager
def patching_once() -> Iterator[None]:
    """The interpreter patches triton.language anew at each call of a device function, most of its time; once a launch
    is enough.
    """
    patch_language = interpreter._patch_lang
    patched: set[int] = set()

    def patch_new(function: Any) -> Any:
        languages = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return interpreter._LangPatchScope()
        outermost = not patched
        scope = patch_language(function)
        patched.update(languages)
        if outermost:
            restore = scope.restore

            def restore_and_forget() -> None:
                restore()
                patched.clear()

            scope.restore = restore_and_forget
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_new)
        yield


@contextmanager
def without_unread_checks() -> Iterator[None]:
    """The interpreter computes whether each sum and product of integers overflows, two fifths of its time, and drops
    the answer where `debug` is off: leave that out. Overflow is for the proof K4 to see.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


class Child(NamedTuple):
    """How a child process ended: its exit status, negative for a signal, and what the function returned."""

    status: int
    answer: Any


def in_child(function: Callable[[], Any], seconds: float = PATIENCE) -> Child:
    """Run `function` in a fork of this process, which a crash ends; its answer travels as JSON.

    A child that does not end in time is killed: status -SIGKILL.
    """
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reader)
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                answer, status = function(), 0
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"
            with os.fdopen(writer, "w") as pipe:
                json.dump(answer, pipe)
        finally:
            os._exit(status)
    os.close(writer)
    deadline = time.monotonic() + seconds
    done, status = os.waitpid(process, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.002)
        done, status = os.waitpid(process, os.WNOHANG)
    if not done:
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return Child(os.waitstatus_to_exitcode(status), json.loads(text) if text else None)
