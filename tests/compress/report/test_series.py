"""Oracle: means, ranges, quotients and fronts written out by hand or by their definitions."""

import random

import pytest

from compress.report.chart import make, result_charts, ticks, training_charts, whole_ticks, width_charts
from compress.report.series import Point, Value, dense_row, groups, pareto, series, speedup, value
from compress.report.summary import count, rounded, sentences, signed

from .example import example


def row(method="l1", ratio=0.5, seed=0, accuracy=0.9, base=0.95, latency=(1.0, 0.9, 1.2), **more):
    times = None if latency is None else {"1": dict(zip(("median", "p10", "p90"), latency))}
    return {
        "method": method,
        "budget": "macs",
        "ratio": ratio,
        "seed": seed,
        "accuracy": accuracy,
        "accuracy_base": base,
        "accuracy_oneshot": 0.5,
        "params": 1000,
        "params_removed": 0.4,
        "macs": 2000,
        "macs_removed": ratio,
        "gflops": 4e-6,
        "latency_ms": times,
        **more,
    }


DENSE = row("dense", 0, accuracy=0.95, latency=(2.0, 1.8, 2.4), macs_removed=0.0)


def test_seeds_become_mean_and_range():
    rows = [row(seed=seed, accuracy=accuracy) for seed, accuracy in enumerate((0.90, 0.94, None))] + [row(ratio=0.7, accuracy=0.8)]
    assert value(rows[:3], "accuracy") == Value(pytest.approx(0.92), 0.90, 0.94, 2)
    assert [(group.ratio, len(group.rows)) for group in groups(rows)] == [(0.5, 3), (0.7, 1)]
    (line,) = series(rows, "ratio", "accuracy")
    assert [(point.x.mean, point.y.mean, point.y.low, point.y.high) for point in line.points] == [
        (0.5, pytest.approx(0.92), 0.90, 0.94),
        (0.7, 0.8, 0.8, 0.8),
    ]


def test_latency_is_the_median_with_the_widest_spread():
    rows = [row(latency=(1.0, 0.9, 1.2)), row(seed=1, latency=(3.0, 2.5, 3.1))]
    assert value(rows, "latency:1") == Value(2.0, 0.9, 3.1, 2)
    assert value(rows, "latency:64") is None and value([row(latency=None)], "latency:1") is None


def test_speedup_is_the_quotient_with_the_widest_range():
    gain = speedup([DENSE], [row()], "1")
    assert (gain.mean, gain.low, gain.high) == (2.0, 1.8 / 1.2, 2.4 / 0.9)
    assert speedup([DENSE], [row(latency=None)], "1") is None and speedup([], [row()], "1") is None


def test_a_speedup_measured_in_turns_is_taken_as_it_is():
    rows = [row(), row(seed=1)]
    for one, numbers in zip(rows, ((1.5, 1.4, 1.7), (1.7, 1.3, 1.9))):
        one["latency_ms"]["1"] |= dict(zip(("speedup", "speedup_p10", "speedup_p90"), numbers))
    assert speedup([DENSE], rows, "1") == Value(pytest.approx(1.6), 1.3, 1.9, 2)
    del rows[0]["latency_ms"]["1"]["speedup"]
    assert speedup([DENSE], rows, "1").mean == 2.0


def test_graph_replay_is_a_timing_of_its_own():
    rows = [row("dense", 0), row()]
    rows[0]["latency_ms"]["1"]["graph"] = {"median": 0.9, "p10": 0.8, "p90": 1.0}
    rows[1]["latency_ms"]["1"]["graph"] = {"median": 0.3, "p10": 0.2, "p90": 0.4}
    assert speedup(rows[:1], rows[1:], "1_graph").mean == pytest.approx(3) and speedup(rows[:1], rows[1:], "1").mean == 1
    charts = {chart.key: chart for chart in result_charts(rows)}
    assert [point.x.mean for point in charts["accuracy_latency_b1_graph"].series[0].points] == [0.3]
    assert any("3.00× the speed at batch\u00a01 (CUDA graph)" in sentence.text for sentence in sentences(rows, {}))


