"""An existing adapter under a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError, ModelError
from ...progress import Progress
from ..adapter.attached import Adapter
from ..files.adapter_file import header, the_adapter
from ..files.encoding import file_content, products_error
from ..files.numbers import Storage
from ..generation import generate
from ..teaching.families import Family, family_of
from ..teaching.objective import Objective
from .choosing import Choice, Sizes, choose
from .cutting import cut, trim
from .worth import Key, Worth, measure


@dataclass(frozen=True)
class Shrunk:
    """What is left of an adapter.

    Attributes:
        bytes: of its file; components: that are kept, of how many.
        products_error: relative, root mean square over layers and products, rounding of the storage not counted.
        worth_lost: share of the worth that went with the components, an estimate of the squared change of the output.
    """

    bytes: int
    components: int
    of: int
    products_error: float
    worth_lost: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def shrink_adapter(
    pipe: Any,
    max_bytes: int,
    *,
    name: str | None = None,
    storage: Storage = "float16",
    prompts: Sequence[str] = (),
    images: int = 4,
    steps: int = 10,
    probes: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shrunk:
    """Keep the components of an adapter that change most what this pipeline draws, as many as fit into a file.

    The adapter on the pipeline is changed: every head keeps components of its own, and layers without any are taken
    off. Save it with the same ``storage``.

    Args:
        max_bytes: of the file. name: which adapter; may be left out where there is only one.
        prompts: what it is used for; the prompt that it was taught with by default.
        images: how many to draw for each prompt, in ``steps`` steps; noisy versions of them are what is looked at.
        probes: forward and backward passes.

    Raises:
        CheckpointError: not even one component fits; the bytes of the smallest file follow.
        DataError: there is no prompt. ModelError: there is no such adapter, it is off, or the noise of the pipeline's
            training is not known.
    """
    handle = the_adapter(pipe, name)
    if handle.strength.value == 0:
        raise ModelError(
            f"the adapter {handle.name!r} is switched off, so that nothing it has is worth anything; set it on"
        )
    texts = list(prompts) or ([handle.info["prompt"]] if handle.info.get("prompt") else [])
    if not texts:
        raise DataError("the adapter does not say what it was taught with; give prompts that it is used for")
    family, objective = family_of(pipe), Objective(pipe.scheduler)
    handle.info["training"] = {**(handle.info.get("training") or {}), "max_bytes": max_bytes}
    about, before = header(handle, storage), {key: t.clone() for key, t in handle.state_dict().items()}
    sizes = Sizes(about, before)
    sizes.check(max_bytes)
    outputs = _drawn(handle, family, objective, texts, images, steps, probes, seed, progress)
    worths = measure(handle, outputs, probes, seed, progress)
    choice = choose(worths, sizes, max_bytes)
    cut(handle, worths, choice)
    trim(handle)
    kept = sum(int(mask.sum()) for mask in choice.values())
    return Shrunk(
        len(file_content(header(handle, storage), handle.state_dict())),
        kept,
        sum(mask.numel() for mask in choice.values()),
        products_error(about, before, handle.state_dict()),
        _lost(worths, choice),
    )


@torch.no_grad()
def _drawn(
    handle: Adapter,
    family: Family,
    objective: Objective,
    prompts: Sequence[str],
    images: int,
    steps: int,
    probes: int,
    seed: int,
    progress: Progress | None,
) -> Iterator[Tensor]:
    """Predictions for noisy versions of what the adapter draws."""
    rows = generate(
        handle.pipe,
        prompts,
        seeds=range(seed, seed + images),
        steps=steps,
        batch_size=1,
        progress=progress,
        stage="draw images",
    )
    device, dtype = family.model.device, next(family.model.parameters()).dtype
    examples = [(text, image) for text, row in zip(prompts, rows, strict=True) for image in row]
    latents, time_ids = [], []
    for _, image in examples:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(127.5).sub(1)
        latents.append(family.encode_images(pixels[None])[0])
        height, width = pixels.shape[1:]
        time_ids.append(torch.tensor([[height, width, 0, 0, height, width]]).float().to(device))
    generator = torch.Generator().manual_seed(seed)
    for probe in range(probes):
        place = probe % len(examples)
        noisy = objective(latents[place].to(device), generator)
        with torch.enable_grad():
            text = family.encode_text([examples[place][0]])
            out = family.predict(noisy.sample.to(dtype), noisy.timesteps, text, time_ids[place])
            yield out.float()


def _lost(worths: Mapping[Key, Worth], choice: Choice) -> float:
    total = sum(float(found.worth.sum()) for found in worths.values())
    kept = sum(float(found.worth[choice[key].to(found.worth.device)].sum()) for key, found in worths.items())
    return 1 - kept / total if total else 0.0
