"""Photos as pixels: orientation, modes, buckets, crops and sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comcat.customize.teaching.photos import Bucket, Photo, assign, buckets, check_sizes, find_photos, frame, load_photo
from comcat.errors import DataError
from test_customize_photos import PROMPT, pixels, refusal, save

EXIF_ORIENTATION = 274


def photo_of(size: tuple[int, int], name: str = "a.jpg") -> Photo:
    return Photo(Path(name), PROMPT, size)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [-1, 1] as (h, w, 3) in 0..255, exactly."""
    values = (tensor + 1) * 127.5
    assert torch.allclose(values, values.round(), atol=1e-3)
    return values.round().to(torch.uint8).permute(1, 2, 0).numpy()


# ---- orientation and modes


def load_only(folder: Path) -> np.ndarray:
    """The only photo of the folder in its own size, as bytes."""
    (photo,) = find_photos(folder, PROMPT)
    return as_bytes(load_photo(photo, Bucket(*photo.size)))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda v: v),
        (2, lambda v: v[:, ::-1]),
        (3, lambda v: v[::-1, ::-1]),
        (4, lambda v: v[::-1]),
        (5, lambda v: v.transpose(1, 0, 2)),
        (6, lambda v: v[::-1].transpose(1, 0, 2)),
        (7, lambda v: v[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda v: v.transpose(1, 0, 2)[::-1]),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(tmp_path, orientation, upright, suffix):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    values = save(tmp_path / f"a.{suffix}", 11, 7, exif=exif)
    (photo,) = find_photos(tmp_path, PROMPT)
    assert photo.size == upright(values).shape[:2]
    np.testing.assert_array_equal(load_only(tmp_path), upright(values))


def test_exif_orientation_of_a_jpeg(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    save(tmp_path / "a.jpg", 11, 7, exif=exif)
    assert find_photos(tmp_path, PROMPT)[0].size == (7, 11)


def test_transparency_is_on_white(tmp_path):
    values = np.concatenate([pixels(), pixels(seed=1)[..., :1]], axis=-1)
    values[:3, ..., 3] = 0
    values[3:6, ..., 3] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    alpha = values[..., 3:] / 255
    expected = values[..., :3] * alpha + 255 * (1 - alpha)
    found = load_only(tmp_path)
    assert (found[:3] == 255).all()
    np.testing.assert_array_equal(found[3:6], values[3:6, :, :3])
    assert np.abs(found - expected).max() <= 1


def test_gray_with_transparency(tmp_path):
    gray = pixels()[..., 0]
    alpha = np.where(np.arange(7) < 3, 0, 255).astype(np.uint8) * np.ones((11, 1), np.uint8)
    Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    expected = np.where(alpha == 0, 255, gray)
    np.testing.assert_array_equal(load_only(tmp_path), np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize("transparency", [None, 2, b"\xff\xff\x00"])
def test_palettes(tmp_path, transparency):
    indices = np.random.default_rng(0).integers(0, 5, (11, 7), dtype=np.uint8)
    palette = pixels(5, 1)[:, 0]
    image = Image.fromarray(indices).convert("L")
    image.putpalette(palette.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    expected = palette.copy()
    if transparency is not None:
        expected[2] = 255
    np.testing.assert_array_equal(load_only(tmp_path), expected[indices])


def test_one_transparent_color(tmp_path):
    values = pixels()
    Image.fromarray(values).save(tmp_path / "a.png", transparency=tuple(values[2, 3].tolist()))
    values[2, 3] = 255
    np.testing.assert_array_equal(load_only(tmp_path), values)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    values = np.random.default_rng(0).integers(0, 65536, (11, 7), dtype=np.uint16)
    values[0, :3] = (0, 257 * 100, 65535)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = (values / 257).round().astype(np.uint8)
    np.testing.assert_array_equal(load_only(tmp_path), np.repeat(expected[..., None], 3, -1))


def test_gray_and_bilevel(tmp_path):
    gray = pixels()[..., 0]
    Image.fromarray(gray).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_only(tmp_path), np.repeat(gray[..., None], 3, -1))
    Image.fromarray(gray > 127).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_only(tmp_path), np.repeat(255 * (gray[..., None] > 127), 3, -1))


@pytest.mark.parametrize(("ink", "rgb"), [((0, 0, 0, 0), (255, 255, 255)), ((255, 0, 0, 0), (0, 255, 255))])
def test_cmyk(tmp_path, ink, rgb):
    Image.new("CMYK", (7, 11), ink).save(tmp_path / "a.jpg", quality=100)
    found = load_only(tmp_path).astype(int)
    assert np.abs(found - rgb).max() <= 2


@pytest.mark.parametrize(
    "values", [np.ones((11, 7), np.float32), np.full((11, 7), 70000, np.int32), np.full((11, 7), -1, np.int32)]
)
def test_pixels_without_a_range_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert "32-bit pixels have no agreed range" in refusal(tmp_path)


# ---- buckets


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (1024, 64), (104, 8), (77, 7), (8, 8), (13, 1)])
@pytest.mark.parametrize("max_ratio", [1.0, 1.7, 2.0, 5.0, float("inf")])
def test_buckets(resolution, multiple, max_ratio):
    shapes = buckets(resolution, multiple, max_ratio=max_ratio)
    assert Bucket(resolution, resolution) in shapes
    assert len(set(shapes)) == len(shapes)
    ratios = [b.width / b.height for b in shapes]
    assert ratios == sorted(ratios)
    for b in shapes:
        assert b.height % multiple == b.width % multiple == 0
        assert min(b.height, b.width) > 0
        assert b.height * b.width <= resolution**2
        assert (min(b.height, b.width) + multiple) * max(b.height, b.width) > resolution**2  # no pixels wasted
        assert max(b.height, b.width) <= max_ratio * min(b.height, b.width)
        assert Bucket(b.width, b.height) in shapes


