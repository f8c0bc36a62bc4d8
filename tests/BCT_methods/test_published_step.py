"""The gradient that one step on two ranks leaves in the backbone is the published step's, of every method.

`published_gradient` restates that step with plain torch in one process, which plays both ranks:

- a rank's BatchNorm knows its own rows only;
- the embeddings that the classifier's shards see are gathered; the gather's backward adds up what the ranks say about
  a row and multiplies it by the number of ranks R. NCCL's embedding loss passes it, too;
- NCCL's logits pass another gather, which cuts the gradient;
- every other term is a mean over the rank's own rows;
- DistributedDataParallel takes the mean of the ranks' gradients.

One difference is ours (docs/fidelity.md): AdvBCT's terms have the statistics of the global batch, and are restated so.
The step is the third of four, each an epoch of its own: NCCL's queue then holds more than the batch, AdvBCT's gradient
reversal and its fading are under way.
"""

import dataclasses
import importlib
import math
import typing

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import backbones
from core.config import load_config
from engine.build import unwrap
from tests.BCT_methods.whole_runs import WIDTH, write_config, write_old_features
from tests.conftest import draw_record_set
from tests.ranks import run_ranks

RANKS, BATCH, CLASSES, EPOCHS, SEED = 2, 8, 5, 4, 5
IMAGES, EPOCH = RANKS * BATCH, 2  # an epoch is a step; EPOCH is the one that is looked at
SHARDS = [slice(0, 3), slice(3, 5)]  # classes of each rank
QUEUE = 40  # three global batches are 48
S, MARGIN = 64.0, 0.5
TOLERANCE = 5e-6  # of the gradient's norm; float32 against losses in float64


# --- what the ranks do ------------------------------------------------------------------------------------------


def steps_of_this_rank(methods, paths):
    """The recorded step of each method, on this rank."""
    torch.set_num_threads(1)
    return [recorded_step(method, path) for method, path in zip(methods, paths)]


def recorded_step(method, path):
    """Train by the method's own Trainer: what goes into the step of EPOCH, and the gradient that it leaves."""
    kind, record = getattr(importlib.import_module(f"BCT_methods.{method}.train"), method), {"history": []}

    class Recorded(kind):
        def accumulate(self, batch, last):
            if self.epoch <= EPOCH:
                record["history"].append(batch.index)
            if self.epoch == EPOCH:
                record.update(images=batch.images, labels=batch.labels)
                state = unwrap(self.backbone).state_dict()
                record["backbone"] = {name: value.clone() for name, value in state.items()}
                record["centres"] = self.classifier.weight.detach().clone()
                record["extra"] = {name: value.clone() for name, value in self.extra.state_dict().items()}
            super().accumulate(batch, last)

        def update(self):
            if self.epoch == EPOCH:
                record["grad"] = [p.grad.clone() for p in self.backbone.parameters() if p.requires_grad]
            super().update()

    def record_classified(_, given):
        if trainer.epoch == EPOCH:
            record["classified"] = given[0].detach().clone()

    trainer = Recorded(load_config(path))
    trainer.classifier.register_forward_pre_hook(record_classified)
    if "boundary" in trainer.extra:
        trainer.extra["boundary"].elastic.data = torch.linspace(-2, 1, CLASSES)
    trainer.train()
    return record


# --- the published step -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Step:
    """What the ranks hold, lists over them; embeddings and losses in float64."""

    new: list  # [B, D], with gradient
    old: list  # [B, D], as stored
    labels: list  # [B]
    ranks: list  # the records
    features: torch.Tensor  # all old features [N, D], and
    all_labels: torch.Tensor  # their labels [N]


def gathered(parts):
    """All ranks' rows; backwards, the sum of what the ranks say about them, times their number."""
    rows = torch.cat(parts)
    return RANKS * rows - ((RANKS - 1) * rows).detach()


def gathered_and_cut(parts):
    return torch.cat(parts).detach()


def margin_logits(embeddings, centres, labels):
    """s · cos(θ + m) at the label, s · cos θ elsewhere."""
    cosine = F.normalize(embeddings) @ F.normalize(centres).T
    assert cosine.min() > -math.cos(MARGIN)  # θ + m stays below π
    own = F.one_hot(labels, CLASSES).bool()
    return S * torch.where(own, (cosine.clamp(-1 + 1e-9, 1 - 1e-9).acos() + MARGIN).cos(), cosine)


