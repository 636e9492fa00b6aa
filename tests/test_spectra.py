"""Energies per part: what the factors say, and how many components hold a given share."""

import pytest
import torch

import comcat
from comcat.errors import CalibrationError, ModelError
from comcat.hosts import find_layers
from comcat.layers.cost import break_even
from conftest import calibrated, swin, vit


@pytest.mark.parametrize("statistics", ["none", "plain", "fisher"])
@pytest.mark.parametrize("host", [vit, swin])
def test_every_part_has_a_spectrum(host: object, statistics: str) -> None:
    model = host()
    calibration = None if statistics == "none" else calibrated(model, 24, fisher=statistics == "fisher")
    found = comcat.spectra(model, calibration)
    expected = [(s.name, "head" if p == "rank" else p, w) for s in find_layers(model).layers for p, w in s.full.items()]
    assert [(s.layer, s.part, s.full) for s in found] == expected
    for spectrum in found:
        assert spectrum.energy.shape == (spectrum.full,)
        assert spectrum.energy.isfinite().all()
        assert (spectrum.energy >= 0).all()
        assert spectrum.energy.sum() > 0
        if spectrum.part != "neurons":
            assert (spectrum.energy.diff() <= 1e-9 * spectrum.energy[0]).all()


def test_data_free_energies_are_squared_singular_values() -> None:
    model = vit()
    found = {(s.layer, s.part): s for s in comcat.spectra(model)}
    query, key, value = model.blocks[0].attn.qkv.weight.detach().unflatten(0, (3, 3, 5))
    output = model.blocks[0].attn.proj.weight.detach().mT.unflatten(0, (3, 5))
    for part, product in (("qk", query.mT @ key), ("vo", value.mT @ output)):
        expected = torch.linalg.svdvals(product)[:, :5].square().sum(0)
        torch.testing.assert_close(found["blocks.0.attn", part].energy, expected, rtol=1e-6, atol=1e-7)
    expected = torch.linalg.svdvals(model.head.weight.detach()).square()
    torch.testing.assert_close(found["head", "head"].energy, expected, rtol=1e-6, atol=1e-7)


def test_break_even_is_that_of_the_matrices() -> None:
    for spectrum in comcat.spectra(vit()):
        expected = {"fc1": break_even(15, 17), "fc2": break_even(17, 15), "head": break_even(15, 11)}
        assert spectrum.break_even == expected.get(spectrum.part, spectrum.full)


@pytest.mark.parametrize(
    ("fraction", "width"), [(0.0, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.99, 4), (1.0, 4)]
)
def test_width_for_a_share_of_the_energy(fraction: float, width: int) -> None:
    spectrum = comcat.Spectrum("head", "head", torch.tensor([4.0, 2.0, 1.0, 1.0]), 4, 3)
    assert spectrum.width_for(fraction) == width


def test_no_energy_at_all() -> None:
    assert comcat.Spectrum("head", "head", torch.zeros(4), 4, 3).width_for(0.9) == 1


def test_refusals() -> None:
    model = vit()
    with pytest.raises(CalibrationError, match="another model"):
        comcat.spectra(model, calibrated(vit(depth=1)))
    model.head.bias.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"head\.bias"):
        comcat.spectra(model)
    with pytest.raises(ModelError, match="no layer"):
        comcat.spectra(torch.nn.Linear(3, 5))
