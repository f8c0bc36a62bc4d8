"""IJB-C at full size with random features: the evaluation against the plain way, in one run.

    python benchmarks/bench_ijb.py                 full size: 469,375 images, 23,124 templates, 15,658,489 pairs
    python benchmarks/bench_ijb.py --scale 0.1     a tenth of the images and templates, a hundredth of the pairs

Parts: reading the protocol files, then from the cache; 1:1 from image features to TPR at six FPRs and AUC, beside the
plain way in float64 and in float32; 1:N; image reading and alignment with 0, 1, 2, … workers. Each prints what it did
and how long it took.
"""

import argparse
import os
import pathlib
import resource
import sys
import tempfile
import time

import cv2
import numpy as np
import torch
from sklearn.metrics import auc, roc_curve

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # the repo root

from tools.ijbc_eval import identification, verification
from tools.ijbc_eval.align import REFERENCE
from tools.ijbc_eval.embed import aligned_batches
from tools.ijbc_eval.meta import Faces, Protocol
from tools.ijbc_eval.templates import Setting, template_features

IMAGES, GALLERY, PROBES, PAIRS, GENUINE = 469_375, 3_531, 19_593, 15_658_489, 19_557
WIDTH = 128
RUNS = 3  # of each way; the best counts


def make_protocol(scale, rng):
    """Random faces, pairs and subject lists shaped like IJB-C's.

    Templates 0 … gallery − 1 are the gallery, one a subject; every probe is of one of these subjects. As in IJB-C, a
    pair has a gallery template first and a probe second. Pairs stand in random order, as nothing is promised about it.
    """
    gallery, probes = round(GALLERY * scale), round(PROBES * scale)
    pairs, genuine = round(PAIRS * scale**2), round(GENUINE * scale)
    images, templates = round(IMAGES * scale), gallery + probes
    template = np.sort(np.concatenate([np.arange(templates), rng.integers(0, templates, images - templates)]))
    medium = rng.integers(0, 6, images)
    medium_number = np.unique(template * 6 + medium, return_inverse=True)[1]
    landmarks = REFERENCE + rng.normal(0, 2, (images, 5, 2)) + 20
    faces = Faces(
        np.array([f"{row + 1}.jpg".encode() for row in range(images)]), landmarks.astype(np.float32),
        rng.uniform(0.5, 1, images).astype(np.float32), np.arange(images, dtype=np.int32), template.astype(np.int32),
        medium_number.astype(np.int32), np.arange(1, templates + 1),
    )
    subject = np.concatenate([np.arange(gallery), rng.integers(0, gallery, probes)])
    chosen = rng.choice(np.arange(gallery, templates), min(genuine, probes), replace=False)
    first = np.concatenate([subject[chosen], rng.integers(0, gallery, pairs - len(chosen))])
    second = np.concatenate([chosen, rng.integers(gallery, templates, pairs - len(chosen))])
    order = rng.permutation(pairs)
    first, second = first[order].astype(np.int32), second[order].astype(np.int32)
    return faces, medium, first, second, subject[first] == subject[second], subject, gallery


def make_features(faces, subject, rng):
    """Image embeddings and mirrored ones: a direction for each subject, and noise that overlaps with the others'."""
    centres = rng.normal(size=(subject.max() + 1, WIDTH)).astype(np.float32)
    embs = 0.45 * centres[subject[faces.template]]
    drift = rng.normal(size=(len(faces.template_ids), WIDTH)).astype(np.float32)
    embs += drift[faces.template]  # what a template's images have in common beside the subject
    embs += rng.standard_normal(embs.shape, np.float32)
    return embs, embs + 0.1 * rng.standard_normal(embs.shape, np.float32)


def plain_templates(features, template_ids, media, template_of_image, dtype):
    """Per template find its rows, per medium take the mean; the way evaluation scripts in circulation do it.

    They collect templates, and later scores, in what `np.zeros` gives, float64; float32 is kinder to them.
    """
    templates = np.zeros((len(template_ids), features.shape[1]), dtype)
    for row, template in enumerate(template_ids):
        rows = np.flatnonzero(template_of_image == template)
        of_template, media_of_template = features[rows], media[rows]
        for medium in np.unique(media_of_template):
            templates[row] += of_template[media_of_template == medium].mean(axis=0)
    return templates / np.linalg.norm(templates, axis=1, keepdims=True)


