"""Two models on the same images: scores, and the images on which they differ."""

import copy

import pytest
import torch

import comcat
from comcat.evaluation.side_by_side import compare
from conftest import images, vit


@pytest.fixture(scope="module")
def pair():
    dense = vit()
    plan = comcat.Plan({"blocks.0.attn": {"qk": 1, "vo": 1}, "blocks.1.mlp": {"neurons": 3}})
    return dense, comcat.compress(dense, plan)


def test_against_the_functions_of_one_model(pair):
    dense, small = pair
    x, y = images(dense, 37), torch.randint(0, 11, (37,), generator=torch.Generator().manual_seed(3))
    batches = list(zip(x.split(10), y.split(10), strict=True))
    found = compare(small, dense, batches, keep=2)
    for model, evaluation in ((dense, found.dense), (small, found.small)):
        alone = comcat.evaluate(model, batches)
        assert (evaluation.top1, evaluation.top5, evaluation.images) == (alone.top1, alone.top5, 37)
        assert evaluation.loss == pytest.approx(alone.loss, rel=1e-6)
    agreement = comcat.agreement(small, dense, batches)
    assert found.divergence == pytest.approx(agreement.kl, rel=1e-6)
    assert sum(found.differing.values()) == round(37 * (1 - agreement.same / 100)) > 0
    with torch.no_grad():
        before, after = dense(x).argmax(1), small(x).argmax(1)
    lost = int(((before == y) & (after != y)).sum())
    won = int(((before != y) & (after == y)).sum())
    assert (found.differing.get("lost", 0), found.differing.get("won", 0)) == (lost, won)
    for verdict, samples in found.samples.items():
        assert len(samples) == min(2, found.differing[verdict])
        assert [s.divergence for s in samples] == sorted((s.divergence for s in samples), reverse=True)
        for sample in samples:
            index = next(i for i, image in enumerate(x) if torch.equal(image, sample.image))
            assert (sample.dense[0], sample.small[0], sample.label) == (before[index], after[index], y[index])


def test_batches_do_not_matter_and_a_model_agrees_with_itself(pair):
    dense, small = pair
    x = images(dense, 13)
    whole, parts = (compare(small, dense, x.split(n), labelled=False) for n in (13, 2))
    assert whole.differing == parts.differing
    assert set(whole.differing) <= {"changed"}
    assert [s.image.tolist() for s in whole.samples["changed"]] == [s.image.tolist() for s in parts.samples["changed"]]
    assert whole.dense is None
    same = compare(copy.deepcopy(dense), dense, [x], labelled=False)
    assert (same.differing, same.samples, same.divergence) == ({}, {}, 0)
    assert small.training == dense.training


@pytest.mark.parametrize("kind", ["labels", "values", "features"])
def test_other_kinds_show_the_largest_differences(pair, kind):
    dense, small = pair
    found = compare(small, dense, images(dense, 9).split(4), labelled=False, keep=3, outputs=kind)
    assert found.kind == kind
    assert [len(found.samples["changed"]), found.differing["changed"]] == [3, 9]
    assert found.divergence > 0
    assert all(s.dense is None and s.label is None for s in found.samples["changed"])


def test_refused(pair):
    dense, small = pair
    with pytest.raises(comcat.DataError, match="there are no images to compare on"):
        compare(small, dense, [])
    with pytest.raises(comcat.ModelError, match="NaN"):
        compare(small, dense, [torch.full_like(images(dense, 1), float("nan"))], labelled=False)
    with pytest.raises(comcat.ModelError, match="3 and 11 outputs"):
        compare(vit(num_classes=3), dense, [images(dense, 2)], labelled=False)
