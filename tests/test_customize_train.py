"""What a training run does, and what it leaves alone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from comcat import DataError, ModelError, TrainingError
from comcat.customize import CustomizeConfig, adapters, add_adapter, generate, load_adapter, save_adapter, train
from comcat.customize.adapter.words import has_token
from comcat.customize.teaching.examples import Photos
from comcat.customize.teaching.families import family_of
from comcat.customize.teaching.objective import Noisy, Objective
from comcat.customize.teaching.photos import Bucket, find_photos
from comcat.customize.teaching.trainer import AdapterTrainer
from comcat_demos import digits

PROMPT = "a photo of V*"
TINY = {"rank": 1, "steps": 2, "log_every": 1, "buckets": 1.0, "checkpoint_every": 2, "validation_steps": 1}


def settings(**changes: Any) -> CustomizeConfig:
    return CustomizeConfig(**{**TINY, **changes})


def write_photos(folder: Path, *sizes: tuple[int, int]) -> Path:
    """Random pictures of (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(len(sizes))
    for i, size in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pipe():
    """Shared: every test leaves it as it was."""
    return digits.build()


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos", (16, 16), (19, 23))


def learn(pipe: Any, photos: Path, prompt: str | None = PROMPT, out: Path | None = None, **options: Any) -> Any:
    """(tensors, info) of a training run whose adapter is off the pipeline again."""
    config = settings(**{k: v for k, v in options.items() if k in CustomizeConfig.__dataclass_fields__})
    more = {k: v for k, v in options.items() if k not in CustomizeConfig.__dataclass_fields__}
    adapter = train(pipe, photos, prompt, config, out=out, cpu=True, **more)
    tensors, info = {k: v.clone() for k, v in adapter.state_dict().items()}, adapter.info
    adapter.remove()
    return tensors, info


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_latents_are_samples_of_what_was_encoded(pipe, photos):
    found = find_photos(photos, "x")
    both = []
    for cache in (True, False):
        source = Photos(family_of(pipe), found, [Bucket(16, 16)], flip=0.5, cache=cache)
        source.encode_all()
        batch = source.plan(3, 2)[2]
        both.append(source.latents(batch, torch.Generator().manual_seed(4)))
    assert torch.equal(*both)
    assert both[0].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("text", ["V*", "a V* dog", "aV*", "V*s", "V*, a", "(V*)", "v*", "_V*", "V**", "-V*-"])
def test_a_word_is_seen_as_the_tokenizer_sees_it(pipe, photos, text):
    adapter = train(pipe, photos, PROMPT, settings(steps=1), cpu=True)
    try:
        ids = pipe.tokenizer(text).input_ids
        assert has_token(text, "V*") == (pipe.tokenizer.convert_tokens_to_ids("V*") in ids)
    finally:
        adapter.remove()


def state(pipe: Any) -> dict[str, Tensor]:
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, nn.Module)}
    return {f"{key}.{name}": t.clone() for key, part in parts.items() for name, t in part.state_dict().items()}


def marks(pipe: Any) -> list:
    """Everything beside tensors that training might forget to put back."""
    parts = [pipe.unet, pipe.vae, pipe.text_encoder]
    flags = [p.requires_grad for part in parts for p in part.parameters()]
    modes = [module.training for part in parts for module in part.modules()]
    return [flags, modes, pipe.unet.is_gradient_checkpointing, id(pipe.tokenizer), pipe._progress_bar_config]


@pytest.fixture
def untouched(pipe):
    """The pipeline before, and a check that it is the same afterwards."""
    pipe.unet.requires_grad_(True)
    pipe.unet.mid_block.train()
    pipe.unet.conv_in.requires_grad_(False)
    before, seen = state(pipe), marks(pipe)
    yield
    assert not adapters(pipe)
    assert same(before, state(pipe))
    assert seen == marks(pipe)
    assert all(p.grad is None for p in pipe.unet.parameters())
    pipe.unet.eval()
    assert not pipe.unet.is_gradient_checkpointing


def test_same_seed_same_file(pipe, photos, tmp_path, untouched):
    options = {"text_encoder_rank": 1, "flip": 0.5, "caption_dropout": 0.3, "grad_checkpointing": True}
    contents = []
    for seed, mess in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(mess)
        adapter = train(pipe, photos, PROMPT, settings(seed=seed, **options), cpu=True)
        path = save_adapter(pipe, tmp_path / "a.safetensors")
        contents.append(path.read_bytes())
        adapter.remove()
    assert contents[0] == contents[1] != contents[2]


