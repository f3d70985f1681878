"""Let Ctrl-C and SIGTERM end a run after the step that it is at, so that the step can be saved."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from l3d.distributed.process_group import ProcessGroup

AT_ONCE = 1.0  # a second signal, this many seconds after the first, does not wait; torchrun sends each twice


class Terminated(SystemExit):
    """SIGTERM has ended a run: Python exits with status 143."""

    told = False  # whether it has been printed how to go on

    def __init__(self) -> None:
        super().__init__(143)


def terminate(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM by an exception, so that a command can say how to go on."""
    raise Terminated


def leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM where `l3d.distributed.watch` has a thread that answers it."""


class Stop:
    """The signal that has asked a run to end, if any."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: take note of it; raise at once if the first was a while ago."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > AT_ONCE:
            raise self.error()

    def asked(self, group: ProcessGroup | None) -> bool:
        """Tell whether the run is to end; of several processes all must call this, and all are told the same."""
        if group is not None:
            agreed = int(group.stacked(torch.tensor(self.number)).max())
            self.number = agreed or self.number  # a signal may have come in between: the next step will tell
            return agreed > 0
        return self.number > 0

    def error(self) -> BaseException:
        """Return what to raise."""
        return Terminated() if self.number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def awaiting() -> Iterator[Stop]:
    """Take note of Ctrl-C and SIGTERM while the block runs, instead of ending it; handlers of the user's own stay."""
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():  # Python allows it there alone
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler in (signal.default_int_handler, signal.SIG_DFL, terminate, leave_to_thread):
                before[number] = signal.signal(number, stop.ask)
    try:
        yield stop
    except RuntimeError as error:  # such as a DataLoader's, whose processes the same Ctrl-C has ended
        if not stop.number:
            raise
        raise stop.error() from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
