"""bench/gpu.py without a GPU: which stages run, what is remembered of them; bench/memory_try.py's search; the tables of
the README; the repacked wheel."""

import csv
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from bench import gpu, memory_try, readme, repack_bitsandbytes
from bench.gpu import ROOT, Stage, State, run_stage

RUN = {"sha": "abc1234", "device": "a card", "kind": "budget", "torch": "2.13"}


def test_a_stage_is_done_once_for_a_commit_and_a_card(tmp_path):
    state = State(tmp_path / "gpu.json")
    assert not state.is_done("tests", RUN)
    state.write("tests", {**RUN, "status": "done", "seconds": 1.0, "date": "2026-11-22"})
    state.write("ops", {**RUN, "status": "timed out", "seconds": 1.0, "date": "2026-11-22"})
    again = State(tmp_path / "gpu.json")
    assert again.is_done("tests", RUN)
    assert not again.is_done("ops", RUN)
    for other in ({"sha": "def"}, {"device": "another"}, {"kind": "all"}, {"torch": "2.14"}):
        assert not again.is_done("tests", {**RUN, **other})
    for sha in ("abc1234+", ""):  # nobody knows which code that was
        state.write("tests", {**RUN, "sha": sha, "status": "done"})
        assert not State(tmp_path / "gpu.json").is_done("tests", {**RUN, "sha": sha})


@pytest.mark.parametrize(
    ("code", "seconds", "status"),
    [
        ("print('x')", 60, "done"),
        ("raise SystemExit(3)", 60, "failed"),
        ("import time; time.sleep(60)", 1, "timed out"),
    ],
)
def test_how_a_stage_ends(tmp_path, code, seconds, status):
    found, took = run_stage(("-c", code), seconds, tmp_path / "log", rehearse=True)
    assert found == status
    assert took < 30
    said = (tmp_path / "log").read_text()
    assert said == "x\n" if "print" in code else "x" not in said


@pytest.mark.slow
@pytest.mark.parametrize("from_a_terminal", [True, False])
def test_what_is_ended_can_say_how_far_it_came(tmp_path, from_a_terminal):
    """Shells without job control start what ends in `&` with SIGINT ignored, and a stage would inherit that."""
    code = "try:\n import time; time.sleep(60)\nexcept KeyboardInterrupt:\n print('x')"
    before = signal.signal(signal.SIGINT, signal.default_int_handler if from_a_terminal else signal.SIG_IGN)
    try:
        # On a busy machine a process has taken more than 3 s until it came to `try`.
        found, took = run_stage(("-c", code), 15, tmp_path / "log", rehearse=True)
        assert (signal.getsignal(signal.SIGINT) is signal.SIG_IGN) is not from_a_terminal
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == "timed out"
    assert took < 30
    assert (tmp_path / "log").read_text() == "x\n"


def test_a_stage_ends_with_the_command(tmp_path):
    """`timeout 600 make gpu` ends it with SIGTERM."""
    arguments = ["--rehearse", "--only", "ops", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (started := list(tmp_path.glob("*/ops.log"))) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert started
            time.sleep(0.5)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.terminate()
            assert process.wait(30) == 128 + signal.SIGTERM
        finally:
            process.kill()
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_nothing_is_remembered_of_changed_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "stages", lambda results: (Stage("ops", (), 5, (), ("-c", "")),))
    for sha, said in (("abc1234+", "uncommitted changes"), ("", "PEFT_FAST_SHA"), ("abc1234", "")):
        monkeypatch.setattr(gpu, "LOADED", sha)
        assert gpu.main(["--rehearse", "--results", str(tmp_path)]) == 0
        found = capsys.readouterr().err
        assert said in found if said else not found


def test_a_run_goes_on_after_a_failure_and_begins_with_what_is_missing(tmp_path, monkeypatch, capsys):
    marker = tmp_path / "ran"
    once = ("-c", f"open({str(marker)!r}, 'a').write('x')")
    made = (
        Stage("ops", (), 5, (), ("-c", "raise SystemExit('broken')")),
        Stage("compare", (), 5, (), once),
    )
    monkeypatch.setattr(gpu, "stages", lambda results: made)
    monkeypatch.setattr(gpu, "LOADED", "abc1234")
    arguments = ["--rehearse", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert gpu.main(arguments) == 1
    assert marker.read_text() == "x"
    said = capsys.readouterr().out
    assert "broken" in said
    assert "compare    done before, at abc1234" in said
    assert gpu.main([*arguments, "--only", "compare", "--again"]) == 0
    assert marker.read_text() == "xx"
    (path,) = tmp_path.glob("*/gpu.json")
    assert {name: entry["status"] for name, entry in json.loads(path.read_text()).items()} == {
        "ops": "failed",
        "compare": "done",
    }


def test_wrong_arguments(capsys):
    for wrong, message in (
        (["--only", "tests,nothing"], "got nothing"),
        (["--rehearse", "--all"], "give one of them"),
    ):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)
        assert message in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "ARGS=--rehearse" in capsys.readouterr().err


