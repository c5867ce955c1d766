"""Picture files: what is stored of images and masks of every kind, what is refused, and notes."""

import os
import zlib

import cv2
import h5py
import numpy as np
import pytest
from PIL import Image

from data import h5, images, loading, new_images, nifti, pixels
from data.files import InputError

SIZE = (40, 56)
TWO, FOUR = ["background", "thing"], ["background", "a", "b", "c"]
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, SIZE, np.uint8)
RGB = RNG.integers(0, 256, (*SIZE, 3), np.uint8)
DEEP = RNG.integers(0, 4096, SIZE).astype(np.uint16)
DEEP_RGB = RNG.integers(0, 65536, (*SIZE, 3)).astype(np.uint16)
NAN = np.where(GRAY > 250, np.nan, GRAY).astype(np.float32)
DISC = cv2.circle(np.zeros(SIZE, np.uint8), (30, 20), 12, 1, -1)
RING = cv2.circle(np.zeros(SIZE, np.uint8), (30, 20), 12, 1, 3)
HEART = cv2.circle(np.zeros(SIZE, np.uint8), (30, 20), 3, 1, -1)
WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def save(path, picture, palette=None, **options):
    """Writes an array (by OpenCV) or a Pillow picture; palette: colors of an array's indices."""
    if isinstance(picture, np.ndarray) and palette is None and not options:
        assert cv2.imwrite(str(path), picture if picture.ndim == 2 else picture[..., ::-1])
        return path
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    if palette is not None:
        picture.putpalette(np.ravel(palette).astype(np.uint8).tolist())
    picture.save(path, **options)
    return path


def alpha(picture, opacity):
    """A picture with a fourth channel, opaque but for its corner."""
    extra = np.full(SIZE, 255, np.uint8)
    extra[:5, :5] = opacity
    return Image.fromarray(np.dstack([picture, extra]))


def turned(orientation):
    exif = Image.Exif()
    exif[pixels.ORIENTATION] = orientation
    return dict(exif=exif)


def assert_refused(read, name, words):
    """An error with the file's name, the words and a remedy."""
    with pytest.raises(InputError, match=f"{name}.*{words}") as refused:
        read()
    assert ";" in str(refused.value) and "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------ images

STACK = {270: "ImageJ=1.53t\nimages=3\nslices=3\nloop=false\n"}  # what ImageJ says of 3 pages
QUANTIZED = Image.fromarray(RGB).quantize(16)
IMAGES = {
    "gray.png": (GRAY, {}, GRAY),
    "rgb.png": (RGB, {}, RGB),
    "rgb.tif": (RGB, {}, RGB),
    "opaque.png": (alpha(RGB, 255), {}, RGB),
    "opaque_gray.png": (alpha(GRAY, 255), {}, GRAY),
    "palette.png": (QUANTIZED, {}, np.array(QUANTIZED.convert("RGB"))),
    "one_bit.png": (Image.fromarray(GRAY > 99), {}, (GRAY > 99) * np.uint8(255)),
    "twelve.png": (DEEP, {}, DEEP),  # a handful of levels, if cut to 8 bits
    "twelve_kept.tif": (Image.fromarray(DEEP), dict(tiffinfo=STACK), DEEP),  # one page of three
    "dark.tif": (DEEP // 16, {}, DEEP // 16),  # black, if cut to 8 bits
    "deep_rgb.png": (DEEP_RGB, {}, DEEP_RGB),
    "deep_rgb.tif": (DEEP_RGB, {}, DEEP_RGB),
    "int32.tif": (DEEP.astype(np.int32) - 70000, {}, DEEP - 70000.0),
    "int16.tif": (DEEP.astype(np.int16) - 2000, {}, DEEP - 2000.0),
    "float.tif": (GRAY / np.float32(255), {}, GRAY / np.float32(255)),
    "double.tif": (GRAY / 8 - 3, {}, GRAY / 8 - 3),
    "float_rgb.tif": (RGB / np.float32(4), {}, RGB / 4),
    "preview.jpg": (
        Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)),
        dict(format="MPO", save_all=True, append_images=[Image.fromarray(RGB)]),
        np.full((*SIZE, 3), 90),
    ),
}  # a camera's photograph and its preview


