import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastinterp.models import create_model, init_paper, load_weights
from fastinterp.models._layers import SameConv2d, same_padding


@pytest.mark.parametrize(
    ("name", "channels", "size", "parameters", "map_size"),
    [
        ("small", 1, 28, 166_396, 7),
        ("small", 3, 32, 166_908, 8),
        ("pool", 1, 28, 52_736, 7),
        ("wresnet", 3, 32, 463_008, 8),
    ],
)
def test_sizes(name, channels, size, parameters, map_size):
    net = create_model(name, channels, 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    x = torch.rand(2, channels, size, size)
    assert net.features(x).shape == (2, net.head.in_features, map_size, map_size)
    assert net(x).shape == (2, 10)
    torch.testing.assert_close(net(x), net.features(x).mean((2, 3)) @ net.head.weight.T)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        *[(28, 4, 2, (1, 1)), (7, 7, 1, (3, 3)), (28, 5, 1, (2, 2)), (32, 3, 1, (1, 1))],
        *[(32, 3, 2, (0, 1)), (7, 3, 2, (1, 1)), (7, 4, 2, (1, 2)), (4, 1, 2, (0, 0))],
    ],
)
def test_same_padding(size, kernel, stride, expected):
    assert same_padding(size, kernel, stride) == expected
    out = SameConv2d(1, 1, kernel, stride)(torch.rand(1, 1, size, size))
    assert out.shape[2] == -(-size // stride)


def test_paper_init_follows_the_released_order():
    net = create_model("small", 1, 10)
    init_paper(net, np.random.RandomState(99))
    rng = np.random.RandomState(99)
    first = rng.normal(scale=1 / 4, size=(16, 16))
    second = rng.normal(scale=1 / 16, size=(32, 256))
    # HWIO entry (row, column, input, output) of a (c_out, k k c_in) draw, transposed and reshaped.
    assert net.conv0.weight[3, 0, 1, 2].item() == np.float32(first[3, 1 * 4 + 2])
    assert net.conv1.weight[5, 7, 2, 3].item() == np.float32(second[5, (2 * 4 + 3) * 16 + 7])
    assert not net.conv2.bias.any()


def test_released_networks_load_strictly(released):
    for path in sorted(released.glob("*.npz")):
        dataset, model = path.name.split("_")[:2]
        name = {"smallgap": "small", "wresnet": "wresnet"}[model]
        net = create_model(name, 1 if dataset == "mnist" else 3, 10)
        load_weights(net, path)
        with np.load(path) as arrays:
            assert arrays.files == list(net.state_dict())
            assert np.array_equal(arrays["head.weight"], net.head.weight.detach().numpy())


def test_bad_weight_files(tmp_path):
    net = create_model("small", 1, 10)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    good = tmp_path / "good.safetensors"
    save_file(net.state_dict(), good)

    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent.npz"):
        load_weights(net, tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="unknown model 'resnet'; use one of small, pool, wresnet"):
        create_model("resnet", 1, 10)
    for other, match in (
        (create_model("pool", 1, 10), "another network than Small .*missing conv2.bias"),
        (
            create_model("small", 3, 10),
            r"conv0.weight is \(16, 3, 4, 4\), expected \(16, 1, 4, 4\)",
        ),
        (create_model("wresnet", 1, 10), "another network than Small .*unexpected conv10.bias"),
    ):
        path = tmp_path / "other.safetensors"
        save_file(other.state_dict(), path)
        with pytest.raises(ValueError, match=match):
            load_weights(net, path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut.safetensors is damaged"):
        load_weights(net, cut)
    whole = tmp_path / "whole.npz"
    np.savez(whole, **{name: t.numpy() for name, t in net.state_dict().items()})
    for keep in (0, 10, 5000, -30):
        broken = tmp_path / "broken.npz"
        broken.write_bytes(whole.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"broken.npz is damaged"):
            load_weights(net, broken)
    with pytest.raises(ValueError, match="neither an .npz nor a .safetensors"):
        load_weights(net, __file__)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
