"""A chain of versions, v1, v2, …, vn: which galleries each of them searches, and one gallery that several have written.

C[t][k] = M(query v_t, gallery v_k), t ≥ k, is the compatibility matrix of Biondi et al., CL²R: Compatible Lifelong
Learning Representations (ACM TOMM), BCT's criterion (Shen et al., CVPR 2020) for every pair of a sequence:

    pair (t, k), t > k, holds     C[t][k] > C[k][k]
    AC                            share of the pairs that hold
    AM                            mean of C[t][k] over all t ≥ k

A gallery that was enrolled over the years holds entries of all versions, each by the model that wrote it: people in the
order of their names, in as many equal parts as there are versions, the first by v1. The newest version searches it.
"""

import numpy as np
from prettytable import PrettyTable

from tools.ijbc_eval import compat_text
from tools.ijbc_eval.comparison import KEYS, criterion, measure
from tools.ijbc_eval.compat_csv import csv_text
from tools.ijbc_eval.templates import as_query

MEASURES = (*KEYS, "accuracy", "top1")  # of each a matrix; intervals for the criterion's


def chain_report(evaluation, versions, reading):
    """What a report says of `versions`, [(name, model)], oldest first: a dict of `versions`, `measures` and `mixed`."""
    features = [evaluation.templates(model) for _, model in versions]
    tests = [[measure(evaluation, gallery, query, reading) for gallery in features[: t + 1]]
             for t, query in enumerate(features)]  # fmt: skip
    owner, mixed = mixed_gallery(evaluation, features)
    mixed = measure(evaluation, *mixed, reading)
    names = [name for name, _ in versions]
    return {
        "versions": [
            {"name": name, "file": model.file, "width": one.shape[1], "people": int(np.count_nonzero(owner == number))}
            for number, ((name, model), one) in enumerate(zip(versions, features))
        ],
        "measures": {
            key: {**of_measure(key, tests, names), "mixed": mixed.figures[key]}
            for key in MEASURES
            if key in mixed.figures
        },
        "mixed_interval": mixed.figures.get("interval", {}),
    }


def of_measure(key, tests, names):
    """The matrix of one figure, the pairs, AC and AM. tests: C as Tests, row t of t + 1."""
    matrix = [[test.figures[key] for test in row] for row in tests]
    pairs = []
    for t, row in enumerate(tests):
        for k in range(t):
            found = {"query": names[t], "gallery": names[k], "difference": matrix[t][k] - matrix[k][k]}
            found["holds"] = matrix[t][k] > matrix[k][k]
            if key in KEYS:
                said = criterion(row[k], tests[k][k], None)
                found |= {"verdict": said["criterion"][key], "interval": said["difference"]["interval"].get(key)}
            pairs.append(found)
    entries = [value for row in matrix for value in row]
    share = sum(pair["holds"] for pair in pairs) / len(pairs)
    return {"matrix": matrix, "pairs": pairs, "ac": share, "am": sum(entries) / len(entries)}


def owners(evaluation, versions):
    """By which version each enrolled person is written: int [S], rows of evaluation.subjects, −1 for people who are
    only searched for. Enrolled: in a gallery, or first in a pair."""
    _, subject = evaluation.subjects
    enrolled = [gallery.template for gallery in evaluation.galleries.values()]
    enrolled += [evaluation.pairs.first_templates] if evaluation.pairs else []
    people = np.unique(subject[np.concatenate(enrolled)])
    owner = np.full(len(evaluation.subjects[0]), -1)
    for number, part in enumerate(np.array_split(people, versions)):
        owner[part] = number
    return owner


def mixed_gallery(evaluation, features):
    """`(owners, (gallery [T, ΣD], query [T, ΣD]))`: a block of dimensions for each version.

    An entry has its features in its version's block and zeros elsewhere, the newest version's query its part for each
    version in each, so that their product is the cosine of the query and the entry, in the entry's space.
    """
    owner = owners(evaluation, len(features))
    of_template = owner[evaluation.subjects[1]]
    gallery = [np.where((of_template == number)[:, None], one, 0) for number, one in enumerate(features)]
    query = [as_query(features[-1], one.shape[1]) for one in features]
    return owner, tuple(np.concatenate(blocks, axis=1).astype(np.float32) for blocks in (gallery, query))


