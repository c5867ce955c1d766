"""Networks f beyond U-Net and V-Net, and published weights for encoders.

Sizes, shapes, gradients, Swin's windows against plain attention, key names.
"""

import hashlib
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

import evaluate
import models
import train_qp
import train_ssl
from models import pretrained
from models.attention_unet import Gate
from models.quality import with_background
from models.resnet import ResNet
from models.swin_unet import Block, Expand, Merge, SwinUNet

SMALL = {
    "resnet_unet": dict(encoder="resnet18", width=8),
    "unetpp": dict(encoder="resnet18", width=8),
    "attention_unet": dict(encoder="resnet18", width=8),
    "swin_unet": dict(width=12),
}
PUBLISHED = [
    ("unetpp", "resnet34", 3, 1, 26.08e6),
    ("unetpp", "resnet50", 3, 4, 48.99e6),
    ("resnet_unet", "resnet34", 3, 1, 24.43e6),
    ("swin_unet", None, 3, 9, 27.17e6),
]


@pytest.mark.parametrize("name, encoder, channels, classes, size", PUBLISHED)
def test_size_of_the_published_networks(name, encoder, channels, classes, size):
    """U-Net++: segmentation_models_pytorch; Swin-UNet: its official code, 9 classes."""
    with torch.device("meta"):
        net = models.build(
            name, channels=channels, classes=classes, **({"encoder": encoder} if encoder else {})
        )
    assert models.parameters(net) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize(
    "name, size", [("resnet18", 11.18e6), ("resnet34", 21.28e6), ("resnet50", 23.51e6)]
)
def test_size_of_the_resnets(name, size):
    with torch.device("meta"):
        assert models.parameters(ResNet(3, name)) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("channels, classes", [(1, 4), (3, 2)])
@pytest.mark.parametrize("side", [224, 256])
@pytest.mark.parametrize("name", SMALL)
def test_shapes_at_published_sizes(name, side, channels, classes):
    net = models.build(name, channels=channels, classes=classes, **SMALL[name]).eval()
    with torch.no_grad():
        features = net.encode(torch.randn(1, channels, side, side))
        assert net.decode(features).shape == (1, classes, side, side)
    sides = [f.shape[-1] for f in features]
    assert sides == sorted(sides, reverse=True) and sides[-1] == side // 32


@pytest.mark.parametrize("S", [(96, 64), (45, 39), (32, 24, 16), (17, 19, 16)])
@pytest.mark.parametrize("name", SMALL)
def test_gradient_reaches_every_parameter(name, S):
    """Odd sizes and volumes too, but for Swin."""
    if name == "swin_unet" and S != (96, 64):
        with pytest.raises(ValueError, match="volumes|multiples of 32"):
            models.build(name, channels=1, classes=3, dims=len(S), **SMALL[name])(
                torch.zeros(1, 1, *S)
            )
        return
    torch.manual_seed(0)
    net = models.build(name, channels=1, classes=3, dims=len(S), **SMALL[name])
    logits = net(torch.randn(4, 1, *S))
    assert logits.shape == (4, 3, *S)
    (logits * torch.randn_like(logits)).sum().backward()
    unreached = [
        key
        for key, p in net.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or not p.grad.abs().sum() > 0
    ]
    assert not unreached


def test_compiled_and_in_bfloat16():
    """torch.compile sees one graph of each half.

    With a compiler that only traces, the answers are the same. bf16: near.
    """
    torch.manual_seed(0)
    net = models.build("swin_unet", channels=3, classes=2, **SMALL["swin_unet"]).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x)
        encode, decode = (
            torch.compile(f, backend="eager", fullgraph=True) for f in (net.encode, net.decode)
        )
        assert torch.allclose(decode(encode(x)), expected, atol=1e-5)
    assert (half - expected).abs().mean() < 0.05 * expected.abs().mean()
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("method", ["ua_mt", "contrastive", "unimatch"])
@pytest.mark.parametrize("name", SMALL)
def test_methods_that_look_into_a_network_train_every_network(name, method):
    """At its dropout, or at what its encoder finds; others see its answers alone."""
    from test_ssl import halfway, options

    torch.manual_seed(0)
    net = lambda: models.build(name, channels=1, classes=3, **SMALL[name]).train()
    nets, teacher = (
        [net() for _ in range(train_ssl.STUDENTS.get(method, 1))],
        net().eval().requires_grad_(False),
    )
    g = (
        models.build("quality_dense", channels=1, classes=3, size=32, width=2, members=1)
        .eval()
        .requires_grad_(False)
    )
    x, u, s1, s2 = torch.randn(4, 3, 1, 64, 64).unbind()
    y = with_background((torch.rand(3, 2, 64, 64) < 0.1).float()).clamp(0, 1)
    args = options(
        "--weight-threshold",
        "0",
        "--conf-threshold",
        "0",
        "--negatives",
        "8",
        method=method,
        weight="quality",
        level="class",
        qar=0.1,
    )
    batch = train_ssl.Batch(x, y, u, s1, s2)
    loss, _ = train_ssl.total_loss(nets, teacher, g, batch, args, halfway(args))
    loss.backward()
    assert loss.isfinite() and all(
        p.grad is not None and p.grad.isfinite().all() for n in nets for p in n.parameters()
    )


