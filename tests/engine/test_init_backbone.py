"""`init_backbone`: a run starts from a checkpoint's embeddings, says so, and refuses a file that does not fit."""

import pytest
import torch

import backbones
from core.config import ConfigError, load_config
from core.manifest import digest, read_manifest
from engine.build import unwrap
from tests.BCT_methods.whole_runs import write_config
from train_old_arc import OldArc
from train_old_softmax import OldSoftmax


@pytest.fixture
def start(tmp_path, make_record_set):
    """A function that sets up a Trainer with `init_backbone` = m.pt, a tiny of 8 features with a head."""
    make_record_set(tmp_path / "set.rec", [0, 1, 2] * 4)
    torch.manual_seed(5)
    torch.save(backbones.get_model("tiny", num_features=8, num_classes=7).state_dict(), tmp_path / "m.pt")

    def make(trainer=OldArc, **keys):
        keys = {"init_backbone": str(tmp_path / "m.pt"), "num_epoch": 1, **keys}
        return trainer(load_config(write_config(tmp_path, trainer.__name__, "run", **keys)))

    return make


@pytest.mark.parametrize("trainer", [OldArc, OldSoftmax])
def test_before_the_first_step_its_embeddings_are_the_files(trainer, start, tmp_path):
    run, images = start(trainer), torch.randn(3, 3, 112, 112)
    expected = backbones.load_backbone(tmp_path / "m.pt", "tiny")(images)
    assert torch.equal(unwrap(run.backbone).eval()(images), expected)
    assert not torch.equal(unwrap(start(trainer, init_backbone="").backbone).eval()(images), expected)


def test_what_the_run_says_of_it(start, tmp_path):
    run = start()
    assert run.made_from["init_backbone"] == digest(tmp_path / "m.pt")  # compared over the ranks with the others
    run.train()
    assert read_manifest(tmp_path / "run/model.pt")["init_backbone"] == digest(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"embedding_size": 16}, "m.pt: gives 8 features, but embedding_size = 16"),
        ({"network": "r18"}, "m.pt: not a r18"),
        ({"init_backbone": "/absent/m.pt"}, "/absent/m.pt: no such model file"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_the_key(keys, message, start):
    with pytest.raises(ConfigError, match=f"init_backbone = .*{message}"):
        start(**keys)
