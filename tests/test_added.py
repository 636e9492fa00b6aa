"""One fused call is Eq. 8 written out, in every attention layer that products go into."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from conftest import randomize

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models import attention_processor as ap
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor

from comcat import customize
from comcat.nn.added import AddedLayer, AddedProduct, Strength, narrow, widen
from diffusion import fill, text_encoder

F64 = torch.float64
SCALES = {"one": 0.7, "two": -1.3}


class Tokens(NamedTuple):
    """What one stream of tokens brings into an attention: q, k, v of (B, N, H, d), and what they come from."""

    stream: str
    q: Tensor
    k: Tensor
    v: Tensor
    x_q: Tensor
    x_kv: Tensor


def heads_of(linear: nn.Module, x: Tensor, heads: int) -> Tensor:
    projected: Tensor = linear(x)
    return projected.unflatten(-1, (heads, -1))


def eq8(
    streams: Sequence[Tokens], layers: Sequence[AddedLayer], scale: float, mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """softmax(scale (q k^T + sum s q' k'^T) + mask) times v, and times s v' of every adapter, head by head."""
    q, k, v = (torch.cat([getattr(s, part) for s in streams], 1) for part in "qkv")
    heads = q.shape[2]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    added = []
    for layer in layers:
        s = layer.strength.value
        factors = [layer[stream.stream] for stream in streams]
        q1 = torch.cat([heads_of(f.query, t.x_q, heads) for f, t in zip(factors, streams, strict=True)], 1)
        k1 = torch.cat([heads_of(f.key, t.x_kv, heads) for f, t in zip(factors, streams, strict=True)], 1)
        v1 = torch.cat([heads_of(f.value, t.x_kv, heads) for f, t in zip(factors, streams, strict=True)], 1)
        scores = scores + s * torch.einsum("bnhr,bmhr->bhnm", q1, k1)
        added.append(s * v1)
    scores = scale * scores if mask is None else scale * scores + mask
    p = scores.softmax(-1)
    out, *parts = (torch.einsum("bhnm,bmhd->bnhd", p, values).flatten(2) for values in (v, *added))
    return out, parts


def with_output(out: Tensor, parts: list[Tensor], layers: Sequence[AddedLayer], stream: str) -> Tensor:
    for part, layer in zip(parts, layers, strict=True):
        product = layer[stream].output
        assert product is not None
        out = out + part @ product.weight.T
    return out


