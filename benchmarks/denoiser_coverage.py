"""To which attention layers of diffusers products can be added, and how exactly: every denoiser built small and run.

    python benchmarks/denoiser_coverage.py [--classes Wan Flux2 ...] [--json FILE] [--table FILE]

Every transformer and UNet class of the installed diffusers that holds attention, in float64 with random weights. On the
model's own inputs: the largest change of its output by a product of zero that is computed all the same, and, for every
attention layer, the largest difference between the layer with random products and Eq. 8 written out token by token,
relative to the largest output. Hosts that compute in float32 whatever they are given are run in float32. What cannot be
run here is proven on made-up inputs alone, as it always is first.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from comcat import customize
from comcat.errors import ModelError
from comcat.hosts.addable import AddableAttention
from comcat.hosts.added_proof import WrittenOut
from comcat.hosts.diffusers import addable_layers, proof_of
from comcat.hosts.seam import Seam
from comcat.nn.carries import Carries
from comcat.nn.derived import original_class
from common import parser, write
from coverage import disturbed, tensors
from small_denoisers_image import IMAGE_MODELS, Inputs
from small_denoisers_video import VIDEO_MODELS

RESULTS = Path(__file__).parent / "results" / "denoiser_coverage.json"
TABLE = Path(__file__).parents[1] / "docs" / "denoisers.md"
MODELS = {**IMAGE_MODELS, **VIDEO_MODELS}


def classes() -> dict[str, type]:
    """Every model class in diffusers' folders of transformers and UNets, by its name."""
    found = {}
    for folder in ("transformers", "unets"):
        package = importlib.import_module(f"diffusers.models.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            source = importlib.import_module(f"{package.__name__}.{module.name}")
            for name, one in inspect.getmembers(source, inspect.isclass):
                if issubclass(one, ModelMixin) and one.__module__ == source.__name__:
                    found[name] = one
    return found


def measure(name: str, cls: type) -> dict[str, Any]:
    """One class, as plain data."""
    row: dict[str, Any] = {"class": name}
    if name not in MODELS:
        return row | {"error": "no small configuration of it is known here"}
    config, inputs = MODELS[name]
    torch.manual_seed(0)
    try:
        model: Any = disturbed(cls(**config).double()).eval().requires_grad_(False)
    except Exception as error:
        return row | {"error": f"not built: {type(error).__name__}: {error}"[:200]}
    layers = dict(addable_layers(model))
    taken = {n: one for n, one in layers.items() if isinstance(one, AddableAttention)}
    others = Counter((o.kind, o.what) for n, o in layers.items() if n not in taken)
    row |= {
        "attention": sorted({original_class(m, Carries).__name__ for n, m in model.named_modules() if n in layers}),
        "layers": len(layers), "taken": len(taken),
        "kinds": dict(Counter(one.kind for one in taken.values())),
        "streams": sorted({", ".join(one.meeting.order) for one in taken.values()}),
        "refused": [[*pair, count] for pair, count in others.items()],
        "made_up": _made_up(taken),
    }  # fmt: skip
    if not taken:
        return row
    for dtype in (torch.float64, torch.float32):  # some hosts compute in float32 whatever they are given
        made = functools.partial(given, inputs, dtype)
        try:
            base = run(model.to(dtype), made())
            found = exactness(model, made, base, list(taken))
            row.pop("not_run", None)
            return row | {"dtype": str(dtype)} | found
        except ModelError as error:  # it does something else with what the model gives it
            kinds = Counter(one.kind for one in taken.values())
            row["refused"] += [[kind, f"when it runs: {error}"[:200], count] for kind, count in kinds.items()]
            return row | {"taken": 0}
        except Exception as error:
            row["not_run"] = f"{type(error).__name__}: {error}"[:200]
    return row


def _made_up(taken: dict[str, AddableAttention]) -> list[float]:
    proofs = [proof_of(one) for one in taken.values()]
    return [max((p.zero for p in proofs), default=0.0), max((p.exact for p in proofs), default=0.0)]


def given(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        return type(value)(map(cast, value)) if type(value) in (list, tuple) else value

    return {key: cast(value) for key, value in inputs().items()}


@torch.no_grad()
def run(model: nn.Module, given: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        given = {**given, "return_dict": False}
    return model(**given)


def exactness(model: Any, inputs: Any, base: Any, names: list[str]) -> dict[str, Any]:
    """With products in all layers at once: of zero, and random ones, layer by layer against Eq. 8."""
    handle = customize.add_adapter(model, targets=names)
    for layer in handle.layers.values():
        layer._started = True  # computed, though nothing is added
    zero = _apart(run(model, inputs()), base)
    generator = torch.Generator().manual_seed(1)
    for parameter in handle.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise / parameter.shape[1] ** 0.5)
    calls: dict[str, Any] = {}
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _, args, kwargs, n=n: calls.__setitem__(n, (args, kwargs)), with_kwargs=True
        )
        for n in names
    ]
    effect = _apart(run(model, inputs()), base)
    for hook in hooks:
        hook.remove()
    exact = 0.0
    with torch.no_grad():
        for (_, n), layer in handle.layers.items():
            if n not in calls:
                continue
            attn: Any = model.get_submodule(n)
            args, kwargs = calls[n]
            seam = Seam(original_class(attn, Carries), getattr(attn, "processor", None))
            expected = seam.run(WrittenOut(attn.meeting, layer), attn, args, kwargs)
            exact = max(exact, _apart(attn(*args, **kwargs), expected))
    handle.remove()
    same = all(torch.equal(a, b) for a, b in zip(tensors(run(model, inputs())), tensors(base), strict=True))
    return {"zero": zero, "exact": exact, "reached": len(calls), "effect": effect, "removed_bitwise": same}


