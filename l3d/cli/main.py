"""The command line `l3d`: from its arguments to its exit status.

What the commands do is in `l3d.cli.commands` and `l3d.cli.studies`, which are imported once a command line has been
understood: torch takes seconds to import, and --help should not.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from l3d.cli.parser import explain, parse

STUDIES = ("toy_suite", "sweep", "intervene", "paper")  # commands of `l3d.cli.studies`; the others are in `commands`


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's error, 130 after Ctrl-C, 143 after SIGTERM.

    A user's error is one line on stderr; with L3D_DEBUG=1 it is a traceback.
    """
    debug = os.environ.get("L3D_DEBUG", "") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks (‖ in cp1252) is shown as ?, and no failure
            stream.reconfigure(errors="replace")
    try:
        settings = parse(sys.argv[1:] if argv is None else list(argv))
        from l3d.cli import commands, studies  # here, not above: this imports torch
        from l3d.distributed.signals import terminate
        from l3d.training.memory import keep_freed_memory

        if argv is None:  # the process is ours
            keep_freed_memory()
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                signal.signal(signal.SIGTERM, terminate)
        name = settings["command"]
        chosen = settings[name]
        if name == "toy" and chosen["name"] == "all":
            name = "toy_suite"
        command: Callable[[dict[str, Any]], None] = getattr(studies if name in STUDIES else commands, name)
        command(chosen)
    except SystemExit as end:  # --help, --print_config and SIGTERM
        return end.code if isinstance(end.code, int) else 0
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # one of several processes tells
            print(f"l3d: {interrupt}" if interrupt.args else "l3d: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except argparse.ArgumentError as error:
        return _fail(explain(error))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        # Such an error may as well come from the user's own code: then the traceback helps.
        hint = " (L3D_DEBUG=1 shows where)" if isinstance(error, RuntimeError) else ""
        message = str(error) or type(error).__name__
        return _fail(message.replace("any_weights=True", "--any_weights") + hint)  # as it is spelt here
    return 0


def _fail(message: str) -> int:
    print(f"l3d: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
