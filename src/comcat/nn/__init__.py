"""The modules that a compressed or customized model holds, and how they get in and out."""

from .linear import LowRankLinear
from .low_rank_attention import LowRankAttention
from .projections import HeadOutput, HeadProjection

#: What a compressed model has in the place of larger layers.
SMALL = (LowRankAttention, LowRankLinear, HeadProjection, HeadOutput)
