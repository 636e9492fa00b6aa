"""Adapters on the denoisers that people use: the base at first, Eq. 8 in every layer, slopes, and nothing left."""

import threading
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as ap
from torch import Tensor, nn

from comcat import customize
from comcat.errors import ModelError
from comcat.hosts.added_proof import WrittenOut
from comcat.hosts.seam import Seam
from comcat.nn.carries import Carries
from comcat.nn.derived import original_class
from conftest import randomize
from diffusion import fill, snapshot
from small_denoisers_image import IMAGE_MODELS
from small_denoisers_video import VIDEO_MODELS

pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")

NAMED = [
    "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "ZImageTransformer2DModel", "SanaTransformer2DModel",
    "ChromaTransformer2DModel", "HunyuanImageTransformer2DModel", "Lumina2Transformer2DModel",
    "Kandinsky5Transformer3DModel", "WanTransformer3DModel", "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel", "Krea2Transformer2DModel", "HiDreamImageTransformer2DModel",
]  # fmt: skip
#: Hosts that compute in float32 whatever they are given.
SINGLE = ("Kandinsky5Transformer3DModel",)
MODELS = {**IMAGE_MODELS, **VIDEO_MODELS}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """A frozen random model and its inputs, in float64 where it takes that."""
    config, inputs = MODELS[name]
    dtype = torch.float32 if name in SINGLE else torch.float64
    model = randomize(getattr(diffusers, name)(**config)).to(dtype).eval().requires_grad_(False)

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return [cast(item) for item in value] if type(value) is list else value

    return model, {key: cast(value) for key, value in inputs().items()}


def run(model: Any, x: dict[str, Any]) -> Tensor:
    found = model(**x, return_dict=False)[0]
    return torch.stack(list(found)) if isinstance(found, list) else found


