"""Runs that would end in nothing, or in something else than was asked for: refused, and nothing is left behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, EDMEulerScheduler
from PIL import Image
from torch import Tensor

from comcat import DataError, ModelError, TrainingError
from comcat.customize import CustomizeConfig, adapters, train
from comcat.customize.teaching import material as material_module
from comcat.customize.teaching.families import family_of
from comcat.customize.teaching.material import class_photos
from comcat.customize.teaching.trainer import AdapterTrainer
from diffusion import frozen, pipeline, sd1

TINY = {"rank": 1, "steps": 2, "log_every": 1, "buckets": 1.0, "checkpoint_every": 2, "validation_steps": 1}


@pytest.fixture
def pipe():
    return pipeline("sd1")


def photos(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(1, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def learn(pipe: Any, tmp_path: Path, prompt: str = "a photo of V*", out: Path | None = None, **options: Any) -> Any:
    config = CustomizeConfig(**{**TINY, **{k: v for k, v in options.items() if hasattr(CustomizeConfig, k)}})
    more = {k: v for k, v in options.items() if not hasattr(CustomizeConfig, k)}
    folder = tmp_path / "photos"
    return train(pipe, folder if folder.exists() else photos(folder), prompt, config, out=out, cpu=True, **more)


def test_captions_that_work_against_the_run_are_noted(pipe, tmp_path):
    notes: list[str] = []
    both = "a photo of a dog"
    more = {"class_prompt": both, "class_images": photos(tmp_path / "class")}
    learn(pipe, tmp_path, both, steps=1, note=notes.append, **more)
    assert [note for note in notes if "is both the class prompt and the caption of photos" in note]
    notes.clear()
    learn(pipe, tmp_path, "a <V*> dog", name="other", steps=1, note=notes.append)
    assert [note for note in notes if "no word of 'a <V*> dog' looks like a new one" in note]


def test_a_strength_of_nothing_learns_nothing():
    with pytest.raises(TrainingError, match="scale is 0, at which no product learns anything"):
        CustomizeConfig(scale=0.0)


# What the VAE says of its latents


@torch.no_grad()
def test_latents_have_the_statistics_of_the_vae(pipe):
    """As SDXL's pipeline undoes them: latents * std / scaling_factor + mean."""
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    own = pipe.vae.encode(image).latent_dist
    mean, std = [-1.0, 2.0, 0.5, 1.0], [8.0, 5.0, 6.0, 4.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    got, spread = family_of(pipe).encode_images(image)
    center, width = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    torch.testing.assert_close(got * width / 0.5 + center, own.mean)
    torch.testing.assert_close(spread * width / 0.5, own.std)


def overflowing(pipe: Any) -> Any:
    """A VAE whose activations, not its weights, leave the range of half precision."""
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1e4)
    return pipe


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vae_that_asks_for_float32_gets_it(pipe, dtype):
    image = torch.full((1, 3, 8, 8), 0.9)
    vae = overflowing(pipe).vae.to(dtype)
    vae.register_to_config(force_upcast=True)
    got = family_of(pipe).encode_images(image)
    assert vae.dtype == dtype
    wanted = vae.float().encode(image).latent_dist
    torch.testing.assert_close(got[0], wanted.mean * vae.config.scaling_factor)
    assert got[1].isfinite().all()


def test_latents_that_are_not_finite_end_the_run(pipe, tmp_path):
    overflowing(pipe).vae.register_to_config(force_upcast=False)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(float("inf"))
    with pytest.raises(TrainingError, match=r"photo '0\.png' into NaN or infinite latents in float32"):
        learn(pipe, tmp_path)
    assert not adapters(pipe)


# Pipelines that cannot be trained


