"""Learned tokens: new words of the prompt with vectors of their own, beside the frozen embedding table.

A token is a whole word, in exactly this spelling. One of several vectors is written once in the prompt; diffusers
replaces ``V*`` by ``V* V*_1 ...`` where the tokenizer knows these names, as for textual inversion.

The word lives where it is read and looked up: in the tokenizer (:mod:`.words`) and in the text encoder, so that every
pipeline that shares them knows it. Neither the tokenizer's vocabulary nor the table is touched.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from ...errors import ModelError
from ...hosts import clip, placement
from ...nn.carries import carry, drop
from .components import text_encoders, tokenizer_name
from .words import learn, learned, unlearn

_ids = itertools.count(clip.FIRST_ID)


class Token:
    """The vectors of one new word.

    Attributes:
        text: as written in a prompt.
        vectors: text encoder -> (n, D) parameter.
        ids: n numbers that stand for it between tokenizer and text encoder, in this process.
        homes: the (tokenizer, text encoder) that know it.
    """

    def __init__(self, text: str, vectors: dict[str, nn.Parameter]) -> None:
        self.text = text
        self.vectors = vectors
        self.ids = [next(_ids) for _ in range(self.count)]
        self.homes: list[tuple[Any, nn.Module]] = []

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))

    @property
    def words(self) -> list[str]:
        """The tokens as the tokenizer has them: ``V*``, ``V*_1``, ..."""
        return [self.text, *(f"{self.text}_{i}" for i in range(1, self.count))]


def new_token(
    pipe: Any, text: str, count: int, init: str | None, generator: torch.Generator, dtype: torch.dtype | None = None
) -> Token:
    """A token whose vectors start at those of the words ``init``, or at random ones of the table's size.

    Raises:
        ModelError: the pipeline has no CLIP text encoder, knows the token already, or the words are too many.
    """
    encoders = text_encoders(pipe)
    if not encoders:
        raise ModelError("a learned token needs a CLIP text encoder, and this pipeline has none")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ModelError(f"a token needs at least 1 vector, not {count!r}")
    check_new(pipe, text, count)
    vectors = {}
    for name, encoder in encoders.items():
        tokenizer = getattr(pipe, tokenizer_name(name))
        embedding = embedding_of(encoder)
        table = placement.values(encoder, embedding, "weight").detach()
        if init is None:
            spread, mean = table.float().std(0), table.float().mean(0)
            rows = mean.cpu() + spread.cpu() * torch.randn(count, table.shape[1], generator=generator)
        else:
            ids = tokenizer(init, add_special_tokens=False).input_ids
            if not 1 <= len(ids) <= count:
                raise ModelError(
                    f"{init!r} is {len(ids)} tokens and {text!r} has {count} vectors; start from fewer words, or give "
                    "the token more vectors"
                )
            if max(ids) >= len(table):
                raise ModelError(f"{init!r} is a learned token itself; start {text!r} from words of the tokenizer")
            rows = table[[ids[min(i, len(ids) - 1)] for i in range(count)]].float()
        vectors[name] = nn.Parameter(rows.to(placement.place(embedding), dtype or placement.precision(embedding)))
    return Token(text, vectors)


def is_word(text: Any) -> bool:
    return isinstance(text, str) and text != "" and text == "".join(text.split())


def check_new(pipe: Any, text: str, count: int) -> None:
    """Whether ``text`` can become a token of ``count`` vectors without changing what any other prompt means.

    Raises:
        ModelError: it is no word; a tokenizer knows it; it and another new token contain each other; or this pipeline
            cannot spread a token over several vectors.
    """
    if not is_word(text):
        raise ModelError(f"a token must be one word without spaces, not {text!r}, e.g. 'V*'")
    if count > 1 and not hasattr(pipe, "maybe_convert_prompt"):
        raise ModelError(f"{type(pipe).__name__} reads one vector per word; give the token {text!r} 1 vector")
    for encoder in text_encoders(pipe):
        tokenizer = getattr(pipe, tokenizer_name(encoder), None)
        if tokenizer is None:
            raise ModelError(
                f"the token {text!r} needs the {tokenizer_name(encoder)} of this pipeline beside its {encoder}"
            )
        if text in learned(tokenizer):
            raise ModelError(
                f"an adapter on this pipeline, or on one that shares its tokenizer, has learned {text!r} already; give "
                f"this one another word, e.g. token={_another(text)!r} (FILE,token={_another(text)} on the command "
                "line), or take the other off"
            )
        vocabulary = tokenizer.get_vocab()
        if {text, f"{text}</w>", text.lower(), f"{text.lower()}</w>"} & vocabulary.keys():
            raise ModelError(f"the tokenizer knows {text!r} already; choose another word for the new token, e.g. 'V*'")
        new = tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
        alike = [other for other in new if text in other or other in text]
        if alike:
            raise ModelError(f"one of the tokens {text!r} and {alike[0]!r} contains the other; choose another word")


def _another(text: str) -> str:
    """``V*`` -> ``V2*``, ``<dog>`` -> ``<dog2>``: neither contains the other."""
    return f"{text[:-1]}2{text[-1]}" if text[-1] in "*>" else f"{text[0]}2{text[1:]}"


def install(pipe: Any, token: Token) -> None:
    """Make a token known to the tokenizers and text encoders of the pipeline."""
    for name, encoder in text_encoders(pipe).items():
        tokenizer = getattr(pipe, tokenizer_name(name))
        learn(tokenizer, token.words, token.ids)
        rows = clip.NewRows(token.ids, token.vectors[name])
        carry(clip.embeddings(encoder), clip.ExtraRows, str(token.ids[0]), rows)
        token.homes.append((tokenizer, encoder))
        _set_pooling(encoder, tokenizer.eos_token_id)


def uninstall(token: Token) -> None:
    """Take a token out of where it was installed, and nothing else."""
    for tokenizer, encoder in token.homes:
        unlearn(tokenizer, token.words)
        rows = clip.embeddings(encoder)
        drop(rows, clip.ExtraRows, str(token.ids[0]))
        if not isinstance(rows, clip.ExtraRows):
            _set_pooling(encoder, None)
    token.homes.clear()


def embedding_of(encoder: Any) -> nn.Embedding:
    table = encoder.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    return table


def _set_pooling(encoder: Any, eos: int | None) -> None:
    """Older CLIP configurations pool at the largest token id, which a new token would be."""
    model = getattr(encoder, "text_model", encoder)
    if eos is not None and model.eos_token_id == 2:
        model._comcat_eos_token_id = model.eos_token_id
        model.eos_token_id = eos
    elif eos is None and hasattr(model, "_comcat_eos_token_id"):
        model.eos_token_id = model._comcat_eos_token_id
        del model._comcat_eos_token_id
