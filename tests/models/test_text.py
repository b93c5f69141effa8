"""Tokenizers and padding."""

import json

import numpy as np
import pytest
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.pre_tokenizers

from jaxtok.models.text import JsonTokenizer, ScoreTokenizer, Stream, Tokenizer, pad


def score_tokenizer(words):
    """Bytes as in llama2.c, then `words` with their scores."""
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n"] + [b"<0x%02X>" % i for i in range(256)] + [w.encode() for w in words]
    return ScoreTokenizer(pieces, [0.0] * 259 + list(words.values()))


WORDS = {" ": -1.0, "a": -2.0, "b": -3.0, "c": -4.0, "ab": 1.0, "bc": 2.0, " a": 0.5, "abc": 3.0, "aa": 1.0}


def by_scanning(tok, text):
    """llama2.c's run.c as it is written: look over all pairs, merge the best, again."""
    where = {p: i for i, p in list(enumerate(tok.pieces))[259:]}
    ids = []
    for ch in " " + text if text else "":
        ids += [where[ch.encode()]] if ch.encode() in where else [b + 3 for b in ch.encode()]
    while True:
        best = (-1e10, -1, -1)
        for i in range(len(ids) - 1):
            merged = where.get(tok.pieces[ids[i]] + tok.pieces[ids[i + 1]])
            if merged is not None and tok.scores[merged] > best[0]:
                best = (tok.scores[merged], merged, i)
        if best[1] < 0:
            return [1, *ids]
        ids[best[2] : best[2] + 2] = [best[1]]


def test_score_tokenizer_by_hand():
    """' abc': bc scores 2 (before ab 1, ' a' 0.5), then a+bc = abc 3; the space stays alone."""
    tok = score_tokenizer(WORDS)
    name = {w: 259 + i for i, w in enumerate(WORDS)}
    assert tok.encode("abc") == [1, name[" "], name["abc"]]
    assert tok.encode("ab") == [1, name[" "], name["ab"]]  # ab 1.0 before ' a' 0.5
    assert tok.encode("aaa") == [1, name[" "], name["aa"], name["a"]]  # leftmost first
    assert tok.encode("é", special=False) == [name[" "], 0xC3 + 3, 0xA9 + 3]
    assert tok.encode("") == [1] and tok.encode("", special=False) == []
    assert tok.decode([1, name[" "], name["abc"], 0xC3 + 3, 0xA9 + 3, 2]) == "abcé"
    assert tok.decode([name[" a"]]) == " a"  # only after bos is the space the dummy
    assert tok.decode([1, 0xC3 + 3]) == "�"
    assert isinstance(tok, Tokenizer) and (tok.bos, tok.eos, tok.vocab) == (1, (2,), 259 + len(WORDS))
    with pytest.raises(ValueError, match="id 268 is outside the vocabulary of 268"):
        tok.decode([268])


def test_score_tokenizer_equals_scanning():
    tok = score_tokenizer(WORDS)
    rng = np.random.default_rng(0)
    for _ in range(50):
        text = "".join(rng.choice(list("abc é"), rng.integers(0, 40)))
        assert tok.encode(text) == by_scanning(tok, text)
        assert tok.decode(tok.encode(text)) == text


def test_score_tokenizer_of_stories(data, tmp_path):
    """The real vocabulary: same ids as run.c's algorithm, round trip, the same file back."""
    source = data / "stories260K" / "tok512.bin"
    tok = ScoreTokenizer.read(source)
    assert tok.vocab == 512
    text = (data / "text" / "tinystories_valid5.txt").read_text()
    assert tok.encode(text[:600]) == by_scanning(tok, text[:600])
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode("héllo 日本 🙂\n\t")) == "héllo 日本 🙂\n\t"
    tok.save(tmp_path)
    assert (tmp_path / "tokenizer.bin").read_bytes() == source.read_bytes()


