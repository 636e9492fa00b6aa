"""Outputs of every kind: what is inferred, losses that are not zero, models that return more than a tensor."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import comcat
from comcat.errors import DataError, ModelError, PlanError
from comcat.evaluation.outputs import KINDS, Draw, Outputs, bernoulli_kl, divergence
from conftest import calibrated, images, swin, vit

pytestmark = pytest.mark.usefixtures("no_source")


class Wrapped(nn.Module):
    """A model whose output another function makes into something else."""

    def __init__(self, model: nn.Module, change: Any, **attributes: Any) -> None:
        super().__init__()
        self.model, self.change = model, change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.change(self.model(x), x)


def segmenter(classes: int = 5, change: Any = lambda y: y, **args: Any) -> nn.Module:
    """Per-pixel logits from the last feature map."""
    body = vit(num_classes=0)
    torch.manual_seed(0)
    head = nn.Conv2d(15, classes, 1).double()

    def forward(_: Tensor, x: Tensor) -> Any:
        maps = body.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
        return change(F.interpolate(head(maps), size=x.shape[-2:]))

    model = Wrapped(body, forward, **args)
    model.head = head
    return model.eval()


MODELS = {
    "classes": (vit, "classes"),
    "one number": (lambda: vit(num_classes=1), "values"),
    "one number squeezed": (lambda: Wrapped(vit(num_classes=1), lambda y, _: y[:, 0]), "values"),
    "no classifier": (lambda: vit(num_classes=0), "features"),
    "logits in a dictionary": (
        lambda: Wrapped(vit(), lambda y, _: {"loss": None, "logits": y, "hidden_states": (y,)}),
        "classes",
    ),
    "nested features": (lambda: Wrapped(vit(), lambda y, _: {"a": (y[:, :3], [y[:, 3:]])}), "features"),
    "classes of a wrapper": (lambda: Wrapped(vit(), lambda y, _: y), "classes"),
    "an unknown width": (lambda: Wrapped(vit(), lambda y, _: y[:, :7]), "features"),
    "map": (lambda: segmenter(num_classes=5), "maps"),
    "map in a dictionary": (lambda: segmenter(change=lambda y: {"out": y, "aux": y}), "maps"),
    "map of unknown channels": (segmenter, "features"),
    "depth": (lambda: segmenter(1), "values"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_is_inferred_calibrated_planned_and_probed(name: str) -> None:
    make, kind = MODELS[name]
    model = make()
    rng = torch.get_rng_state()
    calibration = calibrated(model, 24, fisher=True, probe_images=5)
    assert calibration.outputs == kind
    assert all(bool(m["out_grad"].any()) for m in calibration.moments.values() if "out_grad" in m)
    for method in ("spectrum", "probe"):
        plan = comcat.plan(model, comcat.Budget(params=0.8), calibration, method)
        assert plan.layers
    assert plan.estimate["divergence"] > 0
    assert torch.equal(rng, torch.get_rng_state())


def test_feature_lists_of_swin_are_probed() -> None:
    import timm

    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=2, embed_dim=6, depths=(2, 2),
        num_heads=(2, 3), features_only=True,
    ).eval()  # fmt: skip
    calibration = comcat.calibrate(model, [torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))])
    assert calibration.outputs == "features"
    assert comcat.plan(model, comcat.Budget(params=0.9), calibration).method == "probe"


def test_several_labels_and_values_have_to_be_named() -> None:
    model = vit()
    for kind in ("labels", "values"):
        found = calibrated(model, 24, fisher=True, outputs=kind)
        assert found.outputs == kind
        assert bool(found.moments["head"]["grad"].any())
    with pytest.raises(ModelError, match="unknown kind of outputs 'logits'; choose from classes, labels"):
        calibrated(model, outputs="logits")
    with pytest.raises(ModelError, match="one class is no choice; say outputs='labels'"):
        calibrated(vit(num_classes=1), outputs="classes")
    with pytest.raises(ModelError, match=r"said to be maps, but the model returns \(32, 11\)"):
        calibrated(model, outputs="maps")


def test_transformers_name_their_problem() -> None:
    class Config:
        problem_type = "multi_label_classification"

    assert calibrated(Wrapped(vit(), lambda y, _: {"logits": y}, config=Config()), 24).outputs == "labels"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y, _: y.sum(), r"a tensor of shape \(\).*not one result an image for 32 images; wrap it"),
        (lambda y, _: {"classes": y.argmax(1)}, "classes of shape .* int64"),
        (lambda y, _: None, "returns NoneType, which holds no tensor"),
        (lambda y, _: y.repeat(2, 1), r"of shape \(64, 11\)"),
    ],
)
@pytest.mark.parametrize("fisher", [False, True])
def test_what_is_no_answer_is_refused(change: Any, message: str, fisher: bool) -> None:
    with pytest.raises(ModelError, match=message):
        calibrated(Wrapped(vit(), change), fisher=fisher)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_zero_at_the_dense_output_and_positive_elsewhere(kind: str) -> None:
    shape = (7, 3, 2, 5) if kind == "maps" else (7, 3)
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert divergence(kind, [dense], [dense]) == pytest.approx(0, abs=1e-12)
    assert divergence(kind, [dense], [dense.roll(1, 1)]) > 0.1


def test_divergences_have_their_units() -> None:
    dense = torch.randn(211, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
        [1, 7, 50]
    )
    mean = dense.mean(0).expand_as(dense)
    assert divergence("values", [dense], [mean]) == pytest.approx(1)  # of each output, whatever its unit
    assert divergence("features", [dense], [mean]) == pytest.approx(1)
    p, q = dense.sigmoid(), (dense + 1).sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(bernoulli_kl(dense + 1, dense)[:, 0], kl[:, 0])
    maps = dense.view(211, 3, 1, 1).expand(-1, -1, 2, 5)
    assert divergence("maps", [maps], [maps + maps.roll(1, 0)]) == pytest.approx(
        divergence("classes", [dense], [dense + dense.roll(1, 0)])
    )


@pytest.mark.parametrize("kind", ["values", "features", "labels", "classes"])
def test_drawn_gradients_are_those_of_the_divergence(kind: str) -> None:
    """The gradients' second moment is the Hessian: for values and features of the divergence, else of twice it."""
    model = nn.Identity()
    dense = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
        [1, 2, 3]
    )
    outputs = Outputs(model, kind)
    out = dense.clone().requires_grad_(True)
    loss = Draw(outputs, torch.Generator().manual_seed(1)).loss(outputs(out, len(out)))
    (gradient,) = torch.autograd.grad(loss, out)
    step = 1e-3 * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    expected = divergence(kind, [dense], [dense + step]) * (1 if kind in ("values", "features") else 2)
    assert float((gradient @ step).square().mean()) == pytest.approx(expected, rel=0.15)


