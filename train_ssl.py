"""Stage 3: semi-supervised training of a segmentation network f, guided by a frozen g.

    python train_ssl.py DATA.h5 --out runs/mt_qw --labeled 7 --method mean_teacher \\
        --weight quality --qp runs/qp/qp.pt
    torchrun --nproc_per_node=4 train_ssl.py ...    # four processes, or GPUs, share each --batch

Reads  DATA.h5: labels of the labeled train cases and of val; images of the other train cases, of
       the split `unlabeled`, and of --unlabeled OTHER.h5; with --weight quality, --correct or --qar
       also the qp.pt of train_qp.py, which holds the quality predictor g.
Writes OUT/best.pt (the best on val since unlabeled images came in), OUT/last.pt (to --resume),
       OUT/step*.pt (with --keep), OUT/log.csv, TensorBoard events.

One step:  L = L_sup + lambda(t) sum(w l) / sum(w) + lambda_qar(t) QAR

    l, w       loss and weight of a pixel; the sums run over the pixels of the unlabeled batch
    QW         w = q^2 [q >= .5], q = g(u, pseudo-label of u): one q for all pixels of an image,
               for those of a pseudo-class, or for each pixel by itself
    --correct  g sees u and its pseudo-label and predicts the truth; the prediction replaces the
               pseudo-label, or is averaged with it, whichever is best on val; if neither helps
               there, it stays. q is then the Dice that the new probabilities expect of their own
               argmax
    QAR        1 - g(u, softmax f(u)); its gradient flows through g into f

Legend: B batch, U unlabeled batch, K classes, C channels; *S the grid that f sees: S, S of slices,
or D, H, W of patches of volumes; x, y labeled images and labels, u unlabeled images, s1, s2 strong
views of u.
"""

import argparse
import atexit
import bisect
import contextlib
import copy
import functools
import itertools
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

import models
from data import augment, figures, h5, loading, metrics, prepared, supervision, workers
from data.files import InputError
from data.labels import without
from data.log import Log
from data.options import (
    SEED,
    SHARE,
    Parser,
    cli,
    flip_axes,
    folder,
    grid,
    note_idle,
    number,
    numbers,
    seed_of,
)
from data.splits import note_shared
from data.workers import postponed_signals
from models import checkpoints, distributed, inference
from models.checkpoints import MAY_CHANGE, VAL_OPTIONS, check_finite, save_checkpoint, start_run
from models.device import (
    Compute,
    Graph,
    capturable,
    channels_last,
    compiled,
    compute,
    device_name,
    fused,
    restore_scaler,
    samples_in,
)
from models.ema import decay_at, move_average
from models.losses import (
    harden,
    label_map,
    mse_loss,
    one_hot,
    pixel_contrast,
    pixel_entropy,
    seg_loss,
    to_samples,
    weighted_mean,
)
from models.quality import Corrected, Seen, corrected, quality_target
from models.resnet import RESNETS

# --------------------------------------------------------------------- what a method sees and gives


@dataclass
class Batch:
    """What a method sees: no labels of u. views() makes it; with --correct, total_loss() sets g."""

    x: torch.Tensor  # [B, C, *S] labeled images, weak view with some change of intensity
    y: torch.Tensor  # [B, K, *S] their labels, one-hot
    u: torch.Tensor  # [U, C, *S] unlabeled images, weak view
    s1: torch.Tensor  # [U, C, *S] strong view of u: other intensity, the same geometry
    s2: torch.Tensor  # [U, C, *S] another one
    g: torch.nn.Module | None = None  # set by total_loss() with --correct: corrects pseudo-labels
    trust: torch.Tensor | float = 1.0  # with g: the share of its belief in a pseudo-label
    at_random: torch.Tensor | float = 1.0  # [B, 1, ...] weights in share_y: 0 on a target

    def pseudo_label(self, p):
        """The pseudo-label of u, of probabilities p [U, K, *S].

        With --correct, g sees u and its pseudo-label and predicts the truth; the prediction takes
        the share `trust` of the pseudo-label.
        """
        if self.g is None:
            return PseudoLabel(self.u, p)
        with torch.no_grad():
            mixed = corrected(self.g, self.u, p, self.trust)  # [U, K, *S]
        return PseudoLabel(self.u, mixed, mixed)


@dataclass(eq=False)
class PseudoLabel:
    """What a method takes for the truth of unlabeled images."""

    image: torch.Tensor  # [U, C, *S] weak views
    p: torch.Tensor  # [U, K, *S] probabilities, without gradient
    belief: torch.Tensor | None = None  # [U, K, *S] with --correct: what g, and f, believe

    @functools.cached_property
    def hard(self):
        """[U, K, *S] one-hot."""
        return harden(self.p)

    @property
    def seen(self):
        """What g sees when it is asked about this pseudo-label."""
        return Seen.of_probabilities(self.image, self.p)

    def repeated(self, count):
        """The first `count` of these labels, over and over."""
        belief = None if self.belief is None else repeated(self.belief, count)
        return PseudoLabel(repeated(self.image, count), repeated(self.p, count), belief)


class Mix(NamedTuple):
    """How samples of a batch are blended: v[perm] takes a share of each pixel, v keeps the rest."""

    perm: torch.Tensor  # [U]
    share: torch.Tensor  # [U, *S] in [0, 1]; [U, 1, ...] where all pixels have the same

    def blend(self, v):
        """v [U, *S] or [U, channels, *S]"""
        share = self.share if v.dim() == self.share.dim() else self.share[:, None]
        return torch.lerp(v, v[self.perm], share)


@dataclass
class Term:
    """One unlabeled loss of a method, not yet weighted."""

    label: PseudoLabel  # of unmixed images, for g to judge
    loss: Callable[[torch.Tensor], torch.Tensor]  # weights of pixels [U, *S] -> scalar
    mix: Mix | None = None  # the loss saw images blended like this


# ------------------------------------------------------------------------------------------ methods
# method(nets, teacher, batch, args, t) -> supervised loss, [Term, ...]
#
# nets: the students; teacher: EMA of the first student, in eval mode; t in [0, 1]: progress of
# training. Only the ratios of a Term's pixel weights matter to its loss.
#
# To add a method: one function, and its name in METHODS. List it in STUDENTS if it trains two
# students, in WARM_UP if it starts otherwise, in MIXES if it mixes a batch, in NO_GRAPH if it
# reads numbers back from the device, in DEFAULTS if its options differ from the paper's, in READ_BY
# beside the options there that it reads. Its own options are in add_method_options. What it learns
# beside f, or remembers from step to step, is a layer or a buffer of the network
# (models/README.md); all else is lost by --resume. `python -m pytest tests/test_ssl.py -k NAME`
# tries it.
#
# Labeled images, weak views and strong views go through a student in passes of their own: mixed
# statistics of batch norm let pseudo-labels drift (results/baselines).


def supervised(nets, teacher, batch, args, t):
    """(cross-entropy + soft Dice) / 2 on the labeled images, summed over the students."""
    return sum(seg_loss(net(batch.x), batch.y) for net in nets), []


def pseudo_label(nets, teacher, batch, args, t):
    """PL-T of the paper, after Lee 2013: a hard label teaches the student where it is confident.

    Student and teacher see the weak view. Deviation: the label is the teacher's; Lee takes the
    student's own. PL-C and PL-QW of the paper keep every pixel: --conf-threshold 0.
    """
    target = batch.pseudo_label(probabilities(teacher, batch.u))
    sure = confident(target.p, args)  # [U, *S]
    at_x = nets[0](batch.x)  # [B, K, *S]
    at_u = nets[0](batch.u)  # [U, K, *S]
    term = Term(target, lambda w: seg_loss(at_u, target.hard, w * sure))
    return seg_loss(at_x, batch.y), [term]


def mean_teacher(nets, teacher, batch, args, t):
    """Mean Teacher, Tarvainen and Valpola 2017: |f(s1) - f'(u)|^2 of probabilities.

    The student f sees a strong view, the teacher f' the weak one. Deviation: the teacher is in eval
    mode, with averaged statistics of batch norm and without dropout.
    """
    target = batch.pseudo_label(probabilities(teacher, batch.u))
    at_x = nets[0](batch.x)
    at_s = nets[0](batch.s1)
    term = Term(target, lambda w: mse_loss(at_s, target.p, w))
    return seg_loss(at_x, batch.y), [term]


def ua_mt(nets, teacher, batch, args, t):
    """UA-MT, Yu et al. 2019: mean teacher where the teacher is certain.

    sum([h < H] |f(s1) - f'(u)|^2) / sum([h < H]) (their Eq. 3), where h is the entropy of the mean
    of 8 passes with dropout and noise (their Eq. 2). H grows from 3/4 to 1 of ln 2 with the paper's
    Gaussian ramp. ln 2 is the largest entropy of two classes; as in the public multi-class
    implementations, H ends there for any number of classes. Networks on a ResNet have no dropout,
    so that noise alone makes their passes differ.

    Deviations: the student sees a strong view, not noise. The target comes from one clean pass in
    eval mode.
    """
    target = batch.pseudo_label(probabilities(teacher, batch.u))
    limit = (0.75 + 0.25 * math.e ** (-5 * (1 - t) ** 2)) * math.log(2)
    sure = (uncertainty(teacher, batch.u, args.mc_passes) < limit).float()  # [U, *S]
    at_x = nets[0](batch.x)
    at_s = nets[0](batch.s1)
    term = Term(target, lambda w: mse_loss(at_s, target.p, w * sure))
    return seg_loss(at_x, batch.y), [term]


