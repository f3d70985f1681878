"""The cost model of docs/how/costs.md beside measurement, at four sizes: `python -m bench.scale`.

FLOPs of one step's loss and derivatives are counted by torch as they run, and predicted from S, T, K, R and the width;
bytes are predicted for encoder, decoder, optimiser and factors, and compared with what is held. Writes
bench/results/scale.json.
"""

import json
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.measure.environment import RESULTS, environment
from l3d.decomposition.costs import Path, Sizes, choose_paths, coactive_is_cheaper, projection_costs
from l3d.estimate import plan
from l3d.gradients.factors import Gradients
from l3d.training.run import Run


class Case(NamedTuple):
    """One linear layer [width, width], and a batch."""

    width: int
    S: int
    T: int
    K: int
    R: int


CASES = (Case(128, 64, 4, 64, 2), Case(512, 64, 4, 64, 2), Case(512, 32, 8, 192, 2), Case(1024, 128, 4, 64, 4))
KEPT = 0.1  # the fraction k


def sizes_of(case: Case) -> Sizes:
    """Return what the cost of projecting depends on; every sample has a sequence of its own."""
    return Sizes(case.S, case.S, case.T, case.width, case.width, case.K, case.R, int(KEPT * case.S * case.K + 0.5))


def gram_cost(case: Case) -> int:
    """Count the multiply-adds of ‖ĝ‖² from the Gram matrix: by the directions' factors or from tiles of them."""
    gram = min(case.K**2 * case.R**2 * 2 * case.width, case.K * (case.K + case.R) * case.width**2)
    return gram + case.S * case.K**2


def predict(case: Case, path: Path, pairs: int | None) -> dict[str, float]:
    """Predict one step's FLOPs, without extraction, and the bytes it holds (float32).

    pairs: of subnetworks kept in the same sample, where the energy is taken over them and not from the Gram matrix.
    """
    widths, area = 2 * case.width, case.width**2
    by_pairs = (pairs or 0) * case.R**2 * widths
    multiply_adds = {
        "projections": projection_costs(sizes_of(case))[path],
        "energy": 3 * (gram_cost(case) if pairs is None else by_pairs),  # forward, and backward to both of its sides
        "norms": case.S * (area if path.materialised else case.T**2 * widths),
    }
    parameters = 2 * case.K * case.R * widths
    held = {"parameter_bytes": 4 * parameters, "moment_bytes": 8 * parameters}
    return {
        "flops": 2 * sum(multiply_adds.values()),
        **held,
        "factor_bytes": 4 * case.S * case.T * widths,
    }


class Planned(NamedTuple):
    """A run that is ready for its first step, with what this step will do."""

    run: Run
    gradients: Gradients
    path: Path
    pairs: int | None  # of subnetworks kept in the same sample, where ‖ĝ‖² is taken over them


def planned(case: Case, steps: int = 1) -> Planned:
    """Plan a run of so many steps, and look at its first batch."""
    torch.manual_seed(0)
    model = torch.nn.Linear(case.width, case.width, bias=False)
    data = torch.randn(case.S, case.T, case.width)
    choices = {"n_subnetworks": case.K, "rank": case.R, "batch_size": case.S, "k": KEPT}
    run = plan(model, data, **choices, steps=steps, warm_start=0)
    gradients = run.gradients(0)
    assert isinstance(gradients, Gradients)
    (path,) = choose_paths(gradients, run.decomposition.encoder, sizes_of(case).n_kept).values()
    result = run.stepper.objective(gradients, KEPT)
    coactive = coactive_is_cheaper(run.decomposition.decoder, result.kept)
    pairs = int(result.kept.row_offsets.diff().square().sum()) if coactive else None
    return Planned(run, gradients, path, pairs)


def measure(case: Case) -> dict[str, Any]:
    """Count one step's FLOPs and the bytes it holds."""
    run, gradients, path, pairs = planned(case)
    with FlopCounterMode(display=False) as counter:
        result = run.stepper.objective(gradients, KEPT)
        torch.autograd.grad(result.loss, run.optimizer.parameters)
    measured = {
        "flops": counter.get_total_flops(),
        "parameter_bytes": sum(p.nbytes for p in run.decomposition.parameters()),
        "moment_bytes": sum(t.nbytes for t in (*run.optimizer.first, *run.optimizer.second)),
        "factor_bytes": gradients.nbytes(),
    }
    predicted = predict(case, path, pairs)
    chosen = {**path._asdict(), "coactive": pairs is not None}
    return {"case": case._asdict(), "path": chosen, "measured": measured, "predicted": predicted}


def main() -> None:
    """Measure all cases and print predicted over measured."""
    rows = [measure(case) for case in CASES]
    print("| width, S, T, K, R | path | FLOPs | predicted / counted | bytes |\n|---|---|---|---|---|")
    for row in rows:
        measured, predicted = row["measured"], row["predicted"]
        ratios = [predicted[name] / measured[name] for name in measured]
        path = ", ".join(name for name, chosen in row["path"].items() if chosen) or "factored, dense"
        numbers = ", ".join(map(str, row["case"].values()))
        bytes_ = " ".join(f"{ratio:.2f}" for ratio in ratios[1:])
        print(f"| {numbers} | {path} | {measured['flops']:.3g} | {ratios[0]:.2f} | {bytes_} |")
    path = RESULTS / "scale.json"
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