def test_a_measure_that_tells_nothing_is_refused() -> None:
    model = vit()
    nn.init.zeros_(model.head.weight)
    calibration = calibrated(model, 24, fisher=True, probe_images=5)
    with pytest.raises(PlanError, match="divergence is zero at every cut"):
        comcat.plan(model, comcat.Budget(params=0.8), calibration, "probe", parts=["qk", "ffn"])
    with pytest.raises(PlanError, match="every gradient of the calibration, but the classifier's, is zero"):
        comcat.plan(model, comcat.Budget(params=0.8), calibration, "spectrum")
    with pytest.raises(PlanError, match="divergence is zero at every cut"):
        comcat.plan(model, comcat.Budget(params=0.8), calibration, "probe")
    for moments in calibration.moments.values():
        for name in moments:
            if name.endswith("grad") or name.startswith("qk_"):
                moments[name].zero_()
    with pytest.raises(PlanError, match=r"every gradient of the calibration is zero.*outputs="):
        comcat.plan(model, comcat.Budget(params=0.8), calibration, "spectrum")


# -- scores -----------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Answers from a table, in the order of the images."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        return self.table[: len(x)]


def test_scores_of_every_kind() -> None:
    x = torch.zeros(4, 3, 2, 2)
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    found = comcat.evaluate(Given(values), [(x, values + 1)])
    assert found.outputs == "values"
    assert found.metrics == pytest.approx({"r2": 1 - 4 / 14, "mae": 1.0})
    assert comcat.Evaluation.from_dict(found.to_dict()).to_dict() == found.to_dict()
    labels = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 0]])
    logits = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, -1.0], [-1.0, -2.0]])
    found = comcat.evaluate(Given(logits), [(x, labels)], outputs="labels")
    assert found.metrics["accuracy"] == 75.0
    assert found.metrics["mean_average_precision"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    found = comcat.evaluate(Given(logits), [(x, labels * 0)], outputs="labels")  # no image has a label: no precision
    assert set(found.to_dict()["metrics"]) == {"accuracy"}
    maps = torch.zeros(4, 3, 2, 2)
    maps[:, 1] = 1
    truth = torch.ones(4, 2, 2, dtype=torch.uint8)
    truth[0, 0, 0], truth[0, 0, 1] = 2, 255
    found = comcat.evaluate(Given(maps), [(x, truth)])
    assert (found.outputs, found.top1) == ("maps", 100 * 14 / 15)
    assert found.metrics["mean_iou"] == pytest.approx(100 * (14 / 15 + 0) / 2)


def test_agreement_of_features() -> None:
    model = vit(num_classes=0)
    found = comcat.agreement(model, model, [{"pixel_values": images(model)}])
    assert (found.outputs, found.kl, found.cosine) == ("features", 0, pytest.approx(1))
    assert set(found.to_dict()) == {"relative_error", "cosine", "neighbours", "images", "outputs"}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.eye(5)[:4], r"whole numbers of shape \(4,\), not \(4, 5\) float32. These look one-hot: .*argmax"),
        (torch.eye(5, dtype=torch.int64)[:4], "look one-hot"),
        (torch.zeros(4), r"not \(4,\) float32. Give class numbers"),
        (torch.zeros(4, dtype=torch.bool), "not .* bool"),
        (torch.zeros(4, 1, dtype=torch.int64), r"not \(4, 1\) int64"),
        (torch.zeros(3, dtype=torch.int64), "4 images and 3 labels"),
        (torch.full((4,), 5), "label 5 is none of the model's"),
        ([0, 1, 2, 3], "needed are batches of"),
    ],
)
def test_labels_that_are_no_class_numbers_are_refused(labels: Any, message: str) -> None:
    model = Given(torch.randn(4, 5))
    model.num_classes = 5
    with pytest.raises(DataError, match=message):
        comcat.evaluate(model, [(torch.zeros(4, 3, 2, 2), labels)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int8])
