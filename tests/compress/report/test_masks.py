"""Oracle: the counts in the details themselves, and polygon areas for the drawn histograms."""

import re

import numpy as np
import pytest
from matplotlib.image import imread

from compress.report import write_report, write_results
from compress.report.figures import corners
from compress.report.masks import HISTOGRAM, density_charts, outline, panels, warnings

from .example import example
from .test_page import NASTY, page

METHODS = ("mask_magnitude", "mask_random", "l1")


def test_table_holds_the_counts():
    rows, meta = example(methods=METHODS, ratios=(0.5, 0.9), seeds=(0, 1))
    found = page(rows, meta)
    head, *lines = found.tables["masks:masks"]
    assert len(lines) == 2 * 2 * 2 and not found.ill
    for line in lines:
        mask = meta["details"][line["network"][1]]["mask"]
        expected = {
            "kept": mask["kept"], "density": mask["density"], "compression": mask["weights"] / mask["kept"],
            "effective": mask["weights"] / mask["effective"], "empty": len(mask["empty_layers"]), "dead": mask["dead_channels"],
            "flops": 2 * mask["macs_nonzero"], "flop_share": mask["macs_nonzero"] / mask["macs"],
        }  # fmt: skip
        assert {key: float(line[key][0]) for key in expected} == pytest.approx(expected, rel=1e-12)
        assert all(name in line["empty"][1] for name in mask["empty_layers"])
    # Nothing of it without masks.
    found = page(*example(methods=("l1",), ratios=(0.5,)))
    assert "masks:masks" not in found.tables and "#masks" not in [attrs.get("href") for _, attrs in found.tags]


def test_layers_of_each_network():
    rows, meta = example(methods=("mask_random",), ratios=(0.9,))
    name = "mask_random-weights0.9-s0"
    mask = meta["details"][name]["mask"]
    head, *lines = page(rows, meta).tables[f"mask:{name}"]
    assert [line["layer"][1] for line in lines] == [layer["name"] for layer in mask["layers"]]
    for line, layer in zip(lines, mask["layers"], strict=True):
        for key in ("kept", "density", "effective"):
            assert float(line[key][0]) == layer[key]
        assert (float(line["flops"][0]), float(line["flops_nonzero"][0])) == (2 * layer["macs"], 2 * layer["macs_nonzero"])
        assert (int(line["dead"][0]), line["shape"][1]) == (layer["dead_channels"], "×".join(map(str, layer["shape"])))


def test_density_charts_have_a_line_per_ratio_of_the_first_seed():
    rows, meta = example(methods=METHODS, ratios=(0.9, 0.5), seeds=(3, 4))
    charts = density_charts(rows, meta["details"])
    assert [chart.key for chart in charts] == ["density_mask_magnitude", "density_mask_random"]
    for chart in charts:
        method = chart.key.removeprefix("density_")
        assert [line.name for line in chart.series] == ["ratio 0.5 of weights", "ratio 0.9 of weights"]
        for line, ratio in zip(chart.series, (0.5, 0.9), strict=True):
            layers = meta["details"][f"{method}-weights{ratio:g}-s3"]["mask"]["layers"]
            assert [point.y.mean for point in line.points] == [layer["density"] for layer in layers]
            assert chart.names == tuple(layer["name"] for layer in layers)


def test_histograms_are_drawn_to_scale():
    counts = [1, 0, 4, 3]
    width, height = HISTOGRAM
    points, y = [], 0.0
    for letter, text in re.findall(r"([MHV])([-0-9. ]+)", outline(counts)):
        numbers = [float(number) for number in text.split()]
        x, y = (numbers[0], numbers[1]) if letter == "M" else (numbers[0], y) if letter == "H" else (x, numbers[0])
        points.append((x / width, y / height))
    for polygon in (points, corners(counts)):
        a, b = np.array(polygon), np.roll(polygon, -1, axis=0)
        area = abs(float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum())) / 2
        assert area == pytest.approx(sum(counts) / (4 * len(counts)), rel=1e-3)
    assert outline([0, 0]) == "" and corners([0, 0]) == []


def test_panels_warnings_and_files(tmp_path):
    rows, meta = example(methods=("mask_random",), ratios=(0.5, 0.9), timed=False)
    details = meta["details"]
    found = panels(details["mask_random-weights0.9-s0"]["mask"])
    assert found[-1]["text"] == "no weight kept" and found[-1]["after"] == "" and found[0]["zero"] == HISTOGRAM[0] / 2
    assert warnings(rows, details) == ["Masks emptied whole layers of mask_random-weights0.9-s0 (1 of 19)."]
    details["mask_random-weights0.9-s0"]["mask"]["empty_layers"] = []
    (sentence,) = warnings(rows, details)
    assert "effective" in sentence and "mask_random-weights0.5-s0" not in sentence
    write_report(tmp_path, write_results(tmp_path, rows, meta))
    for ratio in ("0.5", "0.9"):
        image = imread(tmp_path / "figures" / f"weights_mask_random-weights{ratio}-s0.png")
        assert image.ndim == 3 and float(image[..., :3].min()) < 0.5


def test_names_of_layers_are_escaped():
    rows, meta = example(methods=("mask_random",), ratios=(0.5,))
    mask = meta["details"]["mask_random-weights0.5-s0"]["mask"]
    mask["layers"][0]["name"] = NASTY
    mask["histograms"] = {NASTY: mask["histograms"].pop(next(iter(mask["histograms"])))}
    found = page(rows, meta)
    assert sum(tag == "script" for tag, _ in found.tags) == 1 and not found.ill and NASTY in found.text
