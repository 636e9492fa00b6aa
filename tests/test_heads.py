"""The one description of an attention layer: weights per head, wherever a host keeps them."""

import torch
from torch import Tensor, nn

from comcat.layers.heads import Heads, HeadWeights, Stream, unwrapped
from comcat.nn.added import AddedProduct

H, d, D, D_out, r = 3, 5, 13, 11, 2


class Wrapped(nn.Module):
    """A linear layer as PEFT wraps it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.base_layer = linear


def layer(**linears: nn.Module) -> nn.Module:
    found = nn.Module()
    for name in "qkv":
        found.add_module(name, linears.get(name) or nn.Linear(D, H * d, bias=name == "v"))
    return found


def added(layer: nn.Module, x: Tensor, output: nn.Module | None = None) -> tuple[HeadWeights, Tensor]:
    stream = Stream.separate("sample", "q", "k", "v", None, inner=output is not None)
    weights = HeadWeights.of(layer, Heads.of(H, d), stream, output)
    values = torch.einsum("nD,hdD->nhd", x, weights.value)
    return weights, values if weights.value_bias is None else values + weights.value_bias


def test_wrapped_projections_are_those_inside() -> None:
    plain = layer()
    wrapped = layer(**{name: Wrapped(module) for name, module in plain.named_children()})
    x = torch.randn(7, D)
    (one, values), (other, again) = added(plain, x), added(wrapped, x)
    assert unwrapped(wrapped.q) is plain.q
    for name in ("query", "key", "value", "value_bias"):
        assert getattr(one, name).data_ptr() == getattr(other, name).data_ptr()
    torch.testing.assert_close(values.flatten(1), plain.get_submodule("v")(x))
    torch.testing.assert_close(again, values)


def test_a_result_that_is_not_used_has_an_output_of_no_columns() -> None:
    weights, _ = added(layer(), torch.randn(7, D))
    assert weights.output.shape == (H, d, 0)
    assert weights.output_bias is None


def test_an_output_of_the_block_has_the_heads_first() -> None:
    proj, rest = nn.Linear(H * d + 17, D_out), torch.randn(7, 17)
    x = torch.randn(7, D)
    weights, values = added(layer(), x, proj)
    assert weights.output.shape == (H, d, D_out)
    out = torch.einsum("nhd,hdo->no", values, weights.output) + rest @ proj.weight[:, H * d :].mT + weights.output_bias
    torch.testing.assert_close(out, proj(torch.cat([values.flatten(1), rest], 1)))


def test_what_is_added_has_weights_per_head_too() -> None:
    product = AddedProduct(D, D, D_out, H, r, value_bias=True)
    for parameter in product.parameters():
        nn.init.normal_(parameter)
    weights = HeadWeights.of(product, Heads.of(H, r), Stream.separate("added", "query", "key", "value", "output"))
    x, y = torch.randn(1, 7, D), torch.randn(1, 9, D)
    q, k, v = product.project(x, y, 1.0)
    torch.testing.assert_close(q, torch.einsum("bnD,hrD->bnhr", x, weights.query))
    torch.testing.assert_close(k, torch.einsum("bnD,hrD->bnhr", y, weights.key))
    assert weights.value_bias is not None
    torch.testing.assert_close(v, torch.einsum("bnD,hrD->bnhr", y, weights.value) + weights.value_bias)
    assert product.output is not None
    torch.testing.assert_close(product.output(v.flatten(2)), torch.einsum("bnhr,hro->bno", v, weights.output))
