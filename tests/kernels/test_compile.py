"""Oracle: the machine code that ptxas makes for sm_80, sm_90 and sm_100, read with cuobjdump and nvdisasm (no GPU needed)."""

import importlib

import pytest

from .subprocesses import json_lines

pytest.importorskip("triton")
INSTRUCTIONS_PER_NONZERO = {0: 12, 1: 10}


KERNELS = ("run16", "vector_block", "sparse_conv", "compact")


def check(lines: list[dict], kernels: tuple[str, ...]) -> None:
    assert {line["kernel"] for line in lines} >= set(kernels)
    assert [line for line in lines if line["stack"] or line["local"]] == [], "spilled registers"
    assert [line for line in lines if line["registers"] > 255 or line["registers"] * line["threads"] > 65536] == []
    assert [line for line in lines if line["shared"] > line["shared_limit"]] == []
    counted = [line for line in lines if line.get("per_nonzero") is not None and line["kind"] == "bf16"]
    assert "run16" not in kernels or {line["coding"] for line in counted} == {0, 1}
    assert [line for line in counted if not 5 < line["per_nonzero"] <= INSTRUCTIONS_PER_NONZERO[line["coding"]]] == []
    assert all(line["counted"] for line in lines if line["kernel"] == "compact"), "no population count instruction"
    assert [line for line in lines if line["tf32"] != (line["precision"] == "tf32")] == [], "products in another precision than was asked for"
    hopper = [line for line in lines if line["kernel"] in ("vector_block", "sparse_conv") and line["capability"] == 90
              and line["kind"] in ("bf16", "fp16")]
    assert hopper or not ({"vector_block", "sparse_conv"} & set(kernels) and any(line["capability"] == 90 for line in lines))
    # A block of fewer than 64 rows is too low for it.
    assert all(line["cp_async"] and (line["wgmma"] or line["kernel"] == "vector_block" and line["height"] < 64) for line in hopper)


def values(lines: list[dict], kernel: str, fact: str) -> set:
    return {line[fact] for line in lines if line["kernel"] == kernel}


def test_representative_configurations(tmp_path):
    lines = json_lines("aot", "default", interpret=False, cache=tmp_path)
    check(lines, KERNELS)
    assert {line["capability"] for line in lines} == {80, 90, 100}
    for kernel in ("run16", "vector_block", "sparse_conv"):
        module = importlib.import_module(f"kernels.{kernel}.triton")
        assert values(lines, kernel, "splits") == set(module.SPLITS) and values(lines, kernel, "epilogue") == {"full", "none"}
        if kernel == "run16":
            assert values(lines, kernel, "wide") == {False, True}
        else:
            assert values(lines, kernel, "height") == set(module.HEIGHTS) and values(lines, kernel, "precision") == {"ieee", "tf32"}


def test_the_configurations_are_those_that_are_launched():
    """What the kernels choose for matrices of any size is in their lists, and everything in the lists is chosen for some size."""
    sizes = (*range(1, 40), 100, 300, 1000, 5000)
    run16, vector_block, sparse_conv = (importlib.import_module(f"kernels.{kernel}.triton") for kernel in ("run16", "vector_block", "sparse_conv"))
    chosen = {run16.splits_for(slices, 1, warps, longest) for slices in sizes for longest in sizes for warps in (4, 8)}
    assert chosen == {config["splits"] for config in run16.CONFIGS} == set(run16.SPLITS)
    for module in (vector_block, sparse_conv):
        chosen = {module.splits_for(blocks, tiles, steps) for blocks in sizes for tiles in (1, 2, 9, 400) for steps in sizes}
        assert chosen == {config["splits"] for config in module.CONFIGS} == set(module.SPLITS)
    chosen = {(height, vector_block.width_for(batch, height, 2)) for height in vector_block.HEIGHTS for batch in sizes}
    assert chosen == {(config["height"], config["width"]) for config in vector_block.CONFIGS}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration(kernel, capability, tmp_path):
    lines = json_lines("aot", "all", kernel, str(capability), interpret=False, cache=tmp_path, timeout=7200)
    assert {line["capability"] for line in lines} == {capability}
    check(lines, (kernel,))