class Holder(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn


def adapted(attn: Any) -> list[AddedLayer]:
    """Two adapters, of ranks 3 and 2, on an attention layer."""
    holder = Holder(randomize(attn).to(F64).eval().requires_grad_(False))
    handles = [
        fill(customize.add_adapter(holder, rank=rank, name=name, scale=SCALES[name]), seed)
        for seed, (name, rank) in enumerate((("one", 3), ("two", 2)))
    ]
    return [next(iter(handle.layers.values())) for handle in handles]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def classic(attn: Any, layers: Sequence[AddedLayer], x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
    residual, image = x, x.shape
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    if context is not None and attn.norm_cross is not None:
        context = attn.norm_cross(context)
    c = x if context is None else context
    q, k, v = (heads_of(f, t, attn.heads) for f, t in ((attn.to_q, x), (attn.to_k, c), (attn.to_v, c)))
    fused = isinstance(attn.processor, ap.AttnProcessor2_0)
    if attn.norm_q is not None and fused:
        q, k = attn.norm_q(q), attn.norm_k(k)
    # AttnProcessor2_0 knows no other scale.
    scale = q.shape[-1] ** -0.5 if fused else attn.scale
    z, parts = eq8([Tokens("sample", q, k, v, x, c)], layers, scale, None if mask is None else mask.unsqueeze(1))
    out = with_output(attn.to_out[0](z), parts, layers, "sample")
    out = out.transpose(1, 2).reshape(image) if residual.ndim == 4 else out
    return (out + residual if attn.residual_connection else out) / attn.rescale_output_factor


PROCESSORS: dict[str, Callable[[], Any]] = {
    "fused": ap.AttnProcessor2_0,
    "plain": ap.AttnProcessor,
    "sliced": lambda: ap.SlicedAttnProcessor(3),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("context", [None, 11])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_classic(processor: str, context: int | None, masked: bool) -> None:
    attn = ap.Attention(14, context, 2, dim_head=7, bias=True, processor=PROCESSORS[processor]())
    layers = adapted(attn)
    x = noise(2, 5, 14)
    c = None if context is None else noise(2, 3, context, seed=2)
    mask = None
    if masked:
        mask = noise(2, 1, 5 if c is None else 3, seed=3)
        mask[1, :, -1] = -10000.0
    with torch.no_grad():
        torch.testing.assert_close(attn(x, c, mask), classic(attn, layers, x, c, mask), atol=1e-10, rtol=0)


ODD: dict[str, tuple[dict[str, Any], bool]] = {
    "group norm": ({"norm_num_groups": 7}, False),
    "image": ({"norm_num_groups": 7, "residual_connection": True, "rescale_output_factor": 1.3}, True),
    "residual": ({"residual_connection": True, "rescale_output_factor": 0.7}, False),
    "other output": ({"out_dim": 21}, False),
    "upcast": ({"upcast_attention": True, "upcast_softmax": True}, False),
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("case", ODD)
def test_classic_odd(case: str, processor: str) -> None:
    args, image = ODD[case]
    attn = ap.Attention(14, heads=2, dim_head=7, processor=PROCESSORS[processor](), **args)
    layers = adapted(attn)
    x = noise(2, 14, 3, 2) if image else noise(2, 5, 14)
    atol = 1e-6 if "upcast_softmax" in args and processor != "fused" else 1e-10  # in float32
    with torch.no_grad():
        torch.testing.assert_close(attn(x), classic(attn, layers, x, None, None), atol=atol, rtol=0)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("args", [{"qk_norm": "rms_norm"}, {"qk_norm": "layer_norm"}, {"scale_qk": False}], ids=str)
def test_scale_and_norms_are_those_of_the_base_processor(args: dict[str, Any], processor: str) -> None:
    attn = ap.Attention(14, heads=2, dim_head=7, processor=PROCESSORS[processor](), **args)
    layers = adapted(attn)
    x = noise(2, 5, 14)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), classic(attn, layers, x, None, None), atol=1e-10, rtol=0)
        own = attn.processor(attn, x)
        for layer in layers:
            layer.strength.scale = 1e-30  # on, and without any effect
        torch.testing.assert_close(attn(x), own, atol=1e-10, rtol=0)


def test_normalized_context() -> None:
    attn = ap.Attention(14, 11, heads=2, dim_head=7, cross_attention_norm="layer_norm")
    layers = adapted(attn)
    x, c = noise(2, 5, 14), noise(2, 3, 11, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(attn(x, c), classic(attn, layers, x, c, None), atol=1e-10, rtol=0)


def joint_tokens(attn: Any, x: Tensor, context: Tensor) -> tuple[Tokens, Tokens]:
    q, k, v = (heads_of(f, x, attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
    cq, ck, cv = (heads_of(f, context, attn.heads) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    if attn.norm_q is not None:
        q, k, cq, ck = attn.norm_q(q), attn.norm_k(k), attn.norm_added_q(cq), attn.norm_added_k(ck)
    return Tokens("sample", q, k, v, x, x), Tokens("context", cq, ck, cv, context, context)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", [None, "rms_norm"])
def test_joint(norm: str | None, last: bool) -> None:
    attn = ap.Attention(
        14, None, 3, dim_head=5, added_kv_proj_dim=11, context_pre_only=last, out_dim=15, out_context_dim=13,
        bias=True, qk_norm=norm, processor=ap.JointAttnProcessor2_0(),
    )  # fmt: skip
    layers = adapted(attn)
    x, c = noise(2, 6, 14), noise(2, 4, 11, seed=2)
    with torch.no_grad():
        out, rest = attn(x, c)
        z, parts = eq8(joint_tokens(attn, x, c), layers, 5**-0.5)
        expected = with_output(attn.to_out[0](z[:, :6]), [p[:, :6] for p in parts], layers, "sample")
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
        expected = z[:, 6:]
        if not last:
            expected = with_output(attn.to_add_out(expected), [p[:, 6:] for p in parts], layers, "context")
        torch.testing.assert_close(rest, expected, atol=1e-10, rtol=0)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, N, H, d): neighbours turn by an angle, in float32 as diffusers has it."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    quarter = torch.stack([-b, a], -1).flatten(-2)
    return (x.float() * cos.unsqueeze(1) + quarter * sin.unsqueeze(1)).to(x.dtype)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("single", [False, True])
def test_flux(single: bool, masked: bool) -> None:
    context_dim = None if single else 11
    attn = FluxAttention(
        14, 3, 10, bias=True, added_kv_proj_dim=context_dim, context_pre_only=None if single else False,
        pre_only=single, out_dim=30, eps=1e-6, processor=FluxAttnProcessor(),
    )  # fmt: skip
    if not single:
        attn.to_add_out = nn.Linear(30, 13)
    layers = adapted(attn)
    x, c = noise(2, 6, 14), None if single else noise(2, 4, 11, seed=2)
    count = 6 if single else 10
    angles = noise(count, 5, seed=3).float().repeat_interleave(2, -1)
    cos, sin = angles.cos(), angles.sin()
    mask = noise(2, 1, 1, count, seed=4) if masked else None
    with torch.no_grad():
        found = attn(x, c, attention_mask=mask, image_rotary_emb=(cos, sin))
        if c is None:
            q, k, v = (heads_of(f, x, 3) for f in (attn.to_q, attn.to_k, attn.to_v))
            tokens = [Tokens("sample", attn.norm_q(q), attn.norm_k(k), v, x, x)]
        else:
            tokens = list(reversed(joint_tokens(attn, x, c)))
        turned, start = [], 0
        for t in tokens:
            part = slice(start, start := start + t.q.shape[1])
            turned.append(t._replace(q=rotated(t.q, cos[part], sin[part]), k=rotated(t.k, cos[part], sin[part])))
        z, parts = eq8(turned, layers, 10**-0.5, mask)
        if single:
            torch.testing.assert_close(found, with_output(z, parts, layers, "sample"), atol=1e-10, rtol=0)
            return
        out = with_output(attn.to_out[0](z[:, 4:]), [p[:, 4:] for p in parts], layers, "sample")
        rest = with_output(attn.to_add_out(z[:, :4]), [p[:, :4] for p in parts], layers, "context")
        torch.testing.assert_close(found, (out, rest), atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_clip(implementation: str) -> None:
    encoder = text_encoder(attn_implementation=implementation).to(F64)
    attn = encoder.encoder.layers[0].self_attn
    holder = type("Pipe", (), {"unet": Holder(ap.Attention(14, heads=2, dim_head=7)), "text_encoder": encoder})()
    for seed, (name, rank) in enumerate((("one", 3), ("two", 2))):
        fill(customize.add_adapter(holder, name=name, scale=SCALES[name], text_encoder_rank=rank), seed)
    layers = list(attn.extras.values())
    x = noise(2, 7, 15)
    mask = torch.full((7, 7), -torch.inf, dtype=F64).triu(1)
    with torch.no_grad():
        given = {"is_causal": True} if implementation == "sdpa" else {"attention_mask": mask}
        found, weights = attn(x, **given)
        q, k, v = (heads_of(f, x, 3) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        z, parts = eq8([Tokens("sample", q, k, v, x, x)], layers, 5**-0.5, mask)
        expected = with_output(attn.out_proj(z), parts, layers, "sample")
    # transformers takes the softmax in float32 where it writes it out
    torch.testing.assert_close(found, expected, atol=1e-10 if implementation == "sdpa" else 1e-5, rtol=0)
    assert (weights is None) == (implementation == "sdpa")


@pytest.mark.parametrize(("width", "ranks"), [(7, (2, 3)), (8, ()), (5, (3,)), (64, (1,))])
def test_widths_are_multiples_of_eight_and_come_apart_again(width: int, ranks: tuple[int, ...]) -> None:
    q, k, v = (noise(2, 5, 3, width, seed=i) for i in range(3))
    x = noise(2, 5, 11)
    layers = [AddedLayer({"sample": AddedProduct(11, 11, 13, 3, rank, dtype=F64)}, rank, Strength()) for rank in ranks]
    for layer in layers:
        layer["sample"].reset_parameters(torch.Generator().manual_seed(0))
    wide = widen(q, k, v, layers, {"sample": (x, x)})
    assert {t.shape[-1] % 8 for t in wide} == {0}
    assert {t.shape[-1] for t in wide} == {-(-(width + sum(ranks)) // 8) * 8}
    z, parts = narrow(wide[2], width, layers)
    assert torch.equal(z, v.flatten(2))
    for layer, part in zip(layers, parts, strict=True):
        assert torch.equal(part, layer["sample"].value(x))


def test_start_is_the_same_for_the_same_seed_and_of_unit_size() -> None:
    first, second, other = (AddedProduct(101, 211, 13, 3, 5) for _ in range(3))
    for product, seed in ((first, 0), (second, 0), (other, 1)):
        product.reset_parameters(torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.query.weight, other.query.weight)
    assert first.is_zero()
    assert first.output is not None
    assert not first.output.weight.any()
    x = torch.randn(50, 101, generator=torch.Generator().manual_seed(2))
    assert 0.9 < first.query(x).std() < 1.1
    first.output.weight.data[0, 0] = 1
    assert not first.is_zero()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_full_precision_products_beside_a_half_precision_layer(dtype: torch.dtype) -> None:
    product = AddedProduct(11, 13, 5, 3, 2)
    product.reset_parameters()
    x_q, x_kv = noise(2, 5, 11).to(dtype), noise(2, 7, 13).to(dtype)
    q, k, v = product.project(x_q, x_kv, 0.5)
    assert (q.dtype, k.dtype, v.dtype) == (dtype,) * 3
    assert torch.equal(q, (product.query(x_q.float()).to(dtype) * 0.5).unflatten(-1, (3, 2)))
