"""timm: every model built on ``Attention`` + ``Mlp`` (ViT, DeiT, DINOv2, CLIP and SigLIP towers, ...) and Swin v1.

Classes are matched exactly: a subclass may override ``forward``, and then nothing here would be known to hold.
"""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp
from timm.layers.attention import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from ..attention import LowRankAttention
from ..heads import is_identity
from ..sites import AttentionSite, FFNSite, HeadSite, Inventory, LeftDense, Site

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


def find_sites(model: nn.Module) -> Inventory:
    """Sites of a timm model in the order of ``model.named_modules()``, which is that of the forward pass."""
    sites: list[Site] = []
    dense: list[LeftDense] = []
    for name, module in model.named_modules():
        site = _site(name, module)
        if site is None:
            continue
        sites.append(site)
        for part, reason in getattr(site, "dense_parts", {}).items():
            dense.append(LeftDense(f"{name} ({part})", type(module).__name__, reason))
    sites += [HeadSite(name, module) for name, module in _classifiers(model)]
    whole = {site.name for site in sites}
    covered = {id(linear) for site in sites for linear in site.linears.values()}
    rest = [entry for entry in _uncovered(model, covered) if entry.name not in whole]
    return Inventory(sites, dense + rest)


def _site(name: str, module: Any) -> Site | None:
    if type(module) is Attention or type(module) is WindowAttention:
        return _attention_site(name, module)
    if type(module) in (Mlp, GluMlp) and type(module.fc1) is nn.Linear and type(module.fc2) is nn.Linear:
        reason = None if is_identity(getattr(module, "norm", None)) else "normalization over the hidden units"
        if type(module) is GluMlp:
            reason = "gated hidden units"
        return FFNSite(name, module, module.fc1, module.fc2, reason)
    return None


def _attention_site(name: str, module: Any) -> AttentionSite | None:
    if type(module.qkv) is not nn.Linear or type(module.proj) is not nn.Linear:
        return None  # already low-rank, quantized or adapted by someone else
    dense: dict[str, str] = {}
    if not (is_identity(getattr(module, "q_norm", None)) and is_identity(getattr(module, "k_norm", None))):
        dense["qk"] = "query-key normalization acts between the projections and the scores"
    if not is_identity(getattr(module, "norm", None)):
        dense["vo"] = "normalization acts between attention and output projection"
    elif getattr(module, "gate", None) is not None:
        dense["vo"] = "a gate acts between attention and output projection"
    if len(dense) == 2:
        return None
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
            attn_drop=module.attn_drop.p,
            proj_drop=module.proj_drop.p,
            q_norm=getattr(module, "q_norm", None),
            k_norm=getattr(module, "k_norm", None),
            norm=getattr(module, "norm", None),
            gate=getattr(module, "gate", None),
            device=module.qkv.weight.device,
            dtype=module.qkv.weight.dtype,
        )
        if isinstance(small, LowRankWindowAttention):
            small.take_window(module)
        return small.train(module.training)

    return AttentionSite(name, module, module.qkv, module.proj, module.num_heads, head_dim, build, dense)


class LowRankWindowAttention(LowRankAttention, WindowAttention):
    """Swin's windowed attention with per-head ranks.

    The relative position bias is added to the scores, so the query-key product exists as it is. Table, index
    and resizing to another window are timm's own methods, inherited.
    """

    def take_window(self, original: WindowAttention) -> None:
        """Take over window size and relative position bias of the original layer."""
        self.window_size = original.window_size
        self.window_area = original.window_area
        self.relative_position_bias_table = original.relative_position_bias_table
        self.register_buffer("relative_position_index", original.relative_position_index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(windows * batch, tokens, D); ``mask`` is (windows, tokens, tokens), additive, or None."""
        bias: Tensor = WindowAttention._get_rel_pos_bias(self)  # (1, heads, tokens, tokens)
        if mask is not None:
            bias = bias + mask[:, None]  # (windows, heads, tokens, tokens)
            bias = bias.repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        return super().forward(x, bias)


def _classifiers(model: Any) -> list[tuple[str, nn.Linear]]:
    """The final linear layer(s); two for distilled DeiT."""
    if not hasattr(model, "get_classifier"):
        return []
    found = model.get_classifier()
    heads = found if isinstance(found, (tuple, list)) else (found,)
    wanted = {id(head) for head in heads if type(head) is nn.Linear}
    return [(name, module) for name, module in model.named_modules() if id(module) in wanted]


def _uncovered(model: nn.Module, covered: set[int]) -> list[LeftDense]:
    """Modules that own linear layers which belong to no site, one entry each."""
    owners: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in covered:
            owner = name.rpartition(".")[0] or name
            owners[owner] = model.get_submodule(owner)
    return [LeftDense(name, type(module).__name__, _reason(module)) for name, module in owners.items()]


def _reason(module: nn.Module) -> str:
    if type(module) is Attention and type(module.qkv) is nn.Linear:
        return "normalization or gating acts on both products"
    return _REASONS.get(type(module).__name__, "not a layer that comcat knows to factor")