def ict(nets, teacher, batch, args, t):
    """ICT, Verma et al. 2019: |f(mix(u_i, u_j)) - mix(f'(u_i), f'(u_j))|^2.

    mix(a, b) = (1 - share) a + share b, share ~ Beta(alpha, alpha). Deviations: each pair has its
    own share, the whole batch has one in the paper; the teacher is in eval mode.
    """
    target = batch.pseudo_label(probabilities(teacher, batch.u))
    perm = shuffled(batch.u)
    alpha = torch.full((len(perm),), args.mix_alpha, device=batch.u.device)
    share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()  # [U]
    mix = Mix(perm, to_samples(share, target.p[:, 0]))
    at_x = nets[0](batch.x)
    at_mix = nets[0](mix.blend(batch.u))
    term = Term(target, lambda w: mse_loss(at_mix, mix.blend(target.p), w), mix=mix)
    return seg_loss(at_x, batch.y), [term]


def cps(nets, teacher, batch, args, t):
    """CPS, Chen et al. 2021: two students, each taught by the other's hard label.

    L_s = l(p1, y) + l(p2, y) and L_cps = l(p1, y2) + l(p2, y1); the students start from different
    weights. Deviations: l is our seg_loss (the paper: cross-entropy), and L_cps is not applied to
    the labeled images, too.
    """
    (at_x1, at_u1), (at_x2, at_u2) = ((net(batch.x), net(batch.u)) for net in nets)
    target1 = batch.pseudo_label(at_u1.detach().float().softmax(1))
    target2 = batch.pseudo_label(at_u2.detach().float().softmax(1))
    first = Term(target2, lambda w: seg_loss(at_u1, target2.hard, w))
    second = Term(target1, lambda w: seg_loss(at_u2, target1.hard, w))
    return seg_loss(at_x1, batch.y) + seg_loss(at_x2, batch.y), [first, second]


def contrastive(nets, teacher, batch, args, t):
    """CL of the paper: pseudo_label, plus .1 times the contrast of pixels between pseudo-classes.

    The contrast is models.losses.pixel_contrast of confident pixels. The paper gives its weight,
    temperature, negatives and threshold. The rest is ours, near U2PL (Wang et al. 2022). Keys are
    features of the teacher, anchors those of the student. Both come from the middle level of the
    encoder, without a projection head: a quarter of the side in the U-Net, an eighth on a ResNet, a
    sixteenth in Swin-UNet. Every confident pixel is an anchor. Negatives are confident pixels of
    other classes in the batch (U2PL: unreliable ones). Pixels of no weight take no part.
    """
    with torch.no_grad():
        keys = teacher.encode(batch.u)
        p = teacher.decode(keys).float().softmax(1)
    target = batch.pseudo_label(p)
    sure = confident(target.p, args)  # [U, *S]
    middle = len(keys) // 2
    features = nets[0].encode(batch.u)
    at_x = nets[0](batch.x)
    at_u = nets[0].decode(features)
    anchors = features[middle]  # [U, F, *s]
    small = F.interpolate(target.p, size=anchors.shape[2:], mode="area")  # [U, K, *s]
    clear = confident(small, args)  # [U, *s]

    def loss(w):
        """Segmentation and contrast, of pixels that weigh w [U, *S] and are sure."""
        near = F.interpolate(w[:, None], size=anchors.shape[2:], mode="area")[:, 0] * clear
        contrast = pixel_contrast(
            anchors,
            keys[middle],
            label_map(small),
            near > 0,
            negatives=args.negatives,
            temperature=args.temperature,
        )  # [U, *s]
        plain = seg_loss(at_u, target.hard, w * sure)
        return plain + args.contrast_weight * weighted_mean(contrast, near)

    return seg_loss(at_x, batch.y), [Term(target, loss)]


def fixmatch(nets, teacher, batch, args, t):
    """FixMatch, Sohn et al. 2020: the student's own label of the weak view teaches the strong one.

    [max p(u) >= threshold] l(p(s1), argmax p(u)) (their Eq. 4), for segmentation with CutMix, as
    the baseline of UniMatch. Deviations: every pixel teaches unless --conf-threshold says otherwise
    (the papers: .95), since thin structures shrink where unsure pixels are left out. The loss is
    ours, and relative to the confident pixels, not to all. lambda has a warm-up and a ramp.
    """
    target = batch.pseudo_label(probabilities(nets[0], batch.u))
    mix = cutmix(batch.u)
    label = mix.blend(target.hard)  # [U, K, *S]
    sure = mix.blend(confident(target.p, args))  # [U, *S]
    at_x = nets[0](batch.x)
    at_s = nets[0](channels_last(mix.blend(batch.s1)))
    term = Term(target, lambda w: seg_loss(at_s, label, w * sure), mix=mix)
    return seg_loss(at_x, batch.y), [term]


def unimatch(nets, teacher, batch, args, t):
    """UniMatch, Yang et al. 2023: two strong views with CutMix, and the weak one with dropout.

    L_u = lambda l(p_fp, p_w) + mu / 2 (l(p_s1, p_w) + l(p_s2, p_w)), lambda = mu = 1/2 (their final
    loss of unlabeled images). fp drops half of the encoder's channels. Deviations: those of
    fixmatch; images are mixed within the batch. Its L = (L_x + L_u) / 2 is --lam 1 but for the
    factor.
    """
    features = nets[0].encode(batch.u)
    both = [torch.cat([f, torch.feature_dropout(f, 0.5, True)]) for f in features]
    at_u, at_dropped = nets[0].decode(both).split(len(batch.u))
    target = batch.pseudo_label(at_u.detach().float().softmax(1))
    sure = confident(target.p, args)  # [U, *S]
    mix1 = cutmix(batch.u)
    mix2 = cutmix(batch.u)
    at_x = nets[0](batch.x)
    strong = torch.cat([mix1.blend(batch.s1), mix2.blend(batch.s2)])
    at_s1, at_s2 = nets[0](channels_last(strong)).split(len(batch.u))
    label1, sure1 = mix1.blend(target.hard), mix1.blend(sure)
    label2, sure2 = mix2.blend(target.hard), mix2.blend(sure)
    return seg_loss(at_x, batch.y), [
        Term(target, lambda w: seg_loss(at_s1, label1, w * sure1) / 4, mix=mix1),
        Term(target, lambda w: seg_loss(at_s2, label2, w * sure2) / 4, mix=mix2),
        Term(target, lambda w: seg_loss(at_dropped, target.hard, w * sure) / 2),
    ]


def bcp(nets, teacher, batch, args, t):
    """BCP, Bai et al. 2023: labeled and unlabeled images are pasted into each other.

    X_in = M x + (1 - M) u and X_out = M u + (1 - M) x, with M a box of 2/3 of each side. L = l on
    the labeled pixels against y + alpha l on the unlabeled ones against the teacher's hard label.
    alpha is --lam. Half of the images of all processes take part in each direction. Until lambda
    sets in, `copy_paste` trains on labeled images alone.

    The student sees pasted images alone, and so do its running statistics of batch norm. The
    teacher sees whole ones, and takes the statistics of each batch, as the authors have it.

    Deviations: the teacher has no dropout. Both directions are pooled, not summed. There is a box
    for each pair. The second stage goes on from the last weights of the first, not from its best.
    """
    with batch_statistics(teacher):
        target = batch.pseudo_label(probabilities(teacher, batch.u))
    if args.largest_component:
        target = replace(target, p=keep_largest(target.p))
    n = max(len(batch.x), len(batch.u))
    target = target.repeated(n)
    x, y, u = (repeated(v, n) for v in (batch.x, batch.y, batch.u))
    box = augment.random_box(x, args.paste)  # [n, 1, *S]
    pair = torch.arange(n, device=x.device) * distributed.world() + distributed.rank()  # see Feed
    inward = to_samples(pair % 2 == 0, x)
    labeled = torch.where(inward, box, 1 - box)  # [n, 1, *S] 1 where the labeled image shows
    logits = nets[0](channels_last(torch.where(labeled > 0, x, u)))
    unlabeled = 1 - labeled[:, 0]  # [n, *S]
    term = Term(target, lambda w: seg_loss(logits, target.hard, w * unlabeled))
    return seg_loss(logits, y, labeled[:, 0]), [term]


def copy_paste(nets, teacher, batch, args, t):
    """The warm-up stage of BCP: boxes of labeled images, and of their labels, on other ones."""
    box = augment.random_box(batch.x, args.paste) > 0  # [B, 1, *S]
    perm = shuffled(batch.x)
    x, y = (torch.where(box, v[perm], v) for v in (batch.x, batch.y))
    return seg_loss(nets[0](channels_last(x)), y), []


# fmt: off
METHODS = {
    "supervised": supervised,
    "pseudo_label": pseudo_label,
    "mean_teacher": mean_teacher,
    "ua_mt": ua_mt,
    "ict": ict,
    "cps": cps,
    "contrastive": contrastive,
    "fixmatch": fixmatch,
    "unimatch": unimatch,
    "bcp": bcp,
}
STUDENTS = {"cps": 2}  # the others have one
WARM_UP = {"bcp": copy_paste}  # until lambda sets in; the others: supervised
MIXES = {  # images of a process's batch with each other: the option that tells how many
    "ict": "batch_unlabeled",
    "fixmatch": "batch_unlabeled",
    "unimatch": "batch_unlabeled",
    "bcp": "batch",  # in its warm-up
}
NO_GRAPH = {  # why --graph cannot hold a step that reads back from the device; "": it can
    "contrastive": lambda args: "contrastive draws its pixels one class after the other",
    "bcp": lambda args: args.largest_component and "--largest-component runs on the CPU",
}

