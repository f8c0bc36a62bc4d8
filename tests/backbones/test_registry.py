"""For all networks: names, published keys and shapes, softmax heads, gradients."""

import json
import pathlib

import pytest
import torch

import backbones

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "backbone_keys.json").read_text())
SIZES = {"r18": 128, "r34": 256, "r18_softmax_10": 128}  # embedding sizes of the listing; the others have 512


def published_keys(network):
    """Ordered [(key, shape)] of a published checkpoint, unfolded from the compact listing."""
    rows = []
    for stem, first, last, kind in PUBLISHED["networks"][network]:
        prefixes = [""] if first is None else [f"{stem}{number}." for number in range(first, last + 1)]
        rows += [(prefix + suffix, shape) for prefix in prefixes for suffix, *shape in PUBLISHED["kinds"][kind]]
    return rows


def skeleton(name, num_features=512, **options):
    with torch.device("meta"):
        return backbones.get_model(name, num_features, **options)


def keys(model):
    return [(key, list(value.shape)) for key, value in model.state_dict().items()]


def test_all_names_are_listed():
    assert set(backbones.names()) == (set(PUBLISHED["networks"]) - {"r18_softmax_10"}) | {"r2060", "tiny", "tiny_x2"}


@pytest.mark.parametrize("network", [name for name in PUBLISHED["networks"] if "softmax" not in name])
def test_keys_and_shapes_are_the_published_ones(network):
    assert keys(skeleton(network, SIZES.get(network, 512))) == published_keys(network)


def test_keys_and_shapes_with_a_softmax_head():
    assert keys(skeleton("r18", 128, num_classes=10)) == published_keys("r18_softmax_10")


def test_r2060_has_the_blocks_of_r200_at_its_own_depths():
    block_rows = {}
    for key, shape in published_keys("r200"):
        if key.startswith("layer"):
            layer, number, suffix = key.split(".", 2)
            block_rows.setdefault((layer, min(int(number), 1)), {})[suffix] = shape
    expected = [
        (f"layer{layer}.{number}.{suffix}", shape)
        for layer, depth in zip((1, 2, 3, 4), (3, 128, 896, 3))
        for number in range(depth)
        for suffix, shape in block_rows[f"layer{layer}", min(number, 1)].items()
    ]
    outside = [row for row in published_keys("r200") if not row[0].startswith("layer")]
    got = keys(skeleton("r2060"))
    assert [row for row in got if row[0].startswith("layer")] == expected
    assert [row for row in got if not row[0].startswith("layer")] == outside


@pytest.mark.parametrize(
    "name, near", [("r51", "r50"), ("vit_b_dp005_mask_05", "vit_b_dp005_mask_005"), ("mbf_big", "mbf")]
)
def test_unknown_name_names_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"unknown network '{name}': did you mean .*\b{near}\b.*\? available are r18"):
        backbones.get_model(name)


@pytest.mark.parametrize("name", ["r100", "r200", "r2060", "mbf", "vit_t"])
def test_a_softmax_head_is_refused_by_networks_without_one(name):
    with pytest.raises(ValueError, match=f"{name} has no softmax head.*r18, r34, r50, tiny, tiny_x2 have one"):
        skeleton(name, num_classes=10)


def test_softmax_head_gives_logits_in_training_and_the_embedding_in_evaluation():
    torch.manual_seed(0)
    model = backbones.get_model("tiny", 12, num_classes=5)
    images = torch.randn(3, 3, 112, 112)
    logits = model.train()(images)
    by_hand = model.embed(images) @ model.cls_fc.weight.T + model.cls_fc.bias
    torch.testing.assert_close(logits, by_hand)
    assert logits.shape == (3, 5)
    embedding = model.eval()(images)
    torch.testing.assert_close(embedding, model.embed(images), rtol=0, atol=0)
    assert embedding.shape == (3, 12)


@pytest.mark.parametrize("name", ["r18", "mbf", "tiny", "tiny_x2"])
def test_every_parameter_but_the_fixed_scale_gets_a_gradient(name):
    torch.manual_seed(0)
    model = backbones.get_model(name, 8).eval()  # in training mode a bias before BatchNorm has gradient 0
    model(torch.randn(1, 3, 112, 112)).sum().backward()
    for key, parameter in model.named_parameters():
        if key == "features.weight":
            assert parameter.grad is None and not parameter.requires_grad and torch.all(parameter == 1)
        else:
            assert 0 < parameter.grad.abs().max() < float("inf"), key


def test_epsilons_of_the_norms():
    for name in set(backbones.names()) - {"r2060"}:
        parts = list(skeleton(name).modules())
        batch = {part.eps for part in parts if isinstance(part, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))}
        layer = {part.eps for part in parts if isinstance(part, torch.nn.LayerNorm)}
        assert (batch, layer) == (({2e-5}, {1e-5}) if name.startswith("vit") else ({1e-5}, set())), name


@pytest.mark.parametrize("name", ["r18", "mbf", "vit_t", "tiny", "tiny_x2"])
def test_evaluation_is_deterministic_and_float32(name):
    torch.manual_seed(0)
    model = backbones.get_model(name, 32, dropout=0.4, fp16=True).eval()
    images = torch.randn(1, 3, 112, 112)
    with torch.inference_mode():
        first, second = model(images), model(images)
        model.fp16 = False
        plain = model(images)  # on the CPU fp16 changes nothing
    assert first.shape == (1, 32) and first.dtype == torch.float32 and torch.isfinite(first).all()
    assert torch.equal(first, second) and torch.equal(first, plain)


@pytest.mark.parametrize("name", ["tiny", "mbf"])
def test_dropout_acts_only_in_training(name):
    torch.manual_seed(0)
    model = backbones.get_model(name, 8, dropout=0.5).train()
    images = torch.randn(4, 3, 112, 112)
    assert not torch.allclose(model(images), model(images))
    for part in model.modules():
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.0
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    torch.testing.assert_close(model(images), model(images))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["r18", "mbf", "vit_t", "tiny"])
def test_half_precision_on_cuda_is_close_and_returns_float32(name):
    torch.manual_seed(0)
    model = backbones.get_model(name, 32, fp16=True).cuda().eval()
    images = torch.randn(4, 3, 112, 112, device="cuda")
    norms = [part for part in model.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0  # fresh statistics, of no data, would overflow float16
    model.fp16 = False
    with torch.no_grad():
        model.train()(images)
        whole = model.eval()(images)
        model.fp16 = True
        half = model(images)
    assert half.dtype == torch.float32 and not torch.equal(half, whole)
    assert torch.nn.functional.cosine_similarity(half, whole).min() > 0.999
