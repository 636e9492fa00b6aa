"""timm's ``Attention``, ``WindowAttention`` (Swin v1) and ``Mlp``: stand-ins with one fused projection and one call.

Classes are matched exactly: a subclass may override ``forward``, and then nothing here would be known to hold.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from timm.layers import Mlp
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ..layers.attention import AttentionLayer
from ..layers.base import Layer
from ..layers.ffn import FFNLayer
from ..layers.heads import Heads, HeadWeights, Input, Places, Role, Stream, as_parameter, flatten_heads, is_identity
from ..nn.linear import LowRankLinear
from ..nn.low_rank_attention import LowRankAttention
from .changed import changed, patched
from .kept_forward import KeptForward

#: Everything that the two attention classes own; a layer with more was changed by somebody, in a way unknown here.
_ATTENTION_OWNS = {
    "qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop",
    "softmax", "relative_position_bias_table", "relative_position_index",
}  # fmt: skip
_MLP_OWNS = {"fc1", "act", "drop1", "norm", "fc2", "drop2"}


def layer_of(name: str, module: Any) -> Layer | str | None:
    """The layer of a known class, why one that looks like it is none, or None for another class."""
    if type(module) is Attention or type(module) is WindowAttention:
        reason = patched(module, _ATTENTION_OWNS) or changed(module.qkv, "qkv") or changed(module.proj, "proj")
        return reason or _attention(name, module)
    if type(module) is Mlp and isinstance(module.fc1, (nn.Linear, LowRankLinear)):
        found = patched(module, _MLP_OWNS) or changed(module.fc1, "fc1") or changed(module.fc2, "fc2")
        norm = None if is_identity(getattr(module, "norm", None)) else "normalization over the hidden units"
        return found or FFNLayer(name, module, neurons_dense=norm)
    return None


def _attention(name: str, module: Any) -> AttentionLayer | str:
    dense: dict[str, str] = {}
    if not (is_identity(getattr(module, "q_norm", None)) and is_identity(getattr(module, "k_norm", None))):
        dense["qk"] = "query-key normalization acts between the projections and the scores"
    if not is_identity(getattr(module, "norm", None)):
        dense["vo"] = "normalization acts between attention and output projection"
    if len(dense) == 2:
        return "normalization acts on both products"
    gated = getattr(module, "gate", None) is not None
    head_dim = module.qkv.out_features // (3 * module.num_heads)

    heads, stream = Heads.of(module.num_heads, head_dim), Stream.fused("qkv", "proj")
    by_channel = gated and "vo" not in dense
    stand_in = FusedStandIn(module, head_dim, KeptForward(module, heads, stream) if by_channel else None)
    fused = bool(getattr(module, "fused_attn", True))
    return AttentionLayer(name, module, heads, stream, stand_in, dense, by_channel=by_channel, fused=fused)


@dataclass
class FusedStandIn:
    """A :class:`~comcat.nn.LowRankAttention` in the place of timm's.

    Attributes:
        kept: what runs components that keep their places, where channels are left out.
    """

    original: Any
    head_dim: int
    kept: KeptForward | None

    @property
    def fixed(self) -> bool:
        return self.kept is not None and self.kept.fixed

    def build(self, qk: int, vo: int, placed: Collection[Role] = ()) -> nn.Module:
        """An empty stand-in; see :class:`comcat.layers.attention.StandIn`."""
        if placed:
            assert self.kept is not None
            return self.kept.build(qk, vo, placed)
        module = self.original
        cls: type[LowRankAttention] = LowRankWindowAttention if type(module) is WindowAttention else LowRankAttention
        small = cls(
            dim=module.qkv.in_features,
            num_heads=module.num_heads,
            head_dim=self.head_dim,
            qk_rank=qk,
            vo_rank=vo,
            scale=module.scale,
            dim_out=module.proj.out_features,
            qkv_bias=module.qkv.bias is not None,
            # A reduced value carries its mean, and what it loses of it, into the output bias.
            proj_bias=module.proj.bias is not None or vo < self.head_dim,
            attn_drop=module.attn_drop,
            proj_drop=module.proj_drop,
            q_norm=getattr(module, "q_norm", None),
            k_norm=getattr(module, "k_norm", None),
            norm=getattr(module, "norm", None),
            gate=getattr(module, "gate", None),
            fused_attn=bool(getattr(module, "fused_attn", True)),
            device=module.qkv.weight.device,
            dtype=module.qkv.weight.dtype,
        )
        if isinstance(small, LowRankWindowAttention):
            small.take_window(module)
        for own, value in vars(module).items():  # what somebody noted on the layer
            if not own.startswith("_") and own not in vars(small) and own != "attn_dim":
                setattr(small, own, value)
        for fresh in (small, small.qkv, small.proj):  # the others are the original's, each in its own mode
            fresh.training = module.training
        return small

    def fill(self, small: Any, weights: HeadWeights, places: Places) -> None:
        """Write per-head weights into a stand-in."""
        if places:
            assert self.kept is not None
            self.kept.fill(small, weights, places)
            return
        original = self.original
        weight, bias = weights.rows(Input("qkv", ("query", "key", "value")))
        small.qkv.weight = as_parameter(weight, original.qkv.weight)
        if bias is not None:
            small.qkv.bias = as_parameter(bias, original.qkv.bias)
        small.proj.weight = as_parameter(flatten_heads(weights.output).mT, original.proj.weight)
        if small.proj.bias is not None and weights.output_bias is not None:
            small.proj.bias = as_parameter(weights.output_bias, original.proj.weight)


class LowRankWindowAttention(LowRankAttention, WindowAttention):
    """Swin's windowed attention with per-head ranks.

    The relative position bias is added to the scores, so the query-key product exists as it is. Table, index
    and resizing to another window are timm's own methods, inherited.
    """

    def take_window(self, original: WindowAttention) -> None:
        """Take over window size and relative position bias of the original layer."""
        self.window_size = original.window_size
        self.window_area = original.window_area
        self.softmax = original.softmax
        self.relative_position_bias_table = original.relative_position_bias_table
        self.register_buffer("relative_position_index", original.relative_position_index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(windows * batch, tokens, D); ``mask`` is (windows, tokens, tokens), additive, or None."""
        bias: Tensor = WindowAttention._get_rel_pos_bias(self)  # (1, heads, tokens, tokens)
        if mask is not None:
            bias = bias + mask[:, None]  # (windows, heads, tokens, tokens)
            bias = bias.repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return super().forward(x, bias)

    def _softmax(self, attn: Tensor) -> Tensor:
        return self.softmax(attn)