DEFAULTS = {  # of any option, where a method's publication, or a measurement (results/baselines),
    # says otherwise than parse_args()
    "mean_teacher": dict(lam=0.3),
    "ua_mt": dict(lam=0.3),
    "ict": dict(lam=0.3),
    "cps": dict(lam=0.1),
    "fixmatch": dict(lam=1.0, conf_threshold=0.0),
    "unimatch": dict(lam=1.0, conf_threshold=0.0),
    "bcp": dict(lam=0.5, lam_warmup=0.25, lam_ramp=0.0),
}
READ_BY = {  # options that the other methods do not look at
    "conf_threshold": ("pseudo_label", "contrastive", "fixmatch", "unimatch"),
    "mc_passes": ("ua_mt",),
    "mix_alpha": ("ict",),
    "contrast_weight": ("contrastive",),
    "temperature": ("contrastive",),
    "negatives": ("contrastive",),
    "paste": ("bcp",),
    "largest_component": ("bcp",),
}
# fmt: on


def defaults_of(name):
    """The default of an option, by method, as the help says it."""
    own = [f"{method} {d[name]:g}" for method, d in DEFAULTS.items() if name in d]
    return ", ".join(["default: %(default)s", *own])


# fmt: off
def add_method_options(p):
    """--method, and the options that belong to methods."""
    p.section("method")
    p.add_argument("--method", choices=METHODS, default="supervised",
                   help="semi-supervised method")
    p.add_argument("--conf-threshold", type=SHARE, default=0.9,
                   help="pseudo_label, contrastive, fixmatch, unimatch: pixels of lower confidence "
                        f"are left out; 0 keeps all ({defaults_of('conf_threshold')})")
    p.add_argument("--lam", type=number(0, 1e6, float), default=0.25,
                   help="lambda: weight of the unlabeled loss after its ramp "
                        f"({defaults_of('lam')})")
    p.add_argument("--lam-warmup", type=SHARE, default=0.075,
                   help="share of training before the unlabeled loss sets in "
                        f"({defaults_of('lam_warmup')})")
    p.add_argument("--lam-ramp", type=SHARE, default=0.15,
                   help="share of training over which lambda then grows "
                        f"({defaults_of('lam_ramp')})")
    p.add_argument("--ema", type=number(0, 0.999999, float), default=0.99,
                   help="decay of the teacher, which starts from the student where unlabeled "
                        "images come in")
    p.add_argument("--mc-passes", type=number(1, 1000), default=8,
                   help="ua_mt: noisy passes of the teacher")
    p.add_argument("--mix-alpha", type=number(1e-3, 1e3, float), default=1.0,
                   help="ict: two images are blended by Beta(alpha, alpha)")
    p.add_argument("--contrast-weight", type=number(0, 1e6, float), default=0.1,
                   help="contrastive: weight of the contrast")
    p.add_argument("--temperature", type=number(1e-3, 1e3, float), default=0.1,
                   help="contrastive: temperature of the similarities")
    p.add_argument("--negatives", type=number(1, 100_000), default=256,
                   help="contrastive: pixels of other classes for each class")
    p.add_argument("--paste", type=SHARE, default=2 / 3,
                   help="bcp: side of the pasted box, as a share of the image's")
    p.add_argument("--largest-component", action=argparse.BooleanOptionalAction, default=True,
                   help="bcp: a pseudo-label keeps the largest component of each class")
# fmt: on


# ------------------------------------------------------------------------------- helpers of methods


@torch.no_grad()
def probabilities(net, image):
    """Softmax of a network that gets no gradient here. [B, C, *S] -> [B, K, *S] float32"""
    return net(image).float().softmax(1)


@contextlib.contextmanager
def batch_statistics(net):
    """In its block, batch norm takes the statistics of each batch, and keeps the running ones.

    net: in eval mode, and again afterwards.
    """
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    running = [b for m in norms for b in m.buffers()]
    kept = [b.clone() for b in running]
    for m in norms:
        m.train()
    try:
        yield
    finally:
        for m in norms:
            m.eval()
        for b, value in zip(running, kept):
            b.copy_(value)


def confident(p, args):
    """1 where the largest probability reaches --conf-threshold, else 0. [B, K, *S] -> [B, *S]"""
    return (p.amax(1) >= args.conf_threshold).float()