def test_buckets_are_among_those_of_sdxl():
    """All are in the table of the paper's appendix I, which has some of less area as well."""
    landscape = [(b.height, b.width) for b in buckets(1024, 64) if b.width >= b.height]
    assert landscape == [
        (1024, 1024),
        (960, 1088),
        (896, 1152),
        (832, 1216),
        (768, 1280),
        (768, 1344),
        (704, 1408),
    ]


def test_ratio_of_one_leaves_the_square():
    assert buckets(104, 8, max_ratio=1) == [Bucket(104, 104)]


@pytest.mark.parametrize(
    ("resolution", "nearest"),
    [(500, "448 or 512"), (511, "448 or 512"), (65, "64 or 128"), (63, "64"), (0, "64"), (-64, "64")],
)
def test_resolution_must_be_a_multiple(resolution, nearest):
    with pytest.raises(DataError, match=rf"{resolution} is not a multiple of 64, as it must be. Use {nearest}$"):
        buckets(resolution, 64)


@pytest.mark.parametrize("ratio", [0.5, -1, float("nan")])
def test_ratio_below_one(ratio):
    with pytest.raises(DataError, match="at least 1"):
        buckets(512, 64, max_ratio=ratio)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((700, 700), (512, 512)),
        ((3000, 2000), (640, 384)),
        ((2000, 3000), (384, 640)),
        ((1300, 1100), (576, 448)),
        ((7, 9001), (384, 640)),  # a panorama: the widest there is
    ],
)
def test_assign(size, expected):
    found = assign(size, buckets(512, 64))
    assert (found.height, found.width) == expected


def test_assign_compares_logarithms():
    # 1 lies nearer to 2 than to 1/3 in ratio - 1 : 1 against 2 / 3 -, but log 2 < log 3.
    assert assign((5, 5), [Bucket(1, 2), Bucket(3, 1)]) == Bucket(1, 2)
    assert assign((5, 5), [Bucket(1, 2), Bucket(2, 1)]) == Bucket(1, 2)  # equally near: the first


# ---- resize and crop


def test_frame_covers_and_crops_where_told():
    bucket = Bucket(16, 24)
    assert frame((64, 48), bucket).resized_size == (32, 24)
    tops = [frame((64, 48), bucket, crop=(y, 0.9)).crop_top_left for y in (0, 0.25, 0.5, 1)]
    assert tops == [(0, 0), (4, 0), (8, 0), (16, 0)]
    assert frame((32, 96), bucket, crop=(0.1, 1)).resized_size == (16, 48)
    assert frame((32, 96), bucket, crop=(0.1, 1)).crop_top_left == (0, 24)
    assert frame((64, 48), bucket, crop=(1, 0)).time_ids == (64, 48, 16, 0, 16, 24)


@pytest.mark.parametrize("size", [(11, 13), (101, 7), (7, 101), (997, 991), (3, 2)])
def test_frame_always_covers(size):
    for bucket in buckets(40, 8):
        for crop in [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.8)]:
            f = frame(size, bucket, crop=crop)
            assert f.original_size == size
            assert f.target_size == (bucket.height, bucket.width)
            slack = [r - t for r, t in zip(f.resized_size, f.target_size, strict=True)]
            assert min(slack) == 0  # no larger than it has to be
            assert all(0 <= c <= s for c, s in zip(f.crop_top_left, slack, strict=True))


@pytest.mark.parametrize("crop", [(-0.1, 0.5), (0.5, 1.1), (float("nan"), 0.5)])
def test_crop_outside(crop):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        frame((5, 7), Bucket(8, 8), crop=crop)


