"""The FFN: linear layers around hidden units, low-rank or with fewer of these.

plain   y = act(x W_1 + b_1) W_2 + b_2
gated   y = (act(x W_g + b_g) * (x W_1 + b_1)) W_2 + b_2        SwiGLU, GeGLU, GluMlp: neurons in pairs
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..linalg import factorize
from ..linalg.factorize import NeuronOrder, Projection
from ..models.running import double
from ..nn.linear import LowRankLinear, plain_linear
from .base import Choice, Layer, given, is_pointwise, like, size
from .cost import Cost, Shape, either_cost
from .factors import Factors, Moments, fill_linear, linear_projection
from .gates import LayerGates, LinearGates, NeuronGates
from .heads import as_parameter, zeros_like_bias
from .recording import Recorder


class FFNLayer(Layer):
    """Linear layers with hidden units between them: low-rank, or fewer ``neurons``.

    Args:
        paths: of the linear layers inside the module: ``fc1`` and ``fc2``, and ``gate`` where it is a layer of its own.
            An ``fc1`` of twice as many rows as there are hidden units holds gate and units, one after the other.
        neurons_dense: why the neurons form is not exact here (a norm over the hidden units), or None.
    """

    kind = "ffn"
    linear_in_width = ("neurons",)
    one_width = ("neurons",)
    levels: ClassVar = {
        "neurons": (0.05, 0.15, 0.25, 0.4, 0.55, 0.75),
        "gate": (0.15, 0.35, 0.6, 0.85),
        "fc1": (0.15, 0.35, 0.6, 0.85),
        "fc2": (0.15, 0.35, 0.6, 0.85),
    }

    def __init__(
        self,
        name: str,
        module: nn.Module,
        paths: Mapping[str, str] | None = None,
        neurons_dense: str | None = None,
    ) -> None:
        super().__init__(name, module, {} if neurons_dense is None else {"neurons": neurons_dense})
        self.paths = dict(paths or {"fc1": "fc1", "fc2": "fc2"})

    @cached_property
    def linears(self) -> dict[str, Any]:
        return {role: self.module.get_submodule(path) for role, path in self.paths.items()}

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:  # type: ignore[override]
        low = tuple(self.paths)
        return (low,) if "neurons" in self.dense_parts else (("neurons",), low)

    @property
    def hidden(self) -> int:
        """How many hidden units there are, M."""
        return size(self.linears["fc2"])[0]

    @property
    def full(self) -> Choice:
        full = {role: min(size(linear)) for role, linear in self.linears.items()}
        return full if "neurons" in self.dense_parts else {"neurons": self.hidden, **full}

    @property
    def firsts(self) -> dict[str, Any]:
        """The linear layers in front of the hidden units."""
        return {role: linear for role, linear in self.linears.items() if role != "fc2"}

    def shapes_at(self, width: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for role, linear in self.linears.items():
            inner, outer = self._narrowed(role, width)
            shapes[f"{self.name}.{self.paths[role]}.weight"] = (outer, inner)
            if linear.bias is not None:
                shapes[f"{self.name}.{self.paths[role]}.bias"] = (outer,)
        return shapes

    @property
    def feature_axis(self) -> int:
        """The axis of the features."""
        return 1 if is_pointwise(self.linears["fc2"]) else -1

    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = {"x": size(self.linears["fc1"])[0], "h": self.hidden}
        return {name: (n, n) for name, n in sizes.items()} | {f"{name}_mean": (n,) for name, n in sizes.items()}

    def gradient_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{role}_grad": (size(linear)[1],) * 2 for role, linear in self.linears.items()}

    def record(self, recorder: Recorder) -> list[Any]:
        handles = []
        for role, linear in self.linears.items():
            moment = "h" if role == "fc2" else "x" if role == "fc1" else None
            hook = recorder.inputs(moment, f"{role}_grad", self.feature_axis)
            handles.append(linear.register_forward_hook(hook))
        return handles

    def factors(self, moments: Mapping[str, Tensor] | None = None) -> FFNFactors:
        return FFNFactors(self, moments)

    def empty(self, choice: Choice) -> dict[str, nn.Module]:
        self.check(choice)
        new: dict[str, nn.Module] = {}
        for role, linear in self.linears.items():
            inner, outer = self._narrowed(role, choice.get("neurons"))
            if role in choice:
                made: nn.Module = LowRankLinear(inner, outer, choice[role], **like(linear))
                if isinstance(self.module, nn.TransformerEncoderLayer):
                    made.register_forward_pre_hook(_called)
            elif "neurons" in choice:
                # The second bias takes up the mean of the dropped neurons.
                made = plain_linear(inner, outer, role == "fc2" or linear.bias is not None, **like(linear))
            else:
                continue
            new[f"{self.name}.{self.paths[role]}"] = made.train(self.module.training)
        return new

    def _narrowed(self, role: str, neurons: Any) -> tuple[Any, Any]:
        """Input and output width of a linear layer beside this many neurons, or None for all."""
        inner, outer = size(self.linears[role])
        if neurons is None:
            return inner, outer
        return (neurons, outer) if role == "fc2" else (inner, outer // self.hidden * neurons)

    def replaced(self, choice: Choice) -> dict[str, nn.Module]:
        return {
            f"{self.name}.{self.paths[role]}": linear
            for role, linear in self.linears.items()
            if "neurons" in choice or role in choice
        }

    def gates(self, factors: Any, parts: tuple[str, ...]) -> list[LayerGates]:
        if "neurons" in parts:
            return [NeuronGates(f"{self.name}.{self.paths['fc2']}", self.linears["fc2"], factors)]
        built = factors.build({part: self.full[part] for part in parts})
        means = {"fc2": "h_mean"}
        return [
            LinearGates(name, part, built[name], factors.moments.get(means.get(part, "x_mean")))
            for part, name in ((part, f"{self.name}.{self.paths[part]}") for part in parts)
        ]

    def came_of(self, choice: Choice) -> bool:
        return choice == {"neurons": self.hidden}

    def cost(self, widths: Mapping[str, Any], shape: Shape) -> Cost:
        total = Cost(0, 0)
        neurons = given(widths, "neurons")
        for role, linear in self.linears.items():
            inner, outer = self._narrowed(role, np.where(neurons < 0, self.hidden, neurons))
            dense = either_cost(inner, outer, linear.bias is not None, given(widths, role), shape.tokens)
            if role == "fc2" and linear.bias is None:  # the bias that fewer neurons need
                added = either_cost(inner, outer, True, given(widths, role), shape.tokens)
                dense = Cost(np.where(neurons < 0, dense.params, added.params), dense.macs)
            total = total + dense
        return total

    def linear_size(self, part: str) -> tuple[int, int]:
        if part != "neurons":
            return size(self.linears[part])
        inputs = sum(inner * (outer // self.hidden) for inner, outer in map(size, self.firsts.values()))
        return inputs + size(self.linears["fc2"])[1], self.hidden

    def equal_share(self, part: str) -> tuple[int, int]:
        inner, outer = self.linear_size(part)
        return (inner * outer, outer) if part == "neurons" else super().equal_share(part)

    def limit(self, part: str, choice: Choice) -> int:
        full, neurons = self.full[part], choice.get("neurons")
        if part == "neurons" or not isinstance(neurons, int):
            return full
        return min(full, *self._narrowed(part, neurons))


def _called(module: nn.Module, args: Any) -> None:
    """Nothing; but hooks inside an ``nn.TransformerEncoderLayer`` turn off its fast path, which reads weights."""


class FFNFactors(Factors[FFNLayer]):
    """Moments: ``x``, ``h`` covariances and ``x_mean``, ``h_mean`` of the inputs and of the hidden units.

    Optional: ``fc1_grad``, ``fc2_grad`` (and ``gate_grad``), second moments of the output gradients.
    """

    def __init__(self, layer: FFNLayer, moments: Moments | None = None) -> None:
        super().__init__(layer, moments)
        self._projections: dict[str, Projection] = {}

    def projection(self, part: str) -> Projection:
        if part not in self._projections:
            moment = self.moments.get("h" if part == "fc2" else "x")
            grad = self.moments.get(f"{part}_grad")
            self._projections[part] = linear_projection(self.layer.linears[part], moment, grad)
        return self._projections[part]

    @cached_property
    def neurons(self) -> NeuronOrder:
        output = self._second
        if "fc2_grad" in self.moments:
            output = output @ factorize.whitening(self.moments["fc2_grad"]).mT
        return factorize.order_neurons(self.hidden_moment, output)

    @property
    def _second(self) -> Tensor:
        """The dense second matrix, (M, D_out) in float64."""
        return double(self.layer.linears["fc2"].weight.detach().flatten(1).mT)

    @property
    def hidden_moment(self) -> Tensor:
        """Covariance of the hidden units; data-free, independent units of variance ``|w_1|^2`` (times ``|w_g|^2``)."""
        if self.moments:
            return self.moments["h"]
        rows = [double(one.weight.detach().flatten(1)).square().sum(-1) for one in self.layer.firsts.values()]
        return torch.diag(torch.cat([row.unflatten(0, (-1, self.layer.hidden)) for row in rows]).prod(0))

    def _moments_of(self, choice: Choice) -> list[Tensor]:
        return [self.moments["h" if part in ("fc2", "neurons") else "x"] for part in choice]

    def _energy(self, part: str) -> Tensor:
        if part == "neurons":
            return -self.neurons.errors.diff()
        return self.projection(part).gains

    def _build(self, choice: Choice) -> dict[str, nn.Module]:
        if "neurons" in choice:
            self.layer.check(choice)
            return self._narrowed(choice)
        new = self.layer.empty(choice)
        for part in choice:
            small = new[f"{self.layer.name}.{self.layer.paths[part]}"]
            mean = self.moments.get("h_mean" if part == "fc2" else "x_mean")
            fill_linear(small, self.layer.linears[part], self.projection(part), mean)
        return new

    def _weights_at(self, width: int, scale: float) -> dict[str, Tensor]:
        new = self._build({"neurons": width})
        return {f"{name}.{key}": p.detach() for name, one in new.items() for key, p in one.named_parameters()}

    def _narrowed(self, choice: Choice) -> dict[str, nn.Module]:
        """Fewer neurons; ranks that are asked for too are those of the narrowed matrices."""
        layer = self.layer
        linears = layer.empty({"neurons": choice["neurons"]})
        new = {role: linears[f"{layer.name}.{path}"] for role, path in layer.paths.items()}
        self._fill_neurons(choice["neurons"], new)
        ranks = {part: rank for part, rank in choice.items() if part != "neurons"}
        if not ranks:
            return linears
        keep = self._kept(choice["neurons"])
        axes = {"h": 2, "h_mean": 1}  # of the moments that are about hidden units
        rows = {role: self._rows(role, keep) for role in layer.firsts}
        moments = {}
        for name, m in self.moments.items():
            index = rows.get(name.removesuffix("_grad"), keep if name in axes else None)
            square = name not in axes or axes[name] == 2
            moments[name] = m if index is None else m[index][:, index] if square else m[index]
        low = _Narrow(layer, linears).factors(moments)._build(ranks)
        return {**linears, **low}

    def _kept(self, count: int) -> Tensor:
        return self.neurons.order[:count].sort().values

    def _rows(self, role: str, keep: Tensor) -> Tensor:
        """The rows of a first linear layer that belong to the kept neurons."""
        times = size(self.layer.linears[role])[1] // self.layer.hidden
        return torch.cat([keep + i * self.layer.hidden for i in range(times)])

    def _fill_neurons(self, count: int, new: Mapping[str, Any]) -> None:
        keep, dense, layer = self._kept(count), self._second, self.layer
        weight = factorize.refit_neurons(self.hidden_moment, dense, keep)
        last = layer.linears["fc2"]
        bias = zeros_like_bias(last.bias, dense.shape[1], dense)
        if self.moments:
            mean = double(self.moments["h_mean"])
            bias = bias + mean @ dense - mean[keep] @ weight
        for role, linear in layer.firsts.items():
            rows = self._rows(role, keep)
            new[role].weight = as_parameter(linear.weight.detach()[rows], linear.weight)
            if linear.bias is not None:
                new[role].bias = as_parameter(linear.bias.detach()[rows], linear.weight)
        new["fc2"].weight = as_parameter(weight.mT.reshape(new["fc2"].weight.shape), last.weight)
        new["fc2"].bias = as_parameter(bias, last.weight)


class _Narrow(FFNLayer):
    """The same FFN with linear layers that are not in its module yet."""

    def __init__(self, layer: FFNLayer, linears: Mapping[str, nn.Module]) -> None:
        super().__init__(layer.name, layer.module, layer.paths, layer.dense_parts.get("neurons"))
        self.linears = {role: linears[f"{layer.name}.{path}"] for role, path in layer.paths.items()}
