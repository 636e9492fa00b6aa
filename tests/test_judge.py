"""Judging adapters: every score against its formula, who is told apart, what is kept, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from PIL import Image
from torch import Tensor, nn

import comcat
import diffusion
from comcat import CheckpointError, DataError, ModelError, customize
from comcat.customize import Contestant, judge
from comcat.customize.judging import metrics
from comcat.customize.judging.encoders import DualEncoder, ImageEncoder, features
from comcat.customize.judging.judge import folder_name, named
from comcat.customize.judging.prompt_lists import default_prompts, default_retention, dreambench, retained, templates
from comcat.wording import slug
from comcat_demos import digits
from conftest import randomize, vit
from test_customize_train import write_photos
from test_zero_shot import clip, write_tokenizer
from transformers_hosts import TOWER

PROMPTS = ["a photo of {}", "the {}", "the photo of a {}"]
RETAINED = ["a photo of the digit three", "a photo of the digit seven"]
QUICK: dict[str, Any] = {"prompts": PROMPTS, "retention_prompts": RETAINED, "seeds": (0, 1), "steps": 1}
PREPARED = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True, "size": {"shortest_edge": 14}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 14, "width": 14},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, encoders of both kinds, and two adapters; shared, so tests must not change them."""
    root = tmp_path_factory.mktemp("judge")
    write_photos(root / "photos", (16, 16), (20, 17), (31, 16))
    randomize(clip()).save_pretrained(root / "clip")
    write_tokenizer(root / "clip")
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    comcat.save(vit(dtype=torch.float32, img_size=14, num_classes=0), root / "dino")
    pipe = digits.build()
    for number, (name, word) in enumerate((("one", "V*"), ("two", "<w>"))):
        handle = customize.add_adapter(pipe, rank=1, token=word, token_init="digit", seed=number, name=name)
        generator = torch.Generator().manual_seed(number)
        for parameter in handle.parameters():
            parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        handle.info = {"prompt": f"a photo of {word} digit", "training": {"seconds": 7.5}}
        customize.save_adapter(pipe, root / f"{name}.safetensors", name=name)
        handle.remove()
    return root


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Shared: every test leaves it as it was."""
    return digits.build()


@pytest.fixture(scope="module")
def judged(place: Path, pipe: Any) -> tuple[Any, Path]:
    out = place / "judged"
    encoders = {"dino": str(place / "dino"), "clip": str(place / "clip")}
    return judge(pipe, [place / "one.safetensors", place / "two.safetensors"], place / "photos", out=out, **QUICK,
                 **encoders), out  # fmt: skip


# -- formulas ---------------------------------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(x, dim=-1)


def test_cosines_pair_by_pair() -> None:
    pictures, others, photos, texts = random(3, 5, 7), random(3, 5, 7, seed=1), random(2, 7, seed=2), random(3, 7)
    for p in range(3):
        for n in range(5):
            x = pictures[p, n]
            one = sum(float(x @ photo) for photo in photos) / 2
            assert metrics.to_photos(pictures, photos)[p, n] == pytest.approx(one)
            assert metrics.to_texts(pictures, texts)[p, n] == pytest.approx(float(x @ texts[p]))
            assert metrics.to_pictures(pictures, others)[p, n] == pytest.approx(float(x @ others[p, n]))
        pairs = [float(pictures[p, i] @ pictures[p, j]) for i in range(5) for j in range(5) if i != j]
        spread = metrics.diversity(pictures)
        assert spread is not None
        assert spread[p, 0] == pytest.approx(1 - sum(pairs) / 20)
    assert metrics.among_photos(photos) == pytest.approx(float(photos[0] @ photos[1]))
    assert metrics.among_photos(photos[:1]) is None
    assert metrics.diversity(pictures[:, :1]) is None


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Prompts of different difficulty: the interval is about the mean over all prompts there could be."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(60):
        hard = torch.randn(20, 1, generator=generator)
        found = metrics.estimate(hard + 0.5 * torch.randn(20, 4, generator=generator))
        assert found.low is not None
        assert found.high is not None
        assert found.low <= found.mean <= found.high
        inside += found.low <= 0 <= found.high
    assert 0.85 <= inside / 60 <= 1
    assert metrics.estimate(torch.tensor([[0.3]])) == metrics.Estimate(pytest.approx(0.3))


def test_a_small_difference_is_told_where_pictures_are_paired() -> None:
    values = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    assert not metrics.as_good(values - 0.1, values)  # far less than the spread
    noise = 0.3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    assert metrics.as_good(values + noise - noise.mean() - 0.01, values)


# -- encoders ---------------------------------------------------------------------------------------------------------


def pixels(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def test_features_of_models_with_and_without_a_classifier() -> None:
    x = pixels(14)
    with torch.no_grad():
        bare, classes = (vit(dtype=torch.float32, img_size=14, num_classes=n) for n in (0, 11))
        assert torch.equal(features(bare, x), bare(x))
        inner = classes.forward_head(classes.forward_features(x), pre_logits=True)
        assert (features(classes, x) - inner).abs().max() < 1e-6
        assert not classes.head._forward_pre_hooks
        for model in (tf.ViTModel(tf.ViTConfig(**TOWER)), tf.Dinov2Model(tf.Dinov2Config(**TOWER))):
            model = randomize(model).eval()
            assert torch.equal(features(model, x), model(x).last_hidden_state[:, 0])
        labelled = randomize(tf.ViTForImageClassification(tf.ViTConfig(**TOWER, num_labels=11))).eval()
        assert (features(labelled, x) - labelled.vit(x).last_hidden_state[:, 0]).abs().max() < 1e-6
        swin = randomize(tf.SwinModel(tf.SwinConfig(image_size=14, patch_size=7, embed_dim=6, depths=[1],
                                                    num_heads=[2], window_size=2))).eval()  # fmt: skip
        assert torch.equal(features(swin, x), swin(x).pooler_output)
        maps = nn.Conv2d(3, 5, 3)
        assert (features(maps, x) - maps(x).mean((2, 3))).abs().max() < 1e-6


def test_a_model_without_features_is_refused() -> None:
    with pytest.raises(ModelError, match="returns no features of every image"):
        features(nn.Flatten(0), pixels(14))


def test_clip_of_a_picture_and_a_prompt(place: Path) -> None:
    """Cosines as the model itself has them, of pixels that its own processor has prepared."""
    encoder = DualEncoder.open(str(place / "clip"))
    file = place / "photos" / "1.png"
    got = encoder.texts(["a photo of the red", "blue"]) @ encoder.pictures([file], Image.open)[0]
    model = tf.CLIPModel.from_pretrained(place / "clip").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(place / "clip")
    processor = tf.CLIPImageProcessor(**{k: v for k, v in PREPARED.items() if k != "image_processor_type"})
    x = processor(Image.open(file), return_tensors="pt").pixel_values
    with torch.no_grad():
        said = model(pixel_values=x, **tokenizer(["a photo of the red", "blue"], padding=True, return_tensors="pt"))
    wanted = said.logits_per_image[0] / model.logit_scale.exp()
    assert (got - wanted).abs().max() < 2e-2  # the two resize by other kernels


def test_encoders_that_cannot_be_used(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"encoder of --dino 'nonsense_model' cannot be used.*Give vit_small.*directory"
    ):
        ImageEncoder.open("nonsense_model")
    with pytest.raises(
        ModelError, match=r"encoder of --clip '.*dino' cannot be used.*no model of images and text.*--clip"
    ):
        DualEncoder.open(str(place / "dino"))
    randomize(tf.ViTModel(tf.ViTConfig(**TOWER))).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"does not say how its images are normalized.*preprocessor_config"):
        ImageEncoder.open(str(tmp_path / "vit"))
    broken = ImageEncoder.open(str(place / "dino"))
    next(broken.model.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        broken.pictures([place / "photos" / "0.png"], Image.open)


# -- prompts and words ------------------------------------------------------------------------------------------------


def test_the_lists_of_the_package() -> None:
    found = dreambench()
    assert len(found["subjects"]) == 30
    assert {len(found["prompts"][kind]) for kind in ("object", "live")} == {25}
    assert default_prompts("dog") != default_prompts("teapot")
    for kind in ("dog", "teapot"):
        assert len(set(templates(default_prompts(kind), kind, []))) == 25
    assert len(retained(default_retention(), "dog", ["V*"])) == 20


def test_prompts_with_the_word_are_templates_too() -> None:
    given = ["a V* dog in the snow", "V* alone", "<w> dog, wet", "a sks dog", "a {} here"]
    made = templates(given, "dog", ["V*", "<w>", "sks dog"])
    assert made == ["a {} in the snow", "{} alone", "{}, wet", "a {}", "a {} here"]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a dog"], "must speak of the subject once"),
        (["{} and {}"], "must speak of the subject once"),
        (["a {}", "a V* dog"], "twice"),
        ([], "there is no prompt"),
        (["  "], "there is no prompt"),
        ([3], "list of prompts"),
    ],
)
def test_prompts_that_are_none(prompts: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        templates(prompts, "dog", ["V*"])


def test_retention_is_of_prompts_without_the_subject() -> None:
    assert retained(["a {} here", "a toyota"], "dog", ["toy"]) == ["a dog here", "a toyota"]
    for prompt in ("a V* cat", "a <thing>", "a toy"):
        with pytest.raises(DataError, match="asks for the subject itself"):
            retained([prompt], "dog", ["toy"])


def contestant(name: str = "x", **args: Any) -> Contestant:
    return Contestant(name, lambda pipe: None, {}, **args)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("caption", "behind", "subject"),
    [
        ("a photo of V* dog", "dog", "V* dog"),
        ("a photo of V* stuffed animal.", "stuffed animal", "V* stuffed animal"),
        ("a photo of V*", None, "V*"),
        ("V* dog on the sunny beach", None, "V* dog"),
        (None, None, "V* dog"),
    ],
)
def test_what_a_caption_says_of_the_subject(caption: str | None, behind: str | None, subject: str) -> None:
    one = contestant(word="V*", caption=caption)
    assert one.behind_word() == behind
    assert one.subject(behind or "dog", None) == subject


def test_names_are_folders_that_differ() -> None:
    found = [one.name for one in named([contestant(n) for n in ("dog", "dog", "dog:0.5", "dog_0.5", "base", "é")])]
    assert found == ["dog", "dog_2", "dog:0.5", "dog_0.5_2", "base_2", "é"]
    assert len({folder_name(name) for name in found}) == 6
    assert folder_name("../x") == "_x"


# -- judging ----------------------------------------------------------------------------------------------------------


def look(folder: Path, encoder: Any, prompts: list[str]) -> Tensor:
    """(P, 2, D) of what an album shows, read by the names of its files."""
    rows = []
    for prompt in prompts:
        files = [next(folder.glob(f"{slug(prompt)}-????????-seed{seed}.png")) for seed in (0, 1)]
        rows.append(encoder.pictures(files, Image.open))
    return torch.stack(rows)


def test_scores_are_those_of_the_pictures(place: Path, judged: tuple[Any, Path]) -> None:
    """DINO, CLIP-I, CLIP-T, retention and diversity once more, from the files alone."""
    found, out = judged
    dino, clip_ = ImageEncoder.open(str(place / "dino")), DualEncoder.open(str(place / "clip"))
    photos = sorted((place / "photos").glob("*.png"))
    drawn = {"base": "digit", "one": "V* digit", "two": "<w> digit"}
    classes = [prompt.replace("{}", "digit") for prompt in PROMPTS]
    for name, word in drawn.items():
        row, texts = found.row(name), [prompt.replace("{}", word) for prompt in PROMPTS]
        for encoder, label in ((dino, "dino"), (clip_, "clip_i")):
            concept, rest = look(out / name, encoder, texts), look(out / name, encoder, RETAINED)
            real = encoder.pictures(photos, Image.open)
            assert row.scores[label].mean == pytest.approx(float((concept @ real.mT).mean()))
            if name != "base":
                same = (rest * look(out / "base", encoder, RETAINED)).sum(-1)
                assert row.scores[f"kept_{label}"].mean == pytest.approx(float(same.mean()))
                assert row.per_prompt[f"kept_{label}"] == pytest.approx(same.mean(1).tolist())
        said = (look(out / name, clip_, texts) * clip_.texts(classes)[:, None]).sum(-1)
        assert row.scores["clip_t"].mean == pytest.approx(float(said.mean()))
        spread = 1 - torch.stack([pair[0] @ pair[1] for pair in look(out / name, dino, texts)])
        assert row.scores["diversity"].mean == pytest.approx(float(spread.mean()))
    for name in ("one", "two"):
        lost = found.row("base").scores["clip_t_rest"].mean - found.row(name).scores["clip_t_rest"].mean
        assert found.row(name).scores["lost_clip_t"].mean == pytest.approx(lost)
    real = dino.pictures(photos, Image.open)
    pairs = [float(real[i] @ real[j]) for i in range(3) for j in range(3) if i != j]
    assert found.ceiling["dino"] == pytest.approx(sum(pairs) / 6)
    rest = look(out / "base", dino, RETAINED)
    assert found.other_seeds["dino"] == pytest.approx(float((rest[:, 0] * rest[:, 1]).sum(-1).mean()))


def test_what_a_judgement_says(place: Path, judged: tuple[Any, Path]) -> None:
    found, out = judged
    assert json.loads((out / "judgement.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    assert found.class_word == "digit"
    assert [row.name for row in found.rows] == ["base", "one", "two"]
    assert [row.subject for row in found.rows] == ["digit", "V* digit", "<w> digit"]
    assert not found.missing
    one = found.row("one")
    assert one.bytes == (place / "one.safetensors").stat().st_size
    assert one.train_seconds == 7.5
    assert one.speed is not None
    assert one.cost.per_picture is not None
    assert all(any(key in row.best for row in found.rows[1:]) for key in one.scores
               if key not in ("clip_t_rest", "diversity"))  # fmt: skip
    with Image.open(out / "grid.png") as page:
        assert page.width > page.height / 2 > 100


def test_an_adapter_draws_as_it_does_elsewhere(place: Path, pipe: Any, judged: tuple[Any, Path]) -> None:
    _, out = judged
    handle = customize.load_adapter(pipe, place / "one.safetensors")
    try:
        wanted = customize.generate(pipe, ["the V* digit"], seeds=(1,), steps=1)[0][0]
    finally:
        handle.remove()
    got = np.asarray(Image.open(next((out / "one").glob("the-v-digit-*-seed1.png"))), dtype=int)
    assert np.abs(got - np.asarray(wanted, dtype=int)).max() <= 1  # in a batch of another size


def test_pictures_are_drawn_once(place: Path, pipe: Any, judged: tuple[Any, Path], monkeypatch: Any) -> None:
    """The same again from the files alone; more prompts draw only what is new."""
    found, out = judged
    files = [place / "one.safetensors", place / "two.safetensors"]
    drawn: list[int] = []
    original = type(pipe).__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        drawn.append(len(kwargs["prompt"]))
        return original(self, *args, **kwargs)

    counted.__signature__ = __import__("inspect").signature(original)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", counted)
    encoders = {"dino": str(place / "dino"), "clip": str(place / "clip")}
    again = judge(pipe, files, place / "photos", out=out, **QUICK, **encoders)
    assert drawn == []
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in found.rows]
    more = {**QUICK, "prompts": [*PROMPTS, "{} again"]}
    grown = judge(pipe, files, place / "photos", out=out, **more, dino=encoders["dino"])
    assert sum(drawn) == 3 * 2
    assert len(grown.prompts) == 4
    assert set(grown.missing) == {"CLIP-I", "CLIP-T", "kept CLIP-I", "lost CLIP-T"}
    assert grown.missing["CLIP-T"] == "needs --clip"
    with pytest.raises(CheckpointError, match=r"base' were drawn with steps 1, not 2; give --overwrite"):
        judge(pipe, files, place / "photos", out=out, **{**QUICK, "steps": 2}, **encoders)
    before = (out / "judgement.json").read_text()
    with pytest.raises(CheckpointError, match=r"one' were drawn with adapter sha256 .*not"):
        judge(pipe, [Contestant.read(files[1], name="one")], place / "photos", out=out, **QUICK, **encoders)
    assert (out / "judgement.json").read_text() == before


def test_an_interrupted_judgement_goes_on(place: Path, pipe: Any, tmp_path: Path) -> None:
    asked = {**QUICK, "dino": str(place / "dino"), "batch_size": 1}
    count = 0

    def stop(stage: str, done: int, total: int | None) -> None:
        nonlocal count
        count += stage == "draw with one"
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="3 of 10 pictures of one are kept"):
        judge(pipe, [place / "one.safetensors"], place / "photos", out=tmp_path / "out", progress=stop, **asked)
    assert customize.adapters(pipe) == {}
    assert len(list((tmp_path / "out" / "one").glob("*.png"))) == 3
    assert not (tmp_path / "out" / "judgement.json").exists()
    stages: dict[str, int | None] = {}
    judge(pipe, [place / "one.safetensors"], place / "photos", out=tmp_path / "out", **asked,
          progress=lambda stage, done, total: stages.update({stage: total}))  # fmt: skip
    assert stages["draw with one"] == 7
    assert "draw with base" not in stages


def test_overwriting_draws_anew(place: Path, pipe: Any, tmp_path: Path) -> None:
    asked = {**QUICK, "dino": str(place / "dino")}
    judge(pipe, [place / "one.safetensors"], place / "photos", out=tmp_path, **asked)
    (tmp_path / "base" / "mine.png").write_bytes(b"mine")
    judge(pipe, [place / "two.safetensors"], place / "photos", out=tmp_path, **{**asked, "prompts": ["a {}"]},
          overwrite=True)  # fmt: skip
    assert len(list((tmp_path / "base").glob("*-seed?.png"))) == 2 * 3
    assert (tmp_path / "base" / "mine.png").read_bytes() == b"mine"


def test_what_does_not_fit_is_said_before_the_first_picture(place: Path, pipe: Any, tmp_path: Path) -> None:
    """And what was asked wrongly leaves nothing that stands in the way of asking rightly."""
    asked = {**QUICK, "dino": str(place / "dino"), "class_word": "digit"}
    other = diffusion.pipeline("sd1")
    foreign = tmp_path / "foreign.safetensors"
    customize.add_adapter(other, token="V*", name="foreign")
    customize.save_adapter(other, foreign)
    files = [place / "one.safetensors", foreign]
    with pytest.raises(CheckpointError, match="does not fit this unet"):
        judge(pipe, files, place / "photos", out=tmp_path / "out", **asked)
    with pytest.raises(DataError, match="steps is 0"):
        judge(pipe, files[:1], place / "photos", out=tmp_path / "out", **{**asked, "steps": 0})
    assert customize.adapters(pipe) == {}
    assert not list((tmp_path / "out").rglob("*seed*.png"))
    repeated = {**asked, "prompts": ["the {}"], "retention_prompts": ["the {}"]}  # the base's picture is one
    found = judge(pipe, files[:1], place / "photos", out=tmp_path / "out", **repeated)
    assert len(list((tmp_path / "out" / "base").glob("*.png"))) == 2
    assert len(found.row("base").per_prompt["dino"]) == 1


def test_strengths_of_one_file_are_told_apart(place: Path, pipe: Any, tmp_path: Path) -> None:
    """At strength 0 an adapter keeps everything; its word is then the only difference."""
    files = [Contestant.read(place / "one.safetensors", scale) for scale in (0.0, 1.0)]
    found = judge(pipe, files, place / "photos", out=tmp_path / "out", dino=str(place / "dino"), **QUICK)
    assert [row.name for row in found.rows] == ["base", "one:0", "one:1"]
    assert found.row("one:0").scores["kept_dino"].mean == pytest.approx(1)
    assert found.row("one:1").scores["kept_dino"].mean < 1 - 1e-6
    assert "kept_dino" in found.row("one:0").best
    assert "kept_dino" not in found.row("one:1").best


def test_a_lora_is_judged_beside(place: Path, pipe: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=1, target_modules=["to_q", "to_v"], init_lora_weights=False), "x")
    pipe.save_lora_weights(tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet, adapter_name="x"),
                           weight_name="lora.safetensors")  # fmt: skip
    with pytest.raises(ModelError, match="has adapters on it"):
        judge(pipe, [place / "one.safetensors"], place / "photos", out=tmp_path / "out", dino="x", **QUICK)
    pipe.unload_lora_weights()
    asked = {**QUICK, "dino": str(place / "dino"), "class_word": "digit", "subject": "zero digit"}
    with pytest.raises(DataError, match=r"'lora' has learned no word.*--subject"):
        judge(
            pipe, [tmp_path / "lora.safetensors"], place / "photos", out=tmp_path / "out", **{**asked, "subject": None}
        )
    files = [Contestant.read(tmp_path / "lora.safetensors", scale) for scale in (0.0, 1.0)]
    found = judge(pipe, [*files, place / "one.safetensors"], place / "photos", out=tmp_path / "out", **asked)
    assert found.row("lora:0").scores["kept_dino"].mean == pytest.approx(1)
    assert found.row("lora:1").scores["kept_dino"].mean < 1 - 1e-6
    assert not hasattr(pipe.unet, "peft_config")
    with pytest.raises(ModelError, match="is a LoRA, which has no learned word"):
        Contestant.read(tmp_path / "lora.safetensors", token="V*")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dino": None}, ModelError, r"without an encoder. Give --dino .*vit_small.*--clip .*openai"),
        ({"class_word": None}, DataError, "captions say different things"),
        ({"retention_prompts": ["a V* digit"]}, DataError, "asks for the subject itself"),
        ({"seeds": ()}, DataError, "no seed"),
        ({"steps": 0}, DataError, "steps is 0"),
        ({"images": "nowhere"}, DataError, "there is no folder nowhere"),
        ({"adapters": []}, DataError, "no adapter to judge"),
        ({"adapters": ["nowhere.safetensors"]}, CheckpointError, "nowhere"),
        ({"out": "photos"}, CheckpointError, "holds something else than a judgement"),
        ({"prompts": ["a {} " + "photo " * 30 + "{}"]}, DataError, "once"),
    ],
)
def test_what_is_refused(
    place: Path, pipe: Any, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    files = [place / "one.safetensors", Contestant.read(place / "two.safetensors", name="other")]
    object.__setattr__(files[1], "caption", "a photo of <w> thing")
    asked = {"adapters": files, "images": place / "photos", "out": tmp_path / "out", "dino": str(place / "dino")}
    asked |= {**QUICK, "class_word": "digit", **change}
    if change.get("out"):
        asked["out"] = place / "photos"
    with pytest.raises(error, match=message):
        judge(pipe, **asked)
    assert customize.adapters(pipe) == {}
    assert not (tmp_path / "out" / "judgement.json").exists()