def test_masked_rows_are_drawn_by_their_non_zero_products():
    rows = [DENSE, row("mask_snip", density=0.5, macs_nonzero=1100), row("l1")]
    found = {one.name: one for one in series(rows, "effective_gflops", "accuracy")}
    assert found["mask_snip"].points[0].x.mean == pytest.approx(2.2e-6) and found["mask_snip"].hollow
    assert found["l1"].points[0].x.mean == 4e-6 and not found["l1"].hollow
    assert [found[name].style for name in ("mask_snip", "l1", "dense")] == [0, 1, -1]


def test_front_is_every_point_that_no_other_beats():
    rng = random.Random(3)
    points = [Point(Value(a, a, a), Value(b, b, b)) for a, b in ((rng.randrange(12), rng.randrange(12)) for _ in range(60))]
    pairs = {(point.x.mean, point.y.mean) for point in points}
    expected = {p for p in pairs if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in pairs)}
    front = [(point.x.mean, point.y.mean) for point in pareto(points)]
    assert set(front) == expected and front == sorted(front)


def test_figures_show_the_rows():
    rows, meta = example(seeds=(0, 1))
    drawn = {chart.key: chart for chart in result_charts(rows)}
    assert set(drawn) == {"accuracy_gflops", "accuracy_latency_b1", "accuracy_latency_b64", "accuracy_ratio_macs", "oneshot_ratio_macs"}
    for name, key in (("accuracy_gflops", "gflops"), ("accuracy_ratio_macs", "ratio")):
        for one in drawn[name].series:
            for point in one.points:
                same = [
                    r for r in rows if r["method"] == one.name and (one.name == "dense" or f"ratio {r['ratio']:g} of MACs" in point.label)
                ]
                assert point.x.mean == pytest.approx(sum(r[key] for r in same) / len(same))
                assert (point.y.low, point.y.high) == (min(r["accuracy"] for r in same), max(r["accuracy"] for r in same))
        assert sum(len(one.points) for one in drawn[name].series) == 3 * 4 + 1
    assert drawn["accuracy_ratio_macs"].x_limits[0] == 0 and drawn["accuracy_ratio_macs"].x_ticks[-1] == 1


def test_width_and_training_figures_show_the_details():
    rows, meta = example(methods=("l1", "tucker"), ratios=(0.5,))
    widths = {chart.key: chart for chart in width_charts(rows, meta["details"])}
    kept = meta["details"]["l1-macs0.5-s0"]["widths"]
    assert [point.y.mean for point in widths["widths_l1"].series[0].points] == [after / before for before, after in kept.values()]
    ranks = meta["details"]["tucker-macs0.5-s0"]["ranks"]
    assert [point.y.mean for point in widths["widths_tucker"].series[0].points] == [a[0] * a[1] / (b[0] * b[1]) for b, a in ranks.values()]
    training = {chart.key: chart for chart in training_charts(rows, meta["details"])}
    history = meta["details"]["l1-macs0.5-s0"]["history"]
    assert [point.y.mean for point in training["training_macs0.5"].series[0].points] == [epoch["val_accuracy"] for epoch in history]
    assert [one.name for one in training["training_dense"].series] == ["training images", "validation images"]


@pytest.mark.parametrize("low, high", [(0, 1), (0.843, 0.973), (0, 0.0103), (1.2, 1.2), (0, 0), (-3, 170), (0.95, 0.9501)])
def test_ticks_are_even_round_and_enclose(low, high):
    found = ticks(low, high)
    steps = {round(b - a, 10) for a, b in zip(found, found[1:])}
    assert found[0] <= low and found[-1] >= high and len(steps) == 1 and 2 <= len(found) <= 9
    assert f"{steps.pop():e}".split("e")[0].rstrip("0") in {"1.", "2.", "2.5", "5."}


def test_whole_ticks():
    assert whole_ticks(1, 20) == (1, 5, 10, 15, 20)
    assert whole_ticks(1, 8) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert whole_ticks(1, 109) == (1, 20, 40, 60, 80, 100)
    assert whole_ticks(1, 1) == (1,)