def plain_scores(templates, first, second, batch=5000):
    scores = np.zeros(len(first), templates.dtype)
    for start in range(0, len(first), batch):
        part = slice(start, start + batch)
        scores[part] = np.sum(templates[first[part]] * templates[second[part]], axis=1)
    return scores


def plain_metrics(scores, label, fprs):
    """roc_curve, then for each FPR the best point that does not exceed it."""
    fpr, tpr, _ = roc_curve(label, scores)
    return np.array([tpr[fpr <= point].max() for point in fprs]), auc(fpr, tpr)


def timed(name, function, *args):
    start = time.perf_counter()
    value = function(*args)
    seconds = time.perf_counter() - start
    print(f"  {name:<58}{seconds:8.2f} s", flush=True)
    return value, seconds


def run_ours(faces, pairs, embs, embs_f):
    templates, seconds = timed("templates", template_features, embs, embs_f, faces, Setting())
    scores, more = timed("pair scores", lambda: verification.pair_scores(
        templates[pairs.first_templates], templates[pairs.second_templates], pairs.first, pairs.second
    ))
    (tprs, area), rest = timed("TPR at six FPRs, exact AUC", verification.summary, scores, pairs.label)
    return seconds + more + rest, templates, scores, tprs, area


def run_plain(protocol, embs, embs_f, dtype):
    faces, media, first, second, label, _, _ = protocol
    of_image = faces.template_ids[faces.template]
    features, seconds = timed("plain: flip and score", lambda: (embs + embs_f) * faces.scores[:, None])
    templates, more = timed("plain: templates", plain_templates, features, faces.template_ids, media, of_image, dtype)
    scores, rest = timed("plain: pair scores", plain_scores, templates, first, second)
    (tprs, area), last = timed("plain: roc_curve", plain_metrics, scores, label, verification.FPRS)
    return seconds + more + rest + last, scores, tprs, area


