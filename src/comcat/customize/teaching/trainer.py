"""One step of a customization run, and the state that a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...storage import reader
from ...training.process import agree
from ...training.schedule import fall
from ...training.state import Saved
from ...wording import some
from ..adapter.attached import Adapter
from .customize_config import CustomizeConfig
from .examples import PhotoExample, Photos
from .families import Family, Text
from .objective import Objective, loss

if TYPE_CHECKING:
    from accelerate import Accelerator

_NOISE = 17  # keeps these random numbers apart from those of other uses of the seed


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
        seed = np.random.SeedSequence((_NOISE, self.config.seed, number)).generate_state(2)
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
        result = torch.zeros((), device=device)
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
                result = result + weight * loss(out[rows], own)
                start += len(part)
        return result

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
        rows = [self._text[caption] for caption in captions]
        return {key: torch.cat([row[key] for row in rows]).to(self.accelerator.device) for key in rows[0]}

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
        """Everything a checkpoint holds. Random numbers depend on the step alone and need no state."""
        names = {id(p): name for name, p in self.parameters.items()}
        state, scalars = {}, {}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    state[f"{names[id(parameter)]}|{key}"] = value.detach().cpu().clone()
                else:
                    scalars[f"{names[id(parameter)]}|{key}"] = value
        scaler = self.accelerator.scaler
        tensors = {"adapter": {n: p.detach().cpu().clone() for n, p in self.parameters.items()}, "optimizer": state}
        more = {"optimizer": scalars, "scaler": scaler.state_dict() if scaler is not None else None}
        return Saved(step, tensors, json.loads(json.dumps({**plain, **more, "losses": self.losses})))

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Continue from a checkpoint, whose tensors only the main process needs to hold.

        Raises:
            TrainingError: it holds other tensors than this run has.
        """
        # Every process holds the whole adapter.
        saved = replace(saved, tensors=agree(self.accelerator, saved.tensors))
        self._check_tensors(saved)
        for name, parameter in self.parameters.items():
            parameter.copy_(saved.tensors["adapter"][name])
        for source in (saved.tensors["optimizer"], saved.plain["optimizer"]):
            for key, value in source.items():
                name, _, entry = key.partition("|")
                parameter = self.parameters[name]
                # AdamW keeps its counter on the CPU.
                on_device = isinstance(value, Tensor) and entry != "step"
                self.optimizer.state[parameter][entry] = value.to(parameter.device) if on_device else value
        self.losses = list(saved.plain["losses"])
        if self.accelerator.scaler is not None and saved.plain["scaler"]:
            self.accelerator.scaler.load_state_dict(saved.plain["scaler"])

    def _check_tensors(self, saved: Saved) -> None:
        """Raise TrainingError unless a checkpoint's tensors are those that :meth:`take` makes of this run."""
        found = saved.tensors["adapter"]
        wrong = [name for name in {*found, *self.parameters} if name not in found or name not in self.parameters]
        wrong += [n for n, p in self.parameters.items() if n in found and found[n].shape != p.shape]
        wrong += [n for n, t in found.items() if t.dtype != torch.float32 or not t.isfinite().all()]
        kept: dict[str, Any] = {**saved.tensors["optimizer"], **saved.plain["optimizer"]}
        for key, value in kept.items():
            name, _, entry = key.partition("|")
            like = self.parameters.get(name)
            fits = like is not None and (not isinstance(value, Tensor) or bool(value.isfinite().all()))
            if self.config.optimizer == "adamw":
                shape = {"step": torch.Size([]), "exp_avg": getattr(like, "shape", None)}
                shape["exp_avg_sq"] = shape["exp_avg"]
                fits = fits and isinstance(value, Tensor) and value.shape == shape.get(entry, 0)
                fits = fits and value.dtype == torch.float32 and (entry != "step" or 0 <= float(value) <= 2**31)
                fits = fits and (entry != "exp_avg_sq" or bool((value >= 0).all()))
            if not fits:
                wrong.append(key)
        if self.config.optimizer == "adamw":
            entries = [f"{name}|{entry}" for name in self.parameters for entry in ("step", "exp_avg", "exp_avg_sq")]
            wrong += [entry for entry in entries if entry not in kept]
        if wrong:
            raise TrainingError(
                f"the checkpoint of step {saved.step} does not fit this run: {some(wrong)}. Remove it to continue from "
                "the one before, or start again"
            )


@dataclass(frozen=True)
class _Plain:
    """What a checkpoint of :class:`AdapterTrainer` holds beside tensors; more may be there."""

    config: dict[str, Any]
    run: dict[str, Any]
    optimizer: dict[str, float | int | bool | None]
    scaler: dict[str, float | int] | None
    losses: list[float]


def check_saved(saved: Saved) -> None:
    """Raise TrainingError unless a checkpoint is one of a customization run, with one loss for every step."""
    what = f"the checkpoint of step {saved.step}"
    plain = {key: saved.plain[key] for key in _Plain.__dataclass_fields__ if key in saved.plain}
    reader.validated(_Plain, plain, what, TrainingError)
    if saved.tensors and not {"adapter", "optimizer"} <= set(saved.tensors):
        raise TrainingError(f"{what} is not one of a customization run; start again with another --out")
    if type(saved.step) is not int or saved.step < 1 or len(plain["losses"]) != saved.step:
        raise TrainingError(f"{what} is damaged: it has {len(plain['losses'])} losses. Remove it, or start again")


def _spread(vectors: nn.Parameter) -> float:
    """The size of a token's entries at the start."""
    return float(vectors.detach().float().std()) if vectors.numel() > 1 else 1.0
