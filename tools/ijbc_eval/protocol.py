"""The protocol files of IJB-B and IJB-C: faces, pairs, galleries and probes, checked line by line and cached.

{subset}_name_5pts_score.txt       name x1 y1 … x5 y5 score      a cropped image, its landmarks, its detection score
{subset}_face_tid_mid.txt          name template medium          which template and medium the image belongs to
{subset}_template_pair_label.txt   template template label       1:1; label 1 = same person
{subset}_1N_gallery_*.csv, {subset}_1N_probe_mixed.csv           TEMPLATE_ID,SUBJECT_ID,…  a row per image
"""

import hashlib
import json
import os
import pathlib
import posixpath
import sys

import numpy as np

from tools.ijbc_eval.align import MISFIT, misfit
from tools.ijbc_eval.ascii_table import MAX_DIGITS, is_number, read_int_table
from tools.ijbc_eval.evaluation_set import EvaluationSet, Faces, Pairs, Subjects
from tools.ijbc_eval.files import EvalError, stamp, writing
from tools.ijbc_eval.images import LooseCrops

SUBSETS = {"IJBC": ("G1", "G2"), "IJBB": ("S1", "S2")}
_CACHE_VERSION = 3  # increment when the meaning of a cached array changes, or what is refused
_LONGEST_NAME = 255


