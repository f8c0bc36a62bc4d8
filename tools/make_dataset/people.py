"""The images below ROOT, a folder a person, and who of them is trained on, enrolled or held out as a stranger."""

import array
import functools
import mmap
import os

import numpy as np

from core.errors import UserError
from engine.order import Shuffle

UNENROLLED = 0.2  # share of the held-out people who are in the probe only
PAIRS = 10  # most genuine pairs of a person, and as many impostor pairs
FOLDS = 10  # of the ten-fold accuracy


class FolderError(UserError):
    """A ROOT that is no training set, or an option that does not fit it; the message says what to do."""


class Photos:
    """The images of `root` by number, in order of their paths: 8 bytes of memory each, the paths are in a file.

    scratch: where that file is written; skip: names (bytes) to leave out. `names[p]`: folder of person p, bytes;
    `start[p] : start[p + 1]`: the numbers of their images. `stray`: (name, reason) of what no person can have.
    """

    def __init__(self, root, scratch, skip=frozenset()):
        self.root, self.scratch = os.fsencode(root), scratch
        self.names, start, ends, self.stray = [], [0], array.array("q", [0]), []
        with open(scratch, "wb") as file:
            for person, is_folder in _listed(self.root):
                if not is_folder and person not in skip:
                    self.stray.append((person, "not in a person's folder"))
                for name in _below(self.root, person) if is_folder else ():
                    if name in skip:
                        continue
                    if b"\t" in name or len(os.fsdecode(name).splitlines()) > 1:  # as readers of the lists split them
                        self.stray.append((name, "a tab or a line break in its name"))
                        continue
                    file.write(name)
                    ends.append(file.tell())
                if len(ends) - 1 > start[-1]:
                    self.names.append(person)
                    start.append(len(ends) - 1)
        self.start, self._ends = np.array(start), np.frombuffer(ends, np.int64)

    def __len__(self):
        return len(self._ends) - 1

    def name(self, number):
        """The path of an image below root, bytes, with "/"."""
        return self._bytes[self._ends[number] : self._ends[number + 1]]

    def read(self, number):
        """The contents of an image; raises OSError."""
        with open(os.path.join(self.root, self.name(number)), "rb") as file:
            return file.read()

    def person(self, number):
        return int(np.searchsorted(self.start, number, side="right")) - 1

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    @functools.cached_property
    def _bytes(self):
        with open(self.scratch, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _listed(folder):
    """`(name, is a folder)` of what lies in `folder`, by name, without hidden files; links are followed."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(b"."))


def _below(root, person):
    """All files below root/person, as paths below root, by name, without hidden ones."""
    found, prefix = [], len(os.path.join(root, b""))
    for folder, folders, files in os.walk(os.path.join(root, person)):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        found += [os.path.join(folder, name)[prefix:] for name in files if not name.startswith(b".")]
    return sorted(name.replace(os.fsencode(os.sep), b"/") for name in found)


class ShuffledImages:
    """Numbers of the images of some people in an order drawn from a seed; nothing is stored per image."""

    def __init__(self, photos, people, seed):
        self.first = photos.start[people]
        self.ends = np.cumsum(photos.start[people + 1] - self.first)
        self.shuffle = Shuffle(len(self), seed, epoch=0)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, rows):
        """int64 [n]: the images of a slice of rows."""
        place = self.shuffle.rows(np.arange(*rows.indices(len(self))))
        person = np.searchsorted(self.ends, place, side="right")
        return self.first[person] + place - np.concatenate([[0], self.ends])[person]


# --- held-out people ------------------------------------------------------------------------------------------------


def hold_out(photos, share, seed):
    """`(trained, enrolled, strangers)`: numbers of the people, each int64 and ascending.

    A `share` of all people, of those with two images or more, is not trained on; a fifth of them are strangers.
    Raises FolderError if no one would be left on a side.
    """
    everyone, count = np.arange(len(photos.names)), np.diff(photos.start)
    if not share:
        return everyone, everyone[:0], everyone[:0]
    held, able = round(share * len(everyone)), np.flatnonzero(count >= 2)
    if not 3 <= held <= min(len(able), len(everyone) - 1):
        raise FolderError(
            f"--val {share}: holds out {held} of {len(everyone)} people, of whom {len(able)} have two images or more; "
            "at least 3 of those, and 1 to train on, are needed: choose another share"
        )
    held = np.random.default_rng([seed, 1]).permutation(able)[:held]
    strangers = max(1, round(UNENROLLED * len(held)))
    trained = np.setdiff1d(everyone, held)
    return trained, np.sort(held[strangers:]), np.sort(held[:strangers])


def sides(photos, enrolled, strangers, seed):
    """`(gallery, probe)`: lists of each enrolled person's images, int64; the strangers' follow in `probe`.

    Half of an enrolled person's images, drawn from the seed, at least one, are in the gallery.
    """
    rng, gallery, probe = np.random.default_rng([seed, 2]), [], []
    for person in enrolled:
        images = rng.permutation(np.arange(photos.start[person], photos.start[person + 1]))
        half = max(1, len(images) // 2)
        gallery.append(np.sort(images[:half]))
        probe.append(np.sort(images[half:]))
    return gallery, probe + [np.arange(photos.start[person], photos.start[person + 1]) for person in strangers]


def choose_pairs(gallery, probe, seed):
    """`[(gallery image, probe image, 1 if of one person)]`, genuine and impostor pairs alternating, each once.

    From 20 people on, the people are divided into ten folds, and each contiguous tenth of the pairs has those of one
    fold's people: as LFW's, folds share no one. Fewer people are one fold.
    """
    rng = np.random.default_rng([seed, 3])
    people = range(len(gallery))
    genuine = [_genuine(rng, gallery[person], probe[person]) for person in people]
    dealt, count = sorted(people, key=lambda person: -len(genuine[person])), FOLDS if len(people) >= 2 * FOLDS else 1
    folds = [dealt[fold::count] for fold in range(count)]
    same = [[pair for person in fold for pair in genuine[person]] for fold in folds]
    other = [_impostors(rng, gallery, probe, fold, len(pairs)) for fold, pairs in zip(folds, same)]
    each = min(map(len, same + other))
    chosen = []
    for kinds in zip(same, other):
        drawn = [[kind[place] for place in rng.permutation(len(kind))[:each]] for kind in kinds]
        chosen += [(*pair, label) for both in zip(*drawn) for pair, label in zip(both, (1, 0))]
    return chosen


def _genuine(rng, gallery, probe):
    cells = rng.choice(len(gallery) * len(probe), min(PAIRS, len(gallery) * len(probe)), replace=False)
    return [(int(gallery[cell // len(probe)]), int(probe[cell % len(probe)])) for cell in cells]


def _impostors(rng, gallery, probe, fold, wanted):
    """At most `wanted` different pairs of two people of the fold."""
    count = [sum(len(side[person]) for person in fold) for side in (gallery, probe)]
    there = count[0] * count[1] - sum(len(gallery[person]) * len(probe[person]) for person in fold)
    found = {}
    while len(found) < min(wanted, there):
        one, two = rng.choice(len(fold), 2, replace=False)
        first, second = rng.choice(gallery[fold[one]]), rng.choice(probe[fold[two]])
        found[int(first), int(second)] = None
    return list(found)