def test_nodes_of_unetpp_are_those_of_the_paper():
    """X[i, j] = H([X[i, 0], ..., X[i, j-1], up(X[i+1, j-1])]), by recursion.

    The newest comes first here.
    """
    torch.manual_seed(0)
    net = models.build("unetpp", channels=1, classes=2, **SMALL["unetpp"]).eval()
    x, twice = torch.randn(1, 1, 64, 96), nn.UpsamplingNearest2d(scale_factor=2)
    features = net.encoder.encode(x)

    def node(i, j):
        return (
            features[i]
            if j == 0
            else net.nodes[f"{i}_{j}"](
                torch.cat([twice(node(i + 1, j - 1)), *(node(i, k) for k in reversed(range(j)))], 1)
            )
        )

    assert len(net.nodes) == 10 and torch.allclose(
        net.head(net.top(twice(node(0, 4)))), net(x), atol=1e-5
    )


def test_the_finest_skip_connection_has_no_gate():
    net = models.build("attention_unet", channels=1, classes=2, **SMALL["attention_unet"])
    assert [gate.theta.in_channels for gate in net.gates] == [32, 16, 8] and net.encoder.widths[
        -2::-1
    ] == [32, 16, 8, 8]


def test_gate_of_attention_unet_by_hand():
    """a = sigmoid(psi relu(theta x + phi g)), once for each 2 x 2 pixels where it does not vary.

    0 shuts the gate, whatever comes through.
    """
    torch.manual_seed(0)
    gate = Gate(2, 4, 6).eval()
    gate.W = nn.Identity()
    x, g = (
        torch.randn(2, 4, 1, 1).expand(-1, -1, 6, 10),
        torch.randn(2, 6, 1, 1).expand(-1, -1, 3, 5),
    )
    inner = (
        torch.einsum("of,bf->bo", gate.theta.weight.sum((2, 3)), x[..., 0, 0])
        + torch.einsum("of,bf->bo", gate.phi.weight[..., 0, 0], g[..., 0, 0])
        + gate.phi.bias
    )
    a = (inner.clamp_min(0) @ gate.psi.weight[0, :, 0, 0] + gate.psi.bias).sigmoid()
    assert torch.allclose(gate(x, g), a[:, None, None, None] * x, atol=1e-5)
    nn.init.constant_(gate.psi.bias, -100)
    assert gate(torch.randn(2, 4, 7, 9), torch.randn(2, 6, 4, 5)).abs().max() < 1e-20


# ----------------------------------------------------------------------------------- Swin's windows


