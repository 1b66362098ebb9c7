"""Figures: pages say what the results say, results say where they are from, and what a benchmark prints is what is kept."""

import json
import re

import pytest

from attune.tools import curves, measurements
from attune.tools.benchmarks.shared import records
from attune.tools.benchmarks.shared.records import Record, Table, recorded, tables_of
from attune.tools.runtime import RunError
from attune.tools.runtime.setup import ROOT

NAMES = sorted(path.stem for path in records.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", measurements.PAGES, ids=lambda path: path.name)
def test_pages_say_what_the_results_say(path):
    page = path.read_text(encoding="utf-8")
    assert measurements.written(page) == page, "run 'python3 run.py measurements'"


def test_the_picture_shows_what_the_results_say():
    assert curves.drawn() == curves.PICTURE.read_text(encoding="utf-8"), "run 'python3 run.py measurements'"


def test_no_table_of_measurements_is_written_by_hand():
    page = (ROOT / "MEASUREMENTS.md").read_text(encoding="utf-8")
    assert "|---" not in re.sub(measurements.MARK, "", page)


@pytest.mark.parametrize("name", NAMES)
def test_a_result_says_where_it_is_from(name):
    record = records.load(name)
    benchmark = re.fullmatch(r"python3 run\.py bench (\w+).*", record.command).group(1)
    assert (ROOT / "tools" / "benchmarks" / f"{benchmark}.py").is_file()
    assert re.fullmatch(r"[0-9a-f]{7,}( with changes)?", record.commit) and re.fullmatch(r"\d{4}-\d\d-\d\d", record.date)
    assert record.machine
    for table in record.tables:
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
    assert (records.RESULTS / f"{name}.json").read_text(encoding="utf-8") == records.dumped(record)


def test_every_result_is_shown():
    pages = "".join(path.read_text(encoding="utf-8") for path in measurements.PAGES)
    shown = {found[1] for found in measurements.MARK.findall(pages)} | {name for _, name, _ in measurements.COSTS}
    assert shown == {*NAMES, "costs"}


PRINTED = (
    "Ratios\n| | time | limit |\n|---|---|---|\n| plain | 1.000 |  |\n| ours | 0.900 | 1.1 |\n\nmore\n| a |\n|---|\n| 1 |\n"
)


def test_tables_are_found_in_what_is_printed():
    first, second = tables_of(PRINTED)
    assert first == Table("Ratios", ["", "time", "limit"], [["plain", "1.000", ""], ["ours", "0.900", "1.1"]])
    assert second == Table("more", ["a"], [["1"]])
    assert measurements.markdown(first.columns, first.rows).splitlines()[2:] == [
        "| plain | 1.000 |  |",
        "| ours | 0.900 | 1.1 |",
    ]


def test_what_a_benchmark_prints_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "ROOT", tmp_path)

    @recorded
    def main(argv):
        assert argv == ["--rows", "a b"]
        print(PRINTED)
        return 0

    assert main(["--rows", "--record", "some_cost", "a b"]) == 0
    assert PRINTED in capsys.readouterr().out
    found = Record(**json.loads((tmp_path / "some_cost.json").read_text()))
    assert found.command.endswith('--rows "a b"') and found.tables[0]["rows"][0] == ["plain", "1.000", ""]
    assert records.load("some_cost").tables == tables_of(PRINTED)
    for bad in (["--record"], ["--record", "../x"]):
        with pytest.raises(RunError, match="name of a record"):
            main(bad)


def test_a_benchmark_that_fails_or_prints_nothing_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for code in (0, 1):
        with pytest.raises(RunError, match="Nothing is recorded"):
            recorded(lambda argv, code=code: code)(["--record", "x"])
    assert not list(tmp_path.iterdir())


def test_a_page_names_what_is_missing():
    with pytest.raises(RunError, match="no record 'nothing'"):
        measurements.written("<!-- results: nothing -->\n<!-- end of results -->")
