"""Where the voxels of a NIfTI-1 file lie: headers and what is refused of them, body axes, and the
way of a mask back to its source's grid.

The affine of a file is that of nibabel: sform where its code is above 0, else qform where its code
is above 0, else pixdim alone. Here it is in mm, whatever the header's unit.

Legend: x, y, z a file's axes, of which x is the fastest; (D, H, W) the axes of arrays, z, y, x.
"""

import math
from itertools import permutations, product

import nibabel
import numpy as np
from nibabel import orientations

from data import loading
from data.files import InputError

BYTES = 348  # of a header
VOXELS = 352  # where the voxels of a mask begin
MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # of xyzt_units: unknown (then mm), m, mm, µm
LARGEST = 100  # mm of a voxel's side: more is a wrong unit
TOLERANCE = 1e-3  # relative error of a side, cosine of a right angle
SAME_PLACE = 0.05  # voxels by which places that are the same may differ


# ------------------------------------------------------------------------------------- headers


def parse(raw, where):
    """The header of a NIfTI-1 file as nibabel has it. raw: the file's bytes, 348 or more

    InputError, which begins with `where`, for another format and for a header that says nothing
    or contradicts itself.
    """
    sizes = {order: int.from_bytes(raw[:4], order) for order in ("little", "big")}
    if 540 in sizes.values():
        raise InputError(f"{where}: NIfTI-2; save it as NIfTI-1")
    order = next((o for o, size in sizes.items() if size == BYTES), None)
    if len(raw) < BYTES or order is None:
        raise InputError(
            f"{where}: not a NIfTI-1 file (or truncated); copy it again, or save it as NIfTI-1"
        )
    header = nibabel.Nifti1Header(bytes(raw[:BYTES]), "<>"[order == "big"], check=False)
    magic = header["magic"].item()
    if magic == b"ni1":
        raise InputError(
            f"{where}: the header of a pair, whose voxels are in an .img file; save both as one "
            ".nii"
        )
    if magic != b"n+1":
        raise InputError(f"{where}: not a NIfTI-1 file (an Analyze file?); save it as NIfTI-1")
    size_of(header, where)
    affine_of(header, where)
    return header


def size_of(header, where):
    """The numbers of voxels along a file's axes, three or more: (x, y, z), (x, y, z, t), ..."""
    n, *sizes = header["dim"].tolist()
    if not 1 <= n <= 7 or min(sizes[:n]) < 1:
        raise InputError(f"{where}: the header has sizes (dim) of {[n, *sizes]}; mend the header")
    if n < 3:
        raise InputError(f"{where}: {n}D; a volume is needed")
    while n > 3 and sizes[n - 1] == 1:
        n -= 1
    return tuple(sizes[:n])


def has_axes(header):
    """Whether a header knows along which axes of the body its voxels lie."""
    return header["sform_code"] > 0 or header["qform_code"] > 0


def affine_of(header, where):
    """[4, 4]: voxel (x, y, z) of a header -> mm (right, anterior, superior).

    InputError if the header says nothing that can be right, or contradicts itself.
    """
    unit = int(header["xyzt_units"]) & 7
    if unit not in MM:
        raise InputError(
            f"{where}: the header's unit of space (xyzt_units) is {unit}, which is "
            "none; set it to 2 for mm"
        )
    codes = [int(header[f"{name}_code"]) for name in ("qform", "sform")]
    if min(codes) < 0 or max(codes) > 5:
        raise InputError(
            f"{where}: the header has codes {codes} of qform and sform; they are 0 "
            "to 5, so set the orientation anew"
        )
    sides = header["pixdim"][1:4].astype(np.float64)
    if not all(0 < s < math.inf for s in sides):
        raise InputError(
            f"{where}: the header has a spacing (pixdim) of {sides_of(sides)}; mend the header"
        )
    if header["sform_code"] > 0:
        name, affine = "sform", header.get_sform()
    elif header["qform_code"] > 0:
        name, affine = "qform", qform_of(header, where)
    else:
        name, affine = "pixdim", np.diag([*sides, 1.0])
    affine = affine.astype(np.float64)
    affine[:3] *= MM[unit]
    check_affine(affine, f"{where}: the header's {name}")
    found = np.linalg.norm(affine[:3, :3], axis=0)
    said = sides * MM[unit]
    if np.abs(found / said - 1).max() > TOLERANCE:
        raise InputError(
            f"{where}: the header contradicts itself: voxels of {sides_of(said)} mm "
            f"(pixdim), but {sides_of(found)} mm ({name}); set both to the true size"
        )
    return affine


def qform_of(header, where):
    """The qform [4, 4], in the header's unit; as the standard says, qfac is 1 unless below 0."""
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    try:
        return header.get_qform()
    except ValueError:
        numbers = ", ".join(f"{header[f'quatern_{axis}']:g}" for axis in "bcd")
        raise InputError(
            f"{where}: the header's qform turns by a quaternion ({numbers}) that is "
            "longer than 1; set the orientation anew"
        ) from None


def forms_differ(header, where):
    """Whether qform and sform both count and differ in place: readers take one of them."""
    if header["sform_code"] <= 0 or header["qform_code"] <= 0:
        return False
    forms = header.get_sform(), qform_of(header, where)
    return not largest_distance(*forms, size_of(header, where)[:3]) <= SAME_PLACE  # also NaN


