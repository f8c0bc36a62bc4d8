"""A run's output: insightface's log line, speed and time left, a progress bar that survives log lines."""

import contextlib
import errno
import io
import math
import re
import sys
import types

import pytest
import torch
from tqdm import tqdm

from core.errors import warn
from engine import monitor as monitor_module
from engine.monitor import RECENT, Monitor, NonFiniteLoss, init_logging, log, log_to_file


@pytest.fixture
def clock(monkeypatch):
    """The monitor's clock, advanced by setting `clock.now`, in seconds."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(monitor_module, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def lines(monkeypatch):
    """The log lines."""
    lines = []
    monkeypatch.setattr(log, "info", lambda form, *words: lines.append(form % words))
    monkeypatch.setattr(log, "warning", lambda form, *words: lines.append("warning: " + form % words))
    return lines


def take(monitor, step, index=(0,), **terms):
    terms = {name: torch.tensor(float(value)) for name, value in (terms or {"cls": 1.0}).items()}
    monitor.update(step, terms, torch.tensor(index))


class Scaler:
    """A fake of engine/build.py's scaler."""

    skipped = torch.tensor(0)

    def is_enabled(self):
        return True

    def get_scale(self):
        return 65536.0 / 2 ** int(self.skipped)


# --- the line ----------------------------------------------------------------------------------------------------


def test_the_log_line_is_insightfaces(clock, lines):
    monitor = Monitor(total_steps=7202, images_per_step=64, start_step=0)
    clock.now = 4.0
    take(monitor, 0, cls=20.0)
    take(monitor, 1, cls=21.0)
    monitor.line(2, 0, 0.05)
    assert lines == [
        "Speed 32.00 samples/sec   Loss 20.5000   LearningRate 0.050000   Epoch: 0   Global Step: 2   "
        "Required: 4.0 hours"
    ]


def test_extra_values_follow_insightfaces_line(clock, lines):
    monitor, scaler = Monitor(total_steps=10, images_per_step=64, start_step=0), Scaler()
    scaler.skipped = torch.tensor(3)
    clock.now = 1.0
    take(monitor, 0, cls=20.0, p2s=0.25)
    monitor.line(1, 3, 0.1, scaler)
    assert lines[0].endswith(
        "Loss 20.2500   LearningRate 0.100000   Epoch: 3   Global Step: 1   Fp16 Grad Scale: 8192   "
        "Required: 0.0 hours   cls 20.0000   p2s 0.2500   Skipped Steps: 3"
    )


def test_a_line_is_the_mean_since_the_last_and_goes_to_tensorboard(clock, lines):
    scalars = {}
    writer = types.SimpleNamespace(add_scalar=lambda name, value, step: scalars.setdefault((name, step), value))
    monitor = Monitor(total_steps=10, images_per_step=8, start_step=0, writer=writer)
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


def test_pauses_count_for_the_time_left_not_for_the_speed(clock, lines):
    """A step takes 2 s, every 10 steps there is a verification of 30 s; one of them fails."""
    monitor = Monitor(total_steps=7300, images_per_step=8, start_step=100)  # resumed
    for step in range(100, 140):
        clock.now += 2 + 500 * (step == 100)  # the first one compiles
        take(monitor, step)
        if step % 20 == 19:
            monitor.line(step + 1, 1, 0.1)
        if step % 10 == 9:
            with contextlib.suppress(KeyError), monitor.pause():
                clock.now += 30
                raise KeyError
    first, second = (re.search(r"Speed (\S+) .*Required: (\S+) hours", line).groups() for line in lines)
    assert first[0] == f"{8 * 20 / 540:.2f}" and second[0] == "4.00"
    assert second[1] == f"{(7300 - 140) * (20 * 2 + 2 * 30) / 20 / 3600:.1f}"  # since the first line


# --- non-finite losses, skipped steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_term_raises_with_step_terms_and_rows(value):
    monitor = Monitor(total_steps=500, images_per_step=2, start_step=0)
    for step in range(RECENT + 20):
        take(monitor, step, cls=step)
    with pytest.raises(NonFiniteLoss, match=rf"step 120: the loss is not finite: cls 2\.5, other {value:g}$") as caught:
        take(monitor, 120, index=(7, 3), cls=2.5, other=value)
    error = caught.value
    assert error.step == 120 and error.terms["cls"] == 2.5 and error.rows.tolist() == [7, 3]
    assert list(monitor.recent) == [(step, {"cls": float(step)}) for step in range(20, 120)]


def test_all_steps_skipped_warns_once(lines):
    monitor, scaler = Monitor(total_steps=100, images_per_step=2, start_step=0), Scaler()
    for step in range(1, 61):
        scaler.skipped = scaler.skipped + 1
        if step % 10 == 0:
            monitor.line(step, 0, 0.1, scaler)
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: step 20: the last 10 steps were all skipped")
    assert 'amp_dtype = "bfloat16"' in warnings[0]


