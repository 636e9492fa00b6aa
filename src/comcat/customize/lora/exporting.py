"""An adapter as an ordinary LoRA, with the error of every layer; the way back is in :mod:`.lora_import`.

Neither format holds the other: a LoRA changes the matrices of a product of rank d, an adapter adds r to its rank. Each
conversion is the best one for the layer's two products on their inputs (docs/method.md), and says how far off it is.
Queries and keys that are normalized or rotated before their product (SD3.5, FLUX) cannot be converted at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError
from ...hosts.addable import AddableAttention
from ...linalg.products import norm_of_product
from ...nn.added import AddedLayer
from ...progress import Progress
from ...storage.atomic import atomic_file, tensor_bytes
from ..adapter.attached import Adapter
from ..adapter.components import components, find_addable, text_encoders
from ..files.adapter_file import the_adapter
from .algebra import LoraWeights, product_to_lora, truncate_lora
from .denoiser_moments import Roots, no_roots
from .forms import PRODUCTS, Form, ProductName, added_to, form_of, has_key_biases, lora_of, update_of
from .keys import to_diffusers, to_kohya

Layout = Literal["diffusers", "kohya"]
#: (component, layer) -> what is added there.
Layers = Mapping[tuple[str, str], AddedLayer]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "kohya")


@dataclass(frozen=True)
class LayerError:
    """How far off one product of one layer is.

    Attributes:
        relative: error over effect, both root mean squares over the heads; 1 is as if it had been left out.
        kept: whether the file holds it at all.
    """

    component: str
    layer: str
    part: ProductName
    relative: float
    effect: float
    kept: bool = True


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        dropped: what the other format cannot hold, by name; notes: what had to be taken for granted.
    """

    errors: list[LayerError]
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def relative(self) -> float:
        """Over all layers, weighted by what they do."""
        effect = sum(e.effect**2 for e in self.errors)
        return (sum((e.relative * e.effect) ** 2 for e in self.errors) / effect) ** 0.5 if effect else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "relative_error": self.relative,
            "dropped": self.dropped,
            "notes": self.notes,
            "layers": [vars(error) for error in self.errors],
        }


def as_lora(
    handle: Adapter, *, rank: int | None = None, roots: Roots = no_roots, progress: Progress | None = None
) -> tuple[dict[str, dict[str, LoraWeights]], Conversion]:
    """The LoRA nearest to an adapter at its present strength: component -> path -> (down, up), and the errors.

    Args:
        rank: of the LoRA; by default what the form needs, heads times the adapter's rank.
        roots: of the moments of a layer's inputs; without them all directions of the inputs count alike.

    Raises:
        ModelError: the adapter has a mask, which a LoRA cannot hold.
    """
    if handle.mask is not None:
        raise ModelError(
            f"{handle.name!r} has a mask, and a LoRA acts everywhere; take it off first: adapter.mask = None"
        )
    models = components(handle.pipe)
    attentions = {component: find_addable(component, models[component])[0] for component in handle.ranks}
    factors, conversion = layers_as_lora(handle.layers, attentions, models, rank=rank, roots=roots, progress=progress)
    if handle.token is not None:
        conversion.dropped.append(f"the vectors of the token {handle.token.text!r}, which go into a file of their own")
    return factors, conversion


def layers_as_lora(
    layers: Layers,
    attentions: Mapping[str, Mapping[str, AddableAttention]],
    models: Mapping[str, Any],
    *,
    rank: int | None = None,
    roots: Roots = no_roots,
    progress: Progress | None = None,
) -> tuple[dict[str, dict[str, LoraWeights]], Conversion]:
    """:func:`as_lora` for products wherever they are.

    Args:
        attentions: component -> layer -> the base's; models: component -> the module that it is in.
    """
    factors: dict[str, dict[str, LoraWeights]] = {}
    errors: list[LayerError] = []
    dropped: list[str] = []
    for done, ((component, name), layer) in enumerate(layers.items(), 1):
        attention = attentions[component][name]
        if attention.unfolded:
            raise ModelError(
                f"layer '{name}' of the {component} cannot be written as a LoRA: {attention.unfolded}. Leave the "
                "adapter in its own format"
            )
        for part in PRODUCTS:
            form = form_of(attention, models[component], part)
            left, right = added_to(attention, models[component], layer, part)
            if part == "qk" and attention.normalized:
                effect = float(norm_of_product(left, right).norm())
                errors.append(LayerError(component, name, part, 1.0, effect, kept=False))
                dropped.append(f"{component}.{name}: queries and keys, which are normalized before their product")
                continue
            pair = product_to_lora(form.left, left, form.right, right, 2.0**-24, *roots(component, attention, part))
            effect, error = float(pair.effect.norm()), float(pair.error.norm())
            errors.append(LayerError(component, name, part, error / effect if effect else 0.0, effect))
            found = {b.path: lora_of(b, left[:, : form.left.shape[1]], pair.X) for b in form.left_blocks}
            found.update({b.path: lora_of(b, pair.Y, pair.Z) for b in form.right_blocks})
            for path, lora in found.items():
                if rank is not None:
                    lora, _ = truncate_lora(lora.down, lora.up, rank)
                factors.setdefault(component, {})[path] = lora
        if progress:
            progress("convert layers", done, len(layers))
    # The closed form knows its error, but not of a smaller rank, nor of biases, which a LoRA cannot move.
    errors = [
        _measured(e, attentions[e.component][e.layer], models, layers, factors, roots)
        if e.kept and (rank is not None or _touches_biases(e, attentions[e.component][e.layer], layers))
        else e
        for e in errors
    ]
    return factors, Conversion(errors, dropped)


