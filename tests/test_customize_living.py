"""Adapters in a pipeline that lives on: other pipelines around it, models made of it, 8 bit, offloading, inversions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline, UNetMotionModel
from diffusers.models import attention_processor as ap

from comcat import customize
from comcat.customize.adapter.words import has_token, placeholders
from comcat.customize.generation import check_prompts, check_words
from comcat.errors import CheckpointError, DataError, ModelError
from diffusion import TOKENS, fill, model, on, output, picture, pipeline, text_encoder, tokenizer

VECTOR = torch.linspace(-1, 1, 15)


def encoded(pipe: Any, prompt: str) -> Tensor:
    found: Tensor = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
    return found


def sibling(pipe: Any, **parts: Any) -> Any:
    return StableDiffusionImg2ImgPipeline(**{**pipe.components, **parts}, requires_safety_checker=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for the same pipeline: with a word, with the same word, and with products in the text encoder."""
    place = tmp_path_factory.mktemp("adapters")
    found = {}
    made: dict[str, dict[str, Any]] = {"dog": {"token": "V*"}, "cat": {"token": "V*"}, "text": {"text_encoder_rank": 1}}
    for seed, (name, args) in enumerate(made.items()):
        pipe = pipeline()
        fill(customize.add_adapter(pipe, name=name, **args), seed)
        found[name] = customize.save_adapter(pipe, place / f"{name}.safetensors")
    return found


# Words beside a user's own inversions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["inversion", "adapter"])
@pytest.mark.parametrize("gone", ["inversion", "all inversions", "adapter"])
def test_a_textual_inversion_and_a_learned_word(files: dict[str, Path], first: str, gone: str) -> None:
    alone, other = pipeline(), pipeline()
    alone.load_textual_inversion({"<style>": VECTOR})
    customize.load_adapter(other, files["dog"])
    want = {
        "a photo of <style>": encoded(alone, "a photo of <style>"),
        "a photo of V*": encoded(other, "a photo of V*"),
    }
    pipe = pipeline()
    steps: list[Callable[[], Any]] = [
        lambda: pipe.load_textual_inversion({"<style>": VECTOR}),
        lambda: customize.load_adapter(pipe, files["dog"]),
    ]
    for step in steps if first == "inversion" else steps[::-1]:
        step()
    for prompt, hidden in want.items():
        torch.testing.assert_close(encoded(pipe, prompt), hidden)
    if gone == "adapter":
        customize.remove_adapter(pipe, "dog")
        torch.testing.assert_close(encoded(pipe, "a photo of <style>"), want["a photo of <style>"])
        assert len(pipe.tokenizer) == len(alone.tokenizer)
        pipe.load_textual_inversion({"<more>": VECTOR})  # at the row that it would have had
        assert pipe.tokenizer.convert_tokens_to_ids("<more>") == len(tokenizer()) + 1
    else:
        pipe.unload_textual_inversion("<style>" if gone == "inversion" else None)
        torch.testing.assert_close(encoded(pipe, "a photo of V*"), want["a photo of V*"])
        customize.remove_adapter(pipe, "dog")
    assert "V*" not in pipe.tokenizer.get_vocab()


# Several pipelines


@pytest.mark.parametrize("before", [True, False])
def test_a_sibling_knows_the_word_whenever_it_was_made(files: dict[str, Path], before: bool) -> None:
    pipe = pipeline()
    base = encoded(pipe, "a V*")
    other = sibling(pipe) if before else None
    customize.load_adapter(pipe, files["dog"])
    other = other or sibling(pipe)
    assert not torch.equal(encoded(pipe, "a V*"), base)
    assert torch.equal(encoded(other, "a V*"), encoded(pipe, "a V*"))
    customize.remove_adapter(other, "dog")
    assert torch.equal(encoded(pipe, "a V*"), base)
    assert type(pipe.tokenizer) is type(tokenizer())


def test_a_sibling_with_another_text_encoder_is_told(files: dict[str, Path]) -> None:
    pipe = pipeline()
    customize.load_adapter(pipe, files["dog"])
    own = sibling(pipe, text_encoder=text_encoder(seed=3), tokenizer=tokenizer())
    with pytest.raises(DataError, match=r"'V\*' .* is a word of the adapter 'dog'.*shares this one's model"):
        customize.generate(own, ["a photo of V*"])
    customize.remove_adapter(own, "dog")  # from where it was put
    assert type(pipe.tokenizer) is type(tokenizer())


