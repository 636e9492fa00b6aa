"""Everything that one layer needs to be built at any choice of widths, computed once.

The factors are nested in the rank, so a whole curve of candidates costs one decomposition. A part's *energy* is
what its components are worth: the expected squared error that dropping them causes, in the units of the scores
(qk), of the layer output (vo, ffn, classifier), or of the loss where output gradients were collected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..linalg import factorize
from ..linalg.factorize import Projection
from ..models.running import double
from ..nn.linear import LowRankLinear
from .base import Choice, Layer
from .heads import as_parameter, zeros_like_bias

Moments = Mapping[str, Tensor]
LayerT = TypeVar("LayerT", bound=Layer)


class Factors(ABC, Generic[LayerT]):
    """Base: ``moments`` is empty for the data-free route."""

    def __init__(self, layer: LayerT, moments: Moments | None = None) -> None:
        self.layer = layer
        self.moments = moments or {}

    def errors(self, part: str) -> Tensor:
        """(full + 1,) expected squared error when ``part`` keeps 0, 1, ..., full components."""
        energy = self.energy(part)
        tail = energy.flip(0).cumsum(0).flip(0)
        return torch.cat([tail, tail.new_zeros(1)])

    def energy(self, part: str) -> Tensor:
        """(full,) energies of the components of ``part`` in the order in which they are kept.

        Raises:
            CalibrationError: the layer's moments cannot be factored, here and in the other methods.
        """
        with self._named():
            return self._energy(part)

    def build(self, choice: Choice) -> dict[str, nn.Module]:
        """New modules by full name; empty for the dense choice."""
        with self._named():
            return self._build(choice)

    def weights_at(self, width: int, scale: float) -> dict[str, Tensor]:
        """Weights for the module's own linear layers, by full name, with the parts of ``one_width`` at a width.

        They hold every bias that a reduced layer needs, those among them that the module has not got.

        Args:
            scale: of the scores in the dense layer over that in the narrow one, which goes into the queries.
        """
        with self._named():
            return self._weights_at(width, scale)

    def _weights_at(self, width: int, scale: float) -> dict[str, Tensor]:
        raise NotImplementedError(f"layers of the kind '{self.layer.kind}' have no such form")

    def relative_error(self, choice: Choice) -> float:
        """Sum over the parts of dropped energy over total energy; a rough guide, comparable within a part only."""
        total = 0.0
        for part, rank in choice.items():
            errors = self.errors(part)
            total += float(errors[rank] / errors[0].clamp_min(1e-300))
        return total

    def ridge(self, choice: Choice) -> float | None:
        """The largest relative ridge that the moments behind ``choice`` need; None without moments."""
        if not self.moments:
            return None
        with self._named():
            return max(factorize.ridge_used(moment) for moment in self._moments_of(choice))

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What cannot be factored inside is an error about this layer."""
        try:
            yield
        except torch.linalg.LinAlgError as error:
            what = "moments" if self.moments else "weights"
            fix = "calibrate again, on more images" if self.moments else "calibrate, or leave the layer out"
            raise CalibrationError(
                f"the {what} of '{self.layer.name}' are too close to singular to be factored: {error}; {fix}"
            ) from error
        except CalibrationError as error:
            raise CalibrationError(f"'{self.layer.name}': {error}") from error

    @abstractmethod
    def _energy(self, part: str) -> Tensor:
        """See :meth:`energy`."""

    @abstractmethod
    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        """See :meth:`build`."""

    @abstractmethod
    def _moments_of(self, choice: Choice) -> list[Tensor]:
        """The second moments from which the parts of ``choice`` are factored."""


def linear_projection(linear: nn.Linear, moment: Tensor | None, grad: Tensor | None) -> Projection:
    """The nested low-rank family of a linear layer; ``moment`` of its inputs, ``grad`` of its outputs' gradients."""
    weight = double(linear.weight.detach().flatten(1).mT)  # (in, out)
    if moment is None:
        moment = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    if grad is not None:
        weight = weight @ factorize.whitening(grad).mT
    return factorize.project(moment, weight)


def fill_linear(small: nn.Module, linear: nn.Linear, projection: Projection, mean: Tensor | None) -> None:
    """``y = x P_r W + b + mean (I - P_r) W``: low rank with the mean output restored."""
    assert isinstance(small, LowRankLinear)
    rank = small.rank
    weight = double(linear.weight.detach().flatten(1).mT)
    down = projection.down[:, :rank]
    up = projection.up[:rank] @ weight
    bias = zeros_like_bias(linear.bias, weight.shape[1], weight)
    if mean is not None:
        bias = bias + double(mean) @ weight - double(mean) @ down @ up
    # Share the scale between the two factors, so that neither leaves the range of half precision.
    balance = (up.norm(dim=1) / down.norm(dim=0).clamp_min(1e-300)).clamp_min(1e-12).sqrt()
    shape = linear.weight.shape[2:]  # of a 1x1 convolution, else nothing
    small.down.weight = as_parameter((down * balance).mT.reshape(rank, -1, *shape), linear.weight)
    small.up.weight = as_parameter((up / balance[:, None]).mT.reshape(-1, rank, *shape), linear.weight)
    small.up.bias = as_parameter(bias, linear.weight)