def plain_attention(attn, x, shift):
    """What windowed attention is.

    Every token of the map [h, w, F] looks at those of its own window, by loops over windows that
    start at shift - 7.
    """
    h, w, features = x.shape
    heads, d = attn.heads, features // attn.heads
    table = attn.relative_position_bias_table
    q, k, v = attn.qkv(x.reshape(h * w, features)).reshape(h * w, 3, heads, d).unbind(1)
    place = [(i, j) for i in range(h) for j in range(w)]
    window = lambda i, j: tuple((n - s) // 7 for n, s in zip((i, j), shift))
    out = torch.zeros(h * w, features)
    for a, (i, j) in enumerate(place):
        near = [b for b, other in enumerate(place) if window(*other) == window(i, j)]
        rows = torch.tensor([(i - place[b][0] + 6) * 13 + (j - place[b][1] + 6) for b in near])
        for r in range(heads):
            score = k[near, r] @ q[a, r] / math.sqrt(d) + table[rows, r]
            out[a, r * d : (r + 1) * d] = score.softmax(0) @ v[near, r]
    return attn.proj(out).reshape(h, w, features)


@pytest.mark.parametrize(
    "h, w, shift",
    [
        (14, 14, (3, 3)),
        (14, 14, (0, 0)),
        (8, 8, (3, 3)),
        (8, 8, (0, 0)),
        (16, 5, (3, 0)),
        (7, 15, (0, 3)),
        (2, 2, (0, 0)),
        (7, 7, (0, 0)),
    ],
)
def test_windowed_attention_equals_plain_attention(h, w, shift):
    """With and without shift, with and without padding, on one window and on several.

    And padding has no gradient to anyone.
    """
    torch.manual_seed(0)
    block = (
        Block(8, 2, shifted=any(shift), drop=0.0)
        if h > 7 or w > 7
        else Block(8, 2, shifted=True, drop=0.0)
    )
    nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, h, w, 8)
    with torch.no_grad():
        seen = block.norm1(x)
        for i in range(2):
            expected = x[i] + plain_attention(block.attn, seen[i], shift)
            expected = expected + block.mlp.fc2(
                nn.functional.gelu(block.mlp.fc1(block.norm2(expected)))
            )
            assert torch.allclose(block(x)[i], expected, atol=1e-5)


def test_padding_does_not_leak(monkeypatch):
    """Whatever stands in the padding: real tokens do not change."""
    from models import swin_unet

    torch.manual_seed(0)
    block, x = Block(8, 2, shifted=True, drop=0.0).eval(), torch.randn(1, 9, 12, 8)
    answer, pad = block(x), nn.functional.pad
    monkeypatch.setattr(
        swin_unet.F,
        "pad",
        lambda x, sides: pad(x, sides, value=100.0) if x.is_floating_point() else pad(x, sides),
    )
    assert torch.allclose(block(x), answer, atol=1e-5)
    monkeypatch.setattr(swin_unet, "may_attend", lambda *args: None)
    assert not torch.allclose(block(x), answer, atol=1e-2)


def test_attention_looks_across_windows_only_when_shifted():
    torch.manual_seed(0)
    x = torch.randn(1, 14, 14, 8, requires_grad=True)
    for shifted in (False, True):
        out = Block(8, 2, shifted, drop=0.0)(x)[0, 6, 6].sum()
        reached = torch.autograd.grad(out, x)[0][0].abs().sum(-1) > 0
        rows = reached.any(1).nonzero()[:, 0].tolist()
        assert rows == ([*range(0, 7)] if not shifted else [*range(3, 10)])


def test_merging_and_expanding_order_tokens_as_the_official_code_does():
    """Public weights depend on it: neighbors (0, 0), (1, 0), (0, 1), (1, 1) are joined.

    Of features (p1 p2 c), p1 counts the rows.
    """
    merge, x = Merge(3), torch.randn(1, 4, 6, 3)
    merge.norm, merge.reduction = nn.Identity(), nn.Identity()
    assert torch.equal(
        merge(x)[0, 1, 2], torch.cat([x[0, 2, 4], x[0, 3, 4], x[0, 2, 5], x[0, 3, 5]])
    )
    expand, x = Expand(8, 2, 2), torch.randn(1, 3, 4, 8)
    expand.expand, expand.norm = nn.Identity(), nn.Identity()
    assert torch.equal(expand(x)[0, 2:4, 4:6], x[0, 1, 2].reshape(2, 2, 2)) and expand(x).shape == (
        1,
        6,
        8,
        2,
    )


def test_stochastic_depth_grows_and_spares_evaluation():
    net = SwinUNet(1, 2)
    drops = [block.drop_path.p for layer in net.layers for block in layer.blocks]
    assert drops == pytest.approx(np.linspace(0, 0.2, 8).tolist())
    assert [
        block.drop_path.p for layer in net.layers_up[1:] for block in layer.blocks
    ] == pytest.approx([drops[i] for i in (4, 5, 2, 3, 0, 1)])
    block, x = Block(8, 2, False, drop=0.5), torch.randn(64, 7, 7, 8)
    skipped = (block.train()(x) == x).flatten(1).all(1).float().mean().item()
    assert 0.05 < skipped < 0.5 and not (block.eval()(x) == x).flatten(1).all(1).any()


