"""Attention processors of diffusers that run a layer with added products.

| class, processor | models | streams |
|---|---|---|
| ``Attention``, ``AttnProcessor(2_0)``, sliced, xFormers | SD 1.x, SD 2.x, SDXL, PixArt | sample |
| ``Attention``, ``JointAttnProcessor2_0`` | SD3 | sample, context |
| ``FluxAttention``, ``FluxAttnProcessor`` | FLUX.1, Chroma | sample, context; sample alone in single blocks |
| the same under other names | Bria, FIBO, Ovis-Image, LongCat-Image; double blocks of FLUX.2 | as FLUX.1 |

Everything between the projections and the product (norms, rotary embedding, masks, slicing) is the host's own;
the added columns come after the norms and the rotary embedding and are free of both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models import attention_processor as ap
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ..nn.added import AddedLayer, add_output, narrow, run_layers, widen


class AddedProcessor:
    """An attention processor that runs a layer with the products of any number of adapters.

    Attributes:
        base: the processor that was there; it runs the layer whenever nothing is added.
        adapters: adapter name -> AddedLayer; the layer's own.
    """

    bases: tuple[type, ...] = ()

    def __init__(self, base: Any, adapters: dict[str, Any]) -> None:
        self.base = base
        self.adapters = adapters

    @property
    def layers(self) -> list[AddedLayer]:
        return [cast(AddedLayer, layer) for layer in self.adapters.values()]

    # FLUX: `set_attention_backend` writes these on whatever processor it finds.
    @property
    def _attention_backend(self) -> Any:
        return self.base._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.base._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.base._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.base._parallel_config = config


class ClassicProcessor(AddedProcessor):
    """For ``Attention`` with one stream of tokens, self or cross."""

    bases = (ap.AttnProcessor, ap.AttnProcessor2_0, ap.SlicedAttnProcessor, ap.XFormersAttnProcessor)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        extra = {} if temb is None else {"temb": temb}
        return cast(
            Tensor,
            run_layers(
                self.layers,
                lambda layers: self.run(layers, attn, hidden_states, encoder_hidden_states, attention_mask, temb),
                lambda: self.base(attn, hidden_states, encoder_hidden_states, attention_mask, **extra),
            ),
        )

    def run(
        self,
        layers: Sequence[AddedLayer],
        attn: Any,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        residual = x
        if attn.spatial_norm is not None:
            x = attn.spatial_norm(x, temb)
        image = x.shape if x.ndim == 4 else None
        if image is not None:
            x = x.flatten(2).transpose(1, 2)
        batch, length, _ = x.shape if context is None else context.shape
        mask = attn.prepare_attention_mask(mask, length, batch)  # (B H, N or 1, M)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if context is None:
            context = x
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        head_dim = q.shape[-1]
        if isinstance(self.base, ap.AttnProcessor2_0):  # the others have no such norms
            q = q if attn.norm_q is None else attn.norm_q(q)
            k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = widen(q, k, v, layers, {"sample": (x, context)})
        z = self.attend(attn, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)
        z, added = narrow(z.to(q.dtype), head_dim, layers)
        out = attn.to_out[1](add_output(attn.to_out[0](z), added, layers, "sample"))

        if image is not None:
            out = out.transpose(1, 2).reshape(image)
        if attn.residual_connection:
            out = out + residual
        return cast(Tensor, out / attn.rescale_output_factor)

    def attend(self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, N, w) to (B, H, N, w), the way the base processor does it."""
        if isinstance(self.base, (ap.AttnProcessor2_0, ap.XFormersAttnProcessor)):
            if mask is not None:
                mask = mask.view(q.shape[0], attn.heads, -1, mask.shape[-1])
            own = isinstance(self.base, ap.XFormersAttnProcessor)
            scale = attn.scale if own else (attn.inner_dim // attn.heads) ** -0.5
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        shape = q.shape
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (B H, N, w)
        size = getattr(self.base, "slice_size", None) or len(q)
        pieces = []
        for i in range(0, len(q), size):
            part = slice(i, i + size)
            scores = attn.get_attention_scores(q[part], k[part], None if mask is None else mask[part])
            pieces.append(torch.bmm(scores, v[part]))
        return torch.cat(pieces).view(shape)


class JointProcessor(AddedProcessor):
    """For ``Attention`` over image and text tokens with projections of their own (SD3)."""

    bases = (ap.JointAttnProcessor2_0, ap.XFormersJointAttnProcessor)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        return run_layers(
            self.layers,
            lambda layers: self.run(layers, attn, hidden_states, encoder_hidden_states),
            lambda: self.base(attn, hidden_states, encoder_hidden_states, attention_mask),
        )

    def run(self, layers: Sequence[AddedLayer], attn: Any, x: Tensor, context: Tensor | None) -> Any:
        split = x.shape[1]
        q, k, v = _heads(attn, x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        head_dim = q.shape[-1]
        inputs = {"sample": (x, x)}
        if context is not None:
            added = _heads(
                attn, context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            )
            q, k, v = (torch.cat(pair, 1) for pair in zip((q, k, v), added, strict=True))
            inputs["context"] = (context, context)
        q, k, v = widen(q, k, v, layers, inputs)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5).transpose(1, 2)
        z, parts = narrow(z.to(q.dtype), head_dim, layers)
        out = add_output(attn.to_out[0](z[:, :split]), [p[:, :split] for p in parts], layers, "sample")
        out = attn.to_out[1](out)
        if context is None:
            return out
        rest = z[:, split:]
        if not attn.context_pre_only:
            rest = add_output(attn.to_add_out(rest), [p[:, split:] for p in parts], layers, "context")
        return out, rest


def _same_as_flux(suffix: str) -> tuple[type, ...]:
    """Classes of other models that are FLUX's attention, or its processor, line by line; those that are installed."""
    found = []
    for file, name in (
        ("flux", "Flux"),
        ("flux2", "Flux2"),
        ("bria", "Bria"),
        ("bria_fibo", "BriaFibo"),
        ("ovis_image", "OvisImage"),
        ("longcat_image", "LongCatImage"),
    ):
        path = f"diffusers.models.transformers.transformer_{file}"
        if importlib.util.find_spec(path) is not None:
            found.append(getattr(importlib.import_module(path), name + suffix))
    return tuple(found)


FLUX = _same_as_flux("Attention")


class FluxProcessor(AddedProcessor):
    """For ``FluxAttention``: text tokens first, query-key norms and a rotary embedding before the product."""

    bases = _same_as_flux("AttnProcessor")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return run_layers(
            self.layers,
            lambda layers: self.run(
                layers, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            ),
            lambda: self.base(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb),
        )

    def run(
        self,
        layers: Sequence[AddedLayer],
        attn: Any,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        rotary: Any,
    ) -> Any:
        q, k, v = _heads(attn, x, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        head_dim = q.shape[-1]
        inputs = {"sample": (x, x)}
        if context is not None and attn.added_kv_proj_dim is not None:
            added = _heads(
                attn, context, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k
            )
            q, k, v = (torch.cat(pair, 1) for pair in zip(added, (q, k, v), strict=True))
            inputs = {"context": (context, context), **inputs}
        if rotary is not None:
            q = apply_rotary_emb(q, rotary, sequence_dim=1)
            k = apply_rotary_emb(k, rotary, sequence_dim=1)
        q, k, v = widen(q, k, v, layers, inputs)
        z = dispatch_attention_fn(
            q,
            k,
            v,
            attn_mask=mask,
            scale=head_dim**-0.5,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        z, parts = narrow(z.to(q.dtype), head_dim, layers)
        if context is None:
            # The output projection belongs to the block: the added output goes through it with the rest.
            return add_output(z, parts, layers, "sample")
        split = context.shape[1]
        out = attn.to_out[1](
            add_output(attn.to_out[0](z[:, split:].contiguous()), [p[:, split:] for p in parts], layers, "sample")
        )
        rest = attn.to_add_out(z[:, :split].contiguous())
        return out, add_output(rest, [p[:, :split] for p in parts], layers, "context")


def _heads(
    attn: Any, x: Tensor, to_q: nn.Module, to_k: nn.Module, to_v: nn.Module, norm_q: Any, norm_k: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized queries and keys, and values: (B, N, H, d) each."""
    q, k, v = (project(x).unflatten(-1, (attn.heads, -1)) for project in (to_q, to_k, to_v))
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


FAMILIES: tuple[type[AddedProcessor], ...] = (ClassicProcessor, JointProcessor, FluxProcessor)


def family_of_processor(attn: Any, processor: Any) -> type[AddedProcessor] | None:
    """What runs this layer in the place of its processor, or None where nothing here can."""
    own = FluxProcessor if isinstance(attn, FLUX) else None
    for family in FAMILIES:
        if type(processor) in family.bases and (own is None) == (family is not FluxProcessor):
            return family
    return None
