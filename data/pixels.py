"""A picture file as an image or as a mask of class numbers, or an error that says why not.

Images keep their depth: 8 bits as uint8, all else (10 to 16 bits, int32, float) as float32. A file
is refused where a decoder would drop or change something without a word: several pages,
transparency, channels beyond gray or RGB, CMYK and Lab colors. NaN is refused, too, and so is
damage, as far as a format shows it: PNG and deflate have checksums, JPEG and LZW have none.

A TIFF may hold several channels that are no colors: several gray samples a pixel, or more than four
of any kind, none of which is an alpha; or pages that ImageJ calls channels (and no slices or
frames). read_channels() alone reads these.

Masks of two classes are 0 and 1, or black and white, or a palette's indices 0 and 1. Gray levels
between black and white are cut at half of the range where they lie on edges, as in masks that were
resized or saved as JPEG. Where they form regions or lines, they are a third class (often "void"),
and the mask is refused. Masks of more classes hold class numbers, as gray levels or as the indices
of a colored palette. A program that makes a palette for each file may give a class another index in
each. So black, if it is used, must be index 0, and each index must have one color in all files.
"""

import contextlib
import io
import logging
import os
import re
import struct
import sys
import tempfile
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    EXTRASAMPLES,
    FILLORDER,
    IMAGEDESCRIPTION,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    PREDICTOR,
    ROWSPERSTRIP,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    STRIPBYTECOUNTS,
    STRIPOFFSETS,
    TILEBYTECOUNTS,
    TILELENGTH,
    TILEOFFSETS,
    TILEWIDTH,
    ImageFileDirectory_v2,
)

from data import figures, h5
from data.files import InputError, replacing
from data.labels import MOST, are_whole, class_numbers

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # our own line is enough
logging.getLogger("PIL").setLevel(logging.CRITICAL)
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
LOSSY = {"JPEG", "MPO", "JPEG2000", "WEBP", "AVIF"}  # names of formats in Pillow
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes; "+" is BigTIFF
ORIENTATION, TURNED_AS = 0x112, range(2, 9)  # tag of EXIF and TIFF; 1 is upright
MOST_PIXELS = 2**30  # OpenCV's own limit
Image.MAX_IMAGE_PIXELS = None  # examine() looks at their number

# Gray levels of a mask of two classes
BLACK = 32  # a level up to this counts as black, and one as near to the brightest as white
CLASS_NUMBERS = 8  # regions of levels below this are class numbers: 0, 1, and 255 for void
REGION_RANGE = 8  # neighbors in a region differ by no more; across a blurred edge they do
REGION_PIXELS = 9  # from which on a region counts, each amid equal neighbors
LINE_PIXELS = 16  # from which on a line counts
FEW_LEVELS = 16  # a mask with more of them was once a JPEG, where white may be a region of 253

TURNED = "stored turned (EXIF orientation); images and masks are on the grid as it is stored"
PADDED = "JPEG with some bytes after its pixels; it may be damaged, so look at it"
PALETTE = "colored palette; its indices are taken as class numbers"
EMPTY = "JPEG mask without foreground; JPEG may have erased it, if it was 0 and 1"
DARK = f"nearly black regions (values up to {BLACK}); they are taken as background"


@dataclass
class File:
    """A picture file whose pixels are not decoded yet."""

    path: Path
    content: bytes
    opened: Image.Image | None  # None: a TIFF of a kind that Pillow does not know
    turned: bool  # whether its EXIF orientation says so
    lossy: bool
    pages: list  # tags of a TIFF's pages, [{number: value}, ...]
    channels: int  # of a TIFF whose channels are no colors; 0: gray or RGB


# ------------------------------------------------------------------------------------ files


