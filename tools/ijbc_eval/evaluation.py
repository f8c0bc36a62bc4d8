"""An evaluation set, its caches and the two tests, for any two models; shared by ijbc_eval.py and compat_report.py."""

import functools
import pathlib
import sys

import numpy as np

from losses import part_compared
from tools.ijbc_eval.embed import EmbeddingStore
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.metrics import pair_scores, search
from tools.ijbc_eval.stored import StoredFeatures
from tools.ijbc_eval.templates import Setting, as_query, template_features

DEFAULT_CACHE = pathlib.Path("IJB_result") / "cache"


class Evaluation:
    """Lists and embeddings of one evaluation set. Each part is read or computed on first use, and only once.

    In both tests each side has its model: the *gallery* side is what was enrolled, the 1:N gallery or the first
    template of a pair; the *probe* side is the query. Two models make a cross-test, the same one twice a self-test.
    """

    def __init__(self, evaluation_set, cache_dir=DEFAULT_CACHE, fresh=False, **store_options):
        """fresh: ignore what is cached. store_options: further arguments of EmbeddingStore."""
        self.set = evaluation_set
        self._store_options = {"cache_dir": cache_dir, "fresh": fresh, **store_options}
        self._templates = {}

    @functools.cached_property
    def faces(self):
        return self.set.faces()

    @functools.cached_property
    def store(self):
        return EmbeddingStore(self.set, self.faces, **self._store_options)

    @functools.cached_property
    def pairs(self):
        """evaluation_set.Pairs, None where the set has none."""
        return self.set.pairs(self.faces) if self.set.has_pairs else None

    @functools.cached_property
    def galleries(self):
        """Gallery name -> evaluation_set.Subjects."""
        return self.set.galleries(self.faces) if self.set.has_gallery else {}

    @functools.cached_property
    def probes(self):
        """evaluation_set.Subjects, None where the set has no gallery."""
        return self.set.probes(self.faces, self.galleries) if self.set.has_gallery else None

    @functools.cached_property
    def subjects(self):
        """`(names of the people [S], int32 [T])`, as EvaluationSet.people."""
        return self.set.people(self.faces, self.pairs, self.galleries, self.probes)

    def person_of(self, template):
        """Name of the person of a template, a row of template_ids; a number in IJB."""
        names, subject = self.subjects
        return names[subject[template]]

    def read_lists(self):
        """Read the 1:1 and 1:N lists, so that a mistake in any of them is an EvalError now, not after hours."""
        return self.pairs, self.galleries, self.probes, self.subjects

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
        """Template features of a model, float32 [T, D], L2-normalised; the last eight are cached.

        Of stored features: zeros where there is no row, see `require_rows`; of a gallery that exists only as stored
        features, that gallery's.
        """
        if isinstance(model, StoredFeatures) and self.set.stored_gallery:
            return model.people
        key = model, setting
        if key not in self._templates:
            found = self.store.get(model)
            if not isinstance(model, StoredFeatures):
                self._check_templates_have_images(found.bad)
            while len(self._templates) >= 8:  # enough for a report's models or the eight settings of -B
                self._templates.pop(next(iter(self._templates)))
            self._templates[key] = template_features(found.embs, found.embs_f, self.faces, setting, found.bad)
        return self._templates[key]

    def require_rows(self, model, templates, role):
        """EvalError if stored features have no row for an image of `templates`, rows; role: what they are needed as."""
        if not isinstance(model, StoredFeatures) or self.set.stored_gallery:
            return
        lacking = ~self.templates(model)[templates].any(axis=1)
        if lacking.any():
            template = templates[np.argmax(lacking)]
            image = self.faces.image[np.argmax(self.faces.template == template)]
            raise EvalError(
                f"{model.file}: no row for {self.store.images.name(image)} and {np.count_nonzero(lacking) - 1} more, "
                f"needed as {role}; store the old features of these images too, and name them in {model.labels}"
            )

    def require_all_rows(self, model):
        """`require_rows` of both sides of each test: for M(old, old)."""
        sides = [self.pairs.first_templates, self.pairs.second_templates] if self.pairs else []
        sides += [one.template for one in (*self.galleries.values(), self.probes)] if self.probes else []
        self.require_rows(model, np.concatenate(sides), "the old model's gallery or queries, for M(old, old)")

    def bad_images(self, *models):
        """Sorted names of the images that were unusable for any of the models, for the result file."""
        models = [model for model in models if not isinstance(model, StoredFeatures)]
        bad = np.logical_or.reduce([self.store.get(model).bad for model in models])
        return np.sort(self.faces.names[bad]).astype(str)

    def verify(self, gallery_model, probe_model, setting=Setting()):
        """1:1: cosine of each pair, float32 [P]: the first template by the gallery model, the second by the other."""
        self.require_rows(gallery_model, self.pairs.first_templates, "the first of a pair")  # lists first, too
        return self.verify_in(self.templates(gallery_model, setting), self.templates(probe_model, setting))

    def verify_in(self, first, second):
        """As `verify`, with given template features [T, D] of both sides, of any widths."""
        pairs, second = self.pairs, as_query(second, first.shape[1])
        return pair_scores(first[pairs.first_templates], second[pairs.second_templates], pairs.first, pairs.second)

    def identify(self, gallery_model, probe_model, setting=Setting()):
        """1:N: an metrics.Search for each gallery, in the order of `galleries`."""
        _ = self.probes  # lists first, as in `verify`; reading the probes reads the galleries too
        for gallery in self.galleries.values():
            self.require_rows(gallery_model, gallery.template, "an entry of the gallery")
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
                raise self.set.without_image(faces, int(np.argmin(left)))
