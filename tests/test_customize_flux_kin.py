"""FLUX's attention under the names of other models."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comcat import customize
from diffusion import fill, randomize

H, d, D, D_context, N, M = 3, 10, 17, 13, 7, 5

KIN = [
    (file, name, blocks)
    for file, name in (
        ("flux", "Flux"),
        ("bria", "Bria"),
        ("bria_fibo", "BriaFibo"),
        ("ovis_image", "OvisImage"),
        ("longcat_image", "LongCatImage"),
        ("flux2", "Flux2"),
    )
    for blocks in ("double", "single")
    if (file, blocks) != ("flux2", "single")
]


@pytest.mark.parametrize(("file", "name", "blocks"), KIN)
@torch.no_grad()
def test_the_host_s_arithmetic_with_products_beside_it(file: str, name: str, blocks: str) -> None:
    source = pytest.importorskip(f"diffusers.models.transformers.transformer_{file}")
    double = blocks == "double"
    arguments: dict[str, Any] = {"added_kv_proj_dim": D_context} if double else {"pre_only": True}
    attn: Any = getattr(source, f"{name}Attention")(query_dim=D, heads=H, dim_head=d, eps=1e-6, **arguments)
    model = randomize(nn.ModuleDict({"attn": attn})).double().eval()
    x, context = torch.randn(2, N, D).double(), torch.randn(2, M, D_context).double()
    rotary = tuple(torch.randn(N + M * double, d).double() for _ in range(2))

    def run() -> torch.Tensor:
        out = attn(x, context if double else None, image_rotary_emb=rotary)
        return torch.cat(out, 1) if double else out

    base = run()
    adapter = customize.add_adapter(model)
    ((layer, products),) = adapter.layers.items()
    assert layer == ("transformer", "attn")
    assert list(products.streams) == (["sample", "context"] if double else ["sample"])
    assert torch.equal(run(), base)
    products._started = True  # products of zero, computed all the same
    torch.testing.assert_close(run(), base, rtol=1e-12, atol=1e-12)
    fill(adapter)
    assert (run() - base).abs().amax(-1).min() > 1e-3  # of every token
    adapter.remove()
    assert torch.equal(run(), base)