@pytest.mark.parametrize(("crop", "top"), [((0.0, 0.0), 0), ((0.5, 0.5), 4), ((1.0, 1.0), 8), ((0.25, 0.0), 2)])
@pytest.mark.parametrize("flip", [False, True])
def test_load_crops_exactly(tmp_path, crop, top, flip):
    values = save(tmp_path / "a.png", 24, 16)  # as wide as the bucket: pixels arrive as they are
    (photo,) = find_photos(tmp_path, PROMPT)
    tensor = load_photo(photo, Bucket(16, 16), crop=crop, flip=flip)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    expected = values[top : top + 16]
    np.testing.assert_array_equal(as_bytes(tensor), expected[:, ::-1] if flip else expected)


def test_flip_comes_before_the_crop(tmp_path):
    values = save(tmp_path / "a.png", 16, 24)
    (photo,) = find_photos(tmp_path, PROMPT)
    flipped = load_photo(photo, Bucket(16, 16), crop=(0, 0), flip=True)
    np.testing.assert_array_equal(as_bytes(flipped), values[:, ::-1][:, :16])


def test_range_is_exact(tmp_path):
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path, PROMPT)
    assert load_photo(photo, Bucket(1, 2)).tolist() == [[[-1.0, 1.0]]] * 3


def test_shrinking_is_antialiased(tmp_path):
    checks = np.indices((88, 56)).sum(0) % 2 * 255
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path, PROMPT)
    tensor = load_photo(photo, Bucket(11, 7))
    assert tensor.shape == (3, 11, 7)
    assert tensor.abs().max() < 0.1  # gray: neither black nor white, as picking pixels would give


def test_enlarging_keeps_the_range(tmp_path):
    save(tmp_path / "a.png", 5, 3)
    (photo,) = find_photos(tmp_path, PROMPT)
    tensor = load_photo(photo, Bucket(40, 24))
    assert tensor.shape == (3, 40, 24)
    assert tensor.abs().max() <= 1


def test_photo_that_changed(tmp_path):
    save(tmp_path / "a.png", 11, 7)
    (photo,) = find_photos(tmp_path, PROMPT)
    save(tmp_path / "a.png", 13, 7)
    with pytest.raises(DataError, match=r"'a\.png' changed its size"):
        load_photo(photo, Bucket(8, 8))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"'a\.png' cannot be read \(No such file or directory\)"):
        load_photo(photo, Bucket(8, 8))


# ---- sizes


def test_sizes_that_suffice():
    check_sizes([photo_of((512, 512)), photo_of((640, 384)), photo_of((4001, 3001))], 512, multiple=64)
    check_sizes([], 512)


def test_small_photo():
    with pytest.raises(DataError) as e:
        check_sizes([photo_of((900, 901), "b.jpg"), photo_of((30, 40))], 512, max_ratio=1)
    assert str(e.value) == (
        "photos smaller than the resolution 512 needs (1 of 2): 'a.jpg' is 40 x 30, not 512 x 512. "
        "Use larger photos, --resolution 24, or enlarge them: --allow-upscale"
    )
    check_sizes([photo_of((30, 40))], 24, max_ratio=1)


def test_small_photos_are_named_up_to_three():
    photos = [photo_of((83, 71 + i), f"{i}.jpg") for i in range(5)]
    with pytest.raises(DataError, match=r"\(5 of 5\): '0\.jpg' .*; '1\.jpg' .*; '2\.jpg' .* and 2 more\. Use"):
        check_sizes(photos, 104)


@pytest.mark.parametrize("sizes", [[(97, 61)], [(97, 61), (61, 131)], [(53, 211), (89, 83), (101, 59)], [(31, 1009)]])
@pytest.mark.parametrize("max_ratio", [1.0, 1.5, 3.0])
def test_suggested_resolution_is_the_largest_that_fits(sizes, max_ratio):
    photos = [photo_of(s) for s in sizes]
    with pytest.raises(DataError, match=r"--resolution \d+") as e:
        check_sizes(photos, 128, max_ratio=max_ratio)
    suggested = int(str(e.value).split("--resolution ")[1].split(",")[0])
    check_sizes(photos, suggested, max_ratio=max_ratio)
    for larger in range(suggested + 8, 129, 8):
        with pytest.raises(DataError, match="smaller"):
            check_sizes(photos, larger, max_ratio=max_ratio)


def test_photo_below_every_resolution():
    with pytest.raises(DataError, match="Use larger photos, or enlarge them: --allow-upscale"):
        check_sizes([photo_of((5, 7))], 64)


def test_enlarging_on_request():
    check_sizes([photo_of((5, 7))], 64, allow_upscale=True)
    with pytest.raises(DataError, match="60 is not a multiple of 8"):
        check_sizes([photo_of((5, 7))], 60, allow_upscale=True)
