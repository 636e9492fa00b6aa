"""The alternation of a rank search: a batch for the weights of the mixture, a batch for the logits of its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..evaluation.outputs import Forward, Outputs
from ..planning.plan import Plan
from ..training.engine import Run, Task, not_finite
from ..training.loaders import Batches
from ..training.losses import Loss
from ..training.snapshot import Snapshot, Trained, as_module
from ..training.state import Saved
from .search_config import SearchConfig
from .space import SearchSpace

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG_NAME = "search.jsonl"


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Alternation(Task):
    """The task of a search.

    A step is one batch; even ones train the weights, odd ones the ranks.

    Args:
        loss: of the kind of outputs; dense: the model whose features are to be kept, where these are what is learned.
    """

    stage: ClassVar = "search"
    log_name: ClassVar = LOG_NAME

    def __init__(
        self,
        space: SearchSpace,
        batches: Batches,
        config: SearchConfig,
        accelerator: Accelerator,
        loss: Loss,
        dense: nn.Module | None,
        forward: Forward | None = None,
    ) -> None:
        self.loss, self.dense, self.forward = loss, dense, forward
        self.space, self.batches, self.config, self.accelerator = space, batches, config, accelerator
        self.ranks = space.ranks.to(accelerator.device)
        weights = [p for p in space.gated.parameters() if p.requires_grad]
        weight_optimizer = torch.optim.AdamW(weights, lr=config.weight_lr, weight_decay=0.0)
        self.gated, self.weight_optimizer = accelerator.prepare(space.gated, weight_optimizer)
        self.rank_optimizer = torch.optim.AdamW(
            self.ranks.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.5, 0.999)
        )
        logits = as_module({"logits": self.ranks.logits})
        self.snapshot = Snapshot(
            accelerator,
            Trained(accelerator, self.gated, self.weight_optimizer),
            Trained(accelerator, logits, self.rank_optimizer, prefix="ranks-"),
        )
        self.total = max(2, int(config.epochs * len(batches)))
        if config.max_steps is not None:
            self.total = min(self.total, config.max_steps)
        self.per_epoch = len(batches)
        self._losses: list[Tensor] = []
        self._mean: Tensor | None = None

    # -- one batch -------------------------------------------------------------------------------------------------

    def temperature(self, step: int) -> float:
        """Falls from the first value to the last in equal ratios."""
        first, last = self.config.temperature
        return first * (last / first) ** min(1.0, step / max(1, self.total - 1))

    def probabilities(self, step: int, noisy: bool = True) -> Tensor:
        """A Gumbel-softmax sample of a step, or the distribution itself."""
        noise = None
        if noisy:
            seed = self.config.seed * 1_000_003 + step
            noise = self.ranks.gumbel(torch.Generator().manual_seed(seed))
        if self.config.objective == "exact":
            return self.ranks.on_budget(self.temperature(step), noise)
        return self.ranks.probabilities(self.temperature(step), noise)

    def _loss(self, outputs: Any, images: Tensor, labels: Tensor | None) -> Tensor:
        """The distance from the labels, or from the dense model's features."""
        if labels is not None:
            return self.loss.labelled(_full(outputs), labels)
        assert self.dense is not None
        with torch.no_grad():
            dense = Outputs(self.dense, self.loss.kind, forward=self.forward).run(images)
        return self.loss.soft([_full(one) for one in outputs], dense)

    def _weight_step(self, index: int, images: Tensor, labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            p = self.probabilities(index)
        loss = self._loss(self.gated(images, p), images, labels)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.gated.parameters(), 1.0)
        self.weight_optimizer.step()
        self.weight_optimizer.zero_grad()
        return loss.detach()

    def _rank_step(self, index: int, images: Tensor, labels: Tensor | None) -> Tensor:
        p = self.probabilities(index)
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

    def begin(self, run: Run) -> None:
        if run.step == 0:
            run.write_line()

    def steps(self, done: int) -> Iterator[None]:
        device, dtype = self.accelerator.device, next(self.space.gated.model.parameters()).dtype
        with closing(self.batches.onward(*divmod(done, len(self.batches)))) as stream:  # type: ignore[type-var]
            for index in range(done, self.total):
                images, labels = next(stream)
                images, labels = images.to(device, dtype), None if labels is None else labels.to(device)
                update = self._rank_step if index % 2 else self._weight_step
                self._losses.append(update(index, images, labels))
                yield

    def logs(self, step: int, saves: bool) -> bool:
        return saves or super().logs(step, saves)  # a checkpoint does not hold the losses since the last line

    def check(self, step: int, due: bool, kept: int | None) -> None:
        if not due:
            return
        # Over all processes, which then agree on whether to stop.
        self._mean = self.accelerator.reduce(torch.stack(self._losses), "mean")
        self._losses = []
        finite = torch.isfinite(self._mean)
        if not finite.all():
            bad = step - len(finite) + int((~finite).int().argmax()) + 1
            found = f"; the checkpoint of batch {kept} is kept" if kept else "; nothing is kept"
            raise not_finite(
                "the loss", f"since batch {bad} of the search", found, "a lower weight_lr, or precision no"
            )

    def line(self, step: int) -> dict[str, Any]:
        with torch.no_grad():
            p = self.probabilities(step, noisy=False)
            widths, cost = self.ranks.expected_widths(p), self.ranks.cost(p)
        return {
            "loss": float(self._mean.mean()) if self._mean is not None else None,
            "cost": float(cost),
            "temperature": self.temperature(step),
            "widths": dict(zip(self.names(), widths.tolist(), strict=True)),
            "probabilities": [
                [round(x, 4) for x in row[: len(choices)]]
                for row, (_, _, choices) in zip(p.tolist(), self.space.rows, strict=True)
            ],
        }

    def names(self) -> list[str]:
        return [f"{layer.name}.{part}" for layer, part, _ in self.space.rows]

    def plan(self) -> Plan:
        """What the distribution has come to."""
        with torch.no_grad():
            p = self.probabilities(self.total, noisy=False)
            widths, cost = self.ranks.expected_widths(p), float(self.ranks.cost(p))
        return self.space.as_plan(self.space.solve(widths.tolist()), expected_cost=cost)

    def take(self, step: int, plain: dict[str, Any]) -> Saved:
        return self.snapshot.take(step, plain)

    def restore(self, saved: Saved) -> None:
        self.snapshot.restore(saved)
