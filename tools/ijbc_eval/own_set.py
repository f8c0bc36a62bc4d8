"""Evaluation sets of one's own, of aligned 112×112 crops: a list of pairs, a gallery and a probe folder, a .bin file.

pairs.txt           first<TAB>second<TAB>1 or 0      paths relative to ROOT; 1 = same person; the first is the old side
gallery/, probe/    a sub-folder a person, its images in it; a person only in probe/ is non-mated
lfw.bin             insightface's; images 2i and 2i + 1 are pair i

Each image is a template of its own. People are known by their folders, in a list of pairs too unless an impostor pair
contradicts that; else as the images that genuine pairs connect, and equal images of a .bin: those that nothing connects
count as different people.
"""

import hashlib
import os
import pathlib
import sys

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from engine.bin_files import read_bin
from tools.ijbc_eval.evaluation_set import EvaluationSet, Faces, Pairs, Subjects
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.images import BinCrops, Crops
from tools.ijbc_eval.metrics import FPIRS, FPRS

GALLERY = "gallery"  # the name of the one gallery in tables
_SMALL = 1e-3  # the lowest rate of such sets' tables: LFW has 3,000 impostor pairs


class CropSet(EvaluationSet):
    """Aligned crops, each a template; `names` [T] of the images.

    paired: rows of the pairs' images, two int [P], and labels [P], or None. people_of: {"gallery", "probe": (rows int
    [Q], names of the people [Q])}, or {}; rows of a stored gallery are those of its features.
    """

    fprs = tuple(rate for rate in FPRS if rate >= _SMALL)
    fpirs = tuple(rate for rate in FPIRS if rate >= _SMALL)
    fpr = _SMALL
    input_scale = 127.5  # of training and feature extraction
    folds = True
    separator = "\t"  # names may have blanks

    def __init__(self, name, source, pictures, paired=None, people_of=(), stored_gallery=False):
        self.name, self.source, self.pictures = name, source, pictures
        self.key = f"{name}_{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
        self.paired, self.people_of, self.stored_gallery = paired, dict(people_of), stored_gallery
        self.has_pairs, self.has_gallery = paired is not None, bool(people_of)
        self.persons = np.unique(np.concatenate([people for _, people in self.people_of.values()] or [[]]))

    def faces(self):
        rows = np.arange(len(self.pictures), dtype=np.int32)
        return Faces(self.pictures.names, None, np.ones(len(rows), np.float32), rows, rows, rows, rows.astype(np.int64))

    def images(self, faces):
        return self.pictures

    def pairs(self, faces):
        *rows, label = self.paired
        if label.all() or not label.any():
            kind = "impostor (label 0)" if label.all() else "genuine (label 1)"
            raise EvalError(f"{self.source}: has no {kind} pair, so there is no ROC; add some")
        return Pairs.of_rows(rows, label, len(self.pictures))

    def galleries(self, faces):
        return {GALLERY: self._subjects("gallery")}

    def probes(self, faces, galleries):
        probes = self._subjects("probe")
        if not np.isin(probes.subject, galleries[GALLERY].subject).any():
            raise EvalError(
                f"{self.source}: nobody of the gallery is in the probe folder; a person's sub-folder has the same name "
                "in both"
            )
        return probes

    def _subjects(self, side):
        rows, people = self.people_of[side]
        return Subjects(rows.astype(np.int32), np.searchsorted(self.persons, people).astype(np.int64))

    def people(self, faces, pairs, galleries, probes):
        """Whose each image is, by its folder if no label contradicts that, else by what connects it to others."""
        person = np.full(len(self.pictures), -1)
        for rows, names in self.people_of.values():
            person[rows] = np.searchsorted(self.persons, names)
        if pairs is None:
            return self.persons, person.astype(np.int32)
        first, second = pairs.rows()
        self._refuse_contradictions(person, first, second, pairs.label)
        folders, folder = np.unique([os.path.dirname(str(name)) for name in self.pictures.names], return_inverse=True)
        # Nodes are the people, the folders and the images, in this order.
        names = np.concatenate([self.persons, folders, self.pictures.names]).astype(str)
        image = np.arange(len(names) - len(person), len(names))
        named, inside = person >= 0, (person < 0) & (folders != "")[folder]  # inside a folder, perhaps of one person
        links = [(image[first[pairs.label]], image[second[pairs.label]]), (image, image[self.pictures.first_copies()])]
        links.append((image[named], person[named]))
        by_folder = [*links, (image[inside], len(self.persons) + folder[inside])]
        people, group = _connected(by_folder, names, image)
        apart = (group[first] == group[second]) & ~pairs.label
        self.people_known = bool((named | inside).all())
        if inside.any() and apart.any():
            self.people_known = False
            self._note(first, second, apart, "lie in folders of one person", "folders are not taken for people")
            people, group = _connected(links, names, image)
            apart = (group[first] == group[second]) & ~pairs.label
        if apart.any():
            self._note(first, second, apart, "are of images that genuine pairs connect", "are the labels right?")
        return people, group

    def _note(self, first, second, pairs, what, so):
        shown = self._shown(first, second, int(np.argmax(pairs)))
        print(
            f"note: {self.source}: {np.count_nonzero(pairs)} impostor pairs {what}, the first {shown}; {so}",
            file=sys.stderr,
        )

    def _refuse_contradictions(self, person, first, second, label):
        """EvalError if a pair's label contradicts the folders that its images lie in."""
        known = (person[first] >= 0) & (person[second] >= 0)
        wrong = known & ((person[first] == person[second]) != label)
        if wrong.any():
            row = int(np.argmax(wrong))
            same = "the same person's" if label[row] else "different people"
            raise EvalError(
                f"{self.source} line {row + 1}: {self._shown(first, second, row)} are labelled {same}, but lie in the "
                f"folders of {self.persons[person[first[row]]]} and {self.persons[person[second[row]]]}; correct one"
            )

    def _shown(self, first, second, row):
        return f"{self.pictures.name(first[row])} and {self.pictures.name(second[row])}"

    def template_names(self, faces):
        return faces.names

    def without_image(self, faces, template):
        return EvalError(
            f"{self.pictures.path(template)}: unusable, and each image of such a set counts; {self.pictures.remedy}"
        )


