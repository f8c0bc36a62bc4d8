"""IResNet and tiny against plain restatements; the precision split; activation checkpointing of r2060."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import backbones
from backbones.iresnet import IBasicBlock, IResNet
from backbones.iresnet2060 import IResNet2060


def randomise_norms(model):
    """Give BatchNorm and PReLU values that a forgotten or swapped layer would show."""
    for part in model.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                part.bias.normal_(0, 0.3)
                if part.weight.requires_grad:
                    part.weight.uniform_(0.5, 1.5)
        if isinstance(part, nn.PReLU):
            with torch.no_grad():
                part.weight.uniform_(0, 0.5)
    return model


def plain_norm(state, key, x, training):
    """BatchNorm written out (arXiv:1502.03167, algorithm 1), for [B, C, ...]."""
    others = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(others) if training else state[f"{key}.running_mean"]
    var = ((x - mean.view(shape)) ** 2).mean(others) if training else state[f"{key}.running_var"]
    x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5)
    return x * state[f"{key}.weight"].view(shape) + state[f"{key}.bias"].view(shape)


def plain_prelu(state, key, x):
    return torch.where(x > 0, x, state[f"{key}.weight"].view(1, -1, 1, 1) * x)


def plain_block(state, key, x, stride, training):
    out = plain_norm(state, f"{key}.bn1", x, training)
    out = F.conv2d(out, state[f"{key}.conv1.weight"], padding=1)
    out = plain_prelu(state, f"{key}.prelu", plain_norm(state, f"{key}.bn2", out, training))
    out = F.conv2d(out, state[f"{key}.conv2.weight"], stride=stride, padding=1)
    out = plain_norm(state, f"{key}.bn3", out, training)
    if stride == 2:
        x = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=2)
        x = plain_norm(state, f"{key}.downsample.1", x, training)
    return out + x


def plain_iresnet(state, images, depths, training):
    x = F.conv2d(images, state["conv1.weight"], padding=1)
    x = plain_prelu(state, "prelu", plain_norm(state, "bn1", x, training))
    for layer, depth in enumerate(depths, start=1):
        for number in range(depth):
            x = plain_block(state, f"layer{layer}.{number}", x, 2 if number == 0 else 1, training)
    x = plain_norm(state, "bn2", x, training).reshape(len(x), -1)
    x = x @ state["fc.weight"].T + state["fc.bias"]
    return plain_norm(state, "features", x, training)


@pytest.mark.parametrize("training", [False, True])
def test_r18_equals_the_plain_restatement(training):
    torch.manual_seed(0)
    model = randomise_norms(backbones.get_model("r18", 16)).train(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(4 if training else 2, 3, 112, 112)  # two images would normalise to ±1 whatever they are
    with torch.no_grad():
        expected = plain_iresnet(state, images, (2, 2, 2, 2), training)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=2e-3 if training else 1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_tiny_equals_the_plain_restatement(width):
    torch.manual_seed(0)
    model = randomise_norms(backbones.get_model("tiny" if width == 1 else "tiny_x2", 16)).eval()
    state, images = model.state_dict(), torch.randn(2, 3, 112, 112)
    x, sides = images, []
    for number in range(4):
        stride, padding = (4, 2) if number == 0 else (2, 1)
        x = F.conv2d(x, state[f"layers.{3 * number}.weight"], stride=stride, padding=padding)
        x = plain_prelu(state, f"layers.{3 * number + 2}", plain_norm(state, f"layers.{3 * number + 1}", x, False))
        sides.append((x.shape[1] // width, x.shape[2]))
    assert sides == [(16, 28), (32, 14), (64, 7), (128, 4)]
    x = x.reshape(2, -1) @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(images), plain_norm(state, "features", x, False), rtol=1e-4, atol=1e-4)


def test_convolutions_start_from_a_normal_of_a_tenth():
    torch.manual_seed(0)
    model = IResNet((1, 1, 1, 1), 4)
    for part in model.modules():
        if isinstance(part, nn.Conv2d) and part.weight.numel() > 10_000:
            assert abs(part.weight.std().item() - 0.1) < 0.003 and abs(part.weight.mean().item()) < 0.003


@pytest.mark.parametrize("name", ["iresnet", "tiny"])
def test_half_precision_ends_at_the_flatten(name, monkeypatch):
    """Autocast is only used on CUDA; bfloat16 on the CPU shows the same split."""
    monkeypatch.setattr(
        f"backbones.{name}.half_precision", lambda x, enabled: torch.autocast("cpu", torch.bfloat16, enabled)
    )
    model = IResNet((1, 1, 1, 1), 4, fp16=True) if name == "iresnet" else backbones.get_model("tiny", 4, fp16=True)
    seen = {}
    for key, part in model.named_modules():
        part.register_forward_hook(lambda part, inputs, out, key=key: seen.update({key: (inputs[0].dtype, out.dtype)}))
    model.eval()(torch.randn(1, 3, 112, 112))
    last_convolution = "layer4.0.conv2" if name == "iresnet" else "layers.9"
    assert seen[last_convolution][1] == torch.bfloat16
    assert seen["fc"] == seen["features"] == (torch.float32, torch.float32)


def test_checkpointing_changes_neither_gradients_nor_statistics():
    torch.manual_seed(0)
    depths = (1, 2, 10, 1)  # layer 3 makes one whole segment and a part of one
    plain = IResNet(depths, 4).train()
    saving = IResNet2060(4, depths=depths).train()
    saving.load_state_dict(plain.state_dict())
    calls = {}
    for key, part in saving.named_modules():
        if isinstance(part, IBasicBlock):
            part.register_forward_pre_hook(lambda *_, key=key: calls.update({key: calls.get(key, 0) + 1}))
    images = torch.randn(4, 3, 112, 112)
    for model in (plain, saving):
        model(images).pow(3).sum().backward()
    for (key, expected), parameter in zip(plain.named_parameters(), saving.parameters()):
        assert (expected.grad is None) == (parameter.grad is None), key
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=key)
    for (key, expected), buffer in zip(plain.named_buffers(), saving.buffers()):
        torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-6, msg=key)
    assert saving.layer3[0].bn1.momentum == 0.1 and saving.layer3[0].bn1.num_batches_tracked == 1
    assert calls["layer1.0"] == calls["layer4.0"] == 1
    assert calls["layer2.0"] == calls["layer3.0"] == calls["layer3.8"] == 2
    with torch.no_grad():
        torch.testing.assert_close(saving.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-4)