def test_stages_fit_the_limit_and_their_files_are_there(tmp_path):
    stages = gpu.stages(tmp_path)
    assert [stage.name for stage in stages] == ["tests", "ops", "crossover", "compare", "profile", "memory"]
    assert sum(stage.seconds for stage in stages) <= gpu.LIMIT < 480
    files = {part for stage in stages for part in stage.command if part.startswith("tests/")}
    assert "tests/test_lora_matrix.py" in files
    assert all((ROOT / name).is_file() for name in files)
    assert not any("ecosystem" in name for name in files)


def test_a_stage_has_what_others_left():
    made = [Stage(name, (), seconds, (), ()) for name, seconds in (("a", 150), ("b", 90), ("c", 40))]
    assert gpu.seconds_for(made[0], made[1:], 280) == 150 - gpu.GRACE
    assert gpu.seconds_for(made[1], made[2:], 270) == 230 - gpu.GRACE
    assert gpu.seconds_for(made[1], made[2:], 100) == 90 - gpu.GRACE  # what it does not use is the next one's
    assert gpu.seconds_for(made[2], [], 3) < 0
    command = ("-m", "bench.run", "--seconds", gpu.SECONDS, "--missing")
    assert gpu.filled(command, 90, False) == ("-m", "bench.run", "--seconds", "60", "--missing")
    assert gpu.filled(command, 10, True) == ("-m", "bench.run", "--seconds", "1")


def test_no_time_left_for_a_stage(tmp_path, monkeypatch, capsys):
    made = (Stage("ops", ("-c", "0"), 5, (), ("-c", "0")),)
    monkeypatch.setattr(gpu, "stages", lambda results: made)
    monkeypatch.setattr(gpu, "seconds_for", lambda *_: 0.0)
    monkeypatch.setattr(gpu, "device_name", lambda device: "a card")
    monkeypatch.setattr(gpu, "folder_of", lambda device, results: tmp_path / "a-card")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    assert gpu.main(["--results", str(tmp_path)]) == 1
    assert "no time left" in capsys.readouterr().out


