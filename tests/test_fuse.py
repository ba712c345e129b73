import copy
import io
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastinterp as fi
from fastinterp.fusion import FusionReport, stock_type
from fastinterp.maps import CamNetwork


class Block(nn.Module):
    """Post-activation, one shared in-place ReLU, in-place addition."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.drop = nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.drop(self.relu(self.bn1(self.conv1(x))))
        out = self.drop(self.bn2(self.conv2(out)))
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(torch.flatten(self.pool(F.max_pool2d(x, 2)), 1))


class Activations(nn.Module):
    """Every activation behind a batch norm, as a module, a function and a method."""

    def __init__(self):
        super().__init__()
        acts = [nn.ReLU(), nn.SiLU(inplace=True), nn.GELU(), nn.Softplus(2), nn.LeakyReLU(0.2)]
        self.acts = nn.ModuleList(acts)
        self.bns = nn.ModuleList([nn.BatchNorm2d(3) for _ in range(11)])
        self.fc = nn.Linear(3, 5)

    def forward(self, x):
        for act, bn in zip(self.acts, self.bns, strict=False):
            x = act(bn(x))
        x = F.relu(self.bns[5](x), inplace=True) + F.silu(self.bns[6](x))
        x = F.gelu(torch.add(x, self.bns[7](x))) + F.leaky_relu(self.bns[8](x).add_(x), 0.3)
        return self.fc((F.softplus(self.bns[9](x) + 1) + self.bns[10](x).relu()).mean((2, 3)))


class GroupBlock(nn.Module):
    """Group norms as the batch norms of a residual block."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(3, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, channels, affine=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        return self.relu(y + x)


class Norms(nn.Module):
    """Layer and group norms, modules and functions, alone or with an activation or an addition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.GroupNorm(2, 6), nn.SiLU(inplace=True))
        self.block = GroupBlock()
        self.norm, self.pre = nn.LayerNorm(6), nn.LayerNorm((16, 6), bias=False)
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9, eps=1e-3), nn.GELU())
        self.weight = nn.Parameter(torch.rand(9))
        self.post, self.fc = nn.GroupNorm(3, 9), nn.Linear(9, 5)

    def forward(self, x):
        x = self.block(self.stem(x)).flatten(2).transpose(1, 2)
        x = F.softplus(self.norm(x) + self.pre(x))
        x = self.mlp(x)
        x = F.gelu(F.layer_norm(x, (9,), self.weight, eps=1e-4)) + F.layer_norm(x, (9,))
        x = F.group_norm(x.transpose(1, 2), 3, self.weight, self.weight)
        return self.fc(F.leaky_relu(self.post(x), 0.2).mean(2))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        x = F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)
        return self.fc(x.mean((2, 3)))


def images(n=3, size=8, dtype=torch.float64, channels=3):
    return torch.rand(n, channels, size, size, dtype=dtype)


def double_backprop(model, x):
    """Logits, the loss's gradients by every parameter and the buffers after it."""
    x = x.clone().requires_grad_()
    y = torch.arange(len(x)) % 5
    logits = model(x)
    logits = getattr(logits, "logits", logits)
    of_input = torch.autograd.grad(logits[range(len(x)), y].sum(), x, create_graph=True)[0]
    loss = F.cross_entropy(logits, y) + of_input.abs().mean()
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return logits, of_input, *grads, *model.buffers()