def test_cut_off_score_tokenizer(tmp_path):
    score_tokenizer(WORDS).save(tmp_path)
    raw = (tmp_path / "tokenizer.bin").read_bytes()
    for size in [0, 3, 10, 500, len(raw) - 1, len(raw) - 9]:
        (tmp_path / "cut.bin").write_bytes(raw[:size])
        with pytest.raises(ValueError, match=r"cut\.bin is not a llama2\.c tokenizer"):
            ScoreTokenizer.read(tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes(raw[:8] + b"\xff\xff\xff\xff" + raw[12:])  # a negative length
    with pytest.raises(ValueError, match="entry 0 says -1 bytes"):
        ScoreTokenizer.read(tmp_path / "cut.bin")


def test_json_tokenizer(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    inner.add_special_tokens(["<s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    JsonTokenizer(inner).save(tmp_path)
    tok = JsonTokenizer.read(tmp_path / "tokenizer.json", bos=0, eos=(2,))
    assert isinstance(tok, Tokenizer) and (tok.bos, tok.eos, tok.vocab) == (0, (2,), 4)
    assert tok.encode("aba") == [0, 3, 1] and tok.encode("aba", special=False) == [3, 1]
    assert tok.decode(np.array([0, 3], np.int32)) == "ab"
    for junk in (b"", b"{", json.dumps({"model": 3}).encode()):
        (tmp_path / "tokenizer.json").write_bytes(junk)
        with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
            JsonTokenizer.read(tmp_path / "tokenizer.json")


def test_pad():
    ids, live = pad([[1, 2, 3], [4]], bucket=4)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3], [0, 0, 0, 4]])
    np.testing.assert_array_equal(live, [[0, 1, 1, 1], [0, 0, 0, 1]])
    assert ids.dtype == np.int32 and live.dtype == bool
    ids, live = pad([[1, 2, 3], []], side="right", fill=9)
    np.testing.assert_array_equal(ids, [[1, 2, 3], [9, 9, 9]])
    np.testing.assert_array_equal(live, [[1, 1, 1], [0, 0, 0]])
    assert pad([[]], bucket=8)[0].shape == (1, 8) and pad([[1] * 8], bucket=8)[0].shape == (1, 8)


@pytest.mark.parametrize(
    "args, message", [(([[1]], None, "up"), "side='up'"), (([],), "no rows to pad"), (([[1]], 0), "bucket=0 must be at least 1")]
)
def test_pad_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        pad(*args)


# --- text that comes a few ids at a time --------------------------------------------------------------------------------


def byte_level():
    """A token a byte, as GPT-2 spells them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    return JsonTokenizer(inner)


def pieces():
    """Words with a leading blank that a text loses at its start, bytes where no piece fits (SentencePiece)."""
    vocab = [*"\u2581abcdefghijklmnopqrstuvwxyz", *(f"<0x{i:02X}>" for i in range(256))]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(vocab)}, merges=[], byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    d = tokenizers.decoders
    inner.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return JsonTokenizer(inner)


@pytest.mark.parametrize("make", [byte_level, pieces])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_stream_joins_to_the_text(make, step):
    tokenizer, text = make(), "a caf\u00e9 \u4f60\u597d \U0001f642\U0001f642 end \u00df"
    ids, before = tokenizer.encode(text), tokenizer.encode("so far")
    for prompt in ([], before):
        stream, out = Stream(tokenizer, prompt), []
        for i in range(0, len(ids), step):
            out.append(stream.push(ids[i : i + step]))
            assert "\ufffd" not in out[-1], "a character was told before its last byte was there"
        whole = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
        assert "".join(out) == whole and stream.end() == "" and whole.endswith(text)
        assert sum(map(bool, out)) > len(text) / step / 2, "it holds back more than it must"


def test_bytes_that_never_become_a_character_are_told_at_the_end():
    tokenizer = byte_level()
    start, rest = tokenizer.encode("ok"), tokenizer.encode("\U0001f642")
    stream = Stream(tokenizer)
    assert stream.push([*start, *rest[:2]]) == "ok" and stream.push([]) == ""
    assert stream.end() == tokenizer.decode(rest[:2]) and set(stream.tokenizer.decode(rest[:2])) == {"\ufffd"}
    assert stream.push(start) == "ok" and stream.end() == ""