def test_one_name_in_a_text_encoder_that_is_shared(files: dict[str, Path]) -> None:
    pipe, other = pipeline(), pipeline()
    other.text_encoder = pipe.text_encoder
    handle = customize.load_adapter(pipe, files["text"], name="one")
    with pytest.raises(ModelError, match="text_encoder carries an adapter 'one' of another pipeline"):
        customize.load_adapter(other, files["text"], name="one")
    assert customize.adapters(other) == {}
    handle.remove()


def test_a_cached_prompt_of_a_word_that_is_gone(files: dict[str, Path]) -> None:
    pipe = pipeline()
    handle = customize.load_adapter(pipe, files["dog"])
    ids = pipe.tokenizer("a V*", return_tensors="pt").input_ids
    customize.load_adapter(pipe, files["cat"], token="<cat>")
    handle.remove()
    with pytest.raises(ModelError, match="a learned word that it has no vectors of"):
        pipe.text_encoder(ids)


# The same word twice, no text encoder, long prompts


def test_two_adapters_taught_the_same_word(files: dict[str, Path]) -> None:
    pipe, alone = pipeline(), pipeline()
    customize.load_adapter(pipe, files["dog"])
    customize.load_adapter(alone, files["cat"])
    with pytest.raises(ModelError, match=r"has learned 'V\*' already; give this one another word, e.g. token='V2\*'"):
        customize.load_adapter(pipe, files["cat"])
    customize.load_adapter(pipe, files["cat"], token="V2*")
    torch.testing.assert_close(encoded(pipe, "a V2*"), encoded(alone, "a V*"))
    with pytest.raises(ModelError, match="no learned word that could be called 'V3\\*'"):
        customize.load_adapter(pipe, files["text"], token="V3*")


@pytest.mark.parametrize(("name", "lost"), [("dog", "token"), ("text", "text_encoder")])
def test_a_pipeline_without_text_encoder(files: dict[str, Path], tmp_path: Path, name: str, lost: str) -> None:
    pipe = pipeline()
    pipe.register_modules(text_encoder=None, tokenizer=None)
    with pytest.warns(UserWarning, match=f"no text encoder: .*{lost} cannot be used"):
        handle = customize.load_adapter(pipe, files[name])
    assert {component for component, _ in handle.layers} == {"unet"}
    with pytest.raises(CheckpointError, match=f"is not whole.*{lost}"):
        customize.save_adapter(pipe, tmp_path / "x.safetensors")


def test_prompts(files: dict[str, Path]) -> None:
    pipe = pipeline()
    customize.load_adapter(pipe, files["dog"])
    for prompt in ("a V*", "a (V*) dog", "V*'s dog", '"V*".'):
        check_prompts(pipe, [prompt])
    with pytest.warns(UserWarning, match=r"'\(V\*:1.2\)' is read as plain text"):
        check_prompts(pipe, ["a (V*:1.2) dog"])
    long = "a " * (TOKENS - 3)
    check_words(pipe, [long + "V*"])
    with pytest.raises(DataError, match=f"'V\\*' stands at place {TOKENS}.*reads {TOKENS}"):
        check_words(pipe, [long + "a V*"])
    with pytest.raises(DataError, match=r"nothing on this pipeline has learned 'W\*'"):
        check_prompts(pipe, ["a V* and a W*"])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a (V*:1.2) dog", ["V*"]),
        ('"<my-dog>", photo:V* V*', ["<my-dog>", "V*"]),
        ("V*'s", ["V*"]),
        ("a 5* hotel, **bold**, a sks dog", []),
    ],
)
def test_what_counts_as_a_word(prompt: str, words: list[str]) -> None:
    assert placeholders(prompt) == words
    assert all(has_token(prompt, word) for word in words)


# What else is done with the model