def test_a_file_that_is_loaded_gives_the_trained_images(pipe, photos, tmp_path, untouched):
    adapter = train(pipe, photos, PROMPT, settings(lr=0.05, text_encoder_rank=2), cpu=True)
    path = save_adapter(pipe, tmp_path / "a.safetensors")
    options = {"seeds": (3,), "steps": 2}
    wanted = np.asarray(generate(pipe, [PROMPT], **options)[0][0])
    adapter.remove()
    loaded = load_adapter(pipe, path)
    assert np.array_equal(np.asarray(generate(pipe, [PROMPT], **options)[0][0]), wanted)
    loaded.scale = 0
    assert not np.array_equal(np.asarray(generate(pipe, [PROMPT], **options)[0][0]), wanted)
    loaded.remove()


def test_cached_latents_change_nothing(pipe, photos, untouched):
    cached, info = learn(pipe, photos, flip=0.5, steps=3)
    fresh, again = learn(pipe, photos, flip=0.5, steps=3, cache_latents=False)
    assert same(cached, fresh)
    assert info == again


def test_the_token_alone(pipe, photos, untouched):
    """Its own vectors move, and the words of the tokenizer do not."""
    tensors, _ = learn(pipe, photos, lr=1e-12, token_lr=0.5, token_init="digit", steps=3)
    table = pipe.text_encoder.get_input_embeddings().weight
    (row,) = pipe.tokenizer("digit", add_special_tokens=False).input_ids
    start = table[row].detach()
    moved = (tensors["token.text_encoder"][0] - start).abs()
    assert 0.3 * start.std() < moved.max() < 3 * 0.5 * start.std() * 1.01  # about the rate a step, times its spread
    assert all(float(t.abs().max()) < 1e-10 for name, t in tensors.items() if name.endswith("output.weight"))


def test_no_token_without_a_new_word(pipe, photos, untouched):
    tensors, info = learn(pipe, photos, "a photo of a digit")
    assert not any(name.startswith("token") for name in tensors)
    assert info["prompt"] == "a photo of a digit"


def accelerator() -> Any:
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        scaler=None,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        backward=lambda value: value.backward(),
    )


@torch.no_grad()
@pytest.mark.parametrize("shapes", ["alike", "different"])
def test_prior_preservation(pipe, tmp_path, shapes):
    """loss = instance + weight * prior, in one pass where the shapes are the same."""
    folders = [
        write_photos(tmp_path / "a", (16, 16)),
        write_photos(tmp_path / "b", (16, 16) if shapes == "alike" else (16, 8)),
    ]
    family, config = family_of(pipe), settings(prior_weight=0.25, snr_gamma=5.0)
    adapter = add_adapter(pipe, rank=1)
    seen: list[tuple[Noisy, Tensor]] = []
    try:
        shown = [find_photos(folder, "a photo") for folder in folders]
        sources = [Photos(family, found, [Bucket(16, 16), Bucket(16, 8)], stream=i) for i, found in enumerate(shown)]
        for source in sources:
            source.encode_all()
        trainer = AdapterTrainer(accelerator(), family, Objective(pipe.scheduler, 5.0), adapter, *sources, config)
        trainer.encode_captions()
        objective, predict = trainer.objective, family.predict
        trainer.objective = lambda *args: seen.append([objective(*args)]) or seen[-1][0]
        family.predict = lambda *args: seen[-1].append(predict(*args)) or seen[-1][1]
        got = trainer._loss(0)
    finally:
        adapter.remove()
    assert [len(out) for _, out in seen] == ([2] if shapes == "alike" else [1, 1])
    errors = [
        weight * (target - guess).square().mean()
        for noisy, out in seen
        for target, guess, weight in zip(noisy.target, out, noisy.weight, strict=True)
    ]
    torch.testing.assert_close(got, errors[0] + 0.25 * errors[1])


class StopError(Exception):
    """Whatever goes wrong on the way."""


def stop_at(step: int) -> Any:
    def progress(stage: str, done: int, total: int | None) -> None:
        if stage == "train" and done == step:
            raise StopError

    return progress


@pytest.mark.parametrize("step", [1, 2])
def test_an_exception_leaves_the_base_usable(pipe, photos, tmp_path, untouched, step):
    options = {"text_encoder_rank": 1, "grad_checkpointing": True, "checkpoint_every": 1}
    with pytest.raises(StopError):
        learn(pipe, photos, out=tmp_path / "run", progress=stop_at(step), **options)


def test_nan_is_noticed(pipe, photos, tmp_path, untouched, monkeypatch):
    def poisoned(self: AdapterTrainer, number: int, original: Any = AdapterTrainer._loss) -> Tensor:
        return original(self, number) * (float("nan") if number == 2 else 1)

    monkeypatch.setattr(AdapterTrainer, "_loss", poisoned)
    wanted = "NaN or infinite at step 3; the checkpoint of step 2 is good and kept. Try a lower lr, or precision bf16"
    with pytest.raises(TrainingError, match=wanted):
        learn(pipe, photos, steps=4, out=tmp_path / "run")


