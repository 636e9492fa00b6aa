"""A folder of photos and their captions, as customization of a text-to-image model reads it.

    find_photos   folder         -> photos     every file decoded once, so that nothing fails later
    buckets       resolution     -> shapes     that batches may have, one per aspect ratio
    check_sizes   photos         refuses those that would have to be enlarged
    frame         photo, bucket  -> framing    resize and crop, and what SDXL is told of them
    load_photo    photo, bucket  -> (3, h, w)  in [-1, 1]

Nothing here draws random numbers: the caller gives the position of the crop and says whether to mirror.
Sources: DreamBooth (arXiv:2208.12242); SDXL (arXiv:2307.01952), section 2 for micro-conditioning and buckets.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...errors import DataError
from ...storage import reader
from ...wording import some

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
METADATA = "metadata.jsonl"
CAPTIONS_LIMIT = 4 << 20  # bytes
CAPTION_KEYS = ("text", "caption", "prompt")  # the first that a line has is its caption
EXAMPLES = {"--prompt": "a photo of sks dog", "--class-prompt": "a photo of a dog"}
_REPAIR = "Repair or remove it, or leave such photos out: --skip-bad-images"


@dataclass(frozen=True)
class Photo:
    """An image that can be read, its caption, and its (height, width) once EXIF orientation is applied."""

    path: Path
    caption: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Bucket:
    """The shape, in pixels, that photos of similar aspect ratio are brought to."""

    height: int
    width: int


@dataclass(frozen=True)
class Framing:
    """How a photo is resized, mirrored if so wanted, then cropped; pairs are (vertical, horizontal) pixels."""

    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """The six numbers of SDXL's micro-conditioning, in the order of its ``add_time_ids``."""
        return self.original_size + self.crop_top_left + self.target_size


def find_photos(
    folder: Path,
    prompt: str | None,
    *,
    skip_bad: bool = False,
    note: Callable[[str], None] | None = None,
    option: str = "--prompt",
) -> list[Photo]:
    """The photos directly in ``folder``, sorted by name, each with its caption. Hidden files are ignored.

    The caption of ``dog.jpg`` is the text of ``dog.txt``, or of its line in ``metadata.jsonl``
    (``{"file_name": "dog.jpg", "text": "a dog"}``, as in the Hub's ImageFolder), blanks collapsed; else ``prompt``.
    With ``skip_bad``, photos that cannot be decoded are left out. ``note`` is told of them, and of ignored files;
    ``option`` is where ``prompt`` comes from, for messages.

    Raises:
        DataError: a photo or the folder cannot be read; there are no photos; a caption is missing or malformed.
    """
    tell = note or (lambda _: None)
    files, images, others = _list_images(Path(folder).expanduser())
    captions = _find_captions(files, images, prompt, option)
    stems = {path.stem for path in images.values()}
    useful = {METADATA, *images, *(f.name for f in files if f.suffix.lower() == ".txt" and f.stem in stems)}
    if useless := sorted({*(f.name for f in files if f.name not in useful), *others}):
        tell(f"ignored, as neither photos ({', '.join(EXTENSIONS)}) nor captions of one: {some(map(repr, useless))}")
    photos: list[Photo] = []
    for name, path in images.items():
        try:
            image, frames = _decode_first(path)
            photos.append(Photo(path, captions[name], image.size[::-1]))
            if frames > 1:
                tell(f"of {name!r}, which holds {frames} images, the first one is used")
        except DataError as e:
            if not skip_bad:
                raise
            tell(f"left out: {str(e).removesuffix(_REPAIR).rstrip('. ')}")
    if not photos:
        raise DataError(f"none of the photos in {folder} can be read: {some(map(repr, images))}. Replace them")
    return photos


def why_no_photo(path: Path) -> str:
    """Why a file cannot be a photo, in words; empty where it can."""
    if path.suffix.lower() not in EXTENSIONS:
        return f"{path.name!r} is no photo that can be read: such end in {', '.join(EXTENSIONS)}"
    try:
        decode(path)
    except DataError as e:
        return str(e).removesuffix(_REPAIR).rstrip(". ")
    return ""


