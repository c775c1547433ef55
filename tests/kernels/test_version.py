"""Oracle: a copy of the package in which single files are edited."""

import shutil

import pytest

from kernels import version


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy whose files may be changed; `versions` hashes it anew."""
    copied = shutil.copytree(version.ROOT, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(version, "ROOT", copied)
    monkeypatch.setattr(version.sources, "__defaults__", (copied,))

    def versions() -> dict[str, str]:
        version.version.cache_clear()
        return {name: version.version(name) for name in ("run16", "vector_block", "sparse_conv", "two_four", "csr")} | {"": version.version()}

    yield copied, versions
    version.version.cache_clear()


@pytest.mark.parametrize("file, changed", [
    ("run16/triton.py", {"run16", "two_four"}),  # the remainder of 2:4 runs through run16
    ("vector_block/triton.py", {"vector_block"}),
    ("sparse_conv/triton.py", {"sparse_conv"}),
    ("epilogue.py", {"run16", "vector_block", "sparse_conv", "two_four", "csr"}),
    ("device.py", {"run16", "vector_block", "sparse_conv", "two_four"}),
    ("csr/cpu.c", {"csr"}),
    ("choose.py", set()),
    ("run16/README.md", set()),
])
def test_an_edit_changes_the_version_of_what_runs_through_it(package, file, changed):
    folder, versions = package
    before = versions()
    assert versions() == before
    (folder / file).write_text((folder / file).read_text() + "\n")
    after = versions()
    assert {name for name in after if after[name] != before[name]} == (changed | {""} if not file.endswith(".md") else changed)


def test_a_kernel_that_does_not_exist_has_no_version():
    with pytest.raises(ValueError, match="no kernel 'run17'"):
        version.version("run17")
