"""The training loop: many ranks equal one, accumulation equals the larger batch, a resumed run equals the whole one."""

import pickle

import cv2
import numpy as np
import pytest
import torch

import backbones
from backbones.vit import SIZES as VIT_SIZES
from BCT_methods.MixBCT.train import MixBCT
from core.config import ConfigError, load_config
from core.distributed import rank
from core.errors import UserError
from engine.build import make_scaler, replicate, start_momentum
from engine.checkpoint import CheckpointError
from engine.trainer import Trainer, margin_loss, unwrap
from losses import ArcFace, CombinedMarginLoss, CosFace
from tests.ranks import run_ranks


class Plain(Trainer):
    """A run without BatchNorm, whose statistics are each rank's own."""

    def build_backbone(self):
        torch.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 16, 16), torch.nn.PReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 49, 8)
        )

    def losses(self, batch):
        return {"cls": self.classifier(self.backbone(batch.images), batch.labels)}


def config(tmp_path, rec, name="run", **keys):
    path = tmp_path / f"{name}.py"
    keys = {
        "rec": str(rec),
        "output": str(tmp_path / name),
        "embedding_size": 8,
        "network": "tiny",
        "batch_size": 4,
        "num_epoch": 2,
        "num_workers": 0,
        "lr": 0.05,
        "margin_scale": 8.0,
        **keys,
    }
    lines = [f"config.{key} = {value!r}" for key, value in keys.items()]
    path.write_text("\n".join(["from easydict import EasyDict", "config = EasyDict()", *lines]) + "\n")
    return path


@pytest.fixture
def rec(tmp_path, make_record_set):
    make_record_set(tmp_path / "set.rec", [0, 1, 2, 3, 4] * 5)
    return tmp_path / "set.rec"


def run(path, *overrides):
    torch.set_num_threads(1)
    trainer = Plain(load_config(path, overrides))
    trainer.train()
    backbone = {name.removeprefix("module."): value.clone() for name, value in trainer.backbone.state_dict().items()}
    return backbone, trainer.classifier.weight.detach().clone()