def assert_same(actual, expected, also=None):
    """Equal up to rounding; or up to what ``also``, a rounding of the input, makes of ``expected``.

    Second derivatives through batch statistics of a few values can magnify roundings a lot.
    """
    assert len(actual) == len(expected)
    for a, b, c in zip(actual, expected, also or expected, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            scale = b.abs().max().item() if b.numel() and b.is_floating_point() else 1.0
            rounding = (b - c).abs().max().item() if b.numel() else 0.0
            atol = 1e-9 * max(scale, 1.0) + 30 * rounding
            torch.testing.assert_close(a, b, rtol=1e-8, atol=atol)


def assert_fusing_changes_nothing(model, x):
    model = model.double()
    stock = copy.deepcopy(model)
    keys = list(model.state_dict())
    fused = fi.fuse(model)
    assert fused is model
    assert list(fused.state_dict()) == keys
    for mode in (True, False):
        torch.manual_seed(0)
        rounded = double_backprop(copy.deepcopy(stock).train(mode), x * (1 + 1e-15))
        torch.manual_seed(0)
        expected = double_backprop(stock.train(mode), x)
        torch.manual_seed(0)
        assert_same(double_backprop(fused.train(mode), x), expected, rounded)
    types = [type(m) for m in stock.modules()]
    assert [stock_type(m) for m in fused.modules()] == types
    assert fi.unfuse(fused) is fused
    assert [type(m) for m in fused.modules()] == types
    assert not hasattr(fused, "fusion_report")
    return fi.fuse(fused).fusion_report


def whats(report):
    return {(e.what, e.fused_as) for e in report.fused}


# ---- same results


@pytest.mark.parametrize("make", [Net, Activations, Dropping, Norms])
def test_hand_written_networks(make, backend):
    report = assert_fusing_changes_nothing(make(), images())
    assert not [e for e in report.left if hasattr(sys.modules[__name__], e.what)]
    if make is Net:
        assert [e.name for e in report.fused if e.what == "BatchNorm2d + add + ReLU"] == [
            "blocks.0.bn2",
            "blocks.1.bn2",
        ]
    if make is Activations:
        assert sum(e.fused_as == "batch_norm_act" for e in report.fused) == 11
        assert sum("+ add +" in e.what for e in report.fused) == 2
    if make is Norms:
        assert {(e.what, e.fused_as) for e in report.fused if "norm_act" in e.fused_as} == {
            ("GroupNorm + SiLU", "group_norm_act"),
            ("GroupNorm + ReLU", "group_norm_act"),
            ("GroupNorm + add + ReLU", "group_norm_act"),
            ("GroupNorm + leaky_relu", "group_norm_act"),
            ("LayerNorm", "layer_norm_act"),
            ("LayerNorm + add + softplus", "layer_norm_act"),
            ("LayerNorm + GELU", "layer_norm_act"),
            ("layer_norm + gelu", "layer_norm_act"),
            ("layer_norm function", "layer_norm_act"),
            ("group_norm function", "group_norm_act"),
        }


@pytest.mark.parametrize("name", ["small", "pool", "wresnet"])
def test_our_networks(name):
    report = assert_fusing_changes_nothing(fi.create_model(name, 1, 10), images(2, 12, channels=1))
    assert not report.left


TORCHVISION = ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5"]
TORCHVISION += ["resnet50", "wide_resnet50_2", "googlenet", "regnet_y_400mf", "inception_v3"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "resnet18" else pytest.mark.slow) for n in TORCHVISION],
)
def test_torchvision(name):
    import torchvision

    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = getattr(torchvision.models, name)(num_classes=5, **options)
    if name == "vgg11_bn":
        net.classifier = nn.Linear(512 * 7 * 7, 5)
    size = {"googlenet": 64, "inception_v3": 80}.get(name, 32)
    if name in ("googlenet", "inception_v3"):  # the second head needs large images
        net.aux_logits, net.aux1, net.aux2, net.AuxLogits = False, None, None, None
    report = assert_fusing_changes_nothing(net, images(4, size))
    assert {e.what for e in report.left} <= {"ReLU6", "Sigmoid", "AdaptiveAvgPool2d"}
    merged = [e for e in report.fused if "BatchNorm2d +" in e.what]
    assert merged or name == "mobilenet_v2"
    if name.startswith("resnet"):
        assert sum(e.what == "BatchNorm2d + add + ReLU" for e in merged) == (
            16 if name == "resnet50" else 8
        )
    if name == "densenet121":
        assert len(merged) == 120


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet26d", "resnetv2_50", "efficientnet_b0"])
def test_timm(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    report = assert_fusing_changes_nothing(timm.create_model(name, num_classes=5), images(4, 32))
    assert {"resnetv2_50": "batch_norm + ReLU", "efficientnet_b0": "batch_norm + SiLU"}.get(
        name, "BatchNorm2d + add + ReLU"
    ) in {e.what for e in report.fused}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_tiny_patch16_224", dict(img_size=32), 25),
        ("convnext_atto", dict(), 17),
    ],
)
def test_timm_layer_norms(name, options, count, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.setenv("FASTINTERP_BACKEND", "cpu")  # or such small images would take plain torch
    # The other attention kernels have no double backward.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        net = timm.create_model(name, num_classes=5, **options)
        report = assert_fusing_changes_nothing(net, images(3, 32))
    assert sum(e.fused_as == "layer_norm_act" for e in report.fused) == count


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("make, shape", [(nn.BatchNorm2d, (4, 3, 5, 5)), (nn.BatchNorm1d, (6, 3))])
def test_a_batch_norm_alone(make, shape, tracks, momentum):
    stock = make(3, momentum=momentum, track_running_stats=tracks).double()
    fused = fi.fuse(copy.deepcopy(stock))
    for mode in (True, True, False, True):
        x = torch.randn(shape, dtype=torch.float64)
        assert_same([fused.train(mode)(x)], [stock.train(mode)(x)])
        assert_same(list(fused.state_dict().values()), list(stock.state_dict().values()))
    with pytest.raises(ValueError, match="expected"):
        fused(torch.randn(2, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="more than 1 value|more than one value"):
        fused.train()(torch.randn(1, 3, *[1] * (len(shape) - 2), dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 6, (3, 2), stride=2, dilation=(1, 2), groups=3, padding="valid"),
        nn.Conv2d(3, 4, 2, padding="same", padding_mode="reflect"),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.MaxPool2d(17, 1, 8),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Softplus(0.5),
        nn.LeakyReLU(0.3),
        nn.LayerNorm((9, 9)),
        nn.LayerNorm(9, elementwise_affine=False),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_alone(layer, batched):
    x = images(2, 9)[slice(None) if batched else 0]
    stock = copy.deepcopy(layer).double()
    fused = fi.fuse(copy.deepcopy(stock))
    assert len(fused.fusion_report.fused) == 1
    assert type(fused) is not type(stock)
    assert_same([fused(x)], [stock(x)])


def test_layers_without_an_op_stay():
    net = nn.Sequential(
        nn.MaxPool2d(2, return_indices=True),
        nn.AdaptiveAvgPool2d(2),
        nn.GELU("tanh"),
        nn.Softplus(threshold=3),
        nn.ReLU6(),
        nn.LeakyReLU(-1.0),
        nn.BatchNorm3d(3),
        nn.ReLU(inplace=True),
        type("OwnConv", (nn.Conv2d,), {"forward": lambda self, *x: x[0]})(3, 3, 1),
    )
    fi.fuse(net)
    assert [e.name for e in net.fusion_report.left] == [str(i) for i in range(9)]
    assert not net.fusion_report.fused
    assert not any(hasattr(m, "_stock_type") for m in net.modules())


# ---- in-place activations


class InPlace(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), shared or nn.ReLU(inplace=True)


class OnArgument(InPlace):
    def forward(self, x):
        return self.conv(self.relu(x))


class OnUsedTwice(InPlace):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y) + 2 * y


class OnUnknown(InPlace):
    def forward(self, x):
        return F.relu(self.conv(self.relu(x.view(x.shape))), inplace=True)


class AddsInPlace(InPlace):
    def forward(self, x):
        y = x.clone()
        z = y
        y += self.conv(x)
        return self.relu(z * 1) + z


@pytest.mark.parametrize("make", [OnArgument, OnUsedTwice, OnUnknown, AddsInPlace])
def test_in_place_operations_reach_those_who_hold_the_tensor(make):
    stock, x = make().double(), images() - 0.5
    fused, seen, expected = fi.fuse(copy.deepcopy(stock)), x.clone(), x.clone()
    with torch.no_grad():
        assert_same([fused(seen), seen], [stock(expected), expected])
    assert not torch.equal(expected, x) or make in (OnUsedTwice, AddsInPlace)
    left = [e.what for e in fused.fusion_report.left]
    assert left == ([] if make is AddsInPlace else ["ReLU"])


def test_a_shared_in_place_relu():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.BatchNorm2d(3), relu, nn.Flatten())
    report = assert_fusing_changes_nothing(nn.Sequential(net, nn.Linear(192, 5), relu), images())
    assert ("BatchNorm2d + ReLU", "batch_norm_act") in whats(report)
    assert ("ReLU", "activation") in whats(report)


def test_a_hook_that_keeps_what_an_in_place_relu_changes():
    stock = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)).double()
    kept = []
    for net in (stock, fi.fuse(copy.deepcopy(stock))):
        net[0].register_forward_hook(lambda m, i, o: kept.append(o))
        with torch.no_grad():
            net(images(1) - 0.5)
    assert (kept[0] >= 0).all()
    assert (kept[1] >= 0).all()


