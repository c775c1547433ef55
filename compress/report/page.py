"""The report: one self-contained HTML page and the figures as PNG files, both made from what results.json holds.

`results["meta"]["details"]` maps an entry's name (`<method>-<budget><ratio>-s<seed>`, or `dense`) to any of: `widths` and `ranks`
{layer: [before, after]} (a rank may be a list of several), `mask` (see `compress.report.masks`), `history` (a list of epochs: epoch, lr,
train_loss, train_accuracy, val_loss, val_accuracy, seconds), `pinned` {parameter: reason}, `coverage` (rows of layer, status, reason), `verified` {check: value}.
Of the other keys of `meta`, `config` is the resolved configuration, `data` {split: images} and `unreachable` a list of sentences on entries that could
not be made (warnings of the summary); all the rest is listed as the environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from ..files import write_bytes, write_text
from . import chart, masks, svg, tables
from .results import entry_name
from .series import DENSE, QUANTITIES
from .summary import Sentence, sentences

Results = Mapping[str, Any]


def charts(results: Results) -> dict[str, list[chart.Chart]]:
    """All figures by section: results, widths, masks, training."""
    rows, details = results["rows"], results["meta"].get("details") or {}
    return {
        "results": chart.result_charts(rows),
        "widths": chart.width_charts(rows, details),
        "masks": masks.density_charts(rows, details),
        "training": chart.training_charts(rows, details),
    }


def write_report(folder: Path | str, results: Results) -> Path:
    """Write `folder`/report.html and `folder`/figures/*.png from `results` and return the page's path.

    Figures of an earlier report that these results have no use for are removed.
    """
    # matplotlib takes long to import; who only writes results does not need it.
    from .figures import histograms_png, png

    folder = Path(folder)
    drawn = charts(results)
    names = set()
    for one in (item for section in drawn.values() for item in section):
        names.add(f"{_file_name(one.key)}.png")
        write_bytes(folder / "figures" / f"{_file_name(one.key)}.png", png(one))
    for entry, (_, mask) in masks.masked(results["rows"], results["meta"].get("details") or {}).items():
        if mask.get("histograms"):
            name = f"weights_{_file_name(entry)}.png"
            names.add(name)
            write_bytes(folder / "figures" / name, histograms_png(f"Weights per layer, {entry}", masks.panels(mask)))
    for path in (folder / "figures").glob("*.png"):
        if path.name not in names:
            path.unlink()
    write_text(folder / "report.html", render(results, drawn))
    return folder / "report.html"


def render(results: Results, drawn: Mapping[str, list[chart.Chart]]) -> str:
    """The page's HTML; every value from the results passes the template's escaping."""
    rows, meta = results["rows"], results["meta"]
    details = meta.get("details") or {}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    model = (meta.get("config") or {}).get("model") or {}
    data = (meta.get("config") or {}).get("data") or {}
    machine = meta.get("machine") or {}
    subtitle = [
        str(part)
        for part in (model.get("import") or model.get("name"), data.get("name"), machine.get("device"), meta.get("started"))
        if part
    ]
    return environment.get_template("report.html.jinja").render(
        title=(meta.get("config") or {}).get("name") or "Compression report",
        subtitle=subtitle,
        summary=sentences(rows, meta) + [Sentence(text, warning=True) for text in masks.warnings(rows, details)],
        overview=tables.overview(rows),
        tables=tables.method_tables(rows),
        figures={section: [svg.layout(one) for one in items] for section, items in drawn.items()},
        quantities=QUANTITIES,
        layers=tables.layer_table(rows, details),
        masks=masks.mask_table(rows, details),
        networks=_networks(results),
        pinned=_pinned(details),
        environment=_flat(meta),
        config=json.dumps(meta["config"], indent=2, ensure_ascii=False) if meta.get("config") else "",
    )


def _networks(results: Results) -> list[dict[str, Any]]:
    """What is shown of each single network: widths, curves, checks, coverage."""
    details = results["meta"].get("details") or {}
    result = []
    for name in dict.fromkeys(entry_name(row) for row in results["rows"]):
        detail = details.get(name) or {}
        history = detail.get("history") or []
        curves = [
            chart.history_chart(
                f"{name}-{what}",
                f"{title} per epoch",
                {
                    images: [{"epoch": epoch["epoch"], what: epoch.get(f"{split}_{what}")} for epoch in history]
                    for split, images in (("train", "training"), ("val", "validation"))
                },
                what,
                what,
            )
            for what, title in (("loss", "Loss"), ("accuracy", "Accuracy"))
        ]
        shown = {
            "name": name,
            "bars": None if name == DENSE else svg.bars(detail),
            "mask": masks.layer_table(name, detail["mask"]) if detail.get("mask") else None,
            "histograms": masks.panels(detail.get("mask") or {"layers": []}),
            "curves": [svg.layout(one) for one in curves if one],
            "verified": _checks(detail.get("verified")),
            "coverage": [_coverage(line) for line in detail.get("coverage") or []],
        }
        if any(shown[key] for key in ("bars", "mask", "curves", "verified", "coverage")):
            result.append(shown)
    return result


def _pinned(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reasons with the parameters that they pinned, and the networks where it happened ("all" for every one)."""
    having = {name: detail["pinned"] for name, detail in details.items() if detail.get("pinned")}
    found: dict[str, dict[str, list[str]]] = {}
    for name, pinned in having.items():
        for parameter, reason in pinned.items():
            found.setdefault(reason, {}).setdefault(parameter, []).append(name)
    return [
        {
            "reason": reason,
            "parameters": [
                {"name": parameter, "where": "" if len(names) == len(having) else ", ".join(names)}
                for parameter, names in parameters.items()
            ],
        }
        for reason, parameters in found.items()
    ]


def _checks(verified: Any) -> list[tuple[str, str]]:
    if verified is None:
        return []
    return _flat(verified if isinstance(verified, Mapping) else {"verified": verified})


def _coverage(line: Any) -> tuple[str, str, str]:
    cells = [line.get(key) for key in ("layer", "status", "reason")] if isinstance(line, Mapping) else list(line)
    return tuple("" if cell is None else str(cell) for cell in (cells + [""] * 3)[:3])


def _flat(meta: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values, nested names joined with dots; without what the page shows elsewhere."""
    result = []
    for key, value in meta.items():
        if not prefix and key in ("config", "details", "unreachable"):
            continue
        if isinstance(value, Mapping):
            result += _flat(value, f"{prefix}{key}.")
        else:
            result.append(
                (
                    f"{prefix}{key}",
                    f"{value:.6g}" if isinstance(value, float) else ", ".join(map(str, value)) if isinstance(value, list) else str(value),
                )
            )
    return result


def _file_name(key: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in key)
