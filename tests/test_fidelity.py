"""docs/fidelity.md lists exactly the config values that differ from the published ones."""

import ast
import pathlib
import re

from core.config import load_config

REPO = pathlib.Path(__file__).resolve().parents[1]
PAGE = REPO / "docs/fidelity.md"

# What the published comparison trains its methods with, and we those of PAPERS. 8 ranks of 128 images; power 2 is
# decay_epoch = [].
SHARED = {
    "network": "r50",
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "gradient_acc": 1,
    "num_epoch": 35,
    "warmup_epoch": 0,
    "decay_epoch": [],
    "clip_grad_norm": 5,
    "loss": "arcface",
    "margin_list": (1, 0.5, 0),
    "margin_scale": 64,
}
# By method. Values are those that act: NCCL's on 8 ranks, UniBCT's damping where the columns of E sum to 1.
METHODS = {
    "MixBCT": {"fp16": False, "mix_ratio": 0.3},
    "UniBCT": {
        "fp16": True,
        "normalize_prototypes": False,
        "scale": 1,
        "damping": 0,
        "decay_epoch": [20, 26, 32],
        "compat_start_epoch": 10,
        "refine_epochs": [10, 20],
    },
    "NCCL": {"fp16": False, "alpha": 8, "beta": 0, "temperature": 1},
    "BCT": {"fp16": True, "scale": 1, "warmup_epoch": -1},
    "AdvBCT": {"fp16": True, "p2s_weight": 4, "adv_weight": 4, "threshold": 0.4, "normalize_input": True},
    "L2": {"fp16": False, "loss_weight": [1, 10], "threshold": 0},
    "weakenedL2": {"fp16": False, "loss_weight": [1, 10], "threshold": 0.2},
}
# Methods that the comparison does not have: the constants of their papers.
PAPERS = {
    "RACT": {"ract_weight": 1, "temperature": 0.01, "negatives": 10, "negative_grad": False},
    "LCE": {"align_weight": 100, "boundary_weight": 1},
}
# The plain models; of their recipe only the precision is held here.
PLAIN = {
    "old ArcFace": ("f*_r18_arc_*.py", {"fp16": False}),
    "old softmax": ("f*_r18_softmax_*.py", {"fp16": True}),
    "independent": ("f*_r50_arc_data100.py", {"fp16": False}),
}
# Nine published OPclass configs state it, though the part has fewer; ours state none.
OPCLASS = {"num_classes": 93_431}


def shipped():
    """`(method, scenario, config file, published values)` of every run on MS1M-V3; a plain model has no scenario."""
    for path in sorted(REPO.glob("BCT_methods/*/configs/*_ms1mv3_*.py")):
        part, method, old, width = re.fullmatch(
            r"(\w+?)_ms1mv3_r18_to_r50_(\w+?)_(arc|softmax)_to_arc_f(\d+)", path.stem
        ).groups()
        values = {**SHARED, "embedding_size": int(width), **(PAPERS.get(method) or METHODS[method])}
        values |= OPCLASS if part == "OPclass" and method in METHODS else {}
        yield method, f"{part}_{old}_f{width}", path, values
    for kind, (pattern, values) in PLAIN.items():
        for path in sorted((REPO / "configs").glob(pattern)):
            yield kind, "", path, values


def plain(value):
    """A value that compares equal whether it was written as a list or a tuple."""
    return tuple(value) if isinstance(value, list) else value


def rows_of_the_page():
    """`[(key, methods, scenario, published, ours)]` of the page's last table."""
    table = PAGE.read_text(encoding="utf-8").partition("| key | method | scenario | published | ours |")[2]
    rows = []
    for line in table.splitlines()[2:]:
        if not line.startswith("|"):
            break
        key, methods, scenario, published, ours = (cell.strip().strip("`") for cell in line.split("|")[1:6])
        values = [plain(ast.literal_eval(cell)) for cell in (published, ours)]
        rows.append((key, methods.split(", "), scenario, *values))
    return rows


def departures():
    """`{(config, key, published, ours)}` as the configs load."""
    found = set()
    for _, _, path, published in shipped():
        config = load_config(path)
        for key, value in published.items():
            assert key in config, f"{path.name}: no config key {key!r}"
            if plain(config[key]) != plain(value):
                found.add((path.stem, key, plain(value), plain(config[key])))
    return found


def test_every_shipped_config_is_held_against_the_published_values():
    found = list(shipped())
    count = {method: sum(its == method for its, *_ in found) for method in [*METHODS, *PAPERS, *PLAIN]}
    assert count == {**dict.fromkeys([*METHODS, *PAPERS], 9), "old ArcFace": 2, "old softmax": 4, "independent": 3}


def test_the_page_lists_the_departures_and_nothing_else():
    listed = set()
    for key, methods, scenario, published, ours in rows_of_the_page():
        for method in methods:
            meant = [
                path
                for its, part, path, _ in shipped()
                if its == method and scenario in ("all", part.split("_")[0], part)
            ]
            assert meant, f"{PAGE.name}: {key}: no config of {method!r} in scenario {scenario!r}"
            listed |= {(path.stem, key, published, ours) for path in meant}
    found = departures()
    assert not found - listed, f"departures that {PAGE.name} does not list: {sorted(found - listed, key=str)}"
    assert not listed - found, f"rows of {PAGE.name} that are no departure: {sorted(listed - found, key=str)}"


def test_every_method_has_its_rows():
    text = PAGE.read_text(encoding="utf-8")
    for method in [*METHODS, *PAPERS]:
        assert f"| **{method.removeprefix('weakened')}**" in text
