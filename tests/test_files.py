from __future__ import annotations

import hashlib
import json

import pytest

from lib import UserError
from lib.run.files import (
    append_jsonl,
    atomic,
    git_revision,
    read_jsonl,
    resume_log,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)

RECORDS = [{"id": "a", "n": 1.5}, {"id": "b", "text": "ä line\nand \u2028 another", "list": [1, None]}]


def test_jsonl_round_trip_with_append(tmp_path):
    path = tmp_path / "new" / "x.jsonl"
    write_jsonl(path, RECORDS)
    append_jsonl(path, {"id": "c"})
    assert read_jsonl(path, required=("id",)) == [*RECORDS, {"id": "c"}]
    assert "ä" in path.read_text(encoding="utf-8"), "readable, not escaped"


def test_lone_surrogates_survive(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"s": "a\ud800b"}])
    append_jsonl(tmp_path / "x.jsonl", {"s": "\udfff"})
    assert [r["s"] for r in read_jsonl(tmp_path / "x.jsonl")] == ["a\ud800b", "\udfff"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"id": 1}\n\n{"id": \n', ":3: not a JSON object"),
        (b'{"id": 1}\n[1]\n', ":2: not a JSON object"),
        (b'{"id": "\xff"}\n', ":1: not a JSON object in UTF-8"),
        (b'{"id": 1}\n{"ID": 2}\n', ":2: has no key 'id'"),
        (
            b'{"id": "a"}\n{"id": "b"}\n\n{"id": "a"}\n',
            "id 'a' stands in lines 1, 4: give each record an id of its own",
        ),
        (b'{"id": 7}\n{"id": "7"}\n', "id '7' stands in lines 1, 2"),
        (
            b'{"id": "a"}\n' * 9 + b'{"id": 1e5}\n' * 2,
            "lines 1, 2, 3, 4, 5, ..., and 1 more ids stand in several",
        ),
        (b'{"id": "a\\ud800"}\n{"id": "a\\udfff"}\n', "stands in lines 1, 2"),
        (b'{"id": null}\n', ":1: id is None; allowed: some text, or a number"),
        (b'{"id": true}\n', ":1: id is True"),
        (b'{"id": " "}\n', ":1: id is ' '"),
        (b'{"id": ["a"]}\n', ":1: id is ['a']"),
    ],
)
def test_read_errors_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_jsonl(path, required=("id",))
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_records_have_ids_as_they_stand_and_text_that_is_text(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = ['{"id": 1e5, "n": 1e5}', '{"id": 1.0}', '{"id": 7}']
    lines.append('{"id": "007", "t": ["a\\ud83d", {"b\\u0000": "\\ud83d\\ude00"}]}')
    path.write_text("\n".join(lines))
    records = read_jsonl(path, required=("id",))
    assert [r["id"] for r in records] == ["1e5", "1.0", "7", "007"] and records[0]["n"] == 100000.0
    assert records[3]["t"] == ["a\ufffd", {"b\ufffd": "\U0001f600"}]
    for value in (None, 7, ["x"], True, "", " "):
        write_jsonl(path, [{"id": "r", "prompt": value}])
        with pytest.raises(UserError, match="x.jsonl: r: prompt is .*; allowed: some text"):
            read_jsonl(path, ("id", "prompt"))
        write_jsonl(path, [{"id": "r", "target": value}])
        if value in ("", " ", None):  # null is as good as missing
            assert read_jsonl(path, ("id",), ("target",))[0]["target"] == value
        else:
            with pytest.raises(UserError, match="r: target is"):
                read_jsonl(path, ("id",), ("target",))


def test_read_missing_file_or_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_jsonl(tmp_path)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n{"id": 2}\r\n')
    assert read_jsonl(tmp_path / "x.jsonl", required=("id",)) == [{"id": "1"}, {"id": "2"}]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_resumed_log_drops_unwanted_malformed_and_half_written_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0,  "odd spacing":1}\n{"step": 1}\nnonsense\n{"step": 5}\n{"step": 1}')
    assert [r["step"] for r in resume_log(path, lambda record: record["step"] < 3)] == [0, 1]
    assert path.read_bytes() == b'{"step": 0,  "odd spacing":1}\n{"step": 1}\n'
    append_jsonl(path, {"step": 2})
    assert [r["step"] for r in read_jsonl(path)] == [0, 1, 2]
    assert resume_log(path) == read_jsonl(path)
    assert resume_log(tmp_path / "none.jsonl") == []
    assert not (tmp_path / "none.jsonl").exists()


def test_sha256_of_a_file_larger_than_one_block(tmp_path):
    (tmp_path / "x").write_bytes(b"ab" * 700_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"ab" * 700_000).hexdigest()


def test_git_revision_never_fails(monkeypatch):
    assert git_revision() == "unknown" or len(git_revision().removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", "")
    assert git_revision() == "unknown"


def test_write_text_is_utf8(tmp_path):
    write_text(tmp_path / "x.md", "é")
    assert (tmp_path / "x.md").read_bytes() == b"\xc3\xa9"
