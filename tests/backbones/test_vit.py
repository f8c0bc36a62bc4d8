"""Vision transformers against plain restatements; masking, stochastic depth, precision, activation checkpointing."""

import math

import pytest
import torch
from torch.nn import functional as F

import backbones
from backbones.vit import StochasticDepth, VisionTransformer, keep_random_tokens, put_back


def small(drop_path=0.0, mask_ratio=0.0, checkpointing=False, depth=2, **options):
    torch.manual_seed(0)
    model = VisionTransformer(16, depth, drop_path, mask_ratio, checkpointing, num_features=6, **options)
    for key, parameter in model.named_parameters():  # norms and biases start at 1 and 0, which would hide mistakes
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if key.endswith("weight") else 0.0, 0.3)
        elif "attn" in key:
            torch.nn.init.normal_(parameter, 0, 0.3)
        elif "fc1" in key:
            torch.nn.init.normal_(parameter, 0, 2)  # far into both ends of ReLU6
    for norm in (model.feature[1], model.feature[3]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return model


def plain_attention(state, key, x, heads=8):
    """One image, one head, one query at a time: [B, N, dim]."""
    batch, tokens, dim = x.shape
    width = dim // heads
    query, key_, value = (x @ part.T for part in state[f"{key}.qkv.weight"].split(dim))
    out = torch.zeros_like(x)
    for b in range(batch):
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            for n in range(tokens):
                scores = key_[b, :, columns] @ query[b, n, columns] / math.sqrt(width)
                weights = torch.exp(scores - scores.max())
                out[b, n, columns] = (weights / weights.sum()) @ value[b, :, columns]
    return out @ state[f"{key}.proj.weight"].T + state[f"{key}.proj.bias"]


def plain_layer_norm(state, key, x):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * state[f"{key}.weight"] + state[f"{key}.bias"]


def plain_batch_norm(state, key, x):
    x = (x - state[f"{key}.running_mean"]) / torch.sqrt(state[f"{key}.running_var"] + 2e-5)
    return x * state[f"{key}.weight"] + state[f"{key}.bias"]


def plain_vit(state, images, depth):
    weight = state["patch_embed.proj.weight"]
    patches = [
        torch.einsum("dchw,bchw->bd", weight, images[:, :, 9 * row : 9 * row + 9, 9 * column : 9 * column + 9])
        for row in range(12)
        for column in range(12)
    ]
    x = torch.stack(patches, 1) + state["patch_embed.proj.bias"] + state["pos_embed"]
    for number in range(depth):
        key = f"blocks.{number}"
        x = x + plain_attention(state, f"{key}.attn", plain_layer_norm(state, f"{key}.norm1", x))
        hidden = plain_layer_norm(state, f"{key}.norm2", x) @ state[f"{key}.mlp.fc1.weight"].T
        hidden = (hidden + state[f"{key}.mlp.fc1.bias"]).clamp(0, 6)
        x = x + hidden @ state[f"{key}.mlp.fc2.weight"].T + state[f"{key}.mlp.fc2.bias"]
    x = plain_layer_norm(state, "norm", x).reshape(len(x), -1)
    x = plain_batch_norm(state, "feature.1", x @ state["feature.0.weight"].T)
    return plain_batch_norm(state, "feature.3", x @ state["feature.2.weight"].T)


def test_equals_the_plain_restatement():
    model = small(drop_path=0.5, mask_ratio=0.5).eval()  # neither acts in evaluation
    images = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain_vit(model.state_dict(), images, 2), rtol=1e-4, atol=1e-4)


def test_put_back_restores_the_order_of_tokens():
    torch.manual_seed(0)
    tokens, filler = torch.randn(40, 12, 3), torch.full((1, 1, 3), 7.0, requires_grad=True)
    kept, places = keep_random_tokens(tokens, 8)
    assert kept.shape == (40, 8, 3)
    full = put_back(kept, places, 12, filler)
    drawn = torch.zeros(40, 12, dtype=torch.bool)
    for image in range(40):
        assert len(set(places[image].tolist())) == 8
        drawn[image, places[image]] = True
    assert torch.equal(full[drawn], tokens[drawn]) and torch.all(full[~drawn] == 7)
    assert len({tuple(row.tolist()) for row in drawn}) > 30, "each image has its own draw"
    assert drawn.float().mean(0).min() > 0.35, "each place has its turn"
    full.sum().backward()
    assert torch.equal(filler.grad, torch.full((1, 1, 3), 4.0 * 40))