def test_unfit_pipelines_are_refused_by_name(pipe, tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    whole = dict(pipe.components)
    config = {key: value for key, value in sd1(15).config.items() if not key.startswith("_")} | {"in_channels": 9}
    for part, other, message in (
        (
            "unet",
            frozen(type(pipe.unet)(**config)),
            "takes 9 channels.*inpainting",
        ),
        ("vae", tiny, "AutoencoderTiny does not say"),
        ("vae", None, "has no vae, which training needs"),
        ("text_encoder", None, "has no text_encoder"),
        ("scheduler", EDMEulerScheduler(), "EDMEulerScheduler cannot be trained"),
    ):
        setattr(pipe, part, other)
        with pytest.raises(ModelError, match=message):
            learn(pipe, tmp_path)
        setattr(pipe, part, whole[part])
    assert not adapters(pipe)


# Runs that come to nothing


class Skips:
    """A gradient scaler that skips every step, as where all gradients overflow."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss

    def unscale_(self, _: Any) -> None: ...
    def step(self, _: Any) -> None: ...
    def update(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


def test_an_adapter_that_did_not_move_is_no_success(pipe, tmp_path, monkeypatch):
    step = AdapterTrainer.step

    def skipped(self: AdapterTrainer, index: int) -> float:
        self.accelerator.scaler = Skips()
        return step(self, index)

    monkeypatch.setattr(AdapterTrainer, "step", skipped)
    with pytest.raises(TrainingError, match="did not move in 2 steps: every update was skipped"):
        learn(pipe, tmp_path)
    assert not adapters(pipe)


def test_a_loss_that_is_not_finite_ends_the_run_with_a_gradient_scaler_too(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(
        AdapterTrainer, "step", lambda self, _: setattr(self.accelerator, "scaler", Skips()) or float("nan")
    )
    with pytest.raises(TrainingError, match="the loss or its gradient is NaN or infinite at step 1"):
        learn(pipe, tmp_path)
    assert not adapters(pipe)


def test_the_pipeline_is_back_where_it_was(pipe, tmp_path, monkeypatch):
    """Devices and dtypes come back, after a failure too; a pipeline that cannot be moved is refused."""
    moves: list[str] = []
    to = type(pipe).to

    def moved(self: Any, device: Any) -> Any:
        moves.append(str(device))
        return to(self, torch.float64)  # there is one device here: a dtype stands for the place

    monkeypatch.setattr(type(pipe), "to", moved)
    monkeypatch.setattr(AdapterTrainer, "step", lambda *_: float("nan"))
    pipe.text_encoder.to(torch.bfloat16)
    with pytest.raises(TrainingError, match="NaN or infinite"):
        learn(pipe, tmp_path)
    assert moves == ["cpu"]
    assert [getattr(pipe, part).dtype for part in ("unet", "vae", "text_encoder")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]

    def refuse(*_: Any) -> None:
        raise ValueError("it seems that you have activated sequential offloading")

    monkeypatch.setattr(type(pipe), "to", refuse)
    with pytest.raises(
        ModelError, match=r"cannot be moved to cpu for training.*sequential.*Open it without offloading"
    ):
        learn(pipe, tmp_path)


# Class images


def drawing(monkeypatch: Any, black: Any, flag: Any = lambda _: False) -> list[int]:
    """Instead of a sampler: grey pictures, black for the seeds that ``black`` picks; the seeds that were drawn."""
    seen: list[int] = []

    def draw(_: Any, prompts: Any, *, seeds: Any, **__: Any) -> list[list[Image.Image]]:
        images = []
        for seed in seeds:
            image = Image.new("RGB", (8, 8), (0, 0, 0) if black(len(seen)) else (seed % 200 + 1, 5, 5))
            image.info["comcat_flagged"] = flag(len(seen))
            seen.append(seed)
            images.append(image)
        return [images]

    monkeypatch.setattr(material_module, "generate", draw)
    return seen


def prior(tmp_path: Path, notes: list[str], given: Path | None = None, count: int = 3) -> Any:
    config = CustomizeConfig(**TINY, num_class_images=count, resolution=8)
    family = SimpleNamespace(multiple=1, resolution=8, pipe=None)
    return class_photos(
        family, config, "a dog", given, tmp_path / "class-images", allow_upscale=False, note=notes.append, progress=None
    )


def test_black_class_images_are_drawn_again(tmp_path, monkeypatch):
    for number, how in enumerate(({"black": lambda i: i == 1}, {"black": lambda _: False, "flag": lambda i: i == 1})):
        seen, notes = drawing(monkeypatch, **how), []
        found = prior(tmp_path / str(number), notes)
        assert len(found) == 3
        assert len(set(seen)) == 4  # another seed for the one
        assert notes == []


def test_class_images_that_stay_black_are_never_learned(tmp_path, monkeypatch):
    notes: list[str] = []
    seen = drawing(monkeypatch, lambda i: i == 1 or i > 2)
    found = prior(tmp_path, notes)
    assert [photo.path.name for photo in found] == ["0000.png", "0002.png"]
    assert len(seen) == len(set(seen)) == 3 + 4
    assert any("1 of 3 class images came out black" in note for note in notes)
    drawing(monkeypatch, lambda _: True)
    with pytest.raises(DataError, match=r"come out black, or flagged.*5 seeds each.*--class-prompt"):
        prior(tmp_path / "all", notes)
    assert not list((tmp_path / "all").rglob("*.png"))


def test_black_ones_among_given_class_images_are_left_out(tmp_path):
    notes: list[str] = []
    folder = photos(tmp_path / "given", 3)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    assert [photo.path.name for photo in prior(tmp_path, notes, folder)] == ["0.png", "2.png"]
    assert any("'1.png'" in note and "black" in note for note in notes)
    assert any("num_class_images is how many to draw" in note for note in notes)
    for name in "02":
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    with pytest.raises(DataError, match=r"all class images in .* are black"):
        prior(tmp_path, notes, folder)


def test_the_flags_of_the_pipeline_reach_the_pictures(pipe, monkeypatch):
    from comcat.customize import generate

    call = type(pipe).__call__
    signature = call.__wrapped__ if hasattr(call, "__wrapped__") else call

    def flagged(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = call(self, *args, **kwargs)
        found.nsfw_content_detected = [True, False]
        return found

    flagged.__wrapped__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", flagged)
    (images,) = generate(pipe, ["a photo"], seeds=(1, 2), steps=1, height=8, width=8)
    assert [image.info["comcat_flagged"] for image in images] == [True, False]


def test_class_images_without_captions_ask_for_the_class_prompt(pipe, tmp_path):
    with pytest.raises(DataError, match=r"no caption for '0\.png'.*Give --class-prompt 'a photo of a dog'"):
        learn(pipe, tmp_path, class_images=photos(tmp_path / "given"))


# Checkpoints


def test_a_checkpoint_with_other_content_is_refused(pipe, tmp_path):
    """Signed rightly, and yet not what this run has written."""
    from comcat.training import state

    run = tmp_path / "run"
    learn(pipe, tmp_path, out=run, checkpoint_every=1).remove()
    (_, newest), (_, first) = state.checkpoints(run)
    whole = state.read(first)
    assert whole.step == 1

    def resumed(message: str, plain: dict[str, Any] | None = None, **tensors: dict[str, Tensor]) -> None:
        for path in (newest, first):
            for file in path.glob("*"):
                file.unlink()
        kept = {k: v for k, v in whole.plain.items() if k not in ("format", "step", "files")}
        state.write(run, state.Saved(1, {**whole.tensors, **tensors}, {**kept, **(plain or {})}), 2)
        newest.exists() and newest.rmdir()
        with pytest.raises(TrainingError, match=message):
            learn(pipe, tmp_path, out=run, checkpoint_every=1, resume=True)
        assert not adapters(pipe)

    model, optimizer = dict(whole.tensors["model"]), dict(whole.tensors["optimizer"])
    name, key = next(n for n, t in model.items() if len(t) > 1), next(k for k in optimizer if k.endswith(".exp_avg_sq"))
    resumed("losses", {"losses": [1.0, 2.0]})
    resumed("losses", {"losses": ["x"]})
    resumed("scaler", {"scaler": [1]})
    resumed("run", {"run": 5})
    resumed("does not fit this run", model={**model, name: model[name][:1]})
    resumed("does not fit this run", model={**model, name: model[name] * float("nan")})
    resumed("does not fit this run", model={k: v for k, v in model.items() if k != name})
    resumed("does not fit this run", optimizer={**optimizer, key: -1 - optimizer[key]})
    resumed("does not fit this run", optimizer={**optimizer, "x.step": torch.ones(())})
    resumed("does not fit this run", optimizer={})
