"""A subset, its caches and the two tests, for any two models: what ijbc_eval.py and compat_report.py both stand on."""

import functools
import pathlib
import sys

import numpy as np

from tools.ijbc_eval.embed import EmbeddingStore
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.identification import search
from tools.ijbc_eval.meta import Protocol
from tools.ijbc_eval.models import INPUT_SCALE
from tools.ijbc_eval.templates import Setting, template_features
from tools.ijbc_eval.verification import pair_scores

DEFAULT_CACHE = pathlib.Path("IJB_result") / "cache"


class Evaluation:
    """Protocol and embeddings of one subset. Every part is read or computed when first needed, and only once.

    In both tests the two sides may have different models (cross-test): the *gallery* side holds what was enrolled, the
    1:N gallery or the first template of a pair; the *probe* side asks. The same model on both sides is a self-test.
    """

    def __init__(
        self,
        data_dir,
        subset="IJBC",
        cache_dir=DEFAULT_CACHE,
        batch_size=128,
        workers=2,
        skip_bad=False,
        fresh=False,
        device=None,
        input_scale=INPUT_SCALE,
    ):
        self.protocol = Protocol(data_dir, subset, cache_dir, fresh)
        self._store_options = cache_dir, batch_size, workers, skip_bad, fresh, device, input_scale
        self._templates = {}

    @functools.cached_property
    def faces(self):
        return self.protocol.faces()

    @functools.cached_property
    def store(self):
        return EmbeddingStore(self.protocol, self.faces, *self._store_options)

    @functools.cached_property
    def pairs(self):
        return self.protocol.pairs(self.faces)

    @functools.cached_property
    def galleries(self):
        """Gallery name -> meta.Subjects."""
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
        self._note_unlisted(probes)
        return probes

    def read_lists(self):
        """Read the 1:1 and 1:N lists, so that a mistake in any of them is an EvalError now and not after hours."""
        return self.pairs, self.galleries, self.probes

    def _note_unlisted(self, probes):
        """The official lists name every template; a list cut off at a line's end shows in nothing but this."""
        listed = np.concatenate([probes.template, *(gallery.template for gallery in self.galleries.values())])
        absent = len(self.faces.template_ids) - len(np.unique(listed))
        if absent:
            meta = self.protocol.root / "meta"
            print(f"note: {absent} templates are in no 1:N list of {meta}; are the csv files whole?", file=sys.stderr)

    def check_widths(self, gallery_model, probe_model):
        """EvalError unless both models' embeddings have the same size; called before hours go into embedding."""
        widths = self.store.width(gallery_model), self.store.width(probe_model)
        if widths[0] != widths[1]:
            raise EvalError(
                f"{probe_model.file} has {widths[1]}-dimensional embeddings, {gallery_model.file} "
                f"{widths[0]}-dimensional ones: they cannot be compared; a cross-test needs models of one size"
            )

    def templates(self, model, setting=Setting()):
        """Template features of a model, float32 [T, D], L2-normalised; the last few are kept."""
        key = model, setting
        if key not in self._templates:
            found = self.store.get(model)
            self._check_templates_have_images(found.bad)
            while len(self._templates) >= 8:  # several models in one report, or the eight settings of a bunch
                self._templates.pop(next(iter(self._templates)))
            self._templates[key] = template_features(found.embs, found.embs_f, self.faces, setting, found.bad)
        return self._templates[key]

    def bad_images(self, *models):
        """Names of the images that were unreadable for any of the models, sorted; for the result file."""
        bad = np.logical_or.reduce([self.store.get(model).bad for model in models])
        return np.sort(self.faces.names[bad]).astype(str)

    def verify(self, gallery_model, probe_model, setting=Setting()):
        """1:1: cosine of each pair, float32 [P]; the first of a pair by the gallery model, the second by the other."""
        pairs = self.pairs  # first of all: a mistake in the list is to show before hours go into embedding
        first, second = self.templates(gallery_model, setting), self.templates(probe_model, setting)
        return pair_scores(first[pairs.first_templates], second[pairs.second_templates], pairs.first, pairs.second)

    def identify(self, gallery_model, probe_model, setting=Setting()):
        """1:N: an identification.Search for each gallery, in the order of `galleries`."""
        _ = self.probes  # as in `verify`: the lists come first, and reading the probes reads the galleries too
        return self.identify_in(self.templates(gallery_model, setting), self.templates(probe_model, setting))

    def identify_mixed(self, gallery_model, probe_model, setting=Setting()):
        """1:N in the galleries stacked to one: ranks int32 [Q] as in identification.Search, for the row "mixed"."""
        probes, galleries = self.probes, self.galleries.values()
        template, subject = (
            np.concatenate([getattr(gallery, what) for gallery in galleries]) for what in ("template", "subject")
        )
        asked = self.templates(probe_model, setting)[probes.template]
        return search(self.templates(gallery_model, setting)[template], subject, asked, probes.subject).rank

    def identify_in(self, gallery_features, probe_features):
        """As `identify`, with template features [T, D] given, so that a gallery may hold a mixture of two models'."""
        probes = probe_features[self.probes.template]
        return [
            search(gallery_features[gallery.template], gallery.subject, probes, self.probes.subject)
            for gallery in self.galleries.values()
        ]

    def _check_templates_have_images(self, bad):
        if bad.any():
            left = np.bincount(self.faces.template[~bad[self.faces.image]], minlength=len(self.faces.template_ids))
            if not left.all():
                row = int(np.argmin(left))
                line = int(np.argmax(self.faces.template == row)) + 1
                raise EvalError(
                    f"{self.protocol.face_file} line {line}: all images of template {self.faces.template_ids[row]} are "
                    "unreadable, so it has no feature; restore at least one of them"
                )
