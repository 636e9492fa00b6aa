"""The card of a compressed model on the Hub: ``README.md``, written from what its directory knows.

Nothing in it says where on somebody's machine the data and the models lay: of paths the last part is kept.
"""

from __future__ import annotations

import html
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..models.hub import PREFIX
from ..report import format as fmt
from ..report.facts import Facts
from ..report.method_words import METHODS, budget_words
from ..report.tables import compared

#: In a card that comcat wrote, and may therefore replace.
MARK = "<!-- written by comcat; a card without this line is never replaced -->"
#: Licences that the Hub knows by these names; others are named in words.
_LICENSES = {
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "openrail++",
    "creativeml-openrail-m", "unlicense", "unknown", "other",
}  # fmt: skip
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TASKS = {"classes": "image-classification", "labels": "image-classification", "features": "image-feature-extraction"}


@dataclass(frozen=True)
class BaseModel:
    """What was compressed.

    Attributes:
        repository: its name on the Hub, where its weights are those that lie there.
        license: of its weights, where they say.
    """

    repository: str | None = None
    license: str | None = None


def base_of(facts: Facts) -> BaseModel:
    """The base of a model, as far as its directory knows whose weights were compressed."""
    if facts.record is None or _has_option(facts.record.command, "--checkpoint"):
        return BaseModel()
    name = facts.name.removeprefix(PREFIX).partition("@")[0]
    config = facts.source.config if facts.source else {}
    found = config.get("license")
    said = found if isinstance(found, str) else None
    if _REPOSITORY.fullmatch(name) and not name.startswith("torchvision/") and not Path(facts.name).exists():
        return BaseModel(name, said)
    if facts.source is not None and facts.source.library == "timm" and "/" not in name:
        return BaseModel(_in_timms_organization(name), said)
    return BaseModel(None, said)


def _has_option(command: str | None, option: str) -> bool:
    return command is None or option in command.replace("=", " ").split()


def _in_timms_organization(name: str) -> str | None:
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model(name.partition(".")[0]) else None
    place = getattr(config, "hf_hub_id", None)
    if config is None or not place:
        return None
    return f"{place}{config.architecture}.{config.tag}" if place.endswith("/") else str(place)


