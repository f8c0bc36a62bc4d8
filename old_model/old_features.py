"""The old model's features of a training set: reads the rows of a batch and checks their labels.

old_model/feature_set.py lists the files and the commands that write them. The loader's workers read the rows of the
images that they decode (engine/loader.py), so a method finds them in its batch.
"""

import pathlib

import numpy as np

from old_model.feature_set import FeatureError, RowFile, label_path, rewrite, right_file

LABELS_SAMPLED = 1024  # rows whose labels are compared with the record file on opening
FLAGS = 1 << 20  # credible flags read at once, until one is set


class OldFeatures:
    """The old model's features, labels and credible flags of every image of a training set.

    train_set: a data set of dataset.py; row i of every file belongs to its image i. Lengths and an even sample of the
        labels are checked here, all labels batch by batch (`compare_labels`).
    feature_path: …_feature.npy, float [N, D]. labels_path: int [N]; "" or None = the …_label.npy beside it.
    credible_path: bool [N], such as …_credible_ratio_90_feature.npy; "" or None = every row is credible.

    `width` is D. `features` and `labels` are RowFiles: nothing is read before it is needed, and a file cut meanwhile is
    an error.
    Raises FeatureError, with the command to run, for files that are missing or of another training set;
    old_model/provenance.py compares their manifests.
    """

    def __init__(self, train_set, feature_path, labels_path=None, credible_path=None):
        if not feature_path:
            raise FeatureError("old_embedding is empty; set it in the config to a …_feature.npy of get_feature.py")
        self.path, self.record = pathlib.Path(feature_path), train_set.path
        labels_path = pathlib.Path(labels_path or label_path(feature_path))
        self.features = _open("old_embedding", self.path, 2, np.floating)
        self.labels = _open("old_embedding_label", labels_path, 1, np.integer)
        self.width = self.features.shape[1]
        self._credible = _open("credible_old_feature", credible_path, 1, np.bool_) if credible_path else None
        for file in filter(None, (self.features, self.labels, self._credible)):
            if len(file) != len(train_set):
                remedy = right_file(file.path if file is self._credible else self.path, self.record)
                raise FeatureError(
                    f"{file.path}: {len(file)} rows, but {self.record} has {len(train_set)} images: "
                    f"made from another record file; {remedy}"
                )
        if self._credible and not any(self._credible[i : i + FLAGS].any() for i in range(0, len(self), FLAGS)):
            raise FeatureError(f"{credible_path}: no row is credible; {rewrite(credible_path)}")
        rows = np.unique(np.linspace(0, len(train_set) - 1, LABELS_SAMPLED).astype(np.int64)) if len(train_set) else []
        self.compare_labels(rows, [train_set.label(int(row)) for row in rows])

    def __len__(self):
        return len(self.features)

    def compare_labels(self, rows, labels):
        """Raise FeatureError if a row's stored class differs from `labels` [B], the record file's."""
        stored = self.labels.read(np.asarray(rows, np.int64))
        wrong = np.flatnonzero(stored != np.asarray(labels))
        if len(wrong):
            raise FeatureError(
                f"{self.path}: row {rows[wrong[0]]} is of class {stored[wrong[0]]}, but in {self.record} of class "
                f"{labels[wrong[0]]}: made from another record file; {right_file(self.path, self.record)}"
            )

    def read(self, rows, out=None):
        """The rows int64 [B] as stored: float32 [B, D], in `out` if given.

        FeatureError for a row that is not finite, or too long to be normalised in float32.
        """
        out = self.features.read(rows, np.empty((len(rows), self.width), np.float32) if out is None else out)
        finite = np.isfinite(np.einsum("nd,nd->n", out, out))
        if not finite.all():
            raise FeatureError(
                f"{self.path}: NaN, infinity or a length beyond 1e19 in row {rows[~finite][0]}; {rewrite(self.path)}"
            )
        return out

    def read_credible(self, rows):
        """bool [B]: which of the rows int64 [B] have a credible old feature."""
        return self._credible.read(rows) if self._credible else np.ones(len(rows), bool)


def _open(key, *arguments):
    """A RowFile of the file that a config's key names; the error names the key."""
    try:
        return RowFile(*arguments)
    except FeatureError as error:
        raise FeatureError(f"{key} = {error}") from error
