"""Sources read what they say, deal documents apart, and name file and line when they cannot."""

import json

import pytest

from lcx.data.packing import PackedText
from lcx.data.sources import JsonLines, SourceError, StandardLibrary, TextFolder, contents
from lcx.data.tokenizers import ByteTokenizer, HFTokenizer
from lcx.spec import SpecError


def test_standard_library_is_real_code_and_splits_apart():
    everything, train, heldout = (StandardLibrary(split=split).documents() for split in ("all", "train", "heldout"))
    assert set(train.names) | set(heldout.names) == set(everything.names)
    assert not set(train.names) & set(heldout.names)
    assert 4 <= len(heldout) < len(train) / 8
    asyncio = everything[everything.names.index("asyncio")]
    assert "class Task" in asyncio and "class Queue" in asyncio
    assert not {"test", "site-packages", "__pycache__"} & set(everything.names)


def test_text_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "1.txt").write_bytes("eins\r\nä".encode())
    documents = TextFolder(path=str(tmp_path)).documents()
    assert documents.names == ["1.txt", "b/2.txt"]
    assert documents[0] == "eins\r\nä"
    with pytest.raises(SourceError, match=r"no file matches it"):
        TextFolder(path=str(tmp_path), pattern="*.md").documents()
    with pytest.raises(SourceError, match=r"TextFolder\.path = .*: there is no such folder"):
        TextFolder(path=str(tmp_path / "none")).documents()
    (tmp_path / "1.txt").write_bytes(b"ok\xff")
    with pytest.raises(SourceError, match=r"1\.txt: not UTF-8 at byte 2"):
        TextFolder(path=str(tmp_path)).documents()[0]
    (tmp_path / "b" / "2.txt").write_text("")
    with pytest.raises(SourceError, match=r"2\.txt: empty; a document needs text"):
        TextFolder(path=str(tmp_path)).documents()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 3: not JSON"),
        (b"[1]", "line 3: no field 'text'; it has list"),
        (b'{"txt": "a"}', "line 3: no field 'text'; it has txt"),
        (b'{"text": 3}', "line 3: field 'text' is of type int: expected text"),
        (b'{"text": ""}', "line 3: field 'text' is empty"),
        (b'{"text": "\xff"}', "line 3: not UTF-8 at byte 10"),
    ],
)
def test_json_lines(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "one\u2028"}, ensure_ascii=False) + "\n\n")
    assert JsonLines(path=str(path)).documents()[0] == "one\u2028"
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(SourceError, match=rf"d\.jsonl, {message}"):
        JsonLines(path=str(path)).documents()


def test_json_lines_reads_any_document_at_random(tmp_path):
    path, texts = tmp_path / "d.jsonl", [f"{'é' * n} text {n}\n" for n in range(60)]
    path.write_bytes("\r\n".join(json.dumps({"body": text}, ensure_ascii=False) for text in texts).encode())
    documents = JsonLines(path=str(path), field="body").documents()
    assert [documents[i] for i in reversed(range(60))] == texts[::-1]
    train, heldout = (JsonLines(path=str(path), field="body", split=split).documents() for split in ("train", "heldout"))
    assert sorted([*train.names, *heldout.names]) == sorted(documents.names)
    assert len(heldout) >= 1 and all(heldout[i] == texts[documents.names.index(name)] for i, name in enumerate(heldout.names))
    path.write_text("\n")
    with pytest.raises(SourceError, match=r"d\.jsonl.*there is no document"):
        JsonLines(path=str(path)).documents()
    with pytest.raises(SourceError, match=r"JsonLines\.path = .*: is a folder: expected a file"):
        JsonLines(path=str(tmp_path)).documents()
    with pytest.raises(SourceError, match=r"JsonLines\.path = .*: there is no such file"):
        JsonLines(path=str(tmp_path / "none")).documents()


def test_contents_change_with_any_text_or_name(tmp_path):
    rows = PackedText(source=TextFolder(path=str(tmp_path)))
    (tmp_path / "a.txt").write_text("one")
    first = contents(rows, "rows")
    assert first.keys() == {"rows.source.bytes", "rows.source.crc32"} and first["rows.source.bytes"] == 3
    assert contents(rows, "rows") == first
    (tmp_path / "a.txt").write_text("two")
    second = contents(rows, "rows")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    found = [counts["rows.source.crc32"] for counts in (first, second, contents(rows, "rows"))]
    assert len(set(found)) == 3


def test_byte_tokenizer_round_trip():
    tokenizer, text = ByteTokenizer(), "naïve \U0001f600\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([0x61, 257, 0xFF]) == "a\ufffd"


def test_hf_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    loaded = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "hello": 2, "world": 3}, unk_token="<unk>"))
    loaded.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded.add_special_tokens(["<eos>"])
    path = str(tmp_path / "tokenizer.json")
    loaded.save(path)
    tokenizer = HFTokenizer(path=path, eos_token="<eos>")
    assert (tokenizer.size, tokenizer.eos, tokenizer.pad) == (4, 0, 0)
    assert tokenizer.encode("hello world").tolist() == [2, 3]
    assert tokenizer.decode([2, 3, 0]) == "hello world"
    with pytest.raises(SpecError, match=r"eos_token = '</s>'"):
        HFTokenizer(path=path, eos_token="</s>")
    with pytest.raises(SpecError, match=r"path = .*an existing tokenizer\.json"):
        HFTokenizer(path=path + "x", eos_token="<eos>")


def test_hf_tokenizer_encodes_the_whole_text_whatever_the_file_asks_for(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    loaded = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "hello": 2, "far": 70_000}, unk_token="<unk>"))
    loaded.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded.enable_truncation(3)
    loaded.enable_padding(length=5, pad_token="<eos>")
    path = str(tmp_path / "tokenizer.json")
    loaded.save(path)
    tokenizer = HFTokenizer(path=path, eos_token="<eos>")
    assert tokenizer.encode("hello " * 9).tolist() == [2] * 9
    assert tokenizer.encode("hello").tolist() == [2]
    assert tokenizer.size == 70_001  # more than the four tokens it has: ids leave a gap
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(SpecError, match=r"HFTokenizer\.path = .*a tokenizer\.json that loads"):
        HFTokenizer(path=str(tmp_path / "broken.json"), eos_token="<eos>")
