"""Shapes alone: what is built on the meta device is the model, but for its values."""

import pytest
import torch

from comcat.models.source import Source

ARGS = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 3, "depth": 2}


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", ARGS),
        ("vit_base_patch16_siglip_224", ARGS),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 6, "num_heads": (2, 3), "depths": (1, 2), "img_size": 56}),
    ],
)
def test_shapes_are_those_of_the_model(name: str, args: dict) -> None:
    before = torch.get_rng_state()
    shapes, model = Source(name, args).build(meta=True), Source(name, args).build()
    assert torch.equal(torch.get_rng_state(), before)
    found = {key: (t.shape, t.dtype) for key, t in shapes.state_dict().items()}
    assert found == {key: (t.shape, t.dtype) for key, t in model.state_dict().items()}
    assert all(p.is_meta for p in shapes.parameters())
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in model.parameters())
    assert any(p.std() > 0 for p in model.parameters())