def test_a_checkpoint_never_holds_nan(pipe, photos, tmp_path, untouched, monkeypatch):
    """The loss may be finite where its gradient is not."""

    def share(self: AdapterTrainer, original: Any = AdapterTrainer._share_gradients) -> None:
        original(self)
        next(iter(self.parameters.values())).grad[0] = float("nan")

    monkeypatch.setattr(AdapterTrainer, "_share_gradients", share)
    with pytest.raises(TrainingError, match=r"the loss or \S+weight is NaN or infinite at step 2\. "):
        learn(pipe, photos, steps=9, log_every=9, out=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("where", ["predict", "encode_images"])
def test_out_of_memory(pipe, photos, untouched, monkeypatch, where):
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(f"comcat.customize.teaching.families.Family.{where}", full)
    with pytest.raises(TrainingError, match=r"--grad-checkpointing and --precision bf16, lower --res.*--accumulate"):
        learn(pipe, photos)


def test_samples_and_log(pipe, photos, tmp_path, untouched):
    out = tmp_path / "run"
    more = {"validate_every": 2, "validation_images": 3, "validation_steps": 2}
    tensors, _ = learn(pipe, photos, out=out, steps=3, validation_prompts=[PROMPT, "a photo"], **more)
    samples = sorted(path.name for path in (out / "samples").iterdir())
    assert samples == ["step-000002.png", "step-000003.png"]
    with Image.open(out / "samples" / samples[0]) as image:
        assert image.size == (3 * 16 + 2 * 2, 2 * 16 + 2)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["lr"] >= 0 for line in lines)
    (events,) = (out / "tensorboard").iterdir()
    assert b"samples" in events.read_bytes()
    assert b"train/loss" in events.read_bytes()
    plain, _ = learn(pipe, photos, steps=3)
    assert same(tensors, plain)  # looking does not change what is learned


def test_class_images_are_drawn_once_and_belong_to_their_settings(pipe, photos, tmp_path, untouched):
    out = tmp_path / "run"
    folder = out / "class-images"
    options = {"out": out, "num_class_images": 6, "progress": None}
    contents = []
    for class_prompt, changes in (
        ("a photo of a digit", {}),
        ("a photo of a digit", {}),
        ("a photo of the digit two", {}),
        ("a photo of the digit two", {"num_class_images": 3}),
    ):
        stages: list[str] = []
        options["progress"] = lambda stage, *_, stages=stages: stages.append(stage)
        _, info = learn(pipe, photos, class_prompt=class_prompt, **{**options, **changes})
        count = changes.get("num_class_images", 6)
        assert info["training"]["class_images"] == count
        names = sorted(path.name for path in folder.glob("*.png"))
        assert names == [f"{i:04d}.png" for i in range(count)]
        contents.append([(folder / name).read_bytes() for name in names])
        assert ("draw class images" in stages) == (len(contents) != 2)
        (out / "checkpoints").rename(tmp_path / f"old-{len(contents)}")
    assert contents[0] == contents[1] != contents[2]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert lines == [{"file_name": f"{i:04d}.png", "text": "a photo of the digit two"} for i in range(3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_prompt": "a photo of a V* digit"}, r"class prompt 'a photo of a V\* digit' has 'V\*', the word to"),
        ({"class_prompt": "a digit", "rank": 9}, "rank 9 is above the head width 8"),
        ({"class_prompt": "a digit", "targets": ("attn7",)}, "no attention layer of the unet is named by"),
        ({"class_prompt": "a digit", "token": "photo"}, "the tokenizer knows 'photo' already"),
        ({"class_prompt": "a digit", "name": "keys"}, "cannot be called 'keys'"),
        ({"class_prompt": "a digit", "resolution": 18}, "not a multiple of 4.* Use 16 or 20"),
        ({"class_prompt": "a digit", "resume": True}, "no checkpoint in .* start without --resume"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_drawn(
    pipe, photos, tmp_path, untouched, options, message
):
    with pytest.raises((DataError, TrainingError, ModelError), match=message):
        learn(pipe, photos, out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_class_images_need_a_place(pipe, photos, untouched):
    with pytest.raises(DataError, match="generated class images need a directory"):
        learn(pipe, photos, class_prompt="a photo of a digit")
    with pytest.raises(TrainingError, match="nothing to resume without the directory of the run"):
        learn(pipe, photos, resume=True)
