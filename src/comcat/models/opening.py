"""Getting a model from what a user types: a saved directory, a name of a library, a Hub repository.

DIR                      saved by comcat, by save_pretrained of transformers, or by open_clip or timm for the Hub
hf-hub:ORG/NAME          a repository of comcat (comcat push) or of timm; local-dir:DIR likewise of timm
vit_small_patch16_224    timm; with --checkpoint, its architecture alone
torchvision/NAME, open_clip/NAME[/TAG]
ORG/NAME[@REVISION]      a Hub repository, of whatever library its configuration is
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ModelError
from ..storage.atomic import CONFIG_NAME
from ..storage.checkpoint import load
from ..storage.reader import read_json
from .hub import PREFIX, fetch
from .libraries import NAMES, installed, library, prefixed
from .library import Library, Wanted
from .source import Source
from .versions import check_versions
from .weights import read_checkpoint

#: Files by which the libraries tell their directories.
CONFIGS = ("config.json", "open_clip_config.json")
#: Files beside them that say how images are prepared.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def load_model(
    name: str,
    checkpoint: str | Path | None = None,
    model_args: dict[str, Any] | None = None,
    pretrained: bool = True,
) -> nn.Module:
    """Build a model and give it weights.

    Args:
        name: a directory (saved by comcat, by transformers' ``save_pretrained``, by timm or open_clip for the Hub); a
            timm name, ``hf-hub:...`` or ``local-dir:...``; ``torchvision/NAME``; ``open_clip/NAME/TAG``; or a Hub
            repository ``ORG/NAME`` or ``ORG/NAME@REVISION`` of comcat, transformers, timm or open_clip.
        checkpoint: a safetensors file for the architecture ``name``; without it, the library's pretrained weights.
        model_args: further arguments of the architecture, e.g. ``{"img_size": 32}`` of ``timm.create_model``. For
            transformers, entries of its configuration, and ``architecture``, the class to build.
        pretrained: whether to load pretrained weights where no checkpoint is given.

    Raises:
        ModelError: timm or PyTorch is too old to be safe; unknown name, arguments that the architecture does not take
            or that make it huge, weights that cannot be had, or a checkpoint that does not fit (the differing tensors
            are named); a repository that brings code of its own, which is never run.
        CheckpointError: a saved directory that is damaged.
    """
    check_versions()
    args = dict(model_args or {})
    wanted = Wanted(name, None if checkpoint is None else Path(checkpoint), args, pretrained)
    folder = Path(name)
    if folder.is_dir():
        return _open_directory(folder, wanted)
    if folder.exists():
        raise ModelError(f"{_neither(name)}; give the directory that holds the model, or the file as --checkpoint")
    if found := prefixed(name):
        home, rest = found
        return home.open(Wanted(rest, wanted.checkpoint, args, pretrained))
    if "/" in name and ":" not in name:
        return _open_repository(name, wanted)
    if name.startswith(PREFIX) and _is_ours(name.removeprefix(PREFIX)):
        return _open_saved(name, wanted)
    return library("timm", ModelError).open(wanted)


def open_source(source: Source, checkpoint: Path, args: dict[str, Any]) -> nn.Module:
    """The dense architecture that a saved model was made from, with the weights of ``checkpoint``.

    Raises:
        ModelError: they do not fit.
    """
    if source.library == "timm":
        return load_model(source.name, checkpoint, {**source.args, **args})
    made = replace(source, args={**source.args, **args})
    model = library(source.library, ModelError).filled(made, read_checkpoint(checkpoint), checkpoint)
    model.comcat_source = made  # type: ignore[assignment]
    return model.eval()


def _open_directory(folder: Path, wanted: Wanted) -> nn.Module:
    home, files = reader_of(folder)
    if home is not None:
        return home.open_directory(folder, wanted)
    if (folder / CONFIG_NAME).exists() or not files:
        return _open_saved(folder, wanted)  # or says that it has no description
    raise ModelError(
        f"'{folder}' holds {' and '.join(files)}, but of no library that is installed; comcat reads {', '.join(NAMES)}"
    )


def _open_saved(place: str | Path, wanted: Wanted) -> nn.Module:
    if wanted.checkpoint is not None or wanted.args:
        raise ModelError(f"'{wanted.name}' is a saved model: it takes neither a checkpoint nor model arguments")
    return load(place)


def _is_ours(repository: str) -> bool:
    """Whether a repository that timm could have written is one of comcat.

    Raises:
        ModelError: it cannot be had, for a reason that timm would not say.
    """
    return (fetch(repository, (CONFIG_NAME, CONFIGS[0])) / CONFIG_NAME).exists()


def _open_repository(name: str, wanted: Wanted) -> nn.Module:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"{_neither(name)}; there is no such directory, and a Hub repository is written ORG/NAME")
    try:
        folder = fetch(name, (CONFIG_NAME, *CONFIGS, *_PROCESSORS))
    except ModelError as error:
        raise ModelError(
            f"{error}. There is no directory of that name either; a model of timm's registry is written without a slash"
        ) from None
    if (folder / CONFIG_NAME).exists():
        return _open_saved(f"{PREFIX}{name}", wanted)
    files = _configs(folder)
    home = _reader(files)
    if home is None:
        raise ModelError(
            f"the repository '{name}' holds no model that comcat can open: it has "
            f"{' and '.join(files) or 'no ' + CONFIGS[0]}, and comcat reads those of {', '.join(NAMES)}"
        )
    if home.name == "timm":
        return home.open(Wanted(f"hf-hub:{name}", wanted.checkpoint, wanted.args, wanted.pretrained))
    if wanted.pretrained and wanted.checkpoint is None:
        folder = fetch(name, (*CONFIGS, *_PROCESSORS, *home.weights))
    return home.open_directory(folder, wanted)


def reader_of(folder: Path) -> tuple[Library | None, dict[str, dict[str, Any]]]:
    """The library that opens a directory, and its configuration files; None for one that comcat has saved."""
    files = _configs(folder)
    return (None if (folder / CONFIG_NAME).exists() else _reader(files)), files


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """What the configuration files say, by their names."""
    found: dict[str, dict[str, Any]] = {}
    for name in CONFIGS:
        if (folder / name).exists():
            content = read_json(folder / name, what="model configuration", error=ModelError)
            if not isinstance(content, dict):
                raise ModelError(f"the model configuration '{folder / name}' is damaged: it must be fields by name")
            found[name] = content
    return found


def _reader(files: dict[str, dict[str, Any]]) -> Library | None:
    return next((home for home in installed() if home.reads(files)), None) if files else None


def _neither(name: str) -> str:
    return f"'{name}' is neither a directory saved by comcat (with {CONFIG_NAME}) nor the name of a model"
