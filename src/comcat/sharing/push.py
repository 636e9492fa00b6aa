"""Putting a compressed model on the Hub: its tensors, its description, its plan, a picture and a card."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, ComcatError
from ..models.hub import explained
from ..models.opening import load_model
from ..report.facts import Facts, read_facts
from ..report.format import count, percent
from ..storage.checkpoint import TENSORS_NAME
from ..storage.owned import CONFIG_NAME
from .model_card import MARK, base_of, model_card

CARD = "README.md"
PICTURE = "report.png"
#: What belongs to the model. Reports, logs and checkpoints stay: they name paths of the machine they were made on.
_MODEL_FILES = (CONFIG_NAME, TENSORS_NAME, "plan.json", PICTURE)
_STOCK_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "plan.json",
    PICTURE,
)


@dataclass(frozen=True)
class Pushed:
    """What :func:`push` did.

    Attributes:
        url: of the repository, at the revision; commit: of what was pushed.
        files: that were pushed.
        notes: what deserves a word, such as a card of yours that was left as it is.
    """

    url: str
    commit: str
    files: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    """What would be pushed: files by their names in the repository, the card among them, and remarks."""

    facts: Facts
    files: dict[str, Path | bytes]
    notes: tuple[str, ...]

    @property
    def card(self) -> str:
        content = self.files[CARD]
        return content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8")


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Pushed:
    """Put a compressed model on the Hub, in one commit; :func:`comcat.load` reads it back as ``hf-hub:ORG/NAME``.

    A ``README.md`` in ``folder`` is the card; without one a card is written from what ``folder`` knows, and replaces
    none in the repository that somebody else wrote. The token is the one that ``hf auth login`` stored, or HF_TOKEN.

    Args:
        folder: a directory from :func:`comcat.save` or ``comcat compress``.
        repository: ``ORG/NAME``; it is made if it is not there.
        private: whether a new repository is private; by default as the organization has it.
        revision: branch to commit to, which is made if it is not there; ``main`` by default.
        message: of the commit.
        base_model: the Hub repository of the dense model, for the card; by default what ``folder`` knows of it.
        license: of the dense model's weights, for the card; by default what ``folder`` knows of it.

    Raises:
        CheckpointError: ``folder`` is no compressed model, or does not load; or the Hub cannot be reached or refuses.
    """
    package = prepare_package(folder, repository, base_model=base_model, license=license)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("HF_HUB_OFFLINE is set: nothing can be pushed; unset it")
    files, notes = dict(package.files), list(package.notes)
    with explained(f"cannot push to '{repository}'", revision, CheckpointError):
        api = HfApi(library_name="comcat")
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(repository, revision=revision))
        if CARD in there and not _is_own(folder) and MARK not in _card_there(api, repository, revision):
            del files[CARD]
            notes.append(f"the repository's {CARD} is not of comcat and is left as it is")
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        # Of an earlier model: what it had and this one has not.
        stale = there & ({CONFIG_NAME, TENSORS_NAME, "plan.json", PICTURE, "config.json"} - set(files))
        operations += [CommitOperationDelete(name) for name in sorted(stale)]
        done = api.create_commit(
            repository,
            operations,
            commit_message=message or _message(package.facts),
            revision=revision,
        )
    url = f"{done.repo_url}/tree/{revision}" if revision else str(done.repo_url)
    return Pushed(url, done.oid, tuple(files), tuple(notes))


def prepare_package(
    folder: str | Path, repository: str, *, base_model: str | None = None, license: str | None = None
) -> Package:
    """What :func:`push` would push, without asking the network.

    Raises:
        CheckpointError: ``folder`` is no compressed model or does not load, or ``repository`` is no name of one.
    """
    from huggingface_hub.utils import validate_repo_id

    for name in filter(None, (repository, base_model)):
        with explained(f"'{name}' cannot be a repository", None, CheckpointError):
            validate_repo_id(name)
        if name.count("/") != 1:
            raise CheckpointError(f"'{name}' cannot be a repository: it is written ORG/NAME, or USER/NAME")
    path = Path(folder)
    facts = read_facts(path)
    load_model(str(path))  # nothing is given away that cannot be loaded
    found: dict[str, Path | bytes] = {}
    for pattern in _STOCK_FILES if facts.stock else _MODEL_FILES:
        found |= {file.name: file for file in sorted(path.glob(pattern)) if file.is_file()}
    notes = []
    if PICTURE not in found:
        picture = _picture(facts)
        if picture is None:
            notes.append("no picture: pip install matplotlib")
        else:
            found[PICTURE] = picture
    if _is_own(path):
        return Package(facts, {**found, CARD: path / CARD}, tuple(notes))
    base = base_of(facts)
    base = replace(base, repository=base_model or base.repository, license=license or base.license)
    if base.license is None:
        notes.append("the licence of the dense model is not known, so that the card names none; give it with --license")
    card = model_card(facts, repository, base, PICTURE in found)
    return Package(facts, {**found, CARD: card.encode()}, tuple(notes))


def _is_own(folder: str | Path) -> bool:
    """Whether the directory brings a card of its user's."""
    return (Path(folder) / CARD).is_file()


def _card_there(api: object, repository: str, revision: str | None) -> str:
    path: str = api.hf_hub_download(repository, CARD, revision=revision)  # type: ignore[attr-defined]
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _picture(facts: Facts) -> bytes | None:
    from ..report.figures import draw_kept

    buffer = io.BytesIO()
    try:
        draw_kept(facts.report, buffer, f"{facts.name}: what every layer kept")
    except ComcatError:  # matplotlib is not installed
        return None
    return buffer.getvalue()


def _message(facts: Facts) -> str:
    small, dense = facts.small.params, facts.dense.params
    return f"comcat: {count(small)} parameters, {percent(small, dense)} of the dense model"