@contextlib.contextmanager
def reading(path):
    """In this block, whatever Pillow makes of a damaged file becomes an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Exception:
        raise unreadable(path) from None


def unreadable(path):
    return InputError(
        f"{path}: not a readable picture (damaged, or of an unusual kind); copy it again, save it "
        "as PNG, or take it out"
    )


def examine(path, channels=False):
    """Reads a file and what it says of its pixels -> File. InputError if they would be misread.

    channels: whether it may hold several that are no colors
    """
    content = Path(path).read_bytes()
    with reading(path):
        tags, pages, opened, of_pages, count = {}, 1, None, [], 0
        if content[:4] in TIFF:
            of_pages, pages = read_tags(content)
            tags, count = of_pages[0], count_channels(of_pages, pages)
            if count and channels:
                for page in of_pages:
                    check_samples(path, page, content)
                return File(Path(path), content, None, False, False, of_pages, count)
        try:
            opened = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:
            if not tags:
                raise
        width, height = opened.size if opened else (tags[IMAGEWIDTH], tags[IMAGELENGTH])
        if width * height > MOST_PIXELS:
            raise InputError(
                f"{path}: {width} x {height} pixels, and no more than {MOST_PIXELS:,} can be read; "
                "make it smaller, or cut it into tiles"
            )
        if not tags and opened.format != "MPO":  # MPO is a camera's photograph with its previews
            pages = getattr(opened, "n_frames", 1)
        if pages > 1:
            raise InputError(
                f"{path}: has {pages} pages or frames, of which one alone would be read; "
                "save each that is meant as a picture of its own"
            )
        mode = opened.mode if opened else ""
        if mode in ("CMYK", "LAB", "HSV"):
            raise InputError(f"{path}: its colors are {mode}; save it as RGB")
        if tags:
            check_tags(path, tags, mode)
        if opened and opened.has_transparency_data and (lowest := lowest_opacity(opened)) < 255:
            raise InputError(
                f"{path}: has transparent pixels (opacity down to {lowest} of 255), "
                "and nobody knows what was seen there; save it without transparency"
            )
        check_strips(path, tags, content)
        turned = not tags and opened.getexif().get(ORIENTATION, 1) in TURNED_AS
    lossy = bool(opened) and opened.format in LOSSY or tags.get(COMPRESSION) in JPEG
    return File(Path(path), content, opened, turned, lossy, of_pages, count)


def channels_in(path):
    """How many channels a TIFF holds that are no colors; 0 for gray, RGB and all other pictures."""
    with open(path, "rb") as f:
        if f.read(4) not in TIFF:
            return 0
    with reading(path):
        return count_channels(*read_tags(Path(path).read_bytes()))


def count_channels(tags, pages):
    """How many channels a TIFF holds that are no colors, or 0.

    tags: of its directories; pages: how many pages there are, see read_tags()
    """
    samples = tags[0].get(SAMPLESPERPIXEL, 1)
    extra = set(np.atleast_1d(tags[0].get(EXTRASAMPLES, ())))
    if pages == 1:
        gray = tags[0].get(PHOTOMETRIC_INTERPRETATION, 1) == 1
        return int(samples) if samples > 1 and (gray or samples > 4) and not extra & ALPHA else 0
    text = str(tags[0].get(IMAGEDESCRIPTION, ""))
    said = dict(re.findall(r"(?m)^(channels|slices|frames)=(\d{1,9})$", text))
    alone = said.get("slices", "1") == said.get("frames", "1") == "1" and samples == 1
    return pages if alone and said.get("channels") == str(len(tags)) == str(pages) else 0


def read_tags(content):
    """TIFF tags of each directory [{number: value}, ...], and the number of pages."""
    stream = io.BytesIO(content)
    head = stream.read(8)
    if head[2:4] in (b"+\0", b"\0+"):
        head += stream.read(8)
    directory, tags, places = ImageFileDirectory_v2(head), [], set()
    while directory.next and directory.next not in places:  # a damaged file may lead in a circle
        places.add(directory.next)
        stream.seek(directory.next)
        directory.load(stream)
        tags.append(dict(directory))
    return tags, max(len(places), pages_of_imagej(tags[0], len(content)))


def pages_of_imagej(tags, size):
    """How many pages ImageJ says there are: a file may have one directory (tags) for all of them.

    1 if the file, of so many bytes, has no room for them: other programs keep ImageJ's text.
    """
    stack = re.search(r"(?m)^images=(\d{1,9})$", str(tags.get(IMAGEDESCRIPTION, "")))
    pixels = tags.get(IMAGEWIDTH, 0) * tags.get(IMAGELENGTH, 0)
    page = pixels * np.max(tags.get(BITSPERSAMPLE, 8)) // 8  # bytes
    return int(stack[1]) if stack and int(stack[1]) * page <= size else 1


def check_tags(path, tags, mode):
    """InputError for TIFFs that OpenCV shortens or changes. mode: Pillow's word for the pixels."""
    photometric = tags.get(PHOTOMETRIC_INTERPRETATION, 1)
    channels = tags.get(SAMPLESPERPIXEL, 1)
    bits = max(np.atleast_1d(tags.get(BITSPERSAMPLE, 1)))
    if tags.get(ORIENTATION, 1) in TURNED_AS:  # OpenCV turns TIFFs, and no other pictures
        raise InputError(
            f"{path}: is stored turned (TIFF orientation {tags[ORIENTATION]}); save it upright"
        )
    colors = {0: 1, 1: 1, 2: 3, 3: 1, 6: 3}.get(photometric, 0)  # gray, RGB, palette, YCbCr
    if channels != colors + (mode in ("LA", "RGBA")):
        raise InputError(
            f"{path}: has {channels} channels (TIFF photometric {photometric}); save "
            "it as gray or RGB"
        )
    planar = colors == 3 and tags.get(PLANAR_CONFIGURATION) == 2
    if bits > 8 and (photometric == 0 or planar):
        what = "0 as white" if photometric == 0 else "one color after another"
        raise InputError(
            f"{path}: stores more than 8 bits with {what} (TIFF photometric 0 or "
            "planar configuration 2); save it again as PNG or a plain TIFF"
        )