def bench_verification(protocol, pairs, embs, embs_f):
    """`pairs` as reading the list gives them; the plain way has its rows of templates looked up beforehand as well.

    Each way counts with the best of as many runs, so that what else the machine does weighs less.
    """
    faces = protocol[0]
    counts = f"{len(embs):,} images, {len(faces.template_ids):,} templates, {len(pairs.label):,} pairs"
    print(f"1:1, {counts}, {WIDTH} dimensions")
    ours = [run_ours(faces, pairs, embs, embs_f) for _ in range(RUNS)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  {'peak memory so far, all inputs included':<58}{peak:8.2f} GB")
    best, (_, templates, scores, tprs, area) = min(run[0] for run in ours), ours[-1]
    print("  TPR " + " ".join(f"{value:.6f}" for value in tprs) + f"  AUC {area:.8f}")
    for dtype in (np.float64, np.float32):
        print(f"  the plain way in {dtype.__name__}")
        plain = [run_plain(protocol, embs, embs_f, dtype) for _ in range(RUNS)]
        plain_best, (_, plain_scored, plain_tprs, plain_area) = min(run[0] for run in plain), plain[-1]
        print(f"  largest difference: scores {np.abs(scores - plain_scored).max():.1e}, "
              f"TPR {np.abs(tprs - plain_tprs).max():.1e}, AUC {abs(area - plain_area):.1e}")
        print(f"  ours {best:.2f} s, plain in {dtype.__name__} {plain_best:.2f} s (each the best of {RUNS}): "
              f"{plain_best / best:.1f} times faster\n", flush=True)
    return templates


def bench_identification(templates, subject, gallery):
    """Two galleries, each with half of the subjects; the probes of the other half are the non-mated ones."""
    probes = np.arange(gallery, len(subject))
    print(f"1:N, {gallery:,} gallery templates in two galleries, {len(probes):,} probes")

    def run():
        halves = np.arange(gallery // 2), np.arange(gallery // 2, gallery)
        probe_features = templates[probes]
        return identification.summary(
            [identification.search(templates[half], subject[half], probe_features, subject[probes]) for half in halves]
        )

    (tops, tpirs), _ = timed("top-1/5/10 and TPIR at five FPIRs", run)
    print("  top " + " ".join(f"{value:.4f}" for value in tops[-1])
          + "  TPIR " + " ".join(f"{value:.4f}" for value in tpirs[-1]) + "\n", flush=True)


def write_files(folder, protocol, media):
    faces, _, first, second, label, subject, gallery = protocol
    meta = folder / "IJBC" / "meta"
    meta.mkdir(parents=True)
    names = [name.decode() for name in faces.names]
    ids = faces.template_ids[faces.template]
    points = faces.landmarks.reshape(-1, 10)
    with open(meta / "ijbc_name_5pts_score.txt", "w") as file:
        for name, row, score in zip(names, points.tolist(), faces.scores.tolist()):
            file.write(f"{name} {' '.join(f'{value:.6f}' for value in row)} {score:.6f}\n")
    with open(meta / "ijbc_face_tid_mid.txt", "w") as file:
        file.writelines(f"{name} {template} {medium}\n" for name, template, medium in zip(names, ids, media))
    with open(meta / "ijbc_template_pair_label.txt", "w") as file:
        for start in range(0, len(first), 1 << 20):
            part = slice(start, start + (1 << 20))
            rows = zip((first[part] + 1).tolist(), (second[part] + 1).tolist(), label[part].astype(int).tolist())
            file.writelines(f"{one} {two} {same}\n" for one, two, same in rows)


def bench_reading(protocol, folder):
    write_files(folder, protocol, protocol[1])
    print("reading the three protocol files")

    def read():
        files = Protocol(folder, "IJBC", folder / "cache")
        faces = files.faces()
        return faces, files.pairs(faces)

    (faces, pairs), _ = timed("first time, cache written", read)
    (again, _), _ = timed("from the cache", read)
    assert np.array_equal(pairs.first_templates[pairs.first], protocol[2]) and np.array_equal(pairs.label, protocol[4])
    assert np.array_equal(faces.medium, again.medium) and np.array_equal(faces.template, protocol[0].template)
    print()
    return pairs


def bench_images(folder, count, most_workers):
    """Loose crops of 160×160 as JPEG files, read and aligned by 0 (in the main process), 1, 2, 4 … workers."""
    rng = np.random.default_rng(0)
    print(f"reading and aligning {count:,} images of 160×160")
    for row in range(count):
        noise = cv2.resize(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8), (160, 160))
        cv2.imwrite(str(folder / f"{row}.jpg"), noise)
    landmarks = (REFERENCE + 24 + rng.normal(0, 2, (count, 5, 2))).astype(np.float32)
    faces = Faces(np.array([f"{row}.jpg".encode() for row in range(count)]), landmarks, *[None] * 5)
    workers, single = 0, None
    while workers <= most_workers:
        batches = iter(aligned_batches(folder, faces, 64, workers))
        next(batches)  # the workers have started
        start = time.perf_counter()
        done = sum(len(images) for images, _ in batches)
        rate = done / (time.perf_counter() - start)
        single = rate if workers == 1 else single
        against = f", {rate / single:.2f} × one worker" if workers > 1 else ""
        print(f"  {workers} workers: {rate:8.0f} images/s{against}", flush=True)
        workers = max(1, 2 * workers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the full size; pairs shrink by its square")
    parser.add_argument("--images", type=int, default=4000, help="images of the reading part")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="most workers of the reading part")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}, scale {arguments.scale:g}\n")
    rng = np.random.default_rng(0)
    protocol = make_protocol(arguments.scale, rng)
    with tempfile.TemporaryDirectory() as folder:
        pairs = bench_reading(protocol, pathlib.Path(folder))
    embs, embs_f = make_features(protocol[0], protocol[5], rng)
    templates = bench_verification(protocol, pairs, embs, embs_f)
    del embs, embs_f
    bench_identification(templates, protocol[5], protocol[6])
    with tempfile.TemporaryDirectory() as folder:
        bench_images(pathlib.Path(folder), arguments.images, arguments.workers)


if __name__ == "__main__":
    main()
