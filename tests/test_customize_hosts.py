"""Adapters beside what else users do with a pipeline, and nothing left of them once they are off."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import accelerate
from diffusers.models import attention_processor as ap
from peft import LoraConfig

from comcat import customize
from comcat.errors import ModelError
from diffusion import MODELS, fill, inputs, model, on, output, pipeline

# torch.compile


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_compiled_whole_and_a_strength_compiles_again_only_once(name: str) -> None:
    m, x, base, adapter = on(name)
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(m, backend=backend, fullgraph=True)
    for scale in (1.0, 0.5, 0.7, -0.3, 2.0, 1.1, 0.9, 0.2, 0.1, 3.0):
        adapter.scale = scale
        torch.testing.assert_close(output(compiled, x), output(m, x), atol=1e-5, rtol=1e-5)
    assert len(graphs) <= 2
    adapter.enabled = False
    torch.testing.assert_close(output(compiled, x), base, atol=1e-5, rtol=1e-5)
    assert len(graphs) <= 3
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "backend"), [("sd1", "eager"), ("sd35", "aot_eager")])
def test_trained_while_compiled(name: str, backend: str) -> None:
    m = model(name)
    x = inputs(m)
    adapter = customize.add_adapter(m)
    torch.compiler.reset()
    compiled = torch.compile(m, backend=backend, fullgraph=True)
    compiled(**x)[0].square().mean().backward()
    found = {key: p.grad for key, p in adapter.named_parameters()}
    for parameter in adapter.parameters():
        parameter.grad = None
    m(**x)[0].square().mean().backward()
    for key, parameter in adapter.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, atol=1e-8, rtol=1e-6)
    torch.compiler.reset()


def test_an_adapter_for_a_compiled_pipeline() -> None:
    pipe = pipeline()
    unet = pipe.unet
    pipe.unet, pipe.text_encoder = (torch.compile(p, backend="eager") for p in (unet, pipe.text_encoder))
    adapter = customize.add_adapter(pipe, text_encoder_rank=1)
    assert adapter.ranks.keys() == {"unet", "text_encoder"}
    assert customize.adapters(unet) == {"default": adapter}
    adapter.remove()
    torch.compiler.reset()


# Processors


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_attention_slicing(name: str) -> None:
    m, x, base, adapter = on(name)
    expected = output(m, x)
    m.set_attention_slice(1)
    torch.testing.assert_close(output(m, x), expected, atol=1e-5, rtol=1e-5)
    assert {type(p) for p in m.attn_processors.values()} == {ap.SlicedAttnProcessor}
    two = fill(customize.add_adapter(m, name="two"), 2)
    two.remove()
    m.set_attention_slice(None)
    assert torch.equal(output(m, x), expected)
    m.set_attention_slice(1)
    adapter.remove()
    assert {type(p) for p in m.attn_processors.values()} == {ap.SlicedAttnProcessor}
    later = fill(customize.add_adapter(m))
    torch.testing.assert_close(output(m, x), expected, atol=1e-5, rtol=1e-5)
    later.enabled = False
    torch.testing.assert_close(output(m, x), base, atol=1e-5, rtol=1e-5)


def test_processors_that_diffusers_sets_keep_the_products() -> None:
    m, x, base, adapter = on("sd1")
    expected = output(m, x)
    m.set_attn_processor(ap.AttnProcessor())
    torch.testing.assert_close(output(m, x), expected, atol=1e-5, rtol=1e-5)
    m.set_attn_processor(m.attn_processors)
    torch.testing.assert_close(output(m, x), expected, atol=1e-5, rtol=1e-5)
    m.set_default_attn_processor()
    torch.testing.assert_close(output(m, x), expected, atol=1e-5, rtol=1e-5)
    adapter.remove()
    m.set_default_attn_processor()
    torch.testing.assert_close(output(m, x), base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "pixart"])
def test_fused_projections_are_refused_by_name(name: str) -> None:
    m, x, _, _ = on(name, name="dog")
    expected, keys = output(m, x), m.state_dict().keys()
    with pytest.raises(ModelError, match=r"products of dog.*fused"):
        m.fuse_qkv_projections()
    assert torch.equal(output(m, x), expected)
    assert m.state_dict().keys() == keys


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_an_adapter_on_projections_that_were_fused_before(name: str) -> None:
    m, x, _, _ = on(name)
    expected = output(m, x)
    m = model(name, torch.float32)
    m.fuse_qkv_projections()
    adapter = fill(customize.add_adapter(m))
    torch.testing.assert_close(output(m, x), expected, atol=1e-5, rtol=1e-5)
    adapter.remove()
    m.unfuse_qkv_projections()


def ip_adapter(m: Any) -> dict[str, Any]:
    """The processors that an IP-Adapter sets: its own in cross attention."""
    processors = {}
    for name, processor in m.attn_processors.items():
        attn = m.get_submodule(name.removesuffix(".processor"))
        own = ap.IPAdapterAttnProcessor2_0(attn.inner_dim, 7) if attn.is_cross_attention else processor
        processors[name] = own
    return processors


def test_an_ip_adapter_is_refused_by_name() -> None:
    m, x, _, adapter = on("sd1", targets="cross", name="dog")
    expected = output(m, x)
    with pytest.raises(ModelError, match="IPAdapterAttnProcessor2_0 would replace the products of dog"):
        m.set_attn_processor(ip_adapter(m))
    assert torch.equal(output(m, x), expected)
    adapter.remove()
    m.set_attn_processor(ip_adapter(m))
    refused = "attn2' is Attention with IPAdapterAttnProcessor2_0"
    for args in ({}, {"targets": "cross"}, {"targets": ["self", "cross"]}, {"rank": {"self": 1, "cross": 2}}):
        with pytest.raises(ModelError, match=refused):
            customize.add_adapter(m, **args)
    found = customize.add_adapter(m, targets="self")
    assert all(key[1].endswith("attn1") for key in found.layers)


# Precision and placement


@pytest.mark.parametrize("name", MODELS)
def test_full_precision_products_in_a_half_precision_model(name: str) -> None:
    m = model(name, torch.bfloat16)
    x = inputs(m, torch.bfloat16)
    base = output(m, x)
    adapter = customize.add_adapter(m, dtype=torch.float32)
    assert torch.equal(m(**x)[0], base)
    m(**x)[0].float().square().mean().backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32} == {p.grad.dtype for p in adapter.parameters()}
    fill(adapter)
    changed = output(m, x)
    assert changed.dtype == torch.bfloat16
    assert changed.isfinite().all()
    assert not torch.equal(changed, base)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "flux"])  # torch warns about its norms
def test_autocast(name: str) -> None:
    m, x, base, adapter = on(name)
    exact = output(m, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = output(m, x)
        m(**x)[0].float().square().mean().backward()
        adapter.enabled = False
        off = output(m, x)
    assert 0 < (found - exact).norm() / exact.norm() < 0.4
    assert 0 < (off - base).norm() / base.norm() < 0.4
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_another_precision_later(name: str) -> None:
    m, _, _, adapter = on(name)
    assert m.to(torch.float64) is m
    assert {p.dtype for p in adapter.parameters()} == {torch.float64}
    assert all(v.dtype == torch.float64 for v in adapter.state_dict().values())
    fresh, x, _, _ = on(name, torch.float64)
    del fresh
    assert output(m, x).dtype == torch.float64
    assert m.train().training
    assert all(layer.training for layer in adapter.layers.values())
    assert not any(layer.training for layer in adapter.layers.values() if not m.eval())


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_before_and_after(name: str) -> None:
    m, x, base, adapter = on(name)
    expected, state = output(m, x), adapter.state_dict()
    accelerate.cpu_offload(m, execution_device=torch.device("cpu"))
    assert not any(p.is_meta for p in adapter.parameters())
    torch.testing.assert_close(output(m, x), expected, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())
    adapter.enabled = False
    assert torch.equal(output(m, x), base)
    adapter.remove()
    again = customize.add_adapter(m)
    assert not any(p.is_meta for p in again.parameters())
    assert torch.equal(output(m, x), base)
    fill(again)
    torch.testing.assert_close(output(m, x), expected, atol=1e-6, rtol=1e-6)
    again.remove()
    m = model(name, torch.float32)
    untrained = customize.add_adapter(m)
    accelerate.cpu_offload(m, execution_device=torch.device("cpu"))
    assert not any(p.is_meta for p in untrained.parameters())
    assert torch.equal(output(m, x), base)


# Other adapters


@pytest.mark.parametrize("first", ["lora", "ours"])
@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_a_lora_beside_it(name: str, first: str) -> None:
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    m = model(name)
    x = inputs(m)
    base = output(m, x)
    steps: list[Callable[[], Any]] = [
        lambda: m.add_adapter(config, "lora"),
        lambda: fill(customize.add_adapter(m, name="ours")),
    ]
    torch.manual_seed(0)
    for step in steps if first == "lora" else steps[::-1]:
        step()
    both = output(m, x)
    m.disable_adapters()
    ours = output(m, x)
    m.enable_adapters()
    customize.set_adapters(m, {})
    lora = output(m, x)
    customize.set_adapters(m, {"ours": 1.0})
    assert torch.equal(output(m, x), both)
    assert len({t.double().sum().item() for t in (base, both, ours, lora)}) == 4
    if first == "lora":
        customize.remove_adapter(m, "ours")
        assert torch.equal(output(m, x), lora)
    else:
        m.delete_adapters("lora")
        assert torch.equal(output(m, x), ours)
        customize.remove_adapter(m, "ours")
        assert torch.equal(output(m, x), base)
