"""While the gallery is re-embedded: in which order, how it is searched, and the accuracy on the way.

Three ways to search a gallery of which a part is the new model's:

    plain       the new query on everything, scores as they are
    calibrated  the new query on everything, each part's scores mapped to the scale of old/old (thresholds.ScoreMap)
    merged      the old query on the old part, the new query on the new part with mapped scores: both models run for
                each query, but they need not be compatible

The area under a curve of TPIR over the re-embedded share, by the trapezoidal rule, is the mean TPIR of a refresh that
goes on evenly. The maps are fitted on half of the people, the searches are for all of them.
"""

import pathlib

import numpy as np

from core.config import expand
from tools.ijbc_eval.ascii_table import is_number
from tools.ijbc_eval.files import EvalError
from tools.ijbc_eval.metrics import Roster, Search
from tools.ijbc_eval.options import split_name
from tools.ijbc_eval.templates import as_query, l2_normalise

STEPS = tuple(range(0, 101, 10))  # shares of the gallery re-embedded, in %
KINDS = ("random", "dispersion")  # orders that need no file
_CHUNK = 1024  # queries at once


def read_orders(evaluation, asked, seed, model):
    """The orders of re-embedding, {name: rows of template_ids of all gallery templates}.

    asked: "random" (by the seed), "dispersion" (`dispersion`, the largest first), or `[NAME=]FILE`. A file has a line a
    template: its id, in this order, or its id and a number, the largest first: how often it is queried, or how
    uncertain its feature is. Templates of equal number are in the random order. EvalError for a wrong file, before
    anything is embedded.
    """
    rows = np.unique(np.concatenate([gallery.template for gallery in evaluation.galleries.values()]))
    drawn = np.random.default_rng(seed).permutation(rows)
    found = {}
    for text in asked:
        name, file = split_name(text)
        name = text if text in KINDS else name or pathlib.Path(file).stem
        if name in found:
            raise EvalError(f"--order: two orders are named {name!r}; give each its own NAME=FILE")
        found[name] = None if text in KINDS else _read_order(expand(file), drawn, evaluation)
    if "random" in asked:
        found["random"] = drawn
    if "dispersion" in asked:
        found["dispersion"] = drawn[np.argsort(-dispersion(evaluation, model, drawn), kind="stable")]
    return found


def _read_order(path, rows, evaluation):
    names, separator = evaluation.set.template_names(evaluation.faces).astype(str), evaluation.set.separator
    row_of = {names[row]: row for row in rows}
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvalError(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)}); --order takes {', '.join(KINDS)} or a text "
            "file of template ids"
        ) from None
    numbers, fields_of_first = {}, None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = line.split(separator)
        fields_of_first = fields_of_first or len(fields)
        template = str(int(fields[0])) if separator is None and is_number(fields[0]) else fields[0]
        if template not in row_of or template in numbers:
            problem = "is listed twice" if template in numbers else "is not a gallery template"
            raise EvalError(f"{path} line {number}: {fields[0][:40]!r} {problem}; correct the line")
        numbers[template] = _number(fields[1]) if len(fields) == 2 else -len(numbers)
        if len(fields) != min(fields_of_first, 2) or not np.isfinite(numbers[template]):
            layout = "template" if fields_of_first == 1 else "template number"
            raise EvalError(f"{path} line {number}: expected `{layout}`, found {line[:40]!r}; correct the line")
    if len(numbers) < len(rows):
        absent = next(template for template in row_of if template not in numbers)
        raise EvalError(f"{path}: lists {len(numbers)} of {len(rows)} gallery templates; add {absent} and the others")
    return rows[np.argsort([-numbers[names[row]] for row in rows], kind="stable")]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return np.nan


def dispersion(evaluation, model, rows):
    """How far apart the images of each template are: float64 [len(rows)], 0 (all alike) to 2.

    The mean over a template's images of 1 − cos to the mean direction of all gallery images of its person: where a
    person has one template, as in IJB, about the template's own mean.
    """
    faces, found = evaluation.faces, evaluation.store.get(model)
    person = evaluation.subjects[1]
    lines = np.flatnonzero(np.isin(faces.template, rows) & ~found.bad[faces.image])
    template, image = faces.template[lines], faces.image[lines]
    features = l2_normalise(found.embs[image] + found.embs_f[image])
    sums = np.zeros((len(evaluation.subjects[0]), features.shape[1]), np.float32)
    np.add.at(sums, person[template], features)
    distance = 1 - np.einsum("nd,nd->n", features, l2_normalise(sums)[person[template]], dtype=float)
    size = len(faces.template_ids)
    mean = np.bincount(template, distance, size) / np.maximum(np.bincount(template, minlength=size), 1)
    return np.round(mean[rows], 6)  # so that single images, 0 but for rounding, are equal


def searches(evaluation, old, query, new, cross_map, self_map, orders):
    """Search the gallery at each step of each order, each way: {(order, way): for each step [Search for each gallery]}.

    old, new [T, D]: template features of the two models; query [T, D']: the new model's to be compared with old ones
    (`as_query`). cross_map, self_map: ScoreMap of new/old and new/new, or None: ways that need it are left out.
    """
    query = as_query(query, old.shape[1])
    ways = ["plain", *["calibrated"] * bool(cross_map and self_map), *["merged"] * bool(self_map)]
    found = {(order, way): [[] for _ in STEPS] for order in orders for way in ways}
    probes = evaluation.probes
    for gallery in evaluation.galleries.values():
        roster = Roster(gallery.subject, probes.subject)
        rows = gallery.template[roster.columns]
        done = {order: _done(sequence, rows, len(old)) for order, sequence in orders.items()}
        results = {key: [_empty(roster.mated) for _ in STEPS] for key in found}
        for start in range(0, len(probes.template), _CHUNK):
            part = slice(start, start + _CHUNK)
            asked = probes.template[part]
            cross = query[asked] @ old[rows].T
            own = new[asked] @ new[rows].T
            mapped = self_map(own) if self_map else None
            parts = {"plain": (cross, own)}
            if "calibrated" in ways:
                parts["calibrated"] = cross_map(cross), mapped
            if "merged" in ways:
                parts["merged"] = old[asked] @ old[rows].T, mapped
            for (order, way), steps in results.items():
                before, after = parts[way]
                for step, search in enumerate(steps):
                    matrix = np.where(done[order][step], after, before)
                    search.rank[part], search.score[part] = roster.read(matrix, part)
        for key, steps in results.items():
            for step, search in enumerate(steps):
                found[key][step].append(search)
    return found


def _done(sequence, rows, templates):
    """bool [steps, G]: which of a gallery's rows are re-embedded at each step."""
    place = np.empty(templates, np.int64)
    place[sequence] = np.arange(len(sequence))
    return place[rows] < np.array([[round(len(sequence) * percent / 100)] for percent in STEPS])


def _empty(mated):
    return Search(mated, np.zeros(len(mated), np.int32), np.empty(len(mated), np.float32))


def area(tpirs):
    """Area under TPIR over the re-embedded share 0 … 1; None if a step is undefined (NaN)."""
    tpirs = np.array(tpirs)
    return None if np.isnan(tpirs).any() else float(np.mean((tpirs[1:] + tpirs[:-1]) / 2))
