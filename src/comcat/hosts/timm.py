"""timm: every model built on ``Attention`` + ``Mlp`` (ViT, DeiT, DINOv2, CLIP and SigLIP towers, ...) and Swin v1.

Classes are matched exactly: a subclass may override ``forward``, and then nothing here would be known to hold.
"""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ..layers.attention import AttentionLayer
from ..layers.base import Inventory, Layer, LeftDense
from ..layers.classifier import ClassifierLayer
from ..layers.ffn import FFNLayer
from ..layers.filling import fill_fused
from ..layers.heads import Heads, Stream, is_identity
from ..nn.attention import LowRankAttention
from ..nn.linear import LowRankLinear
from .changed import ALREADY, Sharing, changed, patched

_ROPE = "rotary position embedding acts between the projections and the scores"
_REASONS = {
    "AttentionRope": _ROPE,
    "EvaAttention": _ROPE,
    "DiffAttention": "differential attention subtracts two softmaxes",
    "AttentionPoolLatent": "pools with a learned query of its own",
    "ParallelScalingBlock": "attention and FFN share one fused projection",
    "DiffParallelScalingBlock": "attention and FFN share one fused projection",
    "PatchMerging": "merges patches, no attention or FFN",
}


#: Everything that the two attention classes own; a layer with more was changed by somebody, in a way unknown here.
_ATTENTION_OWNS = {
    "qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop",
    "softmax", "relative_position_bias_table", "relative_position_index",
}  # fmt: skip
_MLP_OWNS = {"fc1", "act", "drop1", "norm", "fc2", "drop2"}


def find_layers(model: nn.Module) -> Inventory:
    """Layers of a timm model in the order of ``model.named_modules()``, which is that of the forward pass.

    A module with several names is one layer, under the first of them. A layer whose weights also belong to another
    stays dense.
    """
    layers: list[Layer] = []
    dense: list[LeftDense] = []
    reasons: dict[str, str] = {}  # of layers that would be found but for these
    shared = Sharing(model)
    for name, module in model.named_modules():
        layer = _layer(name, module)
        if layer is None:
            continue
        reason = layer if isinstance(layer, str) else shared.reason(layer.module, list(layer.linears.values()))
        if reason:
            reasons[name] = reason
            continue
        assert not isinstance(layer, str)
        layers.append(layer)
        for part, why in layer.dense_parts.items() if layer.kind == "attention" else ():
            dense.append(LeftDense(f"{name} ({part})", type(module).__name__, why))
    for name, module in _classifiers(model):
        reason = changed(module) or shared.reason(module, [module])
        if reason:
            reasons[name] = reason
        else:
            layers.append(ClassifierLayer(name, module))
    whole = {layer.name for layer in layers}
    covered = {id(linear) for layer in layers for linear in layer.linears.values()}
    rest = [entry for entry in _uncovered(model, covered, reasons) if entry.name not in whole]
    return Inventory(layers, dense + rest)


def _layer(name: str, module: Any) -> Layer | str | None:
    """A layer, or why a layer that would be one is none."""
    if type(module) is Attention or type(module) is WindowAttention:
        reason = patched(module, _ATTENTION_OWNS) or changed(module.qkv, "qkv") or changed(module.proj, "proj")
        return reason or _attention(name, module)
    if type(module) in (Mlp, GluMlp) and isinstance(module.fc1, (nn.Linear, LowRankLinear)):
        found = patched(module, _MLP_OWNS) or changed(module.fc1, "fc1") or changed(module.fc2, "fc2")
        if found:
            return found
        reason = None if is_identity(getattr(module, "norm", None)) else "normalization over the hidden units"
        if type(module) is GluMlp:
            reason = "gated hidden units"
        return FFNLayer(name, module, neurons_dense=reason)
    return None


def _attention(name: str, module: Any) -> AttentionLayer | str:
    dense: dict[str, str] = {}
    if not (is_identity(getattr(module, "q_norm", None)) and is_identity(getattr(module, "k_norm", None))):
        dense["qk"] = "query-key normalization acts between the projections and the scores"
    if not is_identity(getattr(module, "norm", None)):
        dense["vo"] = "normalization acts between attention and output projection"
    elif getattr(module, "gate", None) is not None:
        dense["vo"] = "a gate acts between attention and output projection"
    if len(dense) == 2:
        return "normalization or gating acts on both products"
    head_dim = module.qkv.out_features // (3 * module.num_heads)

    def build(qk_rank: int, vo_rank: int) -> nn.Module:
        cls: type[LowRankAttention] = LowRankWindowAttention if type(module) is WindowAttention else LowRankAttention
        small = cls(
            dim=module.qkv.in_features,
            num_heads=module.num_heads,
            head_dim=head_dim,
            qk_rank=qk_rank,
            vo_rank=vo_rank,
            scale=module.scale,
            dim_out=module.proj.out_features,
            qkv_bias=module.qkv.bias is not None,
            # A reduced value carries its mean, and what it loses of it, into the output bias.
            proj_bias=module.proj.bias is not None or vo_rank < head_dim,
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

    fused = bool(getattr(module, "fused_attn", True))
    heads, stream = Heads.of(module.num_heads, head_dim), Stream.fused("qkv", "proj")
    return AttentionLayer(name, module, heads, stream, build, fill_fused(module), dense, fused=fused)


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


def _classifiers(model: Any) -> list[tuple[str, nn.Linear]]:
    """The final linear layer(s); two for distilled DeiT."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    wanted = {id(head) for head in heads if isinstance(head, nn.Linear)}
    return [(name, module) for name, module in model.named_modules() if id(module) in wanted]


def _uncovered(model: nn.Module, covered: set[int], reasons: dict[str, str]) -> list[LeftDense]:
    """Modules that own linear layers which belong to no site, one entry each."""
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in covered:
            owner = name if name in reasons else name.rpartition(".")[0] or name
            while owner not in reasons and "." in owner and _is_part(model.get_submodule(owner)):
                owner = owner.rpartition(".")[0]
            owners[owner] = model.get_submodule(owner)
    return [
        LeftDense(name, type(module).__name__, reasons.get(name) or _reason(module)) for name, module in owners.items()
    ]


def _is_part(module: nn.Module) -> bool:
    """Whether its linear layers are listed under the layer that it is a part of."""
    return type(module).__name__ in ("LowRankLinear", "ParametrizedLinear", "ParametrizationList", "ModuleDict")


def _reason(module: nn.Module) -> str:
    if isinstance(module, (LowRankAttention, LowRankLinear)):
        return ALREADY
    base = next((c.__name__ for c in (Attention, WindowAttention, Mlp, GluMlp) if isinstance(module, c)), None)
    if base is not None and type(module).__name__ not in _REASONS:
        return f"a subclass of timm's {base}, whose forward may differ"
    return _REASONS.get(type(module).__name__, "not a layer that comcat knows to factor")