def _apart(found: Any, wanted: Any) -> float:
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    largest = max(float(b.abs().max()) for _, b in pairs)
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()) / largest  # NaN stays


def table(rows: list[dict[str, Any]]) -> str:
    """All classes in Markdown."""
    held = [row for row in rows if row.get("layers") or "error" in row]
    built = [row for row in held if row.get("layers")]
    whole, none = sum(row["taken"] == row["layers"] for row in built), sum(not row["taken"] for row in built)
    exact = [row for row in built if row.get("dtype") == "torch.float64"]
    largest = {key: max((row[key] for row in exact), default=0.0) for key in ("zero", "exact")}
    lines = [
        "<!-- Made by benchmarks/denoiser_coverage.py; do not edit. -->", "", "# Which denoisers take products", "",
        f"Of {len(held)} transformer and UNet classes of diffusers {diffusers.__version__} that hold attention, "
        f"{whole} take products in all of their attention layers, {len(built) - whole - none} in some, {none} in none; "
        f"{len(held) - len(built)} were not built here. Largest difference over the {len(exact)} classes that were run "
        f"in float64, relative to the largest output: a product of zero {largest['zero']:.0e}, random products against "
        f"Eq. 8 written out {largest['exact']:.0e}.", "",
        "Every class was built small, with random weights. *Taken*: attention layers that take products, of all that "
        "it has. *Streams*: whose tokens meet in one softmax, in their order. *Zero*: change of the model's output by "
        "a product of zero that is computed all the same. *Eq. 8*: the largest difference of an attention layer with "
        "random products from Eq. 8 written out token by token, on what the model gives it. In brackets: on made-up "
        "inputs, where the model was not run here. f32: the host computes in float32.", "",
        "| class | attention | taken | streams | zero | Eq. 8 |", "|---|---|--:|---|--:|--:|",
    ]  # fmt: skip
    for row in built:
        single = " f32" if row.get("dtype") == "torch.float32" else ""
        made_up = dict(zip(("zero", "exact"), row["made_up"], strict=True))
        figures = [f"{row[k]:.0e}{single}" if k in row else f"({v:.0e})" for k, v in made_up.items()]
        cells = [row["class"], ", ".join(row["attention"]), f"{row['taken']} / {row['layers']}"]
        cells += ["; ".join(row["streams"]), *(figures if row["taken"] else ["-", "-"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What is refused, and why:", ""]
    lines += [f"* {row['class']}: {n} x {kind}: {what}" for row in built for kind, what, n in row["refused"]]
    lines += ["", "Not built here:", ""] + [f"* {row['class']}: {row['error']}" for row in held if "error" in row]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = parser(__doc__)
    p.set_defaults(json=RESULTS)
    p.add_argument("--classes", nargs="+", help="only those whose names begin like this")
    p.add_argument("--table", type=Path, default=TABLE)
    args = p.parse_args()
    warnings.simplefilter("ignore")
    done = {row["class"]: row for row in json.loads(args.json.read_text())["rows"]} if args.json.exists() else {}
    for name, cls in classes().items():
        if args.classes and not name.startswith(tuple(args.classes)):
            continue
        row = done[name] = measure(name, cls)
        said = row.get("error") or f"{row['taken']}/{row['layers']} {row.get('zero', 0):.0e} {row.get('exact', 0):.0e}"
        print(f"{name:<40} {said} {row.get('not_run', '')} {row.get('refused', '')}"[:400], flush=True)
        write(args.json, {"diffusers": diffusers.__version__, "rows": [done[key] for key in sorted(done)]})
    args.table.write_text(table([done[key] for key in sorted(done)]))


if __name__ == "__main__":
    main()