@pytest.mark.parametrize("name", IMAGES)
def test_images_keep_every_value(name, tmp_path):
    picture, options, expected = IMAGES[name]
    path = save(tmp_path / name, picture, **options)
    found = pixels.read_picture(path, gray=False)
    if expected.ndim == 2:
        expected = np.dstack([expected] * 3)
    deep = "twelve dark deep int32 int16 float double".split()
    kind = np.float32 if any(name.startswith(d) for d in deep) else np.uint8
    assert found.dtype == kind and (found == expected).all()
    gray = pixels.read_picture(path, gray=True)
    weights = [0.299, 0.587, 0.114]
    assert gray.dtype == kind and gray.shape == SIZE
    assert np.allclose(gray, expected @ weights, rtol=1e-4, atol=1 if kind is np.uint8 else 1e-3)


LARGE_GRAY = cv2.GaussianBlur(RNG.integers(0, 256, (120, 160), np.uint8), (9, 9), 0)
DAMAGED = {  # name: options, where bytes are zeroed, and how many
    "a.jpg": (dict(quality=90), 0.5, 300),
    "b.jpg": (dict(quality=90, progressive=True), 0.3, 300),
    "cut.jpg": (dict(quality=90), 0.7, None),
    "a.png": ({}, 0.5, 1),
    "lzw.tif": (dict(compression="tiff_lzw"), 0.5, 300),
    "deflate.tif": (dict(compression="tiff_adobe_deflate"), 0.5, 1),
    "old_deflate.tif": (dict(compression="tiff_deflate"), 0.9, 1),
    "packbits.tif": (dict(compression="packbits"), 0.5, 300),
    "jpeg.tif": (dict(compression="jpeg"), 0.5, 300),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_refused(name, tmp_path, capfd):
    """Decoders go on and give other pixels; nothing of a library is on the screen."""
    options, at, count = DAMAGED[name]
    path = save(tmp_path / name, Image.fromarray(LARGE_GRAY), **options)
    whole = path.read_bytes()
    found = pixels.read_picture(path, gray=True)
    assert found.shape == LARGE_GRAY.shape and np.abs(found - 1.0 * LARGE_GRAY).mean() < 3
    start = int(at * len(whole))
    end = len(whole) if count is None else start + count
    patch = b"" if count is None else bytes(255 - b for b in whole[start:end])
    path.write_bytes(whole[:start] + patch + whole[end:])
    for read in (lambda: pixels.read_picture(path, True), lambda: pixels.read_mask(path, TWO)):
        assert_refused(read, name, "not a readable picture")
    assert capfd.readouterr() == ("", "")


def test_bytes_after_the_pixels_of_a_jpeg_are_noted(tmp_path, capfd):
    """Some programs write them, so the picture is taken."""
    path, notes = save(tmp_path / "a.jpg", Image.fromarray(LARGE_GRAY)), {}
    whole = path.read_bytes()
    expected = pixels.read_picture(path, True, notes)
    assert not notes
    path.write_bytes(whole[:-2] + bytes(500) + whole[-2:])
    assert (pixels.read_picture(path, True, notes) == expected).all() and not notes
    path.write_bytes(whole[:-2] + bytes(range(5)) + whole[-2:])
    assert (pixels.read_picture(path, True, notes) == expected).all()
    assert notes == {pixels.PADDED: [path]} and capfd.readouterr().err == ""
    path.write_bytes(whole[:-2] + bytes(range(50)) + whole[-2:])
    assert_refused(lambda: pixels.read_picture(path, True), "a.jpg", "not a readable picture")


def planar(path):
    """A TIFF of 16 bits that says of itself that its colors lie one after another."""
    content = save(path, DEEP_RGB).read_bytes()
    entry = b"\x1c\x01\x03\x00\x01\x00\x00\x00"  # the tag, one number of 16 bits
    assert content.count(entry + b"\x01") == 1
    path.write_bytes(content.replace(entry + b"\x01", entry + b"\x02"))


def stack_of_imagej(path):
    """Three pages of 16 bits, of which the first alone has a directory."""
    save(path, Image.fromarray(DEEP), tiffinfo=STACK)
    path.write_bytes(path.read_bytes() + 2 * DEEP.tobytes())


def gigapixel(path):
    """The head of a picture of a whole slide of tissue."""
    content = save(path, GRAY).read_bytes()
    head = b"IHDR" + (60_000).to_bytes(4, "big") + (50_000).to_bytes(4, "big") + content[24:29]
    path.write_bytes(content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:])