class Protocol(EvaluationSet):
    """The files of one subset ("IJBC" or "IJBB") under `data_dir`, read on demand.

    Nothing is written to the data directory. A cached part is used as long as its source files keep their size,
    modification time and inode change time. `fresh=True` always reads the files.
    """

    def __init__(self, data_dir, subset, cache_dir, fresh=False):
        if subset not in SUBSETS:
            raise EvalError(f"-s {subset}: unknown subset; use {' or '.join(SUBSETS)}")
        self.name, self.fresh = subset, fresh
        self.root = pathlib.Path(data_dir).resolve() / subset
        self.key = f"{subset}_{hashlib.sha256(str(self.root).encode()).hexdigest()[:16]}"
        self.cache_dir = pathlib.Path(cache_dir)
        self.image_dir = self.root / "loose_crop"
        prefix = self.root / "meta" / subset.lower()
        self.landmark_file = pathlib.Path(f"{prefix}_name_5pts_score.txt")
        self.face_file = pathlib.Path(f"{prefix}_face_tid_mid.txt")
        self.pair_file = pathlib.Path(f"{prefix}_template_pair_label.txt")
        self.probe_file = pathlib.Path(f"{prefix}_1N_probe_mixed.csv")
        self.gallery_files = {name: pathlib.Path(f"{prefix}_1N_gallery_{name}.csv") for name in SUBSETS[subset]}
        if not os.path.isdir(self.root / "meta"):
            raise EvalError(
                f"{self.root / 'meta'}: no such directory; set -d to the directory of {subset}/meta and "
                f"{subset}/loose_crop"
            )

    def faces(self):
        sources = [self.landmark_file, self.face_file]
        faces = Faces(**self._cached("faces", sources, lambda: vars(read_faces(*sources))))
        apart = misfit(faces.landmarks) > MISFIT
        if apart.any():
            print(
                f"note: {self.landmark_file}: {np.count_nonzero(apart)} of {len(apart)} lines have landmarks unlike "
                f"an upright face, the first in line {np.argmax(apart) + 1}: full profiles, faces turned by more than "
                "60 degrees, or points in another order than eyes, nose, mouth corners, each from left to right",
                file=sys.stderr,
            )
        return faces

    def pairs(self, faces):
        def read():
            return vars(read_pairs(self.pair_file, self.face_file, faces.template_ids))

        pairs = Pairs(**self._cached("pairs", [self.pair_file, self.face_file], read))
        self._note_unlisted(faces, [pairs.first_templates, pairs.second_templates], self.pair_file, "pair")
        return pairs

    def galleries(self, faces):
        return {name: self._subjects(path, f"gallery_{name}", faces) for name, path in self.gallery_files.items()}

    def probes(self, faces, galleries):
        probes = self._subjects(self.probe_file, "probe", faces)
        for name, gallery in galleries.items():
            if not np.isin(probes.subject, gallery.subject).any():
                raise EvalError(
                    f"{self.probe_file}: no probe is of a subject in {self.gallery_files[name].name}; one of the two "
                    "files is truncated or from another release"
                )
        listed = [probes.template, *(gallery.template for gallery in galleries.values())]
        self._note_unlisted(faces, listed, self.root / "meta", "1:N list")
        return probes

    def people(self, faces, pairs, galleries, probes):
        """Whose each template is, by the 1:N lists. EvalError if two of them disagree, or if a template of the 1:1 list
        is in none of them."""
        lists = {self.gallery_files[name]: gallery for name, gallery in galleries.items()} | {self.probe_file: probes}
        ids, rows = np.unique(np.concatenate([one.subject for one in lists.values()]), return_inverse=True)
        subject = np.full(len(faces.template_ids), -1, np.int32)
        for path, one in lists.items():
            mine, rows = rows[: len(one.template)], rows[len(one.template) :]
            other = (subject[one.template] >= 0) & (subject[one.template] != mine)
            if other.any():
                row = int(np.argmax(other))
                raise EvalError(
                    f"{path}: template {faces.template_ids[one.template[row]]} is of subject {one.subject[row]} here "
                    f"but of subject {ids[subject[one.template[row]]]} in another 1:N list; correct one of them"
                )
            subject[one.template] = mine
        paired = np.concatenate([pairs.first_templates, pairs.second_templates])
        if subject[paired].min() < 0:
            template = faces.template_ids[paired[np.argmin(subject[paired])]]
            raise EvalError(
                f"{self.pair_file}: template {template} is in no 1:N list, so it is not known whose it is; complete "
                "the csv files"
            )
        return ids, subject

    def images(self, faces):
        return LooseCrops(self.image_dir, faces, self.landmark_file)

    def without_image(self, faces, template):
        return EvalError(
            f"{self.face_file} line {int(np.argmax(faces.template == template)) + 1}: all images of template "
            f"{faces.template_ids[template]} are unusable, or have the detection score 0; restore at least one of them"
        )

    def _note_unlisted(self, faces, listed, where, what):
        """A list that was cut off at the end of a line is betrayed only by the templates that it does not reach."""
        absent = len(faces.template_ids) - len(np.unique(np.concatenate(listed)))
        if absent:
            print(f"note: {where}: {absent} templates are in no {what}; is every list complete?", file=sys.stderr)

    def _subjects(self, path, part, faces):
        def read():
            return vars(read_subjects(path, self.face_file, faces.template_ids))

        return Subjects(**self._cached(part, [path, self.face_file], read))

    def _cached(self, part, sources, read):
        made_from = json.dumps([_CACHE_VERSION, part, [stamp(path) for path in sources]])
        path = self.cache_dir / "meta" / f"{self.key}_{part}.npz"
        if os.path.exists(path) and not self.fresh:
            try:
                with np.load(path) as saved:
                    arrays = {key: saved[key] for key in saved.files}
                if str(arrays.pop("made_from", "")) == made_from:
                    if str(arrays.pop("digest")) == _digest(arrays):
                        return arrays
                    raise ValueError("its digest does not match")
            except Exception as error:  # whatever NumPy and zipfile raise on damaged bytes
                print(f"{path}: damaged cache ({error}); reading the files again", file=sys.stderr)
        arrays = read()
        with writing(path) as file:
            np.savez(file, made_from=np.array(made_from), digest=np.array(_digest(arrays)), **arrays)
        return arrays


def _digest(arrays):
    digest = hashlib.sha256()
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def read_faces(landmark_file, face_file):
    """Faces from the landmark file and the face list; every line is checked."""
    points = _read_table(landmark_file, [("values", "f8", 11)], "name x1 y1 … x5 y5 score")
    listed = _read_table(face_file, [("template", "i8"), ("medium", "i8")], "name template medium")
    names = points["name"]
    with np.errstate(over="ignore"):
        values = points["values"].astype(np.float32)
    landmarks, scores = values[:, :10].reshape(-1, 5, 2), values[:, 10]
    _check_values(landmark_file, landmarks, scores)
    image = _match_names(names, listed["name"], landmark_file, face_file)
    if min(listed["template"].min(), listed["medium"].min()) < 0:
        line = int(np.argmax((listed["template"] < 0) | (listed["medium"] < 0))) + 1
        raise EvalError(f"{face_file} line {line}: template and medium numbers must not be negative; correct the line")
    template_ids, template = np.unique(listed["template"], return_inverse=True)
    _check_some_score(face_file, landmark_file, template_ids, template, scores[image])
    medium_ids, medium = np.unique(listed["medium"], return_inverse=True)
    # Medium numbers are local to a template: the same number in two templates means two media.
    medium = np.unique(template * len(medium_ids) + medium, return_inverse=True)[1]
    return Faces(
        names,
        landmarks,
        scores,
        image.astype(np.int32),
        template.astype(np.int32),
        medium.astype(np.int32),
        template_ids,
    )


