"""Masks find the picture's tokens where they are: what changes in a layer when one place of the picture is changed."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from comcat.customize.adapter.components import find_addable
from comcat.hosts import canvases
from conftest import randomize
from small_denoisers_image import IMAGE_MODELS
from small_denoisers_video import VIDEO_MODELS

MODELS = {**IMAGE_MODELS, **VIDEO_MODELS}
KNOWN = [name for name, layout in canvases.LAYOUTS.items() if not layout.pyramid and hasattr(diffusers, name)]
#: Compute in float32 whatever they are given.
SINGLE = {"Kandinsky5Transformer3DModel"}


def cells(inputs: dict[str, Any], patch: tuple[int, int, int], place: tuple[int, int, int], token: int) -> list[Tensor]:
    """Views of the model's inputs on everything that one token of the picture shows."""
    frame, row, column = place
    listed = inputs.get("x")
    rows, columns = (slice(i * p, (i + 1) * p) for i, p in ((row, patch[1]), (column, patch[2])))
    frames = slice(frame * patch[0], (frame + 1) * patch[0])
    if listed is not None:
        return [picture[:, frames, rows, columns] for picture in listed]
    hidden = inputs["hidden_states"]
    if hidden.ndim == 3:  # packed
        return [hidden[:, token]]
    if hidden.ndim == 4:
        return [hidden[..., rows, columns]]
    if "visual_rope_pos" in inputs:
        return [hidden[:, frames, rows, columns]]
    return [hidden[:, :, frames, rows, columns]]


def seen(model: Any, inputs: dict[str, Any], layers: dict[str, str]) -> dict[str, Tensor]:
    """What the projections of queries are given: layer -> (B, N, D)."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name, path in layers.items()
    ]
    # Nothing goes from one token to another, so that the place that was changed is all that changes.
    hooks += [model.get_submodule(name).register_forward_hook(silenced) for name in layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def silenced(_: Any, __: Any, out: Any) -> Any:
    return tuple(t * 0 for t in out) if isinstance(out, tuple) else out * 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", KNOWN)
def test_the_token_of_a_place(name: str) -> None:
    config, made = MODELS[name]
    dtype = torch.float32 if name in SINGLE else torch.float64
    model = randomize(getattr(diffusers, name)(**config), 0).to(dtype).eval()

    def given() -> dict[str, Any]:
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made().items()}

    canvas = canvases.DenoiserCanvas(model, canvases.LAYOUTS[name], None)
    attentions = find_addable("transformer", model)[0]
    layers = {key: f"{key}.{found.streams[0].query}" for key, found in attentions.items() if canvas.shows(key)}
    inputs = given()
    before = seen(model, inputs, layers)
    assert canvas.picture is not None
    frames, height, width = canvas.picture
    assert height * width > 1
    patch = canvas.patch if "x" not in inputs else (1, 2, 2)
    grids = {key: canvas.grid(t.shape[1]) for key, t in before.items()}
    for frame, row, column in ((0, height - 1, 0), (frames - 1, 0, width - 1)):
        token, changed = (frame * height + row) * width + column, given()
        for cell in cells(changed, patch, (frame, row, column), token):
            cell += 1e-3
        after = seen(model, changed, layers)
        for key, old in before.items():
            moved = (after[key] - old).norm(dim=-1)  # (B, N)
            starts = grids[key].before * (len(moved) if len(grids[key].before) == 1 else 1)
            assert moved.argmax(1).tolist() == [start + token for start in starts], key
