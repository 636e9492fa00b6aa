"""Statistics equal a direct computation, whatever the batches, and collecting them leaves no trace in the model."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import comcat
from comcat.calibration.sampling import Reservoir
from comcat.errors import CalibrationError, ModelError
from comcat.hosts import find_layers
from comcat.layers.cost import Shape
from comcat.layers.recording import Moment
from comcat.models.batches import Batch
from conftest import calibrated, images, make, swin, vit

ATTN, MLP = "blocks.1.attn", "blocks.1.mlp"


def covariance(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(0)
    return rows.mT @ rows / len(rows)


def record(model: nn.Module, x: Tensor, *names: str) -> list[tuple[Tensor, Tensor]]:
    """Input and output of the named modules."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, out, n=n: seen.update({n: (a[0], out)}))
        for n in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return [seen[n] for n in names]


def same(a: comcat.Calibration, b: comcat.Calibration, **tolerance: float) -> None:
    assert a.moments.keys() == b.moments.keys()
    for site, moments in a.moments.items():
        assert moments.keys() == b.moments[site].keys()
        for name, tensor in moments.items():
            torch.testing.assert_close(tensor, b.moments[site][name], **tolerance)


def check_direct(model: nn.Module, site: str, mlp: str, head: str) -> None:
    x = images(model, 23)
    found = comcat.calibrate(model, [x])
    (_, qkv), (z, _), (ffn, _), (hidden, _), (pooled, _) = record(
        model, x, f"{site}.qkv", f"{site}.proj", f"{mlp}.fc1", f"{mlp}.fc2", head
    )
    m = found.moments[site]
    heads = model.get_submodule(site).num_heads
    q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(-3)  # (sequences, tokens, heads, d)
    for h in range(heads):
        rows = q[..., h, :].flatten(0, 1)
        torch.testing.assert_close(m["q"][h], rows.mT @ rows / len(rows))
        centred = (k - k.mean(1, keepdim=True))[..., h, :].flatten(0, 1)
        torch.testing.assert_close(m["k"][h], centred.mT @ centred / len(centred))
    for moments, name, rows in (
        (m, "z", z),
        (found.moments[mlp], "x", ffn),
        (found.moments[mlp], "h", hidden),
        (found.moments[head], "x", pooled),
    ):
        rows = rows.flatten(0, -2)
        torch.testing.assert_close(moments[name], covariance(rows))
        torch.testing.assert_close(moments[f"{name}_mean"], rows.mean(0))
        assert moments[name].dtype == torch.float64
    assert found.shapes[site] == Shape(z[..., 0].numel() // len(x), z.shape[1])
    assert found.shapes[head].tokens == 1


def test_moments_equal_a_direct_computation() -> None:
    check_direct(vit(), ATTN, MLP, "head")


def test_keys_are_centred_within_their_window() -> None:
    check_direct(swin(), "layers.0.blocks.1.attn", "layers.0.blocks.1.mlp", "head.fc")


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [5, 7, 11], [22, 1]])
def test_moments_do_not_depend_on_the_batches(sizes: list[int]) -> None:
    model = vit()
    x = images(model, 23)
    same(comcat.calibrate(model, [x]), comcat.calibrate(model, x.split(sizes)), rtol=1e-9, atol=1e-12)


def test_batches_may_carry_labels_and_be_any_iterable() -> None:
    model = vit()
    x = images(model, 12)
    labelled = ((batch, torch.arange(4)) for batch in x.split(4))
    same(comcat.calibrate(model, labelled), comcat.calibrate(model, [x]))


def test_moments_in_float32_are_near_those_in_float64() -> None:
    model = vit()
    exact = calibrated(model).moments
    rough = calibrated(vit(dtype=torch.float32)).moments
    for site, moments in exact.items():
        for name, tensor in moments.items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(rough[site][name], tensor, rtol=0, atol=1e-4 * scale)


