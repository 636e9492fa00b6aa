"""The objective, and the order of the photos, against formulas worked out here."""

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from comcat import DataError, ModelError, TrainingError
from comcat.customize.teaching.examples import Photos
from comcat.customize.teaching.material import find_token
from comcat.customize.teaching.objective import DDPM, FLOW, Noisy, Objective, loss
from comcat.customize.teaching.photos import Bucket, Photo

LATENTS = torch.randn(5, 3, 4, 8, generator=torch.Generator().manual_seed(1))


def noisy(scheduler: Any, gamma: float | None = None, seed: int = 7) -> tuple[Noisy, Tensor]:
    """What the objective makes of LATENTS, and the noise that it must have drawn."""
    noise = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(seed))
    return Objective(scheduler, gamma)(LATENTS, torch.Generator().manual_seed(seed)), noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddpm(kind):
    scheduler = DDIMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="linear", prediction_type=kind)
    got, noise = noisy(scheduler)
    alphas = np.cumprod(1 - np.linspace(0.001, 0.02, 1000))[got.timesteps.numpy()]
    signal, spread = (torch.tensor(x).float().view(-1, 1, 1, 1) for x in (alphas**0.5, (1 - alphas) ** 0.5))
    torch.testing.assert_close(got.sample, signal * LATENTS + spread * noise)
    wanted = {"epsilon": noise, "v_prediction": signal * noise - spread * LATENTS, "sample": LATENTS}[kind]
    torch.testing.assert_close(got.target, wanted)
    assert torch.equal(got.weight, torch.ones(5))
    assert len(set(got.timesteps.tolist())) > 1
    capped, _ = noisy(scheduler, 5.0)
    snr = torch.tensor(alphas / (1 - alphas))
    unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(5)}[kind]
    torch.testing.assert_close(capped.weight, (snr.clamp(max=5) / unit).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(capped.timesteps, got.timesteps)


def test_zero_terminal_snr_has_a_finite_weight():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon")
    objective = Objective(scheduler, 5.0)
    assert torch.equal(objective._snr_weight(torch.tensor([999])), torch.ones(1))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_with_a_fixed_shift(shift):
    got, noise = noisy(FlowMatchEulerDiscreteScheduler(shift=shift))
    sigma = (got.timesteps / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(got.sample, (1 - sigma) * LATENTS + sigma * noise)
    torch.testing.assert_close(got.target, noise - LATENTS)
    plain, _ = noisy(FlowMatchEulerDiscreteScheduler())
    u = (plain.timesteps / 1000).double()
    torch.testing.assert_close(got.timesteps.double() / 1000, shift * u / (1 + (shift - 1) * u), rtol=1e-5, atol=1e-6)
    many = Objective(FlowMatchEulerDiscreteScheduler())(torch.zeros(4000, 1, 2, 2), torch.Generator().manual_seed(0))
    logit = (many.timesteps / 1000).logit()  # logit-normal of mean 0 and deviation 1
    assert abs(logit.mean()) < 0.05
    assert abs(logit.std() - 1) < 0.05


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flow_with_a_shift_that_depends_on_the_size(kind):
    """As the pipelines sample: mu from the number of patches, then the scheduler's own shift."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=16, time_shift_type=kind
    )
    got, _ = noisy(scheduler)
    plain, _ = noisy(FlowMatchEulerDiscreteScheduler())
    patches = LATENTS.shape[2] * LATENTS.shape[3] // 4
    mu = calculate_shift(patches, 4, 16, scheduler.config.base_shift, scheduler.config.max_shift)
    wanted = scheduler.time_shift(mu, 1.0, plain.timesteps / 1000)
    torch.testing.assert_close(got.timesteps / 1000, wanted, rtol=1e-5, atol=1e-6)


def test_the_objective_is_drawn_from_its_generator_alone():
    for scheduler in (DDIMScheduler(), FlowMatchEulerDiscreteScheduler()):
        torch.manual_seed(1)
        first, _ = noisy(scheduler)
        torch.manual_seed(2)
        again, _ = noisy(scheduler)
        other, _ = noisy(scheduler, seed=8)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first.sample, other.sample)


def test_objectives_that_make_no_sense():
    with pytest.raises(TrainingError, match="min-SNR weighting has no meaning for flow matching"):
        Objective(FlowMatchEulerDiscreteScheduler(), 5.0)
    flow = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert Objective(flow).flow
    with pytest.raises(ModelError, match="prediction type 'noise' is not known"):
        Objective(DDIMScheduler(prediction_type="noise"))


def every_scheduler():
    """All schedulers of diffusers that can be made without arguments."""
    found = {}
    for name in sorted(vars(diffusers)["_import_structure"]["schedulers"]):
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and name.endswith("Scheduler"):
            with contextlib.suppress(Exception):
                found[name] = kind()
    return found


def test_other_noise_is_refused_by_name():
    """A scheduler is trained with DDPM's noise or by flow matching, or not at all: none by default."""
    ddpm = DDPM | FLOW
    schedulers = every_scheduler()
    assert len(schedulers) > 20
    for name, scheduler in schedulers.items():
        if name in ddpm:
            assert Objective(scheduler).flow == (name in FLOW)
        else:
            with pytest.raises(ModelError, match=rf"sampled with {name} cannot be trained.*DDIMScheduler"):
                Objective(scheduler)
    assert {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "LCMScheduler", "TCDScheduler"} <= set(schedulers)
    with pytest.raises(ModelError, match="noise is that of EDM"):
        Objective(schedulers["EDMEulerScheduler"])


def as_heun(beta_schedule: str) -> Any:
    """Its own constructor is of no use to NumPy 2."""
    scheduler = HeunDiscreteScheduler.__new__(HeunDiscreteScheduler)
    scheduler.register_to_config(beta_schedule=beta_schedule, prediction_type="epsilon")
    return scheduler


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
            "timestep_type='continuous'",
        ),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True"),
        (as_heun("exp"), "beta_schedule 'exp' is not one of DDPM's"),
    ],
)
def test_settings_with_other_noise_are_refused_by_name(scheduler, message):
    with pytest.raises(ModelError, match=message):
        Objective(scheduler)


