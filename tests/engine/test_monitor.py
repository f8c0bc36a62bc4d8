"""What a person reads of a run: insightface's line, speed and time left, a bar that log lines do not tear apart."""

import errno
import io
import logging
import math
import re
import sys
import types

import pytest
import torch
from tqdm import tqdm

from engine import monitor as monitor_module
from core.config import load_config
from engine.monitor import RECENT, Monitor, NonFiniteLoss, init_logging, log
from tests.engine.test_trainer import Plain, close_log_files, config, rec  # noqa: F401


@pytest.fixture
def cfg():
    return load_config("configs/base.py")


@pytest.fixture
def clock(monkeypatch):
    """The monitor's time: it moves when a test adds to `clock.now`, in seconds."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(monitor_module, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def lines(monkeypatch):
    """What the log says, as words."""
    lines = []
    monkeypatch.setattr(log, "info", lambda form, *words: lines.append(form % words))
    monkeypatch.setattr(log, "warning", lambda form, *words: lines.append("warning: " + form % words))
    return lines


def take(monitor, step, index=(0,), **terms):
    terms = {name: torch.tensor(float(value)) for name, value in (terms or {"cls": 1.0}).items()}
    monitor.update(step, terms, torch.tensor(index))


class Scaler:
    """As engine/build.py's, on paper."""

    skipped = torch.tensor(0)

    def is_enabled(self):
        return True

    def get_scale(self):
        return 65536.0 / 2 ** int(self.skipped)


# --- the line ----------------------------------------------------------------------------------------------------


def test_the_line_is_insightfaces_to_the_letter(cfg, clock, lines):
    monitor = Monitor(cfg, total_steps=7202, images_per_step=64, start_step=0)
    clock.now = 4.0
    take(monitor, 0, cls=20.0)
    take(monitor, 1, cls=21.0)
    monitor.line(2, 0, 0.05)
    assert lines == [
        "Speed 32.00 samples/sec   Loss 20.5000   LearningRate 0.050000   Epoch: 0   Global Step: 2   "
        "Required: 4.0 hours"
    ]


def test_what_insightface_does_not_say_comes_after_its_line(cfg, clock, lines):
    monitor, scaler = Monitor(cfg, total_steps=10, images_per_step=64, start_step=0), Scaler()
    scaler.skipped = torch.tensor(3)
    clock.now = 1.0
    take(monitor, 0, cls=20.0, p2s=0.25)
    monitor.line(1, 3, 0.1, scaler)
    assert lines[0].endswith(
        "Loss 20.2500   LearningRate 0.100000   Epoch: 3   Global Step: 1   Fp16 Grad Scale: 8192   "
        "Required: 0.0 hours   cls 20.0000   p2s 0.2500   Skipped Steps: 3"
    )


def test_a_line_is_the_mean_since_the_last_and_goes_to_tensorboard(cfg, clock, lines):
    scalars = {}
    writer = types.SimpleNamespace(add_scalar=lambda name, value, step: scalars.setdefault((name, step), value))
    monitor = Monitor(cfg, total_steps=10, images_per_step=8, start_step=0, writer=writer)
    for step, value in enumerate((1.0, 2.0, 6.0)):
        take(monitor, step, cls=value, adv=10.0)
    clock.now = 12.0
    monitor.line(3, 0, 0.1, Scaler())
    take(monitor, 3, cls=0.5, adv=10.0)
    clock.now = 13.0
    monitor.line(4, 0, 0.1, Scaler())
    expected = {"loss": 13.0, "loss/cls": 3.0, "loss/adv": 10.0, "lr": 0.1, "speed": 2.0}
    expected |= {"grad_scale": 65536, "skipped_steps": 0}
    assert {name: value for (name, step), value in scalars.items() if step == 3} == pytest.approx(expected)
    assert scalars["loss", 4] == 10.5 and scalars["speed", 4] == 8.0


