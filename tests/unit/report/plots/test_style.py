"""The colors of the plots: apart for color-blind readers, and visible on both pages; further series look different."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from rayprune.report.plots.style import DARK_SERIES, PAPER, PAPER_DARK, SERIES, look_of

# Machado, Oliveira and Fernandes 2009, table 1: severity 1.0, applied to linear RGB.
SEEN = {
    "normal": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
)
LEAST_DISTANCE = 15.0  # of CIE Lab; 2.3 is just noticeable in large patches side by side, lines are thin and apart
LEAST_CONTRAST = 3.0  # WCAG 2.1, graphical objects


def linear(color: str) -> NDArray[np.float64]:
    """Return (3,) linear RGB in [0, 1]."""
    rgb = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (3,) CIE Lab under D65."""
    xyz = TO_XYZ @ rgb / TO_XYZ.sum(1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one: str, other: str, sight: str) -> float:
    seen = [lab(np.clip(np.array(SEEN[sight]) @ linear(color), 0.0, 1.0)) for color in (one, other)]
    return float(np.linalg.norm(seen[0] - seen[1]))


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(TO_XYZ[1] @ linear(color)) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def test_the_simulation_confuses_what_color_blind_readers_confuse() -> None:
    red, green, blue = "#c4500a", "#946400", "#0072b2"
    assert distance(red, green, "protanopia") < 5 < distance(red, green, "normal")
    assert min(distance(red, blue, sight) for sight in SEEN) > 30


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("colors", [SERIES, DARK_SERIES], ids=["light", "dark"])
def test_colors_are_apart_for_every_reader(colors: tuple[str, ...], sight: str) -> None:
    assert min(distance(one, other, sight) for one, other in combinations(colors, 2)) > LEAST_DISTANCE


@pytest.mark.parametrize(("colors", "page"), [(SERIES, PAPER), (DARK_SERIES, PAPER_DARK)], ids=["light", "dark"])
def test_colors_are_visible_on_their_page(colors: tuple[str, ...], page: str) -> None:
    assert min(contrast(color, page) for color in colors) >= LEAST_CONTRAST


def test_series_beyond_the_palette_differ_in_line_marker_and_hatch() -> None:
    looks = [look_of(number) for number in range(3 * len(SERIES))]
    assert len(set(looks)) == len(looks)
    for number in range(len(SERIES)):
        same_color = looks[number :: len(SERIES)]
        for part in ("line", "marker", "hatch"):
            assert len({getattr(look, part) for look in same_color}) == 3
