"""The command line, on small untrained checkpoints; some of it in a process of its own."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import genssm
from genssm.checkpoint import Checkpoint, save
from genssm.cli import app
from genssm.codec import Codec, Image
from genssm.commands.sample import _draw, _summarize
from genssm.files import Output
from genssm.model import SequenceModel
from genssm.pipeline import Pipeline, load
from genssm.request import DEFAULTS, GUIDANCE, Request

COMMAND = [sys.executable, "-m", "genssm.cli"]


@pytest.fixture(scope="module")
def folders(
    make_checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Modality → the folder of a checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {m: str(save(make_checkpoint(m), root / m)) for m in ("text", "image", "audio")}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)

    return call


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, capture_output=True)
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 0.5


def test_the_version_is_that_of_the_package(run) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"genssm {project['version']}\n")
    assert project["version"] == genssm.__version__


def test_text_streams_to_stdout_and_the_seed_to_stderr(run, folders) -> None:
    result = run("sample", "-m", folders["text"], "-p", "The fox", "--max-tokens", 8, "--seed", 5)
    assert result.exit_code == 0
    assert result.stdout.startswith("The fox")
    assert result.stdout.endswith("\n")
    assert "seed 5" in result.stderr
    again = run("sample", "-m", folders["text"], "-p", "The fox", "--max-tokens", 8, "--seed", 5)
    assert again.stdout == result.stdout


def test_quiet_says_nothing_on_stderr(run, folders) -> None:
    result = run("sample", "-m", folders["text"], "--max-tokens", 3, "-q")
    assert (result.exit_code, result.stderr) == (0, "")


def test_prompts_from_stdin_and_file(run, folders, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("The quick")
    for prompt, stdin in (("-", "The quick"), ("p.txt", None)):
        result = run(
            "sample", "-m", folders["text"], "-p", prompt, "--max-tokens", 4, "--json", stdin=stdin
        )
        assert json.loads(result.stdout)["text"].startswith("The quick")


def test_json_prints_one_line_per_sample(run, folders) -> None:
    result = run("sample", "-m", folders["text"], "-n", 3, "--max-tokens", 6, "--json", "--seed", 1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(lines) == 3
    for index, line in enumerate(lines):
        assert line["index"] == index
        assert line["seed"] == 1
        assert line["modality"] == "text"
        assert 1 <= line["tokens"] <= 6
        assert line["bits"] > 0
        assert {"model", "prompt", "text", "seconds", "tokens_per_second"} <= set(line)


def test_the_engine_can_be_chosen_and_is_named(run, folders) -> None:
    choices = {"cpu bf16": (), "cpu int8": ("--weights", "int8"), "eager": ("--engine", "eager")}
    for name, options in choices.items():
        result = run("sample", "-m", folders["text"], "--max-tokens", 3, "--json", *options)
        assert json.loads(result.stdout)["engine"] == name
    result = run("sample", "-m", folders["text"], "--max-tokens", 3, "--weights", "fp8")
    assert result.exit_code == 2
    assert "weights must be one of bf16, fp32, int8; got 'fp8'" in result.stderr


def test_pictures_go_to_a_grid(run, folders, tmp_path) -> None:
    import PIL.Image

    result = run("sample", "-m", folders["image"], "-p", "dog", "-n", 3, "-o", "grid.png")
    assert (result.exit_code, result.stdout) == (0, "grid.png\n")
    assert PIL.Image.open(tmp_path / "grid.png").size == (2 * 3 + 2, 2 * 4 + 2)


def test_a_picture_is_completed(run, folders, tmp_path, write_picture) -> None:
    import PIL.Image

    picture = np.random.default_rng(0).integers(0, 256, (4, 3, 3), np.uint8)
    write_picture(tmp_path / "in.png", picture)
    result = run(
        "sample", "-m", folders["image"], "-p", "in.png", "--keep-rows", 3, "-o", "out.png"
    )
    assert result.exit_code == 0
    completed = np.asarray(PIL.Image.open(tmp_path / "out.png"))
    np.testing.assert_array_equal(completed[:3], picture[:3])


def test_a_picture_of_another_size_is_fitted(run, folders, tmp_path, write_picture) -> None:
    write_picture(tmp_path / "in.png", np.full((90, 200, 3), 77, np.uint8))
    result = run("sample", "-m", folders["image"], "-p", "in.png", "-o", "out.png")
    assert result.exit_code == 0


def test_sound_without_out_gets_a_name_of_its_own(run, folders, tmp_path) -> None:
    import soundfile

    for n in (1, 2):
        result = run("sample", "-m", folders["audio"], "-p", "two", "--seconds", 0.01)
        assert result.stdout == f"audio-{n}.wav\n"
        wave, rate = soundfile.read(tmp_path / f"audio-{n}.wav")
        assert rate == 8000
        assert len(wave) <= 80


def test_the_speed_is_that_of_all_batches(folders, monkeypatch, capsys) -> None:
    monkeypatch.setattr("genssm.pipeline.LARGEST_BATCH", 2)
    pipe = load(folders["text"], engine="eager")
    sessions = list(pipe.batches(pipe.plan("The", Request(count=4, max_tokens=8, seed=1))))
    samples = [sample for session in sessions for sample in session.run()]
    tokens = sum(len(sample.tokens) for sample in samples)
    for session, seconds in zip(sessions, (0.25, 0.75), strict=True):
        session.seconds = seconds
    _summarize(samples[:1], Output(pipe, None, 1, False, "The"), sessions)
    assert f" · {tokens} tokens/s · " in capsys.readouterr().err


def test_several_clips_are_numbered(run, folders, tmp_path) -> None:
    result = run("sample", "-m", folders["audio"], "-n", 2, "--seconds", 0.01, "-o", "c.flac")
    assert result.stdout == "c-1.flac\nc-2.flac\n"
    assert (tmp_path / "c-2.flac").exists()


def test_a_clip_is_continued(run, folders, tmp_path, write_sound) -> None:
    import soundfile

    write_sound(tmp_path / "in.wav", 0.2 * np.sin(np.arange(160) / 4), 16000)
    result = run(
        "sample", "-m", folders["audio"], "-p", "in.wav", "--seconds", 0.01, "-o", "out.wav"
    )
    assert result.exit_code == 0
    wave, _ = soundfile.read(tmp_path / "out.wav")
    assert 80 <= len(wave) <= 160


def test_existing_files_are_kept_without_force(run, folders, tmp_path) -> None:
    (tmp_path / "a.png").write_text("precious")
    refused = run("sample", "-m", folders["image"], "-o", "a.png")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert (tmp_path / "a.png").read_text() == "precious"
    assert run("sample", "-m", folders["image"], "-o", "a.png", "--force").exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 0.7), ("top_k", 9), ("top_p", 0.9), ("min_p", 0.1), ("plausible", 0.2),
        ("repetition_penalty", 1.3),
    ],
)  # fmt: skip
def test_every_setting_reaches_the_samples(run, folders, option: str, value: float) -> None:
    arguments = ("sample", "-m", folders["text"], "--max-tokens", 2, "--json", "--seed", 1)
    made = run(*arguments, f"--{option.replace('_', '-')}", value, "--stop", "qqq")
    recipe = json.loads(made.stdout)["recipe"]
    assert recipe["sampling"][option] == value
    assert recipe["stop"] == ["qqq"]


def test_the_duration_of_a_sound_reaches_it(run, folders) -> None:
    made = [
        run(
            "sample",
            "-m",
            folders["audio"],
            "--duration",
            seconds,
            "-o",
            f"{seconds}.wav",
            "--json",
        )
        for seconds in (0.004, 0.008)
    ]
    first, second = (json.loads(r.stdout)["recipe"]["tokens"] for r in made)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_state_file_is_continued(run, folders, tmp_path) -> None:
    settings = ("-m", folders["text"], "--max-tokens", 8, "--seed", 5, "--json")
    first = run("sample", *settings, "-p", "The fox", "--save-state", "a.state")
    assert first.exit_code == 0
    text = json.loads(first.stdout)["text"]
    continued = [run("sample", *settings, "--state", "a.state") for _ in range(2)]
    lines = [json.loads(r.stdout) for r in continued]
    assert lines[0]["text"] == lines[1]["text"]
    assert lines[0]["text"].startswith(text.rstrip("\ufffd"))  # a character may be half drawn
    assert lines[0]["tokens"] == 8
    (tmp_path / "line.json").write_text(continued[0].stdout)
    lost = run("sample", "--like", "line.json", "--json")
    assert (lost.exit_code, lost.stdout) == (2, "")
    assert "continue a state file" in lost.stderr
    again = run("sample", "--like", "line.json", "--state", "a.state", "--json")
    assert json.loads(again.stdout)["text"] == lines[0]["text"]


@pytest.mark.parametrize("criterion", ["bits", "class"])
def test_a_picture_is_repeated(run, folders, tmp_path, criterion: str) -> None:
    ranked = ("--rank", 2, "--rank-by", criterion)
    made = ("-p", "dog", "-n", 3, "--guidance", 1.5, *ranked, "-o", "a.png")
    assert run("sample", "-m", folders["image"], *made).exit_code == 0
    assert run("sample", "--like", "a.png", "-o", "b.png").stdout == "b.png\n"
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


def test_a_clip_is_repeated_at_its_rate(run, folders, tmp_path) -> None:
    import soundfile

    made = ("-p", "two", "--rate", 0.5, "--seconds", 0.01, "-n", 2, "-o", "a.wav")
    assert run("sample", "-m", folders["audio"], *made).stdout == "a-1.wav\na-2.wav\n"
    assert soundfile.info(tmp_path / "a-2.wav").samplerate == 16000
    assert soundfile.info(tmp_path / "a-2.wav").frames <= 160
    assert run("sample", "--like", "a-2.wav", "-o", "b.wav").exit_code == 0
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "a-2.wav").read_bytes()


def test_too_little_memory_is_one_sentence(run, folders, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 GB")

    monkeypatch.setattr("genssm.pipeline.load", full)
    result = run("score", "x", "-m", folders["text"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "there is not enough memory; make model, batch or length smaller" in result.stderr


def test_bytes_that_are_no_text_are_named(folders) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "genssm", "score", "-", "-m", folders["text"]],
        input=b"caf\xe9", capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"},
    )  # fmt: skip
    assert done.returncode == 2
    assert b"the prompt '-' is not UTF-8 text (byte 3); convert it" in done.stderr


def test_json_is_ascii_whatever_the_terminal_writes(run, folders, tmp_path) -> None:
    made = run("sample", "-m", folders["text"], "-p", "café 😀", "--max-tokens", 6, "--json").stdout
    assert made.isascii()
    assert json.loads(made)["recipe"]["prompt"] == "café 😀"


def test_long_files_of_json_lines_are_repeated(run, folders, tmp_path, monkeypatch) -> None:
    """Each line is bounded, not all of them together."""
    made = run("sample", "-m", folders["text"], "-n", 4, "--max-tokens", 6, "--json").stdout
    (tmp_path / "a.json").write_text(made)
    monkeypatch.setattr("genssm.notes.LARGEST", max(map(len, made.splitlines())) + 1)
    assert run("sample", "--like", "a.json", "--json").stdout.count("\n") == 4
    monkeypatch.setattr("genssm.notes.LARGEST", 100)
    assert "a line is longer than 100 bytes" in run("sample", "--like", "a.json").stderr


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_json_lines_are_repeated(run, folders, tmp_path, weights: str) -> None:
    made = ("-p", "The", "-n", 3, "--max-tokens", 6, "--weights", weights, "--json")
    first = run("sample", "-m", folders["text"], *made).stdout
    (tmp_path / "a.json").write_text(first)
    again = run("sample", "--like", "a.json", "--json").stdout
    timed = ("seconds", "tokens_per_second")
    facts = [
        [{k: v for k, v in json.loads(x).items() if k not in timed} for x in text.splitlines()]
        for text in (first, again)
    ]
    assert facts[0] == facts[1]
    for line in facts[0]:
        assert len(line["token_bits"]) == line["tokens"]
        assert sum(line["token_bits"]) == pytest.approx(line["bits"], abs=0.01)


def test_score_says_bits_in_total_and_per_unit(run, folders) -> None:
    plain = run("score", "The fox", "-m", folders["text"])
    assert "bits/byte  (" in plain.stdout
    facts = json.loads(run("score", "The fox", "-m", folders["text"], "--json").stdout)
    assert facts["units"] == 7
    assert facts["value"] == pytest.approx(facts["bits"] / 7)
    assert sum(facts["token_bits"]) == pytest.approx(facts["bits"], abs=0.01)
    stdin = json.loads(run("score", "-", "-m", folders["text"], "--json", stdin="The fox").stdout)
    assert stdin == facts


@pytest.mark.parametrize("command", [["sample", "--prompt"], ["score"]])
def test_sound_that_is_cut_short_is_refused(
    run, folders, tmp_path, write_sound, command: list[str]
) -> None:
    whole = write_sound(tmp_path / "whole.wav", np.zeros(80)).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:-90])
    assert run(*command, "whole.wav", "-m", folders["audio"]).exit_code == 0
    refused = run(*command, "cut.wav", "-m", folders["audio"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "'cut.wav' is cut short: its header tells of more samples" in refused.stderr


def test_bytes_need_a_stdout(folders) -> None:
    command = [*COMMAND, "sample", "-m", folders["image"], "-p", "dog", "-o", "-"]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert b"stdout, which is closed; give --out a file" in done.stderr


def test_score_classifies(run, folders, tmp_path, write_picture) -> None:
    write_picture(tmp_path / "a.png", np.zeros((4, 3, 3), np.uint8))
    facts = json.loads(run("score", "a.png", "-m", folders["image"], "--classify", "--json").stdout)
    assert set(facts["classes"]) == {"cat", "dog"}
    assert sum(facts["classes"].values()) == pytest.approx(1)
    lines = run("score", "a.png", "-m", folders["image"], "--classify").stdout.splitlines()
    assert len(lines) == 2
    labelled = run("score", "a.png", "-m", folders["image"], "--label", "dog")
    assert "bits/dim  (36 tokens, 36 dims)" in labelled.stdout


def test_evaluate_says_what_another_rate_costs(run, folders, tmp_path, write_sound) -> None:
    write_sound(tmp_path / "a.wav", 0.3 * np.sin(np.arange(80) / 3))
    units = []
    for rate in (1.0, 0.5):
        result = run("evaluate", folders["audio"], "--data", "a.wav", "--rate", rate, "--json")
        units.append(json.loads(result.stdout)["units"])
    assert units == [80, 160]


def test_a_folder_of_texts_takes_a_prompt_as_one_sample_does(run, folders, tmp_path) -> None:
    (tmp_path / "p.txt").write_text("The fox")
    for out, (prompt, stdin) in {"a": ("p.txt", None), "b": ("-", "The fox")}.items():
        made = ("-m", folders["text"], "-p", prompt, "--max-tokens", 2, "-o", f"{out}/")
        assert run("sample", *made, stdin=stdin).exit_code == 0
        assert (tmp_path / out / "000000.txt").read_text().startswith("The fox")
    run("sample", "-m", folders["text"], "-p", "The fox", "--max-tokens", 2, "-o", "c/")
    assert len({(tmp_path / f / "000000.txt").read_bytes() for f in "abc"}) == 1


def test_several_processes_share_no_stdin(run, folders, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    refused = run("sample", "-m", folders["text"], "-p", "-", "-o", "a/", stdin="The fox")
    assert (refused.exit_code, Path("a").exists()) == (2, False)
    assert "several processes cannot share stdin" in refused.stderr


def test_a_text_has_the_ends_of_lines_that_its_file_has(run, folders, tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\r\n")
    scored = [
        run("score", source, "-m", folders["text"], "--json", stdin=stdin).stdout
        for source, stdin in (("a.txt", None), ("-", b"a\r\nb\r\n"), ("a\r\nb\r\n", None))
    ]
    assert len(set(scored)) == 1
    assert json.loads(scored[0])["units"] == 6


def test_a_prompt_is_text_whatever_the_locale(folders) -> None:
    made = {}
    for source, stdin in (("café", b""), ("-", "café".encode())):
        for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONUTF8": "1"}):
            done = subprocess.run(
                [*COMMAND, "score", source, "-m", folders["text"]],
                input=stdin, capture_output=True, check=True, env=os.environ | locale,
            )  # fmt: skip
            made[source, locale["PYTHONUTF8"]] = done.stdout
    assert len(made) == 4
    assert len(set(made.values())) == 1


def test_the_state_is_kept_when_the_reader_of_the_text_has_gone(folders, tmp_path) -> None:
    made = ("-m", folders["text"], "-p", "The", "--max-tokens", 400, "--seed", 5, "-q")
    for kept, after in (("a", " | head -c 5"), ("b", " > b.txt")):
        command = [*COMMAND, "sample", *map(str, made), "--save-state", kept]
        subprocess.run(
            ["sh", "-c", f'"$@"{after}', "sh", *command], cwd=tmp_path, check=True,
            env={**os.environ, "PYTHONPATH": str(Path(genssm.__file__).parents[1])},
        )  # fmt: skip
    kept, whole = (load_file(tmp_path / name) for name in "ab")
    assert kept.keys() == whole.keys()
    assert all(torch.equal(kept[name], whole[name]) for name in whole)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["models"]])
def test_a_full_disk_under_stdout_is_one_sentence(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_state_is_kept_when_the_disk_of_the_text_is_full(folders, tmp_path) -> None:
    made = ["-m", folders["text"], "--max-tokens", "9", "--save-state", str(tmp_path / "a")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "sample", *made], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "genssm: [Errno 28] No space left on device\n")
    assert (tmp_path / "a").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_notes_costs_no_sample(folders) -> None:
    made = ["sample", "-m", folders["text"], "-p", "The fox", "--max-tokens", "2"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*COMMAND, *made], stderr=full, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout[:7]) == (0, b"The fox")


def test_no_garbage_is_looked_for_until_the_first_piece(run, folders, monkeypatch) -> None:
    looked: list[bool] = []

    def draw(sessions: Any, live: bool, begun: Callable[[], None], *rest: Any) -> Any:
        def told() -> None:
            looked.append(gc.isenabled())
            begun()
            looked.append(gc.isenabled())

        return _draw(sessions, live, told, *rest)

    monkeypatch.setattr("genssm.commands.sample._draw", draw)
    assert run("sample", "-m", folders["text"], "--max-tokens", 2).exit_code == 0
    assert looked[:2] == [False, True]
    assert all(looked[1:])
    assert run("sample", "-m", folders["text"], "--temperature", -1).exit_code == 2
    assert gc.isenabled()
    gc.disable()  # by who calls us, whose choice it is
    try:
        assert run("sample", "-m", folders["text"], "--max-tokens", 2).exit_code == 0
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize("out", [(), ("-o", "a.png")])
def test_a_file_of_another_process_is_not_lost(
    run, folders, tmp_path, monkeypatch, out: tuple[str, ...]
) -> None:
    """It appears while ours is drawn: an own name gives way, a given one is refused."""
    theirs = tmp_path / (out[1] if out else "image-1.png")

    def draw(*arguments: Any, **options: Any) -> Any:
        theirs.write_bytes(b"theirs")
        return _draw(*arguments, **options)

    monkeypatch.setattr("genssm.commands.sample._draw", draw)
    made = run("sample", "-m", folders["image"], "-p", "dog", *out)
    assert theirs.read_bytes() == b"theirs"
    if out:
        assert (made.exit_code, made.stdout) == (2, "")
        assert "'a.png' has been made meanwhile; use --force" in made.stderr
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
        assert run("sample", "-m", folders["image"], "-p", "dog", *out, "--force").exit_code == 0
        assert theirs.read_bytes() != b"theirs"
    else:
        assert (made.exit_code, made.stdout) == (0, "image-2.png\n")
        assert (tmp_path / "image-2.png").stat().st_size > 0


def test_a_link_to_nothing_is_no_free_name(run, folders, tmp_path) -> None:
    (tmp_path / "image-1.png").symlink_to("nothing")
    assert run("sample", "-m", folders["image"], "-p", "dog").stdout == "image-2.png\n"
    refused = run("sample", "-m", folders["image"], "-p", "dog", "-o", "image-1.png")
    assert (refused.exit_code, "exists; use --force" in refused.stderr) == (2, True)
    forced = run("sample", "-m", folders["image"], "-p", "dog", "-o", "image-1.png", "--force")
    assert forced.exit_code == 0
    assert not (tmp_path / "nothing").exists()


def test_a_sample_that_cannot_be_written_leaves_no_empty_file(
    run, folders, tmp_path, monkeypatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("genssm.files.replace_file", full)
    made = run("sample", "-m", folders["audio"], "-n", 2, "--seconds", 0.01, "-o", "a.wav")
    assert (made.exit_code, list(tmp_path.iterdir())) == (1, [])


def test_a_state_is_not_written_in_the_place_of_its_sample(run, folders, tmp_path) -> None:
    made = run("sample", "-m", folders["audio"], "--save-state", "audio-1.wav", "--seconds", 0.01)
    assert (made.exit_code, list(tmp_path.iterdir())) == (2, [])
    assert "the state and the sample need a file each" in made.stderr


def test_rates_that_a_format_cannot_hold_are_refused_before_the_sample(
    run, folders, monkeypatch
) -> None:
    monkeypatch.delattr("genssm.commands.sample._draw")
    made = ("-m", folders["audio"], "--rate", 0.0417, "--seconds", 0.01, "-o", "a.flac")
    refused = run("sample", *made)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "a flac file cannot hold sound of 191847 Hz; write a .wav file" in refused.stderr


def test_files_may_have_the_longest_names(run, folders, tmp_path) -> None:
    names = ["é" * 125 + ".png", "s" * 255]
    made = ("-p", "dog", "-o", names[0], "--save-state", names[1])
    assert run("sample", "-m", folders["image"], *made).exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


@pytest.mark.parametrize("name", [".", "../here"])
def test_a_file_is_named_by_the_folder_of_its_model(
    run, folders, tmp_path, monkeypatch, name: str
) -> None:
    shutil.copytree(folders["image"], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert run("sample", "-m", name, "-p", "dog").stdout == "here-1.png\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sample", "-m", "wikki"], 2, "did you mean 'wiki'?"),
        (["sample", "-m", "./notes.png"], 2, "'./notes.png' is a file; give the checkpoint's"),
        (["sample", "-m", "IMAGE", "-p", "bird"], 2, "neither a file nor a class"),
        (["sample", "-m", "IMAGE", "-p", "notes.png"], 2, "'notes.png' is not a readable picture"),
        (["sample", "-m", "AUDIO", "-p", "notes.png"], 2, "is not a readable sound file"),
        (["sample", "-m", ""], 2, "there is no model ''"),
        (["sample", "-m", "TEXT", "-p", "missing.txt"], 2, "'missing.txt': No such file"),
        (["sample", "-m", "TEXT", "-p", "bytes.txt"], 2, "is not UTF-8 text (byte 1)"),
        (["sample", "-m", "TEXT", "--engine", "eager", "--weights", "int8"], 2, "take the engine"),
        (["sample", "-m", "TEXT", "--top-k", "9" * 30], 2, "0 <= top_k < 2^31, got 999"),
        (["sample", "-m", "TEXT", "--seconds", "1"], 2, "--seconds is for sound"),
        (["sample", "-m", "AUDIO", "--seconds", "inf"], 2, "less than a million"),
        (["sample", "-m", "TEXT", "-n", "1000000000"], 2, "count × rank must be at most"),
        (["sample", "-m", "TEXT", "--keep-rows", "1"], 2, "keep_rows needs a picture"),
        (["sample", "-m", "TEXT", "--top-p", "7"], 2, "top_p <= 1, got 7.0"),
        (["sample", "-m", "IMAGE", "-o", "a.txt"], 2, "must end in .png"),
        (["sample", "-m", "IMAGE", "-o", "nowhere/a.png"], 2, "there is no folder 'nowhere'"),
        (["sample", "-m", "TEXT", "-o", ""], 2, "--out needs a file, a folder/ or -"),
        (["sample", "-m", "TEXT", "-o", "notes.png/"], 2, "'notes.png' is a file; give a folder"),
        (["sample", "-m", "IMAGE", "-o", "a/", "--label", "cat"], 2, "--label; a class is its"),
        (
            ["sample", "-m", "IMAGE", "-o", "a/", "--force"],
            2,
            "a folder of samples takes no --force",
        ),
        (["sample", "-m", "AUDIO", "-o", "-", "-n", "2"], 2, "several clips"),
        (["sample", "--count", "0"], 2, "--count"),
        (["sample", "-m", "TEXT", "--guidance", "2"], 2, "guidance needs a model with classes"),
        (["sample", "-m", "IMAGE", "--guidance", "2"], 2, "guidance needs a class"),
        (["sample", "-m", "IMAGE", "--rate", "0.5"], 2, "for sound only"),
        (["sample", "-m", "AUDIO", "--rate", "0"], 2, "must be a positive number"),
        (["sample", "-m", "TEXT", "--trim", "1"], 2, "trim must lie in"),
        (["sample", "-m", "TEXT", "--state", "notes.png"], 2, "is not a readable state file"),
        (["sample", "-m", "TEXT", "--state", "missing"], 2, "there is no state file"),
        (["sample", "-m", "TEXT", "-n", "2", "--save-state", "a"], 2, "keeps one sample"),
        (["sample", "-m", "TEXT", "--save-state", "notes.png"], 2, "--force"),
        (["sample", "-m", "TEXT", "--save-state", "no/a"], 2, "there is no folder 'no'"),
        (["sample", "-m", "TEXT", "--save-state", ".", "--force"], 2, "'.' is a folder; give the"),
        (["sample", "-m", "TEXT", "-o", os.devnull, "--force"], 2, "is no regular file; give the"),
        (["benchmark", "layers", "--out", ".", "--force"], 2, "'.' is a folder; give the name"),
        (["benchmark", "layers", "--out", os.devnull, "--force"], 2, "is no regular file; give"),
        (
            ["sample", "-m", "TEXT", "-o", "a.txt", "--save-state", "./a.txt"],
            2,
            "the state and the sample need a file each",
        ),
        (["sample", "-m", "IMAGE", "-o", "-", "--json"], 2, "both write to stdout"),
        (["evaluate", "TEXT", "--data", ".", "--record", ""], 2, "--record needs a name"),
        (["train", "digits", "--data", ".", "-o", ""], 2, "--out needs a folder of its own"),
        (["benchmark", "layers", "--out", "/proc/a.json"], 2, "cannot write in the folder '/proc'"),
        (["sample", "--like", "missing.png"], 2, "cannot read 'missing.png'"),
        (["sample", "--like", "notes.png"], 2, "it has no recipe"),
        (["sample", "--like", "a.png", "--temperature", "0"], 2, "leave out --temperature"),
        (["score", "cat", "-m", "IMAGE"], 2, "a class has no likelihood"),
        (["score", "notes.png", "-m", "IMAGE"], 2, "is not a readable picture"),
        (["score", "", "-m", "TEXT"], 2, "nothing to score"),
        (["score", "x", "-m", "TEXT", "--classify"], 2, "needs a model with classes"),
        (["evaluate", "TEXT", "--data", ".", "--rate", "2"], 1, "for sound only"),
        (["sample", "--nonsense"], 2, "--nonsense"),
        (["evaluate", "TEXT", "--data", "missing.txt"], 1, "there is no file or folder"),
        (["evaluate", "TEXT", "--data", "notes.png"], 1, "not readable UTF-8 text"),
        (["evaluate", "IMAGE", "--data", "notes.png"], 1, "is not a readable picture"),
        (["train", "nonsense", "--data", ".", "-o", "o"], 2, "there is no recipe 'nonsense'"),
        (["train", "digits", "--data", ".", "-o", "o", "--set", "x=1"], 2, "unknown setting 'x'"),
        (["train", "digits", "--data", ".", "-o", "o", "--set", "x"], 2, "key=value"),
        (["train", "digits", "--data", ".", "-o", "o"], 1, "must hold one file or folder"),
        (["train", "digits", "--data", ".", "-o", "o", "--resume"], 1, "no training to resume"),
        (["inspect", "."], 1, "has no config.json"),
    ],
)
def test_errors_are_one_sentence(run, folders, tmp_path, arguments, code, message) -> None:
    (tmp_path / "notes.png").write_bytes(b"\xff\xfe not a picture")
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    names = {m.upper(): folder for m, folder in folders.items()}
    result = run(*[names.get(a, a) for a in arguments])
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_standard_input_that_is_no_text_is_refused_by_its_place(run, folders) -> None:
    for arguments in (["sample", "-p", "-"], ["score", "-"]):
        result = run(*arguments, "-m", folders["text"], stdin=b"ab\xff")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "the prompt '-' is not UTF-8 text (byte 2); convert it" in result.stderr


def test_nothing_is_drawn_for_a_folder_that_takes_no_files(run, folders, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(Pipeline, "batches", None)
    for model, option in (("text", "--out"), ("image", "--out"), ("text", "--save-state")):
        name = "a.png" if model == "image" else "a"
        result = run("sample", "-m", folders[model], option, name)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "cannot write in the folder '.': Permission denied; give another" in result.stderr


def test_a_closed_stdout_is_no_error(folders) -> None:
    closed = [*COMMAND, "sample", "-m", folders["text"], "--max-tokens", "2", "--engine", "eager"]
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *closed], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_what_an_encoding_lacks_is_written_by_its_number(folders) -> None:
    arguments = ["sample", "-m", folders["text"], "-p", "Ωx", "--max-tokens", "0", "-q"]
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u03a9x\n", b"")


def test_help_states_the_defaults_that_depend_on_the_model(run) -> None:
    stated = " ".join(run("sample", "--help").stdout.split())
    for modality, name in (("image", "pictures"), ("audio", "sound")):
        assert f"{name} {GUIDANCE[modality]:g}" in stated
    for modality, name in (("text", "text"), ("image", "pictures"), ("audio", "sound")):
        assert f"{name} {DEFAULTS[modality].temperature:g}" in stated
    assert f"(text {DEFAULTS['text'].top_p:g})" in stated
    assert f"sound {DEFAULTS['audio'].plausible:g}" in stated


def test_the_folder_of_a_training_names_the_checkpoint_inside(run, folders, tmp_path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "checkpoint").symlink_to(folders["text"])
    result = run("sample", "-m", "runs")
    assert result.exit_code == 1
    assert "has no config.json; it is no genssm checkpoint; give 'runs/checkpoint'" in result.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nobody/nothing", "give it with --model"),
        ("x" * 10_000, "give it with --model"),
        ("\0", "give it with --model"),
    ],
)
def test_a_recipe_starts_no_download(run, folders, tmp_path, model, message) -> None:
    line = run("sample", "-m", folders["text"], "--max-tokens", 2, "--json").stdout
    facts = json.loads(line)
    facts["recipe"]["model"] = model
    (tmp_path / "a.json").write_text(json.dumps(facts))
    result = run("sample", "--like", "a.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr) < 400
    other = run("sample", "--like", "a.json", "-m", folders["audio"])
    assert other.exit_code == 2
    assert "made by another checkpoint" in other.stderr
    assert run("sample", "--like", "a.json", "-m", folders["text"]).exit_code == 0


def test_evaluate_prints_value_and_unit(run, folders, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(" = One = \n\nThe quick fox.\n = Two = \n\nThe lazy dog.\n")
    result = run("evaluate", folders["text"], "--data", "a.txt", "--json")
    facts = json.loads(result.stdout)
    assert facts["unit"] == "bits/byte"
    assert facts["examples"] == 2
    assert facts["units"] == (tmp_path / "a.txt").stat().st_size
    assert facts["value"] == pytest.approx(facts["bits"] / facts["units"])
    limited = json.loads(
        run("evaluate", folders["text"], "--data", "a.txt", "--json", "--limit", 1).stdout
    )
    assert limited["examples"] == 1
    assert "bits/byte" in run("evaluate", folders["text"], "--data", "a.txt").stdout


def test_a_measurement_is_recorded_in_the_checkpoint(
    run, make_checkpoint: Callable[[str], Checkpoint], tmp_path
) -> None:
    save(make_checkpoint("text"), tmp_path / "model")
    (tmp_path / "a.txt").write_text("The quick fox.")
    result = run("evaluate", "model", "--data", "a.txt", "--record", "mine", "--json")
    facts = json.loads(run("inspect", "model", "--json").stdout)
    assert facts["metrics"]["mine"]["unit"] == "bits/byte"
    assert facts["metrics"]["mine"]["value"] == pytest.approx(
        json.loads(result.stdout)["value"], abs=1e-4
    )


def test_models_lists_the_shipped_ones(run) -> None:
    names = [json.loads(line)["name"] for line in run("models", "--json").stdout.splitlines()]
    assert "wiki" in names
    assert "wiki" in run("models").stdout


def test_inspect_reports_sizes(run, folders) -> None:
    facts = json.loads(run("inspect", folders["image"], "--json").stdout)
    assert facts["period"] == 6
    assert facts["parameters"] > 0
    assert facts["state_bytes"] > 0


def test_train_then_sample(run, tmp_path, write_sound) -> None:
    for split, n in (("train", 4), ("validation", 2)):
        for i in range(n):
            wave = 0.3 * np.sin(np.arange(60) / (2 + i))
            write_sound(tmp_path / "data" / split / f"{i}_a.wav", wave)
    small = ["d_model=(8,16)", "n_layers=(1,1)", "pools=(4,)", "d_state=8", "batch_size=2"]
    settings = [argument for s in small for argument in ("--set", s)]
    result = run(
        "train", "digits", "--data", "data", "-o", "out", "--set", "steps=3", *settings
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out/checkpoint\n"
    assert "validation" in result.stderr
    assert (
        run("sample", "-m", "out/checkpoint", "-p", "3", "--seconds", 0.01, "-o", "a.wav").exit_code
        == 0
    )


def start(*arguments: str, cwd: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=environment,
        # Background jobs inherit an ignored SIGINT, which Python would keep ignoring.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def test_ctrl_c_ends_text_with_what_there_is(
    make_model: Callable[..., SequenceModel], codecs: dict[str, Codec], tmp_path: Path
) -> None:
    codec = codecs["text"]
    model = make_model("isotropic", vocab_size=codec.vocab_size, n_outputs=codec.n_outputs)
    with torch.no_grad():
        model.head.linear.bias[codec.boundary] = -1e4  # its text does not end by itself
    save(Checkpoint(model, codec), tmp_path / "endless")
    process = start(
        "sample", "-m", "endless", "-p", "The", "--max-tokens", "10000000", cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.read(20).startswith(b"The")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert b"seed" in errors


def test_ctrl_c_saves_the_partial_picture(
    make_model: Callable[..., SequenceModel], tmp_path: Path
) -> None:
    codec = Image(200, 200, 3)
    model = make_model(
        "image", vocab_size=codec.vocab_size, n_outputs=codec.n_outputs, image_shape=(200, 200, 3)
    )
    save(Checkpoint(model, codec), tmp_path / "slow")
    for seconds in (3, 9, 27):  # until it had begun to draw
        process = start("sample", "-m", "slow", "-o", "a.png", "--engine", "eager", cwd=tmp_path)
        time.sleep(seconds)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in errors
        if (tmp_path / "a.png").exists():
            break
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_between_two_batches_keeps_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first: Any = [(0, "a"), (0, "b")]

    def sessions() -> Any:
        yield first
        raise KeyboardInterrupt  # while the next batch is prepared

    assert _draw(sessions(), True, lambda: None) == ([first], True)
    assert capsys.readouterr().out == "ab"


def test_a_closed_pipe_is_silent(folders, tmp_path) -> None:
    process = start("sample", "-m", folders["text"], "--max-tokens", "3000", "-q", cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
