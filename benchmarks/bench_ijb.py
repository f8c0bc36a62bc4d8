"""IJB-C at full size with random features: the evaluation against a plain implementation.

    python benchmarks/bench_ijb.py                 full size: 469,375 images, 23,124 templates, 15,658,489 pairs
    python benchmarks/bench_ijb.py --scale 0.1     a tenth of the images and templates, a hundredth of the pairs

1:1 from image features to TPR at six FPRs and AUC, also by the plain implementation in float32; and 1:N.
"""

import pathlib
import sys

import numpy as np
from sklearn.metrics import auc, roc_curve

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

from benchmarks.common import PeakMemory, in_turns, machine, median, options, print_ratio
from tools.ijbc_eval import metrics
from tools.ijbc_eval.protocol import Faces, Pairs
from tools.ijbc_eval.templates import Setting, template_features

IMAGES, GALLERY, PROBES, PAIRS, GENUINE = 469_375, 3_531, 19_593, 15_658_489, 19_557
WIDTH = 128


def make_protocol(scale, rng):
    """Random faces, pairs (a gallery template, a probe; in random order) and subjects, of IJB-C's shape.

    Templates 0 … gallery − 1 are the gallery, one per subject; every probe is of one of these subjects.
    """
    gallery, probes = round(GALLERY * scale), round(PROBES * scale)
    pairs, genuine = round(PAIRS * scale**2), round(GENUINE * scale)
    images, templates = round(IMAGES * scale), gallery + probes
    template = np.sort(np.concatenate([np.arange(templates), rng.integers(0, templates, images - templates)]))
    medium = np.unique(template * 6 + rng.integers(0, 6, images), return_inverse=True)[1]
    scores = rng.uniform(0.5, 1, images).astype(np.float32)
    template, medium = template.astype(np.int32), medium.astype(np.int32)
    faces = Faces(None, None, scores, np.arange(images, dtype=np.int32), template, medium, np.arange(1, templates + 1))
    subject = np.concatenate([np.arange(gallery), rng.integers(0, gallery, probes)])
    chosen = rng.choice(np.arange(gallery, templates), min(genuine, probes), replace=False)
    first = np.concatenate([subject[chosen], rng.integers(0, gallery, pairs - len(chosen))])
    second = np.concatenate([chosen, rng.integers(gallery, templates, pairs - len(chosen))])
    order = rng.permutation(pairs)
    first, second = first[order], second[order]
    sides = [np.unique(side, return_inverse=True) for side in (first, second)]
    (first_templates, its_rows), (second_templates, their_rows) = sides
    pairs = Pairs(
        first_templates,
        second_templates,
        its_rows.astype(np.int32),
        their_rows.astype(np.int32),
        subject[first] == subject[second],
    )
    return faces, pairs, subject, gallery


def make_features(faces, subject, rng):
    """Embeddings of images and mirrored images: a direction per subject, and noise that overlaps with the others'."""
    centres = rng.normal(size=(subject.max() + 1, WIDTH)).astype(np.float32)
    embs = 0.45 * centres[subject[faces.template]]
    drift = rng.normal(size=(len(faces.template_ids), WIDTH)).astype(np.float32)
    embs += drift[faces.template]  # common to a template's images
    embs += rng.standard_normal(embs.shape, np.float32)
    return embs, embs + 0.1 * rng.standard_normal(embs.shape, np.float32)


def plain_way(faces, pairs, embs, embs_f):
    """`(scores, TPRs, AUC)` as in the published scripts, but in float32, which is faster."""
    features = (embs + embs_f) * faces.scores[:, None]
    templates = np.zeros((len(faces.template_ids), features.shape[1]), np.float32)
    for row in range(len(templates)):
        rows = np.flatnonzero(faces.template == row)
        of_template, media = features[rows], faces.medium[rows]
        for medium in np.unique(media):
            templates[row] += of_template[media == medium].mean(axis=0)
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    first, second = pairs.first_templates[pairs.first], pairs.second_templates[pairs.second]
    scores = np.zeros(len(first), np.float32)
    for start in range(0, len(first), 5000):
        part = slice(start, start + 5000)
        scores[part] = np.sum(templates[first[part]] * templates[second[part]], axis=1)
    fpr, tpr, _ = roc_curve(pairs.label, scores)
    return scores, np.array([tpr[fpr <= point].max() for point in metrics.FPRS]), auc(fpr, tpr)


def our_way(faces, pairs, embs, embs_f):
    templates = template_features(embs, embs_f, faces, Setting())
    scores = metrics.pair_scores(
        templates[pairs.first_templates], templates[pairs.second_templates], pairs.first, pairs.second
    )
    return scores, *metrics.verification_summary(scores, pairs.label)


def one_to_n(templates, subject, gallery):
    """Two galleries with half of the subjects each; probes of the other half are non-mated."""
    probes = np.arange(gallery, len(subject))
    halves = np.arange(gallery // 2), np.arange(gallery // 2, gallery)
    return metrics.identification_summary(
        [metrics.search(templates[half], subject[half], templates[probes], subject[probes]) for half in halves]
    )


def main():
    args = options(__doc__, scale=1.0, rounds=3)
    rng = np.random.default_rng(0)
    faces, pairs, subject, gallery = make_protocol(args.scale, rng)
    given = faces, pairs, *make_features(faces, subject, rng)
    print(
        f"{len(faces.image):,} images, {len(faces.template_ids):,} templates, {len(pairs.label):,} pairs, "
        f"{WIDTH} dimensions; {machine()}, numpy {np.__version__}"
    )

    with PeakMemory() as peak:
        ours = our_way(*given)
    scores, tprs, area = (np.abs(np.subtract(one, other)).max() for one, other in zip(ours, plain_way(*given)))
    print(
        f"{peak.mib:.0f} MiB on top of the inputs; largest difference to plain: scores {scores:.1e}, "
        f"TPR {tprs:.1e}, AUC {area:.1e}"
    )
    templates = template_features(*given[2:], faces, Setting())
    times = in_turns(
        {
            "ours": lambda: our_way(*given),
            "plain": lambda: plain_way(*given),
            "1:N": lambda: one_to_n(templates, subject, gallery),
        },
        args.rounds,
        warmup=0,
    )
    for name, spent in times.items():
        print(f"{name:5} {median(spent, '.3f')} s")
    print_ratio("plain / ours", times["plain"], times["ours"], ".1f")


if __name__ == "__main__":
    main()
