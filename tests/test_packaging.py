"""Oracle: the file list of the built wheel, and what a process that sees only the wheel (and a foreign package `kernels`) imports."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ALONE = """
import sys
import kernels
assert kernels.FOREIGN, "the foreign package must stay what it is"
from compress.siblings import own
from compress.registry import Registry
models = own("models")
assert models.__name__ == "compress.models", models.__name__
own_kernels = own("kernels")
assert own_kernels is not kernels and own_kernels.__name__ == "compress.kernels"
assert own("kernels") is own_kernels
import compress.cli, compress.pipeline.run, compress.report
print(sum(p.numel() for p in models.build("resnet20", 10).parameters()))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools leaves build folders beside the sources.
    source = folder / "source"
    subprocess.run(["git", "-C", str(ROOT), "checkout-index", "-a", f"--prefix={source}/"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(source)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow_ci
def test_the_wheel_claims_one_top_level_name_and_carries_everything(wheel):
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files if ".dist-info" not in name} == {"compress"}
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "compress", "kernels", "models"], capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".jinja", ".css", ".c")):
            assert (name if name.startswith("compress/") else f"compress/{name}") in files, name


@pytest.mark.slow_ci
def test_the_wheel_finds_its_own_packages_beside_foreign_ones(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("FOREIGN = True\n")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "269722"
