"""Oracle: the rows; the page is read back with html.parser and the figures through matplotlib's own objects."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from compress.report import write_report, write_results
from compress.report.chart import result_charts, width_charts
from compress.report.figures import draw, png
from compress.report.page import charts, render
from compress.report.series import speedup

from .example import example

NASTY = '<script>alert("x")</script>&\'$\\frac{' + "name" * 20
VOID = {"meta", "br", "img", "input", "hr", "link", "wbr"}


class Page(HTMLParser):
    """Tables by name as lists of lines of {key: (exact value, text)}, start tags, text, and whether tags nest."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tables, self.tags, self.open, self.text, self.ill = {}, [], [], [], []
        self.table = self.cell = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(attrs.get("data-table"), [])
        elif tag == "tr" and self.table is not None:
            self.table.append({})
        elif "data-key" in attrs:
            self.cell = attrs["data-key"]
            self.table[-1][self.cell] = (attrs["data-v"], "")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.ill.append(tag)
        if tag in ("td", "th", "small"):
            self.cell = None

    def handle_data(self, data):
        self.text.append(data)
        if self.cell is not None:
            exact, text = self.table[-1][self.cell]
            self.table[-1][self.cell] = (exact, text + data)


def page(rows, meta):
    results = {"format": 1, "rows": rows, "meta": meta}
    return Page(render(results, charts(results)))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(methods=("l1",), ratios=(0.5,), timed=False),
        dict(methods=("mask_snip", "svd", "tucker"), seeds=(0, 1), ratios=(0.5, 0.9)),
        dict(methods=("l1",), ratios=(0.9,), blocks=18),
    ],
    ids=["three methods", "one row, no latency", "masks, ranks, seeds", "110 layers"],
)
def test_tables_hold_the_rows(options):
    rows, meta = example(**options)
    found = page(rows, meta)
    assert not found.ill and not found.open
    dense = rows[0]
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        head, top, *lines = found.tables[f"method:{method}"]
        assert top["ratio"] == ("0", "dense") and float(top["accuracy"][0]) == dense["accuracy"]
        chosen = sorted((row for row in rows if row["method"] == method), key=lambda row: (row["ratio"], row["seed"]))
        assert len(lines) == len(chosen)
        for line, row in zip(lines, chosen):
            for key in ("ratio", "params", "params_removed", "gflops", "macs_removed", "accuracy_oneshot", "accuracy", "seconds"):
                assert float(line[key][0]) == row[key]
            assert line["accuracy"][1] == f"{row['accuracy']:.4f}"
            assert float(line["delta"][0]) == row["accuracy"] - row["accuracy_base"]
            assert line["delta"][1].replace("−", "-") == f"{row['accuracy'] - row['accuracy_base']:+.4f}"
            assert ("density" in line) == method.startswith("mask_")
            if "density" in line:
                assert (float(line["density"][0]), int(line["macs_nonzero"][0])) == (row["density"], row["macs_nonzero"])
            for batch in ("1", "64") if row["latency_ms"] else ():
                assert float(line[f"latency_ms_{batch}"][0]) == row["latency_ms"][batch]["median"]
                assert float(line[f"speedup_{batch}"][0]) == dense["latency_ms"][batch]["median"] / row["latency_ms"][batch]["median"]
            assert row["latency_ms"] or not any("latency" in key or "speedup" in key for key in line)
            assert ("seed" in line) == (len(options.get("seeds", (0,))) > 1)


def test_the_page_needs_nothing_from_outside():
    found = page(*example(methods=("l1", "mask_snip"), ratios=(0.5,)))
    outside = [
        (tag, key, text)
        for tag, attrs in found.tags
        for key, text in attrs.items()
        if key in ("src", "href", "srcset", "action", "data", "xlink:href", "poster") and not (text or "").startswith("#")
    ]
    assert outside == []
    assert not any("url(" in text or "@import" in text or "http" in text or "//" in text for text in found.text)


def test_names_are_escaped_and_add_no_element():
    plain, hostile = (page(*example(methods=(name,), ratios=(0.5,))) for name in ("l1", NASTY))
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in hostile.tags] and not hostile.ill
    assert f"method:{NASTY}" in hostile.tables and NASTY in " ".join(hostile.text)
    rows, meta = example(methods=("l1",), ratios=(0.5,))
    meta["config"]["name"] = meta["config"]["model"]["name"] = meta["machine"]["device"] = NASTY
    meta["details"]["l1-macs0.5-s0"]["widths"] = {NASTY: [16, 8]}
    meta["details"]["l1-macs0.5-s0"]["pinned"] = {NASTY: NASTY}
    found = page(rows, meta)
    assert not any(key.startswith("on") for _, attrs in found.tags for key in attrs)
    assert sum(tag == "script" for tag, _ in found.tags) == 1 and not found.ill


