"""Published points: what the table holds, its filters, and its place in the package."""

from __future__ import annotations

import csv
from importlib.resources import files

import pytest

from percov2.evaluation.published import PUBLISHED_METRICS, datasets, published, sources


def test_every_row_is_a_plausible_point_with_a_source():
    points = published(coded=False)
    text = (files("percov2.evaluation") / "published.csv").read_text()
    assert len(points) == len(list(csv.DictReader(text.splitlines()))) > 100
    ranges = {"psnr": (5, 60), "ms_ssim": (0, 1), "lpips_alex": (0, 1), "dists": (0, 1)}
    for point in points:
        assert point.source and point.dataset and point.system
        assert point.bpp is None or 0.001 < point.bpp < 1
        assert point.values
        for name, (low, high) in ranges.items():
            assert low < point.values.get(name, (low + high) / 2) < high, point
    keys = [(p.dataset, p.system, p.bpp) for p in points]
    assert len(set(keys)) == len(keys)


def test_filters_keep_points_of_a_data_set_with_a_metric():
    kodak = published("Kodak")
    assert {point.dataset for point in kodak} == {"Kodak"}
    assert {"DiffEIC", "MS-ILLM", "VTM", "PerCo (SD v2.1)"} <= {point.system for point in kodak}
    assert published("Kodak", "fid") == []
    assert [p.bpp for p in published("MSCOCO-30k", "fid")] == [0.0037, 0.0115, 0.0329, 0.1266]
    assert published("MSCOCO-30k", "psnr") == []
    uncoded = set(map(id, published("Kodak", coded=False))) - set(map(id, kodak))
    assert len(uncoded) == 1
    for metric in PUBLISHED_METRICS:
        assert all(metric in point.values for point in published(metric=metric))


def test_points_of_a_system_are_ordered_by_rate():
    rates = [point.bpp for point in published("Kodak") if point.system == "VTM"]
    assert rates == sorted(rates) and len(rates) == 6


def test_the_two_labels_of_clic_are_kept_apart():
    """One source names its set CLIC2020 but gives other values than the set's usual protocol."""
    clic = [name for name in datasets() if "CLIC" in name]
    assert len(clic) == 2
    values = [
        {p.bpp: p.values["psnr"] for p in published(name) if p.system == "MS-ILLM"} for name in clic
    ]
    assert values[0].keys().isdisjoint(values[1])


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'kodak'; choose from Kodak, Tecnick"):
        published("kodak")
    with pytest.raises(ValueError, match="'lpips'; choose from psnr, ms_ssim"):
        published(metric="lpips")


def test_sources_name_their_systems():
    found = sources(published("Kodak"))
    assert "VTM" in found["huai-chang/DiffEIC indicators/results.xlsx"]
    assert found["LuizScarlet/StableCodec results/results.txt"] == ["StableCodec"]