# -------------------------------------------------------------------------------- published weights


def norm_names(name):
    return [
        f"{name}.{k}"
        for k in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


def torchvision_names(kind):
    """The keys of torchvision's ResNet state dict, from its published naming scheme."""
    blocks, convolutions = {
        "resnet18": ((2, 2, 2, 2), 2),
        "resnet34": ((3, 4, 6, 3), 2),
        "resnet50": ((3, 4, 6, 3), 3),
    }[kind]
    names = ["conv1.weight", *norm_names("bn1"), "fc.weight", "fc.bias"]
    for layer, count in enumerate(blocks, 1):
        for block in range(count):
            for i in range(1, convolutions + 1):
                names += [
                    f"layer{layer}.{block}.conv{i}.weight",
                    *norm_names(f"layer{layer}.{block}.bn{i}"),
                ]
        if layer > 1 or convolutions == 3:
            names += [
                f"layer{layer}.0.downsample.0.weight",
                *norm_names(f"layer{layer}.0.downsample.1"),
            ]
    return names


def torchvision_weights(kind, width=64, channels=3):
    source = {
        k: v + 0.1 * torch.rand_like(v) if v.is_floating_point() else v
        for k, v in ResNet(channels, kind, width=width).state_dict().items()
    }
    return {k: source.get(k, torch.zeros(1)) for k in torchvision_names(kind)}


@pytest.mark.parametrize(
    "kind, channels",
    [("resnet18", 3), ("resnet34", 1), ("resnet34", 3), ("resnet34", 5), ("resnet50", 3)],
)
def test_torchvision_weights_load(kind, channels):
    weights, net = torchvision_weights(kind, width=8), ResNet(channels, kind, width=8)
    assert net.load_pretrained(weights, 1 if channels == 1 else 3) == ["fc"]
    rgb, mean = weights["conv1.weight"], weights["conv1.weight"].mean(1, keepdim=True)
    expected = {1: mean, 3: rgb, 5: torch.cat([rgb, mean, mean], 1)}[channels]
    assert torch.equal(net.conv1.weight, expected)
    assert all(
        torch.equal(value, weights[name])
        for name, value in net.state_dict().items()
        if name != "conv1.weight"
    )


def test_bottlenecks_halve_the_grid_in_their_second_convolution():
    """As torchvision's ResNet-50 does (He et al.: in the first); its weights depend on it."""
    strides = {
        name: m.stride[0]
        for name, m in ResNet(3, "resnet50", width=8).named_modules()
        if isinstance(m, nn.Conv2d) and m.stride[0] > 1
    }
    assert strides == {"conv1": 2} | {
        f"layer{i}.0.{part}": 2 for i in (2, 3, 4) for part in ("conv2", "downsample.0")
    }


def test_first_layer():
    rgb = torch.randn(4, 3, 7, 7)
    mean = rgb.mean(1, keepdim=True)
    adapted = lambda weight, inputs, image_channels: pretrained.first_layer(
        weight, nn.Conv2d(inputs, 4, 7), image_channels
    )
    assert torch.equal(
        adapted(rgb, 4, 1), mean.expand(-1, 4, -1, -1)
    )  # g: a gray image, three classes
    assert torch.equal(adapted(rgb, 4, 3), torch.cat([rgb, mean], 1))  # g: an RGB image, one class
    assert torch.equal(
        adapted(rgb, 2, 2), mean.expand(-1, 2, -1, -1)
    )  # two channels of something else
    assert torch.equal(
        adapted(mean, 3, 1), mean.expand(-1, 3, -1, -1)
    )  # filters of gray images stay
    assert torch.equal(adapted(mean, 3, 3), mean.expand(-1, 3, -1, -1))


def without(weights, *names):
    return {k: v for k, v in weights.items() if k not in names}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: without(w, "layer2.0.bn1.weight"), ["missing: layer2.0.bn1.weight"]),
        (
            lambda w: w | {"layer5.0.conv1.weight": torch.zeros(1)},
            ["left over: layer5.0.conv1.weight"],
        ),
        (
            lambda w: w | {"layer1.0.conv1.weight": torch.zeros(8, 8, 1, 1)},
            ["of another shape: layer1.0.conv1.weight"],
        ),
        (lambda w: w | {"bn1.weight": torch.full((8,), torch.nan)}, ["not finite: bn1.weight"]),
        (lambda w: w | {"conv1.weight": torch.zeros(8)}, ["of another shape: conv1.weight"]),
        (
            lambda w: {f"encoder.{k}": v for k, v in w.items()},
            ["missing: bn1.bias, ", "and 94 more", "left over: encoder.bn1.bias, "],
        ),
    ],
)
def test_keys_that_do_not_match_are_listed(change, words):
    net = ResNet(3, "resnet18", width=8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(KeyError) as error:
        net.load_pretrained(change(torchvision_weights("resnet18", width=8)), 3)
    assert all(word in str(error.value) for word in words), error.value
    assert all(
        torch.equal(before[k], v) for k, v in net.state_dict().items()
    )  # nothing was loaded by halves


def test_old_files_do_not_count_batches():
    weights = {
        k: v for k, v in torchvision_weights("resnet18", width=8).items() if "num_batches" not in k
    }
    net = ResNet(3, "resnet18", width=8)
    net.load_pretrained(weights, 3)
    assert net.bn1.num_batches_tracked == 0 and torch.equal(
        net.bn1.running_mean, weights["bn1.running_mean"]
    )


def swin_t(width=12):
    """A state dict with the names and shapes of the official Swin-T.

    Depths 2 2 6 2, attention masks and position indices among them.
    """
    weights = {
        "patch_embed.proj.weight": torch.randn(width, 3, 4, 4),
        "patch_embed.proj.bias": torch.randn(width),
        "head.weight": torch.randn(10, 8 * width),
        "head.bias": torch.randn(10),
    }

    def norm(name, n):
        weights.update({f"{name}.weight": torch.randn(n), f"{name}.bias": torch.randn(n)})

    def linear(name, i, o, bias=True):
        weights.update(
            {f"{name}.weight": torch.randn(o, i)}
            | ({f"{name}.bias": torch.randn(o)} if bias else {})
        )

    norm("patch_embed.norm", width), norm("norm", 8 * width)
    for i, depth in enumerate((2, 2, 6, 2)):
        f = width * 2**i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            norm(f"{block}.norm1", f), norm(f"{block}.norm2", f)
            (
                linear(f"{block}.attn.qkv", f, 3 * f),
                linear(f"{block}.attn.proj", f, f),
                linear(f"{block}.mlp.fc1", f, 4 * f),
                linear(f"{block}.mlp.fc2", 4 * f, f),
            )
            weights[f"{block}.attn.relative_position_bias_table"] = torch.randn(169, 3 * 2**i)
            weights[f"{block}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
            if j % 2 and i < 3:
                weights[f"{block}.attn_mask"] = torch.zeros(64 // 4**i, 49, 49)
        if i < 3:
            (
                norm(f"layers.{i}.downsample.norm", 4 * f),
                linear(f"layers.{i}.downsample.reduction", 4 * f, 2 * f, bias=False),
            )
    return weights


def test_swin_t_loads_into_encoder_and_decoder():
    weights, net = swin_t(), SwinUNet(1, 2, width=12)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert net.load_pretrained(weights, 1) == ["head", "layers.2.blocks.2 to 5"]
    after = net.state_dict()
    for name, value in after.items():
        if name == "patch_embed.proj.weight":
            assert torch.equal(value, weights[name].mean(1, keepdim=True))
        elif name in weights:
            assert torch.equal(value, weights[name])
        elif ".blocks." in name:  # the decoder's stage i mirrors the encoder's stage 3 - i
            assert torch.equal(value, weights[f"layers.{3 - int(name[10])}{name[11:]}"])
        else:
            assert torch.equal(value, before[name])
    assert {k for k in after if k in weights} >= {
        k for k in weights if ".blocks.0." in k and "index" not in k
    }
    with pytest.raises(KeyError, match="missing: norm.weight"):
        net.load_pretrained(without(weights, "norm.weight"), 1)
    with pytest.raises(KeyError, match="left over: layers.2.blocks.6.norm1.weight"):  # Swin-S
        net.load_pretrained(weights | {"layers.2.blocks.6.norm1.weight": torch.zeros(48)}, 1)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """As if torchvision's ResNet-18 were at another address, with its checksum in its name.

    -> its state dict, its path
    """
    weights, folder = torchvision_weights("resnet18", width=8), tmp_path / "published"
    folder.mkdir()
    torch.save(weights, folder / "it")
    path = (folder / "it").rename(
        folder / f"resnet18-{hashlib.sha256((folder / 'it').read_bytes()).hexdigest()[:8]}.pth"
    )
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setitem(pretrained.IMAGENET, "resnet18", path.as_uri())
    return weights, path


def test_imagenet_weights_are_fetched_once_and_compared(published, tmp_path):
    weights, path = published
    net = models.build("unetpp", channels=3, classes=2, encoder="resnet18", width=8)
    assert models.load_encoder(net, "imagenet") == "encoder: weights of imagenet, all but fc"
    assert torch.equal(net.encoder.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])
    kept = tmp_path / "hub" / "checkpoints" / path.name
    path.unlink()
    models.load_encoder(net, "imagenet")  # from the cache
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is not the file that was published; remove it"):
        models.load_encoder(net, "imagenet")
    kept.unlink()
    with pytest.raises(ValueError, match="cannot be downloaded .* give the file"):
        models.load_encoder(net, "imagenet")
    assert not kept.exists()


def test_another_file_at_the_address_is_not_kept(published, tmp_path):
    published[1].write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be downloaded .*hash"):
        models.load_encoder(
            models.build("unetpp", channels=3, classes=2, encoder="resnet18", width=8), "imagenet"
        )
    assert not list((tmp_path / "hub").rglob("*.pth"))


# --------------------------------------------------------------------------------------- by command

RUN = [
    *"--labeled 3 --size 64 --steps 4 --eval-every 2 --batch 2 --batch-unlabeled 2".split(),
    *"--lam-warmup 0 --amp off".split(),
]


def test_a_run_from_published_weights(rgb, rgb_quality, tmp_path, capsys):
    """Stage 3 with guidance, interrupted and resumed without the file, and stage 4.

    --lr 0, so that the weights stay those of the file.
    """
    torch.save({"model": swin_t()}, tmp_path / "w.pth")
    argv = [
        *[rgb, *RUN, "--out", str(tmp_path / "run"), "--qp", rgb_quality[1]],
        *"--size 32 --steps 2 --eval-every 1 --model swin_unet --width 12".split(),
        *"--method mean_teacher --weight quality --qar 0.01".split(),
        *["--encoder-weights", str(tmp_path / "w.pth"), "--lr", "0"],
    ]
    weights = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    step = train_ssl.train_step

    def killed(run, batch, args, n):
        if n == 2:
            raise RuntimeError("killed")
        return step(run, batch, args, n)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(train_ssl, "train_step", killed)
        train_ssl.main(argv)
    said = capsys.readouterr().out
    assert f"encoder: weights of {tmp_path}/w.pth, all but head, layers.2" in said
    (tmp_path / "w.pth").unlink()
    train_ssl.main([*argv, "--resume"])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    key = "patch_embed.proj.weight"
    assert state["step"] == 2 and torch.equal(state["nets"][0][key], weights[key])
    best, table = str(tmp_path / "run" / "best.pt"), str(tmp_path / "table")
    evaluate.main([rgb, best, "--out", table, "--pictures", "0"])
    assert "mean_teacher" in (tmp_path / "table" / "summary.md").read_text()


@pytest.mark.parametrize(
    "wrap",
    [lambda w: {"state_dict": w, "epoch": 3}, lambda w: {f"module.{k}": v for k, v in w.items()}],
)
def test_files_of_training_scripts(wrap, tmp_path):
    weights = torchvision_weights("resnet18", width=8)
    torch.save(wrap(weights), tmp_path / "w.pth")
    net = models.build("quality", channels=3, classes=2, width=8)
    models.load_encoder(net, str(tmp_path / "w.pth"))
    assert torch.equal(net.backbone.layer4[1].conv2.weight, weights["layer4.1.conv2.weight"])


def test_g_starts_from_published_weights(rgb, rgb_quality, published, tmp_path, capsys, unrendered):
    argv = [
        rgb,
        "--vqm",
        rgb_quality[0],
        "--head",
        "scalar",
        "--width",
        "8",
        "--size",
        "32",
        "--epochs",
        "1",
        "--batch",
        "16",
        "--lr",
        "0",
        "--ema",
        "0",
        "--encoder-weights",
        "imagenet",
        "--out",
        str(tmp_path / "g"),
    ]
    train_qp.main(argv)
    assert "encoder: weights of imagenet, all but fc" in capsys.readouterr().out
    first = torch.load(tmp_path / "g" / "qp.pt", weights_only=True)["weights"][
        "backbone.conv1.weight"
    ]
    rgb_filters = published[0]["conv1.weight"]
    assert torch.equal(first, torch.cat([rgb_filters, rgb_filters.mean(1, keepdim=True)], 1))


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--model", "transformer"],
            ["unet, vnet, resnet_unet, unetpp, attention_unet, swin_unet, smp:*"],
        ),
        (
            ["--model", "swin_unet", "--size", "72"],
            ["--model swin_unet: needs sides that are multiples of 32, not 72 x 72"],
        ),
        (["--model", "swin_unet", "--width", "16"], ["--width 16 is no multiple of its 3 heads"]),
        (["--model", "unetpp", "--width", "4"], ["at least 8"]),
        (
            ["--model", "unetpp", "--size", "32", "--batch", "1"],
            [
                "--model unetpp: one image of 32 x 32 is a single pixel in its deepest level",
                "--batch",
            ],
        ),
        (
            ["--model", "unetpp", "--encoder", "resnet9"],
            ["there is no encoder 'resnet9'", "resnet50"],
        ),
        (
            ["--model", "swin_unet", "--encoder", "resnet18"],
            ["--encoder is an option of --model resnet_unet, unetpp, attention_unet, smp:*"],
        ),
        (["--model", "unetpp", "--dropout", "0.1"], ["--dropout is an option of --model vnet"]),
        (
            ["--model", "unetpp", "--encoder-weights", "none.pth"],
            ["--encoder-weights none.pth: no such file"],
        ),
        (["--encoder-weights", "DATA"], ["unet has no encoder that they could be for"]),
        (
            ["--model", "swin_unet", "--encoder-weights", "imagenet"],
            ["only for resnet18, resnet34, resnet50; give a file"],
        ),
        (["--model", "unetpp", "--encoder-weights", "DATA"], ["cannot be read as a state dict"]),
        (["--model", "unetpp", "--encoder-weights", "TENSORS"], ["pip install safetensors"]),
        (["--model", "unetpp", "--encoder-weights", "LIST"], ["no state dict of a network"]),
        (["--model", "unetpp", "--encoder-weights", "COMPLEX"], ["no state dict of a network"]),
        (["--model", "unetpp", "--encoder-weights", "RESNET18"], ["missing: layer1.2.bn1.bias"]),
        (["--model", "smp:Unet"], ["segmentation_models_pytorch", "pip install"]),
    ],
)
def test_refusals(argv, words, rgb, tmp_path, refused, monkeypatch):
    for package in ("segmentation_models_pytorch", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    (
        torch.save([torch.zeros(1)], tmp_path / "list.pth"),
        torch.save(
            {"bn1.weight": torch.zeros(64, dtype=torch.complex64)}, tmp_path / "complex.pth"
        ),
    )
    torch.save(torchvision_weights("resnet18", width=8), tmp_path / "resnet18.pth")
    (tmp_path / "w.safetensors").touch()
    files = {
        "DATA": rgb,
        "TENSORS": tmp_path / "w.safetensors",
        "LIST": tmp_path / "list.pth",
        "COMPLEX": tmp_path / "complex.pth",
        "RESNET18": tmp_path / "resnet18.pth",
    }
    refused(
        train_ssl.main,
        [rgb, *RUN, *(files.get(a, a) for a in argv), "--out", tmp_path / "o"],
        *words,
    )
    assert not (tmp_path / "o").exists()


def test_volumes_are_refused_where_a_network_cannot(volumes, tmp_path, refused):
    argv = [volumes, "--out", tmp_path / "o", "--size", "16,16,32", "--steps", "1"]
    refused(
        train_ssl.main,
        [*argv, "--model", "swin_unet"],
        "--model swin_unet: segments slices, not volumes",
    )
    torch.save(torchvision_weights("resnet18", width=8), tmp_path / "w.pth")
    for weights in ("imagenet", tmp_path / "w.pth"):
        refused(
            train_ssl.main,
            [*argv, "--model", "unetpp", "--encoder", "resnet18", "--encoder-weights", weights],
            "they are for slices, not for volumes",
        )
    refused(
        train_ssl.main,
        [*argv[:-4], "--size", "16", "--steps", "1", "--batch", "1"],
        "--model vnet: one image of 16 x 16 x 16 is a single pixel",
    )


@pytest.mark.parametrize("name", ["unet", "vnet"])
@pytest.mark.parametrize("shape, fits", [((31, 17, 31), False), ((16, 17, 32), True)])
def test_one_image_is_refused_where_batch_norm_would_see_one_pixel(name, shape, fits):
    """Each level halves a side, rounded down: 31 pixels are one in the deepest."""
    config = dict(name=name, channels=1, classes=2, dims=3, width=2)
    step = lambda: models.build(**config).train()(torch.zeros(1, 1, *shape))
    if fits:
        models.check(config, shape, batch=1)
        step()
        return
    for refuses in (lambda: models.check(config, shape, batch=1), step):
        with pytest.raises(ValueError):
            refuses()


def test_a_checkpoint_of_a_size_that_its_network_does_not_take(rgb, tmp_path, refused):
    train_ssl.main(
        [
            rgb,
            *RUN,
            "--model",
            "swin_unet",
            "--width",
            "12",
            "--steps",
            "1",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    state["args"]["size"] = 40
    torch.save(state, tmp_path / "other.pt")
    refused(
        evaluate.main,
        [rgb, tmp_path / "other.pt", "--out", tmp_path / "t"],
        "other.pt",
        "multiples of 32",
    )


class TinyEncoder(nn.Module):
    output_stride = 32

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Conv2d(channels, 4, 3, padding=1)
        self.register_buffer("index", torch.arange(3), persistent=False)  # as timm's networks have

    def forward(self, x):
        return [x, self.body(x) + self.index.sum().item()]


class TinyDecoder(nn.Module):
    def forward(self, features):
        return features[-1].relu()


class Tiny(nn.Module):
    """A model has encoder, decoder (of a list) and segmentation_head."""

    requires_divisible_input_shape = True

    def __init__(self, channels, classes):
        super().__init__()
        self.encoder = TinyEncoder(channels)
        self.decoder = TinyDecoder()
        self.segmentation_head = nn.Conv2d(4, classes, 1)


@pytest.fixture
def smp(monkeypatch):
    """A stand-in for segmentation_models_pytorch, which the tests do not install.

    -> the encoders and weights that it is asked for, a list
    """
    asked = []

    def create_model(arch, encoder_name, encoder_weights, in_channels, classes):
        if arch != "Tiny":
            raise KeyError(f"no architecture {arch}")
        asked.append((encoder_name, encoder_weights))
        return Tiny(in_channels, classes)

    package = types.SimpleNamespace(create_model=create_model)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", package)
    return asked


def test_a_network_of_segmentation_models_pytorch_learns_and_is_scored(rgb, smp, tmp_path):
    argv = "--model smp:Tiny --encoder resnet18 --encoder-weights imagenet --method unimatch"
    train_ssl.main([rgb, *RUN, *argv.split(), "--out", str(tmp_path / "run")])
    tried, built, with_weights = smp[:3]
    assert tried == built == ("resnet18", None)
    assert with_weights == ("resnet18", "imagenet")
    best, table = str(tmp_path / "run" / "best.pt"), str(tmp_path / "table")
    evaluate.main([rgb, best, "--out", table, "--pictures", "0"])


@pytest.mark.parametrize(
    "argv, words",
    [
        ("smp:Nothing --encoder resnet18", "no architecture Nothing"),
        ("smp:Tiny --encoder resnet18 --size 72", "multiples of 32"),
        ("smp:Tiny --encoder resnet18 --size 32 --batch 1", "single pixel"),
        ("smp:Tiny --encoder tu-hf-hub:somebody/net", "is no encoder of it"),
        ("smp:Tiny --width 16", "--width is an option of"),
    ],
)
def test_refusals_of_segmentation_models_pytorch(argv, words, rgb, smp, tmp_path, refused):
    out = ["--out", tmp_path / "o"]
    refused(train_ssl.main, [rgb, *RUN, *out, "--model", *argv.split()], words)


def test_a_network_of_segmentation_models_pytorch_that_does_not_work(
    rgb, smp, tmp_path, monkeypatch, refused
):
    monkeypatch.setattr(TinyDecoder, "forward", lambda self, features: features[9])
    argv = [rgb, *RUN, "--out", tmp_path / "o", "--model", "smp:Tiny", "--encoder", "resnet18"]
    refused(train_ssl.main, argv, "list index out of range")
