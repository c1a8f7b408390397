from pathlib import Path

import numpy as np

from mambatrain.report.length_histogram import BAR_WIDTH, draw_lengths, histogram_lines


def test_bars_are_in_proportion_and_what_is_not_nothing_is_seen() -> None:
    lines = histogram_lines([0, 1, 2, 4, 8], [10_000, 5_000, 1, 0])
    ranges, bars, counts = zip(*(line.split("  ", 1)[0:1] + line.rsplit("  ", 1)[0:2] for line in lines), strict=True)
    assert [count.strip() for count in counts] == ["10,000", "5,000", "1", "0"]
    assert [bar.count("█") for bar in bars] == [BAR_WIDTH, BAR_WIDTH // 2, 0, 0]
    assert "▏" in bars[2]
    assert "▏" not in bars[3]
    assert lines[2].lstrip().startswith("2 .. 3")
    assert lines[0].lstrip().startswith("0 ")
    assert len(ranges) == 4


def test_a_picture_is_drawn_of_any_lengths(tmp_path: Path) -> None:
    picture = tmp_path / "l.png"
    draw_lengths({"train": np.array([0, 3, 900]), "held_out": np.array([], dtype=np.int64)}, picture, "t")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    draw_lengths({"train": np.array([1])}, picture, "t")