def _match_names(names, listed, landmark_file, face_file):
    """The row in `names` of each listed name; EvalError unless both files have the same images, `names` each once."""
    row_of = {name: row for row, name in enumerate(names.tolist())}
    if len(row_of) < len(names):
        line = next(row for row, name in enumerate(names.tolist()) if row_of[name] != row) + 1
        name = names[line - 1].decode()
        raise EvalError(f"{landmark_file} line {line}: {name} is listed again below; keep one of the lines")
    hint = "use two files of one release, both complete"
    image = np.array([row_of.get(name, -1) for name in listed.tolist()])
    if image.min() < 0:
        line = int(np.argmax(image < 0)) + 1
        name = listed[line - 1].decode()
        raise EvalError(f"{face_file} line {line}: {name} has no line in {landmark_file.name}; {hint}")
    used = np.bincount(image, minlength=len(names)) > 0
    if not used.all():
        line = int(np.argmin(used)) + 1
        name = names[line - 1].decode()
        raise EvalError(
            f"{landmark_file} line {line}: {name} has no line in {face_file.name}, so it belongs to no template; {hint}"
        )
    return image


def _check_values(path, landmarks, scores):
    finite = np.isfinite(landmarks).all(axis=(1, 2)) & np.isfinite(scores)
    if not finite.all():
        line = np.argmin(finite) + 1
        raise EvalError(f"{path} line {line}: landmarks and score must be finite float32 numbers; correct the line")
    spread = np.ptp(landmarks, axis=1).max(axis=1) > 0
    if not spread.all():
        raise EvalError(f"{path} line {np.argmin(spread) + 1}: all five landmarks are one point; correct the line")
    if scores.min() < 0:
        line = np.argmax(scores < 0) + 1
        raise EvalError(f"{path} line {line}: detection score {scores[line - 1]:g}: must not be negative; correct it")


def _check_some_score(face_file, landmark_file, template_ids, template, scores):
    """EvalError if all images of a template have the score 0, which weights them: nothing would be left of it."""
    weighted = np.bincount(template[scores > 0], minlength=len(template_ids)) > 0
    if not weighted.all():
        row = int(np.argmin(weighted))
        raise EvalError(
            f"{face_file} line {int(np.argmax(template == row)) + 1}: all images of template {template_ids[row]} have "
            f"the detection score 0 in {landmark_file.name}; give one of them a score above 0"
        )


def _read_table(path, columns, layout):
    """A text file as a structured array, one row per line, after its name; EvalError names the first malformed line."""
    lines = _read_text(path).rstrip().split("\n")
    if lines == [""]:
        raise EvalError(f"{path}: is empty; expected lines of `{layout}`")
    longest = min(max(map(len, _names(path, lines))), _LONGEST_NAME)
    columns = [("name", f"S{max(longest, 63) + 1}"), *columns]
    try:
        table = np.atleast_1d(np.loadtxt(lines, dtype=columns, comments=None))
    except (ValueError, OverflowError):
        table = None
    # loadtxt skips blank lines and truncates long names: accept its result only if neither can have happened.
    if table is None or len(table) != len(lines) or np.char.str_len(table["name"]).max() > longest:
        _find_bad_line(path, lines, columns, layout)
    for row in np.flatnonzero(np.char.find(table["name"], b"/") >= 0):
        table["name"][row] = posixpath.normpath(table["name"][row])  # "./1.jpg" is "1.jpg"
    return table


def _names(path, lines):
    """The first field of each line. EvalError unless all are ASCII: stored as bytes, half a million stay small."""
    names = [(line.split(maxsplit=1) or [""])[0] for line in lines]
    for number, name in enumerate(names, 1):
        if not name.isascii():
            raise EvalError(
                f"{path} line {number}: the image name {name[:80]!r} is not ASCII; rename the image in loose_crop and "
                "in both lists"
            )
    return names