def buckets(resolution: int, multiple: int, *, max_ratio: float = 2.0) -> list[Bucket]:
    """The shapes that photos of any aspect ratio are brought to, from the tallest to the widest.

    Every long side from ``resolution`` on, with the longest short side that keeps the area within
    ``resolution ** 2``, upright and lying; both are multiples of ``multiple``, in pixels, and their ratio is at
    most ``max_ratio``. The square is always there; ``max_ratio=1`` leaves only it.

    Raises:
        DataError: the resolution is not a positive multiple of ``multiple``, or ``max_ratio`` is below 1.
    """
    if resolution < multiple or resolution % multiple:
        below = resolution // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below > 0 else multiple
        raise DataError(f"the resolution {resolution} is not a multiple of {multiple}, as it must be. Use {nearest}")
    if not max_ratio >= 1:  # also NaN
        raise DataError(f"the largest aspect ratio must be at least 1 (squares only), not {max_ratio}")
    found = [Bucket(resolution, resolution)]
    for long in range(resolution + multiple, resolution**2 // multiple + 1, multiple):
        short = resolution**2 // long // multiple * multiple
        if long > max_ratio * short:
            break
        found += [Bucket(long, short), Bucket(short, long)]
    return sorted(found, key=lambda b: b.width / b.height)


def assign(photo_size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest to a photo of (height, width) in log aspect ratio; of equally near ones the first."""
    height, width = photo_size
    return min(buckets, key=lambda b: abs(math.log(b.width * height / (b.height * width))))


def check_sizes(
    photos: Sequence[Photo], resolution: int, *, multiple: int = 8, max_ratio: float = 2.0, allow_upscale: bool = False
) -> None:
    """Refuse photos that are smaller than their bucket: enlarged, they would teach the model to blur.

    The DataError names the largest resolution at which none is enlarged; that of :func:`buckets` comes first.
    """
    shapes, sizes = buckets(resolution, multiple, max_ratio=max_ratio), {p.size for p in photos}
    small = [p for p in photos if not _covers(p.size, shapes)]
    if allow_upscale or not small:
        return
    lower = (
        f"--resolution {r}, "
        for r in range(resolution - multiple, 0, -multiple)
        if all(_covers(size, shapes) for shapes in [buckets(r, multiple, max_ratio=max_ratio)] for size in sizes)
    )
    pairs = [(p, assign(p.size, shapes)) for p in small]
    named = [f"{p.path.name!r} is {p.size[1]} x {p.size[0]}, not {b.width} x {b.height}" for p, b in pairs]
    raise DataError(
        f"photos smaller than the resolution {resolution} needs ({len(small)} of {len(photos)}): "
        f"{some(named, '; ')}. Use larger photos, {next(lower, '')}or enlarge them: --allow-upscale"
    )


def frame(photo_size: tuple[int, int], bucket: Bucket, *, crop: tuple[float, float] = (0.5, 0.5)) -> Framing:
    """How a photo of (height, width) is resized to cover ``bucket``, and where it is cropped.

    ``crop`` is the position of the crop, 0 to 1 from top to bottom and from left to right; ValueError outside.
    """
    if not all(0 <= c <= 1 for c in crop):
        raise ValueError(f"the crop position must be two numbers in [0, 1], not {crop}")
    (h, w), target = photo_size, (bucket.height, bucket.width)
    scale = max(bucket.height / h, bucket.width / w)
    resized = max(bucket.height, round(h * scale)), max(bucket.width, round(w * scale))
    top_left = round(crop[0] * (resized[0] - bucket.height)), round(crop[1] * (resized[1] - bucket.width))
    return Framing(photo_size, resized, top_left, target)


def load_photo(photo: Photo, bucket: Bucket, *, flip: bool = False, crop: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """The photo as :func:`frame` describes it: resized with antialiasing, mirrored if ``flip``, then cropped.

    Returns (3, bucket.height, bucket.width), float32, in [-1, 1]. Transparency becomes white; colour profiles are
    not applied. DataError if the file cannot be read any more, or changed its size since it was found.
    """
    framing = frame(photo.size, bucket, crop=crop)
    image = decode(photo.path)
    if image.size[::-1] != photo.size:
        raise DataError(f"the photo {photo.path.name!r} changed its size while it was in use. Start again")
    image = image.resize(framing.resized_size[::-1], Image.Resampling.LANCZOS)
    image = ImageOps.mirror(image) if flip else image
    top, left = framing.crop_top_left
    pixels = np.array(image.crop((left, top, left + bucket.width, top + bucket.height)))  # (h, w, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(127.5).sub(1)


def _list_images(folder: Path) -> tuple[list[Path], dict[str, Path], list[str]]:
    """All visible files of the folder, sorted by name, the images among them by name, and what is no file."""
    try:
        if not folder.exists():
            raise DataError(f"there is no folder {folder}. Give the folder that holds the photos")
        if not folder.is_dir():
            raise DataError(f"{folder} is a file. Give the folder that holds it")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
        entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
        files = [e for e in entries if e.is_file() or not e.exists()]  # a dangling link will be refused by name
    except OSError as e:
        raise DataError(f"{folder} cannot be read ({e.strerror}). Check its permissions: ls -ld {folder}") from e
    if not entries:
        raise DataError(f"the folder {folder} is empty. Put the photos into it")
    images = {f.name: f for f in files if f.suffix.lower() in EXTENSIONS}
    if not images:
        found = f"{some(repr(e.name) for e in entries)}, and photos end in {', '.join(EXTENSIONS)}"
        raise DataError(f"no photos in {folder}: it holds {found}. Give the folder that holds them, or convert them")
    return files, images, [e.name for e in entries if e not in files]


def _find_captions(
    files: list[Path], images: dict[str, Path], prompt: str | None, option: str = "--prompt"
) -> dict[str, str]:
    """The caption of every image, by name."""
    if prompt is not None and not prompt.strip():
        raise DataError(f"the prompt is empty. Say what the photos show: {option} '{EXAMPLES[option]}'")
    listed = next((_read_metadata(f, images) for f in files if f.name == METADATA), {})
    sidecars = {f.stem: f for f in files if f.suffix.lower() == ".txt"}
    captions = dict.fromkeys(images, prompt) | listed
    for name, path in images.items():
        if sidecar := sidecars.get(path.stem):
            if name in listed:
                raise DataError(f"the photo {name!r} has two captions, in {sidecar.name!r} and {METADATA}. Remove one")
            captions[name] = " ".join(_read_text(sidecar).split())
            if not captions[name]:
                raise DataError(f"the caption file {sidecar.name!r} is empty. Write the caption into it, or remove it")
    if bare := [name for name in images if captions[name] is None]:
        fix = f"{option} '{EXAMPLES[option]}', or each its own ({Path(bare[0]).stem}.txt, or a line in {METADATA})"
        raise DataError(f"no caption for {some(map(repr, bare))}. Give {fix}")
    return {name: str(caption) for name, caption in captions.items()}


def _read_metadata(path: Path, images: dict[str, Path]) -> dict[str, str]:
    """The captions in ``metadata.jsonl``, by the name of their image."""
    captions: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        where = f"line {number} of {path}"
        if not line.strip():
            continue
        try:
            entry = reader.parse_json(line, where, DataError)
            name = entry["file_name"].removeprefix("./")
            caption = " ".join(next(entry[key] for key in CAPTION_KEYS if key in entry).split())
        except (DataError, TypeError, LookupError, AttributeError, StopIteration) as e:
            like = '{"file_name": "dog.jpg", "text": "a photo of a dog"}'
            raise DataError(f"{where} is malformed. Write it like {like}") from e
        if not caption:
            raise DataError(f"{where} has an empty caption. Write the caption into it, or remove the line")
        if name not in images:
            raise DataError(f"{where} names {name!r}, which is no photo in that folder. Correct or remove the line")
        if name in captions:
            raise DataError(f"{where} names {name!r} for the second time. Remove one of the lines")
        captions[name] = caption
    return captions


def _read_text(path: Path) -> str:
    try:
        return reader.read_text(path, limit=CAPTIONS_LIMIT, error=DataError)
    except DataError as e:
        cause = getattr(e.__cause__, "strerror", None) or str(e)
        cause = "not UTF-8 text" if isinstance(e.__cause__, UnicodeDecodeError) else cause
        raise DataError(f"the captions in {path} cannot be read ({cause}). Repair or remove the file") from e


def decode(path: Path) -> Image.Image:
    """The upright RGB image, the first of several; DataError if there is none."""
    return _decode_first(path)[0]


def _decode_first(path: Path) -> tuple[Image.Image, int]:
    """The upright RGB image, and how many images the file holds (frames, pages); DataError if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, large photos; what is corrupt raises
            with Image.open(path) as image:
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: previews of a camera
                return _to_rgb(ImageOps.exif_transpose(image)), frames
    except MemoryError:
        raise
    except Exception as e:  # Pillow's decoders raise whatever they like on damaged bytes
        cause = getattr(e, "strerror", None) or str(e).strip() or type(e).__name__
        cause = re.sub(r" \([^()]*\)$", "", cause.splitlines()[0]).rstrip(".")
        if isinstance(e, Image.DecompressionBombError):
            cause = "too many pixels to be decoded safely; make it smaller"
        elif isinstance(e, UnidentifiedImageError):
            cause = "not an image" if path.stat().st_size else "the file is empty"
        raise DataError(f"the photo {path.name!r} cannot be read ({cause}). {_REPAIR}") from e


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: 16 bits scaled to 8, transparency on white."""
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no agreed range; save it as PNG or JPEG")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _covers(size: tuple[int, int], shapes: Sequence[Bucket]) -> bool:
    bucket = assign(size, shapes)
    return size[0] >= bucket.height and size[1] >= bucket.width