def test_slower_than_dense_is_said_and_missing_values_are_not_invented():
    rows, meta = example(methods=("l1",), ratios=(0.5, 0.7))
    rows[1]["latency_ms"]["1"] = {name: 2 * number for name, number in rows[0]["latency_ms"]["1"].items()}
    rows[2]["accuracy"] = rows[2]["latency_ms"] = None
    found = page(rows, meta)
    _, _, slow, unknown = found.tables["method:l1"]
    assert float(slow["speedup_1"][0]) == pytest.approx(0.5) and ("td", "bad") in [(tag, attrs.get("class")) for tag, attrs in found.tags]
    assert any("slower than dense" in text for text in found.text)
    assert [unknown[key] for key in ("accuracy", "delta", "speedup_1", "latency_ms_1")] == [("", "–")] * 4
    assert speedup([rows[0]], [rows[1]], "1").mean == pytest.approx(0.5)


def test_layers_and_pinned_reasons_are_listed():
    rows, meta = example(methods=("l1", "tucker"), ratios=(0.5,), blocks=18)
    found = page(rows, meta)
    head, *lines = found.tables["layers:layers"]
    widths = meta["details"]["l1-macs0.5-s0"]["widths"]
    assert len(lines) == len(widths) == 109
    for line, (layer, (_, after)) in zip(lines, widths.items()):
        assert (line["layer"][1], line["l1-macs0.5-s0"]) == (layer, (str(after), str(after)))
    ranks = meta["details"]["tucker-macs0.5-s0"]["ranks"]
    assert [line["tucker-macs0.5-s0"][1] for line in lines] == ["×".join(map(str, after)) for _, after in ranks.values()]
    text = " ".join(found.text)
    assert "output of the network (2)" in text and "linear.bias" in text and "Complete resolved configuration" in text
    assert json.dumps(meta["config"], indent=2) in text


def test_overview_marks_the_best_mean():
    rows, meta = example(methods=("l1", "l2", "random"), seeds=(0, 1, 2))
    found = page(rows, meta)
    _, *lines = found.tables["overview:macs"]
    for ratio in (0.5, 0.7, 0.8, 0.9):
        means = {m: np.mean([r["accuracy"] for r in rows if r["method"] == m and r["ratio"] == ratio]) for m in ("l1", "l2", "random")}
        assert {line["method"][1]: float(line[f"{ratio:g}"][0]) for line in lines} == pytest.approx(means)
    assert sum(attrs.get("class") == "best" for _, attrs in found.tags) == 4


def test_figures_hold_the_charts_series():
    chart = next(chart for chart in result_charts(example(seeds=(0, 1))[0]) if chart.key == "accuracy_latency_b1")
    axes = draw(chart).axes[0]
    assert (axes.get_xlim(), axes.get_ylim()) == (chart.x_limits, chart.y_limits)
    assert len(axes.containers) == len(chart.series)
    for container, one in zip(axes.containers, chart.series):
        assert container.get_label() == one.name
        assert np.array_equal(container.lines[0].get_xydata(), [[point.x.mean, point.y.mean] for point in one.points])
        segments = np.array(container.lines[2][0].get_segments())
        assert np.allclose(segments[:, :, 0], [[point.x.low, point.x.high] for point in one.points])
    assert imread(io.BytesIO(png(chart))).shape == (704, 1024, 4)


def test_files_are_written_and_stale_figures_removed(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").write_bytes(b"")
    results = write_results(tmp_path, *example(methods=("a/b",), ratios=(0.5,), timed=False))
    assert write_report(tmp_path, results) == tmp_path / "report.html"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "accuracy_gflops.png",
        "accuracy_ratio_macs.png",
        "oneshot_ratio_macs.png",
        "report.html",
        "results.csv",
        "results.json",
        "training_dense.png",
        "training_macs0.5.png",
        "widths_a_b.png",
    ]
    assert Page((tmp_path / "report.html").read_text()).ill == []


def test_bare_rows_without_meta_make_a_page():
    rows, _ = example(methods=("l1",), ratios=(0.5,))
    found = page(rows, {})
    assert "Compression report" in found.text and "method:l1" in found.tables and "layers:layers" not in found.tables
    assert page([], {}).tables == {}


def test_a_legend_is_never_wider_than_its_figure():
    rows, meta = example(methods=("l1",), ratios=(0.5, 0.7, 0.8, 0.9))
    figure = draw(width_charts(rows, meta["details"])[0])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and len(legend.get_texts()) == 4
