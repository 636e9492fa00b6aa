"""The narrow attention: one fused call whatever the widths, the original temperature, masks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from comcat.layers.heads import Heads, HeadWeights, Stream, flatten_heads, gram, is_identity
from comcat.models.profile import FUSED
from comcat.nn.low_rank_attention import LowRankAttention, attend
from conftest import randomize

B, H, N, D, OUT = 2, 3, 7, 13, 11
WIDTHS = [(5, 5), (2, 5), (5, 2), (1, 4), (4, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    scores = scale * q @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ v


def boolean() -> Tensor:
    return (normal(N, N, seed=4) > -0.5).logical_or(torch.eye(N, dtype=torch.bool))


MASKS = {"none": None, "boolean": boolean(), "additive": normal(N, N, seed=4), "per head": normal(B, H, N, N, seed=5)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("qk", "vo"), WIDTHS)
def test_attend_is_attention(qk: int, vo: int, mask: str) -> None:
    q, k, v = normal(B, H, N, qk), normal(B, H, N, qk, seed=1), normal(B, H, N, vo, seed=2)
    out = attend(q, k, v, 0.7, MASKS[mask])
    assert out.shape == (B, H, N, vo)
    torch.testing.assert_close(out, by_hand(q, k, v, 0.7, MASKS[mask]))


def test_attend_causally() -> None:
    q, k, v = normal(B, H, N, 2), normal(B, H, N, 2, seed=1), normal(B, H, N, 5, seed=2)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v, 0.7, is_causal=True), by_hand(q, k, v, 0.7, causal))


@pytest.mark.parametrize(("qk", "vo"), WIDTHS)
def test_attend_is_one_fused_call(qk: int, vo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append([t.shape[-1] for t in args[:3]])
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    attend(normal(B, H, N, qk), normal(B, H, N, qk), normal(B, H, N, vo), 1.0)
    assert calls == [[max(qk, vo)] * 3]


def layer(qk: int, vo: int, **args: Any) -> LowRankAttention:
    made = LowRankAttention(D, H, head_dim=5, qk_rank=qk, vo_rank=vo, scale=5**-0.5, dim_out=OUT, **args)
    return randomize(made).double().eval()


@pytest.mark.parametrize(("qk", "vo"), WIDTHS)
def test_the_layer_is_the_sum_over_its_heads(qk: int, vo: int) -> None:
    made, x = layer(qk, vo), normal(B, N, D)
    weight, bias = made.qkv.weight, made.qkv.bias
    out = made.proj.bias.expand(B, N, OUT)
    for h in range(H):
        rows = [slice(h * qk, (h + 1) * qk), slice((H + h) * qk, (H + h + 1) * qk)]
        rows.append(slice(2 * H * qk + h * vo, 2 * H * qk + (h + 1) * vo))
        q, k, v = (x @ weight[r].mT + bias[r] for r in rows)
        out = out + by_hand(q, k, v, 5**-0.5) @ made.proj.weight[:, h * vo : (h + 1) * vo].mT
    torch.testing.assert_close(made(x), out)


def test_the_key_bias_does_not_matter() -> None:
    made, x = layer(2, 3), normal(B, N, D)
    expected = made(x)
    made.qkv.bias.data[2 * H : 4 * H] += 100 * normal(2 * H)
    torch.testing.assert_close(made(x), expected)
    made.qkv.bias.data[: 2 * H] += 1
    assert not torch.allclose(made(x), expected)


def test_the_temperature_is_that_of_the_original_width() -> None:
    made, x = layer(2, 3), normal(B, N, D)
    expected = made(x)
    made.scale = 2**-0.5
    assert not torch.allclose(made(x), expected, atol=1e-3)


def test_norms_and_gate_are_applied() -> None:
    x = normal(B, N, D)
    plain, normed = layer(5, 5), layer(5, 5, q_norm=nn.LayerNorm(5), k_norm=nn.LayerNorm(5), norm=nn.LayerNorm(15))
    gated = layer(5, 5, gate=nn.Linear(D, 15))
    for other in (normed, gated):
        other.load_state_dict(plain.state_dict(), strict=False)
        assert not torch.allclose(other(x), plain(x), atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_biases_are_optional(bias: bool) -> None:
    made = layer(2, 3, qkv_bias=bias, proj_bias=bias)
    assert (made.qkv.bias is not None) == (made.proj.bias is not None) == bias
    assert made(normal(B, N, D)).shape == (B, N, OUT)


@pytest.mark.parametrize(("qk", "vo"), WIDTHS)
def test_the_arithmetic_is_what_the_ranks_say(qk: int, vo: int) -> None:
    made = layer(qk, vo)
    with FlopCounterMode(display=False, custom_mapping=FUSED) as counter, torch.no_grad():
        made(normal(1, N, D))
    inner = H * (2 * qk + vo)
    assert counter.get_total_flops() // 2 == N * (D * inner + H * vo * OUT) + 2 * N * N * H * max(qk, vo)


def test_dropout_only_while_training() -> None:
    made, x = layer(2, 3, attn_drop=0.5), normal(B, N, D)
    assert torch.equal(made(x), made(x))
    made.train()
    assert not torch.equal(made(x), made(x))


# -- the per-head view ------------------------------------------------------------------------------------------------


def head_weights(qkv: nn.Linear, proj: nn.Linear, num_heads: int) -> HeadWeights:
    module = nn.ModuleDict({"qkv": qkv, "proj": proj})
    return HeadWeights.of(module, Heads.of(num_heads, qkv.out_features // 3 // num_heads), Stream.fused("qkv", "proj"))


def test_head_weights_are_slices_of_the_fused_layers() -> None:
    qkv, proj = randomize(nn.Linear(D, 3 * H * 5)), randomize(nn.Linear(H * 5, OUT))
    heads = head_weights(qkv, proj, H)
    rows = qkv.weight.detach()
    for h in range(H):
        for i, weight in enumerate((heads.query, heads.key, heads.value)):
            assert torch.equal(weight[h], rows[(i * H + h) * 5 : (i * H + h + 1) * 5])
        assert torch.equal(heads.output[h], proj.weight.detach()[:, 5 * h : 5 * h + 5].mT)
    assert torch.equal(flatten_heads(heads.value), rows[2 * H * 5 :])
    assert torch.equal(heads.value_bias.flatten(), qkv.bias.detach()[2 * H * 5 :])
    assert torch.equal(heads.query_bias.flatten(), qkv.bias.detach()[: H * 5])


def test_head_weights_without_biases() -> None:
    heads = head_weights(nn.Linear(D, 3 * H * 5, bias=False), nn.Linear(H * 5, OUT, bias=False), H)
    assert heads.query_bias is heads.value_bias is heads.output_bias is None


def test_free_moments_are_grams_in_float64() -> None:
    heads = head_weights(nn.Linear(D, 3 * H * 5), nn.Linear(H * 5, OUT), H)
    for moment, weight in zip(heads.free_moments(), (heads.query, heads.key, heads.value), strict=True):
        assert moment.dtype == torch.float64
        torch.testing.assert_close(moment, gram(weight))
        torch.testing.assert_close(moment[1], weight[1].double() @ weight[1].double().mT)


@pytest.mark.parametrize(("module", "expected"), [(None, True), (nn.Identity(), True), (nn.LayerNorm(3), False)])
def test_is_identity(module: nn.Module | None, expected: bool) -> None:
    assert is_identity(module) is expected
