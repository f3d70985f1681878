"""Take the training step of a small problem in numpy, where an operation costs its call more than its arithmetic.

The loss is `flat`'s and Adam is `optimizer`'s, with derivatives written out and every tensor laid end to end in one
array, so that one operation serves all. A call of numpy takes a fraction of torch's: without extraction a step of tms
takes 0.13 ms, and 0.46 ms by the same operations of torch. The arrays share memory with the run's tensors, so that
other paths may take steps in between.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from l3d.decomposition.directions import Directions, Tucker
from l3d.decomposition.subnetworks import Subnetworks
from l3d.training.optimizer import RelativeAdam
from l3d_kernels import cpu

Array = NDArray[Any]
quiet = np.errstate(divide="ignore", invalid="ignore", over="ignore")  # NaN and infinity show up in the loss


class Learned(NamedTuple):
    """A batch's losses and their derivatives."""

    losses: Array  # [groups]
    residual: Array  # [S, groups] ‖g_s − ĝ_s‖²
    kept: Array  # [S, groups * K] bool
    thresholds: Array  # [groups] the least kept magnitude
    derivatives: Array  # [entries of all factors]


def has_pairs_only(directions: Directions) -> bool:
    """Tell whether every tensor is held as a pair of factors or a vector, none as a Tucker product."""
    return not any(isinstance(piece, Tucker) for piece in directions.pieces)