def _connected(links, names, image):
    """`(people, ascending, int32 [N]: a row of them for each image)`: the groups of nodes that links connect.

    links: [(rows, rows) of the nodes `names`]; image [N]: the images' rows. A group has its first node's name.
    """
    ends, others = (np.concatenate(side) for side in zip(*links))
    graph = sparse.coo_matrix((np.ones(len(ends), bool), (ends, others)), (len(names),) * 2)
    _, group = csgraph.connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    used, of_image = np.unique(group[image], return_inverse=True)
    order = np.argsort(names[first[used]], kind="stable")
    return names[first[used]][order], np.argsort(order)[of_image].astype(np.int32)


def open_bin(path):
    """The CropSet of a .bin file. VerificationError for a damaged one."""
    path = pathlib.Path(path)
    encoded, same = read_bin(path)
    rows = np.arange(0, len(encoded), 2)
    return CropSet(path.stem, path.resolve(), BinCrops(path, encoded), (rows, rows + 1, same))


def open_crops(pairs=None, gallery=None, probe=None, enrolled=None):
    """The CropSet of `pairs`, (pairs.txt, ROOT), or of folders `gallery` and `probe`, or of both.

    enrolled: in place of a gallery folder, whose each row of stored features is, names [G].
    Names of images are relative to ROOT, to the parent of the folders, or to what contains all of them.
    """
    folders = {side: folder for side, folder in (("gallery", gallery), ("probe", probe)) if folder}
    inside = [os.path.abspath(pairs[1])] if pairs else []
    inside += [os.path.dirname(os.path.abspath(folder)) for folder in folders.values()]
    root = os.path.commonpath(inside)
    rows = {}  # path relative to root: row
    people_of = {side: _listed(side, folder, root, rows) for side, folder in folders.items()}
    if enrolled is not None:
        people_of["gallery"] = np.arange(len(enrolled)), enrolled
    paired = _read_pairs(*pairs, root, rows) if pairs else None
    name, source = os.path.basename(root) or "own", pathlib.Path(pairs[0] if pairs else root).resolve()
    return CropSet(name, source, Crops(root, np.array(list(rows)), pairs), paired, people_of, enrolled is not None)


def _listed(side, folder, root, rows):
    """`(rows [Q], people [Q])` of the images in the sub-folders of `folder`; adds them to `rows`."""
    found = []
    try:
        people = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        for person in people:
            names = sorted(name for name in os.listdir(os.path.join(folder, person)) if name[0] != ".")
            if not names:
                raise EvalError(f"{os.path.join(folder, person)}: no image in it; remove the folder, or fill it")
            found += [(os.path.relpath(os.path.join(folder, person, name), root), person) for name in names]
    except OSError as error:
        raise EvalError(
            f"--{side} {folder}: cannot be read ({error.strerror}); give a folder with a sub-folder of images a person"
        ) from None
    if not found:
        raise EvalError(f"--{side} {folder}: no sub-folder; give a folder with a sub-folder of images for each person")
    numbers = [rows.setdefault(path, len(rows)) for path, _ in found]
    return np.array(numbers), np.array([person for _, person in found])


def _read_pairs(path, folder, root, rows):
    """`(first [P], second [P], label bool [P])` of a list, rows of `rows`, to which its images are added."""
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", error)
        raise EvalError(f"--pairs {path}: cannot be read ({why}); give a text file of pairs and their ROOT") from None
    above = os.path.relpath(os.path.abspath(folder), root)
    found = []
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) != 3 or fields[2].strip() not in ("0", "1") or not fields[0] or not fields[1]:
            raise EvalError(
                f"{path} line {number}: expected `first<TAB>second<TAB>1 or 0`, found {line[:80]!r}; correct the line"
            )
        names = (os.path.normpath(os.path.join(above, name)) for name in fields[:2])
        found.append([*(rows.setdefault(name, len(rows)) for name in names), fields[2].strip() == "1"])
    if len(found) < 2:
        raise EvalError(f"{path}: {len(found)} pairs; give genuine and impostor pairs")
    first, second, label = (np.array(column) for column in zip(*found))
    return first, second, label
