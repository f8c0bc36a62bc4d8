"""What is evaluated: images that form templates, pairs of templates (1:1), galleries and probes (1:N).

`EvaluationSet` is the seam: IJB (protocol.py), lists of pairs, folders and .bin files (own_set.py) fill it in, and all
else, from the cached embeddings to the report, is written once for any of them.
"""

import abc
import dataclasses

import numpy as np

from tools.ijbc_eval.metrics import FPIRS, FPRS

# The published IJB scripts feed (x − 127.5) / 128, while published training and feature extraction feed
# (x − 127.5) / 127.5. 128 is the default, so that figures compare with published ones; --input-scale changes it.
INPUT_SCALE = 128.0


@dataclasses.dataclass
class Faces:
    """names [N] (bytes or str), scores float32 [N] (>= 0): one entry per image; landmarks float32 [N, 5, 2] (pixels),
    None for aligned crops.

    image, template, medium int32 [F]: one entry per use of an image (IJB: line of face_tid_mid); rows of the arrays
    above, rows of `template_ids` (int64 [T], ascending) and a number unique to each medium of a template.
    """

    names: np.ndarray
    landmarks: np.ndarray | None
    scores: np.ndarray
    image: np.ndarray
    template: np.ndarray
    medium: np.ndarray
    template_ids: np.ndarray


@dataclasses.dataclass
class Pairs:
    """The 1:1 list, with the templates of each side numbered separately (see metrics.pair_scores).

    first_templates, second_templates int32 [A], [B]: rows of Faces.template_ids that occur first and second in pairs.
    first, second int32 [P]: indices into those two; label bool [P]: same person.
    """

    first_templates: np.ndarray
    second_templates: np.ndarray
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray

    @classmethod
    def of_rows(cls, rows, label, templates):
        """From rows of the pairs' templates, two int [P] below `templates`, and labels [P]."""
        (firsts, first), (seconds, second) = (_renumbered(side, templates) for side in rows)
        return cls(firsts, seconds, first, second, label.astype(bool))

    def rows(self):
        """The templates of each pair: int32 [P], [P], rows of Faces.template_ids."""
        return self.first_templates[self.first], self.second_templates[self.second]


def _renumbered(rows, size):
    """The distinct values of `rows`, ascending, and `rows` as indices into them; all values are below `size`."""
    used = np.zeros(size, bool)
    used[rows] = True
    distinct = np.flatnonzero(used).astype(np.int32)
    position = np.zeros(size, np.int32)
    position[distinct] = np.arange(len(distinct), dtype=np.int32)
    return distinct, position[rows]


@dataclasses.dataclass
class Subjects:
    """One gallery, or the probes: template int32 [Q] (rows of Faces.template_ids, each once), subject int64 [Q]."""

    template: np.ndarray
    subject: np.ndarray


class EvaluationSet(abc.ABC):
    """One evaluation set. Lists are read, and mistakes in them found, when a part is asked for.

    name: in tables and file names. key: in the names of cached files, another for each place on disk.
    fprs, fpirs: rates at which the tables show TPR and TPIR; fpr, fpir: those of a report unless told otherwise.
    input_scale: of the models' input, unless told otherwise. folds: whether ten-fold accuracy is customary.
    has_pairs, has_gallery: whether there is anything to test 1:1, 1:N. stored_gallery: whether the gallery exists only
    as stored features of the old side; its templates are then their rows, and no other model can embed it.
    people_known: false where `people` may take one person for several.
    """

    name = key = ""
    fprs, fpirs = FPRS, FPIRS
    fpr, fpir = 1e-4, 1e-2
    input_scale = INPUT_SCALE
    folds = False
    has_pairs = has_gallery = True
    stored_gallery = False
    people_known = True
    separator = None  # of the columns in files that name its people or templates; None: blanks

    @abc.abstractmethod
    def faces(self):
        """The Faces."""

    @abc.abstractmethod
    def images(self, faces):
        """The images.Images of `faces`."""

    @abc.abstractmethod
    def pairs(self, faces):
        """The Pairs."""

    @abc.abstractmethod
    def galleries(self, faces):
        """Gallery name -> Subjects."""

    @abc.abstractmethod
    def probes(self, faces, galleries):
        """The Subjects that are searched; EvalError if nobody of a gallery is among them."""

    @abc.abstractmethod
    def people(self, faces, pairs, galleries, probes):
        """`(names [S] of the people, ascending; int32 [T]: whose each template is, as a row of them, −1: in no list)`.

        pairs, galleries, probes: as above, None where the set has none. EvalError if lists disagree.
        """

    def template_names(self, faces):
        """How files name the templates: numbers or text [T]."""
        return faces.template_ids

    @abc.abstractmethod
    def without_image(self, faces, template):
        """An EvalError: no image of the template, a row of template_ids, is usable."""
