"""The alternation of a rank search: a batch for the weights of the mixture, a batch for the logits of its ranks."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..evaluation.outputs import Outputs
from ..planning.plan import Plan
from ..progress import Progress
from ..training import state
from ..training.loaders import Batches
from ..training.log import Log
from ..training.losses import Loss
from ..training.process import agree, on_main
from ..training.snapshot import MOMENTS, Snapshot, check_moments
from ..training.state import Saved
from .search_config import SearchConfig
from .space import SearchSpace

if TYPE_CHECKING:
    from accelerate import Accelerator


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Alternation:
    """The run of a search, its log and its checkpoints.

    A step is one batch; even ones train the weights, odd ones the ranks.

    Args:
        loss: of the kind of outputs; dense: the model whose features are to be kept, where these are what is learned.
    """

    def __init__(
        self,
        space: SearchSpace,
        batches: Batches,
        config: SearchConfig,
        accelerator: Accelerator,
        out: Path | None,
        log: Log,
        fixed: dict[str, Any],
        progress: Progress | None,
        loss: Loss,
        dense: nn.Module | None,
    ) -> None:
        self.loss, self.dense = loss, dense
        self.space, self.batches, self.config, self.accelerator = space, batches, config, accelerator
        self.out, self.log, self.fixed = out, log, fixed
        self.progress = progress if accelerator.is_main_process else None
        self.ranks = space.ranks.to(accelerator.device)
        weights = [p for p in space.gated.parameters() if p.requires_grad]
        weight_optimizer = torch.optim.AdamW(weights, lr=config.weight_lr, weight_decay=0.0)
        self.gated, self.weight_optimizer = accelerator.prepare(space.gated, weight_optimizer)
        self.rank_optimizer = torch.optim.AdamW(
            self.ranks.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.5, 0.999)
        )
        self.snapshot = Snapshot(accelerator, self.gated, self.weight_optimizer, None)
        self.total = max(2, int(config.epochs * len(batches)))
        if config.max_steps is not None:
            self.total = min(self.total, config.max_steps)
        self.step = 0
        self.saved_step: int | None = None
        self._losses: list[Tensor] = []

    # -- one batch -------------------------------------------------------------------------------------------------

    def temperature(self) -> float:
        """Falls from the first value to the last in equal ratios."""
        first, last = self.config.temperature
        return first * (last / first) ** min(1.0, self.step / max(1, self.total - 1))

    def probabilities(self, noisy: bool = True) -> Tensor:
        """A Gumbel-softmax sample of this step, or the distribution itself."""
        noise = None
        if noisy:
            seed = self.config.seed * 1_000_003 + self.step
            noise = self.ranks.gumbel(torch.Generator().manual_seed(seed))
        if self.config.objective == "exact":
            return self.ranks.on_budget(self.temperature(), noise)
        return self.ranks.probabilities(self.temperature(), noise)

    def _loss(self, outputs: Any, images: Tensor, labels: Tensor | None) -> Tensor:
        """The distance from the labels, or from the dense model's features."""
        if labels is not None:
            return self.loss.labelled(_full(outputs), labels)
        assert self.dense is not None
        with torch.no_grad():
            dense = Outputs(self.dense, self.loss.kind)(self.dense(images), len(images))
        return self.loss.soft([_full(one) for one in outputs], dense)

    def _weight_step(self, images: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            p = self.probabilities()
        loss = self._loss(self.gated(images, p), images, labels)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.gated.parameters(), 1.0)
        self.weight_optimizer.step()
        self.weight_optimizer.zero_grad()
        return loss.detach()

    def _rank_step(self, images: Tensor, labels: Tensor | None) -> Tensor:
        p = self.probabilities()
        # Only the logits need gradients: the wrapper that averages those of the weights stays out of it.
        gated: nn.Module = self.accelerator.unwrap_model(self.gated)
        with self.accelerator.autocast():
            outputs = gated(images, p)
        loss = self._loss(outputs, images, labels)
        objective = loss
        if self.config.objective != "exact":
            ratio, two_sided = self.ranks.cost(p), self.config.objective == "two-sided"
            objective = loss * (ratio if two_sided else ratio.clamp_min(1)) ** self.config.beta
        (gradient,) = torch.autograd.grad(objective, [self.ranks.logits])
        self.ranks.logits.grad = self.accelerator.reduce(gradient, "mean")
        self.rank_optimizer.step()
        self.rank_optimizer.zero_grad()
        return loss.detach()

    # -- the run ---------------------------------------------------------------------------------------------------

    def go(self) -> None:
        """All batches that are left.

        Raises:
            TrainingError: the loss is not finite.
        """
        if self.step == 0:
            self._log()
        dtype = next(self.space.gated.model.parameters()).dtype
        while self.step < self.total:
            epoch, batch = divmod(self.step, len(self.batches))
            with closing(self.batches.epoch(epoch, batch)) as stream:  # type: ignore[type-var]
                for images, labels in stream:
                    device = self.accelerator.device
                    images, labels = images.to(device, dtype), None if labels is None else labels.to(device)
                    update = self._rank_step if self.step % 2 else self._weight_step
                    self._losses.append(update(images, labels))
                    self.step += 1
                    self._after_step()
                    if self.step == self.total:
                        break

    def _after_step(self) -> None:
        last = self.step == self.total
        if self.progress:
            self.progress("search", self.step, self.total)
        save = self.out is not None and (last or self.step % self.config.checkpoint_every == 0)
        if last or save or self.step % self.config.log_every == 0:
            self._log()
        if save:
            self._save()

    def _log(self) -> None:
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0)
        if len(losses):  # over all processes, which then agree on whether to stop
            losses = self.accelerator.reduce(losses, "mean")
        if not torch.isfinite(losses).all():
            bad = self.step - len(losses) + int((~torch.isfinite(losses)).int().argmax()) + 1
            kept = f"the checkpoint of batch {self.saved_step} is kept" if self.saved_step else "nothing is kept"
            raise TrainingError(
                f"the loss is NaN or infinite since batch {bad} of the search; {kept}. Try a lower "
                "weight_lr, or precision no"
            )
        with torch.no_grad():
            p = self.probabilities(noisy=False)
            widths, cost = self.ranks.expected_widths(p), self.ranks.cost(p)
        values = {
            "loss": float(losses.mean()) if len(losses) else None,
            "cost": float(cost),
            "temperature": self.temperature(),
            "widths": dict(zip(self.names(), widths.tolist(), strict=True)),
            "probabilities": [
                [round(x, 4) for x in row[: len(choices)]]
                for row, (_, _, choices) in zip(p.tolist(), self.space.rows, strict=True)
            ],
        }
        self.log.write(self.step, self.step / len(self.batches), values)
        self._losses = []

    def names(self) -> list[str]:
        return [f"{site.name}.{part}" for site, part, _ in self.space.rows]

    def plan(self) -> Plan:
        """What the distribution has come to."""
        with torch.no_grad():
            p = self.probabilities(noisy=False)
            widths, cost = self.ranks.expected_widths(p), float(self.ranks.cost(p))
        return self.space.as_plan(self.space.solve(widths.tolist()), expected_cost=cost)

    def _save(self) -> None:
        assert self.out is not None
        out = self.out
        plain = {"config": self.config.to_dict(), "run": self.fixed}
        saved = self.snapshot.take(self.step, plain)
        ranks = {"logits": self.ranks.logits.detach().cpu().clone()}
        ranks |= {
            name: value.detach().cpu().clone() for name, value in self.rank_optimizer.state[self.ranks.logits].items()
        }
        saved = Saved(saved.step, {**saved.tensors, "ranks": ranks}, saved.plain)
        self.log.sync()
        on_main(self.accelerator, lambda: str(state.write(out, saved, self.config.keep_checkpoints)))
        self.saved_step = self.step

    def restore(self, saved: Saved) -> None:
        """Continue from a checkpoint, whose tensors only the main process needs to hold."""
        self.snapshot.restore(saved)
        ranks: dict[str, Tensor] = agree(self.accelerator, dict(saved.tensors.get("ranks", {})))
        logits = self.ranks.logits
        with torch.no_grad():
            logits.copy_(ranks.pop("logits"))
        if set(ranks) != MOMENTS:
            raise ValueError("the optimizer of its ranks has other moments")
        check_moments("the ranks", logits, ranks)
        if not logits.isfinite().all():
            raise ValueError("its ranks are not finite")
        # AdamW's counter stays on the CPU, as it keeps it.
        self.rank_optimizer.state[logits] = {
            name: value if name == "step" else value.to(logits) for name, value in ranks.items()
        }
        self.step = self.saved_step = saved.step
