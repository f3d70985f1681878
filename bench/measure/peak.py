"""How much memory a call takes at the most, measured in a process of its own."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l3d.training.memory import memory_now, peak_memory

_CLEAR = Path("/proc/self/clear_refs")  # on Linux; writing 5 makes the kernel forget the peak so far
_PRELOADED = [
    "bench.methods.cases",
    "bench.methods.providers",
]  # imported once, by the server that all processes are forked from


def added(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return the most bytes that a call adds to what this process holds, its result counted in, and the result.

    On Linux; elsewhere the bytes are 0, unknown.
    """
    if not _CLEAR.exists():
        return 0, call()
    before = memory_now()
    _CLEAR.write_text("5", encoding="ascii")
    result = call()
    return max(0, peak_memory() - before), result


def of(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> int:
    """Return what `prepare(*arguments)()` adds at the most to what was prepared, in a fresh process.

    prepare: a module's function. It may call what it returns at tiny sizes first, so that what is loaded on first use
    does not count.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sending, prepare, arguments))
    process.start()
    sending.close()
    try:
        return int(receiving.recv())
    except EOFError as error:
        raise RuntimeError(f"{prepare.__name__}{arguments}: the process that measures its memory failed") from error
    finally:
        process.join()


def _report(sending: Any, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    peak, _ = added(prepare(*arguments))
    sending.send(peak)