# ---- hooks, tying, copies


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "global"])
def test_hooks_see_what_they_always_saw(before, kind):
    def register(net, seen):
        def hook(module, *values):
            for value in values:
                value = value[0] if isinstance(value, tuple) else value
                seen.append((stock_type(module).__name__, value.detach().clone()))

        if kind == "global":
            return [nn.modules.module.register_module_forward_hook(hook)]
        changed_in_place = ("bn2", "drop") if kind == "full_backward" else ()  # torch forbids it
        return [
            getattr(m, f"register_{kind}_hook")(hook)
            for name, m in net.named_modules()
            if stock_type(m) in (nn.BatchNorm2d, nn.ReLU, nn.Identity)
            and not name.endswith(changed_in_place)
        ]

    stock = Net().double()
    for m in stock.modules():
        if kind == "full_backward" and hasattr(m, "inplace"):
            m.inplace = False
    nets, x, seen = [stock, copy.deepcopy(stock)], images(), [[], []]
    if not before:
        fi.fuse(nets[1])
    for net, record in zip(nets, seen, strict=True):
        handles = register(net, record)
        if before and net is nets[1]:
            fi.fuse(net)
        net(x).sum().backward()
        for handle in handles:
            handle.remove()
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
    assert len(seen[0]) >= 8
    assert_same([v for _, v in seen[1]], [v for _, v in seen[0]])