def check_samples(path, tags, content):
    """InputError unless a page of several channels is one whose samples decode_samples() takes."""
    bits, kinds = (set(np.atleast_1d(tags.get(tag, 1))) for tag in (BITSPERSAMPLE, SAMPLEFORMAT))
    turned, compression = tags.get(ORIENTATION, 1), tags.get(COMPRESSION, 1)
    wrong = {
        f"is stored turned (TIFF orientation {turned})": turned != 1,
        "stores 0 as white": tags.get(PHOTOMETRIC_INTERPRETATION, 1) == 0,
        "has channels of different types": len(bits) > 1 or len(kinds) > 1 or min(bits) < 8,
        f"is compressed in an unusual way (TIFF {compression})": compression not in PLAIN,
        "has a predictor of floats (TIFF predictor 3)": tags.get(PREDICTOR, 1) not in (1, 2),
        "is a BigTIFF": content[2:4] in (b"+\0", b"\0+"),
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise InputError(
            f"{path}: of several channels, and {found[0]}; save it as a plain TIFF, or each "
            "channel as a picture of its own"
        )
    check_strips(path, tags, content)


# where strips, or tiles, begin, and their bytes
STRIPS = (STRIPOFFSETS, STRIPBYTECOUNTS), (TILEOFFSETS, TILEBYTECOUNTS)
JPEG = 6, 7  # TIFF compressions
DEFLATE = 8, 32946
PLAIN = 1, 5, *DEFLATE, 32773  # those of samples in a row: none, LZW, PackBits
ALPHA = {1, 2}  # EXTRASAMPLES that are an opacity


def check_strips(path, tags, content):
    """InputError if the checksum of a deflated TIFF is wrong, at which libtiff does not look."""
    if tags.get(COMPRESSION) not in DEFLATE:
        return
    for starts, sizes in STRIPS:
        for start, size in zip(np.atleast_1d(tags.get(starts, ())), tags.get(sizes, ())):
            try:
                zlib.decompress(content[int(start) : int(start + size)])
            except zlib.error:
                raise unreadable(path) from None


def lowest_opacity(opened):
    """The opacity of a picture's most transparent pixel, 0 to 255."""
    if opened.mode.startswith("I"):  # 16 bits, of which one value is transparent
        return 255 * bool((np.array(opened) != opened.info["transparency"]).all())
    return opened.convert("RGBA").getchannel("A").getextrema()[0]


DAMAGE = "Corrupt JPEG|Premature end of JPEG|Inconsistent|Invalid SOS|TIFF_Error|Discarding"
PADDING = r"(\d+) extraneous bytes before marker 0xd9"  # of a JPEG: its end


def decode(file, flag=cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH, notes=None):
    """Pixels through OpenCV, on the grid on which they are stored: (H, W) gray, or (H, W, 3) RGB.

    flag: of OpenCV; default: as they are in the file. notes: see note(). InputError if there are
    none, or if libjpeg or libtiff say that they are damaged.
    """
    found, content = None, np.frombuffer(file.content, np.uint8)
    with words_of_libraries() as words, contextlib.suppress(cv2.error):
        found = cv2.imdecode(content, flag | cv2.IMREAD_IGNORE_ORIENTATION)
    further = re.search(PADDING, words[0])
    if found is None or not further and re.search(DAMAGE, words[0]):
        raise unreadable(file.path)
    if further:
        check_padding(file, int(further[1]), notes)
    return found if found.ndim == 2 else found[..., ::-1]


def decode_samples(file):
    """Pixels of a TIFF of several channels, (H, W, C), as they are stored.

    OpenCV decodes up to four. It gets them as a gray picture that is C times as wide, or, where
    each channel lies by itself, as C pictures.
    """
    tags, count = file.pages[0], file.channels
    if len(file.pages) > 1:
        whole = np.frombuffer(file.content, np.uint8)
        with words_of_libraries() as words, contextlib.suppress(cv2.error):
            done, found = cv2.imdecodemulti(whole, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_GRAYSCALE)
        fits = done and len({(v.shape, v.dtype) for v in found}) == 1 and len(found) == count
        if not fits or re.search(DAMAGE, words[0]):
            raise unreadable(file.path)
        return np.dstack(found)
    if tags.get(PLANAR_CONFIGURATION, 1) == 2:  # planar
        return np.dstack([decode(as_gray(file, tags, 1, c)) for c in range(count)])
    wide = decode(as_gray(file, tags, count)).reshape(tags[IMAGELENGTH], tags[IMAGEWIDTH], count)
    if tags.get(PREDICTOR, 1) == 2:  # differences along a row, in a tile each for itself
        whole = f"u{wide.itemsize}"  # also of floats
        side = tags.get(TILEWIDTH, tags[IMAGEWIDTH])
        tiles = np.split(wide.view(whole), range(side, tags[IMAGEWIDTH], side), 1)
        sums = [np.cumsum(tile, 1, dtype=whole) for tile in tiles]
        wide = np.concatenate(sums, 1).view(wide.dtype)
    return wide


def as_gray(file, tags, factor, plane=None):
    """A TIFF of several samples as one of gray pixels -> File.

    factor: how much wider it is; plane: which of its samples, where each lies by itself
    """
    grid = IMAGEWIDTH, IMAGELENGTH, ROWSPERSTRIP, TILEWIDTH, TILELENGTH
    kept = {tag: [tags[tag]] for tag in (*grid, COMPRESSION, FILLORDER, PREDICTOR) if tag in tags}
    kept |= {tag: [np.atleast_1d(tags.get(tag, 1))[0]] for tag in (BITSPERSAMPLE, SAMPLEFORMAT)}
    kept |= {
        tag: [1] for tag in (PHOTOMETRIC_INTERPRETATION, SAMPLESPERPIXEL, PLANAR_CONFIGURATION)
    }
    for tag in {IMAGEWIDTH, TILEWIDTH} & set(kept):
        kept[tag] = [kept[tag][0] * factor]
    if plane is None and PREDICTOR in kept:
        kept[PREDICTOR] = [1]  # decode_samples() undoes it
    for tag in {tag for pair in STRIPS for tag in pair} & set(tags):
        kept[tag] = np.atleast_1d(tags[tag]).tolist()
        if plane is not None:
            part = len(kept[tag]) // file.channels
            kept[tag] = kept[tag][plane * part : (plane + 1) * part]
    order = "<" if file.content[:2] == b"II" else ">"
    start = len(file.content) + len(file.content) % 2
    content = file.content[:4] + struct.pack(f"{order}I", start) + file.content[8:]
    return replace(file, content=content.ljust(start, b"\0") + directory(kept, order, start))


def directory(tags, order, start):
    """The bytes of a TIFF's last directory, which lies at `start`. tags: {number: [value, ...]}"""
    entries, more = struct.pack(f"{order}H", len(tags)), b""
    beyond = start + 2 + 12 * len(tags) + 4  # where the values lie that do not fit into an entry
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *map(int, values))
        entries += struct.pack(f"{order}HHI", tag, 4, len(values))
        entries += packed if len(values) == 1 else struct.pack(f"{order}I", beyond + len(more))
        more += packed if len(values) > 1 else b""
    return entries + bytes(4) + more


