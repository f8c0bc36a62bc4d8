"""The softmax trainer's model.pt is the network alone; its head is in a file of its own; runs resume with both."""

import torch

import backbones
from core.config import load_config
from core.manifest import read_manifest
from tests.conftest import draw_record_set
from train_old_softmax import OldSoftmax


def train(tmp_path, *words):
    config = "configs/demo/f128_tiny_softmax_class30.py"
    base = ["--rec", str(tmp_path / "train.rec"), "--output", str(tmp_path / "out"), "--batch_size", "4"]
    run = OldSoftmax(load_config(config, [*base, "--num_workers", "0", "--num_epoch", "2", *words]))
    run.train()
    run.claimed.close()
    return run


def test_model_and_head_are_two_files_and_load_strictly(tmp_path):
    draw_record_set(tmp_path / "train.rec", [0, 1, 2] * 4)
    run = train(tmp_path, "--save_all_states", "True")
    state = torch.load(tmp_path / "out/model.pt", weights_only=True)
    network = backbones.get_model("tiny", 128)
    network.load_state_dict(state, strict=True)
    head = torch.load(tmp_path / "out/softmax_fc.pt", weights_only=True)
    assert {key: list(value.shape) for key, value in head.items()} == {"weight": [3, 128], "bias": [3]}
    images = torch.rand(2, 3, 112, 112)
    embeddings = network.eval()(images)
    torch.testing.assert_close(embeddings, run.backbone.eval()(images))
    linear = torch.nn.Linear(128, 3)
    linear.load_state_dict(head, strict=True)
    torch.testing.assert_close(linear(embeddings), run.backbone.cls_fc(embeddings))
    assert read_manifest(tmp_path / "out/model.pt")["width"] == 128

    again = train(tmp_path, "--resume", "True")  # checkpoints have the head
    for key, value in again.backbone.state_dict().items():
        torch.testing.assert_close(value, run.backbone.state_dict()[key])