def test_modules_called_and_replaced_after_fusing():
    stock = Net().double()
    fused, x = fi.fuse(copy.deepcopy(stock)), images()
    for net in (stock, fused):
        net.blocks[0].relu = nn.Sigmoid()
        net.blocks[1].bn1 = nn.Identity()
        net.blocks[1].drop = nn.Dropout(0.0)
        net.blocks[0].conv2.weight = nn.Parameter(net.blocks[0].conv2.weight * 2)
    assert_same(double_backprop(fused, x), double_backprop(stock, x))
    for net in (stock, fused):
        net.blocks.append(copy.deepcopy(net.blocks[0]))
        net.stem.append(nn.Tanh())
    assert_same(double_backprop(fused, x), double_backprop(stock, x))


class Configured(nn.Module):
    def __init__(self, slope=0.0, skip=True):
        super().__init__()
        self.conv, self.bn, self.slope = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), slope
        self.skip = nn.Conv2d(3, 3, 1) if skip else None
        self.steps = 0

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x))) * (1 - self.slope)
        return y if self.skip is None else y + self.skip(x)


def test_a_changed_attribute_is_seen():
    for change in (("slope", 0.5), ("skip", None)):
        stock = Configured().double()
        fused, x = fi.fuse(copy.deepcopy(stock)), images()
        fused.new = stock.new = 3
        assert type(fused) is not Configured
        setattr(stock, *change)
        setattr(fused, *change)
        assert_same([fused(x)], [stock(x)])
    assert type(type(fi.fuse(Configured()))(0.7, skip=False)) is Configured


def test_tied_weights_and_modules():
    net = Net()
    net.blocks[1].conv1.weight = net.blocks[0].conv2.weight
    net.blocks[1].bn2 = net.blocks[0].bn2
    names = [n for n, _ in net.named_parameters()]
    assert_fusing_changes_nothing(net, images())
    assert net.blocks[1].conv1.weight is net.blocks[0].conv2.weight
    assert [n for n, _ in net.named_parameters()] == names