def test_speed_and_time_left_know_training_from_pauses(cfg, clock, lines):
    """A step takes 2 s, a verification every 10 steps 30 s, an epoch's begin every 100 steps 200 s."""
    monitor = Monitor(cfg, total_steps=7300, images_per_step=8, start_step=100)     # resumed
    with monitor.pause("begin of the epoch", 100):
        clock.now += 200
    for step in range(100, 140):
        clock.now += 2 + 500 * (step == 100)    # the first one compiles
        take(monitor, step)
        if step % 20 == 19:
            monitor.line(step + 1, 1, 0.1)
        if step % 10 == 9:
            with monitor.pause("verification", 10):
                clock.now += 30
    first, second = (re.search(r"Speed (\S+) .*Required: (\S+) hours", line).groups() for line in lines)
    assert first[0] == f"{8 * 20 / 540:.2f}" and second[0] == "4.00"
    assert second[1] == f"{(7300 - 140) * (2 + 30 / 10 + 200 / 100) / 3600:.1f}"


def test_time_of_a_pause_that_fails_does_not_count_either(cfg, clock, lines):
    monitor = Monitor(cfg, total_steps=10, images_per_step=8, start_step=0)
    with pytest.raises(KeyError), monitor.pause("verification", 10):
        clock.now += 1000
        raise KeyError
    clock.now += 2
    monitor.line(1, 0, 0.1)
    assert lines[0].startswith("Speed 4.00 samples/sec")


# --- a loss that is no number, steps that are skipped --------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_term_that_is_no_number_stops_with_step_terms_and_rows(cfg, value):
    monitor = Monitor(cfg, total_steps=500, images_per_step=2, start_step=0)
    for step in range(RECENT + 20):
        take(monitor, step, cls=step)
    with pytest.raises(NonFiniteLoss, match=rf"step 120: the loss is not finite: cls 2\.5, other {value:g}$") as caught:
        take(monitor, 120, index=(7, 3), cls=2.5, other=value)
    error = caught.value
    assert error.step == 120 and error.terms["cls"] == 2.5 and error.rows.tolist() == [7, 3]
    assert list(monitor.recent) == [(step, {"cls": float(step)}) for step in range(20, 120)]


def test_a_run_whose_steps_are_all_skipped_says_so_once(cfg, lines):
    monitor, scaler = Monitor(cfg, total_steps=100, images_per_step=2, start_step=0), Scaler()
    for step in range(1, 61):
        scaler.skipped = scaler.skipped + 1
        if step % 10 == 0:
            monitor.line(step, 0, 0.1, scaler)
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: step 20: the last 10 steps were all skipped")
    assert 'amp_dtype = "bfloat16"' in warnings[0]


@pytest.mark.parametrize("frequent", [1, 10])
def test_a_scale_that_finds_its_level_is_no_reason_to_warn(cfg, lines, frequent):
    """Six skips at the start, then every 40th step."""
    monitor, scaler = Monitor(cfg, total_steps=200, images_per_step=2, start_step=0), Scaler()
    for step in range(1, 201):
        if step <= 6 or step % 40 == 0:
            scaler.skipped = scaler.skipped + 1
        if step % frequent == 0:
            monitor.line(step, 0, 0.1, scaler)
    assert not [line for line in lines if line.startswith("warning")] and len(lines) == 200 // frequent


# --- the terminal --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal without edges that remembers what was written; `rows` is what it shows."""

    def __init__(self, watched=True):
        super().__init__()
        self.watched = watched

    def isatty(self):
        return self.watched

    def rows(self):
        rows, row, column = [""], 0, 0
        for piece in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", self.getvalue()):
            if piece == "\r":
                column = 0
            elif piece == "\x1b[A":
                row -= 1
            elif piece == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            else:
                rows[row] = rows[row][:column].ljust(column) + piece + rows[row][column + len(piece):]
                column += len(piece)
        return [text.rstrip() for text in rows]


def on_terminal(monkeypatch, tmp_path, watched=(True, True)):
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal(watched[0])
    err = out if all(watched) else Terminal(watched[1])     # one screen shows both
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    init_logging(tmp_path, main=True)
    return out, err


LINE = re.compile(r"Training: \S+ \S+-(Speed .* hours|a word)")


