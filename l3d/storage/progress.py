"""Tell how far the run of a folder has come, and how to go on with it."""

import sys
from pathlib import Path

from l3d.distributed.signals import Terminated
from l3d.distributed.watch import is_first
from l3d.storage.files import WriteError, beginning, read_json

CONFIG = "config.yaml"


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints, in the order of their steps."""
    return sorted((run / "checkpoints").glob("step*[0-9]"))


def last_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint of the last step; None if there is none yet."""
    return next(reversed(checkpoints(run)), None)


def unfinished(run: Path) -> str | None:
    """Say how to go on with a run folder that holds no decomposition yet; None for any other folder."""
    if (run / "decomposition.json").exists():
        return None
    last = last_checkpoint(run)
    if last is not None:
        try:
            of = f" of {read_json(last / 'decomposition.json')['settings']['steps']}"
        except (OSError, ValueError, KeyError, TypeError):
            of = ""
        place = f"its last checkpoint is at step {int(last.name.removeprefix('step'))}{of}"
        return f"{run} is unfinished: {place}; go on with {_resume(run)} (or load {last})"
    if (run / "checkpoints").is_dir():
        return f"{run} is unfinished: it ended before its first checkpoint; start it again with {_resume(run)}"
    words = beginning(run / CONFIG).replace(";", " ").split()
    if words[:2] != ["#", "l3d"]:
        return None
    again = f"l3d {words[2]} --config {run / CONFIG} --out {run} --overwrite"
    return f"{run} is unfinished: it ended before its first checkpoint; start it again with {again}"


def check_finished(run: Path) -> None:
    """Raise FileNotFoundError, which says how to go on, for a run folder that holds no decomposition yet."""
    message = unfinished(run)
    if message is not None:
        raise FileNotFoundError(message)


def interrupted(run: Path, command: str = "") -> str:
    """Return a message that says how to resume an interrupted run, by `command` and its folder if it is given."""
    return f"interrupted{';' if last_checkpoint(run) else ','} {how_to_go_on(run, command)}"


def how_to_go_on(run: Path, command: str = "") -> str:
    """Name the last checkpoint and the command that resumes the run."""
    last = last_checkpoint(run)
    if last is None:
        return f"before the first checkpoint in {run}"
    return f"last checkpoint: {last}; resume with: {f'{command} {run}' if command else _resume(run)}"


def advised(stop: BaseException, run: Path) -> BaseException:
    """Return an error that stopped a run with a message that says how to go on; for SIGTERM print it, once."""
    if isinstance(stop, WriteError) and not stop.advised:
        stop = WriteError(f"{stop}; {how_to_go_on(run)}")
        stop.advised = True
    elif isinstance(stop, KeyboardInterrupt):
        stop = KeyboardInterrupt(interrupted(run))
    elif isinstance(stop, Terminated) and not stop.told:
        stop.told = True
        if is_first():
            print(f"l3d: {interrupted(run)}", file=sys.stderr, flush=True)
    return stop


def _resume(run: Path) -> str:
    """Return what resumes a run: a command if config.yaml names its model and data, else a call."""
    return f"l3d resume {run}" if (run / CONFIG).exists() else f"l3d.decompose(.., out='{run}', existing='resume')"