def arcface(step, classified):
    """Rank by rank the cross-entropy over the global batch, of which a rank differentiates its own classes' logits."""
    centres, labels = torch.cat([rank["centres"] for rank in step.ranks]).double(), torch.cat(step.labels)
    logits = margin_logits(gathered(classified), centres, labels)
    for shard in SHARDS:
        mine = logits.detach().clone()
        mine[:, shard] = logits[:, shard]
        yield F.cross_entropy(mine, labels)


def mixbct(step):
    """Old features in the place of int(0.3 B) credible new ones: of the rows that the rank drew, which shows."""
    classified = []
    for new, old, rank in zip(step.new, step.old, step.ranks):
        old = F.normalize(old)
        drawn = (rank["classified"].double() - old).abs().amax(1) < 1e-6
        assert drawn.sum() == int(BATCH * 0.3) and CREDIBLE[rank["history"][-1]][drawn].all()
        classified.append(torch.where(drawn[:, None], old, new))
    return {"cls": arcface(step, classified)}


def l2(step):
    return {
        "cls": arcface(step, step.new),
        "l2": [10 * (F.normalize(new) - F.normalize(old)).norm(dim=1).mean() for new, old in zip(step.new, step.old)],
    }


def class_means(step):
    return torch.stack([step.features[step.all_labels == label].mean(0) for label in range(CLASSES)])


def over_prototypes(step, prototypes):
    return [F.cross_entropy(F.normalize(new) @ prototypes.T, labels) for new, labels in zip(step.new, step.labels)]


def bct(step):
    return {"cls": arcface(step, step.new), "old_cls": over_prototypes(step, F.normalize(class_means(step)))}


def unibct(step):
    """Raw class means, which the refinement with damping 0 leaves: no scale but their norms."""
    return {"cls": arcface(step, step.new), "old_cls": over_prototypes(step, class_means(step))}


def nccl(step):
    """ArcFace + l₁ + 0.01 l₂ as the published code has them, not α and β of ours."""
    batches = [rows for batch in zip(*(rank["history"] for rank in step.ranks)) for rows in batch]
    newest = torch.cat(batches)[-QUEUE:]
    queue, queue_labels = F.normalize(step.features[newest]), step.all_labels[newest]
    centres = torch.cat([rank["centres"] for rank in step.ranks]).double()
    everyone = gathered(step.new)
    own_logits = [margin_logits(new, centres, labels) for new, labels in zip(everyone.split(BATCH), step.labels)]
    logits = gathered_and_cut(own_logits)
    # Which logits the queue holds makes no difference: no gradient passes l₂.
    queue_logits = S * queue @ F.normalize(centres).T
    consensus = []
    for rank, (old, labels) in enumerate(zip(step.old, step.labels)):
        own = slice(rank * BATCH, (rank + 1) * BATCH)
        positive = labels[:, None] == queue_labels
        weight = (F.normalize(old) @ queue.T + 1) / 2 * positive / positive.sum(1, keepdim=True)
        embedding, logit = (
            -(weight * scores.log_softmax(1)).sum(1).mean()
            for scores in (F.normalize(everyone[own]) @ queue.T, logits[own] @ queue_logits.T)
        )
        consensus.append(embedding + 0.01 * logit)
    return {"cls": arcface(step, step.new), "consensus": consensus}


