"""Unforeseen attacks: every distortion against scipy, PIL or plain loops, and what they do."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, ndimage, optimize, signal
from torch import nn
from torch.nn import functional as F

from fastinterp.attacks import CALIBRATED, uar, unforeseen
from fastinterp.attacks.distortions import DISTORTIONS
from fastinterp.attacks.distortions.fog import diamond_square
from fastinterp.attacks.distortions.gabor import gabor_kernels
from fastinterp.attacks.distortions.jpeg import BOX, CHROMINANCE, LUMINANCE, steepest_corner
from fastinterp.attacks.distortions.snow import OFFSETS, motion_streaks, within_budget
from fastinterp.data import load_dataset

KINDS = tuple(CALIBRATED)
SIZE = {"jpeg_linf": 0.5, "jpeg_l2": 4, "jpeg_l1": 64, "elastic": 1, "fog": 128} | {
    "snow": 1,
    "gabor": 25,
}


@pytest.fixture(scope="module")
def digits():
    """A network after a second of training, and images that it has not seen."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    net = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(576, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(4):
        for index in torch.randperm(len(data.train)).split(50):
            x, y = data.train.batch(index)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    x, y = data.test.batch(slice(0, 40))
    assert correct(net, x, y) >= 36
    return net, x, y


@torch.no_grad()
def correct(net, x, y):
    return (net(x).argmax(1) == y).sum().item()


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def pictures(channels=3, height=24, width=19, examples=2):
    """Smooth images away from 0 and 1, in float64."""
    coarse = torch.rand(examples, channels, 4, 4, dtype=torch.float64)
    size = (height, width)
    return 0.3 + 0.4 * F.interpolate(coarse, size=size, mode="bicubic", align_corners=True).clamp(
        0, 1
    )


def distort(kind, x, eps, seed=3):
    return DISTORTIONS[kind](x, eps, seeded(seed))


# What every kind has in common.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size_stay_images(kind, channels):
    x = pictures(channels).float()
    found = distort(kind, x, SIZE[kind])
    z = found.start.clone().requires_grad_()
    moved = found.render(z, slice(None))
    assert moved.shape == x.shape and moved.min() >= 0 and moved.max() <= 1
    (gradient,) = torch.autograd.grad(moved.square().sum(), z)
    assert gradient.isfinite().all() and (gradient != 0).any()
    # one image of the batch, alone
    rows = torch.tensor([1])
    torch.testing.assert_close(found.render(z[rows], rows), moved[rows])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gabor"])
@pytest.mark.parametrize("channels", [1, 3])
def test_derivatives(kind, channels):
    x = pictures(channels, 9, 8, 1)
    found = distort(kind, x, 0.3 * SIZE[kind] if kind != "snow" else 0.05)
    z = found.start.clamp(0.05, 0.95) if kind in ("fog", "snow") else found.start
    z = z.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: found.render(z, slice(None)), z, fast_mode=True, rtol=1e-3
    )


