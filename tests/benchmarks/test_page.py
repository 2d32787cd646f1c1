"""Tables and places of pages, letter by letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.page import fill, markdown, table

PAGE = """# Page

By hand.
<!-- first of benchmarks/a.py -->

old

<!-- end of first -->
Between.
<!-- second of benchmarks/a.py -->
<!-- end of second -->
<!-- first of benchmarks/b.py -->
another script's
<!-- end of first -->
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    return path


def test_places_are_filled_and_the_rest_stays(page: Path) -> None:
    contents = {"second": "two\n", "first": "new"}
    fill(page, "benchmarks/a.py", contents)
    expected = PAGE.replace("old", "new").replace("<!-- end of second", "\ntwo\n\n<!-- end of second")
    assert page.read_text() == expected
    fill(page, "benchmarks/a.py", contents)
    assert page.read_text() == expected


@pytest.mark.parametrize(
    "text",
    [
        PAGE.replace("second of", "other of"),
        PAGE.replace("end of second", "end of other"),
        "<!-- end of second -->\n" + PAGE.replace("end of second", "end of other"),
    ],
)
def test_a_place_that_is_missing_is_named_and_nothing_is_written(page: Path, text: str) -> None:
    page.write_text(text)
    with pytest.raises(ValueError, match="got 'second' .* add these lines"):
        fill(page, "benchmarks/a.py", {"first": "new", "second": "two"})
    assert page.read_text() == text


def test_tables() -> None:
    expected = "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"
    assert table(["a", "b"], [["1", "2"], ["3", "4"]]) == expected
    assert markdown([{"a": "1", "b": "2"}, {"b": "4", "a": "3"}]) == expected
    assert table(["a", "b"], [], rule="---") == "| a | b |\n|---|---|"
