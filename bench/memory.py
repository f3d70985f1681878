"""Peak memory of training steps against width, each in a process of its own: `python -m bench.memory`.

One linear layer [width, width], S=256 samples of T=8 positions, K=512 subnetworks of rank 4: the factors of a batch and
of the directions grow with the width, a materialised batch of gradients [S, O, I] or of directions [K, O, I] with its
square. The peak counted is what two steps (the first keeps everything) add to model and data. Writes
bench/results/memory.json with the fitted exponent and the environment.
"""

import argparse
import json
import math
import subprocess
import sys
from typing import Any

import torch

from bench.measure.peak import added
from l3d.estimate import plan
from l3d.train import turn
from l3d.training.run import Run

WIDTHS = (1024, 2048, 4096)
S, T, K, R = 256, 8, 512, 4
AIM = 1.15  # of the exponent


def measure(width: int) -> dict[str, Any]:
    """Take two training steps at a width, in this process; return the bytes they added at the most."""
    torch.manual_seed(0)
    model = torch.nn.Linear(width, width, bias=False)
    data = torch.randn(S, T, width)

    def train() -> Run:
        run = plan(model, data, n_subnetworks=K, rank=R, batch_size=S, k=0.1, steps=2, warm_start=1)
        for step in range(2):
            turn(run, run.gradients(step))
        return run

    peak, run = added(train)
    return {
        "width": width,
        "peak_bytes": peak,
        "factor_bytes": run.gradients(0).nbytes(),  # type: ignore[union-attr]
        "parameter_bytes": sum(p.nbytes for p in run.decomposition.parameters()),
        "materialised_gradient_bytes": S * width * width * 4,
        "materialised_direction_bytes": K * width * width * 4,
    }


def exponent(xs: list[float], ys: list[float]) -> float:
    """Fit y = a x^e by least squares of the logarithms."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum((a - mu) ** 2 for a in u)


def main() -> None:
    """Measure every width, each in a subprocess."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, help="measure this one here, and print it")
    width = parser.parse_args().width
    if width is not None:
        print(json.dumps(measure(width)))
        return
    from bench.measure.environment import RESULTS, ROOT, environment

    rows = []
    for each in WIDTHS:
        command = [sys.executable, "-m", "bench.memory", "--width", str(each)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout))
        print(rows[-1], flush=True)
    fitted = exponent([row["width"] for row in rows], [row["peak_bytes"] for row in rows])
    sizes = {"S": S, "T": T, "K": K, "R": R}
    found = {"environment": environment(), "sizes": sizes, "rows": rows, "exponent": fitted, "aim": AIM}
    path = RESULTS / "memory.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"exponent in width: {fitted:.3f} (aim: at most {AIM})\nwritten: {path}")


if __name__ == "__main__":
    main()