@pytest.fixture(scope="module", params=NAMED)
def host(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    return (request.param, *built(request.param))


@torch.no_grad()
def test_identity_and_removal(host: tuple[str, Any, dict[str, Any]]) -> None:
    name, model, x = host
    base, before = run(model, x), snapshot(model)
    adapter = customize.add_adapter(model)
    assert torch.equal(run(model, x), base)
    for layer in adapter.layers.values():
        layer._started = True  # a product of zero, computed all the same
    close = 1e-5 if name in SINGLE else 1e-12
    torch.testing.assert_close(run(model, x), base, rtol=close, atol=close * float(base.abs().max()))
    fill(adapter)
    assert (run(model, x) - base).abs().max() > 1e-4 * base.abs().max()
    adapter.enabled = False
    assert torch.equal(run(model, x), base)
    adapter.remove()
    assert torch.equal(run(model, x), base)
    assert snapshot(model) == before


@torch.no_grad()
def test_every_layer_is_eq_8_written_out(host: tuple[str, Any, dict[str, Any]]) -> None:
    name, model, x = host
    adapter = fill(customize.add_adapter(model, scale=0.7))
    calls: dict[str, Any] = {}

    def keep(layer: str) -> Any:
        return lambda module, args, kwargs, out: calls.__setitem__(layer, (args, kwargs, out))

    hooks = [model.get_submodule(n).register_forward_hook(keep(n), with_kwargs=True) for _, n in adapter.layers]
    run(model, x)
    for hook in hooks:
        hook.remove()
    assert {n for _, n in adapter.layers} == calls.keys()
    close = 1e-5 if name in SINGLE else 1e-12
    for (_, n), layer in adapter.layers.items():
        attn = model.get_submodule(n)
        args, kwargs, out = calls[n]
        seam = Seam(original_class(attn, Carries), attn.processor)
        torch.testing.assert_close(
            out, seam.run(WrittenOut(attn.meeting, layer), attn, args, kwargs), rtol=close, atol=close
        )
    adapter.remove()


def test_gradients_are_the_slopes(host: tuple[str, Any, dict[str, Any]]) -> None:
    name, model, x = host
    if name == "HiDreamImageTransformer2DModel":
        pytest.skip("its experts run without derivatives outside of training")
    adapter = fill(customize.add_adapter(model))
    parameters = list(adapter.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    run(model, x).square().mean().backward()
    generator = torch.Generator().manual_seed(4)
    along = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    slope = sum(float((p.grad * a).sum()) for p, a in zip(parameters, along, strict=True) if p.grad is not None)
    assert slope
    step = 3e-4  # hosts round their norms and rotary embeddings to float32
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, a in zip(parameters, along, strict=True):
                p.add_(a, alpha=sign * step)
            values.append(float(run(model, x).square().mean()))
    found = (values[0] - values[1]) / (2 * step)
    assert found == pytest.approx(slope, rel=0.02)
    adapter.remove()


def test_layers_and_streams_of_flux_2(tmp_path: Path) -> None:
    model, x = built("Flux2Transformer2DModel")
    adapter = fill(customize.add_adapter(model, name="dog"))
    streams = {name: list(layer.streams) for (_, name), layer in adapter.layers.items()}
    assert streams == {
        "transformer_blocks.0.attn": ["sample", "context"],
        "single_transformer_blocks.0.attn": ["sample"],
    }
    assert customize.add_adapter(model, targets="joint", name="joint").ranks == adapter.ranks
    customize.remove_adapter(model, "joint")
    with torch.no_grad():
        expected = run(model, x)
        path = customize.save_adapter(model, tmp_path / "dog.safetensors")
        adapter.remove()
        customize.load_adapter(model, path)
        torch.testing.assert_close(run(model, x), expected, rtol=1e-6, atol=1e-6)  # stored in float32
    with pytest.raises(ModelError, match=r"single_transformer_blocks.0.attn' .* as a LoRA: its projections are fused"):
        customize.export_lora(model, tmp_path / "lora.safetensors")


def test_what_has_no_softmax_is_left_out_or_refused_by_name() -> None:
    model, _ = built("SanaTransformer2DModel")
    assert {name for _, name in customize.add_adapter(model).layers} == {"transformer_blocks.0.attn2"}
    customize.remove_adapter(model, "default")
    with pytest.raises(ModelError, match=r"attn1' is Attention with SanaLinearAttnProcessor2_0: no softmax"):
        customize.add_adapter(model, targets=["attn1", "attn2"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MochiTransformer3DModel", "tokens are regrouped between images"),
        ("PRXTransformer2DModel", "keys of 'txt_kv_proj' have no queries of their own"),
    ],
)
def test_refused_by_name(name: str, reason: str) -> None:
    model, _ = built(name)
    before = snapshot(model)
    with pytest.raises(ModelError, match=reason):
        customize.add_adapter(model)
    assert snapshot(model) == before


F = nn.functional


class Odd(ap.AttnProcessor2_0):
    """A user's processor that may do something else with one of its tensors."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        x = hidden_states
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x.flip(1) if self.what == "values" else x)
        if self.what == "order":
            q = q.flip(1)
        if self.what == "mixed":
            k = k + v
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        own = self.what == "another softmax"
        z = (q @ k.mT).softmax(-1) @ v if own else F.scaled_dot_product_attention(q, k, v)
        z = z.transpose(1, 2).flatten(2)
        if self.what == "outputs":
            z = z.cumsum(1)
        found: Tensor = attn.to_out[0](z)
        return found


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("order", "'to_q' are taken apart, or taken in another order"),
        ("values", "keys and values are computed from different inputs"),
        ("mixed", "come from several projections or tokens at once"),
        ("outputs", "output projection takes several tokens at once"),
        ("another softmax", "no softmax of queries and keys, or not one that is called as diffusers does it"),
    ],
)
def test_a_processor_that_products_cannot_follow(what: str, reason: str) -> None:
    model = nn.ModuleDict({"attn": ap.Attention(14, heads=2, dim_head=7, processor=Odd(what))})
    with pytest.raises(ModelError, match=f"attn' is Attention with Odd: .*{reason}"):
        customize.add_adapter(model)


def test_a_user_s_own_processor_is_followed() -> None:
    model = nn.ModuleDict({"attn": ap.Attention(14, heads=2, dim_head=7, processor=Odd(""))})
    customize.add_adapter(model).remove()
    assert type(model["attn"]) is ap.Attention


@torch.no_grad()
def test_back_ends_are_the_host_s() -> None:
    model, x = built("QwenImageTransformer2DModel")
    fill(customize.add_adapter(model))
    expected = run(model, x)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(model, x), expected, rtol=1e-10, atol=1e-10)
    assert {p._attention_backend for p in model.attn_processors.values()} == {"_native_math"}


@torch.no_grad()
def test_one_model_in_two_threads() -> None:
    model, x = built("WanTransformer3DModel")
    fill(customize.add_adapter(model))
    other = {**x, "hidden_states": x["hidden_states"].flip(-1)[:, :, :1]}
    expected = [run(model, one) for one in (x, other)]
    found: dict[int, list[Tensor]] = {0: [], 1: []}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] += [run(model, (x, other)[index]) for _ in range(8)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(found[index]) == 8
        for one in found[index]:
            torch.testing.assert_close(one, expected[index], rtol=1e-12, atol=1e-12)
