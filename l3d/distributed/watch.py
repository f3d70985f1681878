"""Notice that another process of the run has ended, and end with a message instead of waiting for it forever.

A rank that dies leaves the others in a collective operation. With gloo it raises, soon; with NCCL, or where a process
hangs, nothing happens before a timeout of hours; and torchrun sends SIGTERM, which Python cannot act on while it waits
inside a library. So a thread counts a heartbeat up in torch.distributed's store, looks at the others', and answers
signals: in each case it prints where to go on, and ends the process.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from l3d.distributed import process_group as processes
from l3d.distributed.process_group import ProcessGroup

BEAT = 1.0  # seconds between heartbeats
SILENCE = 20.0  # seconds without one after which a rank counts as dead
STATUS = 3  # the exit status of a process that ends because another has


def is_first() -> bool:
    """Tell whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def together(advice: Callable[[str], str]) -> Iterator[None]:
    """Where torchrun has started several processes, join them while the block runs, and end when one of them does.

    advice: what to say then, given the command that goes on.
    """
    joined = processes.start()
    if joined is None:
        yield
        return
    command = f"torchrun --nproc_per_node {joined.size} (or any other number) -m l3d resume"
    with watching(joined, lambda: advice(command)):
        yield
    processes.leave()


@contextmanager
def watching(group: ProcessGroup, advice: Callable[[], str]) -> Iterator[None]:
    """While the block runs, end this process when another one has ended or SIGTERM comes; say `advice()` then.

    A failing collective operation, which is how gloo tells, ends in the same way.
    """

    def end(reason: str, status: int) -> None:
        print(f"l3d: rank {group.rank}: {reason}; {advice()}", file=sys.stderr, flush=True)
        os._exit(status)  # not sys.exit: the main thread may wait in a collective operation forever

    done = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    terminate = signal.signal(signal.SIGTERM, lambda number, frame: None)  # the descriptor below tells the thread
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threads = [
        threading.Thread(target=_answer_signals, args=(reader, end), daemon=True),
        threading.Thread(target=_beat, args=(group, done, end), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
        dist.barrier()  # the store lies with one of them: nobody leaves before all are done
    except RuntimeError as error:  # dist.DistError is one
        if not _is_lost_connection(error):
            raise
        end(f"another process has ended ({str(error).splitlines()[0]})", STATUS)
    finally:
        done.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, terminate)
        writer.close()
        threads[1].join()  # before the store may go away


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("Connection", "connection", "gloo", "NCCL", "Gloo", "Broken pipe")
    )


def _answer_signals(reader: socket.socket, end: Callable[[str, int], None]) -> None:
    while received := reader.recv(1):
        if received[0] == signal.SIGTERM:
            end("told to end (SIGTERM), as torchrun does when another process has ended", STATUS)


def _beat(group: ProcessGroup, done: threading.Event, end: Callable[[str, int], None]) -> None:
    """Count this rank's heartbeat up and watch the others', until `done`."""
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=SILENCE),
        )  # a connection of its own: another may be blocked
        last = {rank: (0, time.monotonic()) for rank in range(group.size) if rank != group.rank}
        while not done.wait(BEAT):
            store.add(f"l3d/beat/{group.rank}", 1)
            for rank, (count, since) in last.items():
                found = store.add(f"l3d/beat/{rank}", 0)
                if found != count:
                    last[rank] = (found, time.monotonic())
                elif time.monotonic() - since > SILENCE and not store.check([f"l3d/done/{rank}"]):
                    end(f"rank {rank} has given no sign of life for {SILENCE:.0f} s", STATUS)
        store.set(f"l3d/done/{group.rank}", "1")
    except (RuntimeError, OSError) as error:
        if not done.is_set():
            end(f"the process that holds the run's store has ended ({str(error).splitlines()[0]})", STATUS)