def _find_bad_line(path, lines, columns, layout):
    def is_fine(line):
        try:
            return bool(line.strip()) and np.loadtxt([line], dtype=columns, comments=None).size == 1
        except (ValueError, OverflowError):
            return False

    long = _LONGEST_NAME
    bad = (row for row, line in enumerate(lines, 1) if not is_fine(line) or len(line.split()[0]) > long)
    number = next(bad, 1)
    raise EvalError(
        f"{path} line {number}: expected `{layout}` (numbers; a name of at most {long} letters), found "
        f"{lines[number - 1].strip()[:80]!r}; the file is damaged or truncated, download it again"
    )


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); check -d DIR and -s SUBSET") from None
    except UnicodeDecodeError:
        raise EvalError(f"{path}: not a text file; download it again") from None


def read_pairs(pair_file, face_file, template_ids):
    """Read the pairs; templates must be in `template_ids`, labels 0 or 1, and both labels must occur."""
    table = read_int_table(pair_file, 3, "template template label")
    rows = np.empty((2, len(table)), np.int32)
    for side in range(2):
        rows[side], known = _rows_of(template_ids, table[:, side])
        if not known.all():
            line = int(np.argmin(known))
            raise EvalError(
                f"{pair_file} line {line + 1}: template {table[line, side]} has no face in {face_file.name}; use two "
                "files of one release, both complete"
            )
    label = table[:, 2]
    if label.max() > 1:
        line = int(np.argmax(label > 1))
        raise EvalError(f"{pair_file} line {line + 1}: label {label[line]}; correct it to 1 (same person) or 0")
    if label.min() == label.max():
        kind = "genuine (label 1)" if label.max() == 0 else "impostor (label 0)"
        raise EvalError(f"{pair_file}: has no {kind} pair, so there is no ROC; check that the file is complete")
    return Pairs.of_rows(rows, label, len(template_ids))


def _rows_of(template_ids, ids):
    """Positions of `ids` in the ascending `template_ids`, and a mask of those found."""
    top = int(template_ids[-1])
    if top < 1 << 24:  # a lookup table, while it is small, is several times faster than a search
        table = np.full(top + 2, -1, np.int32)
        table[template_ids] = np.arange(len(template_ids), dtype=np.int32)
        rows = table[np.minimum(ids, top + 1)]
        return np.maximum(rows, 0), rows >= 0
    rows = np.minimum(np.searchsorted(template_ids, ids), len(template_ids) - 1)
    return rows.astype(np.int32), template_ids[rows] == ids


def read_subjects(path, face_file, template_ids):
    """Read a gallery's or the probes' templates in order of first appearance; header TEMPLATE_ID,SUBJECT_ID,…"""
    text = _read_text(path)
    header, *lines = text.rstrip().split("\n")
    separator = next((mark for mark in ",;\t" if mark in header), None)
    columns = [name.strip().upper() for name in header.split(separator)]
    if columns[:2] != ["TEMPLATE_ID", "SUBJECT_ID"]:
        raise EvalError(f"{path} line 1: {header[:80]!r} is not the header TEMPLATE_ID,SUBJECT_ID,…; add it")
    if not lines:
        raise EvalError(f"{path}: an empty list, only a header; download it again")
    if not text.endswith("\n"):
        if len(columns) == 2:  # with more columns, the subject is complete before the next separator
            raise EvalError(
                f"{path} line {len(lines) + 1}: the last line, {lines[-1][:80]!r}, has no newline and its subject may "
                "be truncated; add a newline if the file is complete, or download it again"
            )
        print(f"note: {path}: the last line has no newline; is the file complete?", file=sys.stderr)
    subject_of = {}
    for number, line in enumerate(lines, 2):
        fields = line.split(separator)
        if len(fields) != len(columns) or not all(is_number(field.strip()) for field in fields[:2]):
            raise EvalError(
                f"{path} line {number}: expected {len(columns)} fields, the first two numbers of at most {MAX_DIGITS} "
                f"digits, found {line.strip()[:80]!r}; the file is damaged or truncated, download it again"
            )
        template, subject = int(fields[0]), int(fields[1])
        if subject_of.setdefault(template, (subject, number))[0] != subject:
            raise EvalError(
                f"{path} line {number}: template {template} is of subject {subject} here but of subject "
                f"{subject_of[template][0]} in line {subject_of[template][1]}; correct one of the lines"
            )
    rows, known = _rows_of(template_ids, np.array(list(subject_of), np.int64))
    if not known.all():
        template = list(subject_of)[int(np.argmin(known))]
        raise EvalError(
            f"{path} line {subject_of[template][1]}: template {template} has no face in {face_file.name}; use two "
            "files of one release, both complete"
        )
    return Subjects(rows.astype(np.int32), np.array([subject for subject, _ in subject_of.values()], np.int64))
