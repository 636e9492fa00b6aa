"""The pages of results, from the files that the benchmarks wrote: no figure on them is copied by hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from method_tables import method_tables
from runtime_tables import int8_tables, latency_tables, parity_table
from tables import number, pivot, records, spread, table

Results = Mapping[str, Any]


class Section(NamedTuple):
    """One file of results on one page.

    Attributes:
        page: where it stands; script: what measured it.
        title: of the section; text: what was done; body: its tables in Markdown.
    """

    page: str
    script: str
    title: str
    text: str
    body: Callable[[Results], str]


PAGES = {
    "results/accuracy.md": (
        "Accuracy without training",
        "Top-1 in percent; mean and sample standard deviation over calibration samples where there are several.",
    ),
    "results/finetuning.md": ("Accuracy after fine-tuning", "Top-1 in percent, before and after."),
    "results/speed.md": (
        "Speed and memory",
        "Times are measured in turns, so that a busy machine slows all alike; medians.",
    ),
    "results/runtimes.md": (
        "Other runtimes",
        "Exported files, dense and compressed: how fast they run, and what they differ by. *Realized* is the speed-up "
        "over the MAC ratio.",
    ),
    "results/customization.md": ("Customization", "What a concept costs to teach and to store, and what it brings."),
}


def _cifar(results: Results) -> str:
    settings = results.get("settings", results)
    dense = results["cells"].get("dense", results.get("dense"))
    return (
        f"Dense: {number(dense)}. {settings['test_images']:,} test images, {settings['calibration_images']:,} "
        "unlabelled images for the statistics.\n\n"
    )


def _training_free(results: Results) -> str:
    cells = results["cells"]
    parts = [_cifar(results)]
    for letter, title, percent in (
        ("c", "whole model, parameters kept", "kept"),
        ("a", "attention only, parameters cut by", "cut"),
        ("b", "FFN only, parameters cut by", "cut"),
    ):
        own = {key[2:]: cell for key, cell in cells.items() if key.startswith(f"{letter}/")}
        parts.append(pivot(own, title, percent))
    return "\n".join(parts)


def _plain(results: Results) -> str:
    return _cifar(results) + pivot(results["cells"], "parameters kept", "kept")


def _features(results: Results) -> str:
    parts = [_cifar(results)]
    for score, digits in (("top1", 2), ("cosine", 4)):
        title = {"top1": "top-1 of a linear probe", "cosine": "cosine to the dense features"}[score]
        parts.append(pivot(results["cells"], title, "kept", lambda c, s=score, d=digits: spread(c[s], d)))
    return "\n".join(parts)


def _stock(results: Results) -> str:
    dense = results["cells"]["dense | timm"]["top1"]
    head = f"Dense: {number(dense)}. {results['test_images']:,} test images.\n\n"
    return head + pivot(results["cells"], "parameters kept", "kept", lambda cell: f"{cell['top1']:.2f}")


def _finetuned(results: Results) -> str:
    images = results["settings"]["images"]
    head = f"Dense: {results['dense']['top-1']:.2f}. {images:,} augmented training images.\n\n"
    shown = pivot(
        results["cells"],
        "parameters kept",
        "kept",
        lambda cell: f"{cell['top-1 before']:.2f} → {cell['top-1 after']:.2f}",
    )
    return head + shown


def _throughput(results: Results) -> str:
    rows = [
        [
            row["what"],
            str(row["batch"]),
            f"{1e3 * row['dense_s']:.2f}",
            f"{1e3 * row['small_s']:.2f}",
            f"{statistics.median(row['speedups']):.2f}",
            f"{row['mac_ratio']:.2f}",
            f"{row['realized']:.2f}",
        ]
        for row in results["rows"]
    ]
    head = (
        f"`{results['model']}`, {100 * results['keep']:.0f} % of its MACs kept, {results['dtype']} on "
        f"{results['device']}, {results['threads']} threads, {results['rounds']} rounds.\n\n"
    )
    titles = ["", "batch", "dense, ms", "small, ms", "faster", "MAC ratio", "realized"]
    return head + table(titles, rows)


def _factorize(results: Results) -> str:
    ours = statistics.median(results["ours_s"])
    rows = [
        ["SVD of every D × D product, s", f"{results['textbook_s']:.2f}"],
        ["projection of the heads, s", f"{ours:.2f}"],
        ["ratio", f"{results['ratio']:.0f}"],
        ["largest relative difference", f"{results['difference']:.1e}"],
        ["peak memory over the model's", f"{results['peak']:.2f}"],
    ]
    return f"All heads of `{results['model']}`, rank {results['rank']}, both products.\n\n" + table(["", ""], rows)


def _search(results: Results) -> str:
    settings = results["settings"]
    rows = [[way, f"{found['seconds']:.2f}", f"{found['peak_mib']:,.0f}"] for way, found in results["results"].items()]
    head = f"`{settings['model']}`, batches of {settings['batch']}.\n\n"
    return head + table(["one step of the search", "seconds", "peak MiB"], rows)


def _demo(results: Results) -> str:
    reference = [run["seconds"] for run in results["runs"]["comcat, rank 2"]]
    rows = []
    for name, runs in results["runs"].items():
        if runs[0]["concept"] is None:
            continue
        ratio = statistics.fmean(run["seconds"] / one for run, one in zip(runs, reference, strict=True))
        rows.append(
            [
                name,
                f"{runs[0]['bytes'] / 1e3:,.1f} kB",
                spread([run["concept"] for run in runs], 1),
                spread([run["retention"] for run in runs], 1),
                f"{ratio:.2f}",
                f"{statistics.fmean(run['peak'] for run in runs) / 1e6:.0f} MB",
            ]
        )
    head = f"{results['steps']} steps, {len(results['seeds'])} seeds; time in units of comcat at rank 2.\n\n"
    return head + table(["", "stored", "V* right, %", "other prompts right, %", "time", "memory"], rows)


def _judged(results: Results) -> str:
    rows: dict[str, list[Results]] = {}
    for row in results["rows"]:
        rows.setdefault(row["name"], []).append(row)
    lines = []
    for name, found in rows.items():
        own = [spread([row[key] for row in found], 2) if key in found[0] else "" for key in ("dino", "kept_dino")]
        lines.append([name, *own, spread([row["concept"] for row in found], 0) if "concept" in found[0] else ""])
    ceiling = statistics.fmean(row["ceiling"] for row in results["rows"])
    head = f"{len(results['seeds'])} seeds; the photos reach {ceiling:.2f} among each other.\n\n"
    return head + table(["", "DINO", "kept DINO", "right by the classifier, %"], lines)


def _step(results: Results) -> str:
    rows = []
    for name, found in results["results"].items():
        ratios, peaks = found["ratio"], found["peak_mib"]
        times = [f"{ratios[key]:.2f}" for key in ("cached", "encoded")]
        rows.append([name, *times, f"{peaks['cached']:,.0f}", f"{peaks['encoded']:,.0f}"])
    settings = results["settings"]
    head = (
        f"{settings['resolution']} px, {settings['precision']} on {settings['device']}; times in units of comcat.\n\n"
    )
    return head + table(["", "latents cached", "encoded every step", "MiB, cached", "MiB, encoded"], rows)


_ACCURACY, _SPEED = "results/accuracy.md", "results/speed.md"
_TUNED, _OWN, _OTHERS = "results/finetuning.md", "results/customization.md", "results/runtimes.md"


def _bytes(results: Results) -> str:
    heads = {
        "bytes": ("bytes", 1, 0),
        "concept_loss": ("loss", 1000, 2),
        "other_loss": ("loss, others", 1000, 2),
        "concept": ("V\\* right", 1, 1),
        "retention": ("others right", 1, 1),
        "products_error": ("products off", 100, 2),
        "products_error_as_trained": ("as trained", 100, 2),
        "output_error": ("outputs off", 100, 1),
    }
    tables = []
    for kind in ("budgets", "cuts", "storages"):
        rows = results[kind]
        shown = [key for key in heads if any(key in values[0] for values in rows.values())]
        cells = [
            [name, *(spread([heads[key][1] * v[key] for v in values if key in v], heads[key][2]) for key in shown)]
            for name, values in rows.items()
        ]
        tables.append(table([kind, *(heads[key][0] for key in shown)], cells))
    return f"{results['steps']} steps, {len(results['seeds'])} seeds.\n\n" + "\n".join(tables)


#: Name of a file, or its beginning and ``*`` -> its section.
SECTIONS = {
    "training_free": Section(
        _ACCURACY, "training_free.py", "A ViT on CIFAR-10", "2.69 M parameters, patch 4.", _training_free
    ),
    "rotary_training_free": Section(
        _ACCURACY, "rotary_training_free.py", "A rotary, gated ViT", "Rotary pairs and gated FFNs.", _plain
    ),
    "features_training_free": Section(
        _ACCURACY, "features_training_free.py", "Features", "The body alone, without a classifier.", _features
    ),
    "stock": Section(
        _ACCURACY, "stock.py", "Stock models", "One width for all layers (`--stock`) against free widths.", _stock
    ),
    "finetuned": Section(_TUNED, "finetuned.py", "A short fine-tune", "Distilled from the dense model.", _finetuned),
    "finetuned_long": Section(_TUNED, "finetuned.py", "Four times as many images", "The same otherwise.", _finetuned),
    "throughput_*": Section(
        _SPEED, "throughput.py", "Throughput", "*Realized* is the speed-up over the MAC ratio.", _throughput
    ),
    "factorize": Section(_SPEED, "factorize.py", "Factoring", "Data-free, in float64.", _factorize),
    "calibration_memory*": Section(
        _SPEED,
        "calibration_memory.py",
        "Memory of a calibration",
        "It does not grow with the images.",
        lambda results: records(results["rows"]),
    ),
    "search_step*": Section(
        _SPEED, "search_step.py", "One step of the rank search", "Gates against mixed candidate matrices.", _search
    ),
    "runtimes": Section(
        _OTHERS,
        "runtimes.py",
        "Plans by MACs, plans by latency",
        "`speed`: random weights, half the MACs against half the time. `accuracy`: a teacher on CIFAR-10, half the "
        "time against the plan by MACs that takes as long.",
        latency_tables,
    ),
    "int8": Section(
        _OTHERS,
        "int8.py",
        "Int8",
        "Training-free, over samples of calibration images; all layers, and as many as stay within the default "
        "tolerance.",
        int8_tables,
    ),
    "export_parity": Section(
        _OTHERS,
        "export_parity.py",
        "What files differ by",
        "From PyTorch in float32, in units of the largest output.",
        parity_table,
    ),
    "customize_demo": Section(
        _OWN, "customize_demo.py", "A digit that the base never saw", "A tiny Stable Diffusion, five images.", _demo
    ),
    "customize_methods": Section(
        _OWN,
        "customize_methods.py",
        "Methods on scenes of digits",
        "A tiny Stable Diffusion draws digits in four colors, on four sides, single and in pairs; each of two that it "
        "never saw is taught from five images of single ones, with captions, and asked for in all 32 ways.",
        method_tables,
    ),
    "adapter_bytes": Section(
        _OWN,
        "adapter_bytes.py",
        "Adapters by their bytes",
        "A digit that the base never saw, from five images. Losses are those of scans that nothing was taught with, in "
        "thousandths, on the same noise for all; products and outputs are off by percent of what the adapter does.",
        _bytes,
    ),
    "judge_digits": Section(
        _OWN,
        "judge_digits.py",
        "What comcat judge tells apart",
        "A vision transformer of digits looks at what half-taught and taught adapters draw, and so does a classifier.",
        _judged,
    ),
    "customize_step_*": Section(
        _OWN, "customize_step.py", "One training step at the shapes of Stable Diffusion 1.4", "Random weights.", _step
    ),
}


#: Shown elsewhere, or no tables.
ELSEWHERE = ("coverage", "recipes", "finetune_distributed")


def result_pages(folder: Path) -> dict[str, str]:
    """Name and text of every page; rows of files that have no section of their own are on the last as they are."""
    found: dict[str, list[str]] = {page: [] for page in PAGES}
    left = {file for file in sorted(folder.glob("*.json")) if file.stem not in ELSEWHERE}
    for pattern, section in SECTIONS.items():
        files = sorted(folder.glob(f"{pattern}.json"))
        left -= set(files)
        for file in files:
            results = json.loads(file.read_text())
            variant = _variant(file, pattern, results) if len(files) > 1 else ""
            title = f"{section.title}: {variant}" if variant else section.title
            body = section.body(results)
            gap = "\n\n" if body.startswith("|") else " "
            made = f"Made by `benchmarks/{section.script}`, {_versions(results)}."
            found[section.page].append(f"## {title}\n\n{section.text}{gap}{body}\n{made}\n")
    pages = {page: "\n".join([f"# {PAGES[page][0]}\n", f"{PAGES[page][1]}\n", *parts]) for page, parts in found.items()}
    more = [part for file in sorted(left) if (part := _as_it_is(file))]
    return {**pages, "results/more.md": "\n".join(["# More results\n", *more])} if more else pages


def _as_it_is(file: Path) -> str | None:
    """The rows of a file, where it has any."""
    results = json.loads(file.read_text())
    rows = results.get("rows") if isinstance(results, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    return f"## {file.stem.replace('_', ' ')}\n\n{records(rows)}\nFrom `benchmarks/results/{file.name}`.\n"


def _variant(file: Path, pattern: str, results: Results) -> str:
    if "model" in results and "device" in results:
        return f"{results['model']} on {results['device']}, {results['dtype']}"
    return file.stem.removeprefix(pattern.rstrip("*")).strip("_").replace("_", " ")


def _versions(results: Results) -> str:
    said = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in results["versions"].items())
    threads = results["threads"] if "threads" in results else results["settings"]["threads"]
    return f"{said}, {threads} thread{'' if threads == 1 else 's'}"