class FullDisk:
    def add_scalar(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = add_scalar


def test_a_disk_that_tensorboard_finds_full_ends_nothing_and_hides_no_error(cfg, clock, lines):
    with Monitor(cfg, 100, 8, 0, FullDisk()) as monitor:
        for clock.now in (1.0, 2.0):
            monitor.line(int(clock.now), 0, 0.1)
    warning = "warning: TensorBoard gets nothing from here on: [Errno 28] No space left on device"
    assert [line for line in lines if "TensorBoard" in line] == [warning]
    with pytest.raises(KeyError, match="the cause"), Monitor(cfg, 100, 8, 0, FullDisk()):
        raise KeyError("the cause")


def test_log_lines_stand_above_the_bar(monkeypatch, tmp_path, cfg):
    screen, _ = on_terminal(monkeypatch, tmp_path)
    with Monitor(cfg, total_steps=40, images_per_step=8, start_step=10) as monitor:
        assert screen.rows()[-1].startswith(" 25%|") and "| 10/40 [" in screen.rows()[-1]
        for step in range(10, 30):
            take(monitor, step, cls=3.0)
            if step % 10 == 9:
                monitor.line(step + 1, 0, 0.1)
        log.info("a word")
        *above, bar = screen.rows()
        assert len(above) == 3 and all(LINE.fullmatch(row) for row in above)
        assert re.fullmatch(r" 75%\|.*\| 30/40 \[\d\d:\d\d, \d\d:\d\d left, epoch 0, loss 3\.0000, lr 0\.100000\]", bar)
    assert screen.rows()[-1] == "" and screen.rows()[-2].startswith(" 75%|"), "the next output begins a new line"


def test_another_bar_within_the_run_does_no_harm(monkeypatch, tmp_path, cfg):
    """Such as that of the features which UniBCT extracts at the begin of an epoch."""
    screen, _ = on_terminal(monkeypatch, tmp_path)
    with Monitor(cfg, total_steps=40, images_per_step=8, start_step=0) as monitor:
        log.info("a word")
        with tqdm(total=100, desc="features", mininterval=0, disable=None) as inner:
            inner.update(50)
            log.info("a word")
            outer, nested = screen.rows()[-2:]
            assert outer.startswith("  0%|") and nested.startswith("features:  50%|")
            inner.update(50)
        take(monitor, 10)
        monitor.line(11, 0, 0.1)
        rows = screen.rows()
    assert sum(bool(LINE.fullmatch(row)) for row in rows) == 3
    assert [row for row in rows if row.startswith("features: 100%|")] and " 11/40 [" in "".join(rows)


def test_a_run_that_fails_leaves_the_terminal_in_order(monkeypatch, tmp_path, cfg):
    screen, _ = on_terminal(monkeypatch, tmp_path)
    with pytest.raises(NonFiniteLoss), Monitor(cfg, total_steps=40, images_per_step=8, start_step=0) as monitor:
        take(monitor, 0, cls=math.nan)
    assert screen.rows()[-1] == "" and not tqdm._instances
    noted = (tmp_path / "training.log").read_text()
    assert noted.endswith("-ended by NonFiniteLoss: step 0: the loss is not finite: cls nan\n")
    assert "NonFiniteLoss" not in screen.getvalue(), "report_errors says it there"


@pytest.mark.parametrize("watched", [(False, False), (False, True), (True, False)])
def test_no_bar_where_nobody_watches(monkeypatch, tmp_path, cfg, watched):
    """`> file`, `| tee file`, `2> file`: what is written is what the log file has, to the byte."""
    out, err = on_terminal(monkeypatch, tmp_path, watched)
    with Monitor(cfg, total_steps=4, images_per_step=8, start_step=0) as monitor:
        for step in range(4):
            take(monitor, step)
            monitor.line(step + 1, 0, 0.1)
    assert err.getvalue() == ""
    assert out.getvalue() == (tmp_path / "training.log").read_text() and out.getvalue().count("\n") == 4


def test_a_run_on_a_terminal_shows_its_progress(monkeypatch, tmp_path, rec):    # noqa: F811
    screen, _ = on_terminal(monkeypatch, tmp_path)
    torch.set_num_threads(1)
    Plain(load_config(config(tmp_path, rec, frequent=3))).train()
    bar = [row for row in screen.rows() if "%|" in row][-1]
    assert bar.startswith("100%|") and "| 12/12 [" in bar and "epoch 1, loss " in bar
    shown = "\n".join(screen.rows())
    for line in (tmp_path / "run/training.log").read_text().splitlines():
        assert line.rstrip() in shown, "a line of the log was torn apart"
    assert not logging.getLogger("bct").propagate
