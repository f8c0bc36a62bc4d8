"""MobileFaceNet against a plain restatement."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backbones


def plain_convolution(state, key, x, stride=1, padding=0, groups=1):
    """Convolution, BatchNorm with running statistics, PReLU where the block has one."""
    key = f"{key}.layers"
    x = F.conv2d(x, state[f"{key}.0.weight"], None, stride, padding, 1, groups)
    mean, var, weight, bias = (
        state[f"{key}.1.{name}"].view(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = (x - mean) / torch.sqrt(var + 1e-5) * weight + bias
    return torch.where(x > 0, x, state[f"{key}.2.weight"].view(1, -1, 1, 1) * x) if f"{key}.2.weight" in state else x


def plain_depth_wise(state, key, x, groups, stride=1):
    x = plain_convolution(state, f"{key}.layers.0", x)
    x = plain_convolution(state, f"{key}.layers.1", x, stride, 1, groups)
    return plain_convolution(state, f"{key}.layers.2", x)


def plain_mobilefacenet(state, x, blocks):
    x = plain_convolution(state, "layers.0", x, 2, 1)
    for number, (depth, groups) in enumerate(zip(blocks, (128, 128, 256, 256))):
        stage = 2 * number + 1
        if stage == 1 and depth == 1:
            x = plain_convolution(state, "layers.1", x, 1, 1, 64)
        else:
            for block in range(depth):
                x = x + plain_depth_wise(state, f"layers.{stage}.layers.{block}", x, groups)
        if stage < 7:
            x = plain_depth_wise(state, f"layers.{stage + 1}", x, (128, 256, 512)[number], 2)
    assert x.shape[2:] == (7, 7)
    x = plain_convolution(state, "conv_sep", x)
    x = plain_convolution(state, "features.layers.0", x, groups=512).reshape(len(x), 512)
    x = x @ state["features.layers.2.weight"].T
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (state[f"features.layers.3.{name}"] for name in names)
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize("name, blocks", [("mbf", (1, 4, 6, 2)), ("mbf_large", (2, 8, 12, 4))])
def test_equals_the_plain_restatement(name, blocks):
    torch.manual_seed(0)
    model = backbones.get_model(name, 16).eval()
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1)
            nn.init.normal_(part.bias, 0, 0.3)
        if isinstance(part, nn.PReLU):
            nn.init.uniform_(part.weight, 0, 0.5)
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected = plain_mobilefacenet(model.state_dict(), images, blocks)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_weights_start_from_fan_out_normal():
    torch.manual_seed(0)
    model = backbones.get_model("mbf", 512)
    weight = model.conv_sep.layers[0].weight  # [512, 256, 1, 1]: fan-out 512
    assert abs(weight.std().item() - (2 / 512) ** 0.5) < 1e-3
    assert abs(model.features.layers[2].weight.std().item() - (2 / 512) ** 0.5) < 1e-3


def test_half_precision_ends_before_conv_sep(monkeypatch):
    monkeypatch.setattr(
        "backbones.mobilefacenet.half_precision", lambda x, enabled: torch.autocast("cpu", torch.bfloat16, enabled)
    )
    model = backbones.get_model("mbf", 4, fp16=True).eval()
    seen = {}
    for key, part in model.named_modules():
        part.register_forward_hook(lambda part, inputs, out, key=key: seen.update({key: (inputs[0].dtype, out.dtype)}))
    model(torch.randn(1, 3, 112, 112))
    assert seen["layers.7.layers.1.layers.2.layers.0"][1] == torch.bfloat16
    assert seen["conv_sep"] == seen["features"] == (torch.float32, torch.float32)
