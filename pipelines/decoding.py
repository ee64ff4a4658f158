"""Decoders in processes of their own: what a stranger's file does to one costs one row.

Each thread that decodes has one process, long-lived, bounded in time and memory, which runs functions such as
pipelines.media's on bytes. A process that dies or overruns is replaced, and its row alone has the reason. What it
answers is read as numbers, never unpickled, for a decoder that a file has taken over must not reach further.

The pools at hand do not hold that: one death breaks concurrent.futures' for good, and the workers of pebble's share
a pipe, so that one killed in mid-answer leaves the rows of all others waiting.
"""

import argparse
import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipelines.config import DecodeConfig
from pipelines.media import Clip, MediaError
from pipelines.windows import Windows

# What functions in a decoder process may give: numbers, arrays of uint8 and tuples of such arrays.
Made = Clip | Windows | np.ndarray
_KINDS: dict[str, Callable[..., Made]] = {"Clip": Clip, "Windows": Windows, "ndarray": lambda frames: frames}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # each thread would reserve address space
    "OPENBLAS_NUM_THREADS": "1",
    # Pictures are freed to glibc's heap and not to the system, or page faults would be 40 % of a picture's time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}


class Decoders:
    """One decoder process for each thread that calls; they end with `close`, with the thread and with this process."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self._mine = threading.local()
        self._all: set[_Decoder] = set()

    def call(self, function: Callable[..., Made], body: bytes, *arguments: object) -> Any:
        """`function(body, *arguments)` in this thread's process: a function of a module, arguments that JSON can hold.

        MediaError: what `function` says of the file, decode_timeout, decoder_crashed. RuntimeError where no process
        starts at all, which is no file's fault.
        """
        decoder: _Decoder | None = getattr(self._mine, "decoder", None)
        if decoder is None:
            decoder = self._mine.decoder = _Decoder(self.config)
            self._all.add(decoder)
        try:
            return decoder.call(f"{function.__module__}:{function.__qualname__}", body, arguments)
        except _DecoderLost as lost:
            self._mine.decoder = None
            self._all.discard(decoder)
            raise MediaError(lost.status, lost.message) from None

    def close(self) -> None:
        """End all processes."""
        while self._all:
            self._all.pop().end()


class _DecoderLost(MediaError):
    """The process is gone, and with it the row that it had."""


class _Decoder:
    """A process and the connection to it; used by one thread."""

    def __init__(self, config: DecodeConfig) -> None:
        self.timeout_s, self.max_bytes = config.timeout_s, config.max_memory_mb << 20
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "pipelines.decoding"]
            command += [str(number) for number in (theirs.fileno(), config.max_memory_mb, os.getpid())]
            self.process = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[1],
                env=os.environ | _ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches it through this process alone
            )
        self.connection = Connection(ours.detach())
        try:
            self.connection.recv_bytes()  # once its imports are done, so that they are on no row's clock
        except (EOFError, OSError):
            raise RuntimeError(f"no decoder process starts ({self.end()}); its own message is above") from None
        _limit_waiting(self.connection.fileno(), config.timeout_s)

    def call(self, function: str, body: bytes, arguments: tuple[object, ...]) -> Made:
        try:
            self.connection.send_bytes(json.dumps([function, arguments]).encode())
            self.connection.send_bytes(body)
            answer = json.loads(self.connection.recv_bytes(self.max_bytes))
            if "status" in answer:
                raise MediaError(answer["status"], answer["message"])
            arrays = {name: self._arrays(shape) for name, shape in answer["shapes"].items()}
            return _KINDS[answer["kind"]](**answer["facts"], **arrays)
        except BlockingIOError:
            self.process.kill()
            self.end()
            raise _DecoderLost("decode_timeout", f"not decoded in {self.timeout_s:g} s") from None
        except (EOFError, OSError, ValueError, TypeError, KeyError):  # the last three where the answer is none
            raise _DecoderLost("decoder_crashed", f"the decoder ended by {self.end()}") from None

    def _arrays(self, shape: list) -> Any:
        """The next array, or one of each of several shapes."""
        if not shape or isinstance(shape[0], list):
            return tuple(map(self._arrays, shape))
        return np.frombuffer(self.connection.recv_bytes(self.max_bytes), np.uint8).reshape(shape)

    def end(self) -> str:
        """Kill the process where it still runs; returns what it ended by."""
        self.connection.close()
        try:
            code = self.process.wait(timeout=1)  # a process that has crashed is about to say by what
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _limit_waiting(socket_number: int, timeout_s: float) -> None:
    """Let reads and writes of a socket that wait longer than that raise BlockingIOError."""
    timeval = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    with socket.socket(fileno=os.dup(socket_number)) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, timeval)


def _confine(max_memory_mb: int, parent: int) -> None:
    """Bound this process's memory, leave no core files and end with the parent, where the system can do that."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        limit = max_memory_mb << 20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent is gone already")


def _serve(connection: Connection) -> None:
    """Answer calls until the other end closes."""
    connection.send_bytes(b"ready")
    while True:
        try:
            function, arguments = json.loads(connection.recv_bytes())
            body = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        module, _, name = function.partition(":")
        try:
            made = getattr(import_module(module), name)(body, *arguments)
        except MediaError as error:
            connection.send_bytes(json.dumps({"status": error.status, "message": error.message}).encode())
            continue
        facts = {"frames": made} if isinstance(made, np.ndarray) else dict(vars(made))
        arrays = {name: value for name, value in facts.items() if isinstance(value, np.ndarray | tuple)}
        facts = {name: value for name, value in facts.items() if name not in arrays}
        shapes = {
            name: [array.shape for array in value] if isinstance(value, tuple) else value.shape
            for name, value in arrays.items()
        }
        connection.send_bytes(json.dumps({"kind": type(made).__name__, "facts": facts, "shapes": shapes}).encode())
        for value in arrays.values():
            for array in value if isinstance(value, tuple) else (value,):
                connection.send_bytes(np.ascontiguousarray(array).reshape(-1).data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("connection", type=int, help="file descriptor of a socket")
    parser.add_argument("max_memory_mb", type=int)
    parser.add_argument("parent", type=int, help="id of the process to end with")
    options = parser.parse_args()
    _confine(options.max_memory_mb, options.parent)
    cv2.setNumThreads(1)
    _serve(Connection(options.connection))