def check_padding(file, count, notes):
    """What `count` bytes between the pixels of a JPEG and its end mean.

    Some programs fill up with bytes of one value. A few others are noted; more of them are pixels
    of a damaged picture, which is an InputError.
    """
    end = file.content.rfind(b"\xff\xd9")
    if len(set(file.content[max(0, end - count) : end])) <= 1:
        return
    if count > 8:
        raise unreadable(file.path)
    note(notes, PADDED, file.path)


@contextlib.contextmanager
def words_of_libraries():
    """Yields a list of one text: what OpenCV, libjpeg and libtiff complain of in this block.

    They write it to standard error, and decode on.
    """
    words = [""]
    try:
        usual = os.dup(2)
    except OSError:  # there is no standard error, and nothing to be learned
        yield words
        return
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)
        try:
            yield words
        finally:
            cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
            os.dup2(usual, 2)
            os.close(usual)
            file.seek(0)
            words[0] = file.read().decode(errors="replace")


# ------------------------------------------------------------------------------------ images


def read_picture(path, gray, notes=None):
    """An image -> (H, W) if gray, else (H, W, 3) RGB; uint8, or float32 if the file is deeper.

    notes: see note(). InputError if the file would be misread, or has NaN or infinite pixels.
    """
    file = examine(path)
    if file.turned:
        note(notes, TURNED, path)
    image = decode(file, notes=notes)
    if image.dtype != np.uint8:
        image = to_float32(image, path)
        if gray and image.ndim == 3:
            image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    elif gray and image.ndim == 3:
        image = decode(file, cv2.IMREAD_GRAYSCALE)
    if gray or image.ndim == 3:
        return np.ascontiguousarray(image)
    return np.dstack([image] * 3)


