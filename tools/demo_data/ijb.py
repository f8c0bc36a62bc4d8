"""An evaluation set in IJB-C's file layout: meta/*.txt, meta/*.csv and loose_crop/*.jpg."""

import os
import pathlib
import shutil

import numpy as np

from tools.demo_data import capture
from tools.demo_data.conditions import draw_conditions, next_frame
from tools.demo_data.records import EVALUATION, person

# Number of images per medium of a template. One image is a still, several are frames of one video.
GALLERY = ([1, 1], [1, 1, 1], [1, 2], [1, 1, 2])
PROBE = ([1], [1], [1], [1, 1], [2], [1, 3])
VIDEO_HARM = 1.5  # video frames have more camera faults than stills
GALLERY_HARM = 0.7  # enrolment images have fewer
CSV_HEADER = "TEMPLATE_ID,SUBJECT_ID,FILENAME"


def _subject(task):
    """One subject's images: per template, per medium, per image (JPEG, landmarks [5, 2], detection score)."""
    seed, number, probes, variation = task
    rng, who = person(seed, EVALUATION, number)
    plans = [GALLERY[rng.integers(len(GALLERY))]] + [PROBE[rng.integers(len(PROBE))] for _ in range(probes)]
    return [
        [_medium(rng, who, frames, variation, GALLERY_HARM if k == 0 else 1.0) for frames in plan]
        for k, plan in enumerate(plans)
    ]


def _medium(rng, who, frames, variation, harm):
    conditions = draw_conditions(rng, variation, harm * (VIDEO_HARM if frames > 1 else 1.0))
    images = []
    for frame in range(frames):
        if frame:
            conditions = next_frame(rng, conditions, variation)
        image, landmarks = capture.loose(rng, who, conditions)
        score = np.clip(0.55 + 0.45 * conditions.quality() + 0.02 * rng.standard_normal(), 0.3, 0.9999)
        images.append((capture.encode(image, conditions), landmarks, float(score)))
    return images


def write_ijb(root, seed, identities, probes, pairs, variation, over):
    """Draw `identities` subjects to the directory `root` (e.g. DIR/IJBC), which is replaced as a whole.

    Each subject has one gallery template and `probes` probe templates. Odd subject numbers are in gallery G1, even ones
    in G2, so a probe of one gallery is non-mated in the other. The pair list has every mated (gallery, probe) pair,
    filled up to `pairs` lines with a seeded sample of the others.
    `over(function, tasks)` yields the results in the order of the tasks.
    """
    root = pathlib.Path(root)
    part = root.with_name(f".{root.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        (part / "loose_crop").mkdir(parents=True)
        (part / "meta").mkdir()
        tasks = [(seed, number, probes, variation) for number in range(identities)]
        rows = _write_images(part / "loose_crop", over(_subject, tasks))
        _write_meta(part / "meta", rows, pairs, np.random.default_rng([seed, EVALUATION, identities]))
        if root.exists():
            shutil.rmtree(root)
        os.replace(part, root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_images(directory, subjects):
    """Number and write the images -> rows (file name, template, medium, subject, role, landmarks, score)."""
    rows, template, medium = [], 0, 0
    for subject, templates in enumerate(subjects, start=1):
        for k, media in enumerate(templates):
            template += 1
            role = "probe" if k else "G1" if subject % 2 else "G2"
            for images in media:
                medium += 1
                for jpeg, landmarks, score in images:
                    name = f"{len(rows) + 1}.jpg"
                    (directory / name).write_bytes(jpeg)
                    rows.append((name, template, medium, subject, role, landmarks, score))
    return rows


def _write_meta(directory, rows, pairs, rng):
    def write(name, lines):
        (directory / name).write_text("\n".join(lines) + "\n", encoding="ascii")

    write("ijbc_face_tid_mid.txt", [f"{name} {template} {medium}" for name, template, medium, *_ in rows])
    write(
        "ijbc_name_5pts_score.txt",
        [" ".join([row[0], *(f"{v:.3f}" for v in row[5].ravel()), f"{row[6]:.6f}"]) for row in rows],
    )
    csv = {"G1": "ijbc_1N_gallery_G1.csv", "G2": "ijbc_1N_gallery_G2.csv", "probe": "ijbc_1N_probe_mixed.csv"}
    for role, name in csv.items():
        write(name, [CSV_HEADER, *(f"{row[1]},{row[3]},{row[0]}" for row in rows if row[4] == role)])
    subjects = {row[1]: row[3] for row in rows}
    probes = np.array(sorted({row[1] for row in rows if row[4] == "probe"}))
    galleries = np.array(sorted(set(subjects) - set(probes.tolist())))
    first, second, same = _pairs(rng, galleries, probes, subjects, pairs)
    write("ijbc_template_pair_label.txt", [f"{a} {b} {s}" for a, b, s in zip(first, second, same)])


def _pairs(rng, galleries, probes, subjects, limit):
    """(gallery templates, probe templates, 1 if both are of one subject), ordered by gallery, then probe."""
    of = np.vectorize(subjects.get)
    same = of(galleries)[:, None] == of(probes)[None]
    other = np.flatnonzero(~same)
    kept = max(0, min(len(other), limit - int(same.sum())))
    chosen = np.sort(np.concatenate([np.flatnonzero(same), rng.choice(other, kept, replace=False)]))
    g, p = np.unravel_index(chosen, same.shape)
    return galleries[g].tolist(), probes[p].tolist(), same.ravel()[chosen].astype(int).tolist()
