"""One rank, two and four take the same steps: every term of every step, and all that is trained, of every method.

Each case trains six steps over two epochs, with momentum and weight decay, on `without_batch_norm`. The second half of
the first global batch has only images that are alone in their class and not credible: one of two ranks, two of four
then have no row to mix in, no old class to keep to, no positive in NCCL's queue.
"""

import dataclasses
import importlib
import os

import numpy as np
import pytest
import torch

from BCT_methods.AdvBCT.boundary import class_boundaries
from core.config import load_config
from engine.build import unwrap
from engine.order import ShuffledRows
from losses.classifier import sharded_tensors
from tests.BCT_methods.whole_runs import METHODS, WIDTH, without_batch_norm, write_config, write_old_features
from tests.conftest import draw_record_set
from tests.ranks import run_ranks
from train_old_arc import OldArc

GLOBAL_BATCH, IMAGES, EPOCHS, SEED = 12, 38, 2, 11  # two images are left over in each epoch
COMMON, ALONE = 4, 6  # classes; ten cannot be shared equally by four ranks
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@dataclasses.dataclass
class Case:
    """A Trainer, and what its config says beyond the usual.

    module, trainer: where the class is, and its name. by_batch: terms that depend on what else is in a batch, so that
    accumulated batches do not add up to the larger one.
    """

    module: str
    trainer: str
    keys: dict = dataclasses.field(default_factory=dict)
    by_batch: tuple = ()


def method(name, by_batch=(), **keys):
    return Case(f"BCT_methods.{name}.train", name, keys, by_batch)


CASES = {
    "train_old_arc": Case("train_old_arc", "OldArc"),
    "train_old_softmax": Case("train_old_softmax", "OldSoftmax"),
    # Each rank draws which of its credible rows it mixes. With all of them drawn, any number of ranks draws the same.
    "MixBCT": method("MixBCT", mix_ratio=1.0, credible_old_feature="credible.npy"),
    "UniBCT": method("UniBCT", compat_start_epoch=0, refine_epochs=[1], temperature=0.2),
    # The first of two accumulated batches does not find the second in the queue.
    "NCCL": method(
        "NCCL", ("embedding", "logit"), queue_size=17, temperature=0.5, beta=1.0, credible_old_feature="credible.npy"
    ),
    "BCT": method("BCT", scale=16.0),
    # A mean over as many images as lie outside, and BatchNorm in the discriminator.
    "AdvBCT": method("AdvBCT", ("p2s", "adv")),
    # The hardest negatives are those of the whole batch.
    "RACT": method("RACT", ("ract",), temperature=0.2, negatives=3, negative_grad=True),
    "L2": method("L2"),
    "weakened L2": method("L2", threshold=1.4),
}
CASES = {name: method(name) for name in METHODS} | CASES  # a new method needs a line only for keys, or for by_batch


def trained(case, path, *overrides):
    """Train as the config says: the terms of every batch, and what is trained afterwards, on this rank."""
    kind = getattr(importlib.import_module(case.module), case.trainer)
    seen = []

    class Watched(kind):
        def build_backbone(self):
            backbone = without_batch_norm()
            if case.trainer == "OldSoftmax":
                backbone.append(torch.nn.Linear(WIDTH, self.cfg.num_classes))
            return backbone

        def losses(self, batch):
            terms = super().losses(batch)
            seen.append({name: term.detach().clone() for name, term in terms.items()})
            return terms

    trainer = Watched(load_config(path, overrides))
    trainer.train()
    replicated = {f"backbone.{name}": value for name, value in unwrap(trainer.backbone).state_dict().items()}
    replicated.update({f"extra.{name}": value for name, value in trainer.extra.state_dict().items()})
    sharded = {name: tensor.detach() for name, tensor, _ in sharded_tensors(trainer.classifier)}
    for name, _, dim in sharded_tensors(trainer.extra):
        sharded[name] = replicated.pop(f"extra.{name}").movedim(dim, 0)
    return {"terms": seen, "replicated": replicated, "sharded": sharded}


