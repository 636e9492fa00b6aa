"""Denoisers made smaller: layers are found, exact at full rank, calibrated in the pipeline's loop, and put back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, SanaTransformer2DModel
from typer.testing import CliRunner

import comcat
from comcat import Budget, customize, denoisers
from comcat.cli import app
from comcat.denoisers.denoiser_calls import batches_of
from comcat.denoisers.prediction_error import prediction_error
from comcat.errors import CalibrationError, ModelError, TrainingError
from comcat.layers.attention import AttentionLayer
from comcat.models.batches import Batch, Each
from comcat.nn.projections import HeadProjection
from comcat.planning.plan import Plan
from conftest import randomize
from diffusion import MODELS, fill, inputs, model, output, pipeline

#: Parts of the attention layers, by what a host does between projections and product.
FOUND = {
    "sd1": {"attn1": {"qk", "vo"}, "attn2": {"qk", "vo"}, "ff": {"neurons"}},
    "sdxl": {"attn1": {"qk", "vo"}, "attn2": {"qk", "vo"}, "ff": {"neurons"}},
    "pixart": {"attn1": {"qk", "vo"}, "attn2": {"qk", "vo"}, "ff": {"neurons"}},
    "sd3": {"0.attn": {"qk", "vo"}, "1.attn": {"qk"}, "ff": {"neurons"}, "ff_context": {"neurons"}},
    "sd35": {"0.attn": {"vo"}, "attn2": {"vo"}, "ff": {"neurons"}, "ff_context": {"neurons"}},
    "qwen": {"attn": {"vo"}, "img_mlp": {"neurons"}, "txt_mlp": {"neurons"}},
    "sana": {"attn1": {"channels"}, "attn2": {"qk", "vo"}},
    "flux": {"transformer_blocks.0.attn": {"vo"}, "ff": {"neurons"}, "ff_context": {"neurons"}},
}


def random(*shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def qwen() -> tuple[Any, dict[str, Any]]:
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (4, 6, 6)}
    host = QwenImageTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, joint_attention_dim=13, **sizes)
    text = {"encoder_hidden_states": random(3, 5, 13), "encoder_hidden_states_mask": torch.ones(3, 5).long()}
    return host, {"hidden_states": random(3, 6, 4), **text, "timestep": random(3), "img_shapes": [[(1, 2, 3)]] * 3}


def sana() -> tuple[Any, dict[str, Any]]:
    heads = {"num_attention_heads": 3, "num_cross_attention_heads": 3}
    widths = {"attention_head_dim": 8, "cross_attention_head_dim": 8, "cross_attention_dim": 24, "caption_channels": 13}
    host = SanaTransformer2DModel(in_channels=4, out_channels=4, num_layers=1, sample_size=4, **heads, **widths)
    text = {"encoder_hidden_states": random(3, 5, 13), "timestep": 500 * random(3).abs()}
    return host, {"hidden_states": random(3, 4, 4, 4), **text}


def prepared(host: str) -> Any:
    if host in MODELS:
        m = model(host)
        return comcat.prepare(m, inputs(m, batch=3))
    m, x = {"qwen": qwen, "sana": sana}[host]()
    return comcat.prepare(randomize(m).double().eval().requires_grad_(False), x)


@pytest.mark.parametrize("host", FOUND)
def test_layers_are_found_in_every_block_and_are_exact_at_full_rank(host: str) -> None:
    ready = prepared(host)
    found = {layer.name: {"neurons"} & set(layer.full) or set(layer.full) for layer in ready.inventory.layers}
    for name, parts in FOUND[host].items():
        there = [one for one, _ in ready.model.named_modules() if f".{one}".endswith(f".{name}")]
        assert there
        assert all(found.get(one) == parts for one in there), name
    # Once with every part at its full width, the FFN in neurons and once in ranks.
    x = ready.example
    base = output(ready.model, x)
    for form in (0, -1):
        choices = {
            layer.name: {part: layer.full[part] for part in layer.forms[form] if part in layer.full}
            for layer in ready.inventory.layers
        }
        small = comcat.compress(ready, Plan(choices))
        assert output(small, x) == pytest.approx(base, rel=1e-8, abs=1e-8 * float(base.abs().max()))


@pytest.mark.parametrize("host", ["sd1", "pixart"])
def test_heads_are_narrow_in_the_products_too_whatever_processor_runs_them(host: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    ready = prepared(host)
    layers = [layer for layer in ready.inventory.layers if isinstance(layer, AttentionLayer)]
    small: Any = comcat.compress(ready, Plan({layer.name: {"qk": 2, "vo": 3} for layer in layers}))
    narrow = [m for m in small.modules() if isinstance(m, HeadProjection)]
    assert narrow
    assert {m.wide for m in narrow} == {(3,)}
    outs = []
    for processor in (AttnProcessor2_0(), AttnProcessor()):  # of which one derives the scale, and one reads it
        for module in small.modules():
            if type(module).__name__ == "Attention":
                module.set_processor(processor)
        outs.append(output(small, inputs(small)))
    assert outs[1] == pytest.approx(outs[0], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("host", "lost"), [("sd1", 0), ("sd1", 1), ("sd3", 1), ("flux", 1)])
def test_adapters_of_the_dense_base_add_exactly_what_they_add_there(host: str, lost: int, tmp_path: Path) -> None:
    """With heads of which nothing is lost: as wide as they were in another basis, or narrower by what is zero."""
    dense = model(host)
    for attention in (m for m in dense.modules() if hasattr(m, "to_q")):
        for name in ("to_q", "to_v", "add_q_proj", "add_v_proj"):
            for parameter in (getattr(attention, name, None) or torch.nn.Identity()).parameters():
                parameter.data.unflatten(0, (attention.heads, -1))[:, -1] *= not lost
    ready = comcat.prepare(dense, inputs(dense, batch=3))
    layers = [layer for layer in ready.inventory.layers if isinstance(layer, AttentionLayer)]
    choices = {layer.name: dict.fromkeys(layer.full, layer.heads.width - lost) for layer in layers}
    small, x = comcat.compress(ready, Plan(choices)), inputs(dense)
    base = output(dense, x)
    assert output(small, x) == pytest.approx(base, rel=1e-8, abs=1e-9)
    fill(customize.add_adapter(dense, rank=2))
    customize.save_adapter(dense, tmp_path / "a.safetensors", storage="float32")
    customize.remove_adapter(dense, "default")
    for one in (dense, small):
        customize.load_adapter(one, tmp_path / "a.safetensors")
    assert output(small, x) == pytest.approx(output(dense, x), rel=1e-6, abs=1e-7)
    assert (output(small, x) - base).abs().max() > 1e-3
    taught = customize.add_adapter(small, rank=1, name="taught")
    customize.save_adapter(small, tmp_path / "b.safetensors", name="taught")
    assert "compressed" in customize.read_adapter(tmp_path / "b.safetensors")[0].base
    assert "compressed" not in customize.read_adapter(tmp_path / "a.safetensors")[0].base
    if lost:  # heads of full width are the ones that were there
        with pytest.raises(ModelError, match="its heads have been compressed"):
            customize.export_lora(small, tmp_path / "lora.safetensors", name=taught.name)
    left = comcat.prepare(dense, inputs(dense, batch=3)).inventory.dense
    assert any("carries the products of default" in entry.reason for entry in left)


def test_two_streams_share_maps_that_are_optimal_for_all_scores() -> None:
    """What the factors expect to lose is what the scores lose, over all queries and keys, and no rank loses less."""
    m = model("sd3")
    x = inputs(m, batch=1)
    ready = comcat.prepare(m, inputs(m, batch=3))
    calibration = comcat.calibrate(ready, [((), x)], outputs="features", probe_images=1)
    layer: Any = ready.inventory["transformer_blocks.0.attn"]
    rows: dict[str, Any] = {}
    names = {"q": ("to_q", "add_q_proj"), "k": ("to_k", "add_k_proj")}
    for name in sum(names.values(), ()):
        layer.module.get_submodule(name).register_forward_hook(lambda _, a, out, name=name: rows.update({name: out[0]}))
    output(m, x)
    q, k = (torch.cat([rows[n] for n in pair]).unflatten(-1, (3, 4)).transpose(0, 1) for pair in names.values())
    k = k - k.mean(1, keepdim=True)
    factors, pairs = layer.factors(calibration.moments[layer.name]), q.shape[1] * k.shape[1]
    for rank in (1, 2, 3):
        q_map, k_map = factors.qk.q_map[..., :rank], factors.qk.k_map[..., :rank]
        lost = (q @ k.mT - (q @ q_map) @ (k @ k_map).mT).square().sum() / pairs
        assert float(lost) == pytest.approx(float(factors.errors("qk")[rank]), rel=1e-6)
        least = sum(torch.linalg.svdvals(s)[rank:].square().sum() for s in q @ k.mT) / pairs
        assert float(lost) == pytest.approx(float(least), rel=1e-6)


@pytest.mark.parametrize("host", ["sd3", "flux"])
def test_joint_attention_is_calibrated_planned_and_saved(host: str, tmp_path: Path) -> None:
    ready = prepared(host)
    x = inputs(ready.model, batch=5)
    shared = {name: x.pop(name) for name in ("img_ids", "txt_ids") if name in x}
    calibration = comcat.calibrate(ready, [Batch(x, shared)], fisher=True, outputs="features", probe_images=5)
    errors = []
    for keep in (0.8, 0.4):
        plan = comcat.plan(ready, Budget(params=keep, of="parts"), calibration, "spectrum")
        small = comcat.compress(ready, plan, calibration)  # which warns where costs are other than was counted
        errors.append(prediction_error(ready.model, small, Batch(x, shared)))
    assert errors[0] < errors[1]
    comcat.save(small, tmp_path / "small")
    assert output(comcat.load(tmp_path / "small"), {**x, **shared}) == pytest.approx(
        output(small, {**x, **shared}), rel=1e-9, abs=1e-9
    )


PROMPTS = ["a photo of a dog", "a photo of a cat"]
SIZE = {"height": 8, "width": 8}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, denoisers.Recording]:
    pipe = pipeline("sd1")
    folder = tmp_path_factory.mktemp("recorded")
    return pipe, denoisers.record(pipe, PROMPTS, folder, seeds=(0, 1, 2), steps=4, share=0.5, batch_size=2, **SIZE)


def test_the_loop_is_recorded_with_guidance_and_at_all_times(recorded: Any) -> None:
    pipe, recording = recorded
    batches = list(recording)
    assert len(batches) == 3 * 2  # batches of pictures, every second call
    assert all(len(batch) == 4 for batch in batches)  # with the prompt, and without
    times = [{int(t) for t in batch.tensors["timestep"]} for batch in batches]
    assert len(set.union(*times)) == 4  # those of other batches in between
    again = pipe.unet(**{**batches[0].call[1], "return_dict": False})[0]
    assert again.shape == batches[0].tensors["sample"].shape
    assert recording.examples == 24
    assert recording.settings.calls == 12


def test_recorded_calls_are_planned_compressed_saved_and_put_back(recorded: Any, tmp_path: Path) -> None:
    pipe, recording = recorded
    ready = comcat.prepare(pipe.unet, next(iter(recording))[:3].call)
    calibration = comcat.calibrate(ready, recording, fisher=True, outputs="features")
    calibration.save(tmp_path / "calibration.safetensors")
    calibration = comcat.Calibration.load(tmp_path / "calibration.safetensors")
    assert calibration.inputs is not None
    assert calibration.inputs.fixed["return_dict"] is False
    errors = {}
    for keep in (0.9, 0.5):
        plan = comcat.plan(ready, Budget(params=keep, of="parts"), calibration, "spectrum")
        small = comcat.compress(ready, plan, calibration)
        errors[keep] = prediction_error(pipe.unet, small, calibration.sample)
    assert errors[0.9] < errors[0.5] < 1.5
    comcat.save(small, tmp_path / "small")
    other = pipeline("sd1")
    assert denoisers.put(other, tmp_path / "small") == "unet"
    x = next(iter(recording)).call[1]
    assert torch.allclose(other.unet(**x)[0], small(**x)[0], atol=1e-5)
    assert other("a photo of a dog", num_inference_steps=1, output_type="latent", **SIZE).images.isfinite().all()


def test_a_distillation_comes_nearer_and_continues_bit_by_bit(recorded: Any, tmp_path: Path) -> None:
    pipe, recording = recorded
    ready = comcat.prepare(pipe.unet, next(iter(recording))[:3].call)
    plan = comcat.plan(ready, Budget(params=0.6, of="parts"))
    start = comcat.compress(ready, plan)
    examples = recording.batch(recording.groups()[0])
    before = prediction_error(pipe.unet, start, examples)

    def run(student: Any, lr: float = 1e-3, **more: Any) -> Any:
        config = denoisers.DistillConfig(steps=4, batch_size=8, lr=lr, checkpoint_every=2, log_every=2)
        return denoisers.distill(student, pipe.unet, recording, config, cpu=True, **more)

    one = comcat.compress(ready, plan)
    done = run(one)
    assert done.after < done.before
    said: list[str] = []
    unmoved = comcat.compress(ready, plan)
    assert run(unmoved, 0.3, note=said.append).after == done.before
    assert "has not come nearer" in said[-1]
    assert all(torch.equal(unmoved.state_dict()[name], tensor) for name, tensor in start.state_dict().items())
    assert prediction_error(pipe.unet, one, examples) < before

    def stop(stage: str, done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    two = comcat.compress(ready, plan)
    with pytest.raises(KeyboardInterrupt):
        run(two, out=tmp_path / "run", progress=stop)
    run(two, resume=True, out=tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    with pytest.raises(TrainingError, match=r"lr was 0\.001 and is now 0\.002"):
        run(two, 2e-3, out=tmp_path / "run", resume=True)


def test_arguments_of_calls_come_back_as_they_were() -> None:
    class Host(torch.nn.Module):
        def forward(self, x: Any, t: Any, sizes: Any = None, more: Any = None, flag: bool = True) -> Any: ...

    x = [torch.randn(2, 3), torch.randn(2, 3)]
    named = {"sizes": [(1, 2)] * 2, "more": {"a": torch.ones(2, 5), "b": 3}}
    (batch,) = batches_of(Host(), (x, torch.tensor(7)), named)
    assert batch.fixed["sizes"] == Each((1, 2))
    args, kwargs = batch.call
    assert args == ()
    assert torch.equal(kwargs["x"][1], x[1])
    assert kwargs["t"].tolist() == [7, 7]
    assert kwargs["sizes"] == [(1, 2)] * 2
    assert kwargs["more"]["b"] == 3
    assert torch.equal(batch[1:].call[1]["x"][0], x[1])
    # Examples of differing lengths are calls of their own.
    apart = batches_of(Host(), ([torch.randn(2, 3), torch.randn(4, 3)], 0.5), {})
    assert [one.call[1]["x"][0].shape for one in apart] == [(2, 3), (4, 3)]
    with pytest.raises(CalibrationError, match="'flag', a function, which cannot be recorded"):
        batches_of(Host(), (x, 7), {"flag": lambda: None})


def test_what_cannot_be_done_is_refused_by_name(recorded: Any, tmp_path: Path) -> None:
    pipe, recording = recorded
    with pytest.raises(ModelError, match="has no component 'transformer'; compress its unet"):
        denoisers.record(pipe, PROMPTS, tmp_path / "r", name="transformer")
    with pytest.raises(ModelError, match="does not denoise with its 'vae'"):
        denoisers.component(pipe, "vae")
    with pytest.raises(CalibrationError, match="there are no prompts to calibrate on"):
        denoisers.record(pipe, [], tmp_path / "r")
    with pytest.raises(CalibrationError, match="must be above 0 and at most 1"):
        denoisers.record(pipe, PROMPTS, tmp_path / "r", share=0.0)
    with pytest.raises(CalibrationError, match="recording"):
        denoisers.Recording(tmp_path)
    customize.add_adapter(pipe, name="dog")
    try:
        with pytest.raises(ModelError, match="carries the adapters dog; remove them first"):
            denoisers.record(pipe, PROMPTS, tmp_path / "r")
    finally:
        customize.remove_adapter(pipe, "dog")
    other = randomize(MODELS["sd1"](cross=7))
    with pytest.raises(ModelError, match="its cross_attention_dim is 7, that of the pipeline 15"):
        denoisers.put(pipe, other)
    with pytest.raises(ModelError, match="the pipeline that it was made from"):
        denoisers.put(pipe, MODELS["pixart"](), "unet")
    with pytest.raises(ModelError, match="the dense denoiser that the student was made from"):
        denoisers.distill(MODELS["pixart"](), pipe.unet, recording, cpu=True)


def test_the_command_compresses_and_draws_with_it(tmp_path: Path) -> None:
    pipeline("sd1").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    run = CliRunner()
    base, out = str(tmp_path / "base"), str(tmp_path / "small")
    common = ["compress", base, "--component", "unet", "--out", out, "--keep", "0.7", "--of", "parts", "--json"]
    drawing = ["--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--share", "0.5", "--pictures", "1"]
    drawing += ["--resolution", "8", "--batch-size", "2"]
    done = run.invoke(app, [*common, *drawing, "--method", "spectrum", "--distill-steps", "2", "--distill-batch", "2"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["component"] == "unet"
    assert document["recording"]["prompts"] == 2
    assert set(document["prediction_error"]) == {"training_free", "distilled"}
    sized = ["--seeds", "0", "--steps", "1", "--height", "8", "--width", "8"]
    drawn = run.invoke(
        app,
        ["generate", base, "--denoiser", out, "--prompt", PROMPTS[0], "--out", str(tmp_path / "images"), *sized],
    )
    assert drawn.exit_code == 0, drawn.output
    for arguments, said in (
        ([*common, "--overwrite"], "no prompts to calibrate on"),
        ([*common, *drawing, "--overwrite", "--component", "transformer"], "has no component 'transformer'"),
        ([*common, *drawing, "--overwrite", "--distill-steps", "2", "--resume"], "no run in"),
        ([*common, *drawing, "--overwrite", "--data", base], "goes without --data"),
        (["compress", base, "--out", out, "--keep", "0.7", "--steps", "2"], "--steps belongs to it"),
        (["generate", base, "--denoiser", str(tmp_path), "--prompt", "a dog", "--out", str(tmp_path / "x")], "comcat"),
    ):
        failed = run.invoke(app, arguments)
        assert failed.exit_code != 0
        assert said in " ".join((failed.output + failed.stderr).replace("│", " ").split()), failed.output