FOREIGN = {
    "gigapixel.png": (gigapixel, {}, "60000 x 50000 pixels, and no more than 1,073,741,824"),
    "stack.tif": (stack_of_imagej, {}, "has 3 pages"),
    "pages.tif": (
        Image.fromarray(GRAY),
        dict(save_all=True, append_images=[Image.fromarray(GRAY)] * 4),
        "has 5 pages",
    ),
    "float_pages.tif": (lambda path: cv2.imwritemulti(str(path), [GRAY / 2.0] * 3), {}, "3 pages"),
    "animated.png": (
        Image.fromarray(GRAY),
        dict(save_all=True, append_images=[Image.fromarray(255 - GRAY)]),
        "2 pages or frames",
    ),
    "veil.png": (alpha(RGB, 254), {}, "transparent.*254 of 255"),
    "hole.png": (alpha(GRAY, 0), {}, "transparent"),
    "hole.tif": (alpha(RGB, 0), {}, "transparent"),
    "key.png": (QUANTIZED, dict(transparency=3), "transparent"),
    "deep_key.png": (Image.fromarray(DEEP), dict(transparency=int(DEEP[2, 2])), "transparent"),
    "cmyk.jpg": (Image.fromarray(RGB).convert("CMYK"), {}, "CMYK"),
    "lab.tif": (Image.fromarray(RGB).convert("LAB"), {}, "LAB"),
    "four.tif": (np.dstack([RGB, GRAY]).astype(np.float32), {}, "4 channels"),
    "inverse.tif": (Image.fromarray(DEEP), dict(tiffinfo={262: 0}), "0 as white"),
    "planar.tif": (planar, {}, "one color after another"),
    "turned.tif": (Image.fromarray(GRAY), dict(tiffinfo={274: 6}), "orientation 6"),
    "nan.tif": (NAN, {}, "NaN"),
    "infinite.tif": (np.where(GRAY > 250, np.inf, GRAY), {}, "NaN or infinite"),
    "huge.tif": (GRAY + 1e12, {}, "float32 cannot"),
    "tiny.tif": (GRAY * 1e-12, {}, "float32 cannot"),
    "text.png": (lambda path: path.write_text("text"), {}, "not a readable picture"),
    "empty.png": (lambda path: path.write_bytes(b""), {}, "not a readable picture"),
    "cut.jpg": (
        lambda path: path.write_bytes(cv2.imencode(".jpg", RGB)[1].tobytes()[:900]),
        {},
        "not a readable picture",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_images_that_would_be_misread_are_refused(name, tmp_path):
    picture, options, words = FOREIGN[name]
    path = tmp_path / name
    picture(path) if callable(picture) else save(path, picture, **options)
    assert_refused(lambda: pixels.read_picture(path, gray=False), name, words)
    if name != "tiny.tif":  # a label of nearly 0
        assert_refused(lambda: pixels.read_mask(path, TWO), name, "")


# ------------------------------------------------------------------------------------ masks

LABEL = DISC + 2 * HEART  # 0, 1 and 3
HALVED = cv2.resize(DISC[:, 1:-1] * 255, (27, 20), interpolation=cv2.INTER_AREA)
BOX = np.pad(np.full((13, 17), 255, np.uint8), 9)
HALVED_BOX = cv2.resize(BOX[:-1, :-1], (17, 15), interpolation=cv2.INTER_AREA)
ENLARGED = cv2.resize(DISC * 255, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
SOFT = cv2.resize(DISC * 255, None, fx=6, fy=6, interpolation=cv2.INTER_LINEAR)
SOFT_16 = cv2.GaussianBlur(DISC * np.uint16(65535), (9, 9), 0)
LARGE = cv2.circle(np.zeros((120, 160), np.uint8), (80, 60), 40, 255, -1)
WORN = cv2.imdecode(cv2.imencode(".jpg", LARGE, [cv2.IMWRITE_JPEG_QUALITY, 20])[1], 0)
FRAME = np.where(np.add.outer(range(40), range(56)) < 30, 11, DISC * 255).astype(np.uint8)
MASKS = {
    "zero_one.png": (DISC, {}, DISC),
    "all.png": (DISC * 0 + 1, {}, DISC * 0 + 1),
    "none.jpg": (DISC * 0, {}, DISC * 0),
    "white.bmp": (DISC * 255, {}, DISC),
    "rgb.png": (np.dstack([DISC * 255] * 3), {}, DISC),
    "dim.png": (DISC * 200, {}, DISC),
    "half.png": (DISC * 128, {}, DISC),
    "within.png": (DISC * 230 + 10, {}, DISC),
    "full.tif": (DISC * np.uint16(65535), {}, DISC),
    "full_soft.png": (SOFT_16, {}, SOFT_16 > 32768),
    "deep.tif": (DISC.astype(np.uint16), {}, DISC),
    "float.tif": (DISC.astype(np.float32), {}, DISC),
    "bit.png": (Image.fromarray(DISC > 0), {}, DISC),
    "red.png": (DISC[..., None] * np.uint8(RED), {}, DISC),
    "red_blurred.png": (
        cv2.GaussianBlur(DISC[..., None] * np.uint8(RED), (5, 5), 0),
        {},
        cv2.GaussianBlur(DISC * 255, (5, 5), 0) > 127,
    ),
    "palette.png": (DISC, dict(palette=[WHITE, RED]), DISC),  # the index is the class
    "bright.png": (DISC, dict(palette=[BLACK, (9, 0, 0)]), DISC),  # also a dark one
    "unused.png": (DISC * 0, dict(palette=[WHITE, (0, 0, 255)]), DISC * 0),
    "one_color.png": (DISC * 0, dict(palette=[RED]), DISC * 0),
    "dim_palette.png": (DISC, dict(palette=[BLACK, (60, 60, 60)]), DISC),
    "palette_gray.png": (DISC, dict(palette=[BLACK, WHITE]), DISC),
    "palette_levels.png": (DISC * 255, dict(palette=np.repeat(range(256), 3)), DISC),
    "palette_sorted.png": (DISC * 2 + 1, dict(palette=[RED, BLACK, RED, WHITE]), DISC),
    "blurred.png": (cv2.GaussianBlur(DISC * 255, (3, 3), 0), {}, DISC),
    "blurred_more.png": (
        cv2.GaussianBlur(DISC * 255, (9, 9), 0),
        {},
        cv2.GaussianBlur(DISC * 255, (9, 9), 0) > 127,
    ),
    "halved.png": (HALVED, {}, HALVED > 127),
    "box.png": (HALVED_BOX, {}, HALVED_BOX > 127),
    "enlarged.png": (ENLARGED, {}, ENLARGED > 127),
    "worn.jpg": (Image.fromarray(LARGE), dict(quality=20), None),
    "worn.png": (WORN, {}, WORN > 127),  # once a JPEG: white is 253
    "soft.png": (SOFT, {}, SOFT > 127),
    "jpeg.jpg": (DISC * 255, {}, DISC),
    "frame.png": (FRAME, {}, FRAME == 255),
}  # as in CVC-ClinicDB


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_two_classes(name, tmp_path):
    mask, options, expected = MASKS[name]
    path = save(tmp_path / name, mask, **options)
    found = pixels.read_mask(path, TWO)
    if expected is None:
        expected = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
    assert found.dtype == np.uint8 and (found == expected).all()


def test_masks_of_several_classes(tmp_path):
    colors = [WHITE, RED, (0, 0, 9), (0, 9, 0)]
    for name, mask, options in (
        ("gray.png", LABEL, {}),
        ("float.tif", LABEL.astype(np.float64), {}),
        ("rgb.png", np.dstack([LABEL] * 3), {}),
        ("palette.png", LABEL, dict(palette=colors)),
        ("gray_palette.png", 3 - LABEL, dict(palette=[[3 - k] * 3 for k in range(4)])),
    ):
        notes = {}
        found = pixels.read_mask(save(tmp_path / name, mask, **options), FOUR, notes)
        assert found.dtype == np.uint8 and (found == LABEL).all(), name
        assert list(notes) == [pixels.PALETTE] * (name == "palette.png")


def test_a_void_of_255_in_a_palette_is_an_index_as_others(tmp_path):
    """As PASCAL VOC has it."""
    colors, notes = [BLACK, RED, *[WHITE] * 254], {}
    path = save(tmp_path / "m.png", np.where(RING > 0, 255, DISC), palette=colors)
    found = pixels.read_mask(path, ["background", "a", "void"], notes, values=(0, 1, 255))
    assert (found == np.where(RING > 0, 2, DISC)).all() and list(notes) == [pixels.PALETTE]


def test_an_index_has_one_color_in_all_files(tmp_path, refused):
    """Palettes that were made for each file apart would permute the classes."""
    green = (0, 255, 0)
    for name, colors in (("a", [BLACK, RED, green]), ("b", [BLACK, green, RED])):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        save(tmp_path / "images" / f"{name}.png", RGB)
        save(tmp_path / "masks" / f"{name}.png", DISC + HEART, palette=colors)
    argv = [tmp_path, "--out", tmp_path / "f.h5", "--classes", "background,a,b", "--val", "0"]
    refused(images.main, argv, "index 1 of its palette has another color", "as gray values")


def test_palettes_that_are_clear_go_together(tmp_path):
    """Foregrounds of two colors, of two classes; and our own masks beside those of others."""
    known, green = {}, (0, 255, 0)
    for colors in ([BLACK, RED], [BLACK, green]):
        path = save(tmp_path / "m.png", DISC, palette=colors)
        assert (pixels.read_mask(path, TWO, known=known) == DISC).all()
    known = {}
    path = save(tmp_path / "m.png", LABEL, palette=[BLACK, RED, WHITE, green])
    assert (pixels.read_mask(path, FOUR, known=known) == LABEL).all()
    pixels.write_mask(tmp_path / "ours.png", LABEL)
    assert (pixels.read_mask(tmp_path / "ours.png", FOUR, known=known) == LABEL).all()


def test_our_own_masks_need_no_note(tmp_path):
    for label, classes in ((LABEL, FOUR), (DISC, TWO)):
        pixels.write_mask(tmp_path / "m.png", label)
        notes = {}
        assert (pixels.read_mask(tmp_path / "m.png", classes, notes) == label).all()
        assert not notes


BORDERED = np.where(RING > 0, 255, DISC)  # a class number with a border of 255: void
BORDERED_16 = np.where(RING > 0, np.uint16(65535), DISC)
PATCHES = cv2.circle(np.zeros((300, 400), np.uint8), (200, 150), 120, 255, -1)
PATCHES = cv2.GaussianBlur(PATCHES, (9, 9), 0)  # whose edges hide a small region
PATCHES[20:25, 30:35] = 128
UNCLEAR = {
    "void.png": (BORDERED, {}, "1 .*, 255 .*of 1"),
    "void_and_full.png": (np.where(RING > 0, 255, 1), {}, "regions of 1"),
    "thin_void.png": (np.where(RING > 0, 1, HEART * 255), {}, "regions or lines of 1"),
    "gray_void.png": (np.where(RING > 0, 128, DISC * 255), {}, "0 .*, 128 .*, 255 .*of 128"),
    "line.png": (np.where(cv2.dilate(DISC, np.ones((3, 3))) > DISC, 128, DISC * 255), {}, "of 128"),
    "two_lines.png": (
        cv2.GaussianBlur(HEART * 255, (3, 3), 0)
        + np.where(cv2.dilate(DISC, np.ones((5, 5))) > DISC, 128, 0),
        {},
        "of 128",
    ),
    "third.png": (DISC * 85 + HEART * 170, {}, "0 .*, 85 .*, 255 .*of 85"),
    "third_blurred.png": (cv2.GaussianBlur(DISC * 90 + HEART * 165, (3, 3), 0), {}, "of 90"),
    "third.jpg": (DISC * 128 + HEART * 127, {}, "of 12"),
    "third.tif": (DISC * np.uint16(30000) + HEART * np.uint16(35535), {}, "30000 .*, 65535"),
    "deep_void.png": (BORDERED_16, {}, "0 .*, 1 .*, 65535 "),
    "deep_void_2.tif": (np.maximum(BORDERED_16, 2 * DISC), {}, "0 .*, 2 .*, 65535 "),
    "deep_void_100.png": (np.maximum(BORDERED_16, 100 * DISC), {}, "100 .*, 65535 "),
    "deep_void_rgb.png": (np.dstack([BORDERED_16] * 3), {}, "0 .*, 1 .*, 65535 "),
    "deep_void_soft.png": (cv2.resize(BORDERED_16, (391, 280)), {}, "0 .*, 1 .*more, so not"),
    "deep_void_257.png": (BORDERED * np.uint16(257), {}, "regions or lines of 1"),
    "fourth.png": (np.where(RING > 0, 85, DISC * 170) + HEART * 85, {}, "85 .*, 170 .*, 255"),
    "nearly.png": (DISC * 240 + HEART * 15, {}, "of 240"),
    "photograph.png": (GRAY, {}, "neither black nor white"),
    "classes.png": (DISC + HEART, {}, "2 .*look like class numbers.*--classes"),
    "jpeg.jpg": (DISC, {}, "1 .*JPEG.*PNG"),
    "jpeg_dim.jpg": (DISC * 160, {}, "160 .*JPEG"),
    "no_black.png": (DISC * 100 + 100, {}, "100 .*, 200 .*none of them near 0"),
    "hidden.png": (
        Image.fromarray(np.dstack([DISC * 0 + 255] * 3 + [DISC * 255])),
        {},
        "transparent",
    ),  # white everywhere, also where nothing is to be seen
    "on_white.png": (np.where(DISC[..., None], np.uint8(RED), np.uint8(255)), {}, "not black"),
    "colors.png": (
        DISC[..., None] * np.uint8(RED) + HEART[..., None] * np.uint8([0, 255, 0]),
        {},
        "several colors",
    ),
    "rest.png": (
        np.where(DISC[..., None], np.uint8([253, 231, 36]), np.uint8([68, 1, 84])),
        {},
        "not black",
    ),
    "palette_of_file.png": (1 - DISC, dict(palette=[RED, BLACK]), "black is index 1"),
    "inverse_palette.png": (DISC, dict(palette=[WHITE, BLACK]), "palette.*brighter"),
    "void_palette.png": (BORDERED, dict(palette=[BLACK, *[RED] * 255]), "indices 0 .*, 255"),
    "gray_palette.png": (LABEL, dict(palette=[[60 * k] * 3 for k in range(4)]), "of 60"),
    "key.png": (DISC, dict(palette=[BLACK, RED], transparency=0), "transparent"),
    "share.tif": (DISC * np.float32(0.9), {}, "value 0.9.* is neither .*; save .* 0 and 255"),
    "patches.png": (PATCHES, {}, "regions of 128"),
    "negative.tif": (-DISC.astype(np.int32), {}, "-1"),
    "turned.png": (DISC * 255, turned(6), "EXIF"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_masks_that_are_unclear_are_refused(name, tmp_path):
    mask, options, words = UNCLEAR[name]
    if isinstance(mask, np.ndarray) and mask.dtype == np.int64:
        mask = mask.astype(np.uint8)
    path = save(tmp_path / name, mask, **options)
    assert_refused(lambda: pixels.read_mask(path, TWO), name, words)


@pytest.mark.parametrize(
    "name, mask, options, words",
    [
        ("m.jpg", LABEL, {}, "JPEG.*PNG"),
        ("m.png", Image.fromarray(LABEL), dict(format="JPEG"), "JPEG"),  # whatever its ending
        ("m.tif", Image.fromarray(LABEL), dict(compression="jpeg"), "JPEG"),
        (
            "m.png",
            np.where(RING > 0, 255, LABEL).astype(np.uint8),
            {},
            "values up to 255.*4 classes",
        ),
        ("m.png", DISC[..., None] * np.uint8(RED), {}, "colored"),
        ("m.png", LABEL, dict(palette=[WHITE, RED, (0, 9, 0), BLACK]), "black is index 3"),
        ("m.png", LABEL, dict(palette=[BLACK, RED, RED, WHITE], transparency=0), "transparent"),
        ("m.png", Image.fromarray(DISC > 0), {}, "values up to 255"),
    ],
)
def test_class_numbers_that_are_unclear_are_refused(name, mask, options, words, tmp_path):
    path = save(tmp_path / name, mask, **options)
    assert_refused(lambda: pixels.read_mask(path, FOUR), name, words)


# ------------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path):
    """Pictures with masks: 8 bits, 12 bits and float; a turned one without; what is not read."""
    src = tmp_path / "src"
    for part in ("images/more", "masks", "validation/images"):
        (src / part).mkdir(parents=True)
    for name, image in (("a.png", RGB), ("b.png", DEEP), ("c.tif", RGB / np.float32(255))):
        save(src / "images" / name, image)
        save(src / "masks" / f"{name[0]}.png", FRAME if name == "a.png" else DISC * 200)
    save(src / "images" / "e.png", GRAY)
    save(src / "masks" / "e.jpg", DISC * 0)
    save(src / "images" / "d.jpg", Image.fromarray(RGB), **turned(6))
    for name in ("images/x.gif", "masks/a.npy", "images/Thumbs.db", "images/.x.gif", "masks/a.txt"):
        (src / name).touch()
    return src


def test_pipes_and_folders_are_no_images(tmp_path, capsys):
    """To read a pipe takes forever. A link that leads nowhere is refused by its reader."""
    for module, ending in ((images, "png"), (nifti, "nii.gz")):
        src = tmp_path / ending
        (src / f"folder.{ending}").mkdir(parents=True)
        os.mkfifo(src / f"pipe.{ending}")
        (src / f"link.{ending}").symlink_to("nowhere")
        (src / f"file.{ending}").touch()
        find = images.pictures if module is images else nifti.volumes
        assert list(find(src)) == ["file", "link"]
        module.say_unread([src])
        said = capsys.readouterr().out
        assert f"2 of 4 files and folders are not read, such as {src}/folder.{ending}" in said


@pytest.mark.parametrize("options", [[], ["--gray"]])
def test_a_folder_of_all_kinds(folder, options, tmp_path, capsys):
    """Values and types in the file; a line for what is not read, and for what is doubtful."""
    images.main([str(folder), "--out", str(tmp_path / "f.h5"), "--val", "0", *options])
    said = capsys.readouterr().out
    assert (
        "images/more; only files of these kinds are: .bmp" in said
        and "note: 3 of 14 files and folders are" in said
    )
    assert "validation is not read; the names of splits are train" in said
    assert "note: 1 file, such as" in said and "images/d.jpg: stored turned" in said
    assert "masks/a.png: nearly black regions" in said and said.count("note:") == 7
    assert "the split val is empty" in said
    assert "masks/e.jpg: JPEG mask without foreground" in said
    assert "note: 2 files" in said and "foreground of value 200, not 255" in said
    with h5py.File(tmp_path / "f.h5") as f:
        stored = {
            name: (c["image"][:], c["label"][:] if "label" in c else None)
            for name, c in f["train"].items()
        }
    assert (stored["a"][1] == (FRAME == 255)).all() and (stored["c"][1] == DISC).all()
    assert stored["d"][0].shape[:2] == SIZE and stored["d"][1] is None
    if not options:
        assert (stored["a"][0] == RGB).all() and (stored["c"][0] == RGB / np.float32(255)).all()
    deep = stored["b"][0] if options else stored["b"][0][..., 0]
    assert deep.dtype == np.float32 and (deep == DEEP).all()


def test_new_pictures_are_read_and_refused_alike(folder, tmp_path, capsys):
    """As evaluate.py --predict reads them: the same values, notes and refusals."""
    data = dict(classes=TWO, dims=2, channels=3, prepared={"from": "pictures"})
    info = new_images.convert(str(folder / "images"), str(tmp_path / "f.h5"), data)
    said = capsys.readouterr().out
    assert "images/d.jpg: stored turned" in said and "note: 2 of 8 files and folders" in said
    cases = {
        name: image for name, image, *_ in loading.whole_cases(info, "unlabeled", labels=False)
    }
    assert (cases["b"][:, 0] == DEEP).all() and cases["d"].shape == (3, 1, *SIZE)
    for name in ("pages.tif", "hole.png", "nan.tif"):
        picture, options, words = FOREIGN[name]
        save(folder / "images" / name, picture, **options)
        with pytest.raises(InputError, match=f"images/{name}.*{words}"):
            new_images.convert(str(folder / "images"), str(tmp_path / "g.h5"), data)
        (folder / "images" / name).unlink()
    assert not (tmp_path / "g.h5").exists()


def test_listed_values_of_any_depth_are_mapped(tmp_path, refused):
    """--labels also names values above 255; a value that is not listed is refused."""
    label = np.zeros((16, 16), np.uint8)
    label[4:9, 3:11] = 1
    path = tmp_path / "m.png"
    cv2.imwrite(str(path), label.astype(np.uint16) * 65535)
    found = pixels.read_mask(path, ["background", "disc"], values=(0, 65535))
    assert found.dtype == np.uint8 and (found == label).all()
    read = lambda argv: pixels.read_mask(path, ["background", "disc"], values=(0, 255))
    refused(read, [], "label value 65535", "0, 255 do")


def test_lists_that_name_one_of_several_cases(tmp_path, refused):
    """Split folders may hold one name twice, so that a list of names says too little."""
    for split in ("train", "val"):
        for part in ("images", "masks"):
            folder = tmp_path / "src" / split / part
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "a.png"), np.eye(16, dtype=np.uint8) * 255)
    (tmp_path / "src" / "train.txt").write_text("a\n")
    argv = [tmp_path / "src", "--out", tmp_path / "x.h5"]
    refused(images.main, argv, "train.txt", "several cases called 'a'", "rename")


def test_two_copies_of_a_picture_are_refused(tmp_path, refused):
    """The presets that look into several folders would take the last one."""
    image, mask = np.dstack([LARGE_GRAY] * 3), np.eye(16, dtype=np.uint8) * 255
    sources = {
        "ph2": ("{}/IMD2_Dermoscopic_Image/{}.bmp", "{}/IMD2_lesion/{}_lesion.bmp"),
        "isic": ("{}_Input/ISIC_2.jpg", "{}_GroundTruth/ISIC_2_segmentation.png"),
    }
    for preset, names in sources.items():
        for i, name in enumerate(names):
            src = tmp_path / f"{preset}{i}"
            for copy in ("a", "b"):
                path = src / name.format(copy, "IMD2")
                path.parent.mkdir(parents=True)
                cv2.imwrite(str(path), (image, mask)[i])
            argv = [src, "--preset", preset, "--out", tmp_path / "f.h5"]
            refused(images.main, argv, str(src / "b"), f"{src / 'a'}", "is there too", "remove")


def test_a_mask_without_a_picture_is_refused_by_every_preset(tmp_path, refused):
    """ISIC 2018 has masks of a second task, of the same pictures, which are not read."""
    sources = {
        "ph2": ("IMD1_Dermoscopic_Image/IMD1.bmp", "IMD1_lesion/IMD1.bmp", "IMD2_lesion/IMD2.bmp"),
        "isic": ("Input/ISIC_2.jpg", "GroundTruth/ISIC_2_segmentation.png", "GroundTruth/ISIC.png"),
        "cvc": ("Original/1.png", "Ground Truth/1.png", "Ground Truth/2.png"),
    }
    for preset, names in sources.items():
        src = tmp_path / preset
        for name in names:
            (src / name).parent.mkdir(parents=True, exist_ok=True)
            (src / name).touch()
        (src / "sequences.csv").write_text("frame,sequence\n1,1\n")
        argv = [src, "--preset", preset, "--out", tmp_path / "f.h5"]
        refused(images.main, argv, f"{src / names[-1]}: no picture of that name in", "(1 such mask")
        (src / names[-1]).unlink()
        (src / "GroundTruth").mkdir(exist_ok=True)
        (src / "GroundTruth/ISIC_2_attribute_streaks.png").touch()
        assert len(images.PRESETS[preset](src)) == 1


def test_folders_that_are_links_are_read(tmp_path):
    """Data sets often lie on another disk, or some of their cases do."""
    for name in ("IMD1", "IMD2"):
        for part in ("Dermoscopic_Image", "lesion"):
            folder = tmp_path / "disk" / name / f"{name}_{part}"
            folder.mkdir(parents=True)
            save(folder / "a.bmp", DISC * 255)
    (tmp_path / "src" / "IMD2").mkdir(parents=True)
    (tmp_path / "src" / "IMD1").symlink_to(tmp_path / "disk" / "IMD1")
    for folder in (tmp_path / "disk" / "IMD2").iterdir():
        folder.rename(tmp_path / "src" / "IMD2" / folder.name)
    argv = [str(tmp_path / "src"), "--preset", "ph2", "--out", str(tmp_path / "f.h5"), "--val", "0"]
    images.main(argv)
    assert {e.name for e in h5.read_info(tmp_path / "f.h5").entries("train")} == {"IMD1", "IMD2"}


def test_sizes_that_are_too_small_are_refused_before_anything_is_read(tmp_path, refused):
    argv = [tmp_path, "--out", tmp_path / "f.h5", "--size", "4"]
    refused(images.main, argv, "--size 4", "8 pixels or more")


@pytest.mark.parametrize("data", [dict(classes=TWO, dims=2, channels=3)])
def test_doubtful_new_pictures_are_noted(data, tmp_path, capsys):
    """Names of masks, a picture of one value, and images in another folder, too."""
    src, data = tmp_path / "src", data | dict(prepared={"from": "pictures"})
    for folder, name, image in (
        (".", "a.png", RGB),
        (".", "b.png", RGB * 0),
        (".", "a_mask.png", RGB),
        ("images", "c.png", RGB),
    ):
        (src / folder).mkdir(parents=True, exist_ok=True)
        save(src / folder / name, image)
    info = new_images.convert(str(src), str(tmp_path / "f.h5"), data)
    said = capsys.readouterr().out
    assert len(info.entries("unlabeled")) == 3 and said.count("note:") == 4
    assert "note: 1 of 3 files have names of masks" in said and "a_mask.png" in said
    assert f"note: images of {src} alone are taken; those of {src / 'images'}" in said
    assert "note: 1 images have one value everywhere, such as b" in said
    new_images.convert(str(src / "a.png"), str(tmp_path / "f.h5"), data)
    assert "note" not in capsys.readouterr().out
