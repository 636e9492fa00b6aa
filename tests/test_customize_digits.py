"""The embedded digits pipeline: complete, offline, without the digit left out, and the same for the same seed."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from diffusers import StableDiffusionPipeline

from comcat.errors import CheckpointError, ComcatError
from comcat_demos import digits, digits_cache, digits_score

STEPS: dict[str, Any] = {"vae_steps": 2, "steps": 2}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bit by bit is what one thread promises: two may add up gradients in another order, in every run anew."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return digits.build()


@pytest.fixture(scope="module")
def classifier() -> digits_score.Classifier:
    return digits_score.Classifier()


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StableDiffusionPipeline]:
    cache = tmp_path_factory.mktemp("cache")
    return cache, digits_cache.load_or_train(cache, 3, seed=1, **STEPS)


def weights(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": p.detach().clone()
        for part in ("vae", "text_encoder", "unet")
        for name, p in getattr(pipe, part).named_parameters()
    }


def same(one: StableDiffusionPipeline, other: StableDiffusionPipeline) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def draw(pipe: StableDiffusionPipeline) -> Tensor:
    return digits_score.generate(pipe, ["a photo of the digit seven"] * 2, seed=5, steps=3)


# Data


def test_real_images_are_split_as_the_classification_demo_splits_them() -> None:
    (train, train_labels), (test, test_labels) = digits.real_images("train"), digits.real_images("test")
    assert train.shape == (1347, 3, 16, 16)
    assert test.shape == (450, 3, 16, 16)
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert 0 <= train.min() < 0.01
    assert 0.99 < train.max() <= 1


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'validation'"):
        digits.real_images("validation")


@pytest.mark.parametrize("left_out", [0, 7])
def test_the_left_out_digit_is_in_no_training_pair(left_out: int) -> None:
    images, labels = digits.training_images(left_out)
    everything, every_label = digits.real_images("train")
    assert sorted(set(labels.tolist())) == [d for d in range(10) if d != left_out]
    assert len(images) == len(labels) == (every_label != left_out).sum()
    hidden = {image.numpy().tobytes() for image in everything[every_label == left_out]}
    assert not hidden & {image.numpy().tobytes() for image in images}


def test_concept_images_are_distinct_training_photos_of_the_left_out_digit(tmp_path: Path) -> None:
    photos = digits.concept_images(4, count=5, seed=1)
    assert [photo.mode for photo in photos] == ["RGB"] * 5
    assert {photo.size for photo in photos} == {(16, 16)}
    photos[0].save(tmp_path / "photo.png")
    images, labels = digits.real_images("train")
    fours = {image.mul(255).round().byte().numpy().tobytes() for image in images[labels == 4]}
    drawn = {np.asarray(photo).transpose(2, 0, 1).tobytes() for photo in photos}
    assert len(drawn) == 5
    assert drawn <= fours
    assert drawn == {np.asarray(p).transpose(2, 0, 1).tobytes() for p in digits.concept_images(4, count=5, seed=1)}
    assert drawn != {np.asarray(p).transpose(2, 0, 1).tobytes() for p in digits.concept_images(4, count=5, seed=2)}


# Pipeline


@pytest.mark.parametrize("text", [*map(digits.prompt, range(10)), digits.CLASS_PROMPT])
def test_every_word_of_a_prompt_is_one_token(pipe: StableDiffusionPipeline, text: str) -> None:
    assert pipe.tokenizer.tokenize(text) == [f"{word}</w>" for word in text.split()]


def test_every_digit_has_a_token_of_its_own(pipe: StableDiffusionPipeline) -> None:
    assert len({pipe.tokenizer(word).input_ids[1] for word in digits.WORDS}) == 10


@pytest.mark.parametrize("text", ["zebra", "naïve", "日本", "V*", "4 8"])
def test_other_words_fall_apart_into_known_pieces(pipe: StableDiffusionPipeline, text: str) -> None:
    ids = pipe.tokenizer(text).input_ids
    assert ids[0] == pipe.tokenizer.bos_token_id
    assert ids[-1] == pipe.tokenizer.eos_token_id
    assert len(ids) > 3
    assert pipe.tokenizer.unk_token_id not in ids[1:-1]


def test_a_new_word_is_one_new_token() -> None:
    tokenizer = digits.build().tokenizer
    before = len(tokenizer)
    assert tokenizer.add_tokens(["V*"]) == 1
    assert tokenizer("a photo of V*").input_ids[4:] == [before, tokenizer.eos_token_id]


def test_the_text_is_pooled_at_its_end(pipe: StableDiffusionPipeline) -> None:
    ids = pipe.tokenizer([digits.prompt(2)], padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, 16)
    with torch.no_grad():
        out = pipe.text_encoder(ids)
    torch.testing.assert_close(out.pooler_output, out.last_hidden_state[:, 7], rtol=0, atol=0)  # after six words


def test_attention_has_heads_of_eight_channels_and_more_at_both_levels(pipe: StableDiffusionPipeline) -> None:
    attentions = {n: m for n, m in pipe.unet.named_modules() if n.endswith(("attn1", "attn2"))}
    assert {(m.heads, m.inner_dim // m.heads) for m in attentions.values()} == {(4, 8), (4, 16)}
    assert len([n for n in attentions if n.endswith("attn2")]) == 7


def test_the_seed_fixes_the_weights_and_leaves_the_global_one_alone(pipe: StableDiffusionPipeline) -> None:
    state = torch.get_rng_state()
    assert same(digits.build(), pipe)
    assert not same(digits.build(1), pipe)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_generates_without_a_word(
    pipe: StableDiffusionPipeline, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    images = draw(pipe)
    assert images.shape == (2, 3, 16, 16)
    assert torch.isfinite(images).all()
    assert torch.equal(draw(pipe), images)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_saved_pipeline_draws_the_same(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, use_safetensors=True)
    assert same(loaded, pipe)
    assert loaded.tokenizer.model_max_length == 16
    torch.testing.assert_close(draw(loaded), draw(pipe), rtol=0, atol=1e-4)  # the steps carry rounding on


# Training


def test_training_moves_all_parts_and_reports() -> None:
    pipe = digits.build()
    before, reports = weights(pipe), []
    digits.train(pipe, 3, **STEPS, progress=lambda *report: reports.append(report))
    after = weights(pipe)
    for part in ("vae", "text_encoder", "unet"):
        assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part)), part
    assert reports == [("VAE", 1, 2), ("VAE", 2, 2), ("diffusion", 1, 2), ("diffusion", 2, 2)]
    assert not any(getattr(pipe, part).training for part in ("vae", "text_encoder", "unet"))


def test_training_scales_the_latents_to_a_deviation_of_one(cached: tuple[Path, StableDiffusionPipeline]) -> None:
    vae = cached[1].vae
    with torch.no_grad():
        latents = vae.encode(digits.training_images(3)[0] * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=1e-4)


def test_training_is_the_same_for_a_seed(cached: tuple[Path, StableDiffusionPipeline]) -> None:
    pipe, other = digits.build(1), digits.build(1)
    torch.manual_seed(99)
    digits.train(pipe, 3, **STEPS, seed=1)
    digits.train(other, 3, **STEPS, seed=2)
    assert same(pipe, cached[1])
    assert not same(other, cached[1])


# Cache


def test_a_cached_pipeline_is_read_and_not_trained(
    cached: tuple[Path, StableDiffusionPipeline], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, pipe = cached
    with monkeypatch.context() as patch:
        patch.delattr(digits, "train")
        loaded = digits_cache.load_or_train(cache, 3, seed=1, **STEPS)
    assert same(loaded, pipe)
    assert loaded.vae.config.scaling_factor == pipe.vae.config.scaling_factor
    torch.testing.assert_close(draw(loaded), draw(pipe), rtol=0, atol=1e-4)  # the steps carry rounding on
    assert capfd.readouterr() == ("", "")


def test_progress_bars_come_back(cached: tuple[Path, StableDiffusionPipeline]) -> None:
    from diffusers.utils import logging

    digits_cache.load_or_train(cached[0], 3, seed=1, **STEPS)
    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "no manifest"])
def test_a_damaged_cache_is_trained_anew(cached: tuple[Path, StableDiffusionPipeline], damage: str) -> None:
    cache, pipe = cached
    (folder,) = cache.iterdir()
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    file.unlink()  # the file that ``pipe`` has mapped into memory stays whole
    if damage == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "no manifest":
        file.write_bytes(content)
        (folder / "digits.json").unlink()
    reports: list[tuple[str, int, int | None]] = []
    again = digits_cache.load_or_train(cache, 3, seed=1, progress=lambda *report: reports.append(report), **STEPS)
    assert len(reports) == 4
    assert same(again, pipe)
    assert [f.name for f in cache.iterdir()] == [folder.name]


def test_recipes_do_not_share_a_cache(
    cached: tuple[Path, StableDiffusionPipeline], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = set()

    def stop(*args: Any, **options: Any) -> None:
        (name,) = tmp_path.iterdir()
        names.add(name.name.split(".")[1])  # .NAME.random.tmp
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train", stop)
    for options in ({}, {"seed": 1}, {"left_out": 1}, {"steps": 7}, {"vae_steps": 7}):
        with pytest.raises(KeyboardInterrupt):
            digits_cache.load_or_train(tmp_path, **options)
        assert list(tmp_path.iterdir()) == []
    assert len(names) == 5


def test_a_cache_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(digits, "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        digits_cache.load_or_train(tmp_path / "file", 3, **STEPS)


def test_the_cache_is_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert digits_cache._cache_home(None) == Path("/somewhere/comcat")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert digits_cache._cache_home(None) == Path("/home/someone/.cache/comcat")
    assert digits_cache._cache_home("here") == Path("here")


@pytest.mark.parametrize(("package", "command"), [("diffusers", "diffusers transformers"), ("sklearn", "scikit-learn")])
def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, command: str
) -> None:
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    digits._digits.cache_clear()
    with pytest.raises(ComcatError, match=f"pip install {command}"):
        digits_cache.load_or_train(tmp_path, 3, **STEPS)
    assert list(tmp_path.iterdir()) == []


# Scores


def test_the_classifier_reads_digits_that_it_has_not_seen(classifier: digits_score.Classifier) -> None:
    images, labels = digits.real_images("test")
    answers = classifier.predict(images)
    assert answers.dtype == torch.long
    assert (answers == labels).float().mean() >= 0.98


def test_scores_of_an_untrained_pipeline_are_percentages(
    pipe: StableDiffusionPipeline, classifier: digits_score.Classifier
) -> None:
    options: dict[str, Any] = {"count_concept": 3, "count_other": 2, "steps": 2}
    scores = digits_score.score(pipe, classifier, "a photo of V*", 3, **options)
    assert 0 <= scores.concept <= 100
    assert 0 <= scores.retention <= 100
    assert list(scores.per_digit) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert scores.retention == pytest.approx(sum(scores.per_digit.values()) / 9)
    assert scores.images[None].shape == (3, 3, 16, 16)
    assert scores.images[4].shape == (2, 3, 16, 16)
    without = digits_score.score(pipe, classifier, None, 3, **options)
    assert without.concept != without.concept  # NaN
    assert None not in without.images
    assert torch.equal(without.images[9], scores.images[9])


def test_scores_count_what_the_classifier_sees(
    pipe: StableDiffusionPipeline, classifier: digits_score.Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, labels = digits.real_images("test")
    wanted = {digits.prompt(d): real[labels == d][0] for d in range(10)}
    wanted["a photo of V*"] = wanted[digits.prompt(3)]
    wanted[digits.prompt(6)] = wanted[digits.prompt(1)]
    monkeypatch.setattr(digits_score, "generate", lambda pipe, prompts, **_: torch.stack([wanted[p] for p in prompts]))
    scores = digits_score.score(pipe, classifier, "a photo of V*", 3, count_concept=2, count_other=2)
    assert scores.concept == 100
    assert scores.per_digit == {d: 0 if d == 6 else 100 for d in range(10) if d != 3}
    assert scores.retention == pytest.approx(800 / 9)


def test_nothing_warns(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = digits.build()
        pipe.save_pretrained(tmp_path)
        StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True, use_safetensors=True)
    assert not caught