def test_masking_in_training_fills_after_the_norm():
    model = small(mask_ratio=0.1, depth=0).train()  # without blocks a kept token is its own embedding, normed
    images = torch.randn(3, 3, 112, 112)
    tokens = model.encode(images)
    whole = model.eval().encode(images)
    same = torch.isclose(tokens, whole, atol=1e-6).all(-1)
    masked = torch.isclose(tokens, model.mask_token, atol=1e-6).all(-1)
    assert torch.all(same ^ masked)
    assert same.sum(1).tolist() == [129, 129, 129]


def test_masked_tokens_never_reach_the_blocks():
    model = small(mask_ratio=0.1).train()
    seen = []
    model.blocks[1].register_forward_hook(lambda part, inputs, out: seen.append(inputs[0].shape))
    assert model(torch.randn(2, 3, 112, 112)).shape == (2, 6)
    assert seen == [(2, 129, 16)]


@pytest.mark.parametrize("ratio, kept", [(0.0, 144), (0.05, 136), (0.1, 129), (1 / 9, 128), (0.75, 36)])
def test_number_of_kept_tokens(ratio, kept):
    assert small(mask_ratio=ratio, depth=0).kept_tokens == kept


def test_without_masking_training_draws_nothing():
    model = small().train()
    images = torch.randn(2, 3, 112, 112)
    state = torch.get_rng_state()
    tokens = model.encode(images)
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn"
    torch.testing.assert_close(tokens, model.eval().encode(images))
    assert not model.mask_token.requires_grad, "an unused parameter would stop distributed training"


def test_settings_of_the_names():
    settings = {
        "vit_t": (12, 0.1, 129, False),
        "vit_t_dp005_mask0": (12, 0.05, 144, False),
        "vit_s": (12, 0.1, 129, False),
        "vit_s_dp005_mask_0": (12, 0.05, 144, False),
        "vit_b": (24, 0.1, 129, True),
        "vit_b_dp005_mask_005": (24, 0.05, 136, True),
        "vit_l_dp005_mask_005": (24, 0.05, 136, True),
    }
    for name, (depth, rate, kept, checkpointing) in settings.items():
        with torch.device("meta"):
            model = backbones.get_model(name)
        rates = [block.drop_path.rate for block in model.blocks]
        assert rates == pytest.approx([rate * i / (depth - 1) for i in range(depth)]), name
        assert (model.kept_tokens, model.checkpointing) == (kept, checkpointing), name
        assert {block.attn.heads for block in model.blocks} == {8}, name


def test_stochastic_depth_drops_whole_images():
    torch.manual_seed(0)
    layer = StochasticDepth(0.25)
    x = torch.rand(4000, 3, 2) + 1
    out = layer.train()(x)
    dropped = (out == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    assert abs(dropped[:, 0].float().mean().item() - 0.25) < 0.03
    torch.testing.assert_close(out[~dropped[:, 0]], x[~dropped[:, 0]] / 0.75)
    assert layer.eval()(x) is x
    with pytest.raises(ValueError, match="stochastic depth rate 1.0"):
        StochasticDepth(1.0)


def test_every_parameter_learns():
    model = small(drop_path=0.1, mask_ratio=0.1).train()
    model(torch.randn(4, 3, 112, 112)).pow(3).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), key


def test_checkpointing_changes_no_gradient():
    images = torch.randn(3, 3, 112, 112)
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = small(drop_path=0.4, mask_ratio=0.1, checkpointing=checkpointing).train()
        model.blocks[0].register_forward_pre_hook(lambda *_, mode=checkpointing: calls.append(mode))
        torch.manual_seed(5)
        model(images).pow(3).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert calls == [False, True, True]


def test_attention_and_the_end_stay_in_float32(monkeypatch):
    monkeypatch.setattr(
        "backbones.vit.half_precision", lambda x, enabled: torch.autocast("cpu", torch.bfloat16, enabled)
    )
    products, seen = [], {}
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *qkv: products.append((*(x.dtype for x in qkv), torch.is_autocast_enabled("cpu"))) or original(*qkv),
    )
    model = small(fp16=True).eval()
    for key, part in model.named_modules():
        part.register_forward_hook(lambda part, inputs, out, key=key: seen.update({key: (inputs[0].dtype, out.dtype)}))
    model(torch.randn(1, 3, 112, 112))
    assert products == [(torch.float32, torch.float32, torch.float32, False)] * 2
    assert seen["blocks.1.attn.qkv"][1] == seen["blocks.1.mlp.fc2"][1] == torch.bfloat16
    assert seen["norm"] == seen["feature.0"] == seen["feature.3"] == (torch.float32, torch.float32)