# --- As text ----------------------------------------------------------------------------------------------------------

_TITLES = {**compat_text.POINTS, "accuracy": "ten-fold accuracy", "top1": "1:N top-1"}


def tables(report):
    """Yield `(title, header, rows)` of each measure's matrix."""
    names = [version["name"] for version in report["versions"]]
    for key, found in report["measures"].items():
        holds = {(pair["query"], pair["gallery"]): pair["holds"] for pair in found["pairs"]}
        rows = []
        for name, row in zip(names, found["matrix"]):
            shown = [_cell(value, holds.get((name, gallery))) for value, gallery in zip(row, names)]
            rows.append([name, *shown, *[""] * (len(names) - len(row))])
        yield _TITLES[key].format(**report["data"]), ["query \\ gallery", *names], rows


def _cell(value, holds):
    return f"{100 * value:.2f}" + ("" if holds is None else " holds" if holds else " fails")


def sentences(report):
    """AC, AM and the mixed gallery of each measure, and how the last is made."""
    lines, versions = [], report["versions"]
    for key, found in report["measures"].items():
        held = sum(pair["holds"] for pair in found["pairs"])
        bounds = report["mixed_interval"].get(key)
        among = " [{:.2f}, {:.2f}]".format(*(100 * bound for bound in bounds)) if bounds else ""
        title = _TITLES[key].format(**report["data"])
        lines.append(
            f"{title}: AC {found['ac']:.2f}, {held} of {len(found['pairs'])} pairs hold; "
            f"AM {100 * found['am']:.2f} %; gallery of all versions {100 * found['mixed']:.2f}{among} %."
        )
        open_ones = [
            f"{pair['query']}/{pair['gallery']}" for pair in found["pairs"] if pair.get("verdict") == "undecided"
        ]
        if open_ones:
            lines.append(f"Undecided, with 0 inside the 95 % interval of the difference: {', '.join(open_ones)}.")
    written = ", ".join(f"{version['people']} by {version['name']}" for version in versions)
    lines.append(
        f"Gallery of all versions, searched by {versions[-1]['name']}: people in the order of their names, {written}."
    )
    return [*lines, *compat_text.too_few(report["data"])]


def terminal(report):
    shown = []
    for title, header, rows in tables(report):
        table = PrettyTable([f"{title}, %", *header[1:]])
        table.align = "r"
        table.add_rows(rows)
        shown.append(table.get_string())
    return "\n".join([*shown, *sentences(report)])


def markdown(report):
    lines = [f"# Chain {' → '.join(version['name'] for version in report['versions'])}, {report['data']['subset']}", ""]
    lines += [*(f"- {line}" for line in sentences(report)), ""]
    for title, header, rows in tables(report):
        lines += [f"{title}, in %: C[t][k] = M(query, gallery)", "", compat_text.markdown_table(header, rows), ""]
    return "\n".join([
        *lines,
        "A pair holds if C[t][k] > C[k][k], t > k. AC: share of the pairs that hold; AM: mean over all t ≥ k.",
        "",
        compat_text.data_sentence(report["data"]),
        "",
    ])  # fmt: skip


def as_csv(report):
    """All figures, a line each: figure, query, gallery, value, low, high."""
    lines = [("figure", "query", "gallery", "value", "low", "high")]
    names = [version["name"] for version in report["versions"]]
    for key, found in report["measures"].items():
        for name, row in zip(names, found["matrix"]):
            lines += [(key, name, gallery, value, None, None) for gallery, value in zip(names, row)]
        for pair in found["pairs"]:
            bounds = pair.get("interval") or (None, None)
            lines.append((f"{key} minus C[k][k]", pair["query"], pair["gallery"], pair["difference"], *bounds))
        lines += [(f"{key} {what}", "", "", found[what.lower()], None, None) for what in ("AC", "AM")]
        bounds = report["mixed_interval"].get(key) or (None, None)
        lines.append((key, names[-1], "all versions", found["mixed"], *bounds))
    return csv_text(lines)
