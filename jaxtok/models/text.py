"""Text and token ids: the tokenizers that checkpoints come with, and padding ragged lists of ids."""

import heapq
import pathlib
import struct
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
from jaxtyping import Array, Bool, Int

Ids = Sequence[int] | Int[Array | np.ndarray, " n"]


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer: `bos` (None = the model has none), `eos` (ids that end a text), `vocab` (number of ids)."""

    bos: int | None
    eos: tuple[int, ...]
    vocab: int

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of `text`, with the special ids the model expects around it (usually bos in front) unless special=False."""
        ...

    def decode(self, ids: Ids) -> str:
        """Text of `ids` without special ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Write the tokenizer's file into a checkpoint folder, where `load` finds it."""
        ...


def _ints(ids: Ids) -> list[int]:
    """A list of Python ints of a list or an array of ids (one transfer for a device array)."""
    return np.asarray(ids, np.int64).tolist()


class JsonTokenizer:
    """A Hugging Face tokenizer.json, read with the `tokenizers` package. `bos` and `eos` come from the model's config."""

    def __init__(self, inner: tokenizers.Tokenizer, *, bos: int | None = None, eos: tuple[int, ...] = ()):
        self.inner, self.bos, self.eos = inner, bos, eos
        self.vocab = inner.get_vocab_size(with_added_tokens=True)

    @classmethod
    def read(cls, path: str | pathlib.Path, *, bos: int | None = None, eos: tuple[int, ...] = ()) -> "JsonTokenizer":
        """From a tokenizer.json; ValueError when it is none."""
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the package raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {e}") from None
        return cls(inner, bos=bos, eos=eos)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """See `Tokenizer.encode`; the special ids are those of the file's own post-processor."""
        return self.inner.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer.decode`."""
        return self.inner.decode(_ints(ids), skip_special_tokens=True)

    def save(self, folder: pathlib.Path) -> None:
        """Write tokenizer.json."""
        self.inner.save(str(folder / "tokenizer.json"))


class ScoreTokenizer:
    """The BPE of llama2.c: pieces with scores; the adjacent pair whose merged piece scores highest (leftmost on ties) merges first.

    A text starts with a dummy space; a character that is no piece falls back to its UTF-8 bytes, whose ids are byte + 3.
    Ids 0, 1, 2 are unknown, bos, eos. File: i32 longest piece, then for each id f32 score, i32 length, bytes (little endian).
    """

    bos: int | None
    eos: tuple[int, ...]
    vocab: int

    def __init__(self, pieces: Sequence[bytes], scores: Sequence[float]):
        if len(pieces) != len(scores) or len(pieces) < 259:
            raise ValueError(f"{len(pieces)} pieces and {len(scores)} scores; need as many, at least 259 (3 special ids, 256 bytes)")
        self.bos, self.eos, self.vocab = 1, (2,), len(pieces)
        self.pieces, self.scores = tuple(pieces), tuple(scores)
        # the byte ids spell "<0x41>" in the file; a text with those six characters is not that byte, and ids 0..2 are never text
        self._id = {p: i for i, p in reversed(list(enumerate(self.pieces))) if i >= 259}
        self._out = [b""] * 3 + [bytes([i]) for i in range(256)] + list(self.pieces[259:])

    @classmethod
    def read(cls, path: str | pathlib.Path) -> "ScoreTokenizer":
        """From llama2.c's tokenizer.bin; ValueError when the file is none."""
        raw = pathlib.Path(path).read_bytes()
        pieces, scores, at = [], [], 4
        while at < len(raw):
            if at + 8 > len(raw):
                raise ValueError(f"{path} is not a llama2.c tokenizer or is cut off: entry {len(pieces)} at byte {at} of {len(raw)}")
            score, size = struct.unpack_from("<fi", raw, at)
            at += 8 + size
            if size < 0 or at > len(raw):
                raise ValueError(f"{path} is not a llama2.c tokenizer or is cut off: entry {len(pieces)} says {size} bytes")
            pieces.append(raw[at - size : at])
            scores.append(score)
        try:
            return cls(pieces, scores)
        except ValueError as e:
            raise ValueError(f"{path} is not a llama2.c tokenizer: {e}") from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """See `Tokenizer.encode`; special = bos in front. O(n log n)."""
        ids: list[int] = []
        for ch in " " + text if text else "":
            piece = ch.encode("utf-8", "surrogatepass")
            ids += [self._id[piece]] if piece in self._id else [byte + 3 for byte in piece]
        left, right = list(range(-1, len(ids) - 1)), [*range(1, len(ids)), -1]
        heap: list[tuple[float, int, int, int, int]] = []

        def push(i):
            j = right[i]
            merged = self._id.get(self.pieces[ids[i]] + self.pieces[ids[j]]) if j >= 0 else None
            if merged is not None:
                heapq.heappush(heap, (-self.scores[merged], i, ids[i], ids[j], merged))

        for i in range(len(ids)):
            push(i)
        while heap:
            _, i, a, b, merged = heapq.heappop(heap)
            j = right[i]
            if ids[i] != a or j < 0 or ids[j] != b:
                continue  # one of the two has merged with another neighbour since
            ids[i], ids[j] = merged, -1
            right[i] = right[j]
            if right[j] >= 0:
                left[right[j]] = i
            push(i)
            if left[i] >= 0:
                push(left[i])
        return [1] * special + [i for i in ids if i >= 0]

    def decode(self, ids: Ids) -> str:
        """See `Tokenizer.decode`; the dummy space after bos is dropped."""
        out, last = b"", None
        for i in _ints(ids):
            if not 0 <= i < self.vocab:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab}")
            piece = self._out[i]
            out += piece[1:] if last == self.bos and piece[:1] == b" " else piece
            last = i
        return out.decode("utf-8", "replace")

    def save(self, folder: pathlib.Path) -> None:
        """Write tokenizer.bin in llama2.c's format."""
        body = b"".join(struct.pack("<fi", s, len(p)) + p for p, s in zip(self.pieces, self.scores, strict=True))
        (folder / "tokenizer.bin").write_bytes(struct.pack("<i", max(map(len, self.pieces))) + body)


class Stream:
    """Text of ids that come a few at a time: what `push` and `end` return joins to the text that all ids have together.

    A token may hold part of a character, whose bytes are text only when the last of them is there, and may begin with a blank that a
    tokenizer drops at the start of a text: so new ids are decoded after those before them. before: ids whose text is known already.
    """

    def __init__(self, tokenizer: Tokenizer, before: Ids = ()):
        self.tokenizer, self.ids = tokenizer, _ints(before)[-8:]  # enough for a character and what surrounds it
        self.told = len(self.ids)

    def push(self, ids: Ids) -> str:
        """The text that is certain once these ids follow."""
        self.ids += _ints(ids)
        return self._tell(whole=False)

    def end(self) -> str:
        """What is left: bytes that never became a character, as U+FFFD."""
        return self._tell(whole=True)

    def _tell(self, whole: bool) -> str:
        known = self.tokenizer.decode(self.ids[: self.told])
        for n in range(len(self.ids), self.told, -1):
            text = self.tokenizer.decode(self.ids[:n])
            if whole or not text.endswith("\ufffd"):
                start = max(0, self.told - 8)  # what stands before is of no more use
                self.ids, self.told = self.ids[start:], n - start
                return text[len(known) :]
        return ""


def pad(
    rows: Sequence[Sequence[int]], bucket: int | None = None, side: str = "left", fill: int = 0
) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    """Ragged lists of ids as one array: ids i32 [b n] and live bool [b n]; n = the longest row rounded up to a multiple of `bucket`.

    side="left" puts the dead rows first (what prefill wants: the last row is the last token), "right" last. A few buckets
    instead of exact lengths keep the number of compiled programs small.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}; choose 'left' or 'right'")
    if not rows:
        raise ValueError("no rows to pad; give at least one list of ids")
    if bucket is not None and bucket < 1:
        raise ValueError(f"bucket={bucket} must be at least 1")
    step = bucket or 1
    n = max(-(-max(map(len, rows)) // step), 1) * step
    ids, live = np.full((len(rows), n), fill, np.int32), np.zeros((len(rows), n), bool)
    for i, row in enumerate(rows):
        at = slice(n - len(row), n) if side == "left" else slice(0, len(row))
        ids[i, at], live[i, at] = np.asarray(row, np.int32), True
    return ids, live
