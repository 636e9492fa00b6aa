"""Scores of features, depth and segmentation, against truths and against another model."""

import json

import pytest
import torch
from torch import Tensor, nn

import comcat
from comcat.evaluation.neighbours import Neighbours, nearest


class Given(nn.Module):
    """Returns what the image says, moved by a fixed amount."""

    def __init__(self, change, **attributes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.change = change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


@pytest.fixture
def points() -> Tensor:
    return torch.randn(13, 5, generator=torch.Generator().manual_seed(0))


def test_nearest_by_hand(points: Tensor) -> None:
    unit = points / points.norm(dim=1, keepdim=True)
    for i, found in enumerate(nearest(points).tolist()):
        others = [j for j in range(13) if j != i]
        assert found == max(others, key=lambda j: float(unit[i] @ unit[j]))


def test_neighbours_of_batches_are_those_of_all(points: Tensor) -> None:
    other = points + 0.5 * torch.randn(13, 5, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(13) % 3
    found = []
    for size in (1, 4, 13):
        one = Neighbours()
        for start in range(0, 13, size):
            part = slice(start, start + size)
            one.add(other[part], points[part], labels[part])
        found.append(one.result())
    assert found[0] == found[1] == found[2]
    a, b = nearest(other), nearest(points)
    assert found[0]["neighbours"] == pytest.approx(100 * float((a == b).double().mean()))
    assert found[0]["knn_top1"] == pytest.approx(100 * float((labels[a] == labels).double().mean()))
    assert found[0]["knn_top1_reference"] == pytest.approx(100 * float((labels[b] == labels).double().mean()))


def test_features_against_a_reference(points: Tensor) -> None:
    def features(x: Tensor) -> Tensor:
        return x[:, :, 0, 0]

    dense = Given(features, num_classes=0)
    moved = Given(lambda x: features(x) + torch.tensor([0.0, 0, 0, 0, 3]), num_classes=0)
    data = list(zip(points[:, :, None, None].split(6), (torch.arange(13) % 3).split(6), strict=True))
    assert comcat.agreement(dense, dense, data).scores["neighbours"] == 100
    found = comcat.agreement(moved, dense, data)
    assert found.outputs == "features"
    assert set(found.scores) == {"neighbours", "knn_top1", "knn_top1_reference"}
    assert 0 <= found.scores["neighbours"] < 100
    result = comcat.evaluate(moved, data, outputs="features", reference=dense)
    assert result.metrics["neighbours"] == found.scores["neighbours"]
    assert [figure.label for figure in result.figures()] == ["rel. error", "cosine", "same neighbour", "k-NN top-1"]
    assert comcat.agreement(moved, dense, [x for x, _ in data]).scores.keys() == {"neighbours"}  # labels are not needed
    json.dumps(found.to_dict(), allow_nan=False)


def test_depth_by_hand() -> None:
    truth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])[None, None].repeat(2, 1, 1, 1)  # 0 is unknown
    answer = torch.tensor([[1.2, 2.0], [6.0, 9.0]])[None, None].repeat(2, 1, 1, 1)
    model = Given(lambda x: x)
    found = comcat.evaluate(model, [(answer, truth)], outputs="values").metrics
    assert found["rmse"] == pytest.approx(((0.2**2 + 0 + 4) / 3) ** 0.5, rel=1e-6)
    assert found["abs_rel"] == pytest.approx((0.2 + 0 + 0.5) / 3, rel=1e-6)
    assert found["delta1"] == pytest.approx(100 * 2 / 3)
    assert "rmse" not in comcat.evaluate(model, [(answer, truth - 1)], outputs="values").metrics  # no depth
    far = comcat.agreement(Given(lambda x: 1.3 * x), Given(lambda x: x), [answer], outputs="values")
    assert far.scores["abs_rel"] == pytest.approx(0.3, rel=1e-6)
    assert far.scores["delta1"] == 0
    json.dumps(far.to_dict(), allow_nan=False)


def test_segmentation_against_a_reference() -> None:
    x = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    dense, other = Given(lambda x: x, num_classes=5), Given(lambda x: x.flip(1), num_classes=5)
    assert comcat.agreement(dense, dense, [x]).scores["mean_iou"] == 100
    found = comcat.agreement(other, dense, [x[:1], x[1:]])
    labelled = comcat.evaluate(other, [(x, x.argmax(1))])
    assert found.outputs == labelled.outputs == "maps"
    assert found.scores["mean_iou"] == pytest.approx(labelled.metrics["mean_iou"])
    assert found.same == pytest.approx(labelled.top1)
