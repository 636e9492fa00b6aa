"""Customization as a task of the training engine: an adapter's steps, samples and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..._version import __version__
from ...errors import TrainingError
from ...progress import Progress
from ...storage.manifest import Manifest
from ...training.engine import Task, not_finite
from ...training.log import SAMPLES, Log
from ...training.state import Saved
from ..adapter.attached import Adapter
from ..generation import generate
from ..pictures import as_png, grid
from .byte_budget import WHEN, ByteBudget
from .customize_config import CustomizeConfig
from .examples import Photos
from .families import Family
from .material import shapes_for
from .objective import Objective
from .photos import Photo
from .trainer import AdapterTrainer

if TYPE_CHECKING:
    from accelerate import Accelerator


class Teaching(Task):
    """An adapter that learns a concept.

    Args:
        prompts: of the samples; folder: of the run, or None; budget: of the adapter's file.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        objective: Objective,
        handle: Adapter,
        config: CustomizeConfig,
        prompts: Sequence[str],
        folder: Path | None,
        photos: Sequence[Photo],
        priors: Sequence[Photo],
        progress: Progress | None,
        budget: ByteBudget | None = None,
    ) -> None:
        self.accelerator, self.family, self.config = accelerator, family, config
        self.prompts, self.folder, self.handle = prompts, folder, handle
        self.budget, self.progress = budget, progress
        self._counts = {"photos": len(photos), "class_images": len(priors)}
        self.total = self.per_epoch = config.steps
        _, shapes = shapes_for(family, config)
        sources: list[Photos] = []
        for stage, found, flip in (("encode photos", photos, config.flip), ("encode class images", priors, 0.0)):
            if found:
                source = Photos(
                    family,
                    found,
                    shapes,
                    flip=flip,
                    random_crop=config.random_crop,
                    cache=config.cache_latents,
                    seed=config.seed,
                    stream=len(sources),
                )
                source.encode_all(progress, stage)
                sources.append(source)
        class_source = sources[1] if len(sources) > 1 else None
        self.trainer = AdapterTrainer(accelerator, family, objective, handle, sources[0], class_source, config)
        self.trainer.encode_captions()
        if config.grad_checkpointing:
            family.model.enable_gradient_checkpointing()
        self._park(away=True)

    def _park(self, away: bool) -> None:
        """Encoders that have done their work leave the GPU, and come back where images are drawn."""
        device = self.accelerator.device
        for name, part in self.family.pipe.components.items():
            if device.type != "cuda" or not isinstance(part, nn.Module) or part is self.family.model:
                continue
            at_work = not self.config.cache_latents if name == "vae" else self.trainer.trains_text
            part.to("cpu" if away and not at_work else device)

    def steps(self, done: int) -> Iterator[None]:
        try:
            for index in range(done, self.total):
                if self.budget is not None and index == max(1, round(WHEN * self.total)):
                    self.handle.info["training"] = self.summary()
                    self.budget.apply(self.handle, self.trainer, self.progress)
                self.trainer.losses.append(self.trainer.step(index))
                yield
        finally:
            self._park(away=False)

    def check(self, step: int, due: bool, kept: int | None) -> None:
        bad = self.trainer.bad_parameter() if due else None
        # A gradient scaler skips steps whose gradients overflow. The loss itself is never scaled: where it is not
        # finite, the model is not.
        if not math.isfinite(self.trainer.losses[-1]) or bad is not None:
            found = f"; the checkpoint of step {kept} is good and kept" if kept else ""
            what = f"the loss or {bad or 'its gradient'}"
            raise not_finite(what, f"at step {step}", found, "a lower lr, or precision bf16 or no")
        if step == self.total and not self.trainer.has_moved():
            raise TrainingError(
                f"the adapter did not move in {step} steps: every update was skipped or too small to count. "
                "Use precision bf16 or no, or a higher lr"
            )

    def line(self, step: int) -> dict[str, Any]:
        recent = self.trainer.losses[-self.config.log_every :]
        return {"loss": sum(recent) / len(recent), "lr": self.trainer.optimizer.param_groups[0]["lr"]}

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        return self.trainer.take(step, plain)

    def restore(self, saved: Saved) -> None:
        self.trainer.restore(saved)

    def evaluates(self, step: int) -> bool:
        every = self.config.validate_every
        return bool(every) and (step == self.total or step % every == 0)

    def evaluate(self, step: int, log: Log) -> None:
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

    def summary(self) -> dict[str, Any]:
        """What the file says of its training. No times: the same run gives the same file."""
        config, losses = self.config, self.trainer.losses
        tail = losses[-max(1, len(losses) // 10) :]
        return {
            "steps": config.steps,
            "batch_size": config.batch_size * config.accumulate * self.accelerator.num_processes,
            "lr": config.lr,
            "seed": config.seed,
            "resolution": shapes_for(self.family, config)[0],
            **self._counts,
            "final_loss": round(sum(tail) / max(1, len(tail)), 6),
            **({} if self.budget is None else self.budget.summary(self.handle)),
            "comcat": __version__,
            "torch": torch.__version__,
        }