def test_fusing_a_copy_or_copying_a_fused_one():
    net, x = Net().double(), images()
    fused = fi.fuse(copy.deepcopy(net))
    again = copy.deepcopy(fused)
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]
    assert again.blocks[0].conv1.weight is not fused.blocks[0].conv1.weight
    assert_same(double_backprop(again, x), double_backprop(fused, x))
    assert type(net) is Net
    assert [type(m) for m in fi.unfuse(again).modules()] == [type(m) for m in net.modules()]
    assert type(fused) is not Net


def test_state_dicts_go_both_ways():
    stock, other = Net(), Net()
    fused = fi.fuse(copy.deepcopy(stock))
    assert fused.state_dict().keys() == stock.state_dict().keys()
    fused.load_state_dict(other.state_dict())
    stock.load_state_dict(fused.state_dict())
    x = images(dtype=torch.float32)
    torch.testing.assert_close(stock.eval()(x), other.eval()(x))
    torch.testing.assert_close(fused.eval()(x), other.eval()(x))


def fresh_process(code, **environment):
    folder = os.path.dirname(__file__)
    path = os.pathsep.join([os.path.dirname(folder), folder, os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_pickled_and_loaded_in_a_fresh_process(tmp_path):
    import torchvision

    fused = fi.fuse(torchvision.models.resnet18(num_classes=5).double().eval())
    x = images(2, 32)
    torch.save({"model": fused, "x": x, "y": fused(x)}, tmp_path / "model.pt")
    out = fresh_process(
        "import torch, fastinterp\n"
        f"d = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(d['model'](d['x']), d['y'])\n"
        "print(type(d['model'].layer1[0]).__name__, len(d['model'].fusion_report.fused))\n"
        "print(type(fastinterp.unfuse(d['model']).layer1[0]).__name__)\n"
    )
    assert out.split() == ["FusedBasicBlock", "42", "BasicBlock"]
    clone = pickle.load(io.BytesIO(pickle.dumps(fused)))
    assert [type(m) for m in clone.modules()] == [type(m) for m in fused.modules()]


def test_distributed_data_parallel():
    out = fresh_process(
        "import copy, torch, torch.distributed as dist, fastinterp as fi, test_fuse as t\n"
        "dist.init_process_group('gloo', rank=0, world_size=1, init_method='tcp://127.0.0.1:0')\n"
        "stock = t.Net().double(); x = t.images()\n"
        "wrap = torch.nn.parallel.DistributedDataParallel\n"
        "fused = wrap(fi.fuse(copy.deepcopy(stock)), broadcast_buffers=False)\n"
        "for net in (stock, fused): net(x).square().sum().backward()\n"
        "grads = [[p.grad for p in net.parameters()] for net in (fused, stock)]\n"
        "t.assert_same(*grads)\n"
        "try: fi.fuse(fused)\n"
        "except ValueError as error: print(error)\n"
        "dist.destroy_process_group()\n",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29533",
    )
    assert "before wrapping" in out


def test_running_statistics_after_steps_and_switches():
    stock = Net().double()
    fused = fi.fuse(copy.deepcopy(stock))
    for mode in (True, True, False, True, False):
        x = images()
        assert_same([fused.train(mode)(x)], [stock.train(mode)(x)])
    assert_same(list(fused.buffers()), list(stock.buffers()))
    assert stock.stem[1].num_batches_tracked == 3
    fused.train()
    stock.train()
    fused.blocks[0].bn1.eval()
    stock.blocks[0].bn1.eval()
    assert_same(double_backprop(fused, x), double_backprop(stock, x))


class Stack(nn.Sequential):
    pass


@pytest.mark.parametrize("make", [nn.Sequential, Stack])
def test_slices_of_a_sequential(make):
    net = make(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity(), nn.ReLU(), nn.Conv2d(3, 2, 1))
    stock = net.double()
    fused, x = fi.fuse(copy.deepcopy(stock)), images()
    assert ("BatchNorm2d + ReLU", "batch_norm_act") in whats(fused.fusion_report)
    assert type(fused) is not make
    assert isinstance(fused, make)
    for part in (slice(None), slice(1), slice(2), slice(1, 3), slice(0, 4), slice(2, None)):
        assert_same([fused[part](x)], [stock[part](x)])
    fused.append(nn.Sigmoid())
    stock.append(nn.Sigmoid())
    assert_same([fused(x), fused[0](x)], [stock(x), stock[0](x)])
    assert len(fused) == 6


# ---- forwards that cannot be rewritten


class Stores(InPlace):
    def forward(self, x):
        self.last = F.relu(self.conv(x))
        return self.last


class Appends(InPlace):
    def __init__(self):
        super().__init__()
        self.log = [1.0]

    def forward(self, x):
        self.log.append(2.0)
        return F.relu(self.conv(x))


class Optional(InPlace):
    def forward(self, x, scale=None):
        y = F.relu(self.conv(x))
        return y if scale is None else y * scale


class Branches(InPlace):
    def forward(self, x):
        return F.relu(self.conv(x)) if x.sum() > 0 else x


class Stops(InPlace):
    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
        return F.relu(self.conv(x)) + y


class Casts(InPlace):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.conv(x))


class Offloads(InPlace):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return F.relu(self.conv(x))


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g


class Reverses(InPlace):
    def forward(self, x):
        return F.relu(self.conv(Reversed.apply(x)))


class Random(InPlace):
    def forward(self, x):
        return F.relu(self.conv(x)) if torch.rand(()).item() < 2 else x


class ReadsChild(InPlace):
    def forward(self, x):
        return F.relu(self.conv(x)) * (2 if self.conv.training else 1)


class AsksType(InPlace):
    def forward(self, x):
        y = F.relu(self.conv(x))
        return y if isinstance(y, torch.Tensor) else x


class Constant(InPlace):
    def forward(self, x):
        return F.relu(self.conv(x)) * torch.arange(1.0, 3.0).sum()


class OwnCall(InPlace):
    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return F.relu(self.conv(x))


class Keywords(InPlace):
    def forward(self, *args, **kwargs):
        return F.relu(self.conv(args[0]))


REASONS = {
    Stores: "changes attributes",
    Appends: "changes attributes",
    Optional: "optional argument, scale=None",
    Branches: "control flow",
    Stops: "switches gradients",
    Casts: "switches gradients, autocast",
    Offloads: "checkpointing",
    Reverses: "autograd.Function",
    Random: "random numbers",
    ReadsChild: "flag of a child",
    AsksType: "type of an intermediate",
    Constant: "tensors of its own",
    OwnCall: "__call__ of its own",
    Keywords: "optional argument",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda m: m.__name__)
def test_what_keeps_its_own_forward(make):
    stock, x = make().double(), images() - 0.5
    state, attributes = torch.get_rng_state(), copy.copy(stock.__dict__)
    fused = fi.fuse(copy.deepcopy(stock))
    assert torch.equal(torch.get_rng_state(), state)
    assert fused.__dict__.keys() - {"fusion_report"} == attributes.keys()
    assert getattr(fused, "log", [1.0]) == [1.0]
    assert type(fused) is make
    assert type(fused.conv) is not nn.Conv2d
    (entry,) = [e for e in fused.fusion_report.left if e.name == ""]
    assert REASONS[make] in entry.reason
    assert entry.reason in str(fused.fusion_report)
    for mode in (True, False):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        fused.train(mode)(a).sum().backward()
        stock.train(mode)(b).sum().backward()
        assert_same([a.grad], [b.grad])


class ListOrTensor(nn.Module):
    """As the layers of a DenseNet."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.conv = nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        parts = [x] if isinstance(x, torch.Tensor) else x
        return self.conv(self.relu(self.bn(torch.cat(parts, 1))))


class TwoArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, skip):
        y = self.bn(x)
        if skip is not None:
            y = y + skip
        return torch.relu(y)


def test_arguments_of_several_kinds():
    stock, x = ListOrTensor().double(), images(2, channels=6)
    fused = fi.fuse(copy.deepcopy(stock))
    assert type(fused) is not ListOrTensor
    for argument in (x, [x[:, :2], x[:, 2:]], (x[:, :5], x[:, 5:])):
        assert_same([fused(argument)], [stock(argument)])
    stock, x = TwoArguments().double(), images()
    fused = fi.fuse(copy.deepcopy(stock))
    assert [e.what for e in fused.fusion_report.fused] == ["BatchNorm2d + add + relu"]
    for skip in (x, None, x[:1], x[:, :1].float()):
        assert_same([fused(x, skip)], [stock(x, skip=skip)])


class SameNormTwice(nn.Module):
    """Its running statistics depend on the order of the calls."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.bn(x)
        return F.relu(y + self.bn(x * 3))


def test_a_norm_does_not_wait_for_its_second_call():
    stock, x = SameNormTwice().double(), images()
    fused = fi.fuse(copy.deepcopy(stock))
    assert_same([fused(x), *fused.buffers()], [stock(x), *stock.buffers()])


# ---- dtypes, layouts, compile


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_autocast_and_layout(layout):
    stock = Net().to(memory_format=layout)
    fused = fi.fuse(copy.deepcopy(stock))
    x = images(dtype=torch.float32).contiguous(memory_format=layout)
    outputs = []
    for net in (stock, fused):
        kept = []
        handle = net.blocks[1].register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(net(x))
        handle.remove()
        outputs.append(kept)
    for a, b in zip(*outputs, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_residual_of_another_dtype_is_added_as_before():
    stock, x = TwoArguments(), images(dtype=torch.bfloat16)
    fused, skip = fi.fuse(copy.deepcopy(stock)), images(dtype=torch.float32)
    a, b = fused(x, skip), stock(x, skip)
    assert a.dtype == b.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_integers_take_torch():
    fused = fi.fuse(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    x = torch.arange(-8, 8).view(1, 1, 4, 4)
    assert torch.equal(fused(x), F.max_pool2d(F.relu(x).double(), 2).long())


@pytest.mark.slow
def test_torch_compile():
    stock = Net().eval()
    fused, x = fi.fuse(copy.deepcopy(stock)), images(dtype=torch.float32)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        fi.fuse(compiled)


# ---- this package's own uses


def test_folded_cam_and_regularizer_of_a_fused_network(batch):
    stock = fi.create_model("small", 1, 10)
    fused = fi.fuse(copy.deepcopy(stock))
    x, y = batch
    assert CamNetwork(fused, x).form.tails == ("conv2",)
    assert not fi._state.depends_on_mode(fused)
    losses = []
    for net in (stock, fused):
        torch.manual_seed(0)
        regularizer = fi.InterpretationRegularizer("cam", eps=0.1, steps=3, step_size=0.05)
        loss = regularizer(net, x, y)
        losses += [loss, *torch.autograd.grad(loss, list(net.parameters()))]
    n = len(losses) // 2
    torch.testing.assert_close(losses[n:], losses[:n], rtol=1e-4, atol=1e-5)


# ---- arguments and report


def test_bad_arguments_change_nothing():
    with pytest.raises(TypeError, match="must be an nn.Module, got int"):
        fi.fuse(3)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        fi.unfuse("net")
    with pytest.raises(TypeError, match="scripted"):
        fi.fuse(torch.jit.trace(nn.Conv2d(3, 3, 1), images(dtype=torch.float32)))
    inner = Net()
    with pytest.raises(ValueError, match="before wrapping"):
        fi.fuse(nn.DataParallel(inner))
    assert type(inner) is Net


def test_fusing_twice_and_unfusing_what_is_not_fused():
    net = Net()
    assert fi.unfuse(net) is net
    first = fi.fuse(net).fusion_report
    types = [type(m) for m in net.modules()]
    assert fi.fuse(net).fusion_report == first
    assert [type(m) for m in net.modules()] == types
    fi.fuse(nn.Sequential(net)).get_submodule("0")
    assert not hasattr(net, "fusion_report")


def test_report():
    net = fi.fuse(nn.Sequential(Net(), Branches(), nn.ReLU6()))
    report = net.fusion_report
    assert isinstance(report, FusionReport)
    assert len(report.fused) + len(report.left) == len(report.entries)
    text = str(report)
    assert "BatchNorm2d + add + ReLU" in text
    assert "0.blocks.0.bn2" in text
    assert "control flow" in text
    assert "there is no fused op" in text
    assert f"{len(report.fused)} fused" in text
