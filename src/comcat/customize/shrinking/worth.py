"""What every component of an adapter's products is worth: how far the denoiser's output moves without it.

A component of a head is one column of its left and of its right factor. With the output multiplied by random numbers
v, and component i scaled by m, the chain rule gives the rate

    g_i = d(v . out) / dm = a_i . d(v . out) / da_i            E[g_i^2] = |d out / dm|^2

so one backward pass tells of all components of all layers at once, in one unit, and the mean over passes is the squared
change of the output to first order. On the digits pipeline leaving out a whole product changes the output by one to
three times that.

First the components of a head are turned into those that matter most one by one: scores are q' k'^T, so the r x r
moments of q' and k' are enough (:func:`comcat.linalg.factorize.factor_qk`); outputs are v' A_o, likewise. The product
stays what it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError
from ...linalg.factorize import factor_qk
from ...models.running import double
from ...nn.added import AddedLayer
from ...progress import Progress
from ..adapter.attached import Adapter
from ..files.layer_factors import PARTS, Part, columns, names_of, side

#: (component, layer, product).
Key = tuple[str, str, Part]


@dataclass(frozen=True)
class Worth:
    """The components of one product of one layer.

    Attributes:
        left, right: (H, r, r), what the factors are multiplied by on their right; the product stays.
        worth: (H, r), of the columns that this makes.
    """

    left: Tensor
    right: Tensor
    worth: Tensor


def measure(
    handle: Adapter, outputs: Iterable[Tensor], count: int, seed: int = 0, progress: Progress | None = None
) -> dict[Key, Worth]:
    """The worth of all components.

    Args:
        outputs: of the denoiser with the adapter on, computed with gradients as they are asked for. Their squared
            change is what counts: an output that counts twice is multiplied by the root of two.
        count: how many outputs there are, for ``progress``.

    Raises:
        ModelError: the outputs, or their gradients, are not finite.
    """
    products = {(key, part): _Product(layer, part) for key, layer in handle.layers.items() for part in PARTS}
    weights = [weight for product in products.values() for weight in product.weights.values()]
    generator = torch.Generator().manual_seed(seed)
    with _trainable(handle), contextlib.ExitStack() as stack:
        for product in products.values():
            stack.enter_context(product.recording())
        for done, out in enumerate(outputs, 1):
            v = torch.randn(out.shape, generator=generator).to(out)
            found = torch.autograd.grad((out * v).sum(), weights, allow_unused=True)
            gradients = dict(zip(map(id, weights), found, strict=True))
            for product in products.values():
                product.add(gradients)
            if progress:
                progress("measure components", done, count)
    return {(*key, part): product.result() for (key, part), product in products.items()}


@contextlib.contextmanager
def _trainable(handle: Adapter) -> Iterator[None]:
    before = {id(p): p.requires_grad for p in handle.parameters()}
    handle.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in handle.parameters():
            parameter.requires_grad_(before[id(parameter)])


class _Product:
    """One product of one layer while it is measured."""

    def __init__(self, layer: AddedLayer, part: Part) -> None:
        self.layer, self.rank = layer, layer.rank
        self.left, self.right = PARTS[part]
        self.named: dict[str, Tensor] = dict(layer.streams.named_parameters())
        self.weights = {name: self.named[name] for name in names_of(self.named, self.left)}
        self._moments: dict[str, Tensor] = {}
        self._rates: list[Tensor] = []  # a^T d/da, (H, r, r) each

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Sum the moments of what the left side makes, and the right one of queries and keys."""
        hooks = []
        for stream in self.layer.streams.children():
            for kind in (self.left, self.right):
                if kind != "output":
                    hooks.append(getattr(stream, kind).register_forward_hook(self._adds(kind)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adds(self, kind: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            rows = out.detach().float().flatten(0, -2).unflatten(-1, (-1, self.rank)).movedim(0, 1)  # (H, rows, r)
            moment = double(rows.mT @ rows)
            self._moments[kind] = self._moments[kind] + moment if kind in self._moments else moment

        return add

    def add(self, gradients: Mapping[int, Tensor | None]) -> None:
        rates: Tensor | float = 0.0
        for name, weight in self.weights.items():
            gradient = gradients[id(weight)]
            if gradient is not None:
                a, d = (double(columns(name, t.detach(), self.rank)) for t in (weight, gradient))
                rates = rates + a.mT @ d
        if isinstance(rates, Tensor):
            self._rates.append(rates)

    def result(self) -> Worth:
        right = double(side(self.named, self.right, self.rank).detach())  # (H, D_r, r)
        moments = [self._moments.get(kind, torch.zeros_like(right.mT @ right)) for kind in (self.left, self.right)]
        if self.right == "output":
            moments[1] = right.mT @ right
        rates = torch.stack(self._rates) if self._rates else moments[0][None] * 0
        if not all(bool(t.isfinite().all()) for t in (*moments, rates)):
            raise ModelError(
                "the denoiser's output or its gradient is NaN or infinite, so that nothing can be said of components; "
                "use a wider precision"
            )
        turned = factor_qk(*moments)
        # A column of the gradient turns like one of the right factor.
        g = torch.einsum("hai,nhab,hbi->nhi", turned.q_map, rates, turned.k_map)
        return Worth(turned.q_map, turned.k_map, g.square().mean(0))
