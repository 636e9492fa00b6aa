"""Adapters under a budget of bytes: what components are worth, which are kept, and what stays of the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from comcat import CheckpointError, DataError, ModelError, TrainingError, customize
from comcat.customize import CustomizeConfig
from comcat.customize.files.adapter_file import header
from comcat.customize.files.layer_factors import PARTS, by_layer, set_side, sides
from comcat.customize.shrinking.choosing import Choice, Sizes, choose
from comcat.customize.shrinking.cutting import cut, trim
from comcat.customize.shrinking.worth import Worth, measure
from comcat.training import state
from comcat_demos import digits
from diffusion import fill, inputs, metadata, model, output
from test_customize_train import StopError, stop_at, write_photos

STORAGES = ("float32", "float16", "int8", "nf4")
PROMPT = "a photo of V*"


def on_model(name: str = "sd1", rank: int = 3) -> tuple[Any, Any, dict[str, Any]]:
    m = model(name)
    return m, fill(customize.add_adapter(m, rank=rank, name="dog")), inputs(m)


def worths_of(m: Any, adapter: Any, x: dict[str, Any], count: int = 1) -> dict[Any, Worth]:
    return measure(adapter, (m(**x)[0] for _ in range(count)), count, seed=4)


def everything(worths: dict[Any, Worth]) -> Choice:
    return {key: torch.ones_like(found.worth, dtype=torch.bool) for key, found in worths.items()}


# Worth


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux", "pixart"])
def test_worth_is_the_rate_at_which_the_output_changes(name: str) -> None:
    """Against finite differences in float64, after the turn, which changes no output."""
    m, adapter, x = on_model(name, 2)
    before = output(m, x)
    worths = worths_of(m, adapter, x)
    assert not any(p.grad is not None for p in m.parameters())
    cut(adapter, worths, everything(worths))
    after = output(m, x)
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-9)
    v = torch.randn(after.shape, generator=torch.Generator().manual_seed(4)).to(after)
    for key, found in list(worths.items())[::3]:
        component, layer, part = key
        own = by_layer(adapter.state_dict(), component, layer)
        kind = PARTS[part][0]
        left, _ = sides(own, part, 2)
        rates = []
        for scale in (1 + 1e-5, 1 - 1e-5):
            changed = dict(own)
            matrix = left.clone()
            matrix[1, :, 0] *= scale
            set_side(changed, kind, matrix, 2)
            for n, t in changed.items():
                adapter.state_dict()[f"{component}.{layer}.{n}"].copy_(t)
            rates.append(float((output(m, x) * v).sum()))
        set_side(own, kind, left, 2)
        for n, t in own.items():
            adapter.state_dict()[f"{component}.{layer}.{n}"].copy_(t)
        rate = (rates[0] - rates[1]) / 2e-5
        assert float(found.worth[1, 0]) == pytest.approx(rate**2, rel=1e-3, abs=1e-12)


def test_a_component_that_does_nothing_is_worth_nothing() -> None:
    m, adapter, x = on_model()
    for name, tensor in adapter.state_dict().items():
        if name.endswith(("attn2.sample.key.weight", "attn1.sample.output.weight")):
            tensor.zero_()
    worths = worths_of(m, adapter, x)
    for (_, layer, part), found in worths.items():
        nothing = (layer.endswith("attn2") and part == "qk") or (layer.endswith("attn1") and part == "vo")
        assert bool((found.worth > 0).any()) != nothing
        assert bool(found.left.isfinite().all())


def test_an_output_that_is_not_finite_is_an_error() -> None:
    m, adapter, x = on_model()
    next(adapter.parameters()).data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        worths_of(m, adapter, x)


# Choice


@pytest.mark.parametrize("storage", STORAGES)
def test_files_have_the_bytes_that_were_foreseen(storage: Any, tmp_path: Path) -> None:
    m, adapter, x = on_model()
    adapter.info = {"prompt": "dog", "training": {"max_bytes": 1}}
    worths = worths_of(m, adapter, x, 3)
    before = {name: t.clone() for name, t in adapter.state_dict().items()}
    sizes = Sizes(header(adapter, storage), before)
    whole = sizes.of(everything(worths))
    smallest = sizes.of(sizes.smallest())
    kept_worth = 0.0
    for budget in (smallest, (2 * smallest + whole) // 3, (smallest + whole) // 2, whole):
        choice = choose(worths, sizes, budget)
        assert smallest <= sizes.of(choice) <= budget
        worth = sum(float(found.worth[choice[key]].sum()) for key, found in worths.items())
        assert worth >= kept_worth
        kept_worth = worth
        cut(adapter, worths, choice)
        path = customize.save_adapter(m, tmp_path / "x.safetensors", storage=storage)
        assert path.stat().st_size == sizes.of(choice)
        for name, tensor in adapter.state_dict().items():
            tensor.copy_(before[name])
    assert all(mask.all() for mask in choice.values())
    for few in (smallest - 1, 0, -5):
        with pytest.raises(CheckpointError, match=f"too few for this adapter: the smallest.* takes {smallest:,}"):
            choose(worths, sizes, few)


def test_what_is_worth_most_is_kept() -> None:
    m, adapter, x = on_model()
    worths = worths_of(m, adapter, x)
    sizes = Sizes(header(adapter, "float16"), adapter.state_dict())
    budget = (sizes.of(sizes.smallest()) + sizes.of(everything(worths))) // 2
    choice = choose(worths, sizes, budget)
    for key, mask in choice.items():  # of equal cost within a product
        worth = worths[key].worth
        if mask.any() and not mask.all():
            assert float(worth[mask].min()) >= float(worth[~mask].max()) * (1 - 1e-12)


def test_an_adapter_is_trimmed_to_what_it_keeps(tmp_path: Path) -> None:
    m, adapter, x = on_model("sd1", 4)
    worths = worths_of(m, adapter, x)
    choice = {key: torch.zeros_like(found.worth, dtype=torch.bool) for key, found in worths.items()}
    first, second = list(dict.fromkeys(key[:2] for key in worths))[:2]
    choice[(*first, "qk")][0, 2] = choice[(*first, "qk")][1, [0, 3]] = choice[(*second, "vo")][0, 1] = True
    cut(adapter, worths, choice)
    wanted = output(m, x)
    trim(adapter)
    assert adapter.ranks == {first[0]: {first[1]: 2, second[1]: 1}}
    torch.testing.assert_close(output(m, x), wanted, rtol=1e-9, atol=1e-12)
    path = customize.save_adapter(m, tmp_path / "x.safetensors")
    adapter.remove()
    customize.load_adapter(m, path, dtype=torch.float64)
    torch.testing.assert_close(output(m, x), wanted, rtol=1e-4, atol=1e-5)  # float32 in the file


# Adapters that are there


@pytest.fixture(scope="module")
def pipe() -> Any:
    """Shared: every test leaves it as it was."""
    return digits.build()


def test_shrink(pipe: Any, tmp_path: Path) -> None:
    adapter = fill(customize.add_adapter(pipe, rank=2, text_encoder_rank=1, token="V*", name="dog"))
    whole = customize.save_adapter(pipe, tmp_path / "whole.safetensors", storage="nf4").stat().st_size
    with pytest.raises(DataError, match="give prompts"):
        customize.shrink_adapter(pipe, whole // 2, storage="nf4")
    with pytest.raises(CheckpointError, match="100 bytes are too few"):
        customize.shrink_adapter(pipe, 100, storage="nf4", prompts=[PROMPT])
    adapter.enabled = False
    with pytest.raises(ModelError, match="'dog' is switched off"):
        customize.shrink_adapter(pipe, whole // 2, prompts=[PROMPT])
    adapter.enabled = True
    found = customize.shrink_adapter(pipe, whole // 2, storage="nf4", prompts=[PROMPT], images=1, steps=1, probes=2)
    path = customize.save_adapter(pipe, tmp_path / "x.safetensors", storage="nf4")
    assert path.stat().st_size == found.bytes <= whole // 2
    assert 0 < found.components < found.of
    assert 0 < found.worth_lost < 1
    assert 0 < found.products_error < 1
    assert adapter.token.text == "V*"
    adapter.remove()
    customize.load_adapter(pipe, path).remove()


# Training


def learn(place: Path, stop: int | None = None, **options: Any) -> tuple[bytes, list[str]]:
    """The file of a run of six steps, chosen from after three, and what was noted."""
    pipe, notes = digits.build(), []
    config = CustomizeConfig(
        rank=options.pop("rank", 2),
        steps=options.pop("steps", 6),
        batch_size=2,
        lr=1e-2,
        checkpoint_every=1,
        keep_checkpoints=9,
        text_encoder_rank=1,
    )
    options = {"max_bytes": 30_000, "storage": "int8", "cpu": True, **options}
    options |= {"out": place / "run", "note": notes.append}
    if stop is not None:
        with pytest.raises(StopError):
            customize.train(pipe, place / "photos", PROMPT, config, progress=stop_at(stop), **options)
        return b"", notes
    customize.train(pipe, place / "photos", PROMPT, config, base="some/base", **options)
    return customize.save_adapter(pipe, place / "dog.safetensors", storage=options["storage"]).read_bytes(), notes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: Any) -> tuple[Path, bytes]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("budget")
    write_photos(place / "photos", (16, 16), (20, 20))
    content, notes = learn(place)
    assert notes == []
    torch.set_num_threads(threads)
    return place, content


def test_a_run_ends_within_its_budget(undisturbed: Any) -> None:
    place, content = undisturbed
    assert 25_000 < len(content) <= 30_000
    about = metadata(place / "dog.safetensors")
    assert about["base"]["name"] == "some/base"
    assert about["training"]["max_bytes"] == 30_000
    kept = 0
    for part in about["components"].values():
        for entry in part["layers"].values():
            packing = entry["packing"]
            full = [entry["rank"]] * packing["heads"]
            kept += sum(map(sum, packing.get("kept", {"qk": full, "vo": full}).values()))
    assert about["training"]["components"] == kept  # what was cut in the middle has stayed away
    saved = state.read(dict(state.checkpoints(place / "run"))[6]).tensors
    moments = [t for name, t in saved["optimizer"].items() if name.endswith(".step") and "query" in name]
    assert {float(t) for t in moments} == {3.0}


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_is_exact(undisturbed: Any, tmp_path: Path, stop: int) -> None:
    """Before, at and after the choice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    place, wanted = undisturbed
    (tmp_path / "photos").symlink_to(place / "photos")
    learn(tmp_path, stop)
    if stop == 5:
        with pytest.raises(TrainingError, match=r"budget.*30000.* and is now"):
            learn(tmp_path, resume=True, max_bytes=31_000)
    assert learn(tmp_path, resume=True)[0] == wanted
    torch.set_num_threads(threads)


def test_budgets_that_cannot_be(undisturbed: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").symlink_to(undisturbed[0] / "photos")
    with pytest.raises(CheckpointError, match=r"1,000 bytes are too few .* takes [\d,]+$"):
        learn(tmp_path, max_bytes=1000)
    with pytest.raises(TrainingError, match="at least 2 steps"):
        learn(tmp_path, steps=1)
    _, notes = learn(tmp_path, rank=1, steps=2, max_bytes=10**7)
    assert any("all components fit into 10,000,000 bytes" in note for note in notes)
