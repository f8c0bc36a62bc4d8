"""The classifier interface: a method's own classifier with shards and replicated parameters, on several ranks."""

import pytest
import torch

from core.config import load_config
from engine.checkpoint import complete_sets
from losses import ArcFace, Classifier, PartialFC, Softmax
from losses.classifier import replicated_parameters, sharded_tensors
from tests.BCT_methods.whole_runs import sets_of
from tests.engine.test_trainer import Plain, assert_same, config, rec  # noqa: F401
from tests.ranks import run_ranks


class Turned(Classifier):
    """PartialFC behind a replicated linear map, with a parameter and a buffer that are sharded by class."""

    class_sharded = {"worth": 0, "table": 1}

    def __init__(self, partial_fc):
        super().__init__()
        self.turn = torch.nn.Linear(8, 8)
        self.centres = partial_fc
        self.worth = torch.nn.Parameter(torch.ones(partial_fc.num_local))
        self.register_buffer("table", torch.arange(5.0)[partial_fc.class_start :][: partial_fc.num_local].repeat(2, 1))

    def forward(self, embeddings, labels):
        return self.centres(self.turn(embeddings), labels) + 0 * self.worth.sum()


class HasTurned(Plain):
    def build_classifier(self):
        torch.manual_seed(self.cfg.seed + self.rank)  # the trainer broadcasts rank 0's map
        return Turned(super().build_classifier())


def test_shards_are_declared_by_whatever_part_has_them():
    classifier = Turned(PartialFC(ArcFace(), 8, 5))
    declared = {name: (tensor, dim) for name, tensor, dim in sharded_tensors(classifier)}
    assert {name: dim for name, (_, dim) in declared.items()} == {"worth": 0, "table": 1, "centres.weight": 0}
    for name, (tensor, _) in declared.items():
        assert torch.equal(classifier.state_dict()[name], tensor)
    assert list(map(id, replicated_parameters(classifier))) == list(map(id, classifier.turn.parameters()))
    assert sharded_tensors(PartialFC(ArcFace(), 8, 5))[0][0] == "weight"


def test_a_shard_that_is_not_there_is_an_error():
    wrong = type("Wrong", (Turned,), {"class_sharded": {"worht": 0}})(PartialFC(ArcFace(), 8, 5))
    with pytest.raises(AttributeError, match="worht"):
        sharded_tensors(wrong)


def whole(path, *overrides):
    """Train; `(backbone, classifier's state)`."""
    torch.set_num_threads(1)
    trainer = HasTurned(load_config(path, overrides))
    trainer.train()
    backbone = {name.removeprefix("module."): value.clone() for name, value in trainer.backbone.state_dict().items()}
    return backbone, dict(trainer.classifier.state_dict())


def test_a_classifier_of_a_methods_own_trains_and_resumes_on_any_ranks(tmp_path, rec):  # noqa: F811
    one = whole(config(tmp_path, rec, "one", batch_size=12))
    torch.manual_seed(load_config("configs/base.py").seed)
    start = Turned(PartialFC(ArcFace(), 8, 5)).turn.weight
    two = run_ranks(whole, 2, config(tmp_path, rec, "many", batch_size=6))
    (complete_sets(tmp_path / "many")[-1] / "DONE").unlink()  # as if killed in the second epoch
    assert sets_of(tmp_path / "many") == [(2, 2)]
    three = run_ranks(whole, 3, config(tmp_path, rec, "many", batch_size=4, resume=True))
    assert sets_of(tmp_path / "many") == [(2, 2), (4, 3)]
    for results in (two, three):
        for backbone, classifier in results:
            assert_same(one[0], backbone)
            assert_same({name: one[1][name] for name in ("turn.weight", "turn.bias")}, classifier)
        for name, dim in (("centres.weight", 0), ("worth", 0), ("table", 1)):
            joined = torch.cat([classifier[name] for _, classifier in results], dim)
            torch.testing.assert_close(joined, one[1][name], rtol=0, atol=1e-5)
    assert 1e-4 < (one[1]["turn.weight"] - start).abs().max() < 0.1  # it has trained, from where it began


def test_plain_softmax_has_nothing_to_train_to_shard_or_to_restore():
    classifier, logits, labels = Softmax(), torch.randn(6, 5), torch.arange(6) % 5
    expected = -(logits.exp() / logits.exp().sum(1, keepdim=True)).log()[torch.arange(6), labels].mean()
    torch.testing.assert_close(classifier(logits, labels), expected)
    assert not classifier.state_dict() and not sharded_tensors(classifier)
    assert classifier.sampling_state() is None and classifier.set_sampling_state(None) is None
