"""What bfloat16 factors cost in error: `python -m bench.precision [STEPS]`, on a real attention block.

Two runs on the same batches of layer 2's attention of the small language model in $L3D_DATA, K=100, rank 6: all in
float32, and dtype="bfloat16" (factors held in bfloat16, sums in float32, directions rounded at the end). Writes
bench/results/precision.json.
"""

import json
import statistics
import sys

from bench.measure.environment import RESULTS, environment
from bench.training import CHOICES, Block
from l3d.estimate import plan
from l3d.gradients.factors import Gradients
from l3d.train import turn


def main() -> None:
    """Train both on the same gradients and print their errors."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    block = Block()
    runs = {
        dtype: plan(block.model, block.train, **{**CHOICES, "steps": steps, "dtype": dtype})
        for dtype in ("float32", "bfloat16")
    }
    differences, sizes = [], {}
    for step in range(steps):
        whole = runs["float32"].gradients(step)
        assert isinstance(whole, Gradients)
        for dtype, run in runs.items():
            held = run._held(whole)
            sizes[dtype] = held.nbytes()
            turn(run, held)
        first, second = (run.recorder.history["error"][-1] for run in runs.values())
        differences.append(second - first)
    rows = []
    for dtype, run in runs.items():
        d = run.best()
        held_out = d.evaluate(block.model, block.held_out).error
        rows.append(
            {"dtype": dtype, "error": run.final_errors()[0], "held_out": held_out, "factor_bytes": sizes[dtype]}
        )
        print(rows[-1])
    found = {"environment": environment(), "steps": steps, "rows": rows}
    found["mean_difference_of_last_tenth"] = statistics.mean(differences[-max(1, steps // 10) :])
    path = RESULTS / "precision.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