class SmallSteps:
    """Takes the steps of a decomposition on the CPU, if it holds no tensor as a Tucker product.

    Args:
        decomposition: whose parameters become views of one array.
        optimizer: of its parameters, whose moments likewise.
        n_groups: of directions side by side, each with its own top-k and loss.
    """

    def __init__(self, decomposition: Subnetworks, optimizer: RelativeAdam, n_groups: int = 1) -> None:
        self.optimizer, self.n_groups = optimizer, n_groups
        encoder, decoder = decomposition.encoder, decomposition.decoder
        self.n_directions = encoder.n_subnetworks
        place = {id(parameter): i for i, parameter in enumerate(optimizer.parameters)}
        pairs = zip(encoder.parameters(), decoder.parameters(), strict=True)
        order = [place[id(side)] for pair in pairs for side in pair]  # of every factor both sides, one after the other
        parameters = [optimizer.parameters[i] for i in order]
        scales = [optimizer.scales[i].expand_as(optimizer.parameters[i]).reshape(-1) for i in order]
        self.all: Array = _end_to_end(parameters)
        self.first: Array = _end_to_end([optimizer.first[i] for i in order])
        self.second: Array = _end_to_end([optimizer.second[i] for i in order])
        self.scales: Array = torch.cat(scales).numpy()
        sizes = [parameter[0].numel() for parameter in parameters]
        self.slices: Array = np.concatenate([np.arange(self.n_directions).repeat(size) for size in sizes])
        # every tensor's left [2K, R, O] and right [2K, R, I], or vectors [2K, P]: the encoder's, then the decoder's
        ends = np.cumsum([2 * parameter.numel() for parameter in parameters[::2]])[:-1]
        split = zip(np.split(self.all, ends), parameters[::2], strict=True)
        factors = iter([part.reshape(-1, *parameter.shape[1:]) for part, parameter in split])
        self.pieces: list[tuple[Array, ...]] = [(a,) if a.ndim == 2 else (a, next(factors)) for a in factors]
        self.decoder = [tuple(factor[self.n_directions :] for factor in piece) for piece in self.pieces]

    @quiet
    def learn(self, gradients: Array, n: int) -> Learned:
        """Return the losses of gradients [S, P] and their derivatives, with n coefficients kept in each group."""
        n_samples, n_entries = gradients.shape
        directions = self._multiplied_out()
        encoders, decoders = directions[: self.n_directions], directions[self.n_directions :]
        coefficients = gradients @ encoders.T
        kept, thresholds = _largest(coefficients, n, self.n_groups)
        code = (coefficients * kept).reshape(n_samples, self.n_groups, -1).swapaxes(0, 1)  # [groups, S, K]
        decoders = decoders.reshape(self.n_groups, -1, n_entries)  # [groups, K, P]
        difference = gradients - code @ decoders
        residual = np.einsum("gsp,gsp->sg", difference, difference)
        squared_norm = np.vdot(gradients, gradients)
        difference *= -2 / squared_norm  # now the derivatives by ĝ
        by_decoder = (code.swapaxes(1, 2) @ difference).reshape(-1, n_entries)
        by_code = (difference @ decoders.swapaxes(1, 2)).swapaxes(0, 1).reshape(n_samples, -1)
        by_encoder = (by_code * kept).T @ gradients
        derivatives = self._by_factors(np.concatenate([by_encoder, by_decoder]))
        return Learned(residual.sum(0) / squared_norm, residual, kept, thresholds, derivatives)

    @quiet
    def step(self, learned: Learned, lr: float) -> None:
        """Take Adam's step against the derivatives, and rescale the decoder's directions to unit norm."""
        adam, derivatives = self.optimizer, learned.derivatives
        adam.count += 1
        beta1, beta2 = adam.betas
        fade1: Array | float = beta1
        fade2: Array | float = beta2
        if adam.counts is None:
            correction: Array | float = (1 - beta2**adam.count) ** 0.5
            size: Array | float = lr * correction / (1 - beta1**adam.count)
        else:  # each subnetwork in its own time, as in `RelativeAdam`
            moves = learned.kept.any(0)
            counts = adam.counts.numpy()
            counts += moves
            taken = np.maximum(counts, 1)
            correction = np.sqrt(1 - beta2**taken)
            size = moves * (lr * correction / (1 - beta1**taken))
            values = [np.where(moves, beta1, 1), np.where(moves, beta2, 1), correction, size]
            fade1, fade2, correction, size = np.stack(values, dtype=self.all.dtype)[:, self.slices]
        self.first *= fade1
        self.first += (1 - beta1) * derivatives
        self.second *= fade2
        self.second += (1 - beta2) * np.square(derivatives)
        denominators = np.sqrt(self.second)
        denominators += adam.eps * correction
        moved = self.first * self.scales
        moved *= size
        moved /= denominators
        self.all -= moved
        self._normalize()

    def _multiplied_out(self) -> Array:
        """Return both sides' directions over the entries of all parameters: [2K, P]."""
        rows = []
        for piece in self.pieces:
            if len(piece) == 1:
                rows.append(piece[0])
            else:
                left, right = piece
                rows.append((left.swapaxes(1, 2) @ right).reshape(len(left), -1))
        return np.concatenate(rows, 1)

    def _by_factors(self, by_direction: Array) -> Array:
        """Return the derivatives by all factors from those by both sides' directions [2K, P]."""
        found: list[Array] = []
        start = 0
        for piece in self.pieces:
            size = math.prod(factor.shape[-1] for factor in piece)
            own = by_direction[:, start : start + size]
            start += size
            if len(piece) == 1:
                found.append(own.ravel())
                continue
            left, right = piece
            own = own.reshape(len(own), left.shape[2], right.shape[2])
            found += [(right @ own.swapaxes(1, 2)).ravel(), (left @ own).ravel()]
        return np.concatenate(found)

    def _normalize(self) -> None:
        """Rescale the decoder's directions to unit norm, the factor spread evenly over a tensor's factors."""
        squared: Array = np.zeros(self.n_directions, self.all.dtype)
        for piece in self.decoder:
            if len(piece) == 1:
                squared += np.einsum("kp,kp->k", piece[0], piece[0])
                continue
            left, right = piece
            if left.shape[1] == 1:
                squared += np.einsum("kro,kro->k", left, left) * np.einsum("kri,kri->k", right, right)
            else:
                squared += ((left @ left.swapaxes(1, 2)) * (right @ right.swapaxes(1, 2))).sum((1, 2))
        half = np.maximum(squared, np.finfo(squared.dtype).tiny) ** -0.25
        for piece in self.decoder:
            for factor in piece:
                factor *= np.square(half)[:, None] if len(piece) == 1 else half[:, None, None]


def _largest(coefficients: Array, n: int, n_groups: int) -> tuple[Array, Array]:
    """Tell which entries `batch_topk` keeps, and the least kept magnitude of each group: bool [S, K], [groups].

    As `cpu.largest`, from array to array: a way through tensors costs a twentieth of a step.
    """
    found = cpu.largest_of_array(coefficients, n, n_groups)
    if found is None:
        chosen, thresholds = cpu.largest(torch.from_numpy(coefficients), n, n_groups)
        found = chosen.numpy(), thresholds.numpy()
    return found


def _end_to_end(tensors: list[Tensor]) -> Array:
    """Lay tensors end to end in one array, and make them views of it."""
    whole = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = part.view(tensor.shape)
    array: Array = whole.numpy()
    return array
