"""Teach a pipeline a concept from a few photos: DreamBooth's objective on added products."""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._version import __version__
from ...errors import TrainingError
from ...progress import Progress
from ...storage.manifest import Manifest
from ...training import checks, state
from ...training.fresh_or_resumed import alone
from ...training.log import Log
from ...training.process import accelerated, on_main
from ..adapter.attached import Adapter, add_adapter, remove_adapter
from ..adapter.components import denoiser, find_addable, fingerprint
from ..generation import check_words, generate
from ..pictures import as_png, grid
from .customize_config import CustomizeConfig
from .examples import Photos
from .families import Family, family_of
from .guards import explained_memory, frozen, placed
from .material import Note, check_token, class_photos, concept_photos, find_token, identity, shapes_for
from .objective import Objective
from .trainer import Trainer, check_saved

SAMPLES = "samples"
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
        note: told of remarks, e.g. a damaged checkpoint that is passed over.

    Raises:
        DataError: photos or captions that cannot be used. ModelError: a pipeline that cannot be trained.
        TrainingError: another run is in ``out``; the loss is not finite; no memory is left.
    """
    config, note = config or CustomizeConfig(), note or (lambda _: None)
    family = family_of(pipe)
    folder = Path(out) if out is not None else None
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
        saved = _open(accelerator, folder, resume, note)
        stack.enter_context(placed(pipe, accelerator.device))
        stack.enter_context(frozen(pipe))
        base = _base_identity(pipe)
        fixed: dict[str, Any] = {"photos": identity(photos), "base": base, "processes": accelerator.num_processes}
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
            with explained_memory():
                priors = on_main(
                    accelerator,
                    lambda: class_photos(
                        family,
                        config,
                        class_prompt if config.prior_weight else None,
                        given if config.prior_weight else None,
                        folder / CLASS_IMAGES if folder is not None else None,
                        base,
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
                run = _Run(accelerator, family, objective, handle, config, prompts, folder, fixed, progress)
                run.prepare(photos, priors)
                run.go(saved, note)
            handle.info = {"prompt": prompt, "training": run.summary(len(photos), len(priors))}
        except BaseException:
            remove_adapter(pipe, name)
            raise
    handle.requires_grad_(False)
    return handle


class _Run:
    """The steps of a run, its log, samples and checkpoints."""

    def __init__(
        self,
        accelerator: Any,
        family: Family,
        objective: Objective,
        handle: Adapter,
        config: CustomizeConfig,
        prompts: Sequence[str],
        folder: Path | None,
        fixed: dict[str, Any],
        progress: Progress | None,
    ) -> None:
        self.accelerator, self.family, self.objective = accelerator, family, objective
        self.handle, self.config = handle, config
        self.prompts, self.folder, self.fixed, self.progress = prompts, folder, fixed, progress
        self.trainer: Trainer
        self.saved_step: int | None = None

    def prepare(self, photos: Sequence[Any], priors: Sequence[Any]) -> None:
        """Encode what can be encoded once."""
        config = self.config
        _, shapes = shapes_for(self.family, config)
        sources: list[Photos] = []
        for stage, found, flip in (("encode photos", photos, config.flip), ("encode class images", priors, 0.0)):
            if found:
                source = Photos(
                    self.family,
                    found,
                    shapes,
                    flip=flip,
                    random_crop=config.random_crop,
                    cache=config.cache_latents,
                    seed=config.seed,
                    stream=len(sources),
                )
                source.encode_all(self.progress, stage)
                sources.append(source)
        class_source = sources[1] if len(sources) > 1 else None
        self.trainer = Trainer(
            self.accelerator, self.family, self.objective, self.handle, sources[0], class_source, config
        )
        self.trainer.encode_captions()
        if config.grad_checkpointing:
            self.family.model.enable_gradient_checkpointing()
        self._park(away=True)

    def _park(self, away: bool) -> None:
        """Encoders that have done their work leave the GPU, and come back where images are drawn."""
        device = self.accelerator.device
        for name, part in self.family.pipe.components.items():
            if device.type != "cuda" or not isinstance(part, nn.Module) or part is self.family.model:
                continue
            at_work = not self.config.cache_latents if name == "vae" else self.trainer.trains_text
            part.to("cpu" if away and not at_work else device)

    def go(self, saved: state.Saved | None, note: Note) -> None:
        config, trainer = self.config, self.trainer
        step = 0
        if saved is not None:
            with state.restoring(saved):
                trainer.restore(saved)
            step = self.saved_step = saved.step
        log = Log(self.folder if self.accelerator.is_main_process else None, step, note)
        try:
            while step < config.steps:
                value = trainer.step(step)
                step += 1
                trainer.losses.append(value)
                self._check(value, step)
                last = step == config.steps
                if last and not trainer.has_moved():
                    raise TrainingError(
                        f"the adapter did not move in {step} steps: every update was skipped or too small to count. "
                        "Use precision bf16 or no, or a higher lr"
                    )
                if last or step % config.log_every == 0:
                    recent = trainer.losses[-config.log_every :]
                    rate = trainer.optimizer.param_groups[0]["lr"]
                    log.write(step, step / config.steps, {"loss": sum(recent) / len(recent), "lr": rate})
                if config.validate_every and (last or step % config.validate_every == 0):
                    self._validate(step, log)
                if self.folder is not None and (last or step % config.checkpoint_every == 0):
                    log.sync()
                    self._save(step)
                if self.progress:
                    self.progress("train", step, config.steps)
        finally:
            log.close()
            self._park(away=False)

    def _check(self, value: float, step: int) -> None:
        config = self.config
        due = step == config.steps or step % config.log_every == 0 or step % config.checkpoint_every == 0
        bad = self.trainer.bad_parameter() if due else None
        # A gradient scaler skips steps whose gradients overflow. The loss itself is never scaled: where it is not
        # finite, the model is not.
        if math.isfinite(value) and bad is None:
            return
        kept = f"; the checkpoint of step {self.saved_step} is good and kept" if self.saved_step else ""
        raise TrainingError(
            f"the loss or {bad or 'its gradient'} is NaN or infinite at step {step}{kept}. Try a lower lr, or "
            "precision bf16 or no"
        )

    def _save(self, step: int) -> None:
        folder = self.folder
        assert folder is not None
        saved = self.trainer.take(step, {"config": self.config.to_dict(), "run": self.fixed})
        on_main(self.accelerator, lambda: str(state.write(folder, saved, self.config.keep_checkpoints)))
        self.saved_step = step

    def _validate(self, step: int, log: Log) -> None:
        if self.folder is None or not self.accelerator.is_main_process:
            return
        config = self.config
        resolution, _ = shapes_for(self.family, config)
        self._park(away=False)
        with self.accelerator.autocast():
            rows = generate(
                self.family.pipe,
                self.prompts,
                seeds=range(config.validation_images),
                steps=config.validation_steps,
                height=resolution,
                width=resolution,
            )
        self._park(away=True)
        sheet = grid(rows)
        manifest = Manifest(self.folder)
        manifest.write(manifest.free(f"{SAMPLES}/step-{step:06d}.png"), as_png(sheet))
        log.image("samples", sheet, step)

    def summary(self, photos: int, priors: int) -> dict[str, Any]:
        """What the file says of its training. No times: the same run gives the same file."""
        config, losses = self.config, self.trainer.losses
        tail = losses[-max(1, len(losses) // 10) :]
        return {
            "steps": config.steps,
            "batch_size": config.batch_size * config.accumulate * self.accelerator.num_processes,
            "lr": config.lr,
            "seed": config.seed,
            "resolution": shapes_for(self.family, config)[0],
            "photos": photos,
            "class_images": priors,
            "final_loss": round(sum(tail) / len(tail), 6),
            "comcat": __version__,
            "torch": torch.__version__,
        }


def _open(accelerator: Any, folder: Path | None, resume: bool, note: Note) -> state.Saved | None:
    """The checkpoint to continue from, whole on every process: each of them holds the whole adapter."""
    if folder is None:
        if resume:
            raise TrainingError("there is nothing to resume without the directory of the run; give out")
        return None

    def look() -> state.Saved | None:
        if not resume:
            checks.check_new(folder)
            return None
        state.clean(folder)
        found = checks.newest(folder, note)
        check_saved(found)
        return found

    return on_main(accelerator, look)


def finish(folder: Path) -> None:
    """Drop the checkpoints of a run that has ended well."""
    state.remove(folder)


def _base_identity(pipe: Any) -> str:
    """Architecture and a sample of the weights: another base model is noticed without reading all of it."""
    component, model = denoiser(pipe)
    attentions, _ = find_addable(component, model)
    sha = hashlib.sha256(fingerprint(attentions).encode())
    ordered = list(attentions.values())
    for attention in (ordered[0], ordered[-1]):
        weight = attention.linear(attention.streams[0].query).weight
        sha.update(weight.detach().float().cpu().numpy().tobytes())
    return sha.hexdigest()[:16]
