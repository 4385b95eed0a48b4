"""The processes that share a model, one on each machine, as ``mlx.launch`` starts them.

Every process runs the same command on its part of the model and takes the same decisions from the same logits, so
nothing is exchanged but what the model's own layers add up. The exceptions are here: what could differ between machines
is compared once (:func:`agree`), or taken from the first process (:func:`share`). Only the first one, rank 0, prints.

Where only the first one knows what is next, it says so (:func:`tell`), and the others listen (:func:`hear`).

MLX's ring says once that a peer was lost, and then waits for it for ever. So a thread of each process looks after its
neighbours (:class:`_Watch`). Other backends say nothing: there ``mlx.launch`` ends the others.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from .errors import GlassError

# Help of an option that mlx-lm has, too.
PIPELINE = "under mlx.launch: each machine has some of the layers, not a part of every layer"

# How often to look after the neighbours, and how long another process may say first why all of them end; seconds.
_INTERVAL, _GRACE = 0.5, 4.0
_ending = threading.Lock()

_Any = TypeVar("_Any")
_MARK = 0x61A55  # what a message begins with
_messages = itertools.count()  # all processes count those that were told
_GIVING_UP = "giving up"
_excused = threading.Event()  # whether the first process has said that it is about to end


def rank() -> int:
    """This process's place in the group, from 0 on."""
    return mx.distributed.init().rank()


def size() -> int:
    """How many processes the group has; 1 without ``mlx.launch``."""
    return mx.distributed.init().size()


def settle() -> None:
    """Wait for what is under way here. mlx-lm begins a step after the last token, in a stream of its own, and MLX's
    ring mixes up what two streams exchange at once."""
    if size() > 1:
        generate = sys.modules.get("mlx_lm.generate")  # it takes long to import, and may not be needed
        for stream in [generate.generation_stream] if generate else []:
            mx.synchronize(stream)
        mx.synchronize()


def share(values: mx.array) -> mx.array:
    """The first process's values. Every process must call this at the same point."""
    if size() == 1:
        return values
    settle()
    shared = mx.distributed.all_sum(values if rank() == 0 else mx.zeros_like(values), stream=mx.cpu)
    mx.eval(shared)
    return shared


def gather(values: list[int]) -> list[list[int]]:
    """Every process's values. Each must call this at the same point, with as many; none returns before all have."""
    if size() == 1:
        return [values]
    settle()
    return mx.distributed.all_gather(mx.array([values], mx.int64), stream=mx.cpu).tolist()


def share_in_graph(values: mx.array, after: mx.array) -> mx.array:
    """The first process's values, as part of a graph, which exchanges them when it has come to ``after``. Every process
    must call this at the same point, in the stream in which the model's layers add up."""
    if rank() > 0:
        values = mx.depends(mx.zeros_like(values), after)
    return mx.distributed.all_sum(values)


def decided(value: bool) -> bool:
    """What the first process has decided. Every process must call this at the same point."""
    return value if size() == 1 else bool(share(mx.array([value], mx.int32)).item())


def all_of(value: bool) -> bool:
    """Whether it is so in every process. Each must call this at the same point."""
    return all(here for (here,) in gather([int(value)]))


def attempt(work: Callable[[], _Any]) -> _Any:
    """Do what may fail on one machine alone; then it fails on all. Every process must call this at the same point.

    Raises:
        GlassError: in every process: its own, or else why another one failed.
    """
    if size() == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except GlassError as e:
        error = e
    reasons = _gather_texts(str(error) if error else "")
    if error is not None:
        raise error
    for i, reason in enumerate(reasons):
        if reason:
            raise GlassError(f"rank {i}: {reason}")
    return result


def _gather_texts(text: str) -> list[str]:
    data = text.encode()
    lengths = [length for (length,) in gather([len(data)])]
    if not any(lengths):
        return [""] * len(lengths)
    padded = mx.array([list(data.ljust(max(lengths)))], mx.uint8)
    rows = mx.distributed.all_gather(padded, stream=mx.cpu).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths)]


def tell(message: Any) -> None:
    """Say a plain value, as JSON has them, to the other processes, which must be about to ``hear`` it.

    The process ends if they are not: whatever they do next would mix with what this one does.
    """
    if size() == 1:
        return
    data = json.dumps(message).encode()
    header = mx.array([_MARK, next(_messages), len(data)], mx.int32)
    if share(header).tolist() != header.tolist():
        _end("the processes of the group are not at the same point any more, so all end. Their output may say why.")
    share(mx.array(list(data), mx.uint8))


def hear() -> Any:
    """Wait for what the first process says next; for hours, if it must be, without taking up a core.

    Raises:
        GlassError: what comes is no message: the other processes are at another point.
    """
    connections = [connection for _, connection in _neighbours()]
    if connections:  # MLX's ring asks again and again whether something has come
        select.select(connections, [], [])
    mark, number, length = share(mx.zeros((3,), mx.int32)).tolist()
    if (mark, number) != (_MARK, next(_messages)):
        raise GlassError("the other processes of the group are not at the same point any more")
    message = json.loads(bytes(share(mx.zeros((length,), mx.uint8)).tolist()))
    if message == _GIVING_UP:
        _excused.set()
        threading.Event().wait()  # the watch ends this process when the first one has ended
    return message