def uncertainty(net, image, passes):
    """Entropy, in nats, of the mean of `passes` predictions under dropout and noise.

    net: in eval mode, and again afterwards. image [B, C, *S] -> [B, *S]
    """
    dropouts = [m for m in net.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
    for m in dropouts:
        m.train()
    p = sum(probabilities(net, noisy(image)) for _ in range(passes)) / passes
    for m in dropouts:
        m.eval()
    return pixel_entropy(p, least=1e-6)


def noisy(image):
    """The image with the noise of UA-MT: Gaussian of deviation .1, clipped at .2."""
    return image + (0.1 * torch.randn_like(image)).clamp(-0.2, 0.2)


def shuffled(x):
    """A random order of a batch, [B]."""
    return torch.randperm(len(x), device=x.device)


def repeated(x, count):
    """The first `count` of x, x, x, ... [B, ...] -> [count, ...]"""
    return x[torch.arange(count, device=x.device) % len(x)]


def cutmix(u):
    """CutMix (French et al. 2020): a box of an image shows another image of the batch. -> Mix

    Boxes are like UniMatch's: with p = .5 there is one, of 2 to 40% of the area. u [U, C, *S]
    """
    perm = shuffled(u)
    dims = u.dim() - 2
    rand = torch.rand(len(u), 2 + dims, device=u.device)
    some = rand[:, 1:2] < 0.5
    area = (0.02 + 0.38 * rand[:, :1]) * some  # [U, 1]
    slim = rand[:, 2:] - rand[:, 2:].mean(1, keepdim=True)
    stretch = math.log(1 / 0.3) * slim  # [U, dims] sides differ by up to 1 / .3
    box = augment.random_box(u, area ** (1 / dims) * stretch.exp())  # [U, 1, *S]
    return Mix(perm, box[:, 0])


def keep_largest(p):
    """Pseudo-labels with only the largest component of each class. p [B, K, *S] -> [B, K, *S]

    Elsewhere, class and background swap their probabilities.
    """
    label = label_map(p)
    labels = label.cpu().numpy()
    largest = [metrics.largest_component(one, p.shape[1]) == one for one in labels]
    kept = torch.from_numpy(np.stack(largest)).to(p.device)  # [B, *S] bool
    background = p.scatter(1, label[:, None], p[:, :1])
    background[:, 0] = p.amax(1)
    return torch.where(kept[:, None], p, background)


# --------------------------------------------------------------------------------- quality guidance


def quality_of(g, label, level):
    """The quality q of a pseudo-label.

    level "image", "class" or "pixel" -> [U, 1] of an image, [U, K] of its classes, or [U, *S]

    For a class, q is g's answer for the hard label (Eq. 7), also where the label lacks the class.
    For an image, and for the pixels of the background, q is the mean over the foreground classes.
    For a pixel, q is the probability that its class is right. A corrected label is judged by the
    belief that made it, and g is not asked again; this is optimistic: the belief judges itself.
    """
    if level == "pixel":
        if label.belief is None:
            return 1 - g.error(label.seen)
        return (label.hard * label.belief).sum(1)
    if label.belief is None:
        q = g(label.seen)  # [U, K-1]
    else:
        q = quality_target(label.hard[:, 1:], label.belief[:, 1:])
    whole = q.mean(1, keepdim=True)
    return whole if level == "image" else torch.cat([whole, q], 1)


def confidence_of(label, level):
    """The largest probability of a pixel, or its mean over an image or a pseudo-class.

    -> [U, 1] of an image (PL-C of the paper), [U, K] of its classes, or [U, *S] of its pixels
    """
    confidence = label.p.amax(1, keepdim=True)  # [U, 1, *S]
    if level == "pixel":
        return confidence[:, 0]
    if level == "image":
        return confidence.flatten(2).mean(2)
    area = label.hard.flatten(2).sum(2)  # [U, K]
    return (confidence * label.hard).flatten(2).sum(2) / area.clamp_min(1)


@torch.no_grad()
def qw_weights(g, label, args):
    """QW: w = q^2 [q >= .5] of each pixel, with q of its image, its class or itself. -> [U, *S]

    Of several processes, each weighs its own images. Another function of q would stand here.
    """
    U, _, *S = label.p.shape
    if args.weight == "none":
        return torch.ones(U, *S, device=label.p.device)
    if args.weight == "confidence":
        q = confidence_of(label, args.weight_level)
    else:
        q = quality_of(g, label, args.weight_level)
    good = q >= args.weight_threshold
    w = torch.nan_to_num(q) ** args.weight_power * good  # NaN weighs nothing
    if args.weight_level == "image":
        w = to_samples(w[:, 0], label.p[:, 0])  # [U, 1, ...]
        return w.expand(U, *S).contiguous()
    if args.weight_level == "class":
        return w.gather(1, label_map(label.p).flatten(1)).reshape(U, *S)
    return w


def unlabeled_loss(g, terms, args, device):
    """sum(w l) / sum(w) over pixels, summed over the terms; 0 where nothing has weight.

    -> loss, mean weight, effective share of the samples: scalars

    The weights stand inside the sums of each loss (models/losses.py). The effective share is Kish's
    sample size over U, (sum w)^2 / sum w^2 / U: 1 where all samples weigh alike, 1/U where one
    alone counts. A pseudo-label that serves several terms, as in UniMatch, is weighted once.
    """
    zero = torch.zeros((), device=device)
    if not terms:
        return zero, zero, zero
    labels = dict.fromkeys(term.label for term in terms)
    qw = {label: qw_weights(g, label, args) for label in labels}
    losses, means, effective = [], [], []
    for term in terms:
        w = qw[term.label]  # [U, *S]
        if term.mix is not None:  # weights are blended like the images that the loss saw
            w = term.mix.blend(w)
        losses.append(term.loss(w))
        each = w.flatten(1).mean(1)  # [U]
        means.append(each.mean())
        effective.append(each.sum() ** 2 / (len(each) * (each**2).sum()).clamp_min(1e-12))
    return sum(losses), torch.stack(means).mean(), torch.stack(effective).mean()


def qar_loss(g, nets, image):
    """QAR: 1 - g(u, softmax f(u)), mean over images and classes, summed over the students.

    image [U, C, *S] -> scalar. The gradient flows through g into each student.
    """
    losses = []
    for net in nets:
        p = net(image).float().softmax(1)  # [U, K, *S]
        losses.append((1 - g(Seen.of_probabilities(image, p, soft=True))).mean())
    return sum(losses)


def qar_images(u, args):
    """--qar-share of this process's unlabeled images; for batch norm two or more, if there are."""
    return u[: max(2, math.ceil(args.qar_share * len(u)))]


# -------------------------------------------------------------------------------- one training step


@dataclass
class Run:
    """What a step changes or asks, and where it runs."""

    nets: list  # the students f
    teacher: torch.nn.Module  # EMA of the first student
    g: torch.nn.Module | None  # frozen quality predictor
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    on: Compute
    graph: Graph | None = None  # of --graph
    trust: float = 1.0  # with --correct: the share of g's belief in a pseudo-label


def ramp(t, warmup, length):
    """0 until warmup, then linearly to 1 over length; all are shares of training."""
    return min(1.0, max(0.0, (t - warmup) / length if length else float(t >= warmup)))


def progress_at(args, step):
    """t in [0, 1): the share of training before a step."""
    return (step - 1) / args.steps


def lambdas(args, step):
    """Weights of the unlabeled loss and of QAR in a step.

    While the first is 0, a step is a supervised one. Unlabeled images would only slow it, and in a
    batch with the labeled ones they would shift the statistics of batch norm.
    """
    t = progress_at(args, step)
    lam = 0.0
    if args.method != "supervised":
        lam = args.lam * ramp(t, args.lam_warmup, args.lam_ramp)
    lam_qar = args.qar * ramp(t, args.qar_warmup, args.qar_ramp)
    return lam, lam_qar


def acts(lam):
    """Whether a loss of weight lam takes part. A tensor, in a CUDA graph, is never 0."""
    return torch.is_tensor(lam) or lam > 0


def run_uses_unlabeled(args):
    """Whether a run looks at unlabeled images at all: for its method, or for QAR."""
    return args.method != "supervised" or args.qar > 0


def step_uses_unlabeled(args, step):
    """Whether a step looks at its unlabeled images."""
    return any(lambdas(args, step))


def onset(args):
    """The number of supervised steps before unlabeled images come in; 0 if they never do.

    Once in, they stay in. So bisection finds the first such step, fast enough for every step.
    """
    steps = range(1, args.steps + 1)
    count = bisect.bisect_left(steps, True, key=lambda step: step_uses_unlabeled(args, step))
    return 0 if count == args.steps else count


class Now(NamedTuple):
    """The numbers of a step, which change as training goes on. In a CUDA graph they are tensors."""

    t: float  # progress of training, in [0, 1]
    lams: tuple  # of lambdas()
    decay: float  # of the teacher's average
    trust: float  # in g's correction


def now_at(args, step, trust=1.0):
    """Now at a step."""
    decay = decay_at(max(0, step - onset(args)), args.ema)
    return Now(progress_at(args, step), lambdas(args, step), decay, trust)


PARTS = ["loss", "sup", "unsup", "qar", "weight", "ess", "share", "share_y"]  # of a step, logged


def total_loss(nets, teacher, g, batch, args, now):
    """The loss of one step, and its PARTS. -> scalar, [parts]"""
    lam, lam_qar = now.lams
    method = METHODS[args.method] if acts(lam) else WARM_UP.get(args.method, supervised)
    if args.correct and acts(now.trust):
        batch = replace(batch, g=g, trust=now.trust)
    sup, terms = method(nets, teacher, batch, args, now.t)
    unsup, weight, ess = unlabeled_loss(g, terms, args, sup.device)
    qar = torch.zeros((), device=sup.device)
    if acts(lam_qar):
        qar = qar_loss(g, nets, qar_images(batch.u, args))
    loss = sup + lam * unsup + lam_qar * qar
    share = foreground_share([term.label.p for term in terms], sup.device)
    share_y = foreground_share([batch.y], sup.device, batch.at_random)
    parts = [loss, sup, unsup, qar, weight, ess, share, share_y]
    return loss, torch.stack(parts).detach()


def foreground_share(labels, device, weight=1.0):
    """The mean share of pixels that a foreground class takes. -> scalar

    labels: [B, K, *S] each, one-hot or probabilities, whose largest counts; weight: of each sample.
    """
    taken = [(label[:, 1:].amax(1) > label[:, 0]).float() * weight for label in labels]  # [B, *S]
    shares = [one.mean() / (label.shape[1] - 1) for one, label in zip(taken, labels)]
    return torch.stack(shares).mean() if shares else torch.zeros((), device=device)


def train_step(run, batch, args, step):
    """One optimizer step on a batch. -> its PARTS [parts], still on the device"""
    return make_step(run, batch, args, now_at(args, step, run.trust))


def make_step(run, batch, args, now):
    """train_step() with its numbers given. Reads nothing back, except as why_no_graph() says."""
    with run.on.autocast():
        loss, parts = total_loss(run.nets, run.teacher, run.g, batch, args, now)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    distributed.average_gradients(p for net in run.nets for p in net.parameters())
    run.scaler.unscale_(run.optimizer)
    for net in run.nets:
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    move_average(run.teacher, run.nets[0], now.decay)
    return parts


def set_rate(optimizer, args, step):
    """The learning rate of a step: --lr times a cosine (adamw) or (1 - t)^0.9 (sgd).

    It stays a tensor where it is one, for a CUDA graph.
    """
    t = progress_at(args, step)
    if args.optimizer == "adamw":
        factor = 0.5 * (1 + math.cos(math.pi * t))
    else:
        factor = (1 - t) ** 0.9
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(args.lr * factor)
        else:
            group["lr"] = args.lr * factor


def set_seed(args, step):
    """The random numbers of a step, other ones in each process."""
    torch.manual_seed(seed_of(args.seed, step, 1 + distributed.rank()))


def whole_step(run, fetched, info, args, step):
    """A step from an item of Feed: seed and learning rate, views, and train_step() or the graph."""
    set_seed(args, step)
    set_rate(run.optimizer, args, step)
    if run.graph:
        return run.graph(fetched, now_at(args, step, run.trust))
    return train_step(run, views(fetched, info, args, run.on.device), args, step)


def graph_of(run, info, args):
    """--graph: a whole step, with its augmentation, as a Graph of an item of Feed and Now.

    None where that cannot be, which is said once.
    """
    if why := why_no_graph(run.on, args):
        print(f"note: --graph: {why}; steps run without a graph")
        return None
    capturable(run.optimizer, run.on.device)

    def step(fetched, now):
        return make_step(run, views(fetched, info, args, run.on.device), args, now)

    return Graph(step, run.on.device)


def why_no_graph(on, args):
    """What keeps a step from being a CUDA graph, or ""."""
    if on.device.type != "cuda":
        return "needs a GPU with CUDA"
    if on.amp == torch.float16:
        return "fp16 looks at each gradient before it goes on, so choose --amp bf16 or off"
    if distributed.world() > 1:
        return "is for one process"
    return NO_GRAPH.get(args.method, lambda args: "")(args)


# ----------------------------------------------------------------------------------------- the feed

KINDS = {2: "slices", 3: "volumes"}  # of samples, by dims


class Feed(torch.utils.data.Dataset):
    """Item n holds the images of step n, as stored: labeled, unlabeled or None, and weights.

    They are the same whoever reads them, and whether before or after other steps. Each of several
    processes takes its share. The weights are those of on_targets().
    """

    def __init__(self, labeled, unlabeled, args):
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.args = args
        self.rank = distributed.rank()
        self.world = distributed.world()

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(seed_of(self.args.seed, step, 0))
        index, place = self.draw(self.labeled, self.args.batch, generator)
        used = step_uses_unlabeled(self.args, step)
        if used:
            u_index, u_place = self.draw(self.unlabeled, self.args.batch_unlabeled, generator)
        place, at_random = self.on_targets(index, place, generator)  # last: changes no other draw
        mine = slice(self.rank, None, self.world)
        try:
            labeled = self.labeled.fetch(index[mine], place[mine])
            unlabeled = self.unlabeled.fetch(u_index[mine], u_place[mine]) if used else None
        except InputError as error:  # raised in a worker, it would come with the worker's traceback
            return error
        return labeled, unlabeled, at_random[mine]

    def draw(self, images, count, generator):
        """Numbers of `count` images, without repetition while there are enough, and places.

        -> [count], [count, 3]: see loading.part_at()
        """
        rounds = -(-count // len(images))
        orders = [torch.randperm(len(images), generator=generator) for _ in range(rounds)]
        return torch.cat(orders)[:count], torch.rand(count, 3, generator=generator)

    def on_targets(self, index, place, generator):
        """Puts patches around targets, with the chance of --foreground. -> places, weights [B]

        With these weights, the labels' mean share of foreground is that of random places.
        """
        place = place.clone()
        at_random = torch.ones(len(index))
        share = self.args.foreground
        chances = torch.rand(len(index), 3, generator=generator) if share else []
        for i, chance in enumerate(chances):
            classes = self.labeled.targets[self.labeled.case[index[i]]]
            target = loading.place_of_target(classes, share, chance.tolist())
            if target is not None:
                place[i] = torch.from_numpy(target)
                at_random[i] = 0
        return place, at_random / max(1 - share, 1e-6)


def views(fetched, info, args, device):
    """The Batch of a step from an item of Feed: standardized and augmented on the device."""
    labeled, unlabeled, at_random = fetched
    x, y = augment.weak(*loading.standardized(labeled, device), args.flip, args.geometry)
    x = channels_last(augment.strong(x, args.strength, info.color))
    at_random = to_samples(at_random.to(device, non_blocking=True), y)
    y = one_hot(y, len(info.classes))
    if unlabeled is None:
        return Batch(x, y, u=x[:0], s1=x[:0], s2=x[:0], at_random=at_random)
    u, _ = loading.standardized(unlabeled, device)
    u = channels_last(augment.weak(u, flip=args.flip, geometry=args.geometry))
    s1 = channels_last(augment.strong(u, color=info.color))
    s2 = channels_last(augment.strong(u, color=info.color))
    return Batch(x, y, u, s1, s2, at_random=at_random)


def load_data(info, args, on):
    """Labeled and unlabeled slices or volumes, kept as --cache says; "auto" is decided here.

    Labels of unlabeled cases are never read. Where nobody looks at unlabeled images, they are not
    read, either, and None stands in their place.
    """
    labeled, others = supervision.choose_labeled(info, args.labeled, args.labeled_seed)
    supervision.check_foreground(info, labeled)
    sources = [(info, "train", others)] if others else []  # of the unlabeled images
    if info.splits.get("unlabeled"):
        sources.append((info, "unlabeled", None))
    if args.unlabeled:
        sources += second_file(args.unlabeled, info)
    used = run_uses_unlabeled(args)
    if sources and not used:
        print(f"{count_samples(sources)} unlabeled {KINDS[info.dims]}, not used")
        sources = []
    if args.cache == "auto":
        everything = [(info, "train", labeled), (info, "val", None), *sources]
        sizes = [loading.bytes_in_memory(i, s, args.size, names) for i, s, names in everything]
        args.cache = where_it_fits(sum(sizes), on.device)
    load = loading.load_slices if info.dims == 2 else loading.load_volumes
    if args.cache == "off":
        load = loading.Stored
    train = load(info, "train", args.size, labeled)
    if args.foreground:
        train.targets = loading.target_places(info, "train", args.size, labeled)
    unlabeled = train if used else None
    if sources:
        first, *more = (
            load(other, split, args.size, names, labels=False) for other, split, names in sources
        )
        unlabeled = sum(more, start=first)
    elif used:
        print("no unlabeled image: the labeled ones serve as unlabeled ones, without their labels")
    if args.cache == "device":
        train = train.to(on.device)
        unlabeled = unlabeled.to(on.device) if used else None
    return train, unlabeled


def count_samples(sources):
    """The slices, or volumes, of (info, split, names), ... None: all cases."""
    total = 0
    for info, split, names in sources:
        grids = [e.grid for e in info.entries(split) if names is None or e.name in names]
        total += sum(math.prod(grid[: len(grid) - info.dims]) for grid in grids)
    return total


def second_file(path, info):
    """The sources in --unlabeled: (info, split, None), ... InputError if they do not fit `info`."""
    other = h5.read_info(path)
    for key in ("channels", "channel_names", "dims"):
        theirs = getattr(other, key)
        ours = getattr(info, key)
        if theirs != ours:
            raise InputError(
                f"{path}: has {key} {theirs}, but {info.path} has {ours}; convert both alike"
            )
    prepared.check({other.path: other.describe()}, {info.path: info.describe()})
    note_shared(info, other)
    if other.checksum == info.checksum:
        print(
            f"note: --unlabeled {path} has the cases of {info.path}: unlabeled ones come twice, "
            "and labeled ones join them; leave it out"
        )
    sources = [(other, split, None) for split in ("train", "unlabeled") if other.splits.get(split)]
    if not sources:
        raise InputError(f"--unlabeled {path}: has no image in train or unlabeled; leave it out")
    return sources


def where_it_fits(size, device):
    """--cache auto for `size` bytes: device, ram or off.

    Images take less than a quarter of a GPU's free memory, since training needs the rest, or less
    than half of this process's share of main memory, since loading takes twice as much.
    """
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
        return "device"
    share = h5.free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return "ram" if size < share / 2 else "off"


def read_steps(labeled, unlabeled, args, first, on):
    """Yields (step, item of Feed) for the steps after `first`, with a bar on a terminal.

    InputError if images cannot be read.
    """
    steps = range(first + 1, args.steps + 1)
    atexit.register(workers.kill_readers)
    loader = torch.utils.data.DataLoader(
        Feed(labeled, unlabeled, args),
        batch_size=None,
        sampler=steps,
        worker_init_fn=workers.start_reader,
        num_workers=args.workers if args.cache == "off" else 0,
        pin_memory=args.cache != "device" and on.device.type == "cuda",
    )
    bar = tqdm(
        zip(steps, loader),
        initial=first,
        total=args.steps,
        desc=args.method,
        unit=" steps",
        disable=not sys.stderr.isatty() or distributed.rank() > 0,
    )
    for step, item in bar:
        if isinstance(item, InputError):
            raise item
        yield step, item


# --------------------------------------------------------------------------------------- validation


TRUSTS = (0.0, 0.5, 1.0)  # what best_trust() tries
REJECTED = 0.01  # mean weight below which guidance rejects (nearly) all pseudo-labels
OF_TERMS = ["weight", "ess", "share"]  # known where there is an unlabeled loss
UNSURE = {  # methods that leave out unsure pixels, and what to try where no pixel is sure
    **dict.fromkeys(READ_BY["conf_threshold"], "; see --conf-threshold"),
    "ua_mt": "; train longer, or begin later (--lam-warmup)",
}


@dataclass
class Val:
    """What validation looks at."""

    cases: inference.Cases  # those of this process
    held: np.ndarray  # [K-1] bool: the classes that labels of val hold
    window: inference.Window | None  # how f sees volumes
    shown: loading.Samples | None  # a few, for pictures, in the first process


def check_val(info):
    """Which classes the labels of val hold, [K-1] bool. InputError if a case has no label."""
    if missing := [e.name for e in info.entries("val") if not e.labeled]:
        raise InputError(
            f"{info.path}: /val/{missing[0]} has no label, so it cannot validate; "
            f"label such cases ({len(missing)} in all), or take them out of val"
        )
    held = supervision.held_classes(info, "val")  # every process looks at all cases
    if absent := list(itertools.compress(info.classes[1:], ~held)):
        print(f"note: {without(absent, 'val')}: left out of the Dice that selects best.pt")
    return held


def load_val(info, args, held, window):
    """The Val of a run."""
    names = [e.name for e in info.entries("val")]
    mine = names[distributed.rank() :: distributed.world()]
    cases = inference.Cases(info, "val", args.size, mine, keep=args.cache != "off")
    for _ in cases:  # read now: a damaged case should not end the run at its first validation
        pass
    shown = loading.showcase(info, "val", args.size) if distributed.rank() == 0 else None
    return Val(cases, held, window, shown)


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # the last that was made
    best: dict = field(default_factory=lambda: dict(dice=-1.0, step=0))  # val Dice of best.pt
    peak: float = -1.0  # the best val Dice so far, also of the supervised steps
    parts: list = field(default_factory=list)  # [parts] of each step since the last validation
    since: float = field(default_factory=time.perf_counter)  # when these began

    def elapsed(self):
        """Seconds since the last validation, without the time between two processes."""
        return time.perf_counter() - self.since


def val_dice(net, run, val, window):
    """Dice of a network on val, over all processes: inference.mean_dice()."""
    K = len(val.cases.info.classes)
    table = inference.dice_table(net, val.cases, run.on, K, window)
    return inference.mean_dice(distributed.gather(table), val.held)


def validate(run, val, progress, args):
    """Scores f on val, and brings `progress` and run.trust up to date. -> a row of the log

    best.pt is due where progress.best is of this step.
    """
    step = progress.step
    averages = mean_parts(checked_parts(progress, run.nets), step, args)
    milliseconds = progress.elapsed() / len(progress.parts) * 1000
    progress.parts = []

    dice, per_class = val_dice(run.nets[0], run, val, val.window)
    note = alarm(averages, dice, progress.peak, args)
    progress.peak = max(dice, progress.peak)
    is_first = progress.best["step"] <= onset(args) < step  # since unlabeled images came in
    if is_first or dice > progress.best["dice"]:
        progress.best = dict(dice=dice, step=step)

    classes = val.cases.info.classes[1:]
    corrects = args.correct and step > onset(args)
    trust = run.trust
    if corrects and args.trust is None:
        run.trust = best_trust(run, val, dice)
    looks = look(run, val) if val.shown else {}
    return dict(
        note=note,
        **averages,
        lam=lambdas(args, step)[0],
        lr=float(run.optimizer.param_groups[0]["lr"]),
        **(dict(trust=trust) if corrects else {}),
        val_dice=dice,
        **{f"val_{c}": d for c, d in zip(classes, per_class) if d is not None},
        ms=milliseconds,
        **looks,
    )


def best_trust(run, val, dice):
    """The share of g's belief with which outputs of the first student have the best Dice on val.

    dice: of these outputs without g. If several shares are equally good, the smallest is taken.
    """
    f = fused(run.nets[0])
    window = val.window
    if window and window.whole:  # g knows patches alone
        window = replace(window, whole=False)
        dice, _ = val_dice(f, run, val, window)
    found = {0.0: dice}
    for trust in TRUSTS[1:]:
        found[trust], _ = val_dice(Corrected(f, run.g, trust), run, val, window)
    return max(found, key=found.get)


def look(run, val):
    """Outputs of f for a few val images: as pictures, and what g says of them.

    -> what Log.write() takes: the mean over images and classes of g's answers, of the true Dice,
    and of the error. Where g's answers rise alone, f fools g.
    """
    batch = samples_in(32, val.shown.image.shape[2:])
    with torch.no_grad():
        outputs = list(inference.judged_outputs(fused(run.nets[0]), val.shown, run.on, batch))
    mask = torch.cat([label_map(p).cpu() for _, _, p in outputs])  # [N, *S]
    pictures = [("val: image, truth, output", overlays(val.cases.info, val.shown, mask))]
    if run.g is None:
        return dict(pictures=pictures)
    predicted, true, _ = inference.estimate_quality(run.g, outputs, run.on)
    pictures.append(("val: predicted (across) and true (up) Dice", figures.dots(predicted, true)))
    predicted = predicted[:, val.held]
    true = true[:, val.held]
    return dict(
        pictures=pictures,
        g_true=float(true.mean()),
        g_predicted=float(predicted.mean()),
        g_mae=float(np.abs(predicted - true).mean()),
    )


def overlays(info, samples, mask):
    """The first four images, of volumes a slice, with outlines of truth and output. mask [N, *S]"""
    rows = []
    for image, truth, found in zip(samples.image[:4].numpy(), samples.label.numpy(), mask.numpy()):
        picture = info.picture(image)  # [*S], or [*S, 3] of colors
        if truth.ndim == 3:
            z = figures.middle(truth, len(truth))
            picture, truth, found = picture[z], truth[z], found[z]
        rows.append(figures.overlay(picture, (truth, found)))
    return np.concatenate(rows)


def checked_parts(progress, nets):
    """PARTS of each step since the last validation, over processes. -> [steps, parts]

    InputError where one of them, or a weight of a network, is not finite.
    """
    table = distributed.mean(torch.stack(progress.parts))
    check_finite(table, PARTS, nets, progress.step, advice)
    return table


def mean_parts(table, step, args):
    """Means of PARTS over the steps up to `step`. table [steps, parts] -> {name: mean}

    OF_TERMS are means over those steps alone that had an unlabeled loss.
    """
    steps = range(step - len(table) + 1, step + 1)
    weighed = [lambdas(args, s)[0] > 0 for s in steps]
    averages = dict(zip(PARTS, table.mean(0).tolist()))
    if not any(weighed):
        return {name: value for name, value in averages.items() if name not in OF_TERMS}
    return averages | {name: table[weighed, PARTS.index(name)].mean().item() for name in OF_TERMS}


def advice(parts):
    """What to try when a loss is not finite, from the values of PARTS in that step."""
    losses = (parts.get("sup", math.inf), parts.get("unsup", math.inf))
    if all(map(math.isfinite, losses)):
        return (
            "the labeled and unlabeled losses are: g's answers for f's outputs are not; "
            "try --amp off, or train g again"
        )
    return "try a lower --lr, --amp off, or a lower --lam"


def alarm(parts, dice, best, args):
    """A line for the log where pseudo-labels teach nothing or collapse, else "".

    parts: means since the last validation; dice, best: of val, now and so far

    Where guidance, or the method itself, rejects all pseudo-labels, training is supervised,
    whatever --lam says. Pseudo-labels collapse where their share of foreground is under a third, or
    over three times, that of the labels, or where val lost a third of its best Dice. The share is a
    mean over classes, so that one vanished class of several may go unseen.
    """
    if args.weight != "none" and parts.get("weight", 1) < REJECTED:
        who, where = "--weight-threshold", ""
        if args.weight == "quality":
            who, where = "g, or --weight-threshold,", "; see qp.md"
        return f"warning: {who} rejects (nearly) all pseudo-labels{where}"
    share = parts.get("share")
    if args.method in UNSURE and share is not None and parts["unsup"] == 0:
        rest = "" if args.weight == "none" else " in an image that has weight"
        return f"warning: no pixel of the pseudo-labels is sure enough{rest}{UNSURE[args.method]}"
    truth = parts["share_y"]
    if share is not None and truth > 0 and not truth / 3 <= share <= 3 * truth:
        sign = (
            f"foreground classes take {100 * share:.2g}% of the pseudo-labels' pixels each, "
            f"{100 * truth:.2g}% of the labels'"
        )
    elif dice < best * 2 / 3:
        sign = f"val Dice fell from {best:.3f} to {dice:.3f}"
    else:
        return ""
    remedies = ["a lower --qar"] if args.qar else []
    if args.method != "supervised":
        remedies += ["a lower --lam", "a later --lam-warmup"]
        if not args.correct and args.weight != "quality":
            remedies.append("guidance (--weight quality, --correct)")
    return f"warning: {sign}; try {', '.join(remedies or ['a lower --lr'])}"


def is_over(progress, args):
    """Whether all steps are made, or --patience validations have found nothing better."""
    waited = progress.step - max(progress.best["step"], onset(args))
    return progress.step == args.steps or waited >= args.patience * args.eval_every


# ------------------------------------------------------------------------------------------ options


def parse_args(argv=None):
    """The options of a run. InputError if two of them do not fit."""
    args = options().parse_args(argv)
    if unknown := DEFAULTS.get(args.method, {}).keys() - vars(args).keys():
        raise KeyError(f"DEFAULTS of {args.method}: {min(unknown)} is no option")
    args = options(args.method).parse_args(argv)  # once more, by the method's own defaults
    fill_in(args)
    check_options(args)
    return args


def defaults_like(args):
    """The options of a run of the same method and --weight where no other is given."""
    defaults = options(args.method).parse_args(["DATA", "--out", "."])
    defaults.method, defaults.weight = args.method, args.weight
    fill_in(defaults)
    return defaults


# fmt: off
def options(method="supervised"):
    """The parser, with the defaults of a method."""
    p = Parser(__doc__, prog="train_ssl.py")
    p.add_argument("data", help="dataset file")
    p.add_argument("--out", type=folder, required=True, help="folder of the run")
    p.section("what is labeled")
    p.add_argument("--labeled", default="all",
                   help="labeled train patients: a number (7: the first 7), a fraction (0.1) "
                        "or all")
    p.add_argument("--labeled-seed", type=SEED, help="draw the labeled patients at random")
    p.add_argument("--unlabeled", metavar="OTHER.h5",
                   help="a second file whose train and unlabeled images join the unlabeled ones")
    add_method_options(p)
    add_guidance_options(p)
    add_training_options(p)
    add_running_options(p)
    p.set_defaults(**DEFAULTS.get(method, {}))
    return p


def add_guidance_options(p):
    """How g guides."""
    p.section("quality guidance")
    p.add_argument("--qp", metavar="QP.pt",
                   help="quality predictor of train_qp.py, for --weight quality, --correct and "
                        "--qar")
    p.add_argument("--weight", choices=("none", "confidence", "quality"), default="none",
                   help="what weights a pseudo-label (QW: quality)")
    p.add_argument("--weight-level", choices=("image", "class", "pixel"),
                   help="one weight per image, per pixel by its pseudo-class, or per pixel by the "
                        "chance that it is right (default: image, as in the paper; of --weight "
                        "quality with a dense head and without --correct: pixel)")
    p.add_argument("--weight-power", type=number(0, 100, float), default=2.0, help="w = q^power")
    p.add_argument("--weight-threshold", type=SHARE,
                   help="w = 0 where q is below (default: quality .5, confidence .9)")
    p.add_argument("--correct", action="store_true",
                   help="g (dense head) sees each pseudo-label and predicts the truth, which "
                        "replaces the pseudo-label as far as --trust says, also for "
                        "--conf-threshold and --weight")
    p.add_argument("--trust", type=SHARE,
                   help="--correct: the share of g's prediction in a pseudo-label; 1: it replaces "
                        "it (default: 1 up to the first validation with unlabeled images, then 0, "
                        "1/2 or 1, as was best on val)")
    p.add_argument("--qar", type=number(0, 1e6, float), default=0.0,
                   help="lambda_qar after its ramp; the paper's value is 0.01")
    p.add_argument("--qar-share", type=number(1e-6, 1, float), default=1 / 3,
                   help="share of a step's unlabeled images that QAR sees, at least two images; "
                        "1: all, as in the paper")
    p.add_argument("--qar-warmup", type=SHARE, default=0.15,
                   help="share of training before QAR sets in")
    p.add_argument("--qar-ramp", type=SHARE, default=0.2,
                   help="share of training over which lambda_qar then grows")


def add_training_options(p):
    """f, its optimizer and what it sees."""
    p.section("network and training")
    p.add_argument("--model", type=models.model_name, metavar="NAME",
                   help=f"network f: {', '.join(models.segmentation_networks())} (default: unet, "
                        "of volumes vnet); smp:UnetPlusPlus is that of "
                        "segmentation_models_pytorch, if it is installed")
    p.add_argument("--width", type=number(1, 256),
                   help="channels of the network's first level (default: its own)")
    p.add_argument("--encoder", metavar="NAME",
                   help=f"of resnet_unet, unetpp, attention_unet: {', '.join(RESNETS)} "
                        "(default: resnet34)")
    p.add_argument("--encoder-weights", metavar="FILE",
                   help="state dict to start the encoder from: a ResNet's of torchvision or timm, "
                        "for swin_unet the official Swin-T's; or the word imagenet, which "
                        "downloads torchvision's")
    p.add_argument("--dropout", type=number(0, 0.99, float),
                   help="vnet: at the bottom and before the head (default: 0.5)")
    p.add_argument("--size", type=grid,
                   help="side of the images that f sees (default 224); of volumes D,H,W of a "
                        "patch (default 80,112,112)")
    p.add_argument("--steps", type=number(1), default=6000, help="training steps")
    p.add_argument("--batch", type=number(1, 65_536),
                   help="labeled images in a step (default 32, of volumes 2)")
    p.add_argument("--batch-unlabeled", type=number(1, 65_536),
                   help="unlabeled images in a step (default 64, of volumes 2)")
    p.add_argument("--foreground", type=SHARE, metavar="SHARE",
                   help="volumes: the chance of each labeled patch of a step to be centered on a "
                        "voxel of a class that its case holds, the class drawn first; other "
                        "patches lie anywhere (default: 1/3, as in nnU-Net)")
    p.add_argument("--strength", type=number(0, 2, float), default=0.5,
                   help="intensity augmentation of labeled images; 1: as in strong views; 0: none")
    p.add_argument("--geometry", type=number(0, 3, float), default=1.0,
                   help="geometric augmentation of all views: 1 rotates by up to 20 degrees, "
                        "scales by up to 15%% and shifts by up to 8%% of the side; 2 doubles "
                        "these, and 0 leaves only flips")
    p.add_argument("--flip", type=flip_axes, metavar="AXES",
                   help="axes along which images may be flipped: H,W or H or none (default: all; "
                        "give stages 1 to 3 the same)")
    p.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw",
                   help="adamw: cosine; sgd: momentum .9, poly .9")
    p.add_argument("--lr", type=number(0, 10, float), default=1e-3,
                   help="initial learning rate (sgd: 0.01 is usual; with --encoder-weights 1e-4)")
    p.add_argument("--weight-decay", type=number(0, 10, float), default=1e-4,
                   help="of the optimizer")
    p.add_argument("--clip", type=number(1e-6, 1e9, float), default=1.0,
                   help="largest norm of the gradient")
    p.add_argument("--eval-every", type=number(1), default=200,
                   help="steps between validations, log rows and checkpoints")
    p.add_argument("--patience", type=number(1), default=30,
                   help="validations without a better Dice before stopping")
    p.add_argument("--keep", metavar="N,N,...", type=numbers, default=[],
                   help="also keep the checkpoints of these steps, as OUT/stepN.pt")
    inference.add_window_options(p)


def add_running_options(p):
    """Where and how a run is made; nothing of them belongs to the method."""
    p.section("running")
    p.add_argument("--seed", type=SEED, default=0,
                   help="of all random numbers but those of --labeled-seed")
    p.add_argument("--device", type=device_name, default="auto",
                   help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                   help="mixed precision; losses, Dice and g's output stay fp32")
    p.add_argument("--cache", choices=("auto", "device", "ram", "off"), default="auto",
                   help="where images are kept: on the device, in memory, or nowhere, but read "
                        "for each step; auto: the first that they fit into")
    p.add_argument("--workers", type=number(0, 1000), default=2,
                   help="--cache off: processes that read the images of the next steps")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile the networks: slow to start, then faster on GPUs")
    p.add_argument("--graph", action="store_true",
                   help="CUDA: each step is replayed as one CUDA graph, without Python; off, "
                        "since it has not run on a GPU yet")
    p.add_argument("--deterministic", action="store_true",
                   help="the same weights each time also on a GPU, at a price (on a CPU they are "
                        "anyway)")
    p.add_argument("--resume", action="store_true", help="go on from OUT/last.pt if it is there")
    p.add_argument("--overwrite", action="store_true", help="replace the run that OUT holds")
# fmt: on


def asking(args):
    """Which options ask g: {option: whether it is given}."""
    return {
        "--weight quality": args.weight == "quality",
        "--qar": args.qar > 0,
        "--correct": args.correct,
    }


WEIGHT_THRESHOLD = {"none": 0.0, "confidence": 0.9, "quality": 0.5}


def fill_in(args):
    """Defaults that depend on other options."""
    if args.weight_threshold is None:
        args.weight_threshold = WEIGHT_THRESHOLD[args.weight]
    if args.weight_level is None and args.weight != "quality":  # else it depends on g
        args.weight_level = "image"


def check_options(args):
    """InputError if two options do not fit."""
    if args.correct and args.method == "supervised":
        raise InputError(
            "--correct: supervised training has no pseudo-label; choose another --method"
        )
    if args.trust is not None and not args.correct:
        raise InputError("--trust needs --correct")
    if not args.qp and (asks := [name for name, given in asking(args).items() if given]):
        raise InputError(f"--qp is missing: {asks[0]} needs the qp.pt of train_qp.py")


SETTINGS = {  # by dims: those of the paper, and of the left-atrium baselines
    2: dict(model="unet", batch=32, batch_unlabeled=64),
    3: dict(model="vnet", batch=2, batch_unlabeled=2),
}


def set_defaults(args, info):
    """Fills in what depends on the data. InputError if the options do not fit them."""
    if "dice" in info.classes:
        raise InputError(
            f"{info.path}: has a class 'dice', whose Dice on val would be the log's val_dice, as "
            "the mean's is; convert the data again with another name"
        )
    args.size = loading.network_grid(info, args.size)
    args.flip = h5.check_flip(info, args.flip)
    args.foreground = loading.target_share(info, args.foreground)
    for name, value in SETTINGS[info.dims].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def network_of(args, info):
    """What models.build() takes for f. InputError if the network does not fit options or data."""
    given = dict(width=args.width, dropout=args.dropout, encoder=args.encoder)
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in models.options(args.model):
            takers = [n for n in models.segmentation_networks() if name in models.options(n)]
            raise InputError(f"--{name} is an option of --model {', '.join(takers)}")
    network = dict(
        name=args.model,
        channels=info.channels,
        classes=len(info.classes),
        dims=info.dims,
        **options,
    )
    least = args.batch
    if run_uses_unlabeled(args):
        least = min(args.batch, args.batch_unlabeled)
    try:
        models.check(network, loading.shape_of(args.size), least)
    except Exception as error:  # a network's own words
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        raise InputError(f"--model {args.model}: {' '.join(text.split())[:300]}") from None
    return network


# ---------------------------------------------------------------------------------- helpers of main

FILES = ("qp", "unlabeled")  # options that name files: a run resumes only with the same contents
F_LEARNED_NOTHING = 0.01  # val Dice up to which f has learned nothing


def load_g(args, info, on):
    """g, and the train cases whose labels it has learned from; without --qp None and [].

    InputError if an option asks a scalar head about pixels.
    """
    if not args.qp:
        return None, []
    runs = {args.out: vars(args)}
    g, taught = checkpoints.load_quality(args.qp, info, on, args.size, runs)
    of_pixels = args.weight == "quality" and args.weight_level == "pixel"
    if args.correct or of_pixels:
        checkpoints.check_dense(g, args.qp, "--correct" if args.correct else "--weight-level pixel")
    return g, taught


def finest_level(g, args):
    """The default of --weight-level: the finest that g knows, but image with --correct."""
    return "pixel" if hasattr(g, "belief") and not args.correct else "image"


def build_run(network, g, args, on, fresh):
    """Networks and optimizer. fresh: --encoder-weights are still to be loaded."""
    nets = [models.build(**network) for _ in range(STUDENTS.get(args.method, 1))]
    if args.encoder_weights and fresh:
        for net in nets:
            said = checkpoints.load_encoder(net, args.encoder_weights)
        print(said)
    nets = [distributed.synced(on.place(net)).train() for net in nets]
    teacher = copy.deepcopy(nets[0]).eval().requires_grad_(False)
    if args.compile:
        nets = [compiled(net) for net in nets]
        teacher = compiled(teacher)
    parameters = [p for net in nets for p in net.parameters()]
    decay = args.weight_decay
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=decay, fused=True)
    else:
        optimizer = torch.optim.SGD(
            parameters, args.lr, momentum=0.9, weight_decay=decay, fused=True
        )
    trust = 1.0 if args.trust is None else args.trust
    return Run(nets, teacher, g, optimizer, on.scaler(), on, trust=trust)