def read_channels(paths, notes=None):
    """The channels of an image: a gray picture for each, or one TIFF of several. -> (H, W, C)

    uint8, or float32 if one of them is deeper. notes: see note(). InputError if a file would be
    misread, if one is colored, or if they differ in size.
    """
    found = [read_channel(path, notes) for path in paths]
    for path, image in zip(paths, found):
        if image.shape[:2] != found[0].shape[:2]:
            a, b = (" x ".join(map(str, v.shape[1::-1])) for v in (image, found[0]))
            raise InputError(
                f"{path}: {a} pixels, but another channel of its image, {paths[0]}, has {b}; make "
                "them equal"
            )
    return np.dstack(found)


def read_channel(path, notes):
    """A gray picture (H, W), or a TIFF of several channels (H, W, C); uint8 or float32."""
    file = examine(path, channels=True)
    if file.turned:
        note(notes, TURNED, path)
    with reading(path):
        image = decode_samples(file) if file.channels else decode(file, notes=notes)
    if image.ndim == 3 and not file.channels:
        if (image != image[..., :1]).any():
            raise InputError(
                f"{path}: a colored picture, but a channel is gray; save it as gray, or each of "
                "its colors as a picture of its own"
            )
        image = image[..., 0]
    return np.ascontiguousarray(image) if image.dtype == np.uint8 else to_float32(image, path)