def model_card(facts: Facts, repository: str, base: BaseModel, picture: bool) -> str:
    """The text of ``README.md``.

    Args:
        repository: ``ORG/NAME``, where it will lie; picture: whether ``report.png`` lies beside it.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # Markdown; what comes from files goes through `code` and `words`
        loader=PackageLoader("comcat.sharing"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = facts.training or facts.record
    environment.filters |= {"code": code, "words": words}
    content = environment.get_template("card.md").render(
        mark=MARK,
        title=repository.partition("/")[2],
        name=_last_part(facts.name),
        base=base,
        report=facts.report,
        rows=compared([facts.dense, facts.small]),
        column=facts.small.name,
        score=None if facts.small.evaluation is None else facts.small.evaluation.figures()[0],
        evaluated=_evaluated(facts),
        picture=picture,
        load=_load_lines(facts, repository),
        images=_preparation(facts),
        layers=[(layer.name, fmt.ranks(layer.ranks, layer.full).replace("  ", ", ")) for layer in facts.report.layers],
        method=METHODS.get(facts.plan.method, facts.plan.method),
        budget=budget_words(facts.plan.budget) if facts.plan.budget else None,
        calibration=facts.record.calibration if facts.record else None,
        training=facts.training,
        commands=[public(record.command) for record in (facts.record, facts.training) if record and record.command],
        versions=made.versions if made else {},
        comcat=__version__,
    )
    return f"---\n{_metadata(facts, repository, base)}\n---\n{content}"


def code(text: object) -> str:
    """As code: nothing in it is Markdown, HTML or the end of a table's cell."""
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{plain}`"


def words(text: object) -> str:
    """As words: nothing in it is Markdown or HTML."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{c}" if c in r"\`*_{}[]|#!" else c for c in plain)


def public(command: str) -> str:
    """A command in which paths are their last parts."""
    try:
        return shlex.join([_public_word(word) for word in shlex.split(command)])
    except ValueError:  # edited: quotes that do not end
        return ""


def _public_word(word: str) -> str:
    option, equals, value = word.partition("=")
    if word.startswith("--") and equals:
        return f"{option}={_last_part(value)}"
    return _last_part(word)


def _last_part(text: str) -> str:
    """Of something that looks like a path on a machine; ``ORG/NAME`` and ``hfds/ORG/NAME`` stay."""
    is_path = text.startswith(("/", "~", "./", "../", "\\")) or "\\" in text or text[1:3] == ":\\"
    if is_path or ("/" in text and Path(text).exists()):
        return text.replace("\\", "/").rstrip("/").rpartition("/")[2] or text
    return text


def _evaluated(facts: Facts) -> str | None:
    if facts.evaluated_on is None or facts.small.evaluation is None:
        return None
    data, comma, rest = facts.evaluated_on.partition(", split ")
    return f"{_last_part(data)}{comma}{rest}, {facts.small.evaluation.images:,} images"


def _load_lines(facts: Facts, repository: str) -> list[str]:
    if not facts.stock:
        return ["import comcat  # pip install comcat", "", f'model = comcat.load("{PREFIX}{repository}")']
    line = facts.load_line
    if line.startswith("model = timm"):
        return ["import timm", "", f'model = timm.create_model("{PREFIX}{repository}", pretrained=True)']
    kind = line.partition("transformers.")[2].partition(".")[0]
    return [f"from transformers import {kind}", "", f'model = {kind}.from_pretrained("{repository}")']


def _preparation(facts: Facts) -> str | None:
    """How images are prepared, in words."""
    config = facts.source.config if facts.source else {}
    size = " x ".join(str(n) for n in facts.report.input_size[1:])
    said = [f"{facts.report.input_size[0]} channels of {size} pixels"]
    for key, label in (("interpolation", "resized by"), ("crop_pct", "centre crop"), ("mean", "mean"), ("std", "std")):
        value = config.get(key)
        if isinstance(value, list | tuple):
            value = ", ".join(f"{n:g}" for n in value if isinstance(n, int | float))
        if value is not None:
            said.append(f"{label} {value}")
    return "; ".join(said)


def _metadata(facts: Facts, repository: str, base: BaseModel) -> str:
    """The YAML at the head of the card, which the Hub reads."""
    from huggingface_hub import ModelCardData

    library = facts.source.library if facts.source else ("timm" if "timm." in facts.load_line else "transformers")
    data: dict[str, Any] = {
        "library_name": library if facts.stock else "comcat",
        "tags": ["comcat", "compression", "low-rank", "vision", library.replace("_", "-")],
        "pipeline_tag": _task(facts),
        "base_model": base.repository,
    }
    if base.license:
        known = base.license.lower()
        data |= {"license": known} if known in _LICENSES else {"license": "other", "license_name": known}
    results = _results(facts)
    if results:
        data |= {"model_name": repository.partition("/")[2], "eval_results": results}
    return ModelCardData(**{key: value for key, value in data.items() if value is not None}).to_yaml().rstrip("\n")


def _task(facts: Facts) -> str | None:
    evaluation = facts.small.evaluation
    if evaluation is not None and evaluation.outputs in _TASKS:
        return _TASKS[evaluation.outputs]
    if evaluation is not None and evaluation.outputs != "metric":
        return {"maps": "image-segmentation"}.get(evaluation.outputs)
    classes = facts.source.config.get("num_classes") if facts.source else None
    return None if not isinstance(classes, int) else _TASKS["classes" if classes else "features"]


def _results(facts: Facts) -> list[Any]:
    """Top-1 and top-5 as the Hub's tables of results want them."""
    from huggingface_hub import EvalResult

    evaluation = facts.small.evaluation
    if evaluation is None or evaluation.outputs != "classes" or facts.evaluated_on is None:
        return []
    data, _, split = facts.evaluated_on.partition(", split ")
    name = _last_part(data)
    kind = "".join(c if c.isalnum() or c in "-_." else "-" for c in name.lower().rpartition("/")[2]) or "data"
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=kind,
            dataset_name=name,
            dataset_split=split or None,
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(value, 2),
        )
        for label, value in (("top-1", evaluation.top1), ("top-5", evaluation.top5))
    ]
