"""The classifier: one linear layer behind all blocks, of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..linalg.factorize import Projection
from ..nn.linear import LowRankLinear
from .base import Choice, Layer, given, like
from .cost import Cost, Shape, either_cost
from .factors import Factors, Moments, fill_linear, linear_projection
from .gates import LayerGates, LinearGates
from .recording import Recorder


class ClassifierLayer(Layer):
    """The classifier: ``rank``. In plans, options and reports its part is called ``head``, as timm calls it."""

    kind = "head"
    forms = (("rank",),)
    levels: ClassVar = {"rank": (0.2, 0.4, 0.7)}
    in_block = False

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
        self.linear = module

    @property
    def full(self) -> Choice:
        return {"rank": min(self.linear.weight.shape)}

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"linear": self.linear}

    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        n = self.linear.in_features
        return {"x": (n, n), "x_mean": (n,)}

    def gradient_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"grad": (self.linear.out_features,) * 2}

    def record(self, recorder: Recorder) -> list[Any]:
        return [self.linear.register_forward_hook(recorder.inputs("x", "grad"))]

    def factors(self, moments: Mapping[str, Tensor] | None = None) -> ClassifierFactors:
        return ClassifierFactors(self, moments)

    def empty(self, choice: Choice) -> dict[str, nn.Module]:
        self.check(choice)
        if not choice:
            return {}
        small = LowRankLinear(*self.linear_size("rank"), choice["rank"], **like(self.linear))
        return {self.name: small.train(self.module.training)}

    def replaced(self, choice: Choice) -> dict[str, nn.Module]:
        return {self.name: self.module} if choice else {}

    def gates(self, factors: Any, parts: tuple[str, ...]) -> list[LayerGates]:
        (built,) = factors.build({"rank": self.full["rank"]}).values()
        return [LinearGates(self.name, "rank", built, factors.moments.get("x_mean"))]

    def cost(self, widths: Mapping[str, Any], shape: Shape) -> Cost:
        bias = self.linear.bias is not None
        return either_cost(*self.linear_size("rank"), bias, given(widths, "rank"), shape.tokens)

    def linear_size(self, part: str) -> tuple[int, int]:
        return self.linear.in_features, self.linear.out_features


class ClassifierFactors(Factors[ClassifierLayer]):
    """Moments: ``x`` covariance and ``x_mean`` of the classifier's input; optional ``grad``."""

    def __init__(self, layer: ClassifierLayer, moments: Moments | None = None) -> None:
        super().__init__(layer, moments)

    @cached_property
    def projection(self) -> Projection:
        return linear_projection(self.layer.linear, self.moments.get("x"), self.moments.get("grad"))

    def _moments_of(self, choice: Choice) -> list[Tensor]:
        return [self.moments["x"]]

    def _energy(self, part: str) -> Tensor:
        return self.projection.gains

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        new = self.layer.empty(choice)
        for small in new.values():
            fill_linear(small, cast(nn.Linear, self.layer.module), self.projection, self.moments.get("x_mean"))
        return new