def to_float32(image, path):
    """An image of any depth as float32. InputError if that loses or lacks numbers."""
    if not np.isfinite(image).all():
        raise InputError(f"{path}: has NaN or infinite pixels; mend them, or take it out")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(image, np.float32)
    lost = np.abs(found - image.astype(np.float64)).max()
    spread = image.std(dtype=np.float64)
    if lost > 1e-3 * spread or 0 < spread < h5.LEAST_STD:
        raise InputError(
            f"{path}: has values from {image.min():.9g} to {image.max():.9g}, which "
            "float32 cannot hold or tell apart; bring them to a usual range"
        )
    return found


# ------------------------------------------------------------------------------------ masks


def read_mask(path, classes, notes=None, values=None, known=None):
    """A mask -> class numbers (H, W) uint8. InputError if it is not clear which ones are meant.

    notes: see note(). values: those that stand for the classes, of --labels. known: see
    check_palette().
    """
    file, K = examine(path), MOST if values else len(classes)
    if file.turned:
        raise InputError(
            f"{path}: is stored turned (EXIF orientation), so nobody knows whether "
            "its image is, too; save both upright"
        )
    if K > 2 and file.lossy:
        raise InputError(
            f"{path}: JPEG and the like change class numbers; save the mask as PNG "
            "from where it was made"
        )
    if file.opened and file.opened.mode == "P":
        mask = read_palette(file, K, notes, {} if known is None else known)
    else:
        mask = to_gray(decode(file, notes=notes), file, K, values)
    if values:
        return class_numbers(mask, path, values)
    if K == 2:
        return binary(mask, file, notes)
    if mask.max() >= K:
        raise InputError(
            f"{path}: values up to {mask.max()}, but there are {K} classes (0 to "
            f"{K - 1}); name all of them with --classes, or say with --labels which "
            "values stand for them"
        )
    return mask


def read_palette(file, K, notes, known):
    """The mask of a picture with a palette: its gray levels if all are gray, else its indices.

    known: see check_palette()
    """
    with reading(file.path):
        indices = np.array(file.opened)
        colors = np.reshape(file.opened.getpalette("RGB"), (-1, 3)).astype(np.uint8)
        colors = np.pad(colors, ((0, 256 - len(colors)), (0, 0)))
    numbers = indices.max() < K
    looked_at = colors if K > 2 else colors[:2] if numbers else colors[np.unique(indices)]
    if (looked_at == looked_at[:, :1]).all():  # gray
        if K == 2 and numbers and colors[0, 0] > colors[1, 0]:
            raise InputError(
                f"{file.path}: index 0 of its palette is brighter than index 1, so "
                "either may be the background; save it with gray levels 0 and 255"
            )
        return indices if K == 2 and numbers else colors[indices][..., 0]
    if K == 2 and not numbers:
        raise InputError(
            f"{file.path}: indices {shares(indices)} of a colored palette, but two "
            "classes are 0 and 1; name all with --classes, or save it as 0 and 255"
        )
    used = int(indices.max()) + 1
    if (colors[:used] != palette()[:used]).any():  # which is that of our own masks
        note(notes, PALETTE, file.path)
        check_palette(file.path, colors, np.unique(indices).tolist(), known, K)
    return indices


