"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Option = typer.Option
MODEL = "Model"
DATA = "Data"
RUN = "Run"
TEXTS = "Zero-shot"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory (saved by comcat, or by save_pretrained of transformers), a timm name, "
        "[bold]torchvision/NAME[/bold], [bold]open_clip/NAME/TAG[/bold], a Hub repository [bold]ORG/NAME[/bold] or "
        "[bold]hf-hub:[/bold] name, or, with --checkpoint, an architecture name.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    Option(help="Weights for the architecture MODEL (.safetensors).", rich_help_panel=MODEL),
]
ModelArgs = Annotated[
    list[str] | None,
    Option(
        "--model-arg",
        metavar="NAME=VALUE",
        help="Argument of the architecture, e.g. img_size=32 for timm, or an entry of transformers' configuration; "
        "repeatable.",
        rich_help_panel=MODEL,
    ),
]
_DATA = Option(
    metavar="DATA",
    help="Folder of images (one folder per class), folder of parquet files, or a timm data set: "
    "hfds/NAME, wds/NAME, torch/NAME.",
    rich_help_panel=DATA,
)
Data = Annotated[str, _DATA]
OptionalData = Annotated[str | None, _DATA]
DataRoot = Annotated[
    Path | None,
    Option(help="Where torch/ and wds/ data sets lie.", rich_help_panel=DATA),
]
ClassMap = Annotated[
    Path | None,
    Option(
        help="Class folder names, one per line, in the order of the model's outputs; alphabetical otherwise.",
        rich_help_panel=DATA,
    ),
]
SkipBad = Annotated[
    bool,
    Option(
        "--skip-bad-images",
        help="Leave out images that cannot be read, instead of stopping.",
        rich_help_panel=DATA,
    ),
]
Mean = Annotated[
    tuple[float, float, float] | None,
    Option(metavar="R G B", help="Mean of the normalization; from the model otherwise.", rich_help_panel=DATA),
]
Std = Annotated[
    tuple[float, float, float] | None,
    Option(metavar="R G B", help="Standard deviation of the normalization.", rich_help_panel=DATA),
]
CropPct = Annotated[
    float | None,
    Option(
        min=0.01,
        max=1.0,
        help="Centre crop after resizing, as a fraction; images of the model's size are taken as is.",
        rich_help_panel=DATA,
    ),
]
Interpolation = Annotated[
    str | None,
    Option(metavar="NAME", help="bilinear, bicubic, ...; from the model otherwise.", rich_help_panel=DATA),
]
EvaluatedSplit = Annotated[str | None, Option(help="validation, val or test otherwise.", rich_help_panel=DATA)]
EvalSplit = Annotated[str | None, Option(help="Split to evaluate on; validation, val or test.", rich_help_panel=DATA)]
EvalImages = Annotated[
    int | None,
    Option(min=1, metavar="N", help="Evaluate on the first N images only.", rich_help_panel=DATA),
]
MetricOption = Annotated[
    str | None,
    Option(
        "--metric",
        metavar="MODULE:FUNCTION",
        help="Score by function(model, loader) of a module in the working directory, instead of by the outputs' kind.",
        rich_help_panel=RUN,
    ),
]
Prompts = Annotated[
    list[str] | None,
    Option(
        "--prompts",
        metavar="TEXT",
        help="Zero-shot, of a model of images and text: a class is what this says, e.g. 'a photo of a {}'; repeatable.",
        rich_help_panel=TEXTS,
    ),
]
Templates = Annotated[
    Path | None, Option(metavar="FILE", help="A file of such prompts, one a line.", rich_help_panel=TEXTS)
]
ClassNames = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        help="Names of the data's classes, one a line in the order of the labels; as the data has them otherwise.",
        rich_help_panel=TEXTS,
    ),
]
TextModel = Annotated[
    str | None,
    Option(
        "--text",
        metavar="MODEL",
        help="The model of images and text whose tokenizer, and for an image tower whose text tower, reads the "
        "prompts; MODEL otherwise.",
        rich_help_panel=TEXTS,
    ),
]
Boxes = Annotated[
    str,
    Option(
        metavar="xywh|xyxy",
        help="Detectors: boxes of the data's column objects as corner, width and height, or as two corners, in pixels.",
        rich_help_panel=DATA,
    ),
]
#: Panel of how pictures are drawn.
IMAGES = "Images"
Seeds = Annotated[
    str, Option(metavar="N,N-N", help="One image per prompt for each, e.g. 0-3,7.", rich_help_panel=IMAGES)
]
Steps = Annotated[int | None, Option(min=1, help="Sampling steps; the pipeline's own.", rich_help_panel=IMAGES)]
Guidance = Annotated[float | None, Option(help="Guidance scale; the pipeline's own.", rich_help_panel=IMAGES)]
NegativePrompt = Annotated[str | None, Option(metavar="TEXT", help="What not to draw.", rich_help_panel=IMAGES)]
Pixels = Annotated[int | None, Option(min=8, help="Pixels; the model's own.", rich_help_panel=IMAGES)]
BatchSize = Annotated[int, Option(min=1, help="Images in a batch.", rich_help_panel=RUN)]
Workers = Annotated[
    int | None,
    Option(min=0, help="Processes that read images; 0 or 2 by the size of the data.", rich_help_panel=RUN),
]
Device = Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.", rich_help_panel=RUN)]
TrainingDevice = Annotated[str, Option(metavar="auto|cpu", help="auto takes the GPUs there are.", rich_help_panel=RUN)]
Seed = Annotated[int, Option(help="Choice of calibration images and everything random.", rich_help_panel=RUN)]
Json = Annotated[bool, Option("--json", help="Print one JSON document and nothing else.", rich_help_panel=RUN)]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what the output directory holds.", rich_help_panel=RUN)]

#: How images are read, by the parameter's name: the field of :class:`~comcat.cli.inputs.Reading`, type and default.
READING = {
    "data_root": ("root", DataRoot, None),
    "class_map": ("class_map", ClassMap, None),
    "skip_bad_images": ("skip_bad", SkipBad, False),
    "mean": ("mean", Mean, None),
    "std": ("std", Std, None),
    "crop_pct": ("crop_pct", CropPct, None),
    "interpolation": ("interpolation", Interpolation, None),
}
