"""CSV files as spreadsheets, archives and hands leave them."""

from pathlib import Path

import pytest

from sdq.csv_file import read_rows
from sdq.errors import RequestError


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"\xef\xbb\xbfName, Label\n\na , 1\nb\n"),
        ("t.csv", b"\r\nname,label\r\na,1\r\nb\r\n"),
        ("t.tab", b"NAME\tlabel\na\t1\nb\n"),
    ],
)
def test_rows_by_column(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_rows(tmp_path / name)) == [{"name": "a", "label": "1"}, {"name": "b"}]


@pytest.mark.parametrize("content", [b"name\n\xff\n", b'name\n"' + b"x" * 200_000])
def test_what_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(RequestError, match=r"t\.csv: must be a CSV in UTF-8, got .*; save it"):
        list(read_rows(tmp_path / "t.csv"))
    with pytest.raises(RequestError, match=r"none\.csv: must be a CSV"):
        list(read_rows(tmp_path / "none.csv"))
