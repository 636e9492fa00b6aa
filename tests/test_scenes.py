"""Scenes of digits: captions that are read whole, a judge that is right about real scenes, and the contest on them."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from diffusers import StableDiffusionPipeline

from comcat.customize import adapters
from comcat_demos import digits_cache, scene_contest, scenes
from comcat_demos.contest_methods import Method
from comcat_demos.scene_contest import SceneContest
from comcat_demos.scenes import COLORS, SIDES, Scene
from comcat_demos.scenes_judge import PARTS, Hits, SceneJudge, SceneScores, score_scenes, varied_scenes


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return scenes.build_scenes()


@pytest.fixture(scope="module")
def judge() -> SceneJudge:
    return SceneJudge()


# Captions


def test_every_word_of_every_caption_is_one_token_and_none_is_cut_off(pipe: StableDiffusionPipeline) -> None:
    open_or = [
        Scene(*parts)
        for parts in itertools.product((None, *range(10)), (None, *COLORS), (None, *SIDES), (None, *scenes.NUMBERS))
    ]
    captions = [scene.caption() for scene in open_or]
    assert len(set(captions)) == len(captions) == 11 * 5 * 5 * 3
    ids = pipe.tokenizer(captions).input_ids
    assert [len(row) for row in ids] == [len(caption.split()) + 2 for caption in captions]
    assert max(map(len, ids)) <= pipe.tokenizer.model_max_length


def test_captions_say_what_is_asked_for() -> None:
    assert Scene(3, "red", "left", 2).caption() == "a photo of a pair of red three on the left"
    assert Scene(3, "red", "left", 2).caption("V*") == "a photo of a pair of red V* on the left"
    assert Scene(7, None, "bottom").caption() == "a photo of seven at the bottom"
    assert Scene(None, "blue").caption() == "a photo of blue digit"


def test_the_scenes_of_a_digit_are_all_different_and_leave_nothing_open() -> None:
    found = scenes.all_scenes(5)
    assert len(set(found)) == len(found) == 32
    assert not any(None in (s.color, s.side, s.number) for s in found)


def test_the_scenes_of_the_other_digits_cover_everything_in_equal_parts() -> None:
    found = [scene for digit in scenes.known() for scene in varied_scenes(digit, 8)]
    for name, words in (("color", COLORS), ("side", SIDES), ("number", scenes.NUMBERS)):
        counts = [sum(getattr(scene, name) == word for scene in found) for word in words]
        assert len(set(counts)) == 1, (name, counts)


# Images


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_judge_is_right_about_real_scenes(judge: SceneJudge, split: str) -> None:
    images, asked = scenes.draw_scenes(400, range(10), split, seed=1)
    assert images.shape == (400, 3, 16, 16)
    assert 0 <= images.min() <= images.max() <= 1
    hits = Hits.of(judge.parts(images, asked))
    assert (hits.color, hits.side, hits.number) == (100, 100, 100)
    assert hits.digit >= 97
    assert hits.right >= 97


def test_the_judge_sees_what_is_wrong_and_that_alone(judge: SceneJudge) -> None:
    images, drawn = scenes.draw_scenes(60, range(10), "train", seed=2)
    right = judge.parts(images, drawn)
    wrong = {
        "digit": [replace(s, digit=(s.digit + 1) % 10) for s in drawn if s.digit is not None],
        "color": [replace(s, color="red" if s.color != "red" else "blue") for s in drawn],
        "number": [replace(s, number=3 - s.number) for s in drawn if s.number is not None],
        "side": [replace(s, side={"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[s.side or ""])
                 for s in drawn],
    }  # fmt: skip
    for part, asked in wrong.items():
        column = PARTS.index(part)
        found = judge.parts(images, asked)
        others = [i for i in range(len(PARTS)) if i != column]
        assert torch.equal(found[:, others], right[:, others]), part
        assert not (found[:, column] & right[:, column]).any(), part


def test_what_is_left_open_is_right_and_nothing_is_nothing(judge: SceneJudge) -> None:
    images, _ = scenes.draw_scenes(5, range(10), "train", seed=3)
    assert judge.parts(images, [Scene(None)] * 5).all()
    black = torch.zeros(1, 3, 16, 16)
    assert not judge.parts(black, [Scene(3, "red", "left", 1)]).any()


def test_scenes_are_the_same_for_a_seed_and_of_the_digits_asked_for() -> None:
    images, found = scenes.draw_scenes(50, scenes.known((0, 4)), "train", seed=4)
    again, _ = scenes.draw_scenes(50, scenes.known((0, 4)), "train", seed=4)
    assert torch.equal(images, again)
    assert not {scene.digit for scene in found} & {0, 4}


def test_concept_photos_are_single_different_and_what_their_captions_say(judge: SceneJudge) -> None:
    photos = scenes.concept_photos(4, seed=1)
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image, _ in photos]) / 255
    assert judge.parts(pixels, [scene for _, scene in photos]).all()
    assert {scene.number for _, scene in photos} == {1}
    assert {scene.color for _, scene in photos} == set(COLORS)

    def content(seed: int) -> set[bytes]:
        return {image.tobytes() for image, _ in scenes.concept_photos(4, seed=seed)}

    assert len(content(1)) == 5
    assert content(1) == content(1)
    assert not content(1) & content(2)


# Scores and cache


def test_scores_of_an_untrained_pipeline(pipe: StableDiffusionPipeline, judge: SceneJudge) -> None:
    options: dict[str, Any] = {"rounds": 1, "other_scenes": 1}
    scores = score_scenes(pipe, judge, "V*", 4, (0, 4), **options)
    assert 0 <= scores.concept <= 100
    assert 0 <= scores.retention <= 100
    assert scores.images[None].shape == (32, 3, 16, 16)
    assert [digit for digit in scores.images if digit is not None] == [1, 2, 3, 5, 6, 7, 8, 9]
    without = score_scenes(pipe, judge, None, 4, (0, 4), **options)
    assert without.concept != without.concept  # NaN
    assert without.details["taught"] is None
    assert torch.equal(without.images[9], scores.images[9])


def test_a_cached_base_is_read_and_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_TRAINING_SCENES", 80)
    steps: dict[str, Any] = {"vae_steps": 2, "steps": 2}
    made = digits_cache.load_or_train_scenes(tmp_path, (4, 0), **steps)
    monkeypatch.delattr(scenes, "train_scenes")
    read = digits_cache.load_or_train_scenes(tmp_path, (0, 4), **steps)
    for part in ("vae", "text_encoder", "unet"):
        one, other = getattr(made, part).state_dict(), getattr(read, part).state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(AttributeError):
        digits_cache.load_or_train_scenes(tmp_path, (0, 5), **steps)


# Contest


@pytest.fixture(scope="module")
def contest(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> SceneContest:
    made = SceneContest(pipe, tmp_path_factory.mktemp("contest"), 4, steps=2)
    made.class_prompts = lambda: ["a photo of three", "a photo of a digit"] * 3  # type: ignore[method-assign]
    made.prepare()
    return made


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (Method("token", "token"), 64),
        (Method("comcat", "comcat", 2, 1e-2), 24064 + 64),
        (Method("LoRA", "lora", 4, 1e-2), 23296 + 64),
        (Method("DoRA", "dora", 4, 1e-2), 26112 + 64),
        (Method("LoKr", "lokr", 8, 1e-2, factor=2), 23520 + 64),
        (Method("LoKr", "lokr", 0, 1e-2, factor=4), 11008 + 64),
        (Method("OFT", "oft", 16, 1e-2), 22560 + 64),
        (Method("full", "full", 0, 1e-3), 1077572 + 64),
    ],
    ids=lambda value: value.kind + str(value.factor or "") if isinstance(value, Method) else "",
)
def test_every_method_trains_its_own_parameters_and_leaves_the_pipeline_as_it_was(
    contest: SceneContest, monkeypatch: pytest.MonkeyPatch, method: Method, parameters: int
) -> None:
    if method.kind not in ("token", "comcat", "full"):
        pytest.importorskip("peft")
    unet = contest.pipe.unet
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    x, time, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 16, 64)
    with torch.no_grad():
        base = unet(x, time, text).sample
    seen = []

    @torch.no_grad()
    def look(pipe: Any, *args: Any, **kwargs: Any) -> SceneScores:
        seen.append((pipe.unet(x, time, text).sample - base).abs().max().item())
        return SceneScores(None, Hits(0, 0, 0, 0, 0), {})

    monkeypatch.setattr(scene_contest, "score_scenes", look)
    outcome = contest.run(method)
    assert outcome.parameters == parameters
    assert (seen[0] > 0) == (method.kind != "token")
    assert contest.pipe.unet is unet
    assert not adapters(contest.pipe)
    assert before.keys() == unet.state_dict().keys()
    assert all(torch.equal(p, before[name]) for name, p in unet.state_dict().items())
