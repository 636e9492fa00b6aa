"""What of how many models can be reduced, and how exactly: every structure is built small, looked at and compressed.

    python benchmarks/coverage.py [--sources timm transformers ...] [--families eva beit] [--again] [--limit 300]

One process per family, with a time limit; what a family has shown is kept in the JSON file, and a family that is in it
is not run again unless asked for; the families of a source with ``TOGETHER`` share a process. A source is one module
``coverage_SOURCE.py`` with ``families()``, ``cases(family)`` and ``NOT_SOFTMAX`` (see ``coverage_timm.py``). Models
that differ in their sizes alone are one case.

Measured per case, in float64, with all weights disturbed so that none is zero by initialization: the share of the
attention modules, FFNs and of their parameters that can be reduced, the largest difference of the outputs at full rank,
relative to the largest output, and the reasons for what stays dense. Layers that the call does not reach are named
among these, and not counted.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import comcat
from comcat.errors import ComcatError
from comcat.hosts.attention_proof import NO_PRODUCT
from comcat.hosts.proof import NOT_CALLED, apart
from comcat.layers.cost import Shape
from comcat.models.example import Example, example_for
from common import parser

SOURCES = ("timm", "transformers", "torchvision", "open_clip")
RESULTS = Path(__file__).parent / "results" / "coverage.json"
TABLE = Path(__file__).parents[1] / "docs" / "coverage.md"
ATTENTION = re.compile(r"attn|attention|MHSA|GPSA|SHSA|SHMA|LiteMLA|LambdaLayer", re.IGNORECASE)
#: How the reasons begin where a product of queries and keys does not exist; that is proven, or known of the class.
NO_QK = (NO_PRODUCT, "query-key normalization")
_NO_FFN = re.compile(r"attn|attention|head", re.IGNORECASE)
_FFN = re.compile(r"mlp|ffn|feed_?forward|swiglu|geglu", re.IGNORECASE)


class Case(NamedTuple):
    """Models of one structure.

    Attributes:
        names: of all of them; build: makes a small one, and the images that it is run on, or None for what comcat
            itself calls such a model with.
    """

    names: list[str]
    build: Callable[[], tuple[nn.Module, Tensor | None]]


def measure(case: Case, not_softmax: dict[str, str]) -> dict[str, Any]:
    """One case, as plain data."""
    start = time.perf_counter()
    torch.manual_seed(0)
    row: dict[str, Any] = {"names": case.names}
    try:
        model, images = case.build()
        model = disturbed(model.double()).eval()
        row |= looked_at(model, None if images is None else images.double(), not_softmax)
    except Exception as error:  # whatever a library raises: it is the result for this case
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def looked_at(model: nn.Module, images: Tensor | None, not_softmax: dict[str, str]) -> dict[str, Any]:
    """Shares, exactness and reasons."""
    prepared = comcat.prepare(model, example=images)
    example = example_for(model, prepared.size(), 3, seed=0) if images is None else Example((images,))
    unreached: set[str] = set()
    try:
        layers = {layer.name: layer for layer in prepared.inventory.layers}
        reasons = [(entry.cls, entry.reason) for entry in prepared.inventory.dense]
        unreached = {entry.name for entry in prepared.inventory.dense if entry.reason == NOT_CALLED}
    except ComcatError as error:
        layers, reasons = {}, [(type(model).__name__, str(error))]
    counts = ("modules", "params", "reduced", "qk", "vo", "softmax", "qk_possible")
    attention, ffn = (dict.fromkeys(counts, 0) for _ in range(2))
    others: dict[str, str] = {}
    for kind, pattern, sums in (("attention", ATTENTION, attention), ("ffn", _FFN, ffn)):
        for name, module in modules(model, pattern, {n for n, one in layers.items() if one.kind == kind}):
            if kind == "ffn" and name not in layers and _NO_FFN.search(type(module).__name__):
                continue
            if any(name == other or name.startswith(f"{other}.") for other in unreached):
                continue  # parts that this call does not use are named, not counted
            layer = layers.get(name)
            sums["modules"] += 1
            sums["params"] += weights_of(module) if layer is None else layer.priced({}, Shape(1, 1)).params
            cls = type(module).__name__
            named = next(
                (n for n in (cls, f"{type(module).__module__.rpartition('.')[2]}.{cls}") if n in not_softmax), None
            )
            if named:
                others[cls] = not_softmax[named]
            else:
                sums["softmax"] += 1
                sums["qk_possible"] += layer is None or not layer.dense_parts.get("qk", "").startswith(NO_QK)
            if layer is not None:
                parts = {layer.part_of(part) for part in layer.full}
                sums["reduced"] += layer.parts_cost(parts, Shape(1, 1)).params
                sums["qk"] += not parts.isdisjoint(("qk", "pairs"))
                sums["vo"] += "vo" in parts or "ffn" in parts
    found: dict[str, Any] = {"attention": attention, "ffn": ffn, "other_attention": others}
    found["reasons"] = [[*pair, count] for pair, count in Counter(reasons).most_common(8)]
    found["classes"] = sorted({type(one.module).__name__ for one in layers.values() if one.kind == "attention"})
    if layers:
        small = comcat.compress(prepared, comcat.full_rank_plan(prepared))
        with torch.no_grad():
            outputs = []
            for one in (model, small):
                torch.manual_seed(0)  # some mask at random, in every pass anew
                outputs.append(tensors(example.run(one)))
        expected, got = outputs
        found["difference"] = max(apart(b, a) for a, b in zip(expected, got, strict=True))
    return found


def rows_of(source: Any, family: str, limit: float) -> Iterator[dict[str, Any]]:
    """The rows of one family; what does not build, or takes too long, is a row too."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {limit:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(limit))
    try:
        for case in source.cases(family):
            yield measure(case, source.NOT_SOFTMAX)
    except Exception as error:
        yield {"names": [family], "error": f"{type(error).__name__}: {error}"[:300], "seconds": 0}
    finally:
        signal.alarm(0)


