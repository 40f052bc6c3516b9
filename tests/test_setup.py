""".ci/setup_env.py: an interpreter that has a CUDA build of torch keeps it, wherever that lies.

No GPU, no download: the interpreter under these tests finds a package `torch` of two lines in a user's site folder made
for the test."""

import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "setup_env.py"
OUTER = Path(sys._base_executable)  # not the tests' environment, which ignores the user's folder
VERSION = "2.12.0+cu130"


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module whose environment is a bare one under tmp_path."""
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ENV", tmp_path / "bare")
    monkeypatch.setattr(module, "PYTHON", tmp_path / "bare" / "bin" / "python")
    venv.create(tmp_path / "bare", symlinks=True)
    return module


def user_site(base: Path) -> Path:
    return Path(
        subprocess.check_output(
            [OUTER, "-c", "import site; print(site.getusersitepackages())"],
            env={**os.environ, "PYTHONUSERBASE": str(base)},
            text=True,
        ).strip()
    )


def add_package(folder: Path, name: str, version: str, source: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


@pytest.fixture
def user_torch(tmp_path, monkeypatch) -> Path:
    """The folder of a user's site with a torch that needs another package of that folder, and triton."""
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("PYTHONNOUSERSITE", raising=False)
    folder = user_site(tmp_path / "user")
    add_package(
        folder, "torch", VERSION, f"import helper_of_torch\nfrom torch import version\n__version__ = '{VERSION}'"
    )
    (folder / "torch" / "version.py").write_text("cuda = '13.0'\n")
    add_package(folder, "helper_of_torch", "1.0", "")
    add_package(folder, "triton", "3.6.0", "")
    return folder


def test_a_torch_in_the_users_folder_is_shared(setup_env, user_torch):
    assert setup_env.probe(str(OUTER)) == (VERSION, "13.0")
    assert setup_env.outer_folders(str(OUTER))[0] == str(user_torch)
    assert setup_env.probe(str(setup_env.PYTHON)) is None
    setup_env.share(str(OUTER), VERSION)
    assert setup_env.probe(str(setup_env.PYTHON)) == (VERSION, "13.0")


def test_torch_and_triton_may_lie_in_different_folders(setup_env, user_torch, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (user_torch / "triton").rename(elsewhere / "triton")
    monkeypatch.setenv("PYTHONPATH", str(elsewhere))
    assert setup_env.outer_folders(str(OUTER))[:2] == [str(user_torch), str(elsewhere)]


def test_an_environment_with_another_torch_is_refused_before_pip(setup_env, user_torch, tmp_path):
    own = next((tmp_path / "bare" / "lib").glob("python*/site-packages"))
    add_package(own, "torch", "2.11.0", "from torch import version\n__version__ = '2.11.0'")
    (own / "torch" / "version.py").write_text("cuda = None\n")
    with pytest.raises(
        SystemExit, match=r"has torch 2\.12\.0\+cu130, but .* has torch 2\.11\.0; nothing was installed"
    ):
        setup_env.share(str(OUTER), VERSION)


def test_a_shared_torch_that_cannot_be_imported_is_refused_before_pip(setup_env, user_torch, monkeypatch):
    monkeypatch.setattr(setup_env, "outer_folders", lambda python: ["/nowhere"])
    with pytest.raises(SystemExit, match="cannot import it; nothing was installed"):
        setup_env.share(str(OUTER), VERSION)


def test_the_script_pins_what_is_there(user_torch, tmp_path):
    """The real script, in a folder with nothing to install: it comes as far as pip, with torch and triton pinned."""
    script = tmp_path / "checkout" / ".ci" / "setup_env.py"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT.read_text())
    done = subprocess.run([OUTER, script, "finetune"], capture_output=True, text=True)
    assert f"keeping torch {VERSION} (13.0) of {OUTER}" in done.stdout
    assert "[finetune,cuda]" in done.stdout
    assert done.returncode == 1
    assert "setup: pip failed" in done.stderr
    constraints = tmp_path / "checkout" / ".venv" / "constraints.txt"
    assert constraints.read_text().split() == [f"torch=={VERSION}", "triton==3.6.0"]