@pytest.mark.parametrize("frequent", [1, 10])
def test_a_settling_loss_scale_does_not_warn(lines, frequent):
    """Six skips at the start, then every 40th step."""
    monitor, scaler = Monitor(total_steps=200, images_per_step=2, start_step=0), Scaler()
    for step in range(1, 201):
        if step <= 6 or step % 40 == 0:
            scaler.skipped = scaler.skipped + 1
        if step % frequent == 0:
            monitor.line(step, 0, 0.1, scaler)
    assert not [line for line in lines if line.startswith("warning")] and len(lines) == 200 // frequent


class FullDisk:
    def add_scalar(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    close = add_scalar


def test_a_full_disk_ends_only_tensorboard(clock, lines):
    with Monitor(100, 8, 0, FullDisk()) as monitor:
        for clock.now in (1.0, 2.0):
            monitor.line(int(clock.now), 0, 0.1)
    assert len([line for line in lines if line.startswith("warning: TensorBoard") and "No space left" in line]) == 1
    with pytest.raises(KeyError, match="the cause"), Monitor(100, 8, 0, FullDisk()):
        raise KeyError("the cause")


# --- the file ------------------------------------------------------------------------------------------------------


def test_the_file_has_what_was_logged_before_it(tmp_path, capsys):
    """A start that fails leaves no file; θ and × are written whatever the locale."""
    init_logging(main=True)
    warn("s × cos(%s)", "θ")
    assert not list(tmp_path.iterdir()) and "-s × cos(θ)\n" in capsys.readouterr().out
    log_to_file(tmp_path)
    log.info("later")
    lines = (tmp_path / "training.log").read_text(encoding="utf-8").splitlines()
    assert [line.partition("-s")[2] or line[-5:] for line in lines] == [" × cos(θ)", "later"]
    assert capsys.readouterr().out.count("\n") == 1, "the earlier line is not printed again"
    _, file = log.handlers
    init_logging(main=True)
    assert file.stream is None, "the next run closes it"


def test_a_warning_that_all_ranks_share_is_logged_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    init_logging(main=False)
    warn("of the config")
    log.warning("of this rank")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("-of this rank")


# --- the terminal --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal of endless width; `rows` is what it shows."""

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
                rows[row] = rows[row][:column].ljust(column) + piece + rows[row][column + len(piece) :]
                column += len(piece)
        return [text.rstrip() for text in rows]


def on_terminal(monkeypatch, tmp_path, watched=(True, True)):
    monkeypatch.setenv("COLUMNS", "100")
    out = Terminal(watched[0])
    err = out if all(watched) else Terminal(watched[1])  # one screen shows both
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    init_logging(main=True)
    log_to_file(tmp_path)
    return out, err


LINE = re.compile(r"Training: \S+ \S+-(Speed .* hours|a word)")


def test_log_lines_are_printed_above_the_bar(monkeypatch, tmp_path):
    screen, _ = on_terminal(monkeypatch, tmp_path)
    with Monitor(total_steps=40, images_per_step=8, start_step=10) as monitor:
        assert "| 10/40 [" in screen.rows()[-1]
        for step in range(10, 30):
            take(monitor, step, cls=3.0)
            if step % 10 == 9:
                monitor.line(step + 1, 0, 0.1)
        log.info("a word")
        *above, bar = screen.rows()
        assert len(above) == 3 and all(LINE.fullmatch(row) for row in above)
        assert " 75%|" in bar and "| 30/40 [" in bar and "loss 3.0000" in bar
    assert screen.rows()[-1] == "" and "| 30/40 [" in screen.rows()[-2], "the next output begins a new line"


def test_a_failed_run_leaves_the_terminal_clean(monkeypatch, tmp_path):
    screen, _ = on_terminal(monkeypatch, tmp_path)
    with pytest.raises(NonFiniteLoss), Monitor(total_steps=40, images_per_step=8, start_step=0) as monitor:
        take(monitor, 0, cls=math.nan)
    assert screen.rows()[-1] == "" and not tqdm._instances
    noted = (tmp_path / "training.log").read_text()
    assert noted.endswith("-ended by NonFiniteLoss: step 0: the loss is not finite: cls nan\n")
    assert "NonFiniteLoss" not in screen.getvalue(), "report_errors says it there"


@pytest.mark.parametrize("watched", [(False, False), (False, True), (True, False)])
def test_no_bar_without_a_terminal(monkeypatch, tmp_path, watched):
    """`> file`, `| tee file`, `2> file`: the output equals the log file to the byte."""
    out, err = on_terminal(monkeypatch, tmp_path, watched)
    with Monitor(total_steps=4, images_per_step=8, start_step=0) as monitor:
        for step in range(4):
            take(monitor, step)
            monitor.line(step + 1, 0, 0.1)
    assert err.getvalue() == ""
    assert out.getvalue() == (tmp_path / "training.log").read_text() and out.getvalue().count("\n") == 4