def test_limits_enclose_every_range_and_fractions_stay_in_the_unit_interval():
    for kind in ({}, {"x_zero": True}, {"fraction": True}):
        chart = make("k", "t", "x", "y", series(example(seeds=(0, 1))[0], "latency:1", "accuracy"), **kind)
        points = [point for one in chart.series for point in one.points]
        assert chart.x_limits[0] <= min(p.x.low for p in points) and chart.x_limits[1] >= max(p.x.high for p in points)
        assert chart.y_limits[0] <= min(p.y.low for p in points) and chart.y_limits[1] >= max(p.y.high for p in points)
        assert not kind.get("fraction") or (chart.y_limits[0] >= 0 and chart.y_limits[1] <= 1)


def test_summary_is_computed_from_the_rows():
    rows = [DENSE, row("l1", accuracy=0.90, macs_removed=0.503), row("l2", accuracy=0.92, latency=(4.0, 3.9, 4.1))]
    texts = [sentence.text for sentence in sentences(rows, {"data": {"test": 361}})]
    assert (
        texts[0] == "The unpruned network has 1 k parameters and 2 k MACs per image "
        "and reaches an accuracy of 0.950; one forward pass takes 2.00 ms at batch\u00a01 (median)."
    )
    assert texts[1] == (
        "At ratio 0.5 of the MACs, l2 is best of 2 methods (0.020 ahead of l1): removed 50.0 % of the MACs and 40.0 % of the parameters, "
        "accuracy 0.950 → 0.920 (−0.030), "
        "0.50× the speed, slower than dense, at batch\u00a01 (p10 to p90: 0.44 to 0.62)."
    )
    assert texts[2] == "Slower than the unpruned network at batch\u00a01: 1 of 2 networks: l2 at 0.5 (0.50×)."
    assert "361 images: one image is 0.0028, and the standard error of an accuracy of 0.950 is 0.0115" in texts[3] and len(texts) == 4


def test_a_speedup_within_the_spread_is_called_so():
    text = " ".join(sentence.text for sentence in sentences([DENSE, row(latency=(1.9, 1.5, 2.2))], {}))
    assert "1.05× the speed at batch\u00a01 (within the spread, p10 to p90: 0.82 to 1.60)" in text
    text = " ".join(sentence.text for sentence in sentences([DENSE, row(latency=(2.1, 1.5, 2.4))], {}))
    assert "0.95× the speed, slower than dense, at batch\u00a01 (within the spread, p10 to p90: 0.75 to 1.60)" in text
    assert "1 of 1 networks: l1 at 0.5 (0.95×, within the spread)." in text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (3, "3.00"), (3.0849, "3.08"), (0.00052671, "0.000527"), (17.04, "17.0"), (1591.47, "1591"), (264.9, "265")],
)
def test_rounded_keeps_zeros_and_has_no_exponent(number, text):
    assert rounded(number) == text


def test_summary_warns_of_what_is_missing():
    def warnings(rows):
        return " ".join(sentence.text for sentence in sentences(rows, {}) if sentence.warning)

    assert "l1 at 0.5: 45.0 %" in warnings([DENSE, row(macs_removed=0.45)])
    assert "Budget" not in warnings([DENSE, row(macs_removed=0.495)])
    assert "No accuracy is known for: l1 at 0.5, seed 0." in warnings([DENSE, row(accuracy=None)])
    assert "Latency was not measured" in warnings([{**DENSE, "latency_ms": None}, row(latency=None)])
    assert "No compressed network" in warnings([DENSE])
    assert "no speed-up" in warnings([row()])
    level = sentences(
        [row(seed=s, accuracy=a) for s, a in enumerate((0.90, 0.94))] + [row("l2", seed=s, accuracy=a) for s, a in enumerate((0.91, 0.92))],
        {},
    )
    assert any("(level with l2: their seeds overlap)" in sentence.text for sentence in level)


def test_numbers_in_words():
    assert [count(n) for n in (0, 999, 1000, 272_474, 5_063_968, 1_100_702_720)] == ["0", "999", "1 k", "272 k", "5.06 M", "1.1 G"]
    assert [signed(n) for n in (0.0123, -0.0123, -0.0001, 0.0)] == ["+0.012", "−0.012", "0.000", "0.000"]
    assert dense_row([row(), DENSE]) is DENSE