def assert_same(first, second, tolerance=1e-5):
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_and_three_ranks_take_the_steps_of_one(tmp_path, rec, optimizer):
    keys = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 1e-3}
    one, centres = run(config(tmp_path, rec, "one", batch_size=12, **keys))
    for ranks in (2, 3):
        results = run_ranks(run, ranks, config(tmp_path, rec, f"many{ranks}", batch_size=12 // ranks, **keys))
        for backbone, _ in results:
            assert_same(one, backbone)
        torch.testing.assert_close(torch.cat([shard for _, shard in results]), centres, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_accumulation_equals_the_larger_batch(tmp_path, rec, ranks):
    large, centres = run(config(tmp_path, rec, "large", batch_size=12))
    path = config(tmp_path, rec, "small", batch_size=12 // 3 // ranks, gradient_acc=3)
    results = run_ranks(run, ranks, path) if ranks > 1 else [run(path)]
    assert_same(large, results[0][0])
    torch.testing.assert_close(torch.cat([shard for _, shard in results]), centres, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sample_rate", [1.0, 0.6])
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(tmp_path, rec, sample_rate):
    whole = run(config(tmp_path, rec, "whole", num_epoch=4, save_all_states=True, sample_rate=sample_rate))

    class Stopped(Plain):
        def begin_epoch(self):
            if self.epoch == 2:
                raise KeyboardInterrupt

    path = config(tmp_path, rec, "parts", num_epoch=4, save_all_states=True, sample_rate=sample_rate)
    with pytest.raises(KeyboardInterrupt):
        Stopped(load_config(path)).train()
    torch.manual_seed(99)
    parts = run(path, "--resume", "True")
    assert_same(whole[0], parts[0], 0)
    assert torch.equal(whole[1], parts[1])


def test_files_of_a_finished_run(tmp_path, rec):
    output = tmp_path / "run"
    backbone, centres = run(config(tmp_path, rec, frequent=1))
    assert_same(torch.load(output / "model.pt", weights_only=True), backbone, 0)
    assert torch.equal(torch.load(output / "softmax_fc_gpu_0.pt", weights_only=True)["weight"], centres)
    log = (output / "training.log").read_text()
    for part in ("Speed", "samples/sec   Loss", "LearningRate", "Epoch: 1", "Global Step: 12", "Required: 0.0 hours"):
        assert part in log
    assert list((output / "tensorboard").iterdir())
    assert not list(output.glob("*.tmp"))


def test_modules_of_a_method_train_and_are_saved(tmp_path, rec):
    class WithExtra(Plain):
        def setup(self):
            self.extra["shift"] = torch.nn.Linear(1, 1)
            self.extra["shift"].register_buffer("seen", torch.zeros(()))

        def losses(self, batch):
            shift = self.extra["shift"]
            shift.seen += 1
            return {"cls": self.classifier(self.backbone(batch.images), batch.labels), "shift": (shift.weight**2).sum()}

    path = config(tmp_path, rec, save_all_states=True)
    trainer = WithExtra(load_config(path))
    start = trainer.extra["shift"].weight.item()
    trainer.train()
    assert abs(trainer.extra["shift"].weight.item()) < abs(start)
    again = WithExtra(load_config(path, ["--resume", "True"]))
    again.resume()
    assert again.extra["shift"].weight.item() == trainer.extra["shift"].weight.item()
    assert again.extra["shift"].seen.item() == 12
    assert not any("shift" in key for key in torch.load(tmp_path / "run/model.pt", weights_only=True))


def test_a_term_of_each_image_is_refused_by_name(tmp_path, rec):
    class PerImage(Plain):
        def losses(self, batch):
            return super().losses(batch) | {"pull": self.backbone(batch.images).norm(dim=1)}

    with pytest.raises(UserError, match=r"PerImage.losses: 'pull' has shape \[\d+\]; a term is a scalar: take"):
        PerImage(load_config(config(tmp_path, rec))).train()


def test_margins_of_a_config(tmp_path):
    def margin(*words):
        return margin_loss(load_config("configs/base.py", words))

    assert isinstance(margin(), ArcFace)
    assert isinstance(margin("--loss", "cosface", "--margin_list", "(1.0, 0.0, 0.4)"), CosFace)
    assert isinstance(margin("--loss", "combined", "--margin_list", "(1.0, 0.3, 0.2)"), CombinedMarginLoss)
    with pytest.raises(ConfigError, match="does not fit margin_list"):
        margin("--margin_list", "(1.0, 0.3, 0.2)")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"optimizer": "adam"}, "optimizer = 'adam'"),
        ({"gradient_acc": 100}, "gradient_acc = 100 is more than"),
        ({"batch_size": 26}, "batch_size = 26 on 1 ranks is more than the 25 images"),
        ({"rec": "synthetic"}, "needs num_classes and num_image"),
        ({"sync_bn": True}, "sync_bn = True needs CUDA"),
        ({"channels_last": True}, "channels_last = True needs CUDA"),
        ({"margin_list": (1.0, 4.0, 0.0)}, "m2 at least 0 and below pi"),
        ({"decay_epoch": ["a"]}, "decay_epoch = \\['a'\\]; it must be a list of numbers"),
        ({"amp_dtype": "float32"}, 'amp_dtype = \'float32\'; it must be "float16" or "bfloat16"'),
    ],
)
def test_wrong_values_stop_before_the_first_step(tmp_path, rec, keys, message):
    with pytest.raises(ConfigError, match=message):
        Plain(load_config(config(tmp_path, **{"rec": rec, **keys}))).train()
    assert not (tmp_path / "run").exists()


def test_a_batch_of_one_image_is_refused_where_batch_norm_needs_two(tmp_path, rec):
    path = config(tmp_path, rec, batch_size=1, num_epoch=1)
    run(path)  # without BatchNorm
    with pytest.raises(ConfigError, match="batch_size = 1; it must be at least 2: BatchNorm has no statistics of one"):
        Trainer(load_config(path))


def test_a_script_is_started_with_a_config_from_anywhere(tmp_path, rec, monkeypatch):
    """`main` takes the keys of the method's own folder, wherever the config lies."""
    seen = []
    monkeypatch.setattr(Trainer, "train", lambda self: None)
    monkeypatch.setattr(Trainer, "__init__", lambda self, cfg: seen.append(cfg))
    monkeypatch.setattr("core.distributed.shutdown", lambda: None)
    MixBCT.main([str(config(tmp_path, rec, mix_ratio=0.4)), "--resume"])
    assert seen[0].mix_ratio == 0.4 and seen[0].resume is True


def test_more_ranks_than_classes_stop_before_the_first_step(tmp_path, rec, monkeypatch):
    monkeypatch.setattr("core.distributed.init_distributed", lambda timeout: (0, 6, torch.device("cpu")))
    with pytest.raises(ConfigError, match="set.rec has 5 classes, fewer than the 6 ranks; start fewer"):
        Plain(load_config(config(tmp_path, rec)))


OPTIMIZERS = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {"weight_decay": 0.1})}
FACTORS = (1.0, 2.0, -3.0)  # of the gradients of three steps


