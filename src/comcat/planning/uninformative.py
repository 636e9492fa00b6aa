"""Measures that tell nothing: gradients that are zero, divergences that no cut changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from ..calibration.statistics import Calibration
from ..errors import PlanError
from ..layers.base import Layer
from ..wording import some

#: A divergence up to this is rounding.
_NOTHING = 1e-12


def refuse_zero_gradients(calibration: Calibration, layers: Sequence[Layer]) -> None:
    """Warn of layers that no gradient of the calibration has reached.

    Raises:
        PlanError: these are all, or all but the classifier.
    """
    zero, known = [], []
    for layer in layers:
        moments = calibration.moments[layer.name]
        gradients = [name for name in layer.gradient_shapes() if name in moments]
        if gradients:
            known.append(layer)
            if not any(bool(moments[name].any()) for name in gradients):
                zero.append(layer)
    inner = [layer for layer in known if layer.in_block] or known
    if known and all(layer in zero for layer in inner):
        which = "every gradient of the calibration" + ("" if len(zero) == len(known) else ", but the classifier's,")
        raise PlanError(
            f"{which} is zero, so no layer can be told from another: the outputs, taken for "
            f"{calibration.outputs or 'classes'}, do not depend on the images. Calibrate again with the "
            "right outputs= and a trained classifier, or choose the method 'uniform'"
        )
    if zero:
        names = some(f"'{layer.name}'" for layer in zero)
        warnings.warn(
            f"every gradient of {len(zero)} of {len(known)} layers is zero ({names}): the outputs do not depend "
            "on them, and they are cut first. If they should, calibrate again with the right outputs=",
            stacklevel=5,
        )


def refuse_flat(measured: Sequence[float], kind: str) -> None:
    """Raise PlanError if measured divergences of outputs of a kind are not finite, or all zero."""
    bad = [value for value in measured if not math.isfinite(value)]
    if not measured or (not bad and max(measured) > _NOTHING):
        return
    what = "not finite" if bad else "zero at every cut"
    raise PlanError(
        f"the measured divergence is {what}, so no layer can be told from another: outputs that are {kind} do not "
        "change with the weights. Calibrate again with the right outputs=, or choose the method 'uniform'"
    )
