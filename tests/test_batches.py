"""Models that are called with more than images: batches as processors deliver them, from the statistics to a plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

import comcat
import transformers_hosts
from comcat.errors import CalibrationError, PlanError
from comcat.models.batches import Batch, batch_of
from conftest import randomize

pytestmark = pytest.mark.usefixtures("no_source")
BUDGET = comcat.Budget(params=0.8)


def inputs(count: int, tokens: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        "pixel_values": torch.randn(count, 3, 14, 14, generator=generator),
        "input_ids": torch.randint(0, 22, (count, tokens), generator=generator),
        "attention_mask": torch.ones(count, tokens, dtype=torch.int64),
        "labels": torch.zeros(count, dtype=torch.int64),
    }


def patches(*grids: tuple[int, int]) -> dict[str, Tensor]:
    """Images of these grids for a tower of Qwen2-VL with patches of 7 by 7."""
    count = sum(a * b for a, b in grids)
    rows = torch.randn(count, 3 * 2 * 49, generator=torch.Generator().manual_seed(count))
    return {"hidden_states": rows, "grid_thw": torch.tensor([[1, *grid] for grid in grids])}


def tower() -> nn.Module:
    sizes = {"embed_dim": 24, "hidden_size": 24, "num_heads": 3, "depth": 2, "patch_size": 7}
    return Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**sizes))


class Pair(nn.Module):
    """Wants two images, and nothing that comcat could guess."""

    def __init__(self) -> None:
        super().__init__()
        self.body = transformers_hosts.HOSTS["vit"]()

    def forward(self, left: Tensor, right: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.body(left).logits - scale * self.body(right).logits


def pairs(count: int) -> dict[str, Tensor]:
    x = torch.randn(2, count, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    return {"left": x[0], "right": x[1]}


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any]]] = {
    "dictionaries": (transformers_hosts.HOSTS["clip"], [inputs(4), inputs(3)]),
    "of a processor": (transformers_hosts.HOSTS["clip"], [BatchFeature(inputs(4)), BatchFeature(inputs(3))]),
    "arguments": (transformers_hosts.HOSTS["clip"], [((), inputs(4)), ((), inputs(3))]),
    "patches in a row": (tower, [patches((2, 4), (2, 4), (2, 4)), patches(*[(2, 4)] * 4)]),
    "of one's own": (Pair, [pairs(4), pairs(3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_from_calibration_to_a_model(name: str, tmp_path: Path) -> None:
    """Statistics are those of a model called by hand; probing and another process need nothing else."""
    build, batches = CASES[name]
    model = randomize(build()).eval()
    found = comcat.calibrate(model, batches, fisher=True)
    assert (found.num_images, len(found.sample), len(found.images)) == (7, 7, 0)
    layers = comcat.prepare(model, example=batches[0]).inventory.layers
    assert set(found.moments) == {layer.name for layer in layers}
    first = next(layer for layer in layers if layer.kind == "ffn")
    seen: list[Tensor] = []
    handle = first.linears["fc1"].register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            made = batch_of(batch, model)
            model(*made.call[0], **made.call[1])
    handle.remove()
    torch.testing.assert_close(
        found.moments[first.name]["x_mean"].float(), torch.cat(seen).mean(0), atol=1e-4, rtol=1e-4
    )
    for layer in layers:  # gradients reach what follows from tokens of text, too
        assert set(layer.gradient_shapes()) <= set(found.moments[layer.name]) or layer.kind == "classifier"
    found.save(tmp_path / "calibration.safetensors")
    again = comcat.Calibration.load(tmp_path / "calibration.safetensors")
    for method in ("spectrum", "probe"):
        plan = comcat.plan(model, BUDGET, again, method)
        assert plan.layers == comcat.plan(model, BUDGET, found, method).layers
    small = comcat.compress(model, plan, again)
    made = batch_of(batches[0], model)
    small(*made.call[0], **made.call[1])


def test_held_out_inputs_choose_the_method() -> None:
    model = randomize(Pair()).eval()
    found = comcat.calibrate(model, [pairs(260)], held_out=1, probe_images=3)
    assert found.unseen is not None
    assert (len(found.unseen), len(found.sample)) == (1, 3)
    assert "divergence_uniform" in comcat.plan(model, BUDGET, found).estimate


def test_images_under_any_name_go_to_the_model_alone() -> None:
    """What a data set has beside them is of no use to a model of images."""
    model = transformers_hosts.make("vit")
    x = inputs(2)["pixel_values"]
    for batch in ({"pixel_values": x, "image_id": [3, 4]}, {"image": x, "labels": torch.zeros(2)}, (x, torch.zeros(2))):
        made = batch_of(batch, model)
        assert made.alone
        assert torch.equal(made.pixels, x)


def test_patches_that_a_model_takes_in_place_of_images() -> None:
    """As NaFlex models of timm: the dictionary calls them otherwise than forward does."""

    class Flexible(nn.Module):
        def forward(self, x: Tensor, patch_coord: Tensor | None = None) -> Tensor:
            return x

    rows, places = torch.randn(2, 5, 7), torch.zeros(2, 5, 2, dtype=torch.int64)
    made = batch_of({"patches": rows, "patch_coord": places, "seq_len": 5}, Flexible())
    assert set(made.tensors) == {"0", "patch_coord"}
    assert torch.equal(made.run(Flexible()), rows)


def test_single_images_of_rows_of_all() -> None:
    batch = Batch(patches((1, 2), (3, 4), (1, 5)))
    assert batch.rows == {"hidden_states": [2, 12, 5], "grid_thw": [1, 1, 1]}
    last, first = batch.kept([2]), batch.kept([0])
    assert torch.equal(last.tensors["hidden_states"], batch.tensors["hidden_states"][14:])
    assert len(Batch.joined([last, first])) == 2
    assert [len(part) for part in batch.split(2)] == [2, 1]


def test_inputs_that_cannot_be_told_apart_are_not_kept() -> None:
    """Statistics count them; nothing is probed with."""

    class Grouped(Pair):
        def forward(self, left: Tensor, right: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(left, right) + table.mean()

    model = randomize(Grouped()).eval()
    batch = {**pairs(4), "table": torch.randn(3, 2)}
    found = comcat.calibrate(model, [batch, batch], fisher=True)
    assert (found.num_images, len(found.sample)) == (8, 0)
    with pytest.raises(PlanError, match="measures on images"):
        comcat.plan(comcat.prepare(model, example=batch), BUDGET, found, "probe")
    assert comcat.plan(comcat.prepare(model, example=batch), BUDGET, found).method == "spectrum"


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"left": torch.randn(2, 3, 14, 14)}, r"batch 0 is a dictionary of left, but the forward of Pair needs right"),
        ({"length": torch.zeros(2)}, r"dictionary of length, but the forward of Pair needs left, right"),
        ({}, r"dictionary of nothing, but the forward of Pair needs left, right"),
        ({**pairs(2), "scale": 2.0}, r"'scale' as a float; give tensors"),
        (
            {"left": torch.zeros(2, 1).long(), "right": torch.zeros(2, 1).long()},
            "floating-point images that Pair takes",
        ),
        ({**pairs(2), "right": torch.randn(0, 3, 14, 14)}, r"'right' of shape \(0, 3, 14, 14\)"),
        ({**pairs(2), "right": torch.randn(2, 3, 14, 14).to_sparse()}, "'right' as a sparse tensor"),
        ((torch.randn(2, 3, 14, 14), {"right": torch.randn(2, 3, 14, 14)}), r"give \(args, kwargs\)"),
        ({**pairs(2), "right": torch.randn(2, 3, 7, 14)}, "does not run on images"),
        ({**pairs(2), "left": torch.full((2, 3, 14, 14), torch.nan)}, None),
    ],
)
def test_batches_that_do_not_fit(batch: Any, message: str | None) -> None:
    model = randomize(Pair()).eval()
    with pytest.raises((CalibrationError, comcat.ModelError), match=message or "NaN or infinite"):
        comcat.calibrate(model, [batch])


def test_files_of_inputs_are_of_a_newer_format(tmp_path: Path) -> None:
    """Earlier versions read the others, and refuse these by their format."""
    model = transformers_hosts.make("vit")
    for batch, format in (((inputs(2)["pixel_values"]), b'"format": 1'), (pairs(2), b'"format": 2')):
        host = model if isinstance(batch, Tensor) else randomize(Pair()).eval()
        comcat.calibrate(host, [batch]).save(tmp_path / "c.safetensors")
        assert format.replace(b'"', b'\\"') in (tmp_path / "c.safetensors").read_bytes()
