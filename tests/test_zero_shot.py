"""Zero-shot classification: the library's own scores, templates, both towers or one, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

import comcat
from comcat.errors import CalibrationError, DataError, ModelError
from comcat.models.dual_encoder import open_dual_encoder
from conftest import randomize
from test_other_libraries import CLIP
from transformers_hosts import TEXT, TOWER

WORDS = ["<pad>", "<end>", "a", "photo", "of", "red", "green", "blue", "the", "?"]
NAMES = ("red", "green", "blue")
TEMPLATES = ("a photo of a {}", "the {}")
SIDE = {"image_size": 14, "patch_size": 7}


def write_tokenizer(folder: Path) -> None:
    """One token for each word."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="?")
    fast.model_max_length = 11
    fast.save_pretrained(folder)


def clip() -> Any:
    text = {**TEXT, "eos_token_id": 1, "pad_token_id": 0}
    return tf.CLIPModel(tf.CLIPConfig(vision_config=TOWER, text_config=text, projection_dim=13))


def siglip() -> Any:
    return tf.SiglipModel(tf.SiglipConfig(vision_config=TOWER, text_config={**TEXT, "hidden_size": 15}))


def chinese() -> Any:
    vision = {**TOWER, "projection_dim": 13}
    return tf.ChineseCLIPModel(tf.ChineseCLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=13))


HOSTS: dict[str, Callable[[], Any]] = {"clip": clip, "siglip": siglip, "chinese": chinese}


