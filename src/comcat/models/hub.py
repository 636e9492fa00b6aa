"""Files of a Hub repository, from the network or its cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ModelError


def fetch(name: str, files: Sequence[str]) -> Path:
    """The folder that holds these files, names or patterns, of the repository ``ORG/NAME`` or ``ORG/NAME@REVISION``.

    Files that the repository lacks are left out.

    Raises:
        ModelError: there is no such repository, or it is neither reachable nor in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except Exception as error:  # clients raise their transport's own exceptions, which differ between versions
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ModelError(
            f"cannot load '{name}' from the Hub: {type(error).__name__}: {first}; there is no directory of that name "
            "either. Check the name and the network (HF_HUB_OFFLINE allows the cache alone), or give the directory of "
            "a download; a model of timm's registry is written without a slash"
        ) from error