def save_run(path, run, progress, facts, finished=False):
    """Writes a checkpoint: all that a run resumes from, and that evaluate.py reads.

    facts: what stays the same throughout a run. InputError instead where a loss is not finite.
    """
    parts = torch.zeros(0, len(PARTS))
    if progress.parts:
        parts = checked_parts(progress, run.nets)
    if distributed.rank() > 0:
        return
    save_checkpoint(
        path,
        "ssl",
        **facts,
        model=run.nets[0].config,
        nets=[net.state_dict() for net in run.nets],
        teacher=run.teacher.state_dict(),
        optimizer=run.optimizer.state_dict(),
        scaler=run.scaler.state_dict(),
        step=progress.step,
        best=progress.best,
        peak=progress.peak,
        parts=parts.cpu(),
        seconds=progress.elapsed(),
        trust=run.trust,
        finished=finished,
    )


def restore(run, state):
    """Goes on from the state of last.pt. -> Progress"""
    weights = [*state["nets"], state["teacher"]]
    for net, its in zip([*run.nets, run.teacher], weights, strict=True):
        net.load_state_dict(its)
    run.optimizer.load_state_dict(state["optimizer"])
    restore_scaler(run.scaler, state)
    if state["args"].get("trust") is None:
        run.trust = state.get("trust", 1.0)
    return Progress(
        state["step"],
        state["best"],
        state.get("peak", -1.0),
        [*state["parts"].to(run.on.device)],
        time.perf_counter() - state["seconds"],
    )