def give_up() -> None:
    """Before this process, the first one, ends with an error, which it says itself: the others ``hear``, and are silent
    when they end because of it."""
    tell(_GIVING_UP)


def agree(facts: Mapping[str, object]) -> None:
    """Make sure that all processes have the same facts; each must call this at the same point.

    Args:
        facts (dict): what each of them is called, in the same order everywhere, and what prints as itself.

    Raises:
        GlassError: in every process: which facts differ, and where.
    """
    if size() == 1:
        return
    digests = [int(hashlib.sha256(str(fact).encode()).hexdigest()[:7], 16) for fact in facts.values()]
    for name, values in zip(facts, zip(*gather(digests))):
        others = [i for i, value in enumerate(values) if value != values[0]]
        if others:
            raise GlassError(
                f"The machines of the group differ in {name}: rank {', '.join(map(str, others))} from rank 0, which "
                f"has {facts[name] if rank() == 0 else 'another one'}. All must have the same."
            )


def together(work: Callable[[], None]) -> Callable[[], None]:
    """Work that the processes of a group can do together, for :func:`perform`."""
    work.together = True
    return work


def perform(work: Callable[[], None]) -> None:
    """Do a command's work; as one of a group, if there is one, in a process that ends with the others.

    There this process draws the same random numbers as they do, is silent unless it is the first, and ends when another
    one has ended, and an error here ends them. The work is done when all have done it.

    Raises:
        GlassError, RuntimeError: as the work; in a group the process ends instead.
    """
    try:
        alone = size() == 1
    except RuntimeError as e:
        raise GlassError(f"the other processes of the group cannot be reached; see their output ({e})") from e
    if alone:
        work()
        return
    watch = _Watch()
    watch.start()
    try:
        if not hasattr(work, "together"):
            raise GlassError("this command runs on one machine: start it without mlx.launch.")
        mx.random.seed(share(mx.random.randint(0, 2**31 - 1)).item())
        with _voice():
            work()
        watch.stop()
        gather([0])
    except (GlassError, RuntimeError) as e:
        if isinstance(e, RuntimeError) or isinstance(e.__cause__, RuntimeError):
            watch.check()  # MLX may have raised it because a neighbour has ended
        watch.fail(str(e) if isinstance(e, GlassError) else f"MLX: {(str(e).splitlines() or [type(e).__name__])[0]}")
    except KeyboardInterrupt:
        os._exit(130)  # at an orderly end MLX may wait for the others
    except Exception:
        traceback.print_exc()
        os._exit(1)


@contextmanager
def _voice() -> Iterator[None]:
    """Nothing is printed meanwhile, unless by the first process; errors that are logged are."""
    if rank() == 0:
        yield
        return
    logging.getLogger("glass_mlx").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


class _Watch(threading.Thread):
    """Ends the process when a neighbour in MLX's ring has closed its connection."""

    def __init__(self):
        super().__init__(daemon=True)
        self._stopped = threading.Event()
        self._neighbours = _neighbours()

    def run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            self.check()

    def stop(self) -> None:
        """Let the neighbours go: all is done."""
        self._stopped.set()
        self.join()

    def check(self) -> None:
        """End the process if a neighbour has ended."""
        if not self._gone():
            return
        gone = min(self._gone())
        if rank() == 0 or (rank() == 1 and gone == 0 and not _excused.is_set()):  # whoever sees it, one process says it
            _end(f"rank {gone} has ended or cannot be reached, so the others end too. Its own output says why.")
        os._exit(1)

    def fail(self, message: str) -> None:
        """End the process because of an error. The first process says it; another one only if none has by then."""
        self.stop()
        if rank() > 0 and self._sees_an_end():
            os._exit(1)
        _end(message if rank() == 0 else f"rank {rank()}: {message}")

    def _sees_an_end(self) -> bool:
        """Whether a neighbour ends within a while."""
        until = time.monotonic() + _GRACE
        while not self._gone() and time.monotonic() < until:
            time.sleep(_INTERVAL)
        return bool(self._gone())

    def _gone(self) -> list[int]:
        """The ranks of the neighbours that have ended."""
        return [other for other, connection in self._neighbours if _closed(connection)]


def _end(message: str) -> None:
    """End the process with an error, once whichever thread comes first; MLX may hang at an orderly end."""
    _ending.acquire()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.__stderr__, flush=True)  # also where this process is silent
    os._exit(1)


@cache
def _neighbours() -> list[tuple[int, socket.socket]]:
    """The ranks beside this one in MLX's ring, with the connections to them: those that end in a port of the ring's."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if not hosts or not Path(hosts).is_file():
        return []
    addresses = json.loads(Path(hosts).read_text())
    ports = [{int(address.rpartition(":")[2]) for address in own} for own in addresses]
    before, after = (rank() - 1) % size(), (rank() + 1) % size()
    found = []
    for name in os.listdir("/dev/fd"):
        with suppress(OSError, ValueError, LookupError):  # other files
            connection = socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM)
            here, there = connection.getsockname()[1], connection.getpeername()[1]
            if here in ports[rank()] or there in ports[after]:
                found.append((before if here in ports[rank()] else after, connection))
    return found


def _closed(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection. Nothing is read from it."""
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