def test_derivative_of_gabor_noise_takes_the_scales_as_constants():
    x = pictures(1, 9, 8, 1)
    found = distort("gabor", x, 20)
    z = found.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(found.render(z, slice(None)).sum(), z)
    kernels = gabor_kernels(x, seeded())
    g = F.conv2d(z.detach(), kernels, padding=11)
    height = (g - g.mean()).abs()
    gain = 1.001 / (0.001 + height / height.max())
    even = g.mean() + (g - g.mean()) * gain
    weight = gain / (even.max() - even.min()) * 20 / 255
    expected = F.conv2d(weight, kernels.flip(2, 3), padding=11) * (found.start != 0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_size_images_are_what_the_docstring_says(channels):
    x = pictures(channels)
    nothing = {kind: distort(kind, x, 0.0) for kind in KINDS}
    shown = {kind: found.render(found.start, slice(None)) for kind, found in nothing.items()}
    for kind in ("elastic", "gabor"):
        torch.testing.assert_close(shown[kind], x)
    for kind in ("jpeg_linf", "jpeg_l2", "jpeg_l1"):
        torch.testing.assert_close(shown[kind], x, rtol=0, atol=1e-9 if channels == 1 else 0.05)
    torch.testing.assert_close(shown["fog"], x / x.amax((2, 3), keepdim=True))
    grey = x.mean(1, keepdim=True)
    if channels == 3:
        grey = torch.einsum("nchw,c->nhw", x, torch.tensor([0.2126, 0.7152, 0.0722]).to(x))[:, None]
    paled = 0.75 * x + 0.25 * torch.maximum(x, 1.5 * grey + 0.5)
    torch.testing.assert_close(shown["snow"], paled)


@pytest.mark.parametrize("kind", KINDS)
def test_variables_stay_in_their_ball(kind, digits, monkeypatch):
    net, x, y = digits
    x, y, eps = x[:8], y[:8], SIZE[kind]
    seen = []
    build = DISTORTIONS[kind]

    def watched(*how):
        found = build(*how)

        def render(z, rows):
            seen.append(z.detach().clone())
            return found.render(z, rows)

        return found._replace(render=render)

    monkeypatch.setitem(DISTORTIONS, kind, watched)
    # steps far too large, so that only the projection keeps them in
    unforeseen(net, x, y, kind, eps=eps, steps=6, step_size=eps, generator=seeded())
    assert len(seen) == 8 and any((z != seen[0]).any() for z in seen[1:])
    for z in (z.flatten(1) for z in seen):
        if kind in ("jpeg_linf", "elastic"):
            assert z.abs().max() <= eps * (1 + 1e-6)
        elif kind in ("jpeg_l2", "jpeg_l1"):
            assert z.norm(2 if kind == "jpeg_l2" else 1, dim=1).max() <= eps * (1 + 1e-5)
            assert z.abs().max() <= 2
        elif kind == "gabor":
            assert z.abs().max() <= 1 and (z[seen[0].flatten(1) == 0] == 0).all()
        else:
            assert z.min() >= 0 and z.max() <= 1
        if kind == "snow":
            assert z.view(8, 7, -1).mean(2).max() <= 0.2 + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_larger_sizes_change_more(kind):
    x = pictures(3, 32, 32)
    for calibration in CALIBRATED[kind].values():
        spent = [distort(kind, x, eps) for eps in calibration.eps]
        if kind in ("jpeg_linf", "jpeg_l2", "elastic"):
            norm = 2 if kind == "jpeg_l2" else torch.inf
            sizes = [found.start.flatten(1).norm(norm, dim=1).mean() for found in spent]
            assert all(a < b for a, b in pairwise(sizes))
        shown = [found.render(found.start, slice(None)) for found in spent]
        assert all(
            (a - shown[0]).abs().mean() <= (b - shown[0]).abs().mean() + 1e-3
            for a, b in pairwise(shown)
        )


# The distortions one by one.


def blocks(plane):
    high, wide = plane.shape
    return plane.reshape(high // 8, 8, wide // 8, 8).transpose(0, 2, 1, 3)


def through_jpeg(image, moved):
    """(C, H, W) in [0,1] -> the same, coefficients moved by halves of a step; step by step."""
    channels, height, width = image.shape
    side = 8 if channels == 1 else 16
    pad = [(0, -n % side) for n in (height, width)]
    planes = [np.pad(255 * plane, pad, mode="edge") for plane in image]
    if channels == 3:
        r, g, b = planes
        planes = [
            0.299 * r + 0.587 * g + 0.114 * b,
            -0.168736 * r - 0.331264 * g + 0.5 * b + 128,
            0.5 * r - 0.418688 * g - 0.081312 * b + 128,
        ]
        planes[1:] = [
            (p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) / 4 for p in planes[1:]
        ]
    decoded = []
    for plane, table in zip(planes, (LUMINANCE, *[CHROMINANCE] * 2), strict=False):
        table = np.reshape(table, (8, 8))
        q = fft.dctn(blocks(plane - 128), axes=(2, 3), norm="ortho") / table
        q = q + moved[: q.size].reshape(q.shape) / 2
        moved = moved[q.size :]
        back = fft.idctn(q * table, axes=(2, 3), norm="ortho") + 128
        decoded.append(back.transpose(0, 2, 1, 3).reshape(plane.shape))
    assert moved.size == 0
    if channels == 3:
        y, cb, cr = decoded[0], *(p.repeat(2, 0).repeat(2, 1) - 128 for p in decoded[1:])
        decoded = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    return np.clip(np.stack(decoded)[:, :height, :width] / 255, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_against_scipys_dct(channels):
    x = pictures(channels)
    found = distort("jpeg_linf", x, 3.0)
    shown = found.render(found.start, slice(None))
    for image, z, ours in zip(x, found.start, shown, strict=True):
        expected = through_jpeg(image.numpy(), z.numpy())
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_jpeg_files_of_quality_50_lie_within_eps_1():
    x = pictures(1, 32, 24)
    found = distort("jpeg_linf", x, 1.0)
    table = np.reshape(LUMINANCE, (8, 8))
    for i, image in enumerate(x):
        pixels = (255 * image[0].numpy()).round()
        q = fft.dctn(blocks(pixels - 128), axes=(2, 3), norm="ortho") / table
        z = 2 * (q.round() - q)
        assert np.abs(z).max() <= 1
        z = torch.from_numpy(z.reshape(1, -1))
        exact = distort("jpeg_linf", torch.from_numpy(pixels)[None, None] / 255, 1.0)
        assert z.shape == found.start[:1].shape
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=50)
        decoded = np.array(Image.open(file)).astype(float)
        ours = 255 * exact.render(z, slice(None))[0, 0].numpy()
        assert np.abs(ours - decoded).max() <= 2, i  # libjpeg computes in whole numbers


@pytest.mark.parametrize("eps", [0.5, 2.0, 7.0, 100.0])
def test_steps_of_frank_and_wolfe_go_to_the_best_corner(eps):
    grad = torch.randn(3, 9, dtype=torch.float64)
    corner = steepest_corner(grad, eps)
    for g, v in zip(grad.numpy(), corner.numpy(), strict=True):
        # z = p - n with p, n >= 0
        best = optimize.linprog(
            np.concatenate([-g, g]), A_ub=np.ones((1, 18)), b_ub=[eps], bounds=(0, BOX)
        )
        assert g @ v == pytest.approx(-best.fun)
        assert np.abs(v).sum() <= eps + 1e-12 and np.abs(v).max() <= BOX


def test_starts_in_the_l1_ball_are_uniform_there():
    found = distort("jpeg_l1", torch.rand(4000, 1, 8, 8), 1.0)
    norms = found.start.abs().sum(1)
    # the share of the ball of 64 dimensions within radius r is r^64
    assert norms.max() <= 1
    assert norms.pow(64).mean().item() == pytest.approx(0.5, abs=0.02)
    assert found.start.mean().abs() < 1e-3


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_elastic_against_scipy(size):
    x = pictures(3, *size)
    found = distort("elastic", x, 3.0)
    shown = found.render(found.start, slice(None))
    std = 3 / 224 * max(size)
    there = np.meshgrid(*map(np.arange, size), indexing="ij")
    for image, z, ours in zip(x.numpy(), found.start.numpy(), shown.numpy(), strict=True):
        column, row = (
            ndimage.gaussian_filter(flow, std, mode="mirror", radius=int(np.ceil(4 * std)))
            for flow in z
        )
        # the sample points of torch span one pixel less than the image
        at = [there[0] + row * (size[0] - 1) / size[0], there[1] + column * (size[1] - 1) / size[1]]
        for channel, mine in zip(image, ours, strict=True):
            expected = ndimage.map_coordinates(channel, at, order=1, mode="grid-constant")
            np.testing.assert_allclose(mine, expected, atol=1e-9)


def test_elastic_kernel_is_the_published_one():
    """5 and 25 wide for CIFAR-10 and ImageNet, with deviations 3/7 and 3."""
    for side, width, std in ((32, 5, 3 / 7), (224, 25, 3.0)):
        x = torch.arange(side, dtype=torch.float64).expand(1, 1, side, side) / side
        found = distort("elastic", x, 1.0)
        z = torch.zeros(1, 2, side, side, dtype=torch.float64)
        z[0, 0, side // 2, side // 2] = 1.0
        moved = (found.render(z, slice(None)) - x)[0, 0]
        assert int((moved[side // 2].abs() > 1e-12).sum()) == width
        ratio = (moved[side // 2, side // 2] / moved[side // 2, side // 2 + 1]).log().item()
        assert ratio == pytest.approx(1 / (2 * std**2), rel=1e-6)


def test_fog_against_diamonds_and_squares_one_by_one():
    x = pictures(1, 12, 7)
    found = distort("fog", x, 100.0)
    numbers = [n.numpy() for n in found.start[0].split([4**i for i in range(4) for _ in range(3)])]
    side, wibble = 16, 100.0
    map_ = np.zeros((side, side))
    for level in range(4):
        step = side >> level
        half = step // 2
        amid, along, down = (
            (2 * numbers[3 * level + k].reshape(2**level, 2**level) - 1) * wibble for k in range(3)
        )
        for i in range(0, side, step):
            for j in range(0, side, step):
                corners = [
                    map_[(i + a) % side, (j + b) % side] for a in (0, step) for b in (0, step)
                ]
                map_[i + half, j + half] = sum(corners) / 4 + amid[i // step, j // step]
        for i in range(0, side, step):
            for j in range(0, side, step):
                around = [(i, j), (i, j + step), (i + half, j + half), (i - half, j + half)]
                mean = sum(map_[a % side, b % side] for a, b in around) / 4
                map_[i, j + half] = mean + along[i // step, j // step]
                around = [(i, j), (i + step, j), (i + half, j + half), (i + half, j - half)]
                mean = sum(map_[a % side, b % side] for a, b in around) / 4
                map_[i + half, j] = mean + down[i // step, j // step]
        wibble /= 2
    ours = diamond_square(found.start.split([4**i for i in range(4) for _ in range(3)], 1))
    np.testing.assert_allclose(ours[0].numpy(), map_)
    shown = found.render(found.start, slice(None))[0, 0].numpy()
    cloud = ((map_ - map_.min()) / (map_.max() - map_.min()))[2:14, 4:11]
    top = x[0].max().item() + 100 / 255
    np.testing.assert_allclose(shown, (x[0, 0].numpy() + 100 / 255 * cloud) / top)


@pytest.mark.parametrize("size", [(16, 20), (14, 17)])
def test_snow_is_flakes_correlated_with_streaks(size):
    x = pictures(1, *size)
    found = distort("snow", x, 0.3)
    streaks = motion_streaks(x, seeded())
    shown = found.render(found.start, slice(None))
    paled = 0.75 * x + 0.25 * torch.maximum(x, 1.5 * x + 0.5)
    high, wide = (4 * -(-n // 4) for n in size)
    for i in range(len(x)):
        fallen = np.zeros((high, wide))
        for j, (row, column) in enumerate(OFFSETS):
            flakes = np.zeros((high, wide))
            flakes[row::4, column::4] = found.start[i, j].numpy() ** 4
            fallen += signal.correlate2d(flakes, streaks[i, j].numpy(), mode="same")
        expected = paled[i, 0].numpy() + 0.3 * fallen[: size[0], : size[1]]
        np.testing.assert_allclose(shown[i, 0].numpy(), expected.clip(0, 1), atol=1e-9)


def test_streaks_are_lines_through_the_middle():
    streaks = motion_streaks(torch.rand(200, 1, 8, 8), seeded())
    torch.testing.assert_close(streaks, streaks.flip(2, 3))
    assert streaks.min() >= 0 and streaks.max() <= 1 + 1e-6
    assert (streaks[:, :, 6, 6] > 0.5).all()
    place = torch.arange(-6.0, 7.0)
    slopes = (streaks * place[:, None] * place).sum((2, 3)).sign()
    assert (slopes != 0).all() and (slopes == slopes[:, :1]).all()
    assert 60 < (slopes[:, 0] > 0).sum() < 140  # up and down alike often


def test_budgets_hold_in_every_region():
    z = torch.rand(2, 7, 11, 16, dtype=torch.float64)
    z[0, 0, :8, :8] = 0.01
    kept = within_budget(z)
    for rows in (slice(0, 8), slice(8, 11)):
        for columns in (slice(0, 8), slice(8, 16)):
            before, after = (v[..., rows, columns] for v in (z, kept))
            mean = before.mean((2, 3), keepdim=True)
            expected = before * (0.2 / mean).clamp(max=1)
            torch.testing.assert_close(after, expected)


def test_gabor_noise_against_numpy_and_scipy():
    x = pictures(3)
    found = distort("gabor", x, 30.0)
    kernels = gabor_kernels(x, seeded())
    shown = found.render(found.start, slice(None))
    for i in range(len(x)):
        g = signal.correlate2d(found.start[i, 0], kernels[i, 0], mode="same")
        varied = np.abs(g - g.mean())
        g = g.mean() + (g - g.mean()) * 1.001 / (0.001 + varied / varied.max())
        noise = (g - g.min()) / (g.max() - g.min())
        expected = (x[i].numpy() + 30 / 255 * noise).clip(0, 1)
        np.testing.assert_allclose(shown[i].numpy(), expected, atol=1e-9)
    count = (found.start != 0).sum((1, 2, 3))
    assert (count == round(24 * 19 / 14)).all()


def test_gabor_kernels_are_waves_at_even_angles():
    """A kernel of s sides looks the same when it is turned by 180 / s degrees."""
    kernels = gabor_kernels(torch.rand(60, 1, 8, 8, dtype=torch.float64), seeded())[:, 0]
    torch.testing.assert_close(kernels, kernels.flip(1, 2))  # by 180 degrees
    middle = kernels[:, 11, 11]  # the number of sides, as every wave is 1 there
    assert set(middle.round().int().tolist()) <= set(range(1, 11))
    assert torch.allclose(middle, middle.round()) and len(middle.round().unique()) >= 8
    even = kernels[(middle.round() % 2) == 0]
    torch.testing.assert_close(even, even.rot90(1, (1, 2)))


# The attack.


@pytest.mark.parametrize("kind", KINDS)
def test_it_lowers_the_accuracy(kind, digits):
    net, x, y = digits
    eps = {"jpeg_linf": 1.5, "jpeg_l2": 20, "jpeg_l1": 400, "elastic": 3, "fog": 512} | {
        "snow": 2,
        "gabor": 200,
    }
    left = {}
    for how, target in (("random", "random"), ("untargeted", None)):
        x_adv = unforeseen(
            net, x, y, kind, eps=eps[kind], steps=15, target=target, generator=seeded()
        )
        assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1
        left[how] = correct(net, x_adv, y)
    start = distort(kind, x, eps[kind])
    noise = correct(net, start.render(start.start, slice(None)), y)
    assert left["untargeted"] < min(noise, correct(net, x, y) - 5), (left, noise)
    assert left["random"] <= correct(net, x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_images(kind, digits):
    net, x, y = digits
    how = dict(eps=SIZE[kind], steps=2)
    first, again, other = (
        unforeseen(net, x[:5], y[:5], kind, **how, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_given_targets_are_reached(digits):
    net, x, y = digits
    target = (y + 1) % 10
    with torch.no_grad():
        before = net(x).log_softmax(1).gather(1, target[:, None])
        x_adv = unforeseen(
            net, x, y, "jpeg_linf", eps=1.5, steps=15, target=target, generator=seeded()
        )
        after = net(x_adv).log_softmax(1).gather(1, target[:, None])
    assert (after > before).double().mean() > 0.9


def test_best_and_early_stop(digits):
    net, x, y = digits
    how = dict(eps=3, steps=8, step_size=1.5, target=None)
    best, last, stopped = (
        unforeseen(net, x, y, "elastic", **how, **options, generator=seeded())
        for options in ({}, dict(best=False), dict(best=False, early_stop=True))
    )
    with torch.no_grad():
        turned = [net(z).argmax(1) != y for z in (best, last, stopped)]
    assert (turned[0] >= turned[1]).all() and torch.equal(turned[0], turned[2])
    held = ~turned[2]
    torch.testing.assert_close(stopped[held], last[held])


def test_calibrations_and_the_score():
    for kind, datasets in CALIBRATED.items():
        assert kind in DISTORTIONS
        for eps, accuracies in datasets.values():
            assert len(eps) == len(accuracies) == 6 and list(eps) == sorted(eps)
            assert all(a >= b for a, b in pairwise(accuracies))
            assert uar(accuracies, accuracies) == 1
    assert set(DISTORTIONS) == set(CALIBRATED)
    # UAR of a network that only survives the smallest size
    trained = CALIBRATED["elastic"]["cifar10"].accuracies
    assert uar([0.5, 0, 0, 0, 0, 0], trained) == pytest.approx(0.5 / 3.722, rel=1e-3)
    with pytest.raises(ValueError, match="got 2 for 6"):
        uar([1.0, 1.0], trained)


def test_bad_arguments(digits):
    net, x, y = digits
    for how, message in (
        (dict(kind="rain"), "kind must be one of jpeg_linf, jpeg_l2, jpeg_l1, elastic"),
        (dict(eps=-1.0), "eps must be a finite number >= 0, got -1.0"),
        (dict(steps=0), "steps must be at least 1, got 0"),
        (dict(step_size=0.0), "step_size must be a finite number > 0, got 0.0"),
        (dict(target="next"), "target must be a tensor, \"random\" or None, got 'next'"),
        (dict(target=y[:3]), r"target must have shape \(40,\), got \(3,\)"),
        (dict(loss="mse"), "loss must be one of ce, margin, dlr, got 'mse'"),
    ):
        arguments = dict(kind="elastic", eps=1.0, steps=1) | how
        with pytest.raises(ValueError, match=message):
            unforeseen(net, x, y, **arguments)
    for kind in ("jpeg_l2", "snow"):
        with pytest.raises(ValueError, match="needs grey or RGB images, got 2 channels"):
            DISTORTIONS[kind](torch.rand(1, 2, 8, 8), 1.0, None)
    with pytest.raises(ValueError, match="at least 2x2 pixels, got 8x1"):
        DISTORTIONS["elastic"](torch.rand(1, 1, 1, 8), 1.0, None)
    assert unforeseen(net, x[:0], y[:0], "fog", eps=1.0).shape == (0, 1, 28, 28)
