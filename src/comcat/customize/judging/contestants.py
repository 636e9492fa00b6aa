"""Who is judged: adapters of comcat and LoRAs in files, or anything that can be put on a pipeline and taken off."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, DataError, ModelError
from ...storage.reader import read_tensors
from ..adapter.attached import check_scale, remove_adapter
from ..files.adapter_file import load_adapter, read_adapter
from ..files.header import KEY
from ..pipelines import quiet_loading

_ON = "judged"  # the name under which an adapter is on the pipeline
#: Entries of the metadata of kohya's trainer: seconds since 1970.
_STARTED, _FINISHED = "ss_training_started_at", "ss_training_finished_at"


@dataclass(frozen=True)
class Contestant:
    """What is compared with the base, and how it is put on a pipeline.

    Attributes:
        name: in tables, and of the folder of its pictures.
        put_on: given a pipeline, a context inside which it draws with the adapter.
        identity: plain data that tells it from every other one, so that kept pictures are known to be its own.
        word: that it has learned, if it has; caption: of its photos, where it is known.
        bytes: of its file; seconds: that its training took, where it is known.
    """

    name: str
    put_on: Callable[[Any], AbstractContextManager[None]]
    identity: Mapping[str, Any]
    word: str | None = None
    caption: str | None = None
    bytes: int | None = None
    seconds: float | None = None

    @classmethod
    def read(
        cls, path: str | Path, scale: float | None = None, token: str | None = None, name: str | None = None
    ) -> Contestant:
        """An adapter of comcat, or a LoRA that diffusers reads.

        Args:
            scale: strength; that of the file, or 1, by default.
            token: another word for the learned one.
            name: the file's by default, with the strength where it is given.

        Raises:
            CheckpointError: the file is neither, or damaged. ModelError: a strength that is none.
        """
        path = Path(path)
        if scale is not None:
            check_scale(scale)
        name = name or (path.stem if scale is None else f"{path.stem}:{scale:g}")
        metadata, tensors = read_tensors(path)
        identity = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16], "scale": scale, "token": token}
        size = path.stat().st_size
        if KEY not in metadata and any("lora" in key for key in tensors):
            if token is not None:
                raise ModelError(f"'{path}' is a LoRA, which has no learned word that could be called {token!r}")
            put_on = _LoraFile(path, 1.0 if scale is None else scale)
            return cls(name, put_on, identity, bytes=size, seconds=_kohya_seconds(metadata))
        header, _ = read_adapter(path)
        word = token or (header.token["text"] if header.token else None)
        seconds = (header.training or {}).get("seconds")
        caption = header.prompt
        if caption is not None and token and header.token:
            caption = caption.replace(header.token["text"], token)
        return cls(
            name,
            _AdapterFile(path, scale, token),
            identity,
            word,
            caption,
            size,
            seconds if isinstance(seconds, (int, float)) else None,
        )

    def behind_word(self) -> str | None:
        """What ends the caption behind the learned word, one or two words: "dog" of "a photo of V* dog"."""
        if self.word is None or self.caption is None:
            return None
        found = re.search(rf"(?<!\w){re.escape(self.word)} ([\w-]+(?: [\w-]+)?)[.!]?$", self.caption.strip())
        return found[1] if found else None

    def subject(self, class_word: str, given: str | None) -> str:
        """What stands for the subject in its prompts: the learned word, with the class behind it as in its caption.

        Args:
            given: for an adapter that has learned no word, e.g. "sks dog".

        Raises:
            DataError: nothing says how it calls the subject.
        """
        if self.word is None:
            if given is None:
                raise DataError(
                    f"'{self.name}' has learned no word of its own, so nothing says what it calls the subject; give "
                    "--subject with the words that it was taught, e.g. 'sks dog'"
                )
            return given
        alone = self.caption is not None and f"{self.word} {class_word}" not in self.caption
        return self.word if alone else f"{self.word} {class_word}"


@dataclass(frozen=True)
class _AdapterFile:
    path: Path
    scale: float | None
    token: str | None

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        load_adapter(pipe, self.path, scale=self.scale, name=_ON, token=self.token)
        try:
            yield
        finally:
            remove_adapter(pipe, _ON)


@dataclass(frozen=True)
class _LoraFile:
    path: Path
    scale: float

    @contextmanager
    def __call__(self, pipe: Any) -> Iterator[None]:
        if not hasattr(pipe, "load_lora_weights"):
            raise ModelError(f"{type(pipe).__name__} takes no LoRAs; judge '{self.path}' on a pipeline that does")
        try:
            with quiet_loading():
                pipe.load_lora_weights(
                    str(self.path.parent),
                    weight_name=self.path.name,
                    adapter_name=_ON,
                    local_files_only=True,
                    use_safetensors=True,
                )
                pipe.set_adapters([_ON], [self.scale])
        except Exception as error:  # diffusers and peft raise whatever is missing or does not fit
            pipe.unload_lora_weights()
            cause = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the LoRA '{self.path}' does not go onto {type(pipe).__name__}: {cause}. Give one that was made for "
                "this model (LoRAs need the package peft)"
            ) from error
        try:
            yield
        finally:
            pipe.unload_lora_weights()


def _kohya_seconds(metadata: Mapping[str, str]) -> float | None:
    try:
        return float(metadata[_FINISHED]) - float(metadata[_STARTED])
    except (KeyError, ValueError):
        return None


@dataclass(frozen=True)
class Words:
    """What the contestants call the subject.

    Attributes:
        class_word: what it is one of; subjects: by the name of the contestant.
        known: the words that mean the subject and nothing else, such as V*.
    """

    class_word: str
    subjects: Mapping[str, str]
    known: tuple[str, ...]

    @classmethod
    def of(cls, contestants: Sequence[Contestant], class_word: str | None, subject: str | None) -> Words:
        """
        Args:
            class_word: read off the captions where it is None.

        Raises:
            DataError: they do not say, or differ.
        """
        if class_word is None:
            found = {one.behind_word() for one in contestants} - {None}
            if len(found) != 1:
                what = f"say different things ({', '.join(sorted(map(str, found)))})" if found else "do not say"
                raise DataError(
                    f"the adapters' captions {what} what the subject is one of; give --class-word, e.g. dog"
                )
            class_word = str(found.pop())
        subjects = {one.name: one.subject(class_word, subject) for one in contestants}
        known = (one.word or subjects[one.name] for one in contestants)
        return cls(class_word, subjects, tuple(dict.fromkeys(known)))