def print_changed(before, args):
    """A note where a resumed run sees val otherwise than before. before: its options then"""
    for name in VAL_OPTIONS:
        then, now = before.get(name), getattr(args, name)
        if name in before and then != now:
            then, now = (checkpoints.given(name, value) for value in (then, now))
            print(
                f"note: {args.out} was started {then} and goes on {now}: Dice on val before and "
                "after differ in this, but are compared to choose best.pt"
            )


def open_log(args, info, first, fresh):
    """The log of a run that goes on after step `first`."""
    distributed.wait()  # until all have looked at what is in OUT
    classes = [f"val_{c}" for c in info.classes[1:]]
    of_g = ["g_true", "g_predicted", "g_mae"]
    return Log(
        args.out,
        ["step", *PARTS, "lam", "lr", "trust", "val_dice", *classes, *of_g, "ms", "note"],
        first,
        writes=distributed.rank() == 0,
        former=checkpoints.files_of_run("ssl", args.out) if fresh else (),
        shown=["step", *PARTS[:-2], "lam", *(["trust"] if args.correct else []), "val_dice"],
    )


def print_finished(args, state):
    """That a run is finished, and how to train it again. state: of its last.pt"""
    best = state["best"]
    print(
        f"{args.out}: this run is finished (step {state['step']}, "
        f"best val Dice {best['dice']:.4f} at step {best['step']}); --overwrite trains it again"
    )


