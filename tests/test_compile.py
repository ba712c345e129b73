"""compile_step: one graph from the images to the parameters' gradients, equal to the eager step."""

import copy

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._dynamo import config
from torch.nn import functional as F

import fastinterp

SWITCH = "trace_autograd_ops"
needs_switch = pytest.mark.skipif(
    not hasattr(config, SWITCH), reason=f"this torch has no torch._dynamo.config.{SWITCH}"
)
traces_leaves = pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 does not trace requires_grad_()"
)
X, Y = torch.rand(4, 3, 11, 12), torch.randint(0, 5, (4,))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture
def net():
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).double()


def make_step(net):
    parameters = list(net.parameters())

    def step(x, y):
        x = x if x.requires_grad else x.detach().requires_grad_()
        logits = net(x)
        true = logits.gather(1, y[:, None]).sum()
        (saliency,) = torch.autograd.grad(true, x, create_graph=True)
        loss = F.cross_entropy(logits, y) + 0.1 * saliency.abs().sum((1, 2, 3)).mean()
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    return step


def assert_same_step(net, layout, leaf=False, **compile_kwargs):
    """Two steps of a fused, compiled copy against those of ``net`` as it is, in float64."""
    fused = fastinterp.fuse(copy.deepcopy(net)).to(memory_format=layout)
    eager, compiled = make_step(net), fastinterp.compile_step(make_step(fused), **compile_kwargs)
    for x in (X, X.flip(0)):
        x = x.double()
        given = x.to(memory_format=layout).requires_grad_(leaf)
        for one, exact in zip(compiled(given, Y), eager(x, Y), strict=True):
            torch.testing.assert_close(one, exact, rtol=1e-10, atol=1e-12)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


@needs_switch
@pytest.mark.parametrize("leaf", [True, pytest.param(False, marks=traces_leaves)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_step_in_one_graph(net, backend, layout, leaf):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    assert_same_step(net, layout, leaf, backend=counting)
    assert len(graphs) == 1


@needs_switch
@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_fused_step_through_inductor(net, layout):
    # A cached kernel would hide what a changed fake kernel does to the strides it is compiled for.
    with torch._inductor.config.patch(force_disable_caches=True):
        assert_same_step(net, layout)


@needs_switch
def test_the_switch_is_left_as_it_was(net):
    before = getattr(config, SWITCH)
    seen = []

    def backend(graph, inputs):
        seen.append(getattr(config, SWITCH))
        return graph.forward

    fastinterp.compile_step(lambda x: x * 2, backend=backend)(X)
    assert seen == [True]
    assert getattr(config, SWITCH) == before


@needs_switch
def test_what_cannot_be_traced_names_the_alternatives():
    def step(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(RuntimeError, match=r"step cannot be compiled.*fastinterp\.fuse.*make_fx"):
        fastinterp.compile_step(step, backend="eager")(X)


@needs_switch
def test_the_message_says_what_could_not_be_traced():
    def step(x):
        raise ValueError("too few images")

    with pytest.raises(RuntimeError, match="too few images"):
        fastinterp.compile_step(step, backend="eager")(X)


def test_a_torch_without_the_switch_is_told(monkeypatch):
    if hasattr(config, SWITCH):
        monkeypatch.setattr("fastinterp.compile._SWITCH", "no_such_switch")
    with pytest.raises(RuntimeError, match=r"torch [\d.]+.*make_fx.*upgrade torch"):
        fastinterp.compile_step(lambda x: x)