def test_narrow_class_numbers_are_taken(dtype: torch.dtype) -> None:
    found = comcat.evaluate(Given(torch.eye(4)), [(torch.zeros(4, 3, 2, 2), torch.arange(4).to(dtype))])
    assert found.top1 == 100


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (torch.zeros(2, 3, 14, 21, dtype=torch.uint8), DataError, "of torch.uint8; the model needs floating-point"),
        (torch.zeros(0, 3, 14, 21), DataError, "holds 0 images"),
        (torch.zeros(2, 3, 15, 21), ModelError, r"does not run on images of size \(3, 15, 21\)"),
    ],
)
def test_images_that_cannot_be_evaluated_are_refused(images: Tensor, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        comcat.evaluate(vit(), [(images, torch.zeros(len(images), dtype=torch.int64))])


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="there is no device 'cuda:77' here"):
        comcat.evaluate(vit(), [], device="cuda:77")


def test_models_in_models_say_their_size() -> None:
    assert comcat.profile(nn.Sequential(swin())).input_size == (3, 8, 8)
    features = vit(features_only=True, out_indices=(0, 1), dtype=torch.float32)
    assert comcat.profile(features).input_size == (3, 14, 21)  # the outer module's pretrained_cfg says 224

    class Config:
        image_size, num_channels = 21, 5

    assert comcat.profile(Given(torch.zeros(1))).input_size == (3, 224, 224)
    model = Given(torch.zeros(1))
    model.config = Config()
    assert comcat.profile(model).input_size == (5, 21, 21)


def test_layers_whose_measure_is_zero_are_named() -> None:
    model = vit()
    calibration = calibrated(model, 24, fisher=True)
    for name, moment in calibration.moments["blocks.1.attn"].items():
        if name.endswith("grad") or name.startswith("qk_"):
            moment.zero_()
    with pytest.warns(UserWarning, match=r"every gradient of 1 of \d layers is zero \('blocks.1.attn'\)"):
        comcat.plan(model, comcat.Budget(params=0.8), calibration, "spectrum")


def test_a_calibration_is_shown_on_one_line() -> None:
    shown = repr(calibrated(vit(), 24, fisher=True, probe_images=5))
    assert shown == (
        "Calibration(5 layers, 24 images of 3 x 14 x 21, with gradients, outputs classes, 5 images and 0 results of "
        "probing)"
    )
