"""Images that a calibration keeps: a random sample to probe with, and some that its statistics have not seen."""

from __future__ import annotations

import torch

from ..models.batches import Batch


class _SingleImages:
    """Single images of batches; of inputs of varying length those alike the first, which can be joined."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.items: list[Batch] = []
        self.seen = 0

    def _fits(self, batch: Batch) -> bool:
        return batch.rows is not None and (not self.items or self.items[0].signature == batch.signature)

    def joined(self) -> Batch | None:
        """One batch of all that was kept, on the CPU."""
        return Batch.joined(self.items) if self.items else None


class Reservoir(_SingleImages):
    """A uniform random sample of bounded size from a stream of unknown length (algorithm R)."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, batch: Batch) -> None:
        fits = self._fits(batch)
        for place in range(len(batch)):
            self.seen += 1
            if len(self.items) < self.size:
                chosen = len(self.items)
            else:
                chosen = int(torch.randint(self.seen, (), generator=self.generator))
            if fits and chosen < self.size:
                self.items[chosen : chosen + 1] = [batch.kept([place]).to("cpu")]


class HeldOut(_SingleImages):
    """Images that are kept from the statistics: of those after the first 256 every fourth, up to ``size``."""

    FIRST, EVERY = 256, 4

    def take(self, batch: Batch) -> Batch | None:
        """Keep some images of a batch; what is left of it is for the statistics, None where nothing is."""
        count, seen = len(batch), self.seen
        self.seen += count
        if seen + count <= self.FIRST or not self._fits(batch):
            return batch
        places = [
            place for place in range(max(self.FIRST - seen, 0), count) if (seen + place - self.FIRST) % self.EVERY == 0
        ][: self.size - len(self.items)]
        if not places:
            return batch
        self.items += [batch.kept([place]).to("cpu") for place in places]
        rest = [place for place in range(count) if place not in places]
        return batch.kept(rest) if rest else None
