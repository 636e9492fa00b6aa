"""One step of a customization run, and the state that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...storage import reader
from ...training.schedule import fall
from ...training.snapshot import Snapshot, Trained, as_module
from ...training.state import Saved
from ..adapter.attached import Adapter
from .customize_config import CustomizeConfig
from .examples import PhotoExample, Photos
from .families import Family, Text
from .objective import Noisy, Objective, loss

if TYPE_CHECKING:
    from accelerate import Accelerator

_NOISE, _PROBES = 17, 19  # keep these random numbers apart from those of other uses of the seed


class AdapterTrainer:
    """An adapter in training.

    Args:
        photos: of the concept; class_photos: of its class, or None.

    Attributes:
        adapter: its parameters are the only ones that change.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        objective: Objective,
        adapter: Adapter,
        photos: Photos,
        class_photos: Photos | None,
        config: CustomizeConfig,
    ) -> None:
        self.accelerator, self.family, self.adapter, self.config = accelerator, family, adapter, config
        self.objective = objective
        batches = config.steps * config.accumulate * accelerator.num_processes
        self.sources = [(photos, photos.plan(batches, config.batch_size), 1.0)]
        if class_photos is not None and config.prior_weight > 0:
            self.sources.append((class_photos, class_photos.plan(batches, config.batch_size), config.prior_weight))
        self.parameters: dict[str, nn.Parameter] = dict(adapter.named_parameters())
        self._start = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        self._text: dict[str, Text] = {}
        self.trains_text = bool(config.text_encoder_rank or adapter.token)
        self.optimizer = self._new_optimizer()
        module = as_module(self.parameters)
        self.snapshot = Snapshot(accelerator, Trained(accelerator, module, self.optimizer))
        self.losses: list[float] = []

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        token = [p for name, p in self.parameters.items() if name.startswith("token.")]
        products = [p for name, p in self.parameters.items() if not name.startswith("token.")]
        groups: list[dict[str, Any]] = [
            {"params": products, "base_lr": config.lr, "weight_decay": config.weight_decay},
            # A row moves by its own size, which differs by orders of magnitude between text encoders.
            *[{"params": [p], "base_lr": config.token_lr * _spread(p), "weight_decay": 0.0} for p in token],
        ]
        for group in groups:
            group["lr"] = group["base_lr"]
        if config.optimizer == "adamw":
            return torch.optim.AdamW(groups, betas=(config.betas[0], config.betas[1]))
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise TrainingError(
                "optimizer adamw8bit needs another package. Install it: pip install bitsandbytes, or take adamw"
            ) from error
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, betas=config.betas)
        return optimizer

    @torch.no_grad()
    def encode_captions(self) -> None:
        """Encode every caption once, unless the text encoders are trained."""
        if self.trains_text:
            return
        captions = {p.caption for photos, _, _ in self.sources for p in photos.photos}
        for caption in sorted(captions | ({""} if self.config.caption_dropout else set())):
            self._text[caption] = {key: t.cpu() for key, t in self.family.encode_text([caption]).items()}

    def step(self, index: int) -> float:
        """One update; the loss, averaged over its batches and over all processes."""
        config, accelerator = self.config, self.accelerator
        factor = self._rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        total = torch.zeros((), device=accelerator.device)
        for micro in range(config.accumulate):
            number = (index * config.accumulate + micro) * accelerator.num_processes + accelerator.process_index
            value = self._loss(number)
            accelerator.backward(value / config.accumulate)
            total += value.detach() / config.accumulate
        self._share_gradients()
        scaler = accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        if config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip_grad)
        if scaler is not None:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean: Tensor = accelerator.reduce(total, "mean") if accelerator.num_processes > 1 else total
        return float(mean)

    def _rate(self, index: int) -> float:
        config = self.config
        if index < config.warmup_steps:
            return (index + 1) / config.warmup_steps
        form = "none" if config.schedule == "constant" else config.schedule
        return fall((index - config.warmup_steps) / max(1, config.steps - config.warmup_steps), form)

    def _loss(self, number: int) -> Tensor:
        result = torch.zeros((), device=self.accelerator.device)
        for out, noisy, weight in self._predictions(number, _NOISE):
            result = result + weight * loss(out, noisy)
        return result

    def probes(self, count: int) -> Iterator[Tensor]:
        """Outputs of the denoiser with noise of their own, one vector for a batch of all kinds of photos.

        Each number is multiplied so that squared changes of the vector are changes of the predictions as the loss
        weighs them.
        """
        for index in range(count):
            parts = []
            for out, noisy, weight in self._predictions(index % len(self.sources[0][1]), _PROBES):
                share = (weight * noisy.weight / out.numel()).sqrt().view(-1, *[1] * (out.dim() - 1))
                parts.append((out.float() * share).flatten())
            yield torch.cat(parts)

    def _predictions(self, number: int, stream: int) -> Iterator[tuple[Tensor, Noisy, float]]:
        """(the denoiser's output, its noise and target, the loss's weight) for a batch of every kind of photos."""
        seed = np.random.SeedSequence((stream, self.config.seed, number)).generate_state(2)
        generator = torch.Generator().manual_seed(int(seed[0]) << 32 | int(seed[1]))
        parts = [self._part(photos, plan[number], generator) for photos, plan, _ in self.sources]
        weights = [weight for _, _, weight in self.sources]
        device = self.accelerator.device
        shapes = {latents.shape[1:] for latents, _, _ in parts}
        # One pass for photos of the concept and of its class where their shapes allow it.
        merged = len(parts) > 1 and len(shapes) == 1
        groups = (
            [list(zip(parts, weights, strict=True))]
            if merged
            else [[pair] for pair in zip(parts, weights, strict=True)]
        )
        for group in groups:
            latents = torch.cat([part[0] for part, _ in group]).to(device)
            captions = [caption for part, _ in group for caption in part[1]]
            time_ids = torch.cat([part[2] for part, _ in group]).to(device)
            noisy = self.objective(latents, generator)
            with self.accelerator.autocast():
                text = self._encode(captions)
                dtype = text["embeds"].dtype
                out = self.family.predict(noisy.sample.to(dtype), noisy.timesteps, text, time_ids)
            start = 0
            for (part, _, _), weight in group:
                rows = slice(start, start + len(part))
                own = noisy._replace(target=noisy.target[rows], weight=noisy.weight[rows])
                yield out[rows], own, weight
                start += len(part)

    def _part(
        self, photos: Photos, batch: Sequence[PhotoExample], generator: torch.Generator
    ) -> tuple[Tensor, list[str], Tensor]:
        captions = photos.captions(batch)
        if self.config.caption_dropout:
            drawn = torch.rand(len(captions), generator=generator).tolist()
            captions = ["" if x < self.config.caption_dropout else c for x, c in zip(drawn, captions, strict=True)]
        return photos.latents(batch, generator), captions, photos.time_ids(batch)

    def _encode(self, captions: list[str]) -> Text:
        if self.trains_text:
            return self.family.encode_text(captions)
        text = self.family.joined([self._text[caption] for caption in captions])
        return {key: t.to(self.accelerator.device) for key, t in text.items()}

    def _share_gradients(self) -> None:
        """Mean over the processes: adapters are so small that this needs no wrapper around the model."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.accelerator.num_processes > 1:
            flat = torch.cat([p.grad.flatten() for p in self.parameters.values() if p.grad is not None])
            shared: Any = self.accelerator.reduce(flat, "mean")
            parts = shared.split([p.numel() for p in self.parameters.values()])
            for p, part in zip(self.parameters.values(), parts, strict=True):
                p.grad = part.view_as(p).clone()

    def bad_parameter(self) -> str | None:
        """A parameter that holds NaN or infinite values, if there is one."""
        return next((name for name, p in self.parameters.items() if not bool(p.isfinite().all())), None)

    def has_moved(self) -> bool:
        """Whether any parameter is another than at the start of the run, resumed or not."""
        return any(not torch.equal(p.detach().cpu(), self._start[name]) for name, p in self.parameters.items())

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        """Everything a checkpoint holds."""
        return self.snapshot.take(step, {**plain, "losses": [*self.losses]})

    def restore(self, saved: Saved) -> None:
        """Continue from a checkpoint, whose tensors only the main process needs to hold.

        Raises:
            TrainingError: it holds other tensors than this run has.
        """
        self.snapshot.restore(saved)
        self.losses = list(saved.plain["losses"])


@dataclass(frozen=True)
class _Plain:
    """What a checkpoint of :class:`AdapterTrainer` holds beside tensors; more may be there."""

    config: dict[str, Any]
    run: dict[str, Any]
    scaler: dict[str, float | int] | None
    losses: list[float]


def check_saved(saved: Saved) -> None:
    """Raise TrainingError unless a checkpoint is one of a customization run, with one loss for every step."""
    what = f"the checkpoint of step {saved.step}"
    if "losses" not in saved.plain:
        raise TrainingError(f"{what} is not one of a customization run; start again with another --out")
    plain = {key: saved.plain[key] for key in _Plain.__dataclass_fields__ if key in saved.plain}
    reader.validated(_Plain, plain, what, TrainingError)
    if type(saved.step) is not int or saved.step < 1 or len(plain["losses"]) != saved.step:
        raise TrainingError(f"{what} is damaged: it has {len(plain['losses'])} losses. Remove it, or start again")


def _spread(vectors: nn.Parameter) -> float:
    """The size of a token's entries at the start."""
    return float(vectors.detach().float().std()) if vectors.numel() > 1 else 1.0
