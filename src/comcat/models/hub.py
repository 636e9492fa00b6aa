"""The Hub: files of a repository, from the network or its cache, and its client's errors in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import ComcatError, ModelError

#: What a repository of the Hub is written with where a path could be meant.
PREFIX = "hf-hub:"
_TOKEN = re.compile(r"hf_[A-Za-z0-9_-]{6,}")


def fetch(name: str, files: Sequence[str], revision: str | None = None, error: type[ComcatError] = ModelError) -> Path:
    """The folder that holds these files, names or patterns, of the repository ``ORG/NAME`` or ``ORG/NAME@REVISION``.

    Files that the repository lacks are left out.

    Raises:
        error: there is no such repository or revision, it may not be read, or it is neither reachable nor in the cache.
    """
    from huggingface_hub import snapshot_download

    repository, _, written = name.partition("@")
    wanted = revision or written or None
    with explained(f"cannot load '{repository}' from the Hub", wanted, error):
        return Path(snapshot_download(repository, revision=wanted, allow_patterns=list(files)))


@contextmanager
def explained(what: str, revision: str | None, error: type[ComcatError]) -> Iterator[None]:
    """Errors of the Hub's client inside become one line; no token is in it, nor in what Python shows above it.

    Raises:
        error: of anything that goes wrong inside.
    """
    try:
        yield
    except ComcatError:
        raise
    except Exception as cause:  # clients raise their transport's own exceptions, which differ between versions
        # Not shown with ours: it may quote what the server said, and that what it was sent.
        raise error(f"{what}: {_reason(cause, revision)}") from None


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "log in with a token that may (hf auth login, or HF_TOKEN)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return f"{_first_line(error)}; a repository is written ORG/NAME"
    if isinstance(error, GatedRepoError):
        return f"it is open to those alone who asked for it: ask on its page, then {login}"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision '{revision}'; name a branch, a tag or a commit"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private and you may not see it: check the name, or {login}"
    if status in (401, 403):
        return f"no permission ({status}): {login}"
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the cache does not hold it: unset it, or give the directory of a download"
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__ or error
        return f"it is not in the cache, and the Hub does not answer ({_first_line(cause)}): check the network"
    said = without_token(" ".join(str(getattr(error, "server_message", None) or "").split()))
    return f"{type(error).__name__}: {_first_line(error)}{f' ({said})' if said else ''}; check the network and the name"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return without_token(lines[0]) if lines else type(error).__name__


def without_token(text: str) -> str:
    """``text`` without anything that lets one in."""
    from huggingface_hub import get_token

    token = get_token()
    return _TOKEN.sub("hf_***", text.replace(token, "hf_***") if token else text)
