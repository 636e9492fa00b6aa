"""Words that a tokenizer knows beside its own vocabulary, and which parts of a prompt are such a word.

The tokenizer object stays what it is, with its vocabulary, its length and its files: whoever adds or removes tokens of
their own (a textual inversion) finds it untouched, before and after. It only reads prompts through a copy of itself
that has the new words, whose ids come out as numbers far above every vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import AddedToken

from ...nn.derived import derived, original_class

_WORDS = "_comcat_words"  # word -> id
_READER = "_comcat_reader"  # (what it was made from, the copy)

#: A word that stands for something new: V*, <dog>; no 5* and no **bold**.
_PLACEHOLDER = re.compile(r"(?<![\w*<-])(?:[^\W\d][\w-]*\*|<[\w-]+>)(?![\w*])")


def placeholders(prompt: str) -> list[str]:
    """The words of a prompt that stand for something new, in order: ``V*``, ``<my-dog>``."""
    return list(dict.fromkeys(_PLACEHOLDER.findall(prompt)))


def has_token(prompt: str, token: str) -> bool:
    """Whether the tokenizer will see the token: as a whole word, in this spelling, whatever punctuation is beside."""
    return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", prompt) is not None


class Learned:
    """Mixin for a tokenizer that knows learned words."""

    def _reader(self) -> Any:
        """A copy of the tokenizer as it is now, with the learned words."""
        own = cast(Any, self)
        added = super().added_tokens_decoder  # type: ignore[misc]
        words = own.__dict__[_WORDS]
        state = (id(own.__dict__.get("_tokenizer")), [(i, str(t)) for i, t in added.items()], list(words))
        made, reader = own.__dict__.get(_READER, (None, None))
        if made != state:
            reader = _original(self)
            reader.__dict__.update(copy.deepcopy({k: v for k, v in reader.__dict__.items() if k in _DEEP}))
            wrap = getattr(reader, "_wrap_decode_method_backend_tokenizer", None)
            if wrap is not None:  # it is lost in copies
                wrap()
            # Neither inside other words nor in other spellings, which would change what other prompts mean.
            reader.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
            own.__dict__[_READER] = (state, reader)
        for key, value in own.__dict__.items():  # e.g. model_max_length, set since
            if key not in (*_DEEP, _WORDS, _READER):
                reader.__dict__[key] = value
        return reader

    def _ids(self, reader: Any) -> dict[int, int]:
        """The reader's ids of the words -> those that come out."""
        return {reader.convert_tokens_to_ids(word): i for word, i in cast(Any, self).__dict__[_WORDS].items()}

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        return self._read("_encode_plus", *args, **kwargs)

    def _batch_encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        return self._read("_batch_encode_plus", *args, **kwargs)

    def _read(self, method: str, *args: Any, **kwargs: Any) -> Any:
        reader = self._reader()
        encoding = getattr(reader, method)(*args, **kwargs)
        if "input_ids" in encoding:
            encoding["input_ids"] = _replaced(encoding["input_ids"], self._ids(reader))
        return encoding

    def tokenize(self, text: str, *args: Any, **kwargs: Any) -> Any:
        return self._reader().tokenize(text, *args, **kwargs)

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        reader = self._reader()
        back = {new: old for old, new in self._ids(reader).items()}
        if isinstance(token_ids, Mapping):
            token_ids = token_ids["input_ids"]
        return reader._decode(_replaced(token_ids, back), *args, **kwargs)

    def convert_ids_to_tokens(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
        reader = self._reader()
        back = {new: old for old, new in self._ids(reader).items()}
        return reader.convert_ids_to_tokens(_replaced(ids, back), *args, **kwargs)

    def _convert_token_to_id_with_added_voc(self, token: str) -> Any:
        found = cast(Any, self).__dict__[_WORDS].get(token)
        if found is not None:
            return found
        return super()._convert_token_to_id_with_added_voc(token)  # type: ignore[misc]

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        return {**super().added_tokens_encoder, **cast(Any, self).__dict__[_WORDS]}  # type: ignore[misc]

    def get_added_vocab(self) -> dict[str, int]:
        return {**super().get_added_vocab(), **cast(Any, self).__dict__[_WORDS]}  # type: ignore[misc]

    def get_vocab(self) -> dict[str, int]:
        return {**super().get_vocab(), **cast(Any, self).__dict__[_WORDS]}  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return _original(self).save_pretrained(*args, **kwargs)  # what is saved is the base model


#: What a reader must not share with its tokenizer: the backend, or, of a slow tokenizer, the added tokens.
_DEEP = ("_tokenizer", "_added_tokens_decoder", "_added_tokens_encoder", "tokens_trie")


def learn(tokenizer: Any, words: Sequence[str], ids: Sequence[int]) -> None:
    """Let a tokenizer know these words, by these ids."""
    own = tokenizer.__dict__
    own[_WORDS] = {**own.get(_WORDS, {}), **dict(zip(words, ids, strict=True))}
    if not isinstance(tokenizer, Learned):
        tokenizer.__class__ = derived(type(tokenizer), Learned)


def unlearn(tokenizer: Any, words: Sequence[str]) -> None:
    """Forget these words; after the last one the tokenizer is what it was."""
    own = tokenizer.__dict__
    own[_WORDS] = {word: i for word, i in own[_WORDS].items() if word not in words}
    if not own[_WORDS]:
        tokenizer.__class__ = original_class(tokenizer, Learned)
        del own[_WORDS]
        own.pop(_READER, None)


def learned(tokenizer: Any) -> dict[str, int]:
    """Word -> id of what adapters have taught a tokenizer."""
    return dict(getattr(tokenizer, "__dict__", {}).get(_WORDS, {}))


def _original(tokenizer: Any) -> Any:
    """The tokenizer without learned words; it shares everything with it."""
    cls = original_class(tokenizer, Learned)
    base = cls.__new__(cls)
    base.__dict__.update({k: v for k, v in tokenizer.__dict__.items() if k not in (_WORDS, _READER)})
    return base


def _replaced(ids: Any, table: Mapping[int, int]) -> Any:
    """``ids``, a number, a tensor, an array or nested lists, with some numbers replaced."""
    if isinstance(ids, (list, tuple)):
        return [_replaced(one, table) for one in ids]
    if isinstance(ids, int):
        return table.get(ids, ids)
    ids = ids.clone() if hasattr(ids, "clone") else ids.copy()
    for old, new in table.items():
        ids[ids == old] = new
    return ids
