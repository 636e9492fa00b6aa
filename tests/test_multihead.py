"""The stand-in for ``nn.MultiheadAttention`` computes what the original does, in every way it can be called."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat.hosts.attention_structure import attention_of
from comcat.hosts.lifted import lifted
from comcat.models.modes import evaluating
from comcat.nn.multihead import SeparateMultihead
from conftest import assert_same_outputs, randomize


def layer(**args: Any) -> nn.MultiheadAttention:
    made = nn.MultiheadAttention(15, 3, **args)
    randomize(made)
    return made.double().eval()


def inputs(made: nn.MultiheadAttention, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((7, made.embed_dim), (11, made.kdim), (11, made.vdim))
    found = [torch.randn(batch, n, d, generator=generator, dtype=torch.float64) for n, d in sizes]
    q, k, v = found if made.batch_first else [x.transpose(0, 1) for x in found]
    return q, k, v


@pytest.mark.parametrize("args", [{}, {"batch_first": True}, {"kdim": 5, "vdim": 13}, {"bias": False}])
@pytest.mark.parametrize("call", ["plain", "weights", "by head", "padding", "mask", "mask by head", "added"])
def test_calls(args: dict[str, Any], call: str) -> None:
    made = layer(**args)
    form = lifted(made)
    assert isinstance(form, SeparateMultihead)
    generator = torch.Generator().manual_seed(4)
    out = torch.rand(6, 7, 11, generator=generator) > 0.7
    out[..., 0] = False  # nothing is without any key
    options: dict[str, Any] = {
        "plain": {"need_weights": False},
        "weights": {},
        "by head": {"average_attn_weights": False},
        "padding": {"key_padding_mask": out[:2, 0], "need_weights": False},
        "mask": {"attn_mask": out[0], "need_weights": False},
        "mask by head": {"attn_mask": out},
        "added": {"attn_mask": out[0].double().mul(-3), "key_padding_mask": out[:2, 0].double().mul(-2)},
    }[call]
    expected, got = made(*inputs(made), **options), form(*inputs(made), **options)
    assert_same_outputs(got[0], expected[0])
    assert (got[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert_same_outputs(got[1], expected[1])


def test_causal_and_single_sequences() -> None:
    made = layer()
    form = lifted(made)
    assert isinstance(form, SeparateMultihead)
    x = inputs(made)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    assert_same_outputs(form(x, x, x, **options)[0], made(x, x, x, **options)[0])
    assert_same_outputs(form(x[:, 0], x[:, 0], x[:, 0])[0], made(x[:, 0], x[:, 0], x[:, 0])[0])
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        form(x, x, x, is_causal=True)


@pytest.mark.parametrize("args", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_one_more_token_is_refused_by_name(args: dict[str, Any]) -> None:
    found = attention_of("attn", layer(**args))
    assert isinstance(found, str)
    assert next(iter(args)) in found


class Tokens(nn.Module):
    """PyTorch's own encoder on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 7, 7)
        one = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.encoder(self.stem(x).flatten(2).mT).mean(1))
        return found


def test_the_encoder_layer_of_pytorch() -> None:
    """Its fast path reads weights; a reduced layer does not take it, and nothing else is other than before."""
    model = randomize(Tokens()).double().eval()
    x = torch.randn(3, 3, 28, 21, dtype=torch.float64)
    prepared = comcat.prepare(model, example=x)
    kinds = sorted(layer.kind for layer in prepared.inventory.layers)
    assert kinds == ["attention", "attention", "ffn", "ffn", "head"]
    with torch.no_grad():
        small = comcat.compress(prepared, comcat.full_rank_plan(prepared))
        assert_same_outputs(small(x), model(x))
    ffn = [layer.name for layer in prepared.inventory.layers if layer.kind == "ffn"]
    low = comcat.compress(prepared, comcat.Plan({name: {"fc1": 5, "fc2": 7} for name in ffn}))
    with torch.no_grad():
        fast = copy.deepcopy(low)(x)
    assert_same_outputs(fast, low(x).detach())


def test_packing_by_the_encoder_of_pytorch_is_refused_by_name() -> None:
    with pytest.raises(comcat.ModelError, match="use_nested_tensor = False"):
        _ = lifted(layer()).in_proj_weight  # type: ignore[union-attr]


def test_the_fast_paths_are_on_again_behind_the_last_thread() -> None:
    """PyTorch has one switch for all threads: each of two that overlap would put back what it found."""
    host = nn.TransformerEncoderLayer(10, 2, 7, batch_first=True)
    first, second = evaluating(host), evaluating(copy.deepcopy(host))
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        assert not torch.backends.mha.get_fastpath_enabled()
        other.submit(second.__exit__, None, None, None).result()
    assert torch.backends.mha.get_fastpath_enabled()
    with contextlib.suppress(ValueError), evaluating(host):
        assert not torch.backends.mha.get_fastpath_enabled()
        raise ValueError
    assert torch.backends.mha.get_fastpath_enabled()
