"""Learned words in ComfyUI's prompts: a tokenizer that puts an adapter's vectors where its word stands."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from comcat.errors import ModelError

from .layers import encoder_name


class KnowsWords:
    """Mixin for ``SDTokenizer``: its own embeddings first, under names that no file has."""

    words: dict[str, Tensor]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> Any:
        for i, word in enumerate(self.words):
            # As an embedding between spaces, which the tokenizer takes for nothing.
            text = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", f" {self.embedding_identifier}{_name(i)} ", text)  # type: ignore[attr-defined]
        return super().tokenize_with_weights(text, return_word_ids, **kwargs)  # type: ignore[misc]

    def _try_get_embedding(self, embedding_name: str) -> Any:
        first, _, rest = embedding_name.partition(" ")
        for i, vectors in enumerate(self.words.values()):
            if first == _name(i):
                return vectors, rest
        return super()._try_get_embedding(embedding_name)  # type: ignore[misc]


def _name(i: int) -> str:
    return f"comcat-learned-{i}"


def learn(clip: Any, word: str, vectors: Mapping[str, Tensor]) -> None:
    """Let a CLIP, a clone of its own, know a word: component -> (n, D).

    Raises:
        ModelError: another adapter has taught it this word, or the vectors are of another encoder.
    """
    clip.tokenizer = copy.copy(clip.tokenizer)
    for component, rows in vectors.items():
        encoder = encoder_name(clip, component)
        own = copy.copy(getattr(clip.tokenizer, encoder))
        if not isinstance(own, KnowsWords):
            own.__class__ = type(type(own).__name__, (KnowsWords, type(own)), {})
            own.words = {}
        if word in own.words:
            raise ModelError(f"two adapters have learned the word {word!r}; give one of them another word")
        if rows.shape[1] != own.embedding_size:
            raise ModelError(
                f"the vectors of {word!r} are of width {rows.shape[1]}, and {encoder} has {own.embedding_size}: the "
                "adapter was made for another base"
            )
        own.words = {**own.words, word: rows}
        if own.embedding_directory is None:  # else it would not look for embeddings at all
            own.embedding_directory = []
        setattr(clip.tokenizer, encoder, own)
