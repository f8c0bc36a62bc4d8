"""A tool that is killed at any moment and run again leaves, bit for bit, what an undisturbed run leaves, and no more.

After every kill each file is whole: what was there before, or what the undisturbed run writes.
"""

import pathlib

import numpy as np
import pytest

from core.errors import UserError
from core.manifest import read_manifest
from old_model.feature_set import FeatureSet, open_feature_set
from tests.BCT_methods.whole_runs import WIDTH, write_config
from tests.conftest import draw_record_set
from tests.kills import Kill, Task, draw_kills, is_temporary, kill_and_rerun
from tests.tools.ijbc_eval.conftest import make_model, make_set

NUM_IMAGE, SD = 30, "old_class100"
EVALUATION = "--data_path {data} --cache-dir {work}/cache --workers 1"
FEATURES = f"{{config}} --SD {SD} --feature_save {{work}}"
TOOLS = {
    "split_dataset.split_dataset_ms1mv3": "--root {work}",
    "get_feature.get_feature": FEATURES,
    "get_feature.get_avg_feature": FEATURES,
    "get_feature.denoise_credible": f"{FEATURES} --T 0.5",
    "ijbc_eval.ijbc_eval": f"-m {{new}} -net tiny -m_old {{old}} -old_net tiny -R {{work}}/result.npz {EVALUATION}",
    "ijbc_eval.compat_report": f"--old {{old}} --old_net tiny --new {{new}}:tiny --out {{work}}/report {EVALUATION}",
}
# Two files that belong together: never one of before and one of after, unless reading the first of them says so.
TOGETHER = (
    (".idx", ".rec", lambda path: None),
    (".json", "", lambda path: read_manifest(path.with_suffix(""))),
    ("_label.npy", "_feature.npy", lambda path: open_feature_set(FeatureSet(SD, path.parents[1]))),
)


def make_tool(folder, name, ranks=1, seed=0, afresh=False, options=""):
    """The task of TOOLS[name]. Unless `afresh`, it finds what it made of other images, labels and models."""
    place = {"work": folder / "work", "data": folder / "data", "config": folder / "old/configs/old_class30.py"}
    place |= {model: folder / model / "model.pt" for model in ("old", "new")}
    place["work"].mkdir()
    write_config(folder, "old", "old_class30", rec=str(folder), output=str(folder / "old"), num_workers=1)
    if name.startswith("ijbc"):
        make_set(place["data"], subjects=6, seed=seed)
    words = f"{TOOLS[name]} {options}".format(**place).split()
    task = Task(folder, name.partition(".")[2], ranks, f"tools.{name}:main", words, check)
    for version in range(afresh, 2):
        labels = np.random.default_rng([seed, version]).permutation(np.arange(NUM_IMAGE) % 5)
        draw_record_set((place["work"] if name.startswith("split") else folder) / "train.rec", labels, seed=version)
        for number, model in enumerate(("old", "new")):
            make_model(place[model], WIDTH, seed=2 * (2 * seed + version) + number)
        if version == 0:
            task.attempt()
    return task


def contents(folder):
    """Without locks, which name their latest holder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def check(task, ended):
    found, before, whole = map(contents, (task.work, task.before, task.whole))
    if ended:
        wrong = [name for name in {**found, **whole} if found.get(name) != whole.get(name)]
        assert not wrong, f"{sorted(wrong)}: lost, left over or other than after an undisturbed run"
        return f"{len(found)} files"
    final = {name: content for name, content in found.items() if not is_temporary(pathlib.Path(name))}
    for name, content in final.items():
        assert content in (before.get(name), whole.get(name)), f"{name}: neither as before nor as it will be"
    lost = [name for name in set(before) - set(final) if not name.endswith(".idx")]
    assert not lost, f"{lost}: lost"
    for ending, others, read in TOGETHER:
        for name in (name for name in final if name.endswith(ending)):
            pair = {one: final.get(one) for one in (name, name.removesuffix(ending) + others)}
            if None not in pair.values() and not any(pair.items() <= version.items() for version in (before, whole)):
                with pytest.raises(UserError):
                    read(task.work / name)
    return f"{len(final)} files, {len(found) - len(final)} temporary"


@pytest.mark.parametrize("name, ranks", [*((name, 1) for name in TOOLS), ("get_feature.get_feature", 2)])
def test_a_killed_tool_leaves_what_an_undisturbed_one_leaves(name, ranks, tmp_path):
    task = make_tool(tmp_path, name, ranks)
    task.whole_run()
    kills = draw_kills(np.random.default_rng([ranks, *map(ord, name)]), task, 2, outside=1)
    if name.startswith("split") or name.endswith("get_feature"):  # the others write one file a time, or take a second
        renames = {moment: counts[0] for moment, counts in task.moments.items() if moment.startswith("replace")}
        kills += [Kill(moment, 1 + number, (0,)) for moment, count in renames.items() for number in range(count)]
    print("kills drawn:", "; ".join(map(str, kills)))  # shown where the test fails
    assert kill_and_rerun(task, kills) > len(kills) / 2
