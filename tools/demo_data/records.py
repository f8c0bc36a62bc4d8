"""The training set in insightface's format, `train.rec` and `train.idx`, and a small verification set `demo.bin`."""

import pathlib
import pickle

import numpy as np

import recordio
from core.files import atomic_write
from tools.demo_data import capture
from tools.demo_data.conditions import draw_conditions
from tools.demo_data.identity import draw_identity, traits

TRAINING, EVALUATION, VERIFICATION = range(3)  # three disjoint sets of people
VERIFICATION_IMAGES = 6  # per person in the .bin set


def person(seed, group, number):
    """Person `number` of one of the three groups -> (their random generator, traits)."""
    rng = np.random.default_rng([seed, group, number])
    return rng, traits(draw_identity(rng))


def aligned_images(seed, group, number, count, variation):
    """Yield `count` aligned images of a person, BGR uint8 [112, 112, 3], each with its conditions."""
    rng, who = person(seed, group, number)
    for _ in range(count):
        conditions = draw_conditions(rng, variation)
        yield capture.aligned(who, conditions), conditions


def _jpegs(task):
    return [capture.encode(image, conditions) for image, conditions in aligned_images(*task)]


def write_training_set(path, seed, identities, images, variation, over):
    """Draw `identities` people, `images` times each, to the record file `path` (a `.rec`; the `.idx` beside it).

    Record 0 is the header: label[0] − 1 images, under the keys 1, 2, ...; label[1] classes. `over(function, tasks)`
    yields the results in the order of the tasks.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = [(seed, TRAINING, number, images, variation) for number in range(identities)]
    with recordio.RecordWriter(path) as writer:
        header = recordio.IRHeader(2, [identities * images + 1, identities], 0, 0)
        writer.write(0, recordio.pack(header, b""))
        key = 0
        for label, jpegs in enumerate(over(_jpegs, tasks)):
            for jpeg in jpegs:
                key += 1
                writer.write(key, recordio.pack(recordio.IRHeader(0, float(label), key, 0), jpeg))


def write_verification_set(path, seed, pairs, variation, over):
    """Write a `.bin` set of `pairs` pairs, alternately of the same person and of two: a pickle of (JPEGs, booleans)."""
    people = max(4, -(-pairs // VERIFICATION_IMAGES))
    tasks = [(seed, VERIFICATION, number, VERIFICATION_IMAGES, variation) for number in range(people)]
    jpegs = list(over(_jpegs, tasks))
    rng = np.random.default_rng([seed, VERIFICATION, people])
    images, same = [], []
    for pair in range(pairs):
        same.append(pair % 2 == 0)
        a = rng.integers(people)
        b = a if same[-1] else (a + rng.integers(1, people)) % people
        i = rng.integers(VERIFICATION_IMAGES)
        j = (i + rng.integers(1, VERIFICATION_IMAGES)) % VERIFICATION_IMAGES
        images += [jpegs[a][i], jpegs[b][j]]
    with atomic_write(path) as file:
        pickle.dump((images, same), file, protocol=4)
