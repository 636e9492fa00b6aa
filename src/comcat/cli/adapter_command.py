"""``comcat adapter``: look into an adapter file, convert it, and see what a conversion costs."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..report import format as fmt
from ..report.text import one_line
from . import options as opt
from .console import Screen, command
from .customize_command import Device, Variant, adapter_name
from .inputs import check_output_file, parse_bytes, parse_device

app = typer.Typer(help="Look into adapter files and convert them.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(metavar="FILE", help="An adapter or a LoRA (.safetensors).")]
BaseOption = Annotated[
    str | None, opt.Option("--base", metavar="BASE", help="The pipeline it is for: a directory or a name on the Hub.")
]
Prompts = Annotated[
    list[str] | None,
    opt.Option(
        "--prompt", metavar="TEXT", help="What to draw to see the layers' inputs; the prompt it was taught with."
    ),
]
DataFree = Annotated[bool, opt.Option("--data-free", help="Do not draw anything: weigh all inputs alike.")]
LoraRank = Annotated[int | None, opt.Option("--lora-rank", min=1, help="Cut the LoRA to this rank; heads times rank.")]


@app.command()
@command
def info(file: File, json_output: opt.Json = False) -> None:
    """What an adapter file holds, without its base model."""
    from ..customize.files.adapter_file import read_adapter
    from ..customize.files.contents import check_contents
    from ..report.format import count, size

    screen = Screen(json_output)
    header, tensors = read_adapter(file)
    check_contents(header, tensors, file)
    parameters = sum(t.numel() for t in tensors.values())
    document = {**asdict(header), "bytes": file.stat().st_size, "parameters": parameters}
    for line in _lines(header, f"{size(file.stat().st_size)}, {count(parameters)} parameters"):
        screen.say(*line)
    screen.result(document)


def _lines(header: Any, amount: str) -> list[list[str | tuple[object, str]]]:
    lines = [
        f"  base       {header.base.get('name') or 'unnamed'} ({header.base.get('class', '?')})",
        f"  strength   {header.scale:g}",
    ]
    if header.token:
        vectors = header.token["vectors"]
        lines.append(f"  token      {header.token['text']} ({vectors} vector{'s' if vectors > 1 else ''})")
    if header.prompt:
        lines.append(f"  prompt     {header.prompt}")
    for component, part in header.components.items():
        ranks = sorted({entry.rank for entry in part.layers.values()})
        shown = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}" if ranks else "no products"
        lines.append(f"  {component:<10} {len(part.layers)} attention layers of {part.model}, {shown}")
    if header.training:
        known = ("steps", "batch_size", "lr", "photos", "class_images", "final_loss", "max_bytes", "components")
        lines.append("  training   " + ", ".join(f"{k} {header.training[k]}" for k in known if k in header.training))
    said: list[list[str | tuple[object, str]]] = [[(header.name, "bold"), f"  {amount}, stored as {header.storage}"]]
    said += [[one_line(line)] for line in lines]
    return said


@app.command()
@command
def convert(
    file: File,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (.safetensors).")],
    to: Annotated[str, opt.Option(metavar="FORMAT", help="diffusers or kohya (a LoRA), or comcat (an adapter).")],
    base: BaseOption = None,
    rank: Annotated[int | None, opt.Option(min=1, help="Of the adapter's products, to comcat from a LoRA.")] = None,
    lora_rank: LoraRank = None,
    scale: Annotated[float | None, opt.Option(help="Strength at which to convert; the file's own.")] = None,
    storage: Annotated[
        str, opt.Option(metavar="TYPE", help="float32, float16, bfloat16, int8 or nf4 (to comcat).")
    ] = "float16",
    prompt: Prompts = None,
    data_free: DataFree = False,
    lora_alpha: Annotated[
        float | None, opt.Option("--lora-alpha", help="Alpha of a LoRA that does not say it, to comcat.", metavar="X")
    ] = None,
    partial: Annotated[
        bool, opt.Option("--partial", help="Leave out of a LoRA what products cannot express, and name it.")
    ] = False,
    variant: Variant = None,
    device: Device = "auto",
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace OUT.")] = False,
    json_output: opt.Json = False,
) -> None:
    """Turn an adapter into an ordinary LoRA, a LoRA into an adapter, or an adapter into another storage.

    A conversion to or from LoRA is the nearest in that format, not exact; the error is printed.
    """
    screen = Screen(json_output)
    with screen:
        from ..customize.files.header import STORAGES
        from ..customize.lora.exporting import embedding_path

        if to not in ("diffusers", "kohya", "comcat"):
            raise typer.BadParameter(f"{to!r} is not diffusers, kohya or comcat", param_hint="--to")
        if storage not in STORAGES:
            raise typer.BadParameter(f"{storage!r} is not one of {', '.join(STORAGES)}", param_hint="--storage")
        if os.path.exists(out) and os.path.exists(file) and os.path.samefile(file, out):
            raise typer.BadParameter("is FILE itself, of which a conversion loses something", param_hint="OUT")
        check_output_file(out, overwrite)
        if to != "comcat":
            if rank is not None or lora_alpha is not None or partial:
                raise typer.BadParameter(
                    f"{to} takes no --rank, --lora-alpha and --partial, which are for --to comcat", param_hint="--to"
                )
            check_output_file(embedding_path(out), overwrite)
        if to == "comcat":
            document = _to_comcat(
                screen, file, out, base, rank, storage, scale, prompt, lora_alpha, partial, variant, device
            )
        else:
            wanted = _AsLora(file, base, lora_rank, scale, prompt, data_free, variant, device)
            document = _to_lora(screen, wanted, out, to)
    screen.result({"out": str(out), "bytes": out.stat().st_size, **document})


def _to_comcat(
    screen: Screen,
    file: Path,
    out: Path,
    base: str | None,
    rank: int | None,
    storage: Any,
    scale: float | None,
    prompt: list[str] | None,
    lora_alpha: float | None,
    partial: bool,
    variant: str | None,
    device: str,
) -> dict[str, Any]:
    from ..customize.files.adapter_file import write_adapter
    from ..customize.files.restoring import is_adapter, restore_adapter

    if is_adapter(file):
        if rank is not None or lora_alpha is not None or partial:
            raise typer.BadParameter(
                "is an adapter of comcat, and keeps its ranks: leave out --rank, --lora-alpha and --partial, which are "
                "for LoRAs",
                param_hint="FILE",
            )
        off = restore_adapter(file, out, storage, scale)
        said, output = f"; its products are {fmt.error(off)} off", None
        if base is not None:
            from ..customize.lora.denoiser_probe import difference

            output = difference(_open(screen, base, variant, device), file, out, prompt[0] if prompt else None)
            said += f", the denoiser's output {fmt.error(output)} of what the adapter changes"
        screen.done((out, "bold"), f": the same adapter, stored as {storage}{said}")
        return {"storage": storage, "products_error": off, "output_error": output}
    from ..customize.lora.importing import import_lora
    from ..report.adapter_tables import conversion as table

    if rank is None:
        raise typer.BadParameter("say which rank the adapter's products are to have, e.g. 4", param_hint="--rank")
    pipe = _open(screen, base, variant, device)
    handle, conversion = import_lora(
        pipe, file, rank=rank, name=adapter_name(out), partial=partial, lora_alpha=lora_alpha
    )
    for note in conversion.notes:
        screen.note(note)
    if scale is not None:
        handle.scale = scale
    handle.info["base"] = base
    write_adapter(handle, out, storage)
    screen.out.print(table(conversion, "from a LoRA"))
    return conversion.to_dict()


def _to_lora(screen: Screen, wanted: _AsLora, out: Path, layout: Any) -> dict[str, Any]:
    from ..customize.lora.exporting import embedding_path, write_lora
    from ..report.adapter_tables import conversion as table

    handle, factors, result, output = wanted.convert(screen)
    write_lora(handle, factors, out, layout)
    screen.out.print(table(result, f"as a LoRA ({layout})", output))
    if handle.token is not None:
        screen.say("the token's vectors: ", (embedding_path(out), "bold"))
    return {**result.to_dict(), "output_error": output}


@app.command()
@command
def shrink(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An adapter (.safetensors).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write (.safetensors).")],
    max_bytes: Annotated[str, opt.Option(metavar="SIZE", help="Largest file, e.g. 1M or 500KiB.")],
    base: BaseOption = None,
    storage: Annotated[str, opt.Option(metavar="TYPE", help="float32, float16, bfloat16, int8 or nf4.")] = "float16",
    prompt: Annotated[
        list[str] | None, opt.Option(metavar="TEXT", help="What it is used for; the prompt it was taught with.")
    ] = None,
    images: Annotated[int, opt.Option(min=1, help="To draw for each prompt.")] = 4,
    variant: Variant = None,
    device: Device = "auto",
    overwrite: Annotated[bool, opt.Option("--overwrite", help="Replace OUT.")] = False,
    json_output: opt.Json = False,
) -> None:
    """Keep the components of an adapter that change most what BASE draws, as many as fit into SIZE.

    [dim]comcat adapter shrink dog.safetensors small.safetensors --max-bytes 500k --storage nf4 --base BASE[/dim]
    """
    screen = Screen(json_output)
    with screen:
        from ..customize.files.adapter_file import load_adapter, read_adapter, write_adapter
        from ..customize.files.header import STORAGES
        from ..customize.lora.denoiser_probe import difference
        from ..customize.shrinking.shrink import shrink_adapter

        if storage not in STORAGES:
            raise typer.BadParameter(f"{storage!r} is not one of {', '.join(STORAGES)}", param_hint="--storage")
        if os.path.exists(out) and os.path.exists(file) and os.path.samefile(file, out):
            raise typer.BadParameter("is FILE itself, of which shrinking loses something", param_hint="OUT")
        check_output_file(out, overwrite)
        limit = parse_bytes(max_bytes, "--max-bytes")
        assert limit is not None
        read_adapter(file)
        pipe = _open(screen, base, variant, device)
        handle = load_adapter(pipe, file)
        found = shrink_adapter(
            pipe,
            limit,
            name=handle.name,
            storage=storage,
            prompts=prompt or (),
            images=images,
            progress=screen.progress,
        )
        write_adapter(handle, out, storage)
        handle.remove()
        output = difference(pipe, file, out, prompt[0] if prompt else None)
    screen.done(
        (out, "bold"),
        f": {fmt.size(out.stat().st_size)}, {found.components} of {found.of} components as {storage}; the denoiser's "
        f"output is {fmt.error(output)} off of what the adapter changes",
    )
    screen.result({"out": str(out), **found.to_dict(), "storage": storage, "output_error": output})


@app.command("merge-report")
@command
def merge_report(
    file: File,
    base: BaseOption = None,
    lora_rank: LoraRank = None,
    scale: Annotated[float | None, opt.Option(help="Strength; the file's own.")] = None,
    prompt: Prompts = None,
    data_free: DataFree = False,
    variant: Variant = None,
    device: Device = "auto",
    json_output: opt.Json = False,
) -> None:
    """What would be lost if the adapter became a LoRA, or were merged into the weights: layer by layer."""
    screen = Screen(json_output)
    with screen:
        from ..report.adapter_tables import conversion as table

        wanted = _AsLora(file, base, lora_rank, scale, prompt, data_free, variant, device)
        _, _, result, output = wanted.convert(screen)
    screen.out.print(table(result, "as a LoRA", output))
    screen.result({**result.to_dict(), "output_error": output})


@dataclass(frozen=True)
class _AsLora:
    """An adapter that is to become a LoRA, as the options say it."""

    file: Path
    base: str | None
    rank: int | None
    scale: float | None
    prompts: list[str] | None
    data_free: bool
    variant: str | None
    device: str

    def convert(self, screen: Screen) -> Any:
        """The adapter, the LoRA's factors, what is lost by layer, and the difference of what is drawn."""
        from ..customize.files.adapter_file import load_adapter, read_adapter
        from ..customize.lora.denoiser_moments import no_roots, record
        from ..customize.lora.denoiser_probe import output_error
        from ..customize.lora.exporting import as_lora
        from ..errors import DataError

        read_adapter(self.file)
        pipe = _open(screen, self.base, self.variant, self.device)
        handle = load_adapter(pipe, self.file, scale=self.scale)
        texts = self.prompts or ([handle.info["prompt"]] if handle.info.get("prompt") else [])
        if not texts and not self.data_free:
            raise DataError("the file does not say what it was taught with; give --prompt, or --data-free")
        roots = no_roots if self.data_free else record(handle, texts, progress=screen.progress).roots
        factors, result = as_lora(handle, rank=self.rank, roots=roots, progress=screen.progress)
        return handle, factors, result, output_error(handle, factors, texts[0] if texts else "")


def _open(screen: Screen, base: str | None, variant: str | None, device: str) -> Any:
    from ..customize.pipelines import open_pipeline

    if base is None:
        raise typer.BadParameter("this needs the base model's weights", param_hint="--base")
    return open_pipeline(base, "no", parse_device(device), variant, screen.note)
