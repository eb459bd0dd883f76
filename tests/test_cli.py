# SPDX-License-Identifier: Apache-2.0
"""The command line: start-up, exit status, what stdout gets, and progress on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest

from offsite_ray.cli import main
from offsite_ray.cli.output import summary
from offsite_ray.cli.progress import Lines
from offsite_ray.cli.verbs import VERBS
from offsite_ray.errors import StorageError, TrainingError
from offsite_ray.results import EvalRecord, RunStart, StepRecord

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_ray import config as configs

DISTILL = ("--model", "m", "--bundle", "b", "--data", "d", "--out", "o")


def offsite_ray(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offsite_ray", *words]
    environ = {**os.environ, **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ)


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    """Replace a module that a verb imports, for one test."""
    fake = types.ModuleType(module)
    vars(fake).update(names)
    monkeypatch.setitem(sys.modules, module, fake)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_models import save_tiny

    return save_tiny("gpt2", tmp_path_factory.mktemp("cli") / "model")


# Help and start-up


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from offsite_ray.cli import main; main(['--help']); main(['distill', '-h']);"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'rich', 'yaml', 'pyarrow'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_verb_the_verbs_are_listed_in_the_order_of_the_loop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and "--" not in line]
    order = (
        "compress unpack prepare distill finetune plug-in evaluate sweep serve submit runs "
        "estimate inspect verify doctor demo"
    )
    assert " ".join(listed) == " ".join(VERBS) == order


def test_the_version_is_that_of_the_package() -> None:
    from offsite_ray import __version__

    done = offsite_ray("--version")
    assert (done.returncode, done.stdout) == (0, f"offsite-ray {__version__}\n")


def test_help_wins_over_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--nonsense", "--help"]) == 0
    assert "usage: offsite-ray compress --model MODEL" in capsys.readouterr().out


# Exit status


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["destill"], "error: unknown verb 'destill'; did you mean 'distill'? (known: "),
        (["--json", "inspect"], "error: flag '--json' stands before the verb"),
        (["compress", "--frobnicate"], "error: unknown flag '--frobnicate'"),
        (["evaluate", "--model", "m"], "error: nothing to measure"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"offsite-ray: {said}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StorageError("no\nspace"), 2, "offsite-ray: error: no space\n"),
        (StorageError("a\x1b[2Jb\u202ec"), 2, "offsite-ray: error: a\\x1b[2Jb\\u202ec\n"),
        (TrainingError("loss is nan"), 1, "offsite-ray: error: loss is nan\n"),
        (KeyboardInterrupt(), 130, "offsite-ray: interrupted\n"),
        (
            KeyError("x"),
            1,
            "offsite-ray: error: KeyError: 'x' (set OFFSITE_RAY_TRACEBACK=1 for the traceback)\n",
        ),
    ],
)
def test_errors_have_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def fail(path: str, blocks: str | None) -> None:
        raise error

    stand_in(monkeypatch, "offsite_ray.inspection", inspect_path=fail)
    assert main(["inspect", "p", "--json"]) == status
    assert capsys.readouterr() == ("", said)


def test_the_traceback_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: str, blocks: str | None) -> None:
        raise KeyError(path)

    stand_in(monkeypatch, "offsite_ray.inspection", inspect_path=fail)
    monkeypatch.setenv("OFFSITE_RAY_TRACEBACK", "1")
    assert main(["inspect", "p"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "offsite-ray: error: KeyError: 'p'"


def test_a_reader_that_has_gone_is_no_error() -> None:
    command = f"{sys.executable} -m offsite_ray --help | true"
    piped = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(piped, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# What stdout gets


def test_json_is_all_that_stdout_gets(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    flags = ("--model", str(model), "--plan", "1-2-1", "--out", str(out), "--json")
    done = offsite_ray("compress", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["out"] == str(out)
    assert result["plan"] == "1-2-1"
    assert result["adapter"] == [0, 5]
    assert len(result["emulator"]) == 2
    assert (out / "offsite.json").is_file()


def test_a_summary_is_aligned_and_a_second_run_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(model), "--plan", "1-2-1", "--out", str(tmp_path / "b")]
    assert main(["compress", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "plan              1-2-1" in lines
    assert "adapter           0, 5" in lines
    assert all(line[16:18] == "  " and line[18] != " " for line in lines)
    assert main(["compress", *flags]) == 2
    assert str(tmp_path / "b") in capsys.readouterr().err


def test_inspect_prints_what_is_in_a_bundle(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("offsite_ray.inspection", reason="offsite_ray.inspection is not there")
    out = str(tmp_path / "b")
    assert main(["compress", "--model", str(model), "--plan", "1-2-1", "--out", out]) == 0
    capsys.readouterr()
    assert main(["inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "emulator_bundle"
    assert main(["verify", out]) == 0
    said = capsys.readouterr().out
    assert said.startswith("verdict          whole and unaltered; give --model")
    assert "emulator_bundle" in said
    assert main(["verify", out, "--model", str(model)]) == 0
    said = capsys.readouterr().out
    assert f"whole and unaltered, and it belongs to {model}\n" in said
    assert f"checked against  {model}\n" in said
    (tmp_path / "b" / "config.json").write_text("{}", encoding="utf-8")
    assert main(["verify", out]) == 2
    assert "config.json" in capsys.readouterr().err


def test_what_others_print_goes_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy(path: str, blocks: str | None) -> dict[str, Any]:
        print("from Python")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        return {"path": path}

    stand_in(monkeypatch, "offsite_ray.inspection", inspect_path=noisy)
    assert main(["inspect", "p", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"path": "p"}
    assert sorted(captured.err.splitlines()) == ["from C", "from Python", "from a child"]
    print("as before")
    os.write(1, b"as before\n")
    assert capfd.readouterr().out == "as before\n" * 2


def test_what_is_printed_after_the_result_goes_to_stderr() -> None:
    code = (
        "import atexit, os, sys, types; fake = types.ModuleType('offsite_ray.inspection');"
        "fake.inspect_path = lambda path, blocks: {'path': path};"
        "sys.modules['offsite_ray.inspection'] = fake; sys.argv = ['', 'inspect', 'p', '--json'];"
        "atexit.register(lambda: (print('late'), os.write(1, b'later')));"
        "from offsite_ray.cli import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"path": "p"}
    assert "late" in done.stderr


def test_a_summary_shows_units_and_no_control_characters() -> None:
    plain = {
        "bundle_bytes": 3 * 2**20, "seconds": 1.25, "peak_bytes": None, "ok": True, "ids": (0, 5),
        "name": "a\x1b[2Jb\nc", "deep": {"x": 0.123456789, "many": list(range(40))},
        "records": [{"a": 1}], "names": ["n" * 30] * 9,
    }  # fmt: skip
    assert summary(plain).splitlines() == [
        "bundle bytes  3.0 MiB",
        "seconds       1.2 s",
        "peak bytes    not measured",
        "ok            yes",
        "ids           0, 5",
        "name          a\\x1b[2Jb\\nc",
        "deep",
        "  x     0.12346",
        f"  many  {', '.join(map(str, range(20)))}, ... (40 in all)",
        "records       1 entries; --json has them",
        f"names         {', '.join(['n' * 30] * 3)}, ... (9 in all)",
    ]


def test_evaluate_prints_a_table_or_its_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tests.test_report import an_evaluation

    def evaluate(config: configs.EvaluateConfig, notice: Any) -> Any:
        notice("measuring")
        return an_evaluation()

    stand_in(monkeypatch, "offsite_ray.evaluation", evaluate=evaluate)
    words = ["evaluate", "--model", "m", "--text", "t", "--report", str(tmp_path / "r")]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert "Emulator fine-tuned" in captured.out
    assert captured.err.startswith("measuring\n")
    assert (tmp_path / "r" / "report.html").is_file()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["gaps"]["utility"] == 0.132
    assert result["settings"]["plug_in"]["perplexity"] > 1


# Training


@dataclasses.dataclass
class Trained:
    out: str
    fit: str


@pytest.mark.parametrize(("workers", "fit"), [(0, "here"), (2, "on ray")])
def test_training_verbs_get_what_runs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int, fit: str
) -> None:
    def distill(config: Any, fit: Any, report: Any, notice: Any, fill: Any) -> Trained:
        assert fill() == f"fill {fit()}"
        notice("hello")
        report(RunStart(total_steps=2, first_step=0, num_train=5, num_held_out=1))
        report(StepRecord(step=2, losses={"loss": 1.5, "lm": 2.0}, learning_rate=0.1))
        return Trained(out=config.out, fit=fit())

    import offsite_ray.training.metrics  # noqa: F401  # before its package is replaced

    stand_in(
        monkeypatch,
        "offsite_ray.distillation",
        distill=distill,
        fill_here=lambda: "fill here",
    )
    stand_in(monkeypatch, "offsite_ray.training", run_here=lambda: "here")
    stand_in(
        monkeypatch,
        "offsite_ray.train",
        run_on_ray=lambda: "on ray",
        fill_on_ray=lambda report: "fill on ray",
    )
    assert main(["distill", *DISTILL, "--num-workers", str(workers), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"out": "o", "fit": fit}
    assert captured.err.splitlines() == [
        "hello",
        "2 steps; 5 sequences to train on, 1 held out",
        "step 2/2  loss 1.5 (lm 2)",
    ]


def test_lines_come_every_ten_seconds_and_at_each_evaluation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    lines = Lines(clock=lambda: now)
    lines(RunStart(total_steps=9, first_step=3, num_train=5, num_held_out=1))
    for step in range(4, 10):
        now += 4.0
        lines(StepRecord(step=step, losses={"loss": 2.0}, learning_rate=0.1, tokens_per_s=1234.5))
        if step == 7:
            lines(EvalRecord(step=step, losses={"loss": 3.0}))
    assert capsys.readouterr().err.splitlines() == [
        "9 steps, from step 3; 5 sequences to train on, 1 held out",
        "step 6/9  loss 2  1,234 tokens/s",
        "step 7/9  held-out loss 3",
        "step 9/9  loss 2  1,234 tokens/s",
    ]


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    import io

    from rich.console import Console
    from rich.progress import Progress

    from offsite_ray.cli.progress import Bar

    progress = Progress("{task.fields[loss]} {task.fields[held_out]}", console=Console(
        file=io.StringIO(), width=200
    ))  # fmt: skip
    bar = Bar(progress, "distill")
    bar(RunStart(total_steps=9, first_step=3, num_train=5, num_held_out=1))
    assert (progress.tasks[0].total, progress.tasks[0].completed) == (9, 3)
    bar(StepRecord(step=4, losses={"loss": 2.0}, learning_rate=0.1))
    bar(EvalRecord(step=4, losses={"loss": 3.0}))
    assert progress.tasks[0].completed == 4
    assert progress.tasks[0].fields == {"loss": "loss 2", "held_out": "held-out 3"}
