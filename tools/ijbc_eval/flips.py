"""Who loses: negative flips, the queries that the old model answers right and the new one wrong.

Rate and relative rate as in Yan et al., Positive-Congruent Training, CVPR 2021 (arXiv:2011.09161): the relative one
compares with a new model whose errors have nothing to do with the old one's, 1; 0 means that nobody loses.
"""

import numpy as np

from tools.ijbc_eval.bootstrap import FEWEST, Units, interval

COLUMNS = ("model", "test", "at", "gallery", "template", "subject", "images")


def answered(searches, fpir, protocol):
    """{"rank1", "fpir"} -> bool [G, Q]: right, i.e. the own entry first, at `fpir` also above that test's threshold."""
    return {
        "rank1": np.array([one.rank == 1 for one in searches]),
        "fpir": np.array([one.mated & (one.score > one.threshold_at(fpir, protocol)) for one in searches]),
    }


def negative_flips(old, new, mated, subject=None, bootstrap=None):
    """Figures of one reading, over all mated queries of all galleries, and which flip.

    old, new, mated: bool [G, Q], answered right and mated; subject int [Q]: rows of subjects for the bootstrap.
    Returns ({"queries", "flips", "rate", "relative", "interval"}, flipped bool [G, Q]); relative is
    NFR / ((1 − err_old) · err_new), None if the new model makes no error or the old one nothing else. No interval for
    fewer than FEWEST flips.
    """
    flipped = mated & old & ~new
    queries = int(mated.sum())
    rate, old_right, new_wrong = (kind.sum() / queries for kind in (flipped, mated & old, mated & ~new))
    found = {"queries": queries, "flips": int(flipped.sum()), "rate": float(rate), "interval": None}
    found["relative"] = float(rate / (old_right * new_wrong)) if old_right * new_wrong else None
    if bootstrap and found["flips"] >= FEWEST:
        whole, part = (Units.of_queries(subject[np.nonzero(kind)[1]]) for kind in (mated, flipped))
        found["interval"] = interval(bootstrap.share(part, bootstrap.total(whole)))
    return found, flipped


def rows(evaluation, name, test, at, flipped):
    """Rows of the csv file: a line a query, with the names of its images."""
    faces, probes, names = evaluation.faces, evaluation.probes, evaluation.set.template_names(evaluation.faces)
    found = []
    for gallery, which in zip(evaluation.galleries, flipped):
        for query in np.flatnonzero(which):
            template = probes.template[query]
            images = faces.names[np.unique(faces.image[faces.template == template])].astype(str)
            found.append([name, test, at, gallery, names[template], evaluation.person_of(template), " ".join(images)])
    return found