def print_start(run, args, labeled, unlabeled, first):
    """One line: method, sizes of f and of its data, device, processes. first: step"""
    count = f"{len(labeled)} labeled"
    if unlabeled is not None:
        count += f" and {len(unlabeled)} unlabeled"
    kind = KINDS[run.nets[0].config["dims"]]
    place = dict(device="on the device", ram="in memory", off="read from disk")[args.cache]
    words = [
        f"{args.method}: {models.parameters(run.nets[0]) / 1e6:.1f} M parameters",
        f"{count} {kind} ({place})",
        str(run.on),
    ]
    if distributed.world() > 1:
        words.append(f"{distributed.world()} processes")
    if first:
        words.append(f"from step {first}")
    print(", ".join(words))


def idle(args):
    """The options that a run does not look at."""
    names = [name for name, methods in READ_BY.items() if args.method not in methods]
    if args.method == "supervised":
        names += ["lam", "lam_warmup", "lam_ramp"]
    if args.weight == "none":
        names += ["weight_level", "weight_power", "weight_threshold"]
    if args.qar == 0:
        names += ["qar_share", "qar_warmup", "qar_ramp"]
    if args.labeled == "all":
        names += ["labeled_seed"]
    if args.window == "whole":
        names += ["stride", "blend"]
    return names


