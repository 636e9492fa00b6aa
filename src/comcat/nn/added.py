"""Products that are added to the heads of a frozen attention layer.

    scores_h + d^-1/2 s (x_q A_q,h)(x_k A_k,h)^T            out + sum_h softmax(scores_h)(s x_v A_v,h) A_o,h

in ONE fused attention call: the queries, keys and values of a head are r columns wider,

    q_cat = [q, s q'],  k_cat = [k, k'],  v_cat = [v, s v'],  W_o,cat = [W_o; A_o]

filled with zeros to a multiple of 8. The softmax scale stays that of the original head width d. ``A_k`` and ``A_o``
start at zero, so the model starts where it was. Source: COMCAT (arXiv 2305.17235), Eq. 8.

With a mask (:mod:`comcat.nn.masks`), the q' and the outputs of a query are multiplied by the mask's value at its token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .masks import Mask

#: Fused attention kernels want widths that are multiples of this.
WIDTH_MULTIPLE = 8

#: x_q and x_kv of a stream: what its queries, and its keys and values, are computed from.
Inputs = Mapping[str, tuple[Tensor, Tensor]]

#: The stream that the picture's tokens are in. Masks do not act on the others.
PICTURE = "sample"


@dataclass
class Strength:
    """The factor s of one adapter, shared by all of its layers: setting it once sets it everywhere."""

    scale: float = 1.0
    enabled: bool = True

    @property
    def value(self) -> float:
        return self.scale if self.enabled else 0.0


class AddedProduct(nn.Module):
    """The four factors of one stream of tokens; H heads of rank r, ordered by head.

    Args:
        dim_query, dim_key: widths of what queries, and keys and values, are computed from.
        dim_output: width of the layer's output, or None where this stream has none.
        query_bias, key_bias, value_bias: a constant beside A_q, A_k, A_v; only an imported LoRA of a layer with biases
            needs it.
    """

    output: nn.Linear | None

    def __init__(
        self,
        dim_query: int,
        dim_key: int,
        dim_output: int | None,
        num_heads: int,
        rank: int,
        query_bias: bool = False,
        key_bias: bool = False,
        value_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        width = num_heads * rank
        device = torch.get_default_device() if device is None else device  # None would leave skip_init on meta
        # skip_init: values come from reset_parameters alone, which draws the same on every device.
        self.query = nn.utils.skip_init(nn.Linear, dim_query, width, query_bias, device=device, dtype=dtype)
        self.key = nn.utils.skip_init(nn.Linear, dim_key, width, key_bias, device=device, dtype=dtype)
        self.value = nn.utils.skip_init(nn.Linear, dim_key, width, value_bias, device=device, dtype=dtype)
        self.output = None
        if dim_output is not None:
            self.output = nn.utils.skip_init(nn.Linear, width, dim_output, False, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random A_q, A_v of variance 1 / D, so that q', v' of normalized inputs are of unit size; the rest zero."""
        for linear in (self.query, self.value):
            weight = linear.weight
            if not weight.is_meta:
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
            if linear.bias is not None:
                linear.bias.zero_()
        self.key.weight.zero_()
        if self.key.bias is not None:
            self.key.bias.zero_()
        if self.output is not None:
            self.output.weight.zero_()

    def is_zero(self) -> bool:
        """Whether A_k and A_o are zero, so that nothing is added. Waits for the device."""
        linears = (self.key,) if self.output is None else (self.key, self.output)
        return not any(bool(linear.weight.any()) for linear in linears)

    def project(self, x_q: Tensor, x_kv: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) to s q', k', s v' of (B, N, H, r)."""
        q, k, v = call(self.query, x_q) * scale, call(self.key, x_kv), call(self.value, x_kv) * scale
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return q, k, v


