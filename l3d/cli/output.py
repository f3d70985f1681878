"""What the commands of `l3d` leave and print at their end: a run folder's files, figures, what a run would take."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from l3d.estimate import Estimate, path_name
from l3d.storage import run_folder
from l3d.storage.card import renew_card
from l3d.storage.formats import duration, size
from l3d.training import memory


def print_estimate(found: Estimate) -> None:
    """Print what a dry run has found, tensor by tensor and in all."""
    tensors = Table("tensor", "shape", "rank", "path", "parameters", "factors", box=None)
    for each in found.tensors:
        shape, rank = "×".join(map(str, each.shape)), "×".join(map(str, each.ranks)) or "whole"
        tensors.add_row(each.name, shape, rank, path_name(each), f"{each.parameters:,}", size(each.factor_bytes))
    totals = Table(box=None, show_header=False)
    for label, value in (
        ("samples in a batch", f"{found.n_samples:,}"),
        ("coefficients kept", f"{found.n_kept:,}"),
        ("encoder and decoder", size(found.parameter_bytes)),
        ("optimiser and gradients", size(found.optimizer_bytes)),
        ("factors of a batch", size(found.factor_bytes)),
        ("peak memory, predicted", size(found.peak_bytes)),
        ("peak memory of the steps taken", size(found.measured_peak_bytes)),
        ("a step", f"{found.seconds_per_step:.4f} s"),
        ("a step while all is kept", f"{found.seconds_per_warm_step:.4f} s"),
        ("the whole run", duration(found.seconds)),
    ):
        totals.add_row(label, value)
    console = Console()
    console.print(tensors)
    console.print(totals)


def environment(model: nn.Module) -> str:
    """Say what made the figures, in one line."""
    from l3d import __version__

    device = next(model.parameters()).device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"l3d {__version__}, torch {torch.__version__}, {where}"


def peak_memory() -> dict[str, int]:
    """Return the most bytes this process has held, and the most of a GPU's memory."""
    figures = {"peak_memory_bytes": memory.peak_memory()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        figures["cuda_peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return figures


def write_results(run: Path, metrics: Mapping[str, Any], described: Mapping[str, Any] | None) -> None:
    """Write metrics, what each subnetwork does, and the report; print the figures that matter with the paths."""
    from l3d.report.report import headlines, write_report

    paths = {"metrics": run_folder.write_metrics(run, metrics)}
    renew_card(run, metrics)
    if described is None:
        described = run_folder.with_rates(run_folder.read_subnetworks(run), metrics["activation_rate"])
    if described:
        paths["subnetworks"] = run_folder.write_subnetworks(run, described)
    try:
        paths["report"] = write_report(run)
    except ImportError as error:  # the report is an extra; the figures are there without it
        print(f"l3d: no report: {error}", file=sys.stderr)

    table = Table(box=None, show_header=False)
    for each in headlines(metrics):
        table.add_row(each.label, each.shown)
    Console().print(table)
    for name, path in paths.items():
        print(f" {name}: {path}")  # whole, where a table would cut it to the width of the terminal