def advbct(step):
    """4 · p2s + 4 · (E − epoch + 1)/E · adv, epochs from 0; each term of the global batch, so alike on the ranks."""
    extra = {name: value.double() for name, value in step.ranks[0]["extra"].items()}
    new, old, labels = F.normalize(torch.cat(step.new)), F.normalize(torch.cat(step.old)), torch.cat(step.labels)

    excess = []
    for feature, label in zip(new, labels):
        its = F.normalize(step.features[step.all_labels == label])
        centre, size = its.mean(0), len(its)
        distances = (its - centre).norm(dim=1).sort().values
        low, high = distances[size // 4], distances[3 * size // 4]
        reach = 1.5 * (high - low)
        kept = distances[(distances >= low - reach) & (distances <= high + reach)]
        radius = kept[-1] + torch.sigmoid(extra["boundary.elastic"][label]) * (0.4 - kept[-1])
        excess.append((feature - centre).norm() - radius)
        assert len(kept) > 1
    outside = torch.stack([value for value in excess if value > 0])

    def log_probabilities(features):
        hidden = features @ extra["discriminator.hidden.weight"].T + extra["discriminator.hidden.bias"]
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        hidden = hidden * extra["discriminator.norm.weight"] + extra["discriminator.norm.bias"]
        out = hidden.relu() @ extra["discriminator.out.weight"].T + extra["discriminator.out.bias"]
        return out.log_softmax(1)

    alpha = 2 / (1 + math.exp(-10 * EPOCH / EPOCHS)) - 1
    reversed_new = -alpha * new + ((1 + alpha) * new).detach()
    adversarial = -log_probabilities(reversed_new)[:, 0].mean() - log_probabilities(old)[:, 1].mean()
    return {
        "cls": arcface(step, step.new),
        "p2s": [4 * outside.mean()] * RANKS,
        "adv": [4 * (EPOCHS - EPOCH + 1) / EPOCHS * adversarial] * RANKS,
    }


def published_gradient(restated, ranks, features, labels):
    """`{term: gradient [P]}` of the backbone's parameters, after DDP's mean."""
    net = backbones.get_model("tiny", num_features=WIDTH).train()
    net.load_state_dict(ranks[0]["backbone"])
    new = [net(rank["images"]).double() for rank in ranks]
    old = [features[rank["history"][-1]] for rank in ranks]
    step = Step(new, old, [rank["labels"] for rank in ranks], ranks, features, labels)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return {
        name: flat(torch.autograd.grad(sum(of_ranks) / RANKS, trained, retain_graph=True))
        for name, of_ranks in restated(step).items()
    }


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- both, side by side -----------------------------------------------------------------------------------------


class Case(typing.NamedTuple):
    restated: typing.Callable
    keys: dict = {}


CASES = {
    "MixBCT": Case(mixbct, {"credible_old_feature": "credible.npy"}),
    "UniBCT": Case(unibct, {"compat_start_epoch": 1, "refine_epochs": [1], "damping": 0.0, "decay_epoch": []}),
    "NCCL": Case(nccl, {"alpha": 2.0, "beta": 0.0, "queue_size": QUEUE}),  # alpha = R
    "BCT": Case(bct),
    "AdvBCT": Case(advbct),
    "L2": Case(l2),
}
CREDIBLE = torch.arange(IMAGES) % 3 != 1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """`({method: the records of both ranks}, old features [N, D] float64, labels [N])`."""
    folder = tmp_path_factory.mktemp("published_step")
    labels = np.arange(IMAGES) % CLASSES
    draw_record_set(folder / "set.rec", labels.tolist())
    write_old_features(folder, labels)
    np.save(folder / "credible.npy", CREDIBLE.numpy())
    paths = []
    for method, case in CASES.items():
        keys = {key: str(folder / value) if str(value).endswith(".npy") else value for key, value in case.keys.items()}
        paths.append(
            write_config(
                folder,
                method,
                method,
                **keys,
                seed=SEED,
                batch_size=BATCH,
                num_epoch=EPOCHS,
                margin_scale=S,
                margin_list=(1.0, MARGIN, 0.0),
                save_all_states=False,
            )
        )
    by_rank = run_ranks(steps_of_this_rank, RANKS, list(CASES), paths)
    features = torch.from_numpy(np.load(folder / "old_feature.npy")).double()
    return {name: list(records) for name, *records in zip(CASES, *by_rank)}, features, torch.from_numpy(labels)


@pytest.mark.parametrize("method", CASES)
def test_gradient_of_the_backbone_is_the_published_one(method, recorded):
    records, features, labels = recorded
    first, second = records[method]
    for name, value in first["backbone"].items():
        assert torch.equal(value, second["backbone"][name]) or "running" in name, f"the ranks' {name} differs"
    terms = published_gradient(CASES[method].restated, [first, second], features, labels)
    expected = sum(terms.values())
    for name, gradient in terms.items():
        assert gradient.norm() > 1e-3 * expected.norm(), f"{name} hardly shows: nothing would be compared"
    for rank in (first, second):
        error = (flat(rank["grad"]) - expected).norm() / expected.norm()
        assert error < TOLERANCE, f"{method}: off by {error:.1e} of the gradient's norm"
