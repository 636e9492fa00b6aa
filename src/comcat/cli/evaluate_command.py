"""``comcat evaluate``: accuracy and speed of a model, small or dense."""

from __future__ import annotations

from typing import Annotated

from . import options as opt
from .config_options import reads_images
from .console import Screen, command
from .inputs import Reading, ReadingOf, check_input_file, parse_device, parse_model_args, report_skipped
from .judging import Judge, Judging
from .making import told
from .prompting import parse_prompting


@command
@reads_images
def evaluate(
    model: opt.Model,
    data: opt.Data,
    checkpoint: opt.Checkpoint = None,
    model_arg: opt.ModelArgs = None,
    reference: Annotated[
        str | None,
        opt.Option(
            metavar="MODEL",
            help="Also say how often the answers equal those of this model.",
            rich_help_panel=opt.MODEL,
        ),
    ] = None,
    split: opt.EvaluatedSplit = None,
    metric: opt.MetricOption = None,
    prompts: opt.Prompts = None,
    templates: opt.Templates = None,
    class_names: opt.ClassNames = None,
    text: opt.TextModel = None,
    boxes: opt.Boxes = "xywh",
    eval_images: opt.EvalImages = None,
    reading_of: ReadingOf = Reading,
    batch_size: opt.BatchSize = 64,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    seed: opt.Seed = 0,
    json_output: opt.Json = False,
) -> None:
    """Top-1, top-5, loss and images per second of MODEL on DATA, or a metric of your own.

    A model of images and text is asked for the classes with --prompts; detectors get COCO's average precision.

    [dim]comcat evaluate deit-half --data imagenet/[/dim]
    """
    args = parse_model_args(model_arg)
    prompting = parse_prompting(prompts, templates, text, metric)
    judging = Judging(metric, prompting, boxes, class_names)
    screen = Screen(json_output)
    with screen:
        import torch

        import comcat

        from ..data import loader
        from ..evaluation.measure import agreement
        from ..evaluation.measure import evaluate as measure

        check_input_file(checkpoint, "--checkpoint")
        judging.check()
        torch.manual_seed(seed)
        target = parse_device(device)
        with told(screen):
            loaded = comcat.load_model(model, checkpoint=checkpoint, model_args=args).to(target)
            other = comcat.load_model(reference).to(target) if reference else None
        reading = reading_of(data)
        judge = Judge(judging, reading, split, loaded, model, target, screen, other is not None)
        images = judge.data
        cost = comcat.profile(loaded)
        batches = loader(images, batch_size, workers, eval_images)
        result = measure(loaded, batches, progress=screen.progress, **judge.arguments(other))
        same = None
        if other is not None:
            same = agreement(loaded, other, batches, progress=screen.progress, zero_shot=judge.zero_shot)
    report_skipped(screen, batches.skipped)

    from ..report import tables

    place = f"{model} on {data}" + (f", split {images.split}" if images.split else "")
    screen.out.print(tables.evaluation(place, result, cost.params, cost.macs))
    if same is not None and same.outputs == "features":
        near = same.scores.get("neighbours")
        nearest = "" if near is None else f", same nearest neighbour of {near:.2f} % of images"
        screen.say(f"features against {reference}: cosine {same.cosine:.4f}, relative error {same.kl:.4f}{nearest}")
    elif same is not None and same.outputs == "detections":
        screen.say(f"detections against those that {reference} is sure of: mAP {same.scores['map']:.2f} %")
    elif same is not None:
        screen.say(f"same answer as {reference}: {same.same:.2f} % of images, KL {same.kl:.4f} nats")
    screen.result(
        {
            "model": model,
            "data": data,
            "split": images.split,
            "params": cost.params,
            "macs": cost.macs,
            **result.to_dict(),
            "skipped_images": batches.skipped,
            "agreement": same.to_dict() if same else None,
        }
    )
