"""What a LoRA is multiplied with: alpha over its rank, or over the root of it, as PEFT's configuration says.

PEFT keeps it in ``adapter_config.json`` beside the file, diffusers in the file's metadata. Patterns for single layers
are regular expressions there; here only plain names are understood, and nothing from a file is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...storage import reader

#: Header entry in which diffusers stores the PEFT configuration of a LoRA file.
METADATA_KEY = "lora_adapter_metadata"
#: Where PEFT stores it, beside the file.
CONFIG_NAME = "adapter_config.json"

_PLAIN_NAME = re.compile(r"\^?[\w.-]+\$?")
#: Settings of PEFT that change nothing in what the stored factors mean.
_HARMLESS = frozenset(
    """auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules fan_in_fan_out
    inference_mode layers_pattern layers_to_transform loftq_config lora_dropout megatron_core modules_to_save
    peft_version qalora_group_size revision runtime_config target_modules target_parameters task_type
    trainable_token_indices""".split()  # noqa: SIM905 - as a list it fills a screen
)
#: Starts that leave the base's own weights as they are; others (PiSSA, OLoRA, LoftQ, CorDA) change them.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_METHODS = {
    "use_dora": "DoRA",
    "lora_bias": "LoRA-with-bias",
    "use_qalora": "QA-LoRA",
    "layer_replication": "replicated",
}


@dataclass(frozen=True)
class LoraConfig:
    """The settings of PEFT that say what stored factors mean.

    Attributes:
        r: rank; lora_alpha: the factors count ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``use_rslora``.
        alpha_pattern, rank_pattern: other values for layers whose names end like this.
    """

    lora_alpha: float
    r: int | None = None
    use_rslora: bool | None = False
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    def factor(self, names: tuple[str, ...], rank: int) -> float:
        """What ``up @ down`` of rank ``rank`` is multiplied with in the layer of these names.

        Raises:
            CheckpointError: the configuration is of another file.
        """
        wanted = _first(self.rank_pattern, names, self.r)
        if wanted is not None and wanted != rank:
            raise CheckpointError(
                f"the configuration of the LoRA says rank {wanted} for {names[0]}, and the file has {rank}: they do "
                f"not belong together. Put the right {CONFIG_NAME} beside the file"
            )
        alpha: float = _first(self.alpha_pattern, names, self.lora_alpha)
        return scale(alpha, rank, bool(self.use_rslora))


def scale(alpha: float, rank: int, root: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank)."""
    return alpha / (rank**0.5 if root else rank)


def _first(patterns: Mapping[str, Any] | None, names: tuple[str, ...], default: Any) -> Any:
    """The value of the first pattern that is, or ends, a name, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        plain = _plain(pattern)
        ends = [plain] if pattern.startswith("^") else [plain, f".{plain}"]
        if any(name == plain or (len(ends) > 1 and name.endswith(ends[1])) for name in names):
            return value
    return default


def _plain(pattern: str) -> str:
    return pattern.replace("\\.", ".").removeprefix("^").removesuffix("$")


def config_of(found: Any, what: str) -> LoraConfig:
    """Plain data as a configuration.

    Raises:
        CheckpointError: it is of another method than LoRA, has settings that are not known here, a regular expression
            for a pattern, or values of the wrong kind.
    """
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is damaged: it is {reader.shown(found)}, not settings by name")
    kind = found.get("peft_type", "LORA")
    if kind not in ("LORA", None):
        raise CheckpointError(f"{what} is of the method {reader.shown(kind)}; only ordinary LoRA files can be read")
    for name, method in _METHODS.items():
        if found.get(name):
            raise CheckpointError(f"{method} files cannot be read, only ordinary LoRA ones ({name} in {what})")
    start = found.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _STARTS):
        raise CheckpointError(
            f"{what} says init_lora_weights {reader.shown(start)}: such a LoRA belongs to base weights that were "
            "changed with it. Convert it with PEFT first (path_initial_model_for_weight_conversion)"
        )
    if found.get("bias") not in (None, "none"):
        raise CheckpointError(
            f"{what} says that biases were trained too ({reader.shown(found['bias'])}); none can be read"
        )
    known = {entry.name for entry in fields(LoraConfig)}
    other = known | _HARMLESS | {"peft_type", "init_lora_weights", "bias", *_METHODS}
    for name, value in found.items():
        if name not in other and value:
            raise CheckpointError(f"{what} has the setting {reader.shown(name)}, which is not known; upgrade comcat")
    config: LoraConfig = reader.validated(LoraConfig, {k: v for k, v in found.items() if k in known}, what)
    for pattern in [*(config.alpha_pattern or {}), *(config.rank_pattern or {})]:
        if not _PLAIN_NAME.fullmatch(pattern.replace("\\.", ".")):
            raise CheckpointError(
                f"{what} has the pattern {reader.shown(pattern)}; only plain names of layers are read, no regular "
                "expressions. Write the names in its place"
            )
    return config


def configs_in(metadata: Mapping[str, str]) -> dict[str, LoraConfig]:
    """Component -> configuration, as diffusers stores it: flat, with the component as prefix."""
    what = f"the entry {METADATA_KEY} of the LoRA file"
    found = reader.parse_json(metadata.get(METADATA_KEY, "{}"), what)
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} is damaged: it is {reader.shown(found)}, not settings by name")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = value
    return {component: config_of(part, f"{what} ({component})") for component, part in parts.items()}


def config_beside(path: Path) -> LoraConfig | None:
    """The configuration that PEFT has written beside a LoRA file, if there is one."""
    beside = path.with_name(CONFIG_NAME)
    if not beside.exists():
        return None
    return config_of(reader.read_json(beside, limit=1 << 20), f"'{beside}'")
