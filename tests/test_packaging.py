"""Nothing of ours is ever importable as top-level `kernels` or `quant`; the package works however it is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path, **env: str) -> str:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**clean, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_folders_are_no_packages_of_their_own():
    for name in ("kernels", "quant"):
        assert not (ROOT / name / "__init__.py").exists()
        link = ROOT / "peft_fast" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # From a copy without .git and build leftovers, as a user's sdist would be.
    source = tmp_path_factory.mktemp("source") / "peft_fast"
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split()
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to((ROOT / name).readlink()) if (ROOT / name).is_symlink() else (
                source / name
            ).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), cwd=source)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_one_package_and_all_of_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"peft_fast"}
    in_wheel = {n for n in names if n.endswith(".py")}
    here = {f"peft_fast/{p.relative_to(ROOT / 'peft_fast')}" for p in (ROOT / "peft_fast").rglob("*.py")}
    here |= {f"peft_fast/{f}/{p.name}" for f in ("kernels", "quant") for p in (ROOT / f).glob("*.py")}
    assert in_wheel == here
    assert "peft_fast/py.typed" in names


PROBE = """
import importlib.util, sys
import peft_fast, peft_fast.kernels.reference, peft_fast.quant.blockwise
for name in ("kernels", "quant"):
    spec = importlib.util.find_spec(name)
    print(name, "namespace" if spec is None or spec.origin is None else spec.origin)
print(peft_fast.__file__)
"""


def test_the_wheel_imports_from_any_folder(wheel, tmp_path):
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    out = run(sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])" + PROBE, str(site), cwd=tmp_path)
    assert out.splitlines()[-1].startswith(str(site))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["root", "elsewhere"])
def test_transformers_and_peft_find_hugging_faces_kernels_from_the_checkout(where, tmp_path):
    """A stand-in for Hugging Face's package `kernels` is on the path; with the checkout as the working folder a regular
    package must still win over our folder of the same name, and both peft and a Llama must import."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WHO = 'Hugging Face'\n")
    code = """
import sys; sys.path.append(sys.argv[1])
import importlib; print(importlib.import_module("kernels").WHO)
sys.path.insert(0, sys.argv[2])
import peft_fast.kernels.reference as r; print(r.__name__)
from transformers import LlamaForCausalLM
import peft; print(peft.__name__)
"""
    cwd = ROOT if where == "root" else tmp_path
    out = run(sys.executable, "-c", code, str(tmp_path / "site"), str(ROOT), cwd=cwd)
    assert out.splitlines() == ["Hugging Face", "peft_fast.kernels.reference", "peft"]


@pytest.mark.slow
def test_an_editable_install_works_from_the_root_and_from_elsewhere(tmp_path):
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--system-site-packages", str(env), cwd=tmp_path)
    python = str(env / "bin" / "python")
    outer = next(p for p in sys.path if p.endswith("site-packages"))
    pure = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(pure) / "outer.pth").write_text(outer + "\n")
    run(
        python, "-m", "pip", "uninstall", "-q", "-y", "setuptools", cwd=tmp_path
    )  # venv's own is too old; outer's is not
    copy = tmp_path / "checkout"
    run("git", "clone", "-q", str(ROOT), str(copy), cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(copy), cwd=tmp_path)
    for cwd in (copy, tmp_path):
        out = run(python, "-c", PROBE, cwd=cwd).splitlines()
        assert out[-1] == str(copy / "peft_fast" / "__init__.py")
        assert out[0] == "kernels namespace"