def test_a_large_mean_does_not_cancel() -> None:
    rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    moment = Moment()
    for batch in rows.split(100):
        moment.add(batch)
    torch.testing.assert_close(moment.covariance, covariance(rows.double()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moment.mean, rows.double().mean(0), rtol=1e-9, atol=0)


def test_fisher_adds_gradient_moments_and_keeps_the_others() -> None:
    model = vit()
    plain, fisher = calibrated(model), calibrated(model, fisher=True)
    assert fisher.fisher
    assert not plain.fisher
    for site, added in (
        (ATTN, {"out_grad", "qk_rows", "qk_cols"}),
        (MLP, {"fc1_grad", "fc2_grad"}),
        ("head", {"grad"}),
    ):
        assert set(fisher.moments[site]) - set(plain.moments[site]) == added
        for name in added:
            matrix = fisher.moments[site][name]
            assert torch.linalg.eigvalsh(matrix).amax() > 0
            assert torch.linalg.eigvalsh(matrix).amin() > -1e-9
        for name, tensor in plain.moments[site].items():
            torch.testing.assert_close(fisher.moments[site][name], tensor)


def test_fisher_of_the_classifier_is_that_of_the_softmax() -> None:
    """E over labels of (p - e_y)(p - e_y)^T is diag(p) - p p^T."""
    model = vit()
    x = images(model, 24)
    sampled = sum(comcat.calibrate(model, [x], fisher=True, seed=seed).moments["head"]["grad"] for seed in range(200))
    p = model(x).detach().softmax(-1)
    exact = torch.diag(p.mean(0)) - p.mT @ p / len(p)
    torch.testing.assert_close(sampled / 200, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224"])
def test_fisher_of_a_model_with_two_heads(name: str) -> None:
    from conftest import VIT

    model = make(name, **VIT).train()  # in training mode the model would return a pair
    model.set_distilled_training(True)
    assert {"head", "head_dist"} <= set(calibrated(model, fisher=True).moments)


@pytest.mark.parametrize("count", [3, 10, 40])
def test_the_image_sample_is_bounded(count: int) -> None:
    model = vit()
    x = images(model, count)
    found = comcat.calibrate(model, x.split(7), probe_images=10)
    assert (len(found.images), found.num_images) == (min(count, 10), count)
    assert found.input_size == (3, 14, 21)
    for image in found.images:
        assert any(torch.equal(image, other) for other in x)


def test_the_image_sample_is_uniform_and_seeded() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        reservoir = Reservoir(5, seed)
        for batch in torch.arange(20.0).split(3):
            reservoir.add(Batch.of_images(batch))
        kept = reservoir.joined()
        assert kept is not None
        counts[kept.pixels.long()] += 1
    assert counts.sum() == 2000
    assert (counts / 400 - 0.25).abs().max() < 0.1


def test_no_images_need_be_kept() -> None:
    model = vit()
    found = comcat.calibrate(model, [images(model)], probe_images=0)
    assert found.images.shape == (0, 3, 14, 21)


# -- no traces --------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> Any:
    return (
        {n: m.training for n, m in model.named_modules()},
        {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_calibration_leaves_no_trace(fisher: bool, fails: bool) -> None:
    model = vit().train()
    model.blocks[0].eval()
    model.norm.requires_grad_(False)
    before, weights = state(model), {n: t.clone() for n, t in model.state_dict().items()}
    batches = [images(model), torch.zeros(0)] if fails else [images(model)]
    x = batches[0].clone()
    if fails:
        with pytest.raises(CalibrationError):
            comcat.calibrate(model, batches, fisher=fisher)
    else:
        comcat.calibrate(model, batches, fisher=fisher)
    assert state(model) == before
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items())
    assert torch.equal(batches[0], x)
    assert not batches[0].requires_grad


def test_calibration_runs_in_evaluation_mode() -> None:
    noisy = vit(proj_drop_rate=0.5, drop_path_rate=0.5).train()
    same(calibrated(noisy), calibrated(vit()))


def test_progress_is_reported() -> None:
    model, seen = vit(), []
    comcat.calibrate(model, list(images(model, 6).split(2)), progress=lambda *args: seen.append(args))
    assert seen == [("calibrate", 1, 3), ("calibrate", 2, 3), ("calibrate", 3, 3)]
    seen.clear()
    comcat.calibrate(model, iter([images(model)]), progress=lambda *args: seen.append(args))
    assert seen == [("calibrate", 1, None)]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (lambda x: [], "no calibration images"),
        (lambda x: [x[0]], r"batch 0 must be a \(B, C, H, W\) tensor"),
        (lambda x: [x, "images"], "batch 1 must be .* not str"),
        (lambda x: [x, x[..., :14]], r"batch 1 holds images \(3, 14, 14\), but the first held \(3, 14, 21\)"),
        (lambda x: [x, x * float("nan")], "batch 1 holds NaN or infinite pixels"),
        (lambda x: [x / 0], "batch 0 holds NaN or infinite pixels"),
    ],
)
def test_bad_batches_are_refused(batches: Callable[[Tensor], Any], message: str) -> None:
    model = vit()
    with pytest.raises(CalibrationError, match=message):
        comcat.calibrate(model, batches(images(model)))


def test_infinite_activations_name_the_module() -> None:
    model = vit()
    with torch.no_grad():
        model.blocks[1].norm2.weight.mul_(float("inf")).nan_to_num_(posinf=1e300, neginf=-1e300)
        model.blocks[1].mlp.fc1.weight.mul_(1e300)
    with pytest.raises(CalibrationError, match=r"module 'blocks\.1\.mlp' produced NaN or infinite"):
        comcat.calibrate(model, [images(model)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_named(bad: float) -> None:
    model = vit()
    model.blocks[1].attn.proj.bias.data[3] = bad
    with pytest.raises(ModelError, match=r"'blocks\.1\.attn\.proj\.bias' holds NaN or infinite"):
        comcat.calibrate(model, [images(model)])


def test_a_layer_that_is_never_called_is_named() -> None:
    model = vit()
    model.blocks[0].unused = make(**{"img_size": 14, "patch_size": 7, "embed_dim": 8, "num_heads": 2, "depth": 1})
    with pytest.raises(CalibrationError, match=r"'blocks\.0\.unused\.blocks\.0\.attn' was never called"):
        comcat.calibrate(model, [images(model)])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": 1}, r"no statistics of 'blocks\.1\.attn'.*another model"),
        (
            {"embed_dim": 18},
            r"of 'blocks\.0\.attn' has 'q' of shape \(3, 6, 6\), the model needs \(3, 5, 5\).*another model",
        ),
        (
            {"mlp_ratio": 2.0},
            r"of 'blocks\.0\.mlp' has 'h' of shape \(30, 30\), the model needs \(17, 17\).*another model",
        ),
    ],
)
def test_the_calibration_of_another_model_is_refused(other: dict[str, Any], message: str) -> None:
    foreign = calibrated(vit(**other))
    model = vit()
    for use in (
        lambda: comcat.compress(model, comcat.full_rank_plan(model), foreign),
        lambda: comcat.plan(model, comcat.Budget(params=0.5), foreign),
        lambda: comcat.spectra(model, foreign),
    ):
        with pytest.raises(CalibrationError, match=message):
            use()


def test_the_calibration_of_a_model_with_other_heads_is_refused() -> None:
    foreign, model = calibrated(vit(num_heads=5)), vit()
    with pytest.raises(CalibrationError, match=r"blocks\.0\.attn.*another model"):
        comcat.compress(model, comcat.full_rank_plan(model), foreign)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", [False, True])
def test_a_saved_calibration_comes_back_bitwise(tmp_path: Any, fisher: bool) -> None:
    found = calibrated(vit(dtype=torch.float32), fisher=fisher, probe_images=5)
    found.probes["n=5"] = {"head/rank/3": 0.1 + 0.2}
    found.save(tmp_path / "new" / "c.safetensors")
    again = comcat.Calibration.load(tmp_path / "new" / "c.safetensors")
    same(found, again, rtol=0, atol=0)
    assert torch.equal(again.images, found.images)
    for name in ("shapes", "num_images", "input_size", "fisher", "probes"):
        assert getattr(again, name) == getattr(found, name)
        assert type(getattr(again, name)) is type(getattr(found, name))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["c.safetensors"]


def test_unreadable_calibrations_are_refused(tmp_path: Any) -> None:
    good, bad = tmp_path / "c.safetensors", tmp_path / "bad"
    calibrated(vit()).save(good)
    tensors = load_file(good)
    bad.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(CalibrationError, match="no safetensors file"):
        comcat.Calibration.load(bad)
    with pytest.raises(CalibrationError, match="cannot read calibration"):
        comcat.Calibration.load(tmp_path / "missing")
    save_file(tensors, bad)
    with pytest.raises(CalibrationError, match="not a comcat calibration"):
        comcat.Calibration.load(bad)
    save_file(tensors, bad, {"comcat_calibration": json.dumps({"format": 99})})
    with pytest.raises(CalibrationError, match="has format 99; upgrade comcat"):
        comcat.Calibration.load(bad)


def test_moments_move_and_the_original_stays() -> None:
    found = calibrated(vit())
    moved = found.to("meta")
    assert moved.moments[ATTN]["q"].is_meta
    assert not found.moments[ATTN]["q"].is_meta
    assert moved.images is found.images


def test_every_site_has_statistics() -> None:
    model = swin()
    found = calibrated(model)
    assert list(found.moments) == list(found.shapes) == [site.name for site in find_layers(model).layers]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3, 28, 28), r"does not run on images of size \(3, 28, 28\)"),
        (torch.zeros(2, 1, 14, 21), r"does not run on images of size \(1, 14, 21\)"),
        (torch.zeros(0, 3, 14, 21), "holds 0 images"),
        (torch.zeros(2, 3, 14, 21, dtype=torch.uint8), "2 images of torch.uint8; the model needs floating-point"),
        (torch.zeros(2, 3, 14, 21, device="meta"), "holds meta images"),
        (torch.zeros(2, 3, 14, 21).to_sparse(), "holds sparse images"),
        ((), "not an empty tuple"),
        ({"text": "a"}, "not a dictionary of text"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        comcat.calibrate(vit(), [batch])


def test_batches_may_be_dictionaries() -> None:
    model = vit()
    same(calibrated(model), comcat.calibrate(model, [{"labels": 0, "pixel_values": images(model, 96, seed=2)}]))


@pytest.mark.parametrize("meta", [{"format": 1}, {"shapes": {}}])
def test_incomplete_calibration_files_are_refused(tmp_path: Any, meta: dict[str, Any]) -> None:
    save_file({"images": torch.zeros(1)}, tmp_path / "c", {"comcat_calibration": json.dumps(meta)})
    with pytest.raises(CalibrationError):
        comcat.Calibration.load(tmp_path / "c")
