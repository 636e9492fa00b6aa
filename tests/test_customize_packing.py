"""Format 2 of adapter files: nf4, and layers whose heads have different numbers of components."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comcat import customize
from comcat.customize.files.encoding import products_error
from comcat.customize.files.layer_factors import PARTS, by_layer, set_side, sides
from comcat.customize.files.numbers import decode_rows, encode_rows, row_bytes
from comcat.customize.files.restoring import restore_adapter
from comcat.errors import CheckpointError
from comcat.linalg.products import even_shares
from diffusion import changed, fill, inputs, metadata, model, output, pipeline

STORAGES = ("float32", "float16", "bfloat16", "int8", "nf4")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prune(adapter: Any, seed: int = 0) -> None:
    """Zero some components of some heads on both sides; one layer loses all of them."""
    generator = torch.Generator().manual_seed(seed)
    state = adapter.state_dict()
    for number, ((component, layer), added) in enumerate(adapter.layers.items()):
        own = by_layer(state, component, layer)
        for part, kinds in PARTS.items():
            left, right = sides(own, part, added.rank)
            mask = torch.rand(left.shape[0], 1, added.rank, generator=generator) < (0.5 if number else 0)
            set_side(own, kinds[0], left * mask, added.rank)
            set_side(own, kinds[1], right * mask, added.rank)
        for name, tensor in own.items():
            state[f"{component}.{layer}.{name}"].copy_(tensor)


# Numbers


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("width", [1, 2, 127, 128, 131, 259])
def test_rows_come_back(storage: Any, width: int) -> None:
    rows = random(5, width).float()
    rows[1] = 0
    content = encode_rows(rows, storage)
    assert content.shape == (5, row_bytes(width, storage))
    assert content.dtype == torch.uint8
    found = decode_rows(content, width, storage).float()
    assert found.shape == rows.shape
    largest = {"float32": 0.0, "float16": 1e-3, "bfloat16": 1e-2, "int8": 0.02, "nf4": 0.2}[storage]
    assert float((found - rows).norm() / rows.norm()) <= largest
    assert not found[1].any()
    again = encode_rows(found, storage)  # what is on the grid stays there
    torch.testing.assert_close(decode_rows(again, width, storage).float(), found, rtol=2e-3, atol=1e-6)


def test_an_outlier_costs_its_own_group_only() -> None:
    rows = random(1, 256).float()
    plain = decode_rows(encode_rows(rows, "nf4"), 256, "nf4")
    rows[0, 3] = 1000
    found = decode_rows(encode_rows(rows, "nf4"), 256, "nf4")
    assert torch.equal(found[0, 128:], plain[0, 128:])
    assert not torch.equal(found[0, :128], plain[0, :128])


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 7])
def test_even_shares_are_the_same_product_and_the_least_error(rank: int) -> None:
    left, right = random(3, 11, rank), random(3, 5, rank, seed=1)
    right[1] *= 1e-4
    L, R = even_shares(left, right)
    torch.testing.assert_close(L @ R.mT, left @ right.mT)
    sizes = L.norm(dim=1) * R.norm(dim=1)
    values = torch.linalg.svdvals(left @ right.mT)
    torch.testing.assert_close(sizes, (values.sum(-1, keepdim=True) / rank).expand_as(sizes))
    assert (sizes.square().sum(-1) <= (left.norm(dim=1) * right.norm(dim=1)).square().sum(-1) * (1 + 1e-9)).all()


def test_even_shares_use_active_columns_alone() -> None:
    left, right = random(4, 11, 5), random(4, 7, 5, seed=1)
    active = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    left, right = left * active[:, None], right * active[:, None]
    L, R = even_shares(left, right, active)
    torch.testing.assert_close(L @ R.mT, left @ right.mT)
    assert [int(h.ne(0).any(0).sum()) for h in L] == active.sum(1).tolist()
    waiting = torch.zeros_like(right)
    L, R = even_shares(left, waiting)  # nothing is added yet: the side that is not zero must stay
    assert torch.equal(L, left)
    assert torch.equal(R, waiting)


# Files


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_components_that_do_nothing_take_no_bytes(name: str, storage: Any, tmp_path: Path) -> None:
    m = model(name, torch.float32)
    adapter = fill(customize.add_adapter(m, rank=3, name="dog"))
    customize.save_adapter(m, tmp_path / "whole.safetensors", storage=storage)
    prune(adapter)
    path = customize.save_adapter(m, tmp_path / "x.safetensors", storage=storage)
    state, wanted = adapter.state_dict(), output(m, inputs(m, torch.float32))
    adapter.remove()
    assert path.stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
    found = metadata(path)
    assert found["format"] == 2
    key, part = next(iter(found["components"].items()))
    layers = [layer.removeprefix(f"{key}.") for layer in load_file(path)]
    assert set(layers) == set(part["layers"])
    assert len(layers) == len({n for _, n in adapter.layers}) - 1
    again = customize.load_adapter(m, path)
    header, tensors = customize.read_adapter(path)
    before = {n: t for n, t in state.items() if n.removeprefix(f"{key}.").rpartition(".")[0]}
    largest = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 0.03, "nf4": 0.25}[storage]
    full = copy.deepcopy(header)
    for layer, entry in full.components[key].layers.items():
        object.__setattr__(entry, "rank", adapter.layers[key, layer].rank)
    assert products_error(full, before, tensors) < largest
    if storage == "float32":
        torch.testing.assert_close(output(m, inputs(m, torch.float32)), wanted, rtol=1e-3, atol=1e-4)
    second = customize.save_adapter(m, tmp_path / "y.safetensors", storage=storage)
    assert metadata(second)["components"] == found["components"]
    again.remove()


def test_ranks_of_a_pruned_layer_are_those_of_its_largest_head(tmp_path: Path) -> None:
    m = model("sd1", torch.float32)
    adapter = fill(customize.add_adapter(m, rank=4, targets="mid_block", name="dog"))
    for (component, layer), added in adapter.layers.items():
        own = by_layer(adapter.state_dict(), component, layer)
        for part, kinds in PARTS.items():
            for kind, matrix in zip(kinds, sides(own, part, added.rank), strict=True):
                matrix = matrix.clone()
                matrix[0, :, 1:], matrix[1, :, 2:] = 0, 0
                set_side(own, kind, matrix, added.rank)
        for name, tensor in own.items():
            adapter.state_dict()[f"{component}.{layer}.{name}"].copy_(tensor)
    path = customize.save_adapter(m, tmp_path / "x.safetensors", storage="nf4")
    adapter.remove()
    for entry in metadata(path)["components"]["unet"]["layers"].values():
        assert entry["rank"] == 2
        assert entry["packing"]["kept"] == {"qk": [1, 2], "vo": [1, 2]}
    assert {layer.rank for layer in customize.load_adapter(m, path).layers.values()} == {2}


def test_tokens_and_biases_come_back_in_nf4(tmp_path: Path) -> None:
    pipe = pipeline("sd1")
    adapter = fill(customize.add_adapter(pipe, rank=2, text_encoder_rank=2, token="V*", name="dog"))
    path = customize.save_adapter(pipe, tmp_path / "x.safetensors", storage="nf4")
    vectors = adapter.token.vectors["text_encoder"].detach().clone()
    adapter.remove()
    again = customize.load_adapter(pipe, path)
    assert {component for component, _ in again.layers} == {"unet", "text_encoder"}
    assert torch.equal(again.token.vectors["text_encoder"], vectors.half().float())
    again.remove()
    assert restore_adapter(path, tmp_path / "y.safetensors", "float16") < 1e-2
    assert metadata(tmp_path / "y.safetensors")["format"] == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(rank=3), "bytes, not"),
        (lambda e: e.update(rank=0), "at least 1"),
        (lambda e: e["packing"].update(heads=0), "at least 1"),
        (lambda e: e["packing"].update(heads=2**62), "left out"),
        (lambda e: e["packing"].update(widths={}), "at least 1"),
        (lambda e: e["packing"]["widths"].update(sample=[20, 20, -1]), "at least 1"),
        (lambda e: e["packing"]["widths"].update(sample=[20, 17, 20]), "bytes, not"),
        (lambda e: e["packing"].update(kept={"qk": [2, 2]}), "cannot have"),
        (lambda e: e["packing"].update(kept={"qk": [2, 3], "vo": [2, 2]}), "cannot have"),
        (lambda e: e["packing"].update(kept={"qk": [2, -1], "vo": [2, 2]}), "cannot have"),
        (lambda e: e["packing"].update(kept={"qk": [1, 2], "vo": [2, 2]}), "bytes, not"),
        (lambda e: e["packing"].update(more=1), "more is not known"),
        (lambda e: e.pop("packing"), "packed in format 2"),
    ],
)
def test_a_packing_that_cannot_be_is_refused(tmp_path: Path, edit: Any, message: str) -> None:
    m = model("sd1", torch.float32)
    fill(customize.add_adapter(m, rank=2, targets="mid_block", name="dog"))
    path = customize.save_adapter(m, tmp_path / "x.safetensors", storage="nf4")
    changed(path, lambda data, _: edit(next(iter(data["components"]["unet"]["layers"].values()))))
    with pytest.raises(CheckpointError, match=message):
        customize.read_adapter(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d, t: t.popitem(), "are missing"),
        (lambda d, t: t.update(x=torch.zeros(3, dtype=torch.uint8)), r"do not speak of x"),
        (lambda d, t: t.update({next(iter(t)): next(iter(t.values()))[:-1]}), "bytes, not"),
        (lambda d, t: t.update({next(iter(t)): next(iter(t.values())).view(torch.int8)}), "bytes, not"),
        (lambda d, t: d.update(format=1), "packed in format 2"),
        (lambda d, t: d.update(format=3), r"has format 3 .*reads up to 2; upgrade"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(tmp_path: Path, edit: Any, message: str) -> None:
    m = model("sd1", torch.float32)
    fill(customize.add_adapter(m, rank=2, targets="mid_block", name="dog"))
    path = changed(customize.save_adapter(m, tmp_path / "x.safetensors", storage="nf4"), edit)
    with pytest.raises(CheckpointError, match=message):
        customize.read_adapter(path)
