"""Metrics of masks, agreement of estimates of quality with them, and comparisons of two runs.

Formulas on numpy arrays. Nothing but numpy and scipy is imported, so that a process that only
scores masks (evaluate.py --workers) starts in half a second.

Legend: N samples (slices or patches), K classes, D depth, H height, W width, n entries of a list.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy  # stats and optimize load at their first use: processes that score masks need neither
from scipy import ndimage, spatial

# -------------------------------------------------------------------------------------------- masks


@dataclass
class Score:
    """One class of one case. hd95 and asd in mm where the spacing is known, else in pixels.

    To add a metric: a field, its value in each case of score(), and a column in summarize() of
    evaluate.py.
    """

    dice: float
    jaccard: float
    hd95: float
    asd: float
    one_empty: bool  # prediction or truth is empty, but not both


def plain_dice(shared, total):
    """2 |A and B| / (|A| + |B|) from numbers of pixels, arrays or not; 1 where both are empty."""
    return np.where(total > 0, 2 * shared / np.maximum(total, 1), 1.0)


def dice(mask, truth):
    """Dice of two boolean arrays; 1 if both are empty."""
    total = np.count_nonzero(mask) + np.count_nonzero(truth)
    return float(plain_dice(np.count_nonzero(mask & truth), total))


def score(mask, truth, spacing):
    """The Score of two boolean masks of one shape, 2D or 3D. spacing: per axis.

    Both empty: Dice 1, distances 0. One empty: Dice 0, distances = the diagonal of the grid, the
    worst that is possible. HD95 is medpy's (95th percentile of both directed sets of surface
    distances, pooled); ASD is medpy's asd (mask to truth).
    """
    a, b = np.count_nonzero(mask), np.count_nonzero(truth)
    if a == 0 and b == 0:
        return Score(1.0, 1.0, 0.0, 0.0, False)
    if a == 0 or b == 0:
        diagonal = float(np.linalg.norm(np.multiply(mask.shape, spacing)))
        return Score(0.0, 0.0, diagonal, diagonal, True)
    both = np.count_nonzero(mask & truth)
    to_truth, to_mask = surface_distances(mask, truth, spacing)
    return Score(
        dice=float(plain_dice(both, a + b)),
        jaccard=float(both / (a + b - both)),
        hd95=float(np.percentile(np.concatenate([to_truth, to_mask]), 95)),
        asd=float(to_truth.mean()),
        one_empty=False,
    )


def surface_distances(a, b, spacing):
    """The distances of the surface of a to that of b, and of b to a. -> two 1D arrays

    a, b: boolean arrays, neither empty. The surface of a mask are its elements that have a face
    neighbor outside of it (or outside of the grid).
    """
    box = bounding_box(a | b)  # distances within are the same
    edge_a, edge_b = surface(a[box]), surface(b[box])
    if np.count_nonzero(edge_a) + np.count_nonzero(edge_b) < 0.2 * edge_a.size:
        # a search tree of few points beats a map of all distances
        points_a = np.argwhere(edge_a) * np.asarray(spacing, np.float64)
        points_b = np.argwhere(edge_b) * np.asarray(spacing, np.float64)
        to_b, _ = spatial.cKDTree(points_b).query(points_a)
        to_a, _ = spatial.cKDTree(points_a).query(points_b)
    else:
        to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
        to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return to_b, to_a


def bounding_box(mask):
    """The slices that hold all of a boolean array that is not empty."""
    axes = range(mask.ndim)
    hit = []
    for axis in axes:
        others = tuple(i for i in axes if i != axis)
        hit.append(np.flatnonzero(mask.any(others)))
    return tuple(slice(at[0], at[-1] + 1) for at in hit)


def surface(mask):
    """The elements of a boolean array with a face neighbor outside of it.

    ndimage.binary_erosion takes six times as long.
    """
    inner = mask.copy()
    padded = np.pad(mask, 1)
    middle = [slice(1, -1)] * mask.ndim
    for axis in range(mask.ndim):
        for side in (slice(-2), slice(2, None)):
            inner &= padded[(*middle[:axis], side, *middle[axis + 1 :])]
    return mask & ~inner


def largest_component(label, K):
    """The largest face-connected component of each class. (D, H, W) -> (D, H, W)"""
    out = np.zeros_like(label)
    for k in range(1, K):
        parts, n = ndimage.label(label == k)
        if n:
            out[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = k
    return out


def score_case(label, truth, spacing, K, largest=False, regions=()):
    """The Score of each foreground class of a case, then of each of R regions. -> [K-1+R]

    label, truth: (D, H, W) uint8; spacing: per axis; two mean a plain image, scored in 2D.
    largest: of label, only the largest component of each class counts.
    regions [R]: numbers of the classes of which each is the union.
    """
    if largest:
        label = largest_component(label, K)
    if len(spacing) == 2:
        label, truth = label[0], truth[0]
    scores = [score(label == k, truth == k, spacing) for k in range(1, K)]
    for members in regions:
        inside = np.isin(np.arange(K), members)  # [K]
        scores.append(score(inside[label], inside[truth], spacing))
    return scores


# ----------------------------------------------------------------------------- estimates of quality


def agreement(predicted, true):
    """How well estimates match. predicted, true [n] -> n, MAE, RMSE, Pearson, Spearman, worst

    worst: the share of the worst 20% that are among the 20% of the lowest estimates (ties count in
    parts, as if broken at random). A value is None where it is undefined: without entries, and the
    last three where one side is constant.
    """
    predicted = np.asarray(predicted, np.float64)
    true = np.asarray(true, np.float64)
    n = len(true)
    found = dict(n=n, mae=None, rmse=None, pearson=None, spearman=None, worst=None)
    if n > 0:
        error = predicted - true
        found["mae"] = float(np.abs(error).mean())
        found["rmse"] = float(np.sqrt((error**2).mean()))
    if n > 1 and predicted.std() > 1e-9 and true.std() > 1e-9:
        fifth = -(-n // 5)
        both = (lowest(predicted, fifth) * lowest(true, fifth)).sum()
        found["pearson"] = float(scipy.stats.pearsonr(predicted, true)[0])
        found["spearman"] = float(scipy.stats.spearmanr(predicted, true)[0])
        found["worst"] = float(both / fifth)
    return found


def lowest(values, count):
    """Which values are the `count` lowest, a number that need not be whole. [n] -> [n] in [0, 1]

    1 for those, 0 for the others, and in between for those that are tied at the limit.
    """
    limit = np.sort(values)[max(1, math.ceil(count - 1e-9)) - 1]
    below, tied = values < limit, values == limit
    return below + tied * (count - below.sum()) / tied.sum()


def monotone(x, y):
    """The increasing map from x to y of the least squared error, as a function.

    It is linear between the values x.
    """
    x, where, count = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(where, y) / count
    fitted = scipy.optimize.isotonic_regression(means, weights=count).x
    return lambda v: np.interp(v, x, fitted)


def calibrated(estimate, true, patient, reference, folds=5):
    """Estimates after a monotone map to Dice that was fitted on other patients. -> [n]

    estimate, true, patient [n]; reference: a pair (estimate, true) of val, on which the map is
    fitted. It is None where val itself is scored: the map is then fitted on the patients of the
    other folds. None where there are no others.
    """
    if reference is not None:
        return monotone(*reference)(estimate) if len(reference[0]) else None
    fold = np.unique(patient, return_inverse=True)[1] % folds
    if len(set(fold)) < 2:
        return None
    out = np.zeros(len(estimate))
    for k in set(fold):
        others, mine = fold != k, fold == k
        out[mine] = monotone(estimate[others], true[others])(estimate[mine])
    return out


@dataclass
class Outputs:
    """The outputs of a run on the grid of the network: what is true of them and each estimate."""

    present: np.ndarray  # [N, K-1] whether the truth holds the class
    shared: np.ndarray  # [N, K-1] pixels of both output and truth
    area: np.ndarray  # [N, K-1] pixels of the output
    total: np.ndarray  # [N, K-1] pixels of output and truth, added
    estimates: dict  # name -> [N, K-1]


def of_classes(outputs, held):
    """Outputs of some classes alone. held [K-1] bool"""
    parts = (outputs.present, outputs.shared, outputs.area, outputs.total)
    estimates = {name: values[:, held] for name, values in outputs.estimates.items()}
    return Outputs(*(part[:, held] for part in parts), estimates)


TOGETHER = "g and f together"  # the name of models.quality.together()
UNSCALED = {  # estimates, but not of a Dice
    TOGETHER,
    "mean confidence",
    "mean certainty (entropy)",
    "region confidence",
}
LEVELS = {  # {0}: slice or patch
    "present": "of each {0} and class that is present",
    "absent": "of each {0} and class that is absent (Dice is 0 or 1)",
    "image": "of each {0}, mean over all classes, present or absent",
    "volume": "of each volume and class",
}


def at_level(outputs, level, case, name=None):
    """The entries of a level, and the case of each. case [N] -> two arrays [n]

    name: of an estimate; None takes the true Dice.

    The true Dice of a volume is that of all pixels of its samples (where patches overlap, they
    count twice). Its estimate is the mean of those of its samples, weighted with the output's area.
    """
    case = np.asarray(case)
    if level == "volume":
        return at_volumes(outputs, case, name)
    if name is None:
        values = plain_dice(outputs.shared, outputs.total)  # [N, K-1]
    else:
        values = outputs.estimates[name]
    if level == "image":
        return values.mean(1), case
    chosen = outputs.present if level == "present" else ~outputs.present
    return values[chosen], np.broadcast_to(case[:, None], values.shape)[chosen]


def at_volumes(outputs, case, name=None):
    """The entries of the level "volume", see at_level(). -> two arrays [volumes x (K-1)]"""
    names, volume = np.unique(case, return_inverse=True)
    if name is None:
        found = plain_dice(sums(outputs.shared, volume), sums(outputs.total, volume))
    else:
        found = area_mean(outputs.estimates[name], outputs.area, case)
    return found.ravel(), np.repeat(names, found.shape[1])


def area_mean(values, area, case):
    """The mean of each volume's samples, weighted with the output's area. -> [volumes, K-1]

    values, area [N, K-1]; case [N]: of each sample. Volumes are in the order of their names.
    """
    volume = np.unique(case, return_inverse=True)[1]
    weight = area + 1e-6  # where no sample has an output, all count alike
    return sums(values * weight, volume) / sums(weight, volume)


def sums(values, volume):
    """Sums over the samples of each volume. values [N, K-1], volume [N] -> [volumes, K-1]"""
    return np.stack([np.bincount(volume, column) for column in values.T], 1)


def compare_rows(groups, ours, reference, patient):
    """The agreement of every estimate with the truth, for each level. -> {level: rows}

    groups: (name, labeled, members) of each group of runs; a member is the number of a run.
    ours: the Outputs of each run, and the case of each sample.
    reference: the same on val, for calibration, or None.
    patient: {case: patient}.

    Each estimate has a row for every group of runs, one for the mean over all runs, and one for all
    outputs pooled.
    """
    outputs, case = ours
    tables = {}
    for level in LEVELS:
        _, owner = at_level(outputs[0], level, case)
        one_slice = level == "volume" and len(set(case)) == len(case)
        one_class = level == "image" and outputs[0].area.shape[1] == 1
        if one_slice or one_class or not len(owner):  # "present" and "absent" have these entries
            continue
        patients = np.tile([patient[c] for c in owner], len(outputs))
        rows = []
        for name in outputs[0].estimates:
            estimates, truths = entries(ours, level, name), entries(ours, level)
            on_val = None
            if reference is not None:  # one map for all runs: nobody knows how good a run is
                on_val = [np.concatenate(entries(reference, level, n)) for n in (name, None)]
            found, pooled = compare(estimates, truths, patients, on_val)
            for group, labeled, members in groups:
                title = f"{group}, labeled {labeled}"
                rows.append(mean_row(title, name, [found[i] for i in members]))
            rows.append(mean_row("mean of all", name, found))
            rows.append(mean_row("pooled", name, [pooled]))
        order = {run: i for i, run in enumerate(dict.fromkeys(row["run"] for row in rows))}
        tables[level] = sorted(rows, key=lambda row: order[row["run"]])
    return tables


def entries(ours, level, name=None):
    """The entries of a level, see at_level(), of each run. ours: Outputs, case -> a list of [n]"""
    outputs, case = ours
    return [at_level(one, level, case, name)[0] for one in outputs]


def compare(estimates, truths, patients, on_val):
    """The agreement of each run and of all of them pooled. -> a list of dicts, a dict

    estimates, truths: a list of [n], of each run; patients [runs n]; on_val: see calibrated().
    """
    estimate, truth = np.concatenate(estimates), np.concatenate(truths)
    pairs = [*zip(estimates, truths), (estimate, truth)]
    *found, pooled = [agreement(e, t) | dict(dice=t.mean(), calibrated=None) for e, t in pairs]
    mapped = calibrated(estimate, truth, patients, on_val)
    if mapped is not None:
        errors = np.abs(mapped - truth).reshape(len(found), -1).mean(1)  # [runs]
        for one, error in zip(found, errors):
            one["calibrated"] = error
        pooled["calibrated"] = errors.mean()
    return found, pooled


def mean_row(run, estimate, found):
    """A row of a table: the mean of the agreements that compare() found."""

    def mean(key):
        known = [one[key] for one in found if one[key] is not None]  # r of constants is not
        return float(np.mean(known)) if known else None

    return {
        "run": run,
        "estimate": estimate,
        "n": int(mean("n")),
        "Dice": mean("dice"),
        "MAE": None if estimate in UNSCALED else mean("mae"),
        "MAE calibrated": mean("calibrated"),
        "Pearson": mean("pearson"),
        "Spearman": mean("spearman"),
        "worst 20% found": mean("worst"),
    }


BAD = 0.7  # a case whose Dice, mean over classes, is lower is bad
SHOWN = 0.2  # the share of the cases that a person looks at
TRIAGE = (
    f"Triage: share of the bad cases (Dice, mean over classes, below {BAD:g}) that is among the "
    f"{SHOWN:.0%} of all cases that an estimate ranks lowest"
)


def triage(outputs, case):
    """Who finds the bad cases. outputs: of each run; case: of each sample -> rows, curves

    Of the cases that are BAD, the share that is among the SHOWN share of all cases that an estimate
    ranks lowest, mean over the runs that have both bad and other cases. At random it is SHOWN. The
    estimate "at best" ranks by the true Dice; it finds less than 1 where bad cases are many.

    rows: one for each estimate; curves: {estimate: the same for SHOWN = 0, .01, ..., 1}. Both are
    empty where no run has both kinds of cases.
    """
    bad = {i: case_means(one, case) < BAD for i, one in enumerate(outputs)}  # {run: [cases]}
    bad = {i: cases for i, cases in bad.items() if 0 < cases.mean() < 1}
    if not bad:
        return [], {}

    def curve(name=None):
        found = [found_by(case_means(outputs[i], case, name), cases) for i, cases in bad.items()]
        return np.mean(found, 0).tolist()

    curves = {name: curve(name) for name in outputs[min(bad)].estimates}
    curves["at best"] = curve()
    same = {  # in every row
        "runs": f"{len(bad)} of {len(outputs)}",
        "cases": len(bad[min(bad)]),
        "bad": float(np.mean([cases.sum() for cases in bad.values()])),
    }
    rows = []
    for name, found in curves.items():
        area = float(np.trapezoid(found, dx=0.01))
        shown = found[round(100 * SHOWN)]
        rows.append({"estimate": name, "found": shown, "area under curve": area} | same)
    return rows, curves


def case_means(outputs, case, name=None):
    """The estimate of each case, or its true Dice, mean over classes. -> [cases]"""
    values, _ = at_level(outputs, "volume", case, name)
    return values.reshape(-1, outputs.area.shape[1]).mean(1)


def found_by(estimate, bad):
    """The share of the bad cases among the lowest 0, 1, ..., 100% of all. [cases] -> 101 numbers"""
    shares = np.linspace(0, 1, 101)
    return [float((lowest(estimate, s * len(bad)) * bad).sum() / bad.sum()) for s in shares]


def quality_rows(masks, predicted, true, present, classes):
    """Agreement over all classes, and in parts. predicted, true, present [N, K-1] -> rows

    masks: what these are, in words.
    Where some slice lacks a class, classes that are present and absent have a row each. Of several
    foreground classes, each has a row where it is present.
    """

    def row(entries, chosen):
        return dict(masks=masks, entries=entries, **agreement(predicted[chosen], true[chosen]))

    rows = [row("all", np.ones_like(present))]
    if not present.all():
        rows += [row("present", present), row("absent", ~present)]
    if len(classes) > 2:
        for k, name in enumerate(classes[1:]):
            rows.append(row(name, (present[:, k], k)))
    return rows


# ----------------------------------------------------------------------- two runs on the same cases


class Difference(NamedTuple):
    """How much higher one run is than another."""

    mean: float
    interval: tuple | None  # (low, high) of 95%; None for a single patient
    p: float | None  # of no difference; None for a single patient, or where there is none at all


def paired(values, base, patient):
    """The Difference of values from base, both of the same n cases, over patients.

    Patients are independent, their cases are not. patient: the name of each case's.
    """
    difference = patient_means(np.subtract(values, base), patient)
    mean, interval, p = float(difference.mean()), None, None
    if len(difference) > 1:
        interval = bootstrap_interval(difference)
        if difference.any():
            p = signed_rank(difference)
    return Difference(mean, interval, p)


def patient_means(values, patient):
    """The mean over the cases of each patient. n values, n names -> [patients]"""
    index = np.unique(patient, return_inverse=True)[1]
    return np.bincount(index, values) / np.bincount(index)


def bootstrap_interval(values, resamples=10_000, seed=0):
    """The 95% interval of the mean of independent values [n], n > 1. -> (low, high)

    The percentile interval of the bootstrap (Efron and Tibshirani 1993, chapter 13).
    """
    found = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return tuple(map(float, found.confidence_interval))


def signed_rank(difference):
    """Two-sided p of the signed-rank test (Wilcoxon 1945).

    difference: independent [n], not all zero, symmetric around zero if there is no difference.
    """
    return float(scipy.stats.wilcoxon(difference).pvalue)