def test_what_was_tried_is_in_the_file_at_once(tmp_path, monkeypatch):
    def tried(shape, way, *_):
        if "norms" in way.name:
            raise KeyboardInterrupt
        return memory_try.Found(100, 103, True)

    arguments = ["memory_try", "--model", "small", "--only", "peft_fast", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(memory_try, "tried", tried)
    monkeypatch.setattr(memory_try.Calculated, "longest", lambda *_, **__: 100)
    monkeypatch.setattr(memory_try.Calculated, "_model", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        memory_try.main()
    (path,) = tmp_path.glob("*/memory.csv")
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("longest", [0, 511, 512, 513, 4000, 100_000, 262_144, 10**9])
def test_the_search_for_the_longest_row(longest):
    asked = []

    def fits(tokens: int) -> bool:
        asked.append(tokens)
        return tokens <= longest

    found, too_long, is_complete = memory_try.longest_that_fits(fits, 512, 262_144)
    expected = 0 if longest < 512 else min(longest, 262_144)
    assert expected * 0.96 <= found <= expected
    assert is_complete
    assert too_long == 0 if longest >= 262_144 else too_long > longest
    assert len(asked) < 20


def test_a_search_without_time_is_a_lower_bound(tmp_path, monkeypatch, capsys):
    cut = memory_try.longest_that_fits(lambda tokens: True, 512, 262_144, deadline=0.0)
    assert cut == (512, 0, False)
    arguments = ["memory_try", "--model", "small", "--only", "peft_fast, norms rec", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(memory_try, "tried", lambda *_: cut)
    monkeypatch.setattr(memory_try.Calculated, "longest", lambda *_, **__: 9000)
    monkeypatch.setattr(memory_try.Calculated, "_model", lambda *_: None)
    assert memory_try.main() == 1  # so that `make gpu` tries again, with the time that the others left
    said = capsys.readouterr()
    assert "at least 512 tried" in said.out
    assert "not enough for: peft_fast, norms recomputed" in said.err
    assert "| at least 512 | 9,000 |" in readme.tried(tmp_path)


def test_a_limit_beyond_the_card(monkeypatch):
    card = type("Card", (), {"total_memory": int(14.6 * memory_try.GIB)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    assert memory_try.limit_on(torch.device("cuda"), 24) == 14.6
    assert memory_try.limit_on(torch.device("cuda"), 8) == 8
    assert memory_try.limit_on(torch.device("cpu"), 24) == 24


@pytest.mark.slow
def test_trying_on_a_cpu_finds_what_was_calculated(tmp_path, monkeypatch):
    """The limit is what a step takes beside what is there; the small model has most of it in its tokens."""
    arguments = ["memory_try", "--limit", "1.03", "--only", "peft_fast, norms recomputed", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", arguments)
    assert memory_try.main() == 0
    (path,) = tmp_path.glob("*/memory.csv")
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert 16 < int(row["tried"]) < 256
    assert int(row["tried"]) == pytest.approx(int(row["calculated"]), rel=0.1)


def _wheel(path, cudas):
    names = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in (*[f"cuda{c}" for c in cudas], "cpu", "rocm70")]
    with zipfile.ZipFile(path, "w") as file:
        record = ""
        for name in ("bitsandbytes/__init__.py", *names):
            file.writestr(name, name * 9)
            record += f"{name},sha256=x,9\n"
        file.writestr("bitsandbytes-0.50.2.dist-info/RECORD", record + "bitsandbytes-0.50.2.dist-info/RECORD,,\n")
    return path


def test_a_repacked_wheel(tmp_path):
    wheel = _wheel(tmp_path / "bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl", ("118", "130"))
    out = repack_bitsandbytes.repack(wheel, "130", tmp_path / "to")
    assert out.name == wheel.name
    with zipfile.ZipFile(out) as file:
        names = set(file.namelist())
        record = file.read("bitsandbytes-0.50.2.dist-info/RECORD").decode()
    libraries = {f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cuda130", "cpu")}
    assert names == {"bitsandbytes/__init__.py", *libraries, "bitsandbytes-0.50.2.dist-info/RECORD"}
    assert {line.split(",")[0] for line in record.splitlines()} == names
    with pytest.raises(ValueError, match="no library for CUDA 999, but for 118, 130"):
        repack_bitsandbytes.repack(wheel, "999", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="give another folder"):
        repack_bitsandbytes.repack(wheel, "130", tmp_path)


def test_the_readme_has_the_numbers_of_the_files():
    texts = [path.read_text() for path in readme.FILES]
    marked = [match[2] for text in texts for match in readme.MARKED.finditer(text)]
    assert sorted(marked) == sorted(readme.TABLES)
    for text in texts:
        assert readme.filled(text, readme.RESULTS) == text, "python -m bench.readme"


def test_tables_of_made_up_results(tmp_path):
    folder = tmp_path / "results" / "a-card"
    folder.mkdir(parents=True)
    (folder / "compare.csv").write_text(
        "device,setting,provider,version,tokens_per_s,speedup,peak_mib,saved_mib,loss_distance\n"
        "card,s,peft,1,100,1,50,40,0\ncard,s,ours,abc,150,1.5,20,10,1e-3\ncard,s,ours,def,160,1.6,20,10,1e-3\n"
    )
    text = "a\n<!-- bench.readme: compare -->\nold\n<!-- end -->\nb\n<!-- bench.readme: tried -->\n<!-- end -->\n"
    new = readme.filled(text, folder.parent)
    assert "old" not in new
    assert "| card | s | ours def | 160 | 1.60 | 20 | 10 | 1e-03 |" in new
    assert "abc" not in new
    assert "| card | s | peft 1 | 100 | 1.00 | 50 | 40 |  |" in new
    assert "python -m bench.memory_try" in new
    assert readme.filled(new, folder.parent) == new
    with pytest.raises(ValueError, match="no table is called 'other'"):
        readme.filled("<!-- bench.readme: other -->\n<!-- end -->", folder.parent)