def trained_each(case, paths):
    torch.set_num_threads(1)
    return [trained(case, path) for path in paths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Record set, old features and credible rows, with the first global batch as the head of this file says."""
    folder = tmp_path_factory.mktemp("ranks_agree")
    first, _ = next(iter(ShuffledRows(IMAGES, GLOBAL_BATCH, SEED, 0, 1)))
    labels, credible = np.arange(IMAGES) % COMMON, np.random.default_rng(1).random(IMAGES) < 0.6
    labels[first[-ALONE:]], credible[first[-ALONE:]] = COMMON + np.arange(ALONE), False
    credible[first[[0, GLOBAL_BATCH // 4]]] = True  # a row of each of the other ranks
    draw_record_set(folder / "set.rec", labels.tolist())
    write_old_features(folder, labels)
    np.save(folder / "credible.npy", credible)
    return folder


@pytest.fixture(scope="module", params=CASES)
def runs(request, folder):
    """`(case, {(ranks, gradient_acc): what each rank has trained})`."""
    case, results = CASES[request.param], {}
    keys = {key: str(folder / value) if key == "credible_old_feature" else value for key, value in case.keys.items()}
    for ranks, accumulated in ((1, [1, 2]), (2, [1, 2]), (4, [1])):
        paths = [
            write_config(
                folder,
                case.trainer,
                f"{request.param.replace(' ', '_')}_{ranks}_{times}",
                **keys,
                seed=SEED,
                batch_size=GLOBAL_BATCH // ranks // times,
                gradient_acc=times,
                num_epoch=EPOCHS,
                decay_epoch=[EPOCHS],
                weight_decay=0.01,
                clip_grad_norm=0.0,
                save_all_states=False,
            )
            for times in accumulated
        ]
        by_rank = run_ranks(trained_each, ranks, case, paths)
        for number, times in enumerate(accumulated):
            results[ranks, times] = [result[number] for result in by_rank]
    return case, results


def steps(result, times=1):
    """The terms of each step, the mean of those of its accumulated batches: `[{name: value}]`."""
    terms = result["terms"]
    parts = [terms[first : first + times] for first in range(0, len(terms), times)]
    return [{name: sum(part[name] for part in step) / times for name in step[0]} for step in parts]


def assert_same_end(results, expected):
    """Two runs, each a list of what its ranks hold, have trained the same."""
    for result in results:
        assert result["replicated"].keys() == expected[0]["replicated"].keys()
        for name, value in expected[0]["replicated"].items():
            torch.testing.assert_close(result["replicated"][name], value, rtol=0, atol=2e-5, msg=name)
    for name in expected[0]["sharded"]:
        first, second = (torch.cat([result["sharded"][name] for result in run]) for run in (results, expected))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5, msg=name)


def test_the_first_batch_leaves_ranks_with_nothing_to_do(folder):
    labels, credible = np.load(folder / "old_label.npy"), np.load(folder / "credible.npy")
    _, _, count = class_boundaries(np.load(folder / "old_feature.npy"), labels, COMMON + ALONE)
    for ranks, idle in ((2, [1]), (4, [2, 3])):
        for rank in range(ranks):
            rows, _ = next(iter(ShuffledRows(IMAGES, GLOBAL_BATCH // ranks, SEED, rank, ranks)))
            assert (not credible[rows].any()) == (count[labels[rows]].max() <= 1) == (rank in idle)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_term_of_every_step(runs, ranks):
    _, results = runs
    expected = steps(results[1, 1][0])
    assert len(expected) == EPOCHS * (IMAGES // GLOBAL_BATCH) == 6
    for name in expected[-1]:
        assert len({step[name].item() for step in expected if name in step}) > 1, f"{name} never changes"
    for result in results[ranks, 1]:
        torch.testing.assert_close(steps(result), expected, **TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_weights_class_centres_and_buffers(runs, ranks):
    _, results = runs
    assert_same_end(results[ranks, 1], results[1, 1])


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_replicated_stays_the_same_bit_for_bit(runs, ranks):
    _, results = runs
    first, *others = (result["replicated"] for result in results[ranks, 1])
    for other in others:
        for name, value in first.items():
            assert torch.equal(other[name], value), name


def test_accumulated_batches(runs):
    """Two batches on two ranks: as two on one rank, and, where terms are plain means, as the larger batch on four."""
    case, results = runs
    one, two, four = results[1, 2], results[2, 2], results[4, 1]
    accumulated, expected = steps(one[0], 2), steps(four[0])
    for result in two:
        torch.testing.assert_close(steps(result, 2), accumulated, **TOLERANCE)
    assert_same_end(two, one)
    if not case.by_batch:
        torch.testing.assert_close(accumulated, expected, **TOLERANCE)
        assert_same_end(two, four)
    for name, value in expected[0].items():  # both runs' first step is from the same weights
        same = torch.isclose(accumulated[0][name], value, **TOLERANCE).item()
        assert same == (name not in case.by_batch), name


# --- BatchNorm: the one thing that does depend on the number of ranks ---------------------------------------------


class BatchNormByParts(torch.nn.BatchNorm2d):
    """Normalises each of two equal parts of a batch by that part's own statistics; keeps those of the first."""

    def forward(self, x):
        first, second = x.chunk(2)
        second = torch.nn.functional.batch_norm(second, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return torch.cat([super().forward(first), second])


def trained_with_batch_norm(norm, path):
    """A plain trainer's cls terms and state dicts of backbone and classifier, with the BatchNorm class `norm`."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # on CUDA the ranks share one GPU
    seen = []

    class Normalised(OldArc):
        def build_backbone(self):
            first, *rest = without_batch_norm()
            return torch.nn.Sequential(first, norm(4), *rest)

        def losses(self, batch):
            terms = super().losses(batch)
            seen.append(terms["cls"].detach().cpu())
            return terms

    trainer = Normalised(load_config(path))
    trainer.train()
    backbone = {name: value.cpu() for name, value in unwrap(trainer.backbone).state_dict().items()}
    return torch.stack(seen), backbone, trainer.classifier.weight.detach().cpu()


def batch_norm_config(folder, name, ranks, **keys):
    keys = {"seed": SEED, "num_epoch": EPOCHS, "weight_decay": 0.01, "save_all_states": False, **keys}
    return write_config(folder, "batch_norm", name, batch_size=GLOBAL_BATCH // ranks, **keys)


def test_batch_norm_has_the_statistics_of_each_ranks_own_rows(folder):
    """Two ranks are one whose BatchNorm takes each rank's rows alone; the statistics of rank 0 are those saved."""
    (one,), (whole,) = (
        run_ranks(trained_with_batch_norm, 1, norm, batch_norm_config(folder, norm.__name__, 1))
        for norm in (BatchNormByParts, torch.nn.BatchNorm2d)
    )
    two = run_ranks(trained_with_batch_norm, 2, torch.nn.BatchNorm2d, batch_norm_config(folder, "two", 2))
    saved = torch.load(folder / "two/model.pt", weights_only=True)
    for terms, backbone, _ in two:
        torch.testing.assert_close(terms, one[0], **TOLERANCE)
        for name, value in one[1].items():
            if "running" not in name:
                torch.testing.assert_close(backbone[name], value, rtol=0, atol=2e-5, msg=name)
    torch.testing.assert_close(torch.cat([result[2] for result in two]), one[2], rtol=0, atol=1e-5)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(two[0][1][name], one[1][name], rtol=0, atol=1e-5)
        assert torch.equal(saved[name], two[0][1][name]) and not torch.equal(saved[name], two[1][1][name])
    assert (whole[0] - one[0]).abs().max() > 1e-4  # and not what one rank does with all rows together


@pytest.mark.gpu  # torch has SyncBatchNorm for CUDA alone
def test_sync_bn_makes_two_ranks_one(folder):
    keys = {"fp16": False, "tf32": False, "deterministic": True}
    visible = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    (one,), two = (
        run_ranks(
            trained_with_batch_norm,
            ranks,
            torch.nn.BatchNorm2d,
            batch_norm_config(folder, f"sync{ranks}", ranks, sync_bn=True, **keys),
            env=visible,
        )
        for ranks in (1, 2)
    )
    for terms, backbone, _ in two:
        torch.testing.assert_close(terms, one[0], **TOLERANCE)
        for name, value in one[1].items():
            torch.testing.assert_close(backbone[name], value, rtol=0, atol=2e-5, msg=name)
    torch.testing.assert_close(torch.cat([result[2] for result in two]), one[2], rtol=0, atol=1e-5)