@pytest.fixture(scope="module", params=HOSTS)
def place(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a dual encoder of transformers, with a tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    randomize(HOSTS[request.param]()).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def pictures(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(3))
    return [(x[:5], torch.arange(5) % 3), (x[5:], torch.arange(5, count) % 3)]


@pytest.mark.filterwarnings("ignore:.*needs text beside images")
def test_one_template_is_what_the_model_itself_says(place: Path) -> None:
    """Its own forward, on images and prompts together."""
    whole, tokenize = open_dual_encoder(str(place))
    zero_shot = comcat.ZeroShot.open(str(place), NAMES, TEMPLATES[:1])
    x, _ = pictures()[0]
    prompts = tokenize([TEMPLATES[0].replace("{}", name) for name in NAMES])
    with torch.no_grad():
        wanted = whole(pixel_values=x, **prompts).logits_per_image.softmax(1)
        got = zero_shot.classifier(whole)(whole, x).softmax(1)
    assert (wanted - got).abs().max() < 1e-5


def test_templates_are_averaged(place: Path) -> None:
    whole, tokenize = open_dual_encoder(str(place))
    zero_shot = comcat.ZeroShot.open(str(place), NAMES, TEMPLATES)
    assert zero_shot.embeddings(whole).svd().S.min() > 1e-2  # the classes differ
    for number, name in enumerate(NAMES):
        parts = []
        for template in TEMPLATES:
            with torch.no_grad():
                found = whole.get_text_features(**tokenize([template.replace("{}", name)])).pooler_output[0]
            parts.append(found / found.norm())
        mean = (parts[0] + parts[1]) / 2
        assert (zero_shot.embeddings(whole)[number] - mean / mean.norm()).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*needs text beside images")
def test_an_image_tower_alone(place: Path) -> None:
    """The same answers as the whole model, where its projection is in it; else it is refused by name."""
    whole, _ = open_dual_encoder(str(place))
    tower = comcat.load_model(str(place))
    zero_shot = comcat.ZeroShot.open(str(place), NAMES, TEMPLATES)
    if isinstance(whole, tf.ChineseCLIPModel):
        with pytest.raises(ModelError, match=r"ChineseCLIPVisionModel has no text tower.*projection.*whole model"):
            comcat.evaluate(tower, pictures(), zero_shot=zero_shot)
        return
    one, both = (comcat.evaluate(model, pictures(), zero_shot=zero_shot) for model in (tower, whole))
    assert (one.top1, one.outputs, one.images) == (both.top1, "classes", 12)
    assert one.loss == pytest.approx(both.loss, rel=1e-5)
    same = comcat.agreement(tower, whole, pictures(), zero_shot=zero_shot)
    assert same.same == 100
    assert same.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*needs text beside images")
def test_a_compressed_tower_and_a_compressed_whole(tmp_path: Path) -> None:
    model = randomize(clip()).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    zero_shot = comcat.ZeroShot.open(str(tmp_path), NAMES, TEMPLATES)
    tower = comcat.load_model(str(tmp_path))
    small = comcat.compress(tower, comcat.plan(tower, comcat.Budget(params=0.9)))
    assert comcat.evaluate(small, pictures(), zero_shot=zero_shot).images == 12
    whole = comcat.compress(model, comcat.plan(model, comcat.Budget(params=0.9)))
    changed = {name for name in whole.comcat.plan.layers if name.startswith("text_model")}
    assert changed
    assert (zero_shot.embeddings(whole) - zero_shot.embeddings(model)).abs().max() > 1e-3
    assert comcat.agreement(whole, model, pictures(), zero_shot=zero_shot).kl > 0


def test_images_do_not_calibrate_text() -> None:
    """Nothing of a whole model is reduced by statistics that have not seen it."""
    model = randomize(clip()).eval()
    with pytest.raises(CalibrationError, match=r"'text_model.encoder.layers.0.self_attn' was never called"):
        comcat.calibrate(model, pictures(), forward=lambda model, x: model.get_image_features(x).pooler_output)


def test_open_clip(tmp_path: Path) -> None:
    """Its own tokenizer comes with the package."""
    shape = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "vocab_size": 49408}}
    model = randomize(open_clip.CLIP(**shape)).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    zero_shot = comcat.ZeroShot.open(str(tmp_path), NAMES, TEMPLATES)
    x, labels = pictures()[0]
    with torch.no_grad():
        words = open_clip.tokenize([t.replace("{}", name) for t in TEMPLATES for name in NAMES], 11)
        text = nn.functional.normalize(model.encode_text(words), dim=1).view(2, 3, -1).mean(0)
        text = nn.functional.normalize(text, dim=1)
        wanted = model.logit_scale.exp() * nn.functional.normalize(model.encode_image(x), dim=1) @ text.T
    tower = comcat.load_model(str(tmp_path))
    for one in (model, tower):
        with torch.no_grad():
            assert (zero_shot.classifier(one)(one, x) - wanted).abs().max() < 1e-4
        assert comcat.evaluate(one, [(x, labels)], zero_shot=zero_shot).images == 5


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (NAMES, ["a photo"], r"a template holds \{\} once.*not a photo"),
        (NAMES, ["{} and {}"], "a template holds"),
        (NAMES, [], "a template holds"),
        ([], TEMPLATES, "every class needs a name"),
        (["red", " "], TEMPLATES, "every class needs a name"),
    ],
)
def test_texts_that_do_not_work(names: Any, templates: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        comcat.ZeroShot.of(nn.Identity(), lambda prompts: None, names, templates)


def test_models_without_a_tokenizer_or_text(tmp_path: Path) -> None:
    randomize(clip()).save_pretrained(tmp_path / "clip")
    with pytest.raises(ModelError, match="has no tokenizer beside its weights; put its files there"):
        comcat.ZeroShot.open(str(tmp_path / "clip"), NAMES, TEMPLATES)
    write_tokenizer(tmp_path / "clip")
    config = tmp_path / "clip" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    with pytest.raises(ModelError, match="asks to run code of its own; comcat never does"):
        comcat.ZeroShot.open(str(tmp_path / "clip"), NAMES, TEMPLATES)
    tf.ViTModel(tf.ViTConfig(**TOWER)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ModelError, match=r"is no model of images and text with a tokenizer.*--text MODEL"):
        comcat.ZeroShot.open(str(tmp_path / "vit"), NAMES, TEMPLATES)
    with pytest.raises(ModelError, match="is no model of images and text"):
        comcat.ZeroShot.open(str(tmp_path / "nowhere"), NAMES, TEMPLATES)
    shape = {**CLIP, "text_cfg": {**CLIP["text_cfg"], "hf_tokenizer_name": "somebody/words"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape}))
    save_file(open_clip.CLIP(**CLIP).state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"'somebody/words' would be looked for on the network"):
        comcat.ZeroShot.open(str(tmp_path), NAMES, TEMPLATES)