def check_palette(path, colors, used, known, K):
    """InputError where the indices of a colored palette may be no class numbers.

    colors [256, 3]; used: indices; known: {index: (its color, a path)} of the masks so far, which
    grows by those of this one. Of K = 2 classes, the foreground may have any color.
    """
    black = [i for i in used if not colors[i].any()]
    if black and colors[0].any():
        raise InputError(
            f"{path}: black is index {black[0]} of its palette, and index 0, the background, is "
            "not; save class numbers as gray values"
        )
    for i in used if K > 2 else used[:1]:
        mine = colors[i].tolist()
        color, other = known.setdefault(i, (mine, path))
        if color != mine:
            raise InputError(
                f"{path}: index {i} of its palette has another color than in {other}, so that it "
                "may be another class; save class numbers as gray values"
            )


def to_gray(mask, file, K, values=None):
    """Pixels of any depth, (H, W) or (H, W, 3) -> gray levels (H, W) uint8.

    The color of a mask of two classes becomes its brightest channel, if it is one color on black.
    With `values`, which class_numbers() is to map, the levels keep their depth.
    """
    if mask.dtype == np.uint16 and K == 2 and mask.max() == 65535:
        levels = np.unique(mask)
        few = len(levels) <= FEW_LEVELS and (levels % 257).any()  # no black and white of 8 bits
        if few or not file.lossy and has_numbers(mask):
            raise InputError(
                f"{file.path}: values {shares(mask)}, so not a mask of two classes; save the "
                "foreground as 255 and all else as 0, or say with --labels which values there are"
            )
        mask = np.round(mask / 257)
    usable = are_whole(mask) & (mask >= 0) & (mask <= 255)
    if K == 2 and not usable.all():
        raise InputError(
            f"{file.path}: label value {mask[~usable][0]:.6g} is neither background nor "
            "foreground; save the mask as 0 and 1, or as 0 and 255"
        )
    mask = mask if values else class_numbers(mask, file.path)
    if mask.ndim == 2:
        return mask
    red, green, blue = np.moveaxis(mask, 2, 0)
    if (red == green).all() and (red == blue).all():
        return np.ascontiguousarray(red)
    level = mask.max(2)
    if K > 2:
        raise InputError(
            f"{file.path}: a colored mask; save class numbers 0 to {K - 1} as gray "
            "values, or as the indices of a palette"
        )
    brightest = mask[level == level.max()]
    colors, counts = np.unique(brightest, axis=0, return_counts=True)
    color = colors[counts.argmax()]
    faded = level[..., None] * (color / level.max())  # on the way from black to the color
    if (np.abs(mask - faded).max(2) > BLACK).sum() >= REGION_PIXELS:
        raise InputError(
            f"{file.path}: a mask of several colors, or of one on a background that "
            "is not black; save the foreground as 255 and all else as 0"
        )
    return level


def has_numbers(mask):
    """Whether a mask of 16 bits has regions of one number below the first gray level of 8 bits.

    Beside a blurred void of 65535 they are class numbers; as gray levels they would be black.
    """
    square = np.ones((3, 3), np.uint8)
    flat = cv2.erode(mask, square) == cv2.dilate(mask, square)
    return (np.bincount(mask[flat & (mask < 257)])[1:] >= REGION_PIXELS).any()


