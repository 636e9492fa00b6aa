"""Teach a pipeline a concept from a few photos: DreamBooth's objective on added products."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...errors import TrainingError
from ...progress import Progress
from ...training import checks, state
from ...training.engine import Run
from ...training.fresh_or_resumed import alone, open_run
from ...training.process import accelerated, on_main
from ..adapter.attached import Adapter, add_adapter, remove_adapter
from ..adapter.components import architecture_digest, denoiser, find_addable
from ..files.numbers import Storage
from ..generation import check_words
from ..shrinking.cutting import trim
from .byte_budget import ByteBudget
from .concept_task import Teaching
from .customize_config import CustomizeConfig
from .families import family_of
from .guards import explained_memory, frozen_pipeline, placed_pipeline
from .material import Note, check_token, class_photos, concept_photos, find_token, identity
from .objective import Objective
from .trainer import check_saved

CLASS_IMAGES = "class-images"


def train(
    pipe: Any,
    images: str | Path,
    prompt: str | None = None,
    config: CustomizeConfig | None = None,
    *,
    name: str = "default",
    class_prompt: str | None = None,
    class_images: str | Path | None = None,
    validation_prompts: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    max_bytes: int | None = None,
    storage: Storage = "float16",
    base: str | None = None,
    allow_upscale: bool = False,
    skip_bad_images: bool = False,
    cpu: bool = False,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Adapter:
    """Learn a concept; the adapter stays on the pipeline, whose own weights are not touched.

    Args:
        pipe: a text-to-image pipeline of diffusers (SD 1.x, 2.x, XL, 3, FLUX.1, PixArt).
        images: folder of photos; captions beside them (``.txt``, ``metadata.jsonl``) go before ``prompt``.
        prompt: e.g. "a photo of V* dog"; a word such as ``V*`` or ``<dog>`` is learned as a new token.
        class_prompt: e.g. "a photo of a dog": prior preservation, with ``class_images`` or images that are generated.
        out: directory of the run: checkpoints, metrics.jsonl, TensorBoard, sample grids, generated class images.
        resume: continue the run in ``out``, bit by bit.
        max_bytes: of the adapter's file as ``storage``: in the middle of the run components of low worth are dropped,
            head by head; ``config.rank`` is what the run begins with. Afterwards save it with the same storage.
        base: what the file will call the base model; the pipeline's own name by default.
        note: told of remarks, e.g. a damaged checkpoint that is passed over.

    Raises:
        DataError: photos or captions that cannot be used. ModelError: a pipeline that cannot be trained.
        TrainingError: another run is in ``out``; the loss is not finite; no memory is left.
        CheckpointError: not even one component fits into ``max_bytes``; the bytes of the smallest file follow.
    """
    config, note = config or CustomizeConfig(), note or (lambda _: None)
    family = family_of(pipe)
    folder = Path(out) if out is not None else None
    if folder is None and resume:
        raise TrainingError("there is nothing to resume without the directory of the run; give out")
    photos = concept_photos(
        Path(images), prompt, family, config, allow_upscale=allow_upscale, skip_bad=skip_bad_images, note=note
    )
    token = config.token or find_token([photo.caption for photo in photos])
    if token is not None:
        check_token(photos, token, class_prompt)
        config = replace(config, token=token)
        if any(f"({token}:" in photo.caption for photo in photos):
            note(f"weights such as ({token}:1.2) mean nothing to diffusers: brackets and numbers are learned as text")
    elif odd := next((photo.caption for photo in photos if re.search(r"\w\*|<\S+>", photo.caption)), None):
        note(f"no word of {odd!r} looks like a new one, such as V* or <dog>, so none is learned; name it with --token")
    if class_prompt in {photo.caption for photo in photos}:
        note(
            f"{class_prompt!r} is both the class prompt and the caption of photos: the class images hold it to what it "
            "was. Give the photos a caption with a new word, e.g. V*"
        )
    prompt = prompt or photos[0].caption
    given = Path(class_images) if class_images is not None else None
    with contextlib.ExitStack() as stack:
        accelerator = stack.enter_context(accelerated(config.precision, config.seed, cpu))
        stack.enter_context(alone(accelerator, folder))
        if not accelerator.is_main_process:
            progress = None
        # What cannot be trained is refused before anything is drawn.
        objective = Objective(pipe.scheduler, config.snr_gamma)
        saved = open_run(accelerator, folder, resume, note)
        if saved is not None:
            on_main(accelerator, lambda: check_saved(saved))
        stack.enter_context(placed_pipeline(pipe, accelerator.device))
        stack.enter_context(frozen_pipeline(pipe))
        weights = _base_identity(pipe)
        fixed: dict[str, Any] = {"photos": identity(photos), "base": weights, "processes": accelerator.num_processes}
        budget = None if max_bytes is None else ByteBudget(max_bytes, storage)
        fixed["budget"] = None if budget is None else budget.to_dict()
        if saved is not None:  # the class images are not known yet
            checks.check_same(saved.plain, config, {**saved.plain["run"], **fixed})
        handle = add_adapter(
            pipe,
            rank=config.ranks,
            targets=config.targets or None,
            name=name,
            text_encoder_rank=config.text_encoder_rank,
            token=config.token,
            token_vectors=config.token_vectors,
            token_init=config.token_init,
            scale=config.scale,
            dtype=torch.float32,
            seed=config.seed,
        )
        try:
            check_words(pipe, [photo.caption for photo in photos])
            handle.info = {"base": base, "prompt": prompt}
            if budget is not None and not budget.check(handle, config.steps, note):
                budget = None
            with explained_memory():
                priors = on_main(
                    accelerator,
                    lambda: class_photos(
                        family,
                        config,
                        class_prompt if config.prior_weight else None,
                        given if config.prior_weight else None,
                        folder / CLASS_IMAGES if folder is not None else None,
                        weights,
                        keep=saved is not None,
                        allow_upscale=allow_upscale,
                        note=note,
                        progress=progress,
                    ),
                )
                fixed["class_images"] = identity(priors)
                if saved is not None:
                    checks.check_same(saved.plain, config, fixed)
                prompts = validation_prompts or (prompt,)
                task = Teaching(
                    accelerator, family, objective, handle, config, prompts, folder, photos, priors, progress, budget
                )
                Run(task, fixed, folder, saved, progress, note).go()
            handle.info["training"] = task.summary()
            if budget is not None:
                trim(handle)
        except BaseException:
            remove_adapter(pipe, name)
            raise
    handle.requires_grad_(False)
    return handle


def finish(folder: Path) -> None:
    """Drop the checkpoints of a run that has ended well."""
    state.remove(folder)


def _base_identity(pipe: Any) -> str:
    """Architecture and a sample of the weights: another base model is noticed without reading all of it."""
    component, model = denoiser(pipe)
    attentions, _ = find_addable(component, model)
    sha = hashlib.sha256(architecture_digest(attentions).encode())
    ordered = list(attentions.values())
    for attention in (ordered[0], ordered[-1]):
        query = attention.linear(attention.streams[0].query)
        weight = getattr(query, "linear", query).weight  # of a compressed one, the narrow layer inside
        sha.update(weight.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]