class AddedLayer(nn.Module):
    """What one adapter adds to one attention layer: a product per stream of tokens ("sample", "context").

    Args:
        head_dim: head width d of the dense layer, where its heads may have been made narrower; None: as they are.

    Attributes:
        mask: where in the picture it acts; None: everywhere.
    """

    mask: Mask | None

    def __init__(
        self, streams: Mapping[str, AddedProduct], rank: int, strength: Strength, head_dim: int | None = None
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.streams = nn.ModuleDict(dict(streams))
        self.rank = rank
        self.strength = strength
        self.mask = None
        self._started = False  # once something was added, nobody looks again

    def __getitem__(self, stream: str) -> AddedProduct:
        return cast(AddedProduct, self.streams[stream])

    def mask_of(self, stream: str, x: Tensor) -> Tensor | None:
        """(1 or B, n), the mask's value for every token of x (B, n, ...); None where none acts on this stream."""
        return None if self.mask is None or stream != PICTURE else self.mask.weights(x.shape[1], x)

    def project(self, stream: str, x_q: Tensor, x_kv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, D), (B, m, D) to s m q', k', s v' of (B, n, H, r), (B, m, H, r) twice."""
        q, k, v = self[stream].project(x_q, x_kv, self.strength.value)
        mask = self.mask_of(stream, q)
        return q if mask is None else q * mask[:, :, None, None], k, v

    def follow(self, device: torch.device) -> None:
        """Go where the layer computes: what moves its weights there, block by block, does not know of products."""
        here = next(self.parameters()).device
        if here != device and here.type != "meta":
            self.to(device)

    def is_identity(self) -> bool:
        """Whether this layer has never added anything yet.

        The width of a product decides in which order it is summed, so even zero columns change the last bits. A
        layer that is still zero is therefore left out: step 0 is bitwise the base model.
        """
        if self._started or torch.compiler.is_compiling():
            return False
        if all(self[name].is_zero() for name in self.streams):
            return True
        self._started = True
        return False


def call(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)`` for a float32 factor in a half-precision model, with the dtype of ``x``."""
    if x.dtype == linear.weight.dtype or torch.is_autocast_enabled(x.device.type):
        return cast(Tensor, linear(x))
    return cast(Tensor, linear(x.to(linear.weight.dtype))).to(x.dtype)


def widen(
    q: Tensor, k: Tensor, v: Tensor, layers: Sequence[AddedLayer], inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the added columns of ``layers`` to every head.

    Args:
        q: (B, N, H, d); k, v: (B, M, H, d).
        inputs: stream -> (x_q (B, n, D), x_kv (B, m, D)), in the order in which their tokens follow each other.

    Returns:
        (B, N, H, w), (B, M, H, w), (B, M, H, w) with w the next multiple of 8 of d + sum r.
    """
    columns: list[list[Tensor]] = [[q], [k], [v]]
    for layer in layers:
        layer.follow(q.device)
        parts = [layer.project(name, *x) for name, x in inputs.items()]
        if layer.head_dim is not None and layer.head_dim != q.shape[-1]:
            factor = (q.shape[-1] / layer.head_dim) ** 0.5  # the host's scale is that of its narrower heads
            parts = [(queries * factor, keys, values) for queries, keys, values in parts]
        for column, pieces in zip(columns, zip(*parts, strict=True), strict=True):
            column.append((pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).to(column[0].dtype))
    width = q.shape[-1] + sum(layer.rank for layer in layers)
    padding = -width % WIDTH_MULTIPLE
    for column in columns:
        if padding:
            column.append(column[0].new_zeros(*column[0].shape[:-1], padding))
    wide_q, wide_k, wide_v = (torch.cat(column, -1) for column in columns)
    return wide_q, wide_k, wide_v


def narrow(z: Tensor, head_dim: int, layers: Sequence[AddedLayer]) -> tuple[Tensor, list[Tensor]]:
    """Take the output of a widened attention apart: z (B, N, H, w) to (B, N, H d) and (B, N, H r) per layer."""
    parts, start = [], head_dim
    for layer in layers:
        parts.append(z[..., start : start + layer.rank].flatten(2))
        start += layer.rank
    return z[..., :head_dim].flatten(2), parts


def add_output(out: Tensor, parts: Iterable[Tensor], layers: Iterable[AddedLayer], stream: str) -> Tensor:
    """``out + sum_l m_l z'_l A_o,l`` for the tokens of one stream: out (B, n, D_out), parts (B, n, H r)."""
    for part, layer in zip(parts, layers, strict=True):
        output = layer[stream].output
        if output is not None:
            mask = layer.mask_of(stream, part)
            out = out + call(output, part if mask is None else part * mask[:, :, None])
    return out


Run = Callable[[Sequence[AddedLayer]], Any]


def run_layers(layers: Sequence[AddedLayer], run: Run, plain: Callable[[], Any]) -> Any:
    """The output of an attention layer with what its adapters add.

    Args:
        run: computes the layer with these products; plain: the host's own way, without any.
    """
    on = [layer for layer in layers if layer.strength.value != 0]
    started = [layer for layer in on if not layer.is_identity()]
    if len(started) == len(on) or not torch.is_grad_enabled():
        return run(started) if started else plain()
    # A new adapter is trained from exactly the base model: its values, the gradients of the widened attention.
    with torch.no_grad():
        values = run(started) if started else plain()
    outputs = run(on)
    if isinstance(outputs, Tensor):
        return values + (outputs - outputs.detach())
    return tuple(v + (o - o.detach()) for v, o in zip(values, outputs, strict=True))