def _touches_biases(error: LayerError, attention: AddableAttention, layers: Layers) -> bool:
    own = [name for name, _ in layers[error.component, error.layer].named_parameters() if name.endswith("bias")]
    return bool(own) or (error.part == "qk" and has_key_biases(attention))


def _measured(
    error: LayerError, attention: AddableAttention, models: Any, layers: Layers, factors: Any, roots: Roots
) -> LayerError:
    """The error of a LoRA whose rank was cut: (L + dL)(R + dR)^T against L R^T + A B^T, through small QR cores."""
    component, layer = error.component, layers[error.component, error.layer]
    biased = error.part == "qk" and has_key_biases(attention)
    form = form_of(attention, models[component], error.part, key_bias=biased)
    A, B = added_to(attention, models[component], layer, error.part, key_bias=biased)
    L, R = changed(form, factors[component])
    left_root, right_root = roots(component, attention, error.part, key_bias=biased)
    left, right = torch.cat([L, -form.left, -A], -1), torch.cat([R, form.right, B], -1)
    left = left if left_root is None else left_root @ left
    right = right if right_root is None else right_root @ right
    off = float(norm_of_product(left, right).norm())
    return LayerError(component, error.layer, error.part, off / error.effect if error.effect else 0.0, error.effect)


def changed(form: Form, found: Mapping[str, LoraWeights]) -> tuple[Tensor, Tensor]:
    """Both matrices of a form with LoRAs merged in."""
    sides = []
    for matrix, blocks in ((form.left, form.left_blocks), (form.right, form.right_blocks)):
        update = update_of(blocks, found, matrix)
        sides.append(matrix if update is None else matrix + update.basis @ update.mix)
    return sides[0], sides[1]


def export_lora(
    pipe: Any,
    path: str | Path,
    *,
    name: str | None = None,
    layout: Layout = "diffusers",
    rank: int | None = None,
    roots: Roots = no_roots,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter, at its present strength, as a LoRA that other tools load.

    The vectors of a learned token go beside it, into ``NAME.embedding.safetensors`` as textual inversion has them.

    Raises:
        CheckpointError: the layout has no names for this model, or the file cannot be written.
        ModelError: the adapter has a mask.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    handle = the_adapter(pipe, name)
    factors, conversion = as_lora(handle, rank=rank, roots=roots, progress=progress)
    write_lora(handle, factors, Path(path), layout, dtype)
    return conversion


def embedding_path(path: Path) -> Path:
    """Where the vectors of a learned token go, beside a LoRA."""
    return path.with_suffix(".embedding.safetensors")


def write_lora(
    handle: Adapter,
    factors: Mapping[str, Mapping[str, LoraWeights]],
    path: Path,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what :func:`as_lora` returned, and the vectors of a learned token beside it."""
    pipe = handle.pipe
    sdxl = "text_encoder_2" in text_encoders(pipe)
    tensors = to_diffusers(factors) if layout == "diffusers" else to_kohya(factors, sdxl)
    with atomic_file(path) as file:
        file.write(tensor_bytes({key: t.to("cpu", dtype) for key, t in tensors.items()}, {"format": "pt"}))
    if handle.token is not None:
        vectors = handle.token.vectors
        keys = (
            {e: {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[e] for e in vectors} if len(vectors) > 1 else {}
        )
        content = {keys.get(e, handle.token.text): v.detach().to("cpu", dtype) for e, v in vectors.items()}
        with atomic_file(embedding_path(path)) as file:
            file.write(tensor_bytes(content, {"format": "pt"}))
