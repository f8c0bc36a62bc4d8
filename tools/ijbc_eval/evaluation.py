"""A subset, its caches and the two tests, for any two models; shared by ijbc_eval.py and compat_report.py."""

import functools
import pathlib
import sys

import numpy as np

from losses import part_compared
from tools.ijbc_eval.embed import EmbeddingStore
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.metrics import pair_scores, search
from tools.ijbc_eval.protocol import Protocol
from tools.ijbc_eval.templates import Setting, as_query, template_features

DEFAULT_CACHE = pathlib.Path("IJB_result") / "cache"


class Evaluation:
    """Protocol and embeddings of one subset. Each part is read or computed on first use, and only once.

    In both tests each side has its model: the *gallery* side is what was enrolled, the 1:N gallery or the first
    template of a pair; the *probe* side is the query. Two models make a cross-test, the same one twice a self-test.
    """

    def __init__(self, data_dir, subset="IJBC", cache_dir=DEFAULT_CACHE, fresh=False, **store_options):
        """fresh: ignore what is cached. store_options: further arguments of EmbeddingStore."""
        self.protocol = Protocol(data_dir, subset, cache_dir, fresh)
        self._store_options = {"cache_dir": cache_dir, "fresh": fresh, **store_options}
        self._templates = {}

    @functools.cached_property
    def faces(self):
        return self.protocol.faces()

    @functools.cached_property
    def store(self):
        return EmbeddingStore(self.protocol, self.faces, **self._store_options)

    @functools.cached_property
    def pairs(self):
        pairs = self.protocol.pairs(self.faces)
        listed = np.concatenate([pairs.first_templates, pairs.second_templates])
        self._note_unlisted(listed, self.protocol.pair_file, "pair")
        return pairs

    @functools.cached_property
    def galleries(self):
        """Gallery name -> protocol.Subjects."""
        return {name: self.protocol.gallery(name, self.faces) for name in self.protocol.gallery_files}

    @functools.cached_property
    def probes(self):
        probes = self.protocol.probes(self.faces)
        for name, gallery in self.galleries.items():
            if not np.isin(probes.subject, gallery.subject).any():
                enrolled = self.protocol.gallery_files[name].name
                raise EvalError(
                    f"{self.protocol.probe_file}: no probe is of a subject in {enrolled}; one of the two files is "
                    "truncated or from another release"
                )
        listed = np.concatenate([probes.template, *(gallery.template for gallery in self.galleries.values())])
        self._note_unlisted(listed, self.protocol.root / "meta", "1:N list")
        return probes

    @functools.cached_property
    def subjects(self):
        """`(ids int64 [S], ascending; subject int32 [T])`: whose each template is, as a row of ids, by the 1:N lists.

        EvalError if two lists disagree, or if a template of the 1:1 list is in none of them.
        """
        lists = {self.protocol.gallery_files[name]: gallery for name, gallery in self.galleries.items()}
        lists[self.protocol.probe_file] = self.probes
        ids, rows = np.unique(np.concatenate([one.subject for one in lists.values()]), return_inverse=True)
        subject = np.full(len(self.faces.template_ids), -1, np.int32)
        for path, one in lists.items():
            mine, rows = rows[: len(one.template)], rows[len(one.template) :]
            other = (subject[one.template] >= 0) & (subject[one.template] != mine)
            if other.any():
                row = int(np.argmax(other))
                template = self.faces.template_ids[one.template[row]]
                raise EvalError(
                    f"{path}: template {template} is of subject {one.subject[row]} here but of subject "
                    f"{ids[subject[one.template[row]]]} in another 1:N list; correct one of them"
                )
            subject[one.template] = mine
        paired = np.concatenate([self.pairs.first_templates, self.pairs.second_templates])
        if subject[paired].min() < 0:
            template = self.faces.template_ids[paired[np.argmin(subject[paired])]]
            raise EvalError(
                f"{self.protocol.pair_file}: template {template} is in no 1:N list, so it is not known whose it is; "
                "complete the csv files"
            )
        return ids, subject

    def read_lists(self):
        """Read the 1:1 and 1:N lists, so that a mistake in any of them is an EvalError now, not after hours."""
        return self.pairs, self.galleries, self.probes, self.subjects

    def _note_unlisted(self, listed, where, what):
        """A list that was cut off at the end of a line is betrayed only by the templates that it does not reach."""
        absent = len(self.faces.template_ids) - len(np.unique(listed))
        if absent:
            print(f"note: {where}: {absent} templates are in no {what}; is every list complete?", file=sys.stderr)

    def check_widths(self, gallery_model, probe_model):
        """Say how queries are compared with a gallery of another embedding size; called before hours of embedding.

        A probe model that was trained against another old model than the gallery's gets a line on stderr.
        """
        probe_model.warn_of_another_old_model(gallery_model)
        widths = self.store.width(gallery_model), self.store.width(probe_model)
        if widths[0] != widths[1]:
            compared = part_compared(widths[1], widths[0])
            print(
                f"note: {probe_model.file} has {widths[1]}-dimensional embeddings, {gallery_model.file} "
                f"{widths[0]}-dimensional ones; queries are compared with the gallery {compared}",
                file=sys.stderr,
            )

    def templates(self, model, setting=Setting()):
        """Template features of a model, float32 [T, D], L2-normalised; the last eight are cached."""
        key = model, setting
        if key not in self._templates:
            found = self.store.get(model)
            self._check_templates_have_images(found.bad)
            while len(self._templates) >= 8:  # enough for a report's models or the eight settings of -B
                self._templates.pop(next(iter(self._templates)))
            self._templates[key] = template_features(found.embs, found.embs_f, self.faces, setting, found.bad)
        return self._templates[key]

    def bad_images(self, *models):
        """Sorted names of the images that were unusable for any of the models, for the result file."""
        bad = np.logical_or.reduce([self.store.get(model).bad for model in models])
        return np.sort(self.faces.names[bad]).astype(str)

    def verify(self, gallery_model, probe_model, setting=Setting()):
        """1:1: cosine of each pair, float32 [P]: the first template by the gallery model, the second by the other."""
        _ = self.pairs  # first, so that a mistake in the list shows before hours of embedding
        return self.verify_in(self.templates(gallery_model, setting), self.templates(probe_model, setting))

    def verify_in(self, first, second):
        """As `verify`, with given template features [T, D] of both sides, of any widths."""
        pairs, second = self.pairs, as_query(second, first.shape[1])
        return pair_scores(first[pairs.first_templates], second[pairs.second_templates], pairs.first, pairs.second)

    def identify(self, gallery_model, probe_model, setting=Setting()):
        """1:N: an metrics.Search for each gallery, in the order of `galleries`."""
        _ = self.probes  # lists first, as in `verify`; reading the probes reads the galleries too
        return self.identify_in(self.templates(gallery_model, setting), self.templates(probe_model, setting))

    def identify_mixed(self, gallery_model, probe_model, setting=Setting()):
        """1:N in all galleries merged into one: ranks int32 [Q] as in metrics.Search, for the "mixed" row."""
        _ = self.probes
        return self.identify_mixed_in(self.templates(gallery_model, setting), self.templates(probe_model, setting))

    def identify_mixed_in(self, gallery_features, probe_features):
        """As `identify_mixed`, with given template features [T, D] of both sides, of any widths."""
        probes, galleries = self.probes, self.galleries.values()
        probe_features = as_query(probe_features, gallery_features.shape[1])
        template, subject = (
            np.concatenate([getattr(gallery, what) for gallery in galleries]) for what in ("template", "subject")
        )
        return search(gallery_features[template], subject, probe_features[probes.template], probes.subject).rank

    def identify_in(self, gallery_features, probe_features):
        """As `identify`, with given template features [T, D] of both sides, of any widths."""
        probes = as_query(probe_features, gallery_features.shape[1])[self.probes.template]
        return [
            search(gallery_features[gallery.template], gallery.subject, probes, self.probes.subject)
            for gallery in self.galleries.values()
        ]

    def _check_templates_have_images(self, bad):
        faces = self.faces
        if bad.any():
            counts = ~bad[faces.image] & (faces.scores[faces.image] > 0)
            left = np.bincount(faces.template[counts], minlength=len(faces.template_ids))
            if not left.all():
                row = int(np.argmin(left))
                line = int(np.argmax(faces.template == row)) + 1
                raise EvalError(
                    f"{self.protocol.face_file} line {line}: all images of template {faces.template_ids[row]} are "
                    "unusable, or have the detection score 0; restore at least one of them"
                )