def print_ignored(args, first):
    """Notes on what has no effect, such as --keep of steps up to `first`."""
    note_idle(args, idle(args), defaults_like(args))
    if args.qp and not any(asking(args).values()):
        print(f"note: g guides nothing, and is only asked about val; see {', '.join(asking(args))}")
    lam, lam_qar = lambdas(args, args.steps)
    if args.method != "supervised" and lam == 0:
        print(
            f"note: pseudo-labels take no part in {args.steps} steps, as in supervised training; "
            "see --lam and --lam-warmup"
        )
    if args.qar > 0 and lam_qar == 0:
        print(f"note: QAR takes no part in {args.steps} steps; see --qar-warmup")
    if args.weight != "none" and args.method == "supervised":
        print(
            f"note: --weight {args.weight} weighs nothing: supervised training has no "
            "pseudo-label; choose another --method"
        )
    name = MIXES.get(args.method)
    if name and getattr(args, name) == distributed.world():
        each = "in each process" if distributed.world() > 1 else "in a step"
        option = "--" + name.replace("_", "-")
        print(
            f"note: {args.method} mixes images, but {option} leaves one {each}; give a larger one"
        )
    kept = {step for step in args.keep if os.path.isfile(f"{args.out}/step{step}.pt")}
    before = kept if first else set()  # else they are of a run that was replaced
    if never := {step for step in args.keep if not first < step <= args.steps} - before:
        print(f"note: --keep: step {min(never)} is not among {first + 1} to {args.steps}")


def print_taught(info, taught, labeled):
    """Lines where g knows labels, of cases of these names, that f must not know here."""
    names = {split: {e.name for e in entries} for split, entries in info.splits.items()}
    if more := names["train"] & set(taught) - set(labeled.case):
        print(
            f"note: g has learned from the labels of {len(more)} train cases that are unlabeled "
            f"here, among them {min(more)}"
        )
    scored = names["val"] | names.get("test", set())
    if more := scored & set(taught) - names["train"]:
        print(
            f"warning: g has learned from the labels of {len(more)} cases of val or test, by name, "
            f"such as {min(more)}; if they are the same images, scores on them are too good"
        )


def leave_if_stopped(stop, run, progress, facts, args):
    """Ends all processes if a signal came to one, and keeps what they have done in last.pt.

    stop: of postponed_signals().
    """
    code = distributed.largest(stop())
    if not code:
        return
    last = f"{args.out}/last.pt"
    if progress.parts:  # else it is written
        save_run(last, run, progress, facts)
    print(f"stopped after step {progress.step}; {last} holds it: go on with --resume")
    distributed.wait()  # torchrun ends all when one has left
    sys.exit(code)


def print_end(args, progress):
    """The best Dice, the files, and the next command."""
    distributed.wait()  # until everything is written
    best = progress.best
    print(
        f"best val Dice {best['dice']:.4f} at step {best['step']}\n"
        f"wrote {args.out}/best.pt, last.pt, log.csv"
    )
    if not max(progress.peak, best["dice"]) > F_LEARNED_NOTHING:
        print(
            f"warning: val Dice was never above {F_LEARNED_NOTHING}, so f has learned nothing; "
            f"look at the labels (python -m data.h5 {shlex.quote(args.data)} --preview FILE.png), "
            "the classes' shares of pixels, --lr and --steps"
        )
    words = [
        "python",
        "evaluate.py",
        args.data,
        f"{args.out}/best.pt",
        "--out",
        f"{args.out}/table",
    ]
    print("next: " + shlex.join(words + inference.window_words(args)))


# --------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    on = compute(args.device, args.amp, args.deterministic)
    info = h5.read_info(args.data)
    distributed.start(on.device)
    set_defaults(args, info)
    distributed.check_share("--batch", args.batch)
    distributed.check_share("--batch-unlabeled", args.batch_unlabeled)
    network = network_of(args, info)
    window = inference.window_of(args.size, args)
    lock = checkpoints.lock_folder(args.out)  # noqa: F841 (until main ends)
    g, taught = load_g(args, info, on)
    args.weight_level = args.weight_level or finest_level(g, args)
    defaults = vars(defaults_like(args))
    state, inputs = start_run(
        "ssl", args, info.describe(), inputs=FILES, free=MAY_CHANGE, defaults=defaults
    )
    if state and state["finished"]:
        print_finished(args, state)
        return

    held = check_val(info)
    labeled, unlabeled = load_data(info, args, on)
    val = load_val(info, args, held, window)
    print_taught(info, taught, labeled)

    torch.manual_seed(args.seed)
    run = build_run(network, g, args, on, fresh=not state)
    progress = restore(run, state) if state else Progress()
    if state and args.correct and "trust" not in state:
        print(f"note: {args.out}: so far g alone corrected; from here on val chooses --trust")
    if state:
        print_changed(state["args"], args)
    known = sorted({*labeled.case, *taught})  # whose labels f has seen, through g also
    facts = dict(
        args=vars(args),
        defaults=defaults,
        data=info.describe(),
        inputs=inputs,
        labeled=known,
    )

    log = open_log(args, info, progress.step, fresh=not state)
    print_start(run, args, labeled, unlabeled, progress.step)
    print_ignored(args, progress.step)
    if args.graph:
        run.graph = graph_of(run, info, args)
    steps = read_steps(labeled, unlabeled, args, progress.step, on)
    with postponed_signals() as stop:
        for step, fetched in steps:
            progress.parts.append(whole_step(run, fetched, info, args, step))
            progress.step = step
            if step in args.keep:
                save_run(f"{args.out}/step{step}.pt", run, progress, facts)
            if step % args.eval_every == 0 or step == args.steps:
                row = validate(run, val, progress, args)
                if progress.best["step"] == step:
                    save_run(f"{args.out}/best.pt", run, progress, facts)
                log.write(step, **row)
                over = is_over(progress, args)
                progress.since = time.perf_counter()
                save_run(f"{args.out}/last.pt", run, progress, facts, finished=over)
                if over:
                    break
            leave_if_stopped(stop, run, progress, facts, args)
    print_end(args, progress)


if __name__ == "__main__":
    cli(main)
