"""A mask: the strength of a product, token by token of the picture."""

from typing import Any

import pytest
import torch
from torch import Tensor

from comcat.errors import DataError
from comcat.nn.added import AddedLayer, AddedProduct, Strength, add_output, narrow, widen
from comcat.nn.masks import Mask, TokenGrid, overlap, resized

F64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# Onto a grid


@pytest.mark.parametrize("size", [(7, 11), (3, 2), (1, 1), (13, 5), (14, 22), (29, 31)])
def test_area(size: tuple[int, int]) -> None:
    """The mean stays, and so does what is the same everywhere; whole cells are averaged."""
    values = random(7, 11).sigmoid()
    found = resized(values, *size)
    assert found.shape == size
    torch.testing.assert_close(found.mean(), values.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(resized(torch.full((7, 11), 0.3), *size), torch.full(size, 0.3, dtype=F64))
    assert (overlap(7, size[0]).sum(1) == 7).all()
    assert (resized(torch.ones(7, 11), *size) == 1).all()
    assert values.min() - 1e-12 <= found.min() <= found.max() <= values.max() + 1e-12


def test_area_of_whole_cells() -> None:
    values = random(6, 8)
    torch.testing.assert_close(resized(values, 6, 8), values)
    torch.testing.assert_close(resized(values, 3, 2), values.unflatten(0, (3, 2)).unflatten(2, (2, 4)).mean((1, 3)))
    torch.testing.assert_close(resized(values, 12, 24), values.repeat_interleave(2, 0).repeat_interleave(3, 1))


# In a layer


class Picture:
    """A canvas of a given size, behind so many other tokens."""

    def __init__(self, *before: int, size: tuple[int, int] = (2, 3), frames: int = 1) -> None:
        self.before, self.size, self.frames = before or (0,), size, frames

    def describe(self) -> str:
        return "3 x 2"

    def grid(self, tokens: int) -> TokenGrid:
        return TokenGrid(self.frames, *self.size, self.before)


def layer(rank: int, scale: float, mask: Tensor | None, canvas: Any, seed: int, **streams: Any) -> AddedLayer:
    products = {name: AddedProduct(5, 5, dim, 2, rank, dtype=F64) for name, dim in (streams or {"sample": 7}).items()}
    for product in products.values():
        for i, parameter in enumerate(product.parameters()):
            parameter.data.copy_(random(*parameter.shape, seed=97 * seed + i))
            seed += 1
    found = AddedLayer(products, rank, Strength(scale))
    found.mask = None if mask is None else Mask(mask, canvas, "dog")
    return found


def attend(layers: list[AddedLayer], q: Tensor, k: Tensor, v: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What is added to the output of each stream, and the base's output of the heads: (B, N, H d) under "z"."""
    width = q.shape[-1]
    q, k, v = (t.transpose(1, 2) for t in widen(q, k, v, layers, inputs))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=width**-0.5).transpose(1, 2)
    z, parts = narrow(z, width, layers)
    found, start = {"z": z}, 0
    for name, (x_q, _) in inputs.items():
        own = slice(start, start := start + x_q.shape[1])
        found[name] = add_output(torch.zeros(2, x_q.shape[1], 7, dtype=F64), [p[:, own] for p in parts], layers, name)
    return found


def test_every_query_has_its_own_strength() -> None:
    """Token by token, the layer with masks is the layer without, at the strengths that the masks have there."""
    masks = [random(2, 3, seed=i).sigmoid() for i in range(2)]
    masks[0][0, 1], masks[1][1] = 0, 1
    q, k, v = random(2, 6, 2, 3), random(2, 4, 2, 3, seed=1), random(2, 4, 2, 3, seed=2)
    inputs = {"sample": (random(2, 6, 5, seed=3), random(2, 4, 5, seed=4))}
    given: Any = ((3, 0.7), (2, -1.3))
    found = attend([layer(r, s, masks[i], Picture(), i) for i, (r, s) in enumerate(given)], q, k, v, inputs)
    for token in range(6):
        here = [layer(r, s * masks[i].flatten()[token].item(), None, None, i) for i, (r, s) in enumerate(given)]
        expected = attend(here, q, k, v, inputs)
        for name in ("z", "sample"):
            torch.testing.assert_close(found[name][:, token], expected[name][:, token], rtol=1e-12, atol=1e-12)


def test_other_streams_are_not_masked() -> None:
    q, k, v = (random(2, 10, 2, 3, seed=i) for i in range(3))
    inputs = {"context": (random(2, 4, 5, seed=3),) * 2, "sample": (random(2, 6, 5, seed=4),) * 2}
    streams = {"sample": 7, "context": 7}
    mask = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    found = attend([layer(3, 0.7, mask, Picture(), 0, **streams)], q, k, v, inputs)
    bare = attend([layer(3, 0.7, None, None, 0, **streams)], q, k, v, inputs)
    off = attend([layer(3, 0.0, None, None, 0, **streams)], q, k, v, inputs)
    torch.testing.assert_close(found["context"], bare["context"])
    torch.testing.assert_close(found["sample"][:, :2], bare["sample"][:, :2])
    assert not found["sample"][:, 2:].any()
    torch.testing.assert_close(found["z"][:, 6:], off["z"][:, 6:])
    assert not torch.allclose(bare["z"][:, 6:], off["z"][:, 6:])


def test_one_stream_for_all() -> None:
    """Text in front of the picture, of another length in every sample; behind it, what is left over; frames."""
    mask = Mask(torch.tensor([[0.5, 0.0, 1.0], [0.25, 0.0, 0.0]], dtype=F64), Picture(1, 3), "dog")
    row = [0.5, 0, 1, 0.25, 0, 0]
    found = mask.weights(10, torch.zeros(1))
    assert found.dtype == torch.float32
    assert found.tolist() == [[1, *row, 1, 1, 1], [1, 1, 1, *row, 1]]
    mask.canvas = Picture(frames=2)
    assert mask.weights(13, torch.zeros(1)).tolist() == [[*row, *row, 1]]
    with torch.inference_mode():
        kept = mask.weights(14, torch.zeros(1))
    assert not kept.is_inference()
    assert mask.weights(14, torch.zeros(1)) is kept


def test_another_shape_is_refused() -> None:
    mask = Mask(torch.ones(4, 5), Picture(), "dog")
    with pytest.raises(DataError, match=r"mask of 'dog' is 5 x 4 pixels \(width x height\), and the picture 3 x 2"):
        mask.weights(6, torch.zeros(1))
    mask.values = torch.ones(200, 301)  # rounded to whole pixels
    assert mask.weights(6, torch.zeros(1)).shape == (1, 6)
