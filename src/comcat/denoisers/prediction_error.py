"""How far a compressed denoiser's predictions are from the dense one's."""

from __future__ import annotations

import torch
from torch import nn

from ..evaluation.outputs import Outputs, divergence
from ..models.batches import Batch
from ..models.modes import evaluating


@torch.no_grad()
def prediction_error(dense: nn.Module, small: nn.Module, examples: Batch, batch_size: int = 32) -> float:
    """Mean squared difference of the predictions over the variance of the dense ones: 0 is equal, 1 is no use.

    Args:
        examples: recorded, such as those that a calibration has kept from its statistics (``calibration.unseen``).
    """
    found = []
    for model in (dense, small):
        parameter, outputs = next(model.parameters()), Outputs(model, "features")
        with evaluating(model):
            parts = [
                outputs(batch.run(model), len(batch))
                for batch in examples.to(parameter.device, parameter.dtype).split(batch_size)
            ]
        found.append([torch.cat([one.cpu() for one in tensors]) for tensors in zip(*parts, strict=True)])
    return divergence("features", *found)
