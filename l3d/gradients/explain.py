"""Say for every use of a model's parameters by which rule its gradients are computed, or why by none."""

from typing import Any, NamedTuple

import torch
from torch import nn

from l3d.data.batch import to_device, without_label
from l3d.gradients.fixed import check_fixed, only_trainable, run_fixed
from l3d.gradients.graph.graph import Use, no_gradient, operation, read_graph
from l3d.gradients.graph.layout import Layout, find_layouts
from l3d.gradients.model import Params, select_parameters
from l3d.gradients.rules import by_rule, from_output, has_rule


class ExplainedUse(NamedTuple):
    """One use of a parameter in the forward pass."""

    parameter: str  # its name
    operation: str  # as autograd names it, with the input slot: ("Addmm", 2) is "Addmm 2"; "" for an unused parameter
    layout: str  # where the batch's rows lie in the operation's output: "major", "minor", "dim1", or "unknown"
    rule: str  # the name of the rule; "" if none is used
    why: str  # why none is used; "" if one is


class Explanation(NamedTuple):
    """Every use of the chosen parameters; it prints as a table."""

    uses: tuple[ExplainedUse, ...]  # in the order of the parameters

    @property
    def slow(self) -> tuple[ExplainedUse, ...]:
        """The uses without a rule: their gradients are exact too, at one backward call per sample."""
        return tuple(use for use in self.uses if use.operation and not use.rule)

    def __repr__(self) -> str:
        """Return a table of one line per use."""
        lines = [("parameter", "operation", "layout", "rule")]
        lines += [(*use[:3], use.rule or f"none: {use.why}") for use in self.uses]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
        return "\n".join("  ".join(line).rstrip() for line in padded)


def explain(model: nn.Module, inputs: Any, params: Params = None) -> Explanation:
    """List every use of a model's parameters on a batch, with the rule that gives its gradients, or why none does.

    Args:
        model: in evaluation mode; its state is unchanged afterwards.
        inputs: a batch of B rows as `extract_gradients` takes it; with B = 1 every layout is "major".
        params: glob, list of globs, or None for all parameters.

    Raises ValueError for invalid arguments, as `extract_gradients` does.

    >>> explain(nn.Sequential(nn.Linear(3, 2), nn.PReLU()), torch.randn(4, 3))
    parameter  operation      layout  rule
    0.weight   Addmm 2        major   matrix
    0.bias     Addmm 0        major   matrix_bias
    1.weight   PreluKernel 1  major   none: no rule for it, after View
    """
    check_fixed(model)
    parameters = select_parameters(model, params)
    inputs = to_device(without_label(inputs), next(iter(parameters.values())).device)
    with torch.inference_mode(False), torch.enable_grad(), only_trainable(model, parameters):
        output = run_fixed(model, inputs)
        if output.grad_fn is None:
            raise ValueError(f"params: the model's output depends on none of {', '.join(parameters)}")
        graph = read_graph(output.grad_fn, parameters, output.shape[0])
        layouts = find_layouts(output, graph)
        slow = from_output(graph, layouts, parameters)
        uses = [_explained(use, layouts.get(use.node), slow, parameters[use.name].shape) for use in graph.uses]
    unused = [ExplainedUse(name, "", "", "", "the output does not depend on it") for name in parameters]
    every = [*uses, *(each for each in unused if each.parameter not in {use.parameter for use in uses})]
    return Explanation(tuple(sorted(every, key=lambda use: list(parameters).index(use.parameter))))


@torch.no_grad()
def _explained(use: Use, layout: Layout | None, slow: dict[str, str], shape: torch.Size) -> ExplainedUse:
    """Say how a use is differentiated; a rule is tried with an output gradient of zeros."""
    rule, why = "", slow.get(use.name, "")
    after = " after " + ", ".join(use.chain) if use.chain else ""
    if not has_rule(use):
        why = why or f"no rule for it{after and ','}{after}"
    elif layout is not None and not why:
        parameter: Any = use.node.next_functions[use.slot][0]
        dy = layout.split(no_gradient(use.node, parameter._input_metadata[0].device))
        if dy.is_complex():
            why = "complex numbers"
        else:
            name, part = by_rule(use, layout, dy, shape)
            refused = f"{name} does not apply to the parameter{after} in this layout"
            rule, why = (name, "") if part is not None else ("", refused)
    kind = "unknown" if layout is None else layout.kind
    return ExplainedUse(use.name, f"{operation(use.node)} {use.slot}", kind, rule, why)
