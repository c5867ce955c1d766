"""Metrics of masks, how well estimates of quality agree with them, and how two runs compare: formulas on numpy arrays.

Nothing but numpy and scipy is imported, so that a process that only scores masks (evaluate.py --workers) starts in half a second.

Legend: N samples (slices or patches), K classes, D depth, H height, W width, n entries of a list.
"""
import math
from dataclasses import dataclass

import numpy as np
import scipy  # stats and optimize load when they are first used: processes that score masks need neither
from scipy import ndimage, spatial

# ---------------------------------------------------------------------------------------------------- masks

@dataclass
class Score:
    """One class of one case. hd95 and asd in mm where the spacing is known, else in pixels."""
    dice: float
    jaccard: float
    hd95: float
    asd: float
    one_empty: bool  # prediction or truth is empty, but not both


def plain_dice(shared, total):
    """2 |A and B| / (|A| + |B|) from numbers of pixels, arrays or not; 1 where both masks are empty."""
    return np.where(total > 0, 2 * shared / np.maximum(total, 1), 1.0)


def dice(mask, truth):
    """Dice of two boolean arrays; 1 if both are empty."""
    return float(plain_dice(np.count_nonzero(mask & truth), np.count_nonzero(mask) + np.count_nonzero(truth)))


def score(mask, truth, spacing):
    """Dice, Jaccard, HD95 and ASD of two boolean masks of one shape (2D or 3D). spacing: per axis.

    Both empty: Dice 1, distances 0. One empty: Dice 0, distances = the diagonal of the grid, the worst that is possible.
    HD95 is medpy's (95th percentile of both directed surface distance sets, pooled); ASD is medpy's asd (mask to truth).
    """
    a, b = np.count_nonzero(mask), np.count_nonzero(truth)
    if a == 0 or b == 0:
        diagonal = float(np.linalg.norm(np.multiply(mask.shape, spacing)))
        return Score(1.0, 1.0, 0.0, 0.0, False) if a == b else Score(0.0, 0.0, diagonal, diagonal, True)
    both = np.count_nonzero(mask & truth)
    to_truth, to_mask = surface_distances(mask, truth, spacing)
    return Score(float(plain_dice(both, a + b)), float(both / (a + b - both)), float(np.percentile(np.concatenate([to_truth, to_mask]), 95)),
                 float(to_truth.mean()), False)


def surface_distances(a, b, spacing):
    """Distances of a's surface to b's and of b's to a's. Boolean arrays, neither empty -> two 1D arrays.

    The surface of a mask are its elements that have a face neighbor outside of it (or outside of the grid).
    """
    box = bounding_box(a | b)  # distances within are the same
    edge_a, edge_b = surface(a[box]), surface(b[box])
    if np.count_nonzero(edge_a) + np.count_nonzero(edge_b) < 0.2 * edge_a.size:  # a search tree of few points beats a map of all distances
        points_a, points_b = (np.argwhere(edge) * np.asarray(spacing, np.float64) for edge in (edge_a, edge_b))
        return spatial.cKDTree(points_b).query(points_a)[0], spatial.cKDTree(points_a).query(points_b)[0]
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)[edge_a]
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)[edge_b]
    return to_b, to_a


def bounding_box(mask):
    """The slices that hold all of a boolean array that is not empty."""
    hit = [np.flatnonzero(mask.any(tuple(i for i in range(mask.ndim) if i != axis))) for axis in range(mask.ndim)]
    return tuple(slice(at[0], at[-1] + 1) for at in hit)


def surface(mask):
    """The elements of a boolean array with a face neighbor outside of it; ndimage.binary_erosion takes six times as long."""
    inner, padded, middle = mask.copy(), np.pad(mask, 1), [slice(1, -1)] * mask.ndim
    for axis in range(mask.ndim):
        for side in (slice(-2), slice(2, None)):
            inner &= padded[(*middle[:axis], side, *middle[axis + 1:])]
    return mask & ~inner