def check_affine(affine, where):
    """InputError unless an affine [4, 4] in mm places voxels that are boxes of a usual size."""
    if not np.isfinite(affine).all() or affine[3].tolist() != [0, 0, 0, 1]:
        raise InputError(f"{where}: NaN, infinite, or no affine map; set the orientation anew")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    if not sides.all():
        raise InputError(
            f"{where}: voxels of {sides_of(sides)} mm, which is no volume; set the orientation anew"
        )
    if sides.max() > LARGEST:
        raise InputError(
            f"{where}: voxels of {sides_of(sides)} mm; mend the spacing, or its unit (xyzt_units)"
        )
    cosines = affine[:3, :3] / sides
    if np.abs(cosines.T @ cosines - np.eye(3)).max() > TOLERANCE:
        raise InputError(
            f"{where}: axes that are not at right angles (a tilted gantry?), so no "
            "distance would be right; resample the volume to a grid without shear"
        )


def sides_of(values):
    """Lengths in words, as in 0.8 x 0.8 x 2.5."""
    return " x ".join(f"{v:g}" for v in values)


def mask_header(header):
    """A copy of a header for a mask on the same grid: whatever says where it is stays."""
    header = without_texts(header)
    kept = header["dim"][1:4].copy()
    header["dim"] = [3, *kept, 1, 1, 1, 1]
    header["datatype"], header["bitpix"] = 2, 8  # uint8
    header["vox_offset"], header["magic"] = VOXELS, b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    unused = "cal_max cal_min glmax glmin toffset intent_code intent_p1 intent_p2 intent_p3"
    for name in f"{unused} slice_start slice_end slice_code slice_duration".split():
        header[name] = 0
    return header


def without_texts(header):
    """A copy of a header without its texts, which may name a patient."""
    header = header.copy()
    for name in ("data_type", "db_name", "descrip", "aux_file", "intent_name"):
        header[name] = b""
    return header


def new_header(affine, grid, where):
    """A header of a volume (D, H, W) of which nothing but its affine [4, 4] in mm is known."""
    check_affine(affine, f"{where}: its affine")
    header = nibabel.Nifti1Header()
    header.set_data_shape(grid[::-1])
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header.set_xyzt_units("mm")
    return header


# ------------------------------------------------------------------------------------- body axes


def axes_of(affine):
    """Where D, H and W point to in the body, such as SAR for up, front and right."""
    return "".join(nibabel.aff2axcodes(affine))[::-1]


AXES = {"".join(a) for pairs in permutations(("RL", "AP", "SI")) for a in product(*pairs)}


def are_axes(value):
    """Whether a value of anybody is what axes_of() gives."""
    return isinstance(value, str) and value in AXES


def turn_to(axes, affine):
    """nibabel's orientation [3, 2] that turns a volume of an affine to body axes like SAR."""
    wanted = orientations.axcodes2ornt(axes[::-1])
    return orientations.ornt_transform(orientations.io_orientation(affine), wanted)


def reoriented(values, turn):
    """An array (D, H, W) after a turn [3, 2]."""
    return np.ascontiguousarray(orientations.apply_orientation(values.T, turn).T)


def reoriented_affine(affine, grid, turn):
    """The affine of a volume of a grid (D, H, W) after a turn [3, 2]."""
    return affine @ orientations.inv_ornt_aff(turn, grid[::-1])


def turn_to_source(header, affine, grid, where):
    """The turn [3, 2] from the axes of a stored volume to those of its source.

    header: of the source; affine and grid (D, H, W): of the source on the stored axes. InputError
    if the two are not the same volume.
    """
    source = affine_of(header, where)
    check_affine(affine, f"{where}: its affine")
    turn = orientations.io_orientation(np.linalg.inv(source) @ affine)
    size = size_of(header, where)[:3]
    same = not np.isnan(turn).any() and tuple(np.array(grid[::-1])[np.argsort(turn[:, 0])]) == size
    turned = reoriented_affine(affine, grid, turn) if same else None
    if not same or largest_distance(source, turned, size) > SAME_PLACE:
        raise InputError(
            f"{where}: header and affine are of different grids; convert the data again"
        )
    return turn


def largest_distance(a, b, size):
    """How far apart two affines put the corners of a grid (x, y, z), in voxels of the first."""
    corners = np.stack(np.meshgrid(*([0, n - 1] for n in size), [1]), -1).reshape(-1, 4)
    apart = (np.linalg.inv(a) @ b - np.eye(4)) @ corners.T
    return float(np.abs(apart).max())


# ------------------------------------------------------------------------------------- grids


def spacing_of(affine):
    """mm per axis of (D, H, W)."""
    return tuple(np.linalg.norm(affine[:3, :3], axis=0)[::-1].tolist())


def resample(values, grid, ratio, nearest=False):
    """An array (D, H, W) on another grid that begins at the same voxel; linear, or nearest.

    grid: (D, H, W) of the other; ratio: of its spacing to that of the array, along each axis. What
    lies beyond the last voxel has its value.
    """
    for axis, (n, r) in enumerate(zip(grid, ratio)):
        last = values.shape[axis] - 1
        at = (np.arange(n) * r).clip(0, last)
        if nearest:
            values = values.take(np.floor(at + 0.5).astype(int), axis)
            continue
        low = np.floor(at).astype(int)
        share = np.float32(at - low).reshape(-1, *[1] * (values.ndim - 1 - axis))
        before, after = values.take(low, axis), values.take(np.minimum(low + 1, last), axis)
        values = before + share * (after - before)
    return values


def to_source(label, entry):
    """A label (D, H, W) on the grid of a dataset's case, an h5.Entry, on that of its source.

    Scores on the source's grid and masks both come from here. The axes stay those of the dataset.
    """
    if entry.source_grid is None or len(entry.source_grid) == 2:  # pictures are predicted there
        return label
    if entry.affine is None or not entry.spacing_known:  # both grids have the same ends
        return loading.resize_label(label, entry.source_grid)
    ratio = np.divide(entry.source_spacing, entry.spacing)
    return resample(label, entry.source_grid, ratio, nearest=True)
