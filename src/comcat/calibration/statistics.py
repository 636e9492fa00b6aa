"""The result of a calibration: plain tensors and numbers, saved as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from typing_extensions import NotRequired, TypedDict

from ..errors import CalibrationError
from ..evaluation.outputs import KINDS
from ..layers.base import Inventory
from ..layers.cost import Shape
from ..models.batches import Batch
from ..models.call_files import packed, unpacked
from ..models.running import wide
from ..storage.atomic import atomic_file, tensor_bytes
from ..storage.reader import digest, parse_json, read_tensors, shown, validated
from ..wording import by
from .fingerprint import BUCKETS, Distance, Fingerprint, distance, fingerprint

#: 2 where images are not all that the model is called with, 3 where more than tensors of single images is; 1 else. Each
#: is what the earliest version that reads it knows.
FORMAT = 3
_SEPARATOR = "::"
_WEIGHTS = "comcat.weights"
_HELD_OUT = "comcat.held_out"
_INPUTS, _HELD_OUT_INPUTS, _FIXED = "comcat.inputs", "comcat.held_out_inputs", "comcat.fixed"
#: Distances of weights (:mod:`comcat.calibration.fingerprint`) up to which they count as the same, and as a near
#: relative.
SAME, NEAR = 1e-5, 0.1


class _Metadata(TypedDict):
    shapes: dict[str, Shape]
    num_images: NonNegativeInt
    input_size: tuple[PositiveInt, PositiveInt, PositiveInt]
    fisher: bool
    probes: dict[str, dict[str, float]]
    outputs: NotRequired[str | None]
    fixed: NotRequired[dict[str, Any]]


def _digest(meta: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of metadata and tensors."""
    sha = hashlib.sha256(digest(meta).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _impossible(moment: Tensor) -> bool:
    """Finite, but beyond what squares of activations reach, or of a negative square."""
    square = moment.dim() >= 2 and moment.shape[-1] == moment.shape[-2]
    negative = square and bool((moment.diagonal(dim1=-2, dim2=-1) < 0).any())
    return bool(torch.isfinite(moment).all()) and (negative or bool((moment.abs() > 1e100).any()))


@dataclass
class Calibration:
    """Second moments by layer and name, the shape of the data there, and a sample of images for probing.

    ``moments[layer][name]`` are float64 tensors on the CPU; :mod:`comcat.layers.factors` documents the names.
    ``probes`` caches measured sensitivities, so that a second plan from the same calibration costs nothing.
    ``outputs`` is the kind of the model's outputs (:data:`comcat.evaluation.outputs.KINDS`) and ``weights`` the
    fingerprint of its weights; both are None in files of earlier versions. ``held_out`` are images, counted in
    ``num_images``, that the statistics have not seen; None where there are none. Where the model is called with more
    than images, ``images`` is empty and ``inputs`` and ``held_out_inputs`` hold what it is called with; both are None
    else, and where single images cannot be told apart.
    """

    moments: dict[str, dict[str, Tensor]]
    shapes: dict[str, Shape]
    images: Tensor  # (n, C, H, W)
    num_images: int
    input_size: tuple[int, ...]  # (C, H, W)
    fisher: bool = False
    probes: dict[str, Any] = field(default_factory=dict)
    outputs: str | None = None
    weights: Fingerprint | None = None
    held_out: Tensor | None = None  # (n, C, H, W)
    inputs: Batch | None = None
    held_out_inputs: Batch | None = None

    @property
    def sample(self) -> Batch:
        """To probe with, which may be empty."""
        return self.inputs or Batch.of_images(self.images)

    @property
    def unseen(self) -> Batch | None:
        """To compare plans by."""
        return self.held_out_inputs or (None if self.held_out is None else Batch.of_images(self.held_out))

    def keep(self, sample: Batch | None, unseen: Batch | None) -> None:
        """Take these for :attr:`sample` and :attr:`unseen`."""
        if sample is not None:
            self.images = sample.pixels if sample.alone else self.images
            self.inputs = None if sample.alone else sample
        if unseen is not None:
            self.held_out = unseen.pixels if unseen.alone else None
            self.held_out_inputs = None if unseen.alone else unseen

    def __repr__(self) -> str:
        size = by(self.input_size)
        gradients = "with" if self.fisher else "without"
        return (
            f"Calibration({len(self.moments)} layers, {self.num_images} images of {size}, {gradients} gradients, "
            f"outputs {self.outputs or 'unknown'}, {len(self.sample)} images and {len(self.probes)} results of probing)"
        )

    def check(self, inventory: Inventory, model: nn.Module | None = None) -> None:
        """Raise CalibrationError, naming the module, unless this belongs to a model with these layers.

        With ``model`` its weights count too. Warns where they differ by up to 10 % of their length in every layer (a
        cast to half precision, a little fine-tuning), and refuses them beyond; :meth:`rebind` takes them all the same.
        """
        for layer in inventory.layers:
            moments = self.moments.get(layer.name)
            if moments is None or layer.name not in self.shapes:
                raise CalibrationError(
                    f"the calibration has no statistics of '{layer.name}': it was made for another model"
                )
            required, optional = layer.moment_shapes(), layer.optional_shapes()
            for name, shape in (required | optional).items():
                there = tuple(moments[name].shape) if name in moments else None
                if there != shape and (there is not None or name in required):
                    raise CalibrationError(
                        f"the calibration of '{layer.name}' has '{name}' of shape {there}, the model needs {shape}: it "
                        "was made for another model"
                    )
            if ("qk_rows" in moments) != ("qk_cols" in moments):
                raise CalibrationError(f"the calibration of '{layer.name}' lacks a moment; calibrate again")
            impossible = [name for name, moment in moments.items() if _impossible(moment)]
            if impossible:
                raise CalibrationError(
                    f"the calibration of '{layer.name}' holds values in '{impossible[0]}' that no moment has; "
                    "calibrate again"
                )
            damaged = [name for name, moment in moments.items() if not torch.isfinite(moment).all()]
            if damaged:
                raise CalibrationError(
                    f"the calibration of '{layer.name}' holds NaN or infinite values in '{damaged[0]}'; calibrate again"
                )
        if model is not None:
            self._check_weights(self.distance(model, inventory))

    def distance(self, model: nn.Module, inventory: Inventory) -> Distance:
        """How far the weights of ``model`` are from those that were calibrated; 0 where that is not known."""
        return distance(self.weights or {}, model, inventory)

    def _check_weights(self, far: Distance) -> None:
        if far.relative <= SAME:
            return
        text = f"the weights of the model differ from those that were calibrated by {100 * far.relative:.3g} % in "
        text += f"'{far.layer}'"
        if far.relative > NEAR:
            raise CalibrationError(
                f"{text}, where {100 * NEAR:.0f} % are allowed: the calibration was made for another model, or for "
                "other weights. Calibrate this model; or call calibration.rebind(model) to use the statistics as they "
                "are"
            )
        warnings.warn(f"{text}; its statistics are used all the same. Calibrate again if it was trained", stacklevel=4)

    def rebind(self, model: nn.Module) -> None:
        """Take these statistics for those of ``model``, whatever its weights are; measured probes are forgotten."""
        self.weights = fingerprint(model)
        self.probes.clear()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {f"{layer}{_SEPARATOR}{name}": t for layer, ms in self.moments.items() for name, t in ms.items()}
        tensors |= {f"{_WEIGHTS}{_SEPARATOR}{name}": t for name, t in (self.weights or {}).items()}
        tensors["images"] = self.images
        if self.held_out is not None:
            tensors[_HELD_OUT] = self.held_out
        for key, batch in ((_INPUTS, self.inputs), (_HELD_OUT_INPUTS, self.held_out_inputs)):
            tensors |= {f"{key}{_SEPARATOR}{name}": t for name, t in (batch.tensors if batch else {}).items()}
        called = self.inputs or self.held_out_inputs
        fixed, shared = packed(called.fixed if called else {})
        tensors |= {f"{_FIXED}{_SEPARATOR}{name}": t for name, t in shared.items()}
        meta: dict[str, Any] = {
            "format": 1 if called is None else FORMAT if fixed else 2,
            "shapes": self.shapes,
            "num_images": self.num_images,
            "input_size": self.input_size,
            "fisher": self.fisher,
            "probes": self.probes,
            "outputs": self.outputs,
        }
        if fixed:
            meta["fixed"] = fixed
        meta["sha256"] = _digest(meta, tensors)
        with atomic_file(path) as file:
            file.write(tensor_bytes(tensors, {"comcat_calibration": json.dumps(meta)}))

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            CalibrationError: not a calibration file, of a newer version, or damaged.
        """
        metadata, tensors = read_tensors(path, what="calibration", error=CalibrationError)
        name = f"calibration '{path}'"
        meta = parse_json(metadata.get("comcat_calibration", "null"), name, CalibrationError)
        if not isinstance(meta, dict) or "images" not in tensors:
            raise CalibrationError(
                f"'{path}' is not a comcat calibration; make one with comcat.calibrate(...).save(path)"
            )
        if not isinstance(meta.get("format", 0), int) or meta.get("format", 0) > FORMAT:
            raise CalibrationError(f"{name} has format {shown(meta['format'])}; upgrade comcat to read it")
        recorded = meta.pop("sha256", None)  # older files have none
        if recorded not in (None, _digest(meta, tensors)):
            raise CalibrationError(f"{name} is damaged: it does not match its checksum; calibrate again")
        known = validated(_Metadata, meta, name, CalibrationError)
        images, held_out = tensors.pop("images"), tensors.pop(_HELD_OUT, None)
        for some in (images, held_out):
            if some is not None and (some.dim() != 4 or tuple(some.shape[1:]) != known["input_size"]):
                raise CalibrationError(
                    f"{name} is damaged: its images have shape {tuple(some.shape)}, not (n, *{known['input_size']})"
                )
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, _, part = key.partition(_SEPARATOR)
            moments.setdefault(layer, {})[part] = tensor
        fixed = unpacked(known.pop("fixed", {}), moments.pop(_FIXED, {}), name, CalibrationError)
        inputs, held_out_inputs = (_read(moments.pop(key, None), fixed, name) for key in (_INPUTS, _HELD_OUT_INPUTS))
        if not all(t.is_floating_point() for part in (*moments.values(), {"": images}) for t in part.values()):
            raise CalibrationError(f"{name} is damaged: it holds statistics that are whole numbers")
        weights = moments.pop(_WEIGHTS, None)
        kind = known.get("outputs")
        if any(t.shape != (BUCKETS + 1,) or t.dtype != torch.float64 for t in (weights or {}).values()) or (
            kind is not None and kind not in KINDS
        ):
            raise CalibrationError(f"{name} is damaged: its weights or outputs; calibrate again")
        made = cls(moments=moments, images=images, weights=weights, held_out=held_out, **known)
        made.keep(inputs, held_out_inputs)
        return made

    def to(self, device: torch.device | str) -> Calibration:
        """A copy with the moments on ``device``, if that has float64; image sample and probe cache are shared."""
        home = wide(device)
        moments = {s: {n: t.to(home) for n, t in ms.items()} for s, ms in self.moments.items()}
        return Calibration(**{**self.__dict__, "moments": moments})


def _read(tensors: dict[str, Tensor] | None, fixed: dict[str, Any], name: str) -> Batch | None:
    """Inputs of a file."""
    if tensors is None:
        return None
    if not any(t.is_floating_point() for t in tensors.values()) or (batch := Batch(tensors, fixed)).rows is None:
        raise CalibrationError(f"{name} is damaged: its inputs are not those of single images")
    return batch