def test_models_made_of_it_have_the_base_weights(tmp_path: Path) -> None:
    m, x, _, handle = on("sd1", name="dog")
    expected, state = output(m, x), m.state_dict()
    assert not any("extras" in key or "dog" in key for key in state)
    with pytest.warns(UserWarning, match="a model that carries dog"):
        made = ControlNetModel.from_unet(m)
    weights = made.state_dict()
    shared = [key for key in state if key.startswith(("down_blocks", "mid_block"))]
    assert all(torch.equal(weights[key], state[key]) for key in shared)
    m.load_state_dict(state)
    assert torch.equal(output(m, x), expected)
    with pytest.warns(UserWarning, match="a model that carries dog"):
        motion = UNetMotionModel.from_unet2d(m)
    assert all(torch.equal(value, state[key]) for key, value in motion.state_dict().items() if key in state)
    path = customize.save_adapter(m, tmp_path / "dog.safetensors")
    assert customize.load_adapter(motion, path).layers.keys() == handle.layers.keys()


@pytest.mark.parametrize("first", ["casting", "adapter"])
@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_products_beside_a_base_in_8_bit(name: str, first: str) -> None:
    m = model(name, torch.float32)
    steps: list[Callable[[], Any]] = [
        lambda: m.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32),
        lambda: fill(customize.add_adapter(m)),
    ]
    for step in steps if first == "casting" else steps[::-1]:
        step()
    handle = customize.get_adapter(m, "default")
    state = {key: value.clone() for key, value in handle.state_dict().items()}
    assert {value.dtype for value in state.values()} == {torch.float32}
    _, x, _, other = on(name)
    assert output(m, x).isfinite().all()
    assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())
    m.to(torch.float8_e4m3fn)
    assert all(torch.equal(state[key], value) for key, value in handle.state_dict().items())


class Packed(nn.Module):
    """A linear layer as 4-bit libraries keep it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        self.real = [linear]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.real[0](x)
        return found


def test_products_beside_packed_layers() -> None:
    m, x, _, _ = on("sd1")
    expected = output(m, x)
    packed = model("sd1", torch.float32)
    for attn in [module for module in packed.modules() if isinstance(module, ap.Attention)]:
        attn.to_q, attn.to_k = Packed(attn.to_q), Packed(attn.to_k)
    handle = fill(customize.add_adapter(packed))
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    torch.testing.assert_close(output(packed, x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind: str, disk: bool, tmp_path: Path) -> None:
    m, x, base, handle = on("sd1")
    expected, state = output(m, x), {key: value.clone() for key, value in handle.state_dict().items()}
    cpu = torch.device("cpu")
    m.enable_group_offload(cpu, cpu, kind, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path) if disk else None)
    torch.testing.assert_close(output(m, x), expected)
    assert all(torch.equal(value, state[key]) for key, value in handle.state_dict().items())
    handle.remove()
    torch.testing.assert_close(output(m, x), base)
    fill(customize.add_adapter(m))
    torch.testing.assert_close(output(m, x), expected)


def test_a_word_starts_from_a_table_that_is_on_disk(tmp_path: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    pipe, reference = pipeline(), pipeline()
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.text_encoder, cpu, cpu, "leaf_level", offload_to_disk_path=str(tmp_path))
    found = [customize.add_adapter(p, token="V*", token_init="dog").token for p in (pipe, reference)]
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0].vectors["text_encoder"], found[1].vectors["text_encoder"])


def test_processors_are_set_on_all_layers_or_on_none() -> None:
    m, x, _, _ = on("sd1", targets="mid_block", name="dog")
    expected, before = output(m, x), dict(m.attn_processors)
    given: dict[str, Any] = {key: ap.IPAdapterAttnProcessor2_0(20, 7) for key in before}
    with pytest.raises(ModelError, match="IPAdapterAttnProcessor2_0 would replace the products of dog"):
        m.set_attn_processor(given)
    assert m.attn_processors == before
    attn = m.mid_block.attentions[0].transformer_blocks[0].attn1
    with pytest.raises(ModelError, match="would replace"):
        attn.processor = ap.AttnAddedKVProcessor()
    assert torch.equal(output(m, x), expected)
    assert all(type(p)() is not None for p in before.values())  # as load_ip_adapter makes them anew


def test_pictures_draw_the_same_with_the_sibling() -> None:
    pipe = pipeline()
    fill(customize.add_adapter(pipe, text_encoder_rank=1, token="V*"))
    expected = picture(pipe, "a V* dog")
    again = type(pipe)(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(again, "a V* dog"), expected)
