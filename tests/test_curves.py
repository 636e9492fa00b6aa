"""Loss curves: finite, falling to zero, through what was measured."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comcat.hosts import find_layers
from comcat.planning.curves import Curve, probed_curve, spectrum_curve, uniform_curve
from conftest import calibrated, vit


def curve_through(points: dict[int, float], energies: np.ndarray) -> Curve:
    return probed_curve(SimpleNamespace(errors=lambda part: torch.tensor(energies)), "qk", points)


ENERGIES = {
    "falling": np.append(np.geomspace(5, 5e-3, 8), 0),
    "steep": np.append(np.geomspace(1, 1e-30, 8), 0),
    "flat": np.append(np.ones(8), 0),
    "nothing": np.zeros(9),
}


@pytest.mark.parametrize("energies", ENERGIES)
@pytest.mark.parametrize("points", [{2: 1.0}, {2: 1.0, 5: 0.1}, {2: 0.1, 5: 1.0}, {1: 0.0, 4: 0.0}, {1: 3.0, 7: 1e-14}])
def test_probed_curves_fall_to_zero(points: dict[int, float], energies: str) -> None:
    curve = curve_through(points, ENERGIES[energies])
    assert len(curve) == 9
    assert np.isfinite(curve).all()
    assert (np.diff(curve) <= 0).all()
    assert curve[-1] == 0


def test_probed_curves_pass_through_what_was_measured() -> None:
    energies = ENERGIES["falling"]
    curve = curve_through({1: 0.9, 3: 0.4, 6: 0.02}, energies)
    np.testing.assert_allclose(curve[[1, 3, 6]], [0.9, 0.4, 0.02])
    assert 0.4 < curve[2] < 0.9
    assert curve[0] / curve[1] == pytest.approx(energies[0] / energies[1])
    assert curve[7] / curve[6] == pytest.approx(energies[7] / energies[6])


@pytest.mark.parametrize("fisher", [False, True])
def test_curves_of_every_part_are_falling(fisher: bool) -> None:
    model = vit()
    moments = calibrated(model, fisher=fisher).moments
    for site in find_layers(model).layers:
        factors = site.factors(moments[site.name])
        for part, full in site.full.items():
            spectrum, uniform = spectrum_curve(factors, part, fisher), uniform_curve(site, part)
            assert spectrum[0] == pytest.approx(float(factors.errors(part)[0]) / 2 if fisher else 1.0)
            for curve in (spectrum, uniform):
                assert len(curve) == full + 1
                assert np.isfinite(curve).all()
                assert (np.diff(curve) <= 0).all()
                assert curve[-1] == 0