def binary(mask, file, notes=None):
    """Gray levels (H, W) uint8 of a mask of two classes -> 0 and 1, cut at half of the range.

    InputError if there are other levels than two, apart from edges; see the top of this file.
    """
    low, top = int(mask.min()), int(mask.max())
    if top == 0 and file.lossy:
        note(notes, EMPTY, file.path)
    if top == 0 or top == 1 and not file.lossy:
        return mask
    if top < 128 or file.lossy and top < 255 - BLACK:
        raise InputError(
            f"{file.path}: values {shares(mask)} look like class numbers"
            + (
                ", which JPEG changes; save the mask as PNG from where it was made"
                if file.lossy
                else "; name the classes with --classes, say with --labels which values stand for "
                "them, or save the foreground as 255"
            )
        )
    if BLACK < low < 255 - BLACK:
        raise InputError(
            f"{file.path}: values {shares(mask)}, none of them near 0; save the "
            "background as 0 and the foreground as 255"
        )
    if levels := other_levels(mask, top, notes, file.path):
        raise InputError(
            f"{file.path}: values {shares(mask)}, so not a mask of two classes "
            f"({levels}); save the foreground as 255 and all else as 0, or name all "
            "classes with --classes (and their values with --labels)"
        )
    if top < 255 - BLACK:
        note(notes, f"foreground of value {top}, not 255", file.path)
    return (mask > top // 2).astype(np.uint8)


def other_levels(mask, top, notes, path):
    """What else a mask (H, W) uint8 shows between black and `top`, beside edges -> text, or ""."""
    square, block = np.ones((3, 3), np.uint8), np.ones((2, 2), np.uint8)
    darkest, brightest = cv2.erode(mask, square), cv2.dilate(mask, square)
    between = (mask > BLACK) & (mask < top - BLACK)
    region = (brightest - darkest <= REGION_RANGE) & (darkest > BLACK) & (brightest < top - BLACK)
    if region.sum() >= max(REGION_PIXELS, between.sum() / 100):
        return f"regions of {levels_of(mask[region]).argmax()}"
    if between.mean() > 0.5:
        return "most of it neither black nor white"
    every, flat = levels_of(mask), levels_of(mask[brightest == darkest])
    if (every > 0).sum() == 3 and max(between.sum(), every[1:CLASS_NUMBERS].sum()) >= LINE_PIXELS:
        return f"regions or lines of {np.flatnonzero(every)[1]}"
    equal = cv2.erode(mask, block, anchor=(0, 0)) == cv2.dilate(mask, block, anchor=(0, 0))
    thick = cv2.dilate((equal & between).astype(np.uint8), block, anchor=(1, 1)) > 0
    if LINE_PIXELS <= between.sum() < 3 * (thick & between).sum():
        return f"lines of {levels_of(mask[between]).argmax()}"
    regions = [v for v in range(1, top) if flat[v] >= max(REGION_PIXELS, every[v] / 4)]
    wrong = [v for v in regions if not CLASS_NUMBERS <= v <= BLACK]
    if wrong and (every > 0).sum() <= FEW_LEVELS:
        return f"regions of {wrong[0]}"
    gray = flat[BLACK + 1 : max(BLACK + 1, top - BLACK)]  # edges that were resized have none
    if gray.max(initial=0) >= max(REGION_PIXELS, 0.8 * gray.sum()):
        return f"regions of {BLACK + 1 + gray.argmax()}"
    if any(v <= BLACK for v in regions):
        note(notes, DARK, path)
    return ""


def levels_of(mask):
    """How many pixels have each value 0 to 255."""
    return np.bincount(mask.ravel(), minlength=256)


def shares(mask):
    """The most frequent values of a mask (8 or 16 bits) and their shares of its pixels, as text."""
    counts = levels_of(mask)
    most = sorted(np.argsort(-counts, kind="stable")[: min(4, (counts > 0).sum())])
    more = (counts > 0).sum() - len(most)
    return ", ".join(f"{v} ({counts[v] / mask.size:.1%})" for v in most) + (
        f" and {more} more" if more else ""
    )


def palette():
    """The colors of class numbers in our masks, [256, 3] uint8: black, and those of our figures."""
    colors = [[round(255 * v) for v in figures.color(k)] for k in range(255)]
    return np.uint8([[0, 0, 0], *colors])


def write_mask(path, label):
    """Writes a mask (H, W) uint8 as PNG, whole or not at all.

    Pixels are class numbers, shown through a palette in the colors of our figures.
    """
    picture = Image.fromarray(label)
    picture.putpalette(palette().ravel().tolist())
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


# ------------------------------------------------------------------------------------ notes


def note(notes, text, path):
    """Remembers a file for say(). notes: {text: [path, ...]}, or None."""
    if notes is not None:
        notes.setdefault(text, []).append(path)


def say(notes):
    """Prints each text once, with the number of its files and the first of them."""
    for text, paths in notes.items():
        print(
            f"note: {len(paths)} {'file' if len(paths) == 1 else 'files'}, such as {paths[0]}: "
            f"{text}"
        )