def test_the_loss_weighs_examples():
    target, weight = torch.randn(3, 2, 5, 7), torch.tensor([1.0, 0.0, 3.0])
    got = loss(torch.zeros_like(target), Noisy(target, target, torch.zeros(3), weight))
    torch.testing.assert_close(got, (target.square().mean((1, 2, 3)) * weight).sum() / 3)


# Photos


class Fixed:
    """A family that encodes nothing."""


def plan(count: int, steps: int, batch_size: int, wide: int = 0, **options: Any) -> tuple[Photos, list]:
    found = [Photo(Path(f"{i}.png"), "x", (8, 16) if i < wide else (8, 8)) for i in range(count)]
    photos = Photos(Fixed(), found, [Bucket(8, 8), Bucket(8, 16)], **options)  # type: ignore[arg-type]
    return photos, photos.plan(steps, batch_size)


@pytest.mark.parametrize(("count", "batch_size", "wide"), [(5, 1, 0), (5, 2, 2), (3, 4, 1), (7, 3, 3), (1, 4, 0)])
def test_every_photo_equally_often_in_batches_of_one_shape(count, batch_size, wide):
    photos, batches = plan(count, 60, batch_size, wide, flip=0.5)
    assert len(batches) == 60
    assert {len(batch) for batch in batches} == {batch_size}
    assert all(len({photos.buckets[e.index] for e in batch}) == 1 for batch in batches)
    seen = Counter(e.index for batch in batches for e in batch)
    assert len(seen) == count
    for group in (range(wide), range(wide, count)):
        times = [seen[i] for i in group]
        assert not times or max(times) - min(times) <= 1
    assert max(seen.values()) - min(seen.values()) <= 1 + batch_size
    _, start = plan(count, 17, batch_size, wide, flip=0.5)
    assert start == batches[:17]
    _, other = plan(count, 60, batch_size, wide, flip=0.5, seed=1)
    assert other != batches or count == 1


def test_mirroring_and_crops_are_drawn_per_example():
    _, batches = plan(3, 200, 2, flip=0.25, random_crop=True)
    examples = [e for batch in batches for e in batch]
    assert 0.18 < sum(e.flip for e in examples) / 400 < 0.32
    assert len({e.crop for e in examples}) == 400
    assert plan(3, 200, 2, flip=0.25, random_crop=True, stream=1)[1] != batches


# Words


@pytest.mark.parametrize(
    ("caption", "token"),
    [
        ("a photo of V* dog", "V*"),
        ("a photo of V*, asleep", "V*"),
        ("a photo of <my-dog>", "<my-dog>"),
        ("a (V*:1.2) dog", "V*"),
        ("in a 5* hotel", None),
        ("5*3 is f*ck", None),
        ("**bold** and a*b", None),
        ("a photo of a dog", None),
    ],
)
def test_the_new_word_is_found(caption, token):
    assert find_token([caption]) == token


def test_two_new_words():
    with pytest.raises(DataError, match=r"several new words, V\* and W\*; say which to learn with --token"):
        find_token(["a V*", "a W*"])
