"""ComfyUI's attention layers with added products: what takes the place of a layer's ``forward``.

    q_cat = [q, s m q'],  k_cat = [k, k'],  v_cat = [v, s v'],  W_o,cat = [W_o; m A_o]

in one call of ComfyUI's own attention (xFormers, SDPA, split, whichever it has chosen). That call scales scores by the
width it sees; the queries are multiplied by what is missing to the width of the base's heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from comcat.errors import DataError
from comcat.nn.added import AddedLayer, add_output, narrow, widen
from comcat.nn.masks import TokenGrid

PIXELS = 8  # to a latent


class UnetCanvas:
    """The picture as ComfyUI tells its layers of it: the latents' size, and the present block's."""

    def __init__(self) -> None:
        self.size = (0, 0)
        self.block = (0, 0)

    def look(self, options: dict[str, Any]) -> None:
        shapes = options.get("original_shape"), options.get("activations_shape")
        if shapes[0] is None or shapes[1] is None:
            raise DataError("masks need a ComfyUI that tells attention layers the shape of the picture; update it")
        self.size, self.block = (tuple(shape[-2:]) for shape in shapes)

    def describe(self) -> str:
        return f"{self.size[1] * PIXELS} x {self.size[0] * PIXELS}"

    def grid(self, tokens: int) -> TokenGrid:
        height, width = self.block
        if height * width != tokens:
            raise DataError(f"a layer sees {tokens} tokens, and the picture there has {height} x {width}: no mask fits")
        return TokenGrid(1, height, width)


class PatchedAttention:
    """``forward`` of an attention layer with the products of any number of adapters."""

    def __init__(self, attn: Any, layers: Sequence[AddedLayer]) -> None:
        self.attn = attn
        self.layers = list(layers)

    def widened(self, x: Tensor, context: Tensor, value: Tensor, projections: Sequence[Any]) -> Any:
        """q, k, v of (B, N, H w), the width of a head before, and the products that are on."""
        on = [layer for layer in self.layers if layer.strength.value != 0]
        for layer in on:
            layer.to(x.device, x.dtype)
        heads = self.attn.heads
        inputs = (x, context, value)
        q, k, v = (project(t).unflatten(-1, (heads, -1)) for project, t in zip(projections, inputs, strict=True))
        width = q.shape[-1]
        wide_q, wide_k, wide_v = widen(q, k, v, on, {"sample": (x, context)})
        if value is not context:  # a hypernetwork has changed one of them
            wide_v = widen(q, k, v, on, {"sample": (x, value)})[2]
        wide_q = wide_q * (wide_q.shape[-1] / width) ** 0.5
        return *(t.flatten(2) for t in (wide_q, wide_k, wide_v)), width, on

    def outputs(self, z: Tensor, width: int, on: Sequence[AddedLayer], output: Any) -> Tensor:
        z, parts = narrow(z.unflatten(-1, (self.attn.heads, -1)), width, on)
        return add_output(output(z), parts, on, "sample")


class UnetAttention(PatchedAttention):
    """For ``CrossAttention`` of a UNet."""

    def __call__(
        self,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        from comfy.ldm.modules import attention

        attn, options = self.attn, transformer_options or {}
        for layer in self.layers:
            if layer.mask is not None:
                layer.mask.canvas.look(options)  # type: ignore[attr-defined]
        context = x if context is None else context
        value = context if value is None else value
        q, k, v, width, on = self.widened(x, context, value, (attn.to_q, attn.to_k, attn.to_v))
        more = {"attn_precision": attn.attn_precision, "transformer_options": options}
        if mask is None:
            z = attention.optimized_attention(q, k, v, attn.heads, **more)
        else:
            z = attention.optimized_attention_masked(q, k, v, attn.heads, mask, **more)
        return self.outputs(z, width, on, attn.to_out)


class ClipAttention(PatchedAttention):
    """For ``CLIPAttention`` of a text encoder."""

    def __call__(self, x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None) -> Tensor:
        attn = self.attn
        q, k, v, width, on = self.widened(x, x, x, (attn.q_proj, attn.k_proj, attn.v_proj))
        return self.outputs(optimized_attention(q, k, v, attn.heads, mask), width, on, attn.out_proj)