def modules(model: nn.Module, pattern: re.Pattern[str], found: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules that were found, and the innermost ones that are called so and hold nothing that was found."""
    looks = {n for n, m in model.named_modules() if n and pattern.search(type(m).__name__) and weights_of(m)} | found
    for name in sorted(looks):
        inner = any(other.startswith(f"{name}.") for other in looks - {name})
        outer = any(name.startswith(f"{other}.") for other in found - {name})
        if name in found or not (inner or outer):
            yield name, model.get_submodule(name)


def weights_of(module: nn.Module) -> int:
    """Parameters of the linear layers and 1x1 convolutions inside."""
    total = 0
    for one in module.modules():
        pointwise = isinstance(one, nn.Conv2d) and one.kernel_size == (1, 1) and one.groups == 1
        if isinstance(one, nn.Linear) or pointwise:
            total += sum(p.numel() for p in one.parameters(recurse=False))
    return total


def disturbed(model: nn.Module) -> nn.Module:
    """With every parameter away from zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.is_floating_point():
                noise = torch.randn(parameter.shape, dtype=parameter.dtype)
                parameter.add_(noise * (0.1 * parameter.square().mean().sqrt() + 0.02))
    return model


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors of an output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    inner: Iterable[Any] = (
        value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    )
    return [tensor for one in inner for tensor in tensors(one)]


def run(source: str, family: str, limit: float) -> list[dict[str, Any]]:
    """The rows of one family, from a process of its own; a crash or too long a run is the last of them."""
    command = [sys.executable, __file__, "--one", f"{source}:{family}", "--limit", str(limit)]
    rows, said, process = [], "", None
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        out, said = process.stdout, process.stderr
    except subprocess.TimeoutExpired as stopped:
        out = (stopped.stdout or b"").decode()
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    if process is None or process.returncode:
        why = f"not done after {limit:.0f} s" if process is None else (said.strip().splitlines() or ["crashed"])[-1]
        rows.append({"names": [], "error": why[:300], "seconds": limit})
    return rows


def share(rows: list[dict[str, Any]], kind: str, key: str, of: str) -> str:
    """In percent, every name counted once."""
    part = whole = 0.0
    for row in rows:
        if kind in row and (count := counted(row[kind], of)):
            part += len(row["names"]) * min(1.0, row[kind][key] / count)
            whole += len(row["names"])
    return f"{100 * part / whole:.0f}" if whole else "-"


def counted(sums: dict[str, int], of: str) -> int:
    """Of how many modules; where nobody looked whether a product exists, of all that have a softmax."""
    return sums.get(of, sums["softmax"])


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """All families in Markdown."""
    lines = [
        "<!-- Made by benchmarks/coverage.py; do not edit. -->", "", "# What can be reduced", "",
        "Every structure was built small, its weights disturbed, and compressed at full rank in float64. *Models* "
        "counts names, *structures* what was built. VO (or channels): share of the modules with softmax attention that "
        "have it, in percent; QK (or rotary pairs): of those where a product of queries and keys exists, which is all "
        "but those of which it is proven that it does not; FFN: of the FFNs; *params*: share of the parameters of "
        "attention, and of FFNs. Layers that the call does not reach are named, and not counted. *Difference*: the "
        "largest of outputs at full rank, relative to the largest output.",
        "",
    ]  # fmt: skip
    for source, families in results.items():
        lines += [f"## {source}", "", summary([row for rows in families.values() for row in rows]), ""]
        lines += ["| family | models | structures | VO | QK | FFN | attn params | FFN params | difference |"]
        lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for family, rows in sorted(families.items()):
            names = sum(len(row["names"]) for row in rows)
            if not names:
                continue
            worst = max((row["difference"] for row in rows if "difference" in row), default=None)
            cells = [
                share(rows, "attention", "vo", "softmax"), share(rows, "attention", "qk", "qk_possible"),
                share(rows, "ffn", "vo", "modules"), share(rows, "attention", "reduced", "params"),
                share(rows, "ffn", "reduced", "params"), "-" if worst is None else f"{worst:.0e}",
            ]  # fmt: skip
            lines.append(f"| {family} | {names} | {len(rows)} | {' | '.join(cells)} |")
        others = {
            cls: why
            for rows in families.values()
            for row in rows
            for cls, why in row.get("other_attention", {}).items()
        }
        if others:
            lines += ["", "Called attention, but without a softmax over scores of tokens:", ""]
            lines += [f"* `{cls}`: {why}" for cls, why in sorted(others.items())]
        lines += ["", "What stays dense, and why:", ""]
        for family, rows in sorted(families.items()):
            said: Counter[tuple[str, str]] = Counter()
            for row in rows:
                said.update({(cls, plain(why)): len(row["names"]) for cls, why, _ in row.get("reasons", []) if why})
                if "error" in row:
                    said["(not run)", row["error"]] += len(row["names"])
            lines += [f"* {family}: `{cls}` {why}" for (cls, why), _ in said.most_common(4) if "not a layer" not in why]
        lines.append("")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """How many models have each product in all of their softmax attention, and low-rank FFNs or neurons in all FFNs."""
    soft = [row for row in rows if row.get("attention", {}).get("softmax")]
    models = sum(len(row["names"]) for row in soft)

    def having(kind: str, key: str, of: str) -> str:
        count = sum(len(row["names"]) for row in soft if row[kind][key] >= counted(row[kind], of))
        return f"{count} ({100 * count / max(models, 1):.0f} %)"

    return (
        f"{sum(len(row['names']) for row in rows)} models, {models} with softmax attention. All of their attention has "
        f"VO or channels in {having('attention', 'vo', 'softmax')}, QK or rotary pairs in "
        f"{having('attention', 'qk', 'softmax')}, and wherever a product of queries and keys exists in "
        f"{having('attention', 'qk', 'qk_possible')}; all FFNs can be reduced in {having('ffn', 'vo', 'modules')}."
    )


def plain(reason: str) -> str:
    """A reason without its figures."""
    return re.sub(r" \(difference [^)]*\)", "", reason)


def main() -> None:
    p = parser(__doc__)
    p.set_defaults(json=RESULTS)
    p.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES)
    p.add_argument("--families", nargs="+", help="only these")
    p.add_argument("--again", action="store_true", help="run families whose figures are there, too")
    p.add_argument("--limit", type=float, default=300, help="seconds per family")
    p.add_argument("--table", type=Path, default=TABLE)
    p.add_argument("--one", help="SOURCE:FAMILY,FAMILY: print their rows, in this process")
    args = p.parse_args()
    if args.one:
        name, _, family = args.one.partition(":")
        source: Any = importlib.import_module(f"coverage_{name}")
        for one in family.split(","):
            for row in rows_of(source, one, args.limit):
                print(json.dumps(row | {"family": one}), flush=True)
        return
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.sources:
        done = results.setdefault(name, {})
        module = importlib.import_module(f"coverage_{name}")
        asked = [one for one in module.families() if not args.families or one in args.families]
        wanted = [one for one in asked if args.again or one not in done]
        if getattr(module, "TOGETHER", False) and wanted:
            for one in wanted:
                done.pop(one, None)
            for row in run(name, ",".join(wanted), 40 * args.limit):
                done.setdefault(row.pop("family", "(rest)"), []).append(row)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
            continue
        for family in wanted:
            start = time.perf_counter()
            done[family] = run(name, family, args.limit)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
            shares = [
                f"{part} {share(done[family], kind, key, of):>3}"
                for part, kind, key, of in (
                    ("VO", "attention", "vo", "softmax"),
                    ("QK", "attention", "qk", "qk_possible"),
                    ("FFN", "ffn", "vo", "modules"),
                )
            ]
            models, seconds = sum(len(row["names"]) for row in done[family]), time.perf_counter() - start
            print(f"{name:>12} {family:<26} {models:>4} models, {', '.join(shares)}, {seconds:.0f} s", flush=True)
    args.table.write_text(table(results))


if __name__ == "__main__":
    main()