def overflow_on_rank_zero(optimizer, overflow):
    """The three steps, fused; the gradient of step `overflow` is infinite on rank 0. Returns (weights, skipped)."""
    torch.use_deterministic_algorithms(True)  # fills memory that is used uninitialised with NaN
    try:
        parameters = [torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2, 3))]
        kind, keys = OPTIMIZERS[optimizer]
        optimizer = kind(parameters, lr=0.1, fused=True, **keys)
        start_momentum(optimizer)
        scaler = make_scaler(torch.device("cpu"), enabled=True)
        for step, factor in enumerate(FACTORS):
            factor = float("inf") if step == overflow and rank() == 0 else factor
            scaler.scale(sum((parameter * factor).sum() for parameter in parameters)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return parameters[0].detach(), parameters[1].detach(), int(scaler.skipped), scaler.get_scale()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("overflow", [0, 1])
def test_an_overflow_on_one_rank_is_skipped_by_all(optimizer, overflow, ranks):
    """As if that step had not been: momentum, and the steps that AdamW's bias correction counts, too."""
    kind, keys = OPTIMIZERS[optimizer]
    parameter = torch.nn.Parameter(torch.ones(4))
    slow = kind([parameter], lr=0.1, foreach=False, **keys)
    for step, factor in enumerate(FACTORS):
        if step != overflow:
            parameter.grad = torch.full((4,), factor)
            slow.step()
    for *weights, skipped, scale in run_ranks(overflow_on_rank_zero, ranks, optimizer, overflow):
        for value in weights:
            torch.testing.assert_close(value, parameter.detach()[0].expand_as(value))
        assert skipped == 1 and scale == 2**15


@pytest.mark.parametrize("network", ["tiny", "r18", "mbf", "vit_t"])
def test_a_compiled_backbone_gives_what_the_plain_one_does(network, monkeypatch):
    """Traced and differentiated as torch.compile does it, without the machine code."""
    compile_by = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_by(module, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        cfg = load_config("configs/base.py", ["--network", network, "--compile", str(compiled)])
        torch.manual_seed(0)
        module = replicate(backbones.get_model(network, 8), cfg, torch.device("cpu"), 1)
        embeddings = module(torch.linspace(-1, 1, 3 * 3 * 112 * 112).reshape(3, 3, 112, 112))
        embeddings.square().sum().backward()
        norm = torch.stack([parameter.grad.norm() for parameter in module.parameters() if parameter.requires_grad])
        results.append([embeddings.detach(), norm, list(module.state_dict())])
    torch.testing.assert_close(results[1][:2], results[0][:2], rtol=1e-3, atol=1e-4)
    assert results[1][2] == results[0][2]


@pytest.mark.parametrize("network", ["r2060", *(name for name, size in VIT_SIZES.items() if size[-1])])
def test_networks_that_compute_activations_again_are_not_compiled(network):
    with torch.device("meta"):
        module = backbones.get_model(network)
    with pytest.raises(
        ConfigError, match=f"compile = True does not work with network = '{network}'.* set compile = False"
    ):
        cfg = load_config("configs/base.py", ["--network", network, "--compile", "True"])
        replicate(module, cfg, torch.device("cpu"), 1)


def test_ranks_on_a_gpu_that_torch_cannot_use_do_not_train(tmp_path, rec, monkeypatch):
    monkeypatch.setattr("core.distributed.gpu_problem", lambda: "the driver is too old")
    run(config(tmp_path, rec, num_epoch=1))
    monkeypatch.setattr("core.distributed.init_distributed", lambda timeout: (0, 2, torch.device("cpu")))
    with pytest.raises(UserError, match="2 ranks would train on the CPU: the driver is too old"):
        run(config(tmp_path, rec))


def test_another_run_is_not_resumed(tmp_path, rec):
    run(config(tmp_path, rec, save_all_states=True))
    for key, value in (("batch_size", 8), ("optimizer", "adamw"), ("sample_rate", 0.5)):
        with pytest.raises(CheckpointError, match=f"written with {key} = .*restore {key}"):
            run(config(tmp_path, rec, save_all_states=True, resume=True, **{key: value}))


def test_verification_that_fails_costs_no_model(tmp_path, rec, monkeypatch):
    def fail(verifier, backbone):
        raise RuntimeError("out of memory, say")

    monkeypatch.setattr("engine.verification.Verifier.__bool__", lambda self: True)
    monkeypatch.setattr("engine.verification.Verifier.run", fail)
    for verbose in (2, 3, 100):  # within the first epoch's three steps, at its end, at the end of training
        trainer = Plain(load_config(config(tmp_path, rec, f"run{verbose}", batch_size=8, verbose=verbose)))
        with pytest.raises(RuntimeError, match="say"):
            trainer.train()
        output = tmp_path / f"run{verbose}"
        saved = torch.load(output / "model.pt", weights_only=True)
        assert_same(saved, trainer.backbone.state_dict(), 0)
        assert trainer.step == min(verbose, 6) and (output / "softmax_fc_gpu_0.pt").is_file()


class WithBatchNorm(Plain):
    def build_backbone(self):
        return torch.nn.Sequential(torch.nn.BatchNorm2d(3), *super().build_backbone())


def statistics_after_verification(path):
    """Train to the end, where the last step verifies; returns this rank's BatchNorm mean and that in model.pt."""
    torch.set_num_threads(1)
    trainer = WithBatchNorm(load_config(path))
    trainer.train()
    saved = torch.load(f"{trainer.cfg.output}/model.pt", weights_only=True)
    return unwrap(trainer.backbone).state_dict()["0.running_mean"], saved["0.running_mean"]


def test_ranks_verify_the_model_that_is_saved(tmp_path, rec):
    """Statistics are each rank's own: unshared, they would embed the two images of a pair with two models."""
    images = [cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes() for value in range(0, 200, 20)]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((images, [True, False, True, False, True])))
    path = config(tmp_path, rec, val_targets=["pairs"])
    (first, saved), (second, _) = run_ranks(statistics_after_verification, 2, path)
    assert torch.equal(first, second) and torch.equal(first, saved)
    assert "[pairs][6]Accuracy-Flip: " in (tmp_path / "run/training.log").read_text()


def test_the_cross_test_is_logged_and_may_choose_the_best_model(tmp_path, rec, monkeypatch):
    """Self-tests say 0.5, 0.9, 0.7 after steps 2, 4, 6; cross-tests 0.6, 0.4, 0.8."""
    torch.manual_seed(1)
    torch.save(backbones.get_model("tiny", num_features=8).state_dict(), tmp_path / "old.pt")
    images = [cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes() for value in range(4)]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((images, [True, False])))

    def train(name, **keys):
        said = iter([(0.5, 0.6), (0.9, 0.4), (0.7, 0.8)])

        def run_verifier(verifier, backbone):
            own, cross = next(said)
            assert verifier.old["pairs"].shape == (4, 8) and 0 <= verifier.old_accuracies["pairs"] <= 1
            return {"self": {"pairs": own}, "cross": {"pairs": cross}}

        monkeypatch.setattr("engine.verification.Verifier.run", run_verifier)
        cfg = load_config(config(tmp_path, rec, name, val_targets=["pairs"], verbose=2, batch_size=8, **keys))
        cfg.old_model_path = str(tmp_path / "old.pt")
        trainer = Plain(cfg)
        trainer.train()
        return trainer.best, (tmp_path / name / "training.log").read_text()

    best, log = train("self")
    assert best == {"accuracy": 0.9, "step": 4}
    for line in ("[pairs]Accuracy-Old: ", "[pairs][4]Accuracy-Flip: 0.90000", "[pairs][4]Accuracy-Cross: 0.40000"):
        assert line in log
    best, log = train("cross", best_by="cross")
    assert best == {"accuracy": 0.8, "step": 6} and "[mean][4]Accuracy-Highest: 0.60000 at step 2" in log


def test_best_by_cross_needs_an_old_model(tmp_path, rec):
    images = [cv2.imencode(".png", np.full((112, 112, 3), value, np.uint8))[1].tobytes() for value in range(4)]
    (tmp_path / "pairs.bin").write_bytes(pickle.dumps((images, [True, False])))
    cfg = load_config(config(tmp_path, rec, val_targets=["pairs"], best_by="cross"))
    with pytest.raises(
        ConfigError, match=r"best_by = 'cross'; it must be \"self\" where old_model_path is no state dict"
    ):
        Plain(cfg)
    torch.save(backbones.get_model("tiny", num_features=4).state_dict(), tmp_path / "old.pt")
    cfg.old_model_path, cfg.best_by = str(tmp_path / "old.pt"), "self"
    assert set(Plain(cfg).verifier.run(Plain(cfg).backbone)) == {"self", "cross"}  # of widths 8 and 4
    with pytest.raises(ConfigError, match='best_by = \'best\'; it must be "self" or "cross"'):
        load_config(config(tmp_path, rec, best_by="best"))
