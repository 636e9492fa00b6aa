"""Learned tokens: exact rows in the embedding, every other prompt untouched, nothing left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import accelerate

from comcat import customize
from comcat.errors import DataError, ModelError
from comcat.hosts import clip
from diffusion import fill, picture, pipeline, tokenizer

OTHER = ("a photo of a dog", "a v* cat", "aV* V*s", "masks", "SKS", "V*_1", "")


def ids(pipe: Any, prompt: str, slot: str = "tokenizer") -> list[int]:
    text = pipe.maybe_convert_prompt(prompt, getattr(pipe, slot)) if hasattr(pipe, "maybe_convert_prompt") else prompt
    found: list[int] = getattr(pipe, slot)(text, padding="max_length", truncation=True).input_ids
    return found


def embedded(pipe: Any, prompt: str, encoder: str = "text_encoder") -> Tensor:
    """What the layers of a text encoder see of each token, without its place."""
    rows = clip.embeddings(getattr(pipe, encoder))
    look_up: Any = rows.look_up if isinstance(rows, clip.ExtraRows) else rows.token_embedding
    found: Tensor = look_up(torch.tensor([ids(pipe, prompt, encoder.replace("text_encoder", "tokenizer"))]))
    return found[0]


def encoded(pipe: Any, prompt: str) -> Tensor:
    found: Tensor = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0]
    return found


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("text", ["V*", "<my-Dog>", "sks"])
def test_rows(text: str, vectors: int) -> None:
    pipe = pipeline()
    table = pipe.text_encoder.get_input_embeddings()
    prompt = f"a {text}, a photo of {text}"
    before = embedded(pipe, "a dog dog")
    adapter = customize.add_adapter(pipe, token=text, token_vectors=vectors)
    assert adapter.token is not None
    new = adapter.token.vectors["text_encoder"]
    assert new.shape == (vectors, 15)
    found = embedded(pipe, prompt)
    size = len(tokenizer())
    pieces = ids(pipe, prompt)
    assert [i for i in pieces if i >= size] == 2 * adapter.token.ids
    for place, token_id in enumerate(pieces):
        expected = new[adapter.token.ids.index(token_id)] if token_id >= size else table.weight[token_id]
        assert torch.equal(found[place], expected)
    assert torch.equal(embedded(pipe, "a dog dog"), before)


def test_a_prompt_is_encoded_with_the_rows() -> None:
    """The same hidden states as if the vectors stood in a longer table."""
    pipe = pipeline()
    adapter = customize.add_adapter(pipe, token="V*", token_vectors=2)
    assert adapter.token is not None
    new = adapter.token.vectors["text_encoder"].detach()
    found = encoded(pipe, "a photo of V*")
    pieces = torch.tensor([ids(pipe, "a photo of V*")])
    table = pipe.text_encoder.get_input_embeddings()
    for row, token_id in enumerate(adapter.token.ids):
        pieces[pieces == token_id] = len(table.weight) + row
    adapter.remove()
    longer = torch.nn.Embedding.from_pretrained(torch.cat([table.weight, new]))
    pipe.text_encoder.set_input_embeddings(longer)
    assert torch.equal(found, pipe.text_encoder(pieces)[0])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_other_prompts_are_bitwise_unchanged(name: str) -> None:
    pipe = pipeline(name)
    original = pipe.tokenizer
    before = {prompt: (ids(pipe, prompt), encoded(pipe, prompt)) for prompt in OTHER}
    base = picture(pipe)
    adapters = [customize.add_adapter(pipe, name=n, token=t) for n, t in (("one", "V*"), ("two", "sks"))]
    assert pipe.tokenizer is original
    assert type(original).__name__ == type(tokenizer()).__name__
    assert isinstance(original, type(tokenizer()))
    assert len(original) == len(tokenizer())
    for prompt, (pieces, hidden) in before.items():
        assert ids(pipe, prompt) == pieces
        assert torch.equal(encoded(pipe, prompt), hidden)
    assert torch.equal(picture(pipe), base)
    for adapter in adapters:
        adapter.remove()
    assert type(original) is type(tokenizer())
    assert vars(original).keys() == vars(tokenizer()).keys()
    assert "V*" not in original.get_vocab()
    assert type(pipe.text_encoder.get_input_embeddings()) is torch.nn.Embedding
    assert torch.equal(picture(pipe), base)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3"])
def test_pooled_at_the_end_of_the_prompt(name: str, old: bool) -> None:
    """Older configurations pool at the largest id, which is the end of the prompt until there are new ones."""
    pipe = pipeline(name, old=old)
    encoders = customize.add_adapter(pipe, token="V*").token
    assert encoders is not None
    for encoder in encoders.vectors:
        pieces = torch.tensor([ids(pipe, "a V* dog", encoder.replace("text_encoder", "tokenizer"))])
        end = pieces[0].tolist().index(pipe.tokenizer.eos_token_id)
        module = getattr(pipe, encoder)
        found = module(pieces, output_hidden_states=True)
        inner = getattr(module, "text_model", module)(pieces)
        assert torch.equal(inner.pooler_output, inner.last_hidden_state[:, end])
        assert "pooler_output" in found or torch.equal(found[0], module.text_projection(inner.pooler_output))
    customize.remove_adapter(pipe, "default")
    for encoder in encoders.vectors:
        inner = getattr(getattr(pipe, encoder), "text_model", getattr(pipe, encoder))
        assert inner.eos_token_id == (2 if old else pipe.tokenizer.eos_token_id)
        assert not any("comcat" in key for key in inner.__dict__)


def test_two_text_encoders_have_vectors_of_their_own_widths() -> None:
    pipe = pipeline("sdxl")
    adapter = customize.add_adapter(pipe, token="V*", token_vectors=2, token_init="photo dog")
    assert adapter.token is not None
    assert {key: tuple(v.shape) for key, v in adapter.token.vectors.items()} == {
        "text_encoder": (2, 15),
        "text_encoder_2": (2, 14),
    }
    for encoder in adapter.token.vectors:
        words, new = embedded(pipe, "photo dog", encoder), embedded(pipe, "V*", encoder)
        assert torch.equal(words, new)
    assert torch.equal(encoded(pipe, "a V*"), encoded(pipe, "a photo dog"))


def test_init_words() -> None:
    pipe = pipeline()
    table = pipe.text_encoder.get_input_embeddings().weight
    dog = tokenizer()("dog", add_special_tokens=False).input_ids
    adapter = customize.add_adapter(pipe, token="V*", token_vectors=3, token_init="photo dog", name="one")
    assert adapter.token is not None
    photo, *rest = adapter.token.vectors["text_encoder"]
    assert torch.equal(photo, table[tokenizer()("photo", add_special_tokens=False).input_ids[0]])
    assert all(torch.equal(row, table[dog[0]]) for row in rest)
    with pytest.raises(ModelError, match="'photo dog' is 2 tokens and '<x>' has 1 vectors"):
        customize.add_adapter(pipe, token="<x>", token_init="photo dog", name="two")
    with pytest.raises(ModelError, match="'V\\*' is a learned token itself"):
        customize.add_adapter(pipe, token="<x>", token_init="V*", name="two")
    for empty in ("", "  "):
        with pytest.raises(ModelError, match="is 0 tokens"):
            customize.add_adapter(pipe, token="<x>", token_init=empty, name="two")


def test_random_vectors_are_of_the_size_of_the_table_and_of_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        pipe = pipeline()
        handle = customize.add_adapter(pipe, token="V*", token_vectors=50, seed=seed)
        assert handle.token is not None
        found.append(handle.token.vectors["text_encoder"].detach())
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert 0.8 < found[0].std() / table.std() < 1.2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"token": "dog"}, "knows 'dog' already"),
        ({"token": "DOG"}, "knows 'DOG' already"),
        ({"token": "z"}, "knows 'z' already"),
        ({"token": "<|endoftext|>"}, "already"),
        ({"token": ""}, "one word without spaces"),
        ({"token": "a b"}, "one word without spaces"),
        ({"token": "a\tb"}, "one word without spaces"),
        ({"token": " V*"}, "one word without spaces"),
        ({"token": 3}, "one word without spaces"),
        ({"token": "V*", "token_vectors": 0}, "at least 1 vector, not 0"),
        ({"token": "V*", "token_vectors": 1.5}, "at least 1 vector, not 1.5"),
        ({"token": "V*", "token_vectors": True}, "at least 1 vector, not True"),
    ],
)
def test_refusals(args: dict[str, Any], message: str) -> None:
    pipe = pipeline()
    original = pipe.tokenizer
    with pytest.raises(ModelError, match=message):
        customize.add_adapter(pipe, **args)
    assert pipe.tokenizer is original
    assert customize.adapters(pipe) == {}


@pytest.mark.parametrize("other", ["V*", "V*_1", "V*_2", "V*2", "*", "xV*"])
def test_tokens_do_not_contain_each_other(other: str) -> None:
    """diffusers puts the further vectors in by replacing text, wherever it stands."""
    pipe = pipeline()
    customize.add_adapter(pipe, token="V*", token_vectors=2, name="one")
    with pytest.raises(ModelError, match=r"already|contains the other"):
        customize.add_adapter(pipe, token=other, name="two")
    assert list(customize.adapters(pipe)) == ["one"]


def test_a_pipeline_that_reads_one_vector_per_word() -> None:
    pipe = pipeline("sd3")
    with pytest.raises(ModelError, match="StableDiffusion3Pipeline reads one vector per word"):
        customize.add_adapter(pipe, token="V*", token_vectors=2)
    base = picture(pipe, "a V*")
    customize.add_adapter(pipe, token="V*")
    assert not torch.equal(picture(pipe, "a V*"), base)


def test_no_text_encoder() -> None:
    with pytest.raises(ModelError, match="needs a CLIP text encoder"):
        customize.add_adapter(pipeline().unet, token="V*")


@pytest.mark.parametrize("first", ["one", "two"])
def test_the_other_token_stays_right(first: str) -> None:
    pipe = pipeline()
    handles = {
        name: fill(customize.add_adapter(pipe, name=name, token=token, token_vectors=2, scale=0.0), seed)
        for seed, (name, token) in enumerate((("one", "V*"), ("two", "<x>")))
    }
    prompts = {"one": "a V* dog", "two": "a <x> dog"}
    before = {name: encoded(pipe, prompt) for name, prompt in prompts.items()}
    ((_, other),) = [(name, h) for name, h in handles.items() if name != first]
    handles[first].remove()
    assert torch.equal(encoded(pipe, prompts[other.name]), before[other.name])
    assert not torch.equal(encoded(pipe, prompts[first]), before[first])
    customize.add_adapter(pipe, name="three", token="<y>")
    assert torch.equal(encoded(pipe, prompts[other.name]), before[other.name])


def test_gradient_reaches_the_new_rows_alone() -> None:
    pipe = pipeline()
    one = customize.add_adapter(pipe, name="one", token="V*", token_vectors=2)
    two = customize.add_adapter(pipe, name="two", token="<x>")
    encoded_prompt = pipe.text_encoder(torch.tensor([ids(pipe, "a photo of V*")]))[0]
    encoded_prompt.square().sum().backward()
    assert one.token is not None
    assert two.token is not None
    gradient = one.token.vectors["text_encoder"].grad
    assert gradient is not None
    assert gradient.any(1).all()
    assert two.token.vectors["text_encoder"].grad is None or not two.token.vectors["text_encoder"].grad.any()
    assert all(p.grad is None for p in pipe.text_encoder.parameters())
    assert not any(p is one.token.vectors["text_encoder"] for p in pipe.text_encoder.parameters())


@pytest.mark.parametrize("offload_first", [False, True])
def test_offloaded_text_encoder(offload_first: bool) -> None:
    pipe = pipeline()
    reference = pipeline()
    expected_handle = customize.add_adapter(reference, token="V*", token_init="dog", text_encoder_rank=1)
    for parameter in expected_handle.parameters():
        parameter.data += 0.1
    expected = encoded(reference, "a V*")
    base = encoded(pipe, "a dog")

    def offload() -> None:
        accelerate.cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))

    if offload_first:
        offload()
    handle = customize.add_adapter(pipe, token="V*", token_init="dog", text_encoder_rank=1)
    assert not any(p.is_meta for p in handle.parameters())
    for parameter in handle.parameters():
        parameter.data += 0.1
    if not offload_first:
        offload()
    torch.testing.assert_close(encoded(pipe, "a V*"), expected, atol=1e-5, rtol=1e-5)
    state, wanted = handle.state_dict(), expected_handle.state_dict()
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    handle.remove()
    torch.testing.assert_close(encoded(pipe, "a dog"), base, atol=1e-5, rtol=1e-5)
    accelerate.hooks.remove_hook_from_module(pipe.text_encoder, recurse=True)
    fresh = customize.add_adapter(pipe, token="V*", token_init="dog", text_encoder_rank=1)
    for parameter in fresh.parameters():
        parameter.data += 0.1
    torch.testing.assert_close(encoded(pipe, "a V*"), expected, atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    pipe = pipeline()
    pipe.text_encoder.to(torch.bfloat16)
    base = encoded(pipe, "a photo of a dog")
    handle = customize.add_adapter(pipe, token="V*", token_init="dog", dtype=torch.float32)
    assert handle.token is not None
    assert handle.token.vectors["text_encoder"].dtype == torch.float32
    assert torch.equal(encoded(pipe, "a photo of a V*"), base)


def test_the_tokenizer_is_saved_as_it_was(tmp_path: Path) -> None:
    pipe = pipeline()
    customize.add_adapter(pipe, token="V*")
    pipe.tokenizer.save_pretrained(tmp_path)
    assert not any("V*" in f.read_text() for f in tmp_path.iterdir())


def test_a_word_whose_vectors_are_in_another_text_encoder() -> None:
    """A tokenizer that is shared, and an encoder that is not: what would come out is an index beyond the table."""
    one, other = pipeline(), pipeline()
    customize.add_adapter(one, token="V*")
    other.tokenizer = one.tokenizer
    customize.generate(other, ["a dog"], steps=1, height=8, width=8)
    with pytest.raises(
        DataError, match=r"'V\*' in 'a V\*' is a learned word of this pipeline's tokenizer, and its vec"
    ):
        customize.generate(other, ["a V*"], steps=1, height=8, width=8)
    other.text_encoder = one.text_encoder
    customize.generate(other, ["a V*"], steps=1, height=8, width=8)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": "a dog"}, "prompts must be a list of texts"),
        ({"prompts": [3]}, "prompts must be a list of texts"),
        ({"steps": 0}, "steps is 0, but must be a whole number of at least 1"),
        ({"height": 0, "width": 0}, "height is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seeds": (1.5,)}, "the seed 1.5 must be a whole number"),
        ({"seeds": (2**64,)}, "the seed 18446744073709551616 must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_requests_that_cannot_be_drawn(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        customize.generate(pipeline(), **{"prompts": ["a dog"], "steps": 1, **request_})
