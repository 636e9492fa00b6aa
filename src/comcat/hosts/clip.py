"""CLIP text encoders of transformers: attention with added products, and rows for new tokens.

There is no processor to set here, so the module gets a subclass of its own class, whose ``forward`` looks at the
products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import CLIPAttention, eager_attention_forward

from ..added import AddedLayer, add_output, narrow, widen
from .seam import Refusal, Site, Stream, change_class, derived, original_class, run_layers

STREAM = Stream("sample", "q_proj", "k_proj", "v_proj", "out_proj")


class AddedAttention:
    """Mixin for ``CLIPAttention``."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """(B, N, D) to (B, N, D) and the attention weights, or None."""
        layers = [cast(AddedLayer, layer) for layer in cast(Any, self).adapters.values()]
        weights: list[Any] = [None]

        def run(active: Sequence[AddedLayer]) -> Tensor:
            out, weights[0] = _run(self, active, hidden_states, attention_mask, **kwargs)
            return out

        def plain() -> Tensor:
            out, weights[0] = super(AddedAttention, self).forward(  # type: ignore[misc]
                hidden_states, attention_mask, **kwargs
            )
            return cast(Tensor, out)

        return run_layers(layers, run, plain), weights[0]


def _run(
    attn: Any, layers: Sequence[AddedLayer], x: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Any]:
    q, k, v = (project(x).unflatten(-1, (-1, attn.head_dim)) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k, v = (t.transpose(1, 2) for t in widen(q, k, v, layers, {"sample": (x, x)}))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attn.config._attn_implementation, eager_attention_forward)
    dropout = attn.dropout if attn.training else 0.0
    z, weights = attend(attn, q, k, v, attention_mask, scaling=attn.scale, dropout=dropout, **kwargs)
    z, parts = narrow(z, attn.head_dim, layers)
    return add_output(attn.out_proj(z), parts, layers, "sample"), weights


def find_sites(model: nn.Module) -> Iterator[tuple[str, Site | Refusal]]:
    """(name, Site) of every attention layer; names leave out ``text_model.``, which some versions have."""
    for name, module in model.named_modules():
        if isinstance(module, CLIPAttention):
            name = name.removeprefix("text_model.")
            yield name, Site(name, module, "text", module.num_heads, module.head_dim, (STREAM,))


def attach(site: Site, name: str, layer: AddedLayer) -> None:
    """Put the products of adapter ``name`` into an attention layer."""
    attn: Any = site.module
    if not isinstance(attn, AddedAttention):
        attn.adapters = nn.ModuleDict()
        change_class(attn, derived(type(attn), AddedAttention))
    layer.train(attn.training)
    attn.adapters[name] = layer


def detach(module: nn.Module, name: str) -> None:
    """Take adapter ``name`` out again; after the last one the layer is what it was."""
    attn: Any = module
    del attn.adapters[name]
    if not len(attn.adapters):
        change_class(attn, original_class(attn, AddedAttention))
        del attn.adapters


class NewRows(nn.Module):
    """The vectors (n, D) of one adapter's new tokens, and their n ids."""

    def __init__(self, ids: Sequence[int], vectors: nn.Parameter) -> None:
        super().__init__()
        self.ids = list(ids)
        self.vectors = vectors

    def forward(self, input: Tensor, rows: Tensor) -> Tensor:
        for token_id, vector in zip(self.ids, self.vectors, strict=True):
            rows = torch.where((input == token_id).unsqueeze(-1), vector.to(rows.device, rows.dtype), rows)
        return rows


class ExtraRows:
    """Mixin for the token embedding: vectors of new tokens beside the frozen table."""

    def forward(self, input: Tensor) -> Tensor:
        own = cast(Any, self)
        rows = super().forward(input.clamp(max=own.num_embeddings - 1))  # type: ignore[misc]
        for new in own.extra.values():
            rows = new(input, rows)
        return cast(Tensor, rows)


def set_extra_rows(embedding: nn.Embedding, rows: dict[str, tuple[Sequence[int], nn.Parameter]]) -> None:
    """Let an embedding answer to new tokens: name -> (ids, vectors (n, D)); none: it is what it was."""
    module: Any = embedding
    if isinstance(embedding, ExtraRows):
        del module.extra
        change_class(embedding, original_class(embedding, ExtraRows))
    if rows:
        change_class(embedding, derived(type(module), ExtraRows))
        module.extra = nn.ModuleDict({name: NewRows(ids, vectors) for name, (ids, vectors) in rows.items()})