def largest_component(label, K):
    """Keeps the largest face-connected component of each class. (D, H, W) -> (D, H, W)"""
    out = np.zeros_like(label)
    for k in range(1, K):
        parts, n = ndimage.label(label == k)
        if n:
            out[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = k
    return out


def score_case(label, truth, spacing, K, largest=False):
    """The Score of each foreground class of a case. label and truth (D, H, W) uint8; spacing: per axis; two mean a plain image, scored in 2D.

    largest: of label, only the largest component of each class counts.
    """
    label = largest_component(label, K) if largest else label
    if len(spacing) == 2:
        label, truth = label[0], truth[0]
    return [score(label == k, truth == k, spacing) for k in range(1, K)]


# ---------------------------------------------------------------------------------------------------- estimates of quality

def agreement(predicted, true):
    """How well estimates match: n, MAE, RMSE, Pearson, Spearman (None where one side is constant), and worst: the share of the worst 20%
    that are among the 20% of the lowest estimates (ties count in parts, as if broken at random)."""
    predicted, true = (np.asarray(v, np.float64) for v in (predicted, true))
    n, varied = len(true), len(true) > 1 and predicted.std() > 1e-9 and true.std() > 1e-9
    return dict(n=n, mae=float(np.abs(predicted - true).mean()) if n else None,
                rmse=float(np.sqrt(((predicted - true) ** 2).mean())) if n else None,
                pearson=float(scipy.stats.pearsonr(predicted, true)[0]) if varied else None,
                spearman=float(scipy.stats.spearmanr(predicted, true)[0]) if varied else None,
                worst=float((lowest(predicted, -(-n // 5)) * lowest(true, -(-n // 5))).sum() / -(-n // 5)) if varied else None)


def lowest(values, count):
    """1 for each of the `count` lowest, which need not be whole; 0 for the others, and in between for those that are tied at the limit."""
    limit = np.sort(values)[max(1, math.ceil(count - 1e-9)) - 1]
    below, tied = values < limit, values == limit
    return below + tied * (count - below.sum()) / tied.sum()


def monotone(x, y):
    """The increasing map from x to y of the least squared error, as a function; linear in between."""
    x, where, count = np.unique(x, return_inverse=True, return_counts=True)
    fitted = scipy.optimize.isotonic_regression(np.bincount(where, y) / count, weights=count).x
    return lambda v: np.interp(v, x, fitted)


def calibrated(estimate, true, patient, reference, folds=5):
    """Estimates after a monotone map to Dice that was fitted on other patients: on the reference, a pair (estimate, true) of val, or, where
    that is None since val itself is scored, on the patients of the other folds. None where there are no others."""
    if reference is not None:
        return monotone(*reference)(estimate) if len(reference[0]) else None
    out, fold = np.zeros(len(estimate)), np.unique(patient, return_inverse=True)[1] % folds
    if len(set(fold)) < 2:
        return None
    for k in set(fold):
        out[fold == k] = monotone(estimate[fold != k], true[fold != k])(estimate[fold == k])
    return out


@dataclass
class Outputs:
    """A run's outputs, sample by sample: what is true of them on the network's grid, and what each estimate says."""
    present: np.ndarray  # [N, K-1] whether the truth holds the class
    shared: np.ndarray   # [N, K-1] pixels of both output and truth
    area: np.ndarray     # [N, K-1] pixels of the output
    total: np.ndarray    # [N, K-1] pixels of output and truth, added
    estimates: dict      # name -> [N, K-1]


def of_classes(outputs, held):
    """Outputs of some classes alone. held [K-1] bool"""
    parts = (outputs.present, outputs.shared, outputs.area, outputs.total)
    estimates = {name: values[:, held] for name, values in outputs.estimates.items()}
    return Outputs(*(part[:, held] for part in parts), estimates)


UNSCALED = {"mean confidence", "mean certainty (entropy)", "region confidence"}  # estimates, but not of a Dice
LEVELS = {"present": "of each {0} and class that is present", "absent": "of each {0} and class that is absent (Dice is 0 or 1)",
          "image": "of each {0}, mean over all classes, present or absent", "volume": "of each volume and class"}


def at_level(outputs, level, case, name=None):
    """The entries of a level, [n]: of the estimate of that name, or of the true Dice; and the case that each belongs to.

    A volume's true Dice is that of all pixels of its samples (where patches overlap, they count twice); its estimate is the mean of theirs,
    weighted with the output's area.
    """
    case, values = np.asarray(case), plain_dice(outputs.shared, outputs.total) if name is None else outputs.estimates[name]    # [N, K-1]
    if level == "image":
        return values.mean(1), case
    if level == "volume":
        names, volume = np.unique(case, return_inverse=True)
        add = lambda v: np.stack([np.bincount(volume, column) for column in v.T], 1)                                           # [volumes, K-1]
        weight = outputs.area + 1e-6
        found = plain_dice(add(outputs.shared), add(outputs.total)) if name is None else add(values * weight) / add(weight)
        return found.ravel(), np.repeat(names, found.shape[1])
    chosen = outputs.present if level == "present" else ~outputs.present
    return values[chosen], np.broadcast_to(case[:, None], values.shape)[chosen]


def compare_rows(groups, ours, reference, patient):
    """Agreement of every estimate with the truth, for each level and each group of runs, the mean over all runs, and all outputs pooled.

    ours: Outputs of each run, and the case of each sample; reference: the same on val, for calibration, or None; patient: of each case.
    -> {level: rows}
    """
    tables, (outputs, case) = {}, ours
    for level in LEVELS:
        true, owner = at_level(outputs[0], level, case)
        alone = (level == "volume" and len(set(case)) == len(case)) or (level == "image" and outputs[0].area.shape[1] == 1)
        if alone or not len(true):  # every volume is a slice, every slice a class: that table stands there already
            continue
        rows = []
        for name in outputs[0].estimates:
            pairs = [(at_level(o, level, case, name)[0], at_level(o, level, case)[0]) for o in outputs]
            # one map for all runs, since nobody knows how good a run is
            on_val = reference and [np.concatenate([at_level(o, level, reference[1], n)[0] for o in reference[0]]) for n in (name, None)]
            estimate, truth = map(np.concatenate, zip(*pairs))
            mapped = calibrated(estimate, truth, np.tile([patient[c] for c in owner], len(outputs)), on_val)
            errors = [None] * len(outputs) if mapped is None else np.abs(mapped - truth).reshape(len(outputs), -1).mean(1)
            found = [agreement(*pair) | dict(dice=pair[1].mean(), calibrated=error) for pair, error in zip(pairs, errors)]
            found.append(agreement(estimate, truth) | dict(dice=truth.mean(), calibrated=None if mapped is None else np.mean(errors)))
            for run, members in [*((f"{n}, labeled {l}", m) for n, l, m in groups), ("mean of all", range(len(outputs))), ("pooled", [-1])]:
                known = {k: [found[i][k] for i in members if found[i][k] is not None] for k in found[0]}  # r is undefined for constants
                mean = {k: float(np.mean(v)) if v else None for k, v in known.items()}
                rows.append({"run": run, "estimate": name, "n": int(mean["n"]), "Dice": mean["dice"],
                             "MAE": None if name in UNSCALED else mean["mae"], "MAE calibrated": mean["calibrated"],
                             "Pearson": mean["pearson"], "Spearman": mean["spearman"], "worst 20% found": mean["worst"]})
        order = {run: i for i, run in enumerate(dict.fromkeys(r["run"] for r in rows))}
        tables[level] = sorted(rows, key=lambda r: order[r["run"]])
    return tables


BAD, SHOWN = 0.7, 0.2
TRIAGE = f"Triage: share of the bad cases (Dice, mean over classes, below {BAD:g}) that is among the {SHOWN:.0%} of all cases that an estimate ranks lowest"


def triage(outputs, case):
    """Who finds the bad cases: of those whose true Dice (mean over classes) is below BAD, the share that is among the SHOWN share of all cases that
    an estimate ranks lowest, mean over the runs that have such cases and others. At random it is SHOWN; "at best", as the true Dice would rank, it is
    less than 1 where bad cases are many.

    -> rows, one for each estimate, and {estimate: the same for shares of 0, .01, ..., 1}; both empty where no run has both
    """
    def of_cases(o, name=None):
        return at_level(o, "volume", case, name)[0].reshape(-1, o.area.shape[1]).mean(1)                                        # [cases]

    def curve(estimate, bad):
        return [float((lowest(estimate, share * len(bad)) * bad).sum() / bad.sum()) for share in np.linspace(0, 1, 101)]
    judged = [(o, of_cases(o) < BAD) for o in outputs]
    judged = [(o, bad) for o, bad in judged if 0 < bad.mean() < 1]
    if not judged:
        return [], {}
    curves = {name: np.mean([curve(of_cases(o, name), bad) for o, bad in judged], 0).tolist() for name in judged[0][0].estimates}
    curves["at best"] = np.mean([curve(of_cases(o), bad) for o, bad in judged], 0).tolist()
    of = {"runs": f"{len(judged)} of {len(outputs)}", "cases": len(judged[0][1]), "bad": float(np.mean([bad.sum() for _, bad in judged]))}
    rows = [{"estimate": name, "found": found[round(100 * SHOWN)], "area under curve": float(np.trapezoid(found, dx=0.01))} | of
            for name, found in curves.items()]
    return rows, curves


def quality_rows(title, predicted, true, present, classes):
    """Agreement over all classes; where some are absent from a slice's truth, present and absent ones apart; each class where present."""
    rows = [dict(run=title, entries="all", **agreement(predicted.ravel(), true.ravel()))]
    if not present.all():
        rows += [dict(run=title, entries="present", **agreement(predicted[present], true[present])),
                 dict(run=title, entries="absent", **agreement(predicted[~present], true[~present]))]
    if len(classes) > 2:
        rows += [dict(run=title, entries=c, **agreement(predicted[:, k][present[:, k]], true[:, k][present[:, k]]))
                 for k, c in enumerate(classes[1:])]
    return rows


# ---------------------------------------------------------------------------------------------------- two runs on the same cases

def paired(values, base, patient):
    """How much higher values are than base, both of the same n cases, over patients: these are independent, their cases are not.

    -> the mean difference; its 95% interval (low, high), None for a single patient; p of no difference, also None where there is none at all
    """
    difference = patient_means(np.subtract(values, base), patient)
    several = len(difference) > 1
    return float(difference.mean()), bootstrap_interval(difference) if several else None, signed_rank(difference) if several and difference.any() else None


def patient_means(values, patient):
    """The mean over each patient's cases. n values, n names -> [patients]"""
    index = np.unique(patient, return_inverse=True)[1]
    return np.bincount(index, values) / np.bincount(index)


def bootstrap_interval(values, resamples=10_000, seed=0):
    """The 95% interval of the mean of independent values [n], n > 1: the bootstrap's percentile interval (Efron and Tibshirani 1993, chapter 13)."""
    found = scipy.stats.bootstrap((values,), np.mean, n_resamples=resamples, batch=100, method="percentile", rng=np.random.default_rng(seed))
    return tuple(map(float, found.confidence_interval))


def signed_rank(difference):
    """Two-sided p of the signed-rank test (Wilcoxon 1945): independent differences [n], not all zero, lie symmetrically around zero."""
    return float(scipy.stats.wilcoxon(difference).pvalue)
