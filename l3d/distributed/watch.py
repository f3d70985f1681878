"""Watch the other processes of a run; when one ends, print how to resume and exit instead of waiting forever.

When a rank dies, the others are waiting for it in a collective operation. With gloo the operation soon raises. With
NCCL, or if a process hangs, nothing happens before a timeout of hours. torchrun sends SIGTERM, which Python cannot
handle while it waits inside a library. So one thread increments a heartbeat in torch.distributed's store and reads the
others', and another receives signals; either prints how to resume and ends the process. After SIGTERM it first waits:
if no process has ended, training finishes its step and saves it (`l3d.distributed.signals`).
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
from l3d.distributed.signals import leave_to_thread

BEAT = 1.0  # seconds between heartbeats
SILENCE = 20.0  # seconds without a heartbeat after which a rank counts as dead
GRACE = 20.0  # seconds after SIGTERM to finish a step in; torchrun kills after 30
STATUS = 3  # the exit status of a process that ends because another has


def is_first() -> bool:
    """Tell whether this is the only process, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def together(advice: Callable[[str], str]) -> Iterator[None]:
    """Join the processes that torchrun has started while the block runs; end this one if another ends.

    A single process runs the block as it is. advice: returns the message to print then, given the command that resumes
    the run.
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
    """While the block runs, print `advice()` and exit when another process has ended, or `GRACE` seconds after SIGTERM.

    A collective operation that fails, which is how gloo reports a dead process, ends this process too.
    """

    def end(reason: str, status: int) -> None:
        print(f"l3d: rank {group.rank}: {reason}; {advice()}", file=sys.stderr, flush=True)
        os._exit(status)  # not sys.exit: the main thread may be waiting in a collective operation

    done = threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    # an empty handler: the thread reads the signal from the socket
    terminate = signal.signal(signal.SIGTERM, leave_to_thread)
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_answer_signals, args=(receiver, done, end), daemon=True).start()
    beating = threading.Thread(target=_beat, args=(group, done, end), daemon=True)
    beating.start()
    try:
        yield
        dist.barrier()  # rank 0 holds the store: no process leaves before all are done
    except RuntimeError as error:  # dist.DistError is a subclass
        if not _is_lost_connection(error):
            raise
        end(f"another process has ended ({str(error).splitlines()[0]})", STATUS)
    finally:
        done.set()
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, terminate)
        sender.close()
        beating.join()  # it uses the store, which rank 0 may close next


def _is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether an error of a collective operation means that another process has gone."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("Connection", "connection", "gloo", "NCCL", "Gloo", "Broken pipe")
    )


def _answer_signals(receiver: socket.socket, done: threading.Event, end: Callable[[str, int], None]) -> None:
    """Read signal numbers from the socket, one byte each, and end the process after SIGTERM unless `done` is set."""
    while received := receiver.recv(1):
        if received[0] == signal.SIGTERM and not done.wait(GRACE):
            end("received SIGTERM, which torchrun sends when another process has ended", STATUS)


def _beat(group: ProcessGroup, done: threading.Event, end: Callable[[str, int], None]) -> None:
    """Increment this rank's heartbeat every `BEAT` seconds and check the others', until `done` is set."""
    try:
        # a connection of its own: the default one may be blocked
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=SILENCE))
        last = {rank: (0, time.monotonic()) for rank in range(group.size) if rank != group.rank}
        while not done.wait(BEAT):
            store.add(f"l3d/beat/{group.rank}", 1)
            for rank, (count, since) in last.items():
                found = store.add(f"l3d/beat/{rank}", 0)
                if found != count:
                    last[rank] = (found, time.monotonic())
                elif time.monotonic() - since > SILENCE and not store.check([f"l3d/done/{rank}"]):
                    end(f"rank {rank} has sent no heartbeat for {SILENCE:.0f} s", STATUS)
        store.set(f"l3d/done/{group.rank}", "1")
    except (RuntimeError, OSError) as error:
        if not done.is_set():
            end(f"the process that holds the run's store has ended ({str(error).splitlines()[0]})", STATUS)
