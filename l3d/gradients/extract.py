"""Extract per-sample gradients: one forward pass, then one backward pass of the whole batch per target position.

A backward pass starts at the output and stops at the first decomposed layer. For language models one pass serves all
positions down to the last layer's attention, and the passes per position start below it. At each layer that uses a
chosen parameter the pass records the output gradient dy; with the layer input x, dy gives the per-sample gradient as
factors. No weight gradient of a layer with a rule is computed.

The uses of a parameter are read from the autograd graph (`graph`); a rule per kind of layer turns each use into a part
(`rules`). A use without a rule is differentiated exactly, sample by sample: at its own node if the batch's rows can be
separated there, else by a backward pass from the output.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from l3d.data.arguments import warn
from l3d.data.batch import count_rows_of, join, without_label
from l3d.gradients import divergence as div
from l3d.gradients.checks import check_logits, check_tokens
from l3d.gradients.factors import Dense, Gradients, Part, combine, compact
from l3d.gradients.fixed import (
    check_evaluating,
    check_fixed,
    check_repeats,
    check_seen,
    forget,
    is_sharded,
    only_trainable,
    run_fixed,
    whole_weights,
)
from l3d.gradients.graph.graph import Use, no_gradient, output_shape, read_graph
from l3d.gradients.graph.layout import Layout, find_layouts
from l3d.gradients.graph.positions import last_apart, positionwise_head
from l3d.gradients.model import Params, select_parameters
from l3d.gradients.precision import own_precision
from l3d.gradients.rules import from_output, has_rule, part_of
from l3d.gradients.samples import BatchPart, OwnRows, Samples, check_same_padding, padding_mask

# Backward passes of several positions go through an operation together, as far as their gradients fit in these bytes.
PASSES_BYTES = {"cpu": 256 << 20, "cuda": 1 << 31, "meta": 1 << 31}


def extract_gradients(
    model: nn.Module,
    inputs: Any,
    divergence: str | div.Divergence | None = None,
    reference: str | Tensor = "sample",
    params: Params = None,
    positions: str | int = "all",
    generator: torch.Generator | None = None,
) -> Gradients:
    """Return every sample's gradient g_s = ∇_W D(f(x_s, W), y_s), as factors.

    Args:
        model: in evaluation mode; its state is unchanged afterwards.
        inputs: a batch of B rows: a tensor, or a mapping (passed as keyword arguments). Of a tuple such as (input,
            label) the first entry is used, except that reference="pair" takes (inputs, contrast inputs). If a mapping
            holds an `attention_mask` [B, T], positions where it is 0 are not samples, nor references of samples.
        divergence: "mse", "mse_published", "kl", or a callable f(output [S, ...], reference [S, ...]) -> [S]; None is
            "kl" if the model's outputs have `.logits` [B, T, V], as language models' do, else "mse".
        reference: "sample", "mean", "uniform", "pair", or a tensor of outputs [S, ...] or [B, positions, ...], or one
            output for all samples.
        params: glob, list of globs, or None for all parameters.
        positions: "all", "last", or how many to draw per row. Applies if the divergence is "kl" or a callable and the
            output has three or more dimensions: then every chosen position of every row is a sample, row by row.
            Otherwise a row is a sample.
        generator: a CPU generator that draws references and positions.

    Raises ValueError for invalid arguments, for a model whose dropout or batch norm is in training mode, and for
    outputs that are not finite.

    >>> model = nn.Linear(3, 2)
    >>> g = extract_gradients(model, torch.randn(4, 3), reference="mean")
    >>> {name: list(grad.shape) for name, grad in g.materialize().items()}
    {'weight': [4, 2, 3], 'bias': [4, 2]}
    """
    return Extractor(model, divergence, reference, params, positions)(inputs, generator)


class Extractor:
    """Extract the gradients of many batches with the same settings; arguments as in `extract_gradients`."""

    def __init__(
        self,
        model: nn.Module,
        divergence: str | div.Divergence | None = None,
        reference: str | Tensor = "sample",
        params: Params = None,
        positions: str | int = "all",
    ) -> None:
        check_fixed(model)
        forget(model)
        self.model = model
        chosen = div.resolve_divergence("mse" if divergence is None else divergence)
        self.reference = div.check_reference(reference)
        if not (positions in ("all", "last") or (type(positions) is int and positions > 0)):
            raise ValueError(f"positions: expected 'all', 'last' or a positive number, got {positions!r}")
        self._asked_positions = positions
        self._use(chosen)
        self._undecided = divergence is None  # until the model has been run once
        self._whole = whole_weights if is_sharded(model) else nullcontext
        with self._whole(model):
            self.parameters = select_parameters(model, params)
        self._output_width: tuple[int, ...] | None = None
        self._batches = 0
        self._lacking: set[str] = set()  # parameters that the last batch's graph does not hold
        self._apart: set[str] = set()  # those of them of which the output was found to be independent
        self.check_values = True  # read from every batch whether its numbers are finite, for which a GPU is waited for
        self.exponent = 0  # gradients are of 2^exponent times the divergence, to lie well inside their dtype's range
        self.rows_stay = False  # whether the last batch's graph alone shows that its rows are independent
        self._one_by_one = False  # whether passes of several positions cannot go together
        self.graph_bytes = 0  # about what the last batch's graph held

    def _use(self, divergence: div.Divergence) -> None:
        self.divergence, self.is_kl = divergence, divergence is div.kl
        self.positions = None if divergence in (div.mse, div.mse_published) else self._asked_positions

    def _run(self, inputs: Any) -> Tensor:
        """Run the model; the first output decides on the divergence where none was asked for."""
        check_values = self.check_values or self._batches == 0
        return run_fixed(self.model, inputs, self._decide if self._undecided else None, check_values)

    def _decide(self, raw: Any) -> None:
        self._undecided = False
        self._use(div.BY_NAME[div.default_divergence(raw)])

    def __call__(
        self, inputs: Any, generator: torch.Generator | None = None, batch_part: BatchPart | None = None
    ) -> Gradients:
        """Return the gradients of one batch, or of some rows of a larger one, at the place that `batch_part` gives."""
        contrast_inputs = None
        if isinstance(self.reference, str) and self.reference == "pair":
            if not (isinstance(inputs, (tuple, list)) and len(inputs) == 2):
                raise ValueError("reference: 'pair' needs data that yields (input, contrast), got single inputs")
            inputs, contrast_inputs = inputs
        inputs = without_label(inputs)
        with self._recording():
            output = self._forward(inputs)
            contrast = None
            mask = padding_mask(inputs, self.model)
            if contrast_inputs is not None:
                check_same_padding(mask, padding_mask(contrast_inputs, self.model))
                with torch.no_grad():
                    contrast = run_fixed(self.model, contrast_inputs, check_values=self.check_values)
            with own_precision():
                samples = Samples(output, self.positions, self.is_kl, generator, mask, batch_part)
                d_out = self._at_outputs(samples, output, contrast, generator)
                gradients = self._gradients(output, samples, d_out)
                if self._batches == 1 and d_out.dtype == torch.float16:
                    self._warn_of_zeros(gradients, self._gradients(output, samples, d_out * 64))
            if lacking := self._lacking - self._apart:
                check_seen(self.model, inputs, output, {name: self.parameters[name] for name in lacking})
                self._apart |= lacking
        return gradients if samples.kept is None else gradients.select(samples.kept)

    def several(
        self, batches: Sequence[Any], generators: Sequence[torch.Generator]
    ) -> tuple[Gradients, list[int]] | None:
        """Return the gradients of several batches from one pass over all their rows, equal up to rounding.

        Returns (gradients of all samples in the order of the batches, number of samples per batch). Returns None if
        the batches cannot be joined: they are pairs, have padding, differ in more than their rows, or the reference is
        a tensor. The result is wrong for a model that mixes rows: call only after `rows_stay` was True.
        """
        rows = [without_label(batch) for batch in batches]
        masks = [mask for batch in rows if (mask := padding_mask(batch, self.model)) is not None]
        whole = join(rows)
        if whole is None or any((mask == 0).any() for mask in masks):
            return None
        if isinstance(self.reference, Tensor) or self.reference == "pair":
            return None
        with self._recording():
            output = self._forward(whole)
            with own_precision():
                pieces = output.detach().split([count_rows_of(without_label(batch)) for batch in batches])
                each, d_outs = [], []
                for own, generator in zip(pieces, generators, strict=True):
                    each.append(Samples(own, self.positions, self.is_kl, generator))
                    d_outs.append(self._at_outputs(each[-1], own, None, generator))
                gradients = self._gradients(output, Samples.joined(output, each), torch.cat(d_outs))
        return gradients, [samples.count for samples in each]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Let autograd record the uses of the chosen parameters, even if the caller has turned it off."""
        check_evaluating(self.model)
        with torch.inference_mode(False), torch.enable_grad(), self._whole(self.model):
            if self._whole is whole_weights:  # whose tensors are others each time
                self.parameters = {name: self.model.get_parameter(name) for name in self.parameters}
            with only_trainable(self.model, self.parameters):
                yield

    def _at_outputs(
        self, samples: Samples, output: Tensor, contrast: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Check the samples' outputs, and return 2^exponent ∂D/∂output there, with zeros at padding: [B·P, ...].

        output, contrast: the model's for the inputs and for those they are contrasted with, [B, ...].
        """
        width = tuple(samples.width)
        if self._output_width not in (None, width):
            raise ValueError(
                f"data: the shape of one sample's output changed between batches, from {self._output_width} to {width}"
            )
        self._output_width = width
        outputs = samples.gather(output.detach())
        if self.is_kl and self._batches == 0:
            check_logits(outputs)
        self._batches += 1
        contrasts = None if contrast is None else samples.gather(contrast)
        references = self._references(samples, outputs, contrasts, generator)
        d_out = div.output_gradient(self.divergence, outputs, references, self.check_values)
        return samples.spread(d_out if self.exponent == 0 else d_out * 2.0**self.exponent)

    def _gradients(self, output: Tensor, samples: Samples, d_out: Tensor) -> Gradients:
        """Return the parameters' gradients, padding included, from the gradient at the outputs, d_out [B·P, ...]."""
        with torch.no_grad():
            parts = self._backward(output, samples, d_out)
        shapes = {name: p.shape for name, p in self.parameters.items()}
        dtype = reduce(torch.promote_types, (p.dtype for p in self.parameters.values()))
        like = torch.empty(0, dtype=dtype, device=output.device)
        compacted = {name: [compact(part.to(like), shapes[name]) for part in combine(parts[name])] for name in shapes}
        return Gradients(compacted, shapes, samples.count, dtype, output.device)

    @staticmethod
    def _warn_of_zeros(gradients: Gradients, larger: Gradients) -> None:
        """Warn where float16 holds entries as zero that it would hold if they were larger."""
        pairs = zip(gradients.tensors(), larger.tensors(), strict=True)
        lost = sum(int(((a == 0) & (b != 0)).sum()) for (_, a), (_, b) in pairs)
        if lost:
            warn(f"model: its float16 loses {lost} entries of the first batch's gradients to zero; use model.float()")

    @torch.no_grad()
    def outputs(self, inputs: Any, generator: torch.Generator | None, batch_part: BatchPart | None) -> Tensor:
        """Return only the samples' outputs, for some rows of a larger batch: [s, ...]."""
        inputs = without_label(inputs)
        output = self._run(inputs)
        mask = padding_mask(inputs, self.model)
        return Samples(output, self.positions, self.is_kl, generator, mask, batch_part).gather(output)

    def is_per_sample(self) -> bool:
        """Tell whether the reference is a tensor with one output per sample, which is valid for one batch only."""
        return isinstance(self.reference, Tensor) and self.reference.shape != self._output_width

    def needs_whole(self) -> bool:
        """Tell whether a sample's reference depends on other samples' outputs."""
        return isinstance(self.reference, str) and self.reference in ("sample", "mean")

    def _references(
        self, samples: Samples, outputs: Tensor, contrast: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """Return these samples' reference outputs: [s, ...]."""
        reference, part = self.reference, samples.part
        if part is not None and self.needs_whole():
            whole = div.reference_outputs(reference, part.whole(outputs), None, self.is_kl, generator)
            return whole[part.start * samples.per_row :][: samples.count]
        if part is not None and isinstance(reference, Tensor) and reference.shape != samples.width:
            per_row = reference.shape[0] // part.n_rows  # 1 or P: the reference is given by row or by sample
            reference = reference[part.start * per_row : (part.start + samples.n_rows) * per_row]
        return div.reference_outputs(reference, outputs, contrast, self.is_kl, generator, samples)

    def _forward(self, inputs: Any) -> Tensor:
        """Run the model once, with autograd recording the uses of the chosen parameters."""
        if self._batches == 0:
            check_tokens(self.model, inputs)
        output = self._run(inputs)
        if output.ndim == 0 or output.shape[0] == 0:
            raise ValueError(f"data: expected at least one sample, got an output of shape {list(output.shape)}")
        if self._batches == 0:
            self._check_is_batch(inputs, output)
            check_repeats(self.model, inputs, output)
        if self.is_kl and output.ndim < 2:
            raise ValueError(
                f"divergence: 'kl' needs logits along a last dimension, got outputs of {list(output.shape)}"
            )
        if output.grad_fn is None:
            check_seen(self.model, inputs, output, self.parameters)
            raise ValueError(f"params: the model's output depends on none of {', '.join(self.parameters)}")
        return output

    def _check_is_batch(self, inputs: Any, output: Tensor) -> None:
        """Raise ValueError for a single row instead of a batch: its entries would be taken as rows and samples."""
        if not (isinstance(inputs, Tensor) and inputs.ndim == 1 and len(inputs) > 1):
            return
        with torch.no_grad():
            try:
                alone = run_fixed(self.model, inputs[:1])
            except ValueError:
                alone = output[:0]
        if alone.shape != output[:1].shape or not torch.allclose(alone, output[:1], rtol=1e-2, atol=1e-4):
            raise ValueError(
                f"data: expected batches of rows, got a single row of {len(inputs)} entries; give all rows as one "
                "tensor or a Dataset, or batches of them"
            )

    def _backward(self, output: Tensor, samples: Samples, d_out: Tensor) -> dict[str, list[Part]]:
        """Return the parts of every parameter's gradient from the gradient at the outputs, d_out [B·P, ...]."""
        assert output.grad_fn is not None
        graph = read_graph(output.grad_fn, self.parameters, output.shape[0])
        uses, layouts = graph.uses, find_layouts(output, graph)
        self._lacking = set(self.parameters) - graph.reached
        self.rows_stay, self.graph_bytes = graph.rows_stay, graph.n_entries * output.element_size()
        slow = from_output(graph, layouts, self.parameters)
        uses = [use for use in uses if use.name not in slow]
        parts: dict[str, list[Part]] = {name: [] for name in self.parameters}

        starts: list[Any] = [output]
        at_starts = samples.scatter(d_out)
        head = positionwise_head(output, self.parameters) if samples.per_row > 1 else None
        if head is not None and output_shape(head[0])[0] == samples.n_rows * samples.n_positions:
            node, edge = head
            at_head = [use for use in uses if use.node is node]
            if all(has_rule(use) and use.transposed is not None for use in at_head):
                uses = [use for use in uses if use.node is not node]
                if edge is not None:
                    edge = last_apart(edge, samples.n_rows, samples.n_positions)
                edges = [GradientEdge(node, 0)] + ([] if edge is None else [edge])
                at_edges = torch.autograd.grad([output], edges, [at_starts], retain_graph=True)
                starts, at_starts = [edge], at_edges[-1]
                for use in at_head:  # a sample's only row is that of its own position
                    layout = OwnRows("major", samples.count, samples.own_rows)
                    dy = samples.own_rows(at_edges[0])
                    parts[use.name].append(part_of(use, layout, dy, self.parameters[use.name]))
        room = 0 if graph.opaque or self._one_by_one else PASSES_BYTES.get(output.device.type, 0)
        at_once = max(1, room // max(1, graph.n_activations * output.element_size()))
        dys = self._output_gradients(starts, at_starts, samples, at_once, uses, layouts)
        for use in uses:
            parts[use.name].append(part_of(use, layouts[use.node], dys[use.node], self.parameters[use.name]))
        for name, part in self._from_output(output, samples, d_out, sorted(slow)).items():
            parts[name] = [part]
        return parts

    def _output_gradients(
        self,
        starts: list[Any],
        whole: Tensor,
        samples: Samples,
        at_once: int,
        uses: list[Use],
        layouts: dict[Node, Layout],
    ) -> dict[Node, Tensor]:
        """Run one backward pass per target position and collect dy [S, m, *rest] at every node of the uses.

        The passes go `at_once` at a time through each operation; `whole` is the gradient at the starts.
        """
        nodes = list(dict.fromkeys(use.node for use in uses))
        if not nodes:
            return {}
        edges = [GradientEdge(node, 0) for node in nodes]
        collected: dict[Node, Tensor] = {}  # [B, P, m, *rest], sequence-major; each pass fills one position
        for first in range(0, samples.per_row, at_once):
            alone = samples.alone(whole, first, min(first + at_once, samples.per_row))
            batched = len(alone) > 1
            at_starts = [alone if batched else alone[0]]
            options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
            try:
                grads = torch.autograd.grad(starts, edges, at_starts, **options)
            except RuntimeError:  # an operation that torch.func.vmap does not know, or too little memory
                if not batched:
                    raise
                self._one_by_one = True
            if batched and self._one_by_one:  # after the block, so that nothing that failed is still held
                return self._output_gradients(starts, whole, samples, 1, uses, layouts)
            for node, grad in zip(nodes, grads, strict=True):
                if grad is None:
                    grad = no_gradient(node, whole.device)
                    grad = grad.expand(len(alone), *grad.shape) if batched else grad
                split = layouts[node].split
                rows = (torch.func.vmap(split)(grad) if batched else split(grad)[None]).transpose(0, 1)
                if len(alone) == samples.per_row:
                    collected[node] = rows
                    continue
                if node not in collected:
                    collected[node] = rows.new_empty(len(rows), samples.per_row, *rows.shape[2:])
                collected[node][:, first : first + len(alone)] = rows
        return {node: rows.flatten(0, 1) for node, rows in collected.items()}

    def _from_output(self, output: Tensor, samples: Samples, d_out: Tensor, names: list[str]) -> dict[str, Part]:
        """Compute dense gradients by a backward pass from the output per sample: slow, exact wherever autograd is."""
        if not names:
            return {}
        inputs, rows = [self.parameters[name] for name in names], []
        for sample in range(samples.count):
            alone = torch.zeros_like(d_out)
            alone[sample] = d_out[sample]
            at_output = [samples.scatter(alone)]
            grads = torch.autograd.grad([output], inputs, at_output, retain_graph=True, materialize_grads=True)
            rows.append([grad.to_dense() for grad in grads])
        return {name: Dense(torch.stack(each)) for name, each in zip(names, zip(*rows, strict=True), strict=True)}
