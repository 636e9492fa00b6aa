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
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPTextEmbeddings, eager_attention_forward

from ..errors import ModelError
from ..layers.heads import Heads, Stream
from ..nn.added import AddedLayer, add_output, narrow, run_layers, widen
from ..nn.carries import Carries, carry, drop
from .addable import AddableAttention

STREAM = Stream.separate("sample", "q_proj", "k_proj", "v_proj", "out_proj")


class AddedAttention(Carries):
    """Mixin for ``CLIPAttention``."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """(B, N, D) to (B, N, D) and the attention weights, or None."""
        layers = [cast(AddedLayer, layer) for layer in self.extras.values()]
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


def addable_layers(model: nn.Module) -> Iterator[tuple[str, AddableAttention]]:
    """(name, description) of every attention layer; names leave out ``text_model.``, which some versions have."""
    for name, module in model.named_modules():
        if isinstance(module, CLIPAttention):
            name = name.removeprefix("text_model.")
            yield name, AddableAttention(name, module, "text", Heads.of(module.num_heads, module.head_dim), (STREAM,))


def attach(attention: AddableAttention, name: str, layer: AddedLayer) -> None:
    """Put the products of adapter ``name`` into an attention layer."""
    carry(attention.module, AddedAttention, name, layer)


def detach(module: nn.Module, name: str) -> None:
    """Take adapter ``name`` out again; after the last one the layer is what it was."""
    drop(module, AddedAttention, name)


#: Ids of learned words: above every vocabulary, and never the same for two words.
FIRST_ID = 1 << 24


class NewRows(nn.Module):
    """The vectors (n, D) of one learned word, and their n ids."""

    def __init__(self, ids: Sequence[int], vectors: nn.Parameter) -> None:
        super().__init__()
        self.ids = list(ids)
        self.vectors = vectors

    def forward(self, input: Tensor, rows: Tensor) -> Tensor:
        for token_id, vector in zip(self.ids, self.vectors, strict=True):
            rows = torch.where((input == token_id).unsqueeze(-1), vector.to(rows.device, rows.dtype), rows)
        return rows


class ExtraRows(Carries):
    """Mixin for CLIP's text embeddings: vectors of learned words beside the table, whichever table is there."""

    def forward(
        self, input_ids: Tensor | None = None, position_ids: Any = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        if input_ids is not None and inputs_embeds is None:
            if not (torch.compiler.is_compiling() or input_ids.is_meta):
                self._check(input_ids)
            inputs_embeds = self.look_up(input_ids)
        return cast(Tensor, super().forward(input_ids, position_ids, inputs_embeds))  # type: ignore[misc]

    def look_up(self, input_ids: Tensor) -> Tensor:
        """(B, N) to (B, N, D)."""
        rows = cast(Any, self).token_embedding(torch.where(input_ids < FIRST_ID, input_ids, 0))
        for new in self.extras.values():
            rows = new(input_ids, rows)
        return cast(Tensor, rows)

    def _check(self, input_ids: Tensor) -> None:
        wanted = set(input_ids[input_ids >= FIRST_ID].tolist())
        if wanted - {token_id for new in self.extras.values() for token_id in new.ids}:
            raise ModelError(
                "this text encoder was given a learned word that it has no vectors of: the adapter was taken off, or "
                "is on a pipeline with another text encoder. Load it on this one, and encode the prompt again"
            )


def embeddings(encoder: nn.Module) -> nn.Module:
    """The module that looks up tokens and places."""
    return next(module for module in encoder.modules() if isinstance(module, CLIPTextEmbeddings))


def known_ids(encoder: nn.Module) -> set[int]:
    """The ids of the learned words whose vectors are in this encoder."""
    extras = getattr(embeddings(encoder), "extras", {})
    return {token_id for new in extras.values() for token_id in new.ids}
