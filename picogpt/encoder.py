"""Byte-level BPE, GPT-2's tokenizer: text to ids and back (GPT-2 paper, 2.2; OpenAI's `src/encoder.py`).

`encode` takes four steps, which `python -m picogpt.encoder "some text"` shows at work:

1. PATTERN cuts the text into pieces, roughly words with the space before them. No token crosses a cut.
2. A piece becomes its UTF-8 bytes. There are only 256 of them, so no text is unknown.
3. Bytes are merged, pair by pair: of all neighbours, the two that stand first in the list of merges (they
   were the most frequent in the training text) become one symbol, until no two neighbours are in the list.
4. Each symbol that remains is a token, and the vocabulary gives its id.

Files and strings write every byte as a printable character (`bytes_to_unicode`): the token " the" is `Ġthe`.
"""

import codecs
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from heapq import heapify, heappop, heappush
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import regex

from picogpt import PicogptError

# OpenAI's. Which characters are letters (\p{L}) and numbers (\p{N}) is up to the Unicode tables of `regex`:
# programs with other tables can cut differently next to characters that were assigned in between.
PATTERN = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")
ALWAYS_CUT = regex.compile(r" (?=\S)")  # whatever stands before: PATTERN cuts in front of this space
MOST_BYTES = 1 << 25  # of a vocabulary file: GPT-2's are 1 MB, and JSON takes 25 times its size in memory
CHUNK = 1 << 16  # characters cut at a time, so that a book is never a list of a million pieces
MOST_KNOWN, LONGEST_KNOWN = 1 << 17, 64  # pieces whose ids are remembered, and how long they may be

END_OF_TEXT = "<|endoftext|>"
LAYOUTS = ("encoder.json + vocab.bpe", "tokenizer.json", "vocab.json + merges.txt")
# What a tokenizer.json may say and still mean GPT-2's byte-level BPE. None: not said.
TOKENIZER_JSON = {
    "model.type": (None, "BPE"),
    "model.dropout": (None, 0),
    **dict.fromkeys(("model.continuing_subword_prefix", "model.end_of_word_suffix"), (None, "")),
    **dict.fromkeys(("model.byte_fallback", "model.ignore_merges"), (None, False)),
    "normalizer.type": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (None, True),
}


class EncoderError(PicogptError):
    """A text, an id or a vocabulary that cannot be used."""


def bytes_to_unicode() -> dict[int, str]:
    """The character that stands for each of the 256 bytes: its own if printable, else one from U+0100 on.

    Space is `Ġ`, newline `Ċ`: no token has white space in it, and "Ġ t" can be a line of the list of merges.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


SYMBOL_OF_BYTE = bytes_to_unicode()
BYTE_OF_SYMBOL = {ord(symbol): byte for byte, symbol in SYMBOL_OF_BYTE.items()}


def to_symbols(text: str) -> str:
    """The UTF-8 bytes of a text, a character for each. (In Latin-1, byte 233 is character 233.)"""
    return text.encode("utf-8").decode("latin-1").translate(SYMBOL_OF_BYTE)


class Merge(NamedTuple):
    """One step of BPE: the neighbours `left` and `right` became one symbol."""

    rank: int  # the pair's place in the list of merges
    start: int  # the byte of the piece where `left` begins; symbols are as long as the bytes they stand for
    left: str
    right: str


class Piece(NamedTuple):
    """How one piece of a text became tokens: by these `merges`, in order, on the characters of `symbols`."""

    text: str
    symbols: str
    merges: list[Merge]
    tokens: list[str]
    ids: list[int]


class Encoder:
    """A vocabulary: `encoder` is token -> id, `decoder` id -> token, `bpe_ranks` merge -> place in the list.

    `special_tokens` (text -> id) are the tokens that no merge makes. Most, like `<|endoftext|>`, no merge could
    make, since PATTERN cuts them. One that looks like a word must be named, or it is taken for damage.
    """

    def __init__(
        self, encoder: dict[str, int], bpe_merges: list[tuple[str, str]], special_tokens: Collection[str] = ()
    ) -> None:
        """Raise EncoderError unless ids are 0 to n_vocab - 1, each once, and tokens and merges fit together."""
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.bpe_ranks = {pair: rank for rank, pair in enumerate(bpe_merges)}
        self.n_vocab = len(encoder)
        self.special_tokens: dict[str, int] = {}
        self._words = encoder.copy()  # all that merges can make
        named = set(special_tokens) - {""}
        for i in self._unmade(bpe_merges):
            token = self.decoder[i]
            text = token.translate(BYTE_OF_SYMBOL).encode("latin-1", "replace").decode("utf-8", "replace")
            if to_symbols(text) != token or (len(PATTERN.findall(text)) < 2 and text not in named):
                raise EncoderError(f"no merge makes the token {token!r}: is the list of merges cut short?")
            self.special_tokens[text] = self._words.pop(token)
        if made := named - self.special_tokens.keys():
            raise EncoderError(f"{min(made)!r} is an added token, but merges make it too: take it out")
        self.end_of_text = self.special_tokens.get(END_OF_TEXT)
        self._known: dict[str, list[int]] = {}

    def _unmade(self, merges: list[tuple[str, str]]) -> set[int]:
        """The ids that neither a byte nor a merge makes, once ids, bytes and merges are seen to be right."""
        if set(map(type, self.decoder)) != {int} or sorted(self.decoder) != [*range(self.n_vocab)]:
            for token, i in self.encoder.items():
                if type(i) is not int or not 0 <= i < self.n_vocab or self.decoder[i] != token:
                    raise EncoderError(f"{token!r} has id {i!r}: ids are 0 to {self.n_vocab - 1}, each once")
        symbols = set(SYMBOL_OF_BYTE.values())
        if missing := symbols - self.encoder.keys():
            raise EncoderError(f"the vocabulary lacks {min(missing)!r}, the symbol of a byte: it needs all 256")
        made = set(map(self.encoder.get, map("".join, merges)))
        if None in made or len(self.bpe_ranks) < len(merges):
            for rank, pair in enumerate(merges):
                if "".join(pair) not in self.encoder:
                    raise EncoderError(f"merge {rank}, {' '.join(pair)!r}, makes no token of the vocabulary")
                if self.bpe_ranks[pair] != rank:
                    raise EncoderError(f"merge {rank}, {' '.join(pair)!r}, is in the list twice")
        return self.decoder.keys() - made - {self.encoder[symbol] for symbol in symbols}

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of a text. A special token in it is text like any other, unless allowed (or all are: "all").

        Raises EncoderError for half a surrogate pair in the text, and for allowing what is no special token.
        """
        _check_text(text)
        allowed = self.special_tokens if allowed_special == "all" else allowed_special
        if unknown := set(allowed) - self.special_tokens.keys():
            raise EncoderError(f"{unknown.pop()!r} is no special token here: {[*self.special_tokens]} are")
        names = "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True)))
        parts = regex.split(f"({names})", text) if names else [text]
        ids: list[int] = []
        for n, part in enumerate(parts):
            if n % 2:  # split also returns what it split at
                ids.append(self.special_tokens[part])
                continue
            for piece in _pieces(part):
                ids += self._known.get(piece) or self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        ids = [self._words[token] for token in self._merge(to_symbols(piece))[0]]
        if len(piece) <= LONGEST_KNOWN:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[piece] = ids
        return ids

    def _merge(self, symbols: str) -> tuple[list[str], list[tuple[int, int, str, str]]]:
        """The tokens of a piece, and the merges that led there: the lowest rank first, of equals the leftmost.

        OpenAI's `bpe` looks through all pairs again for each merge, n * n steps for n symbols. Here the pairs
        wait in a heap: n log n.
        """
        rank_of = self.bpe_ranks.get
        at = [*symbols, ""]  # at[i]: the symbol that begins at byte i; "" inside a symbol and past the end
        before = [*range(-1, len(symbols))]  # before[i]: where the symbol to the left of byte i begins
        heap = [(rank, i) for i, pair in enumerate(pairwise(at)) if (rank := rank_of(pair)) is not None]
        heapify(heap)
        merges = []
        while heap:
            rank, i = heappop(heap)
            left, right = at[i], at[i + len(at[i])]
            if rank_of((left, right)) != rank:
                continue  # one of the two has gone into another merge since
            merges.append((rank, i, left, right))
            end = i + len(left) + len(right)
            at[i], at[i + len(left)], before[end] = left + right, "", i
            for a, b in ((before[i], i), (i, end)):  # the pairs that came about; at[-1] is "", past the end
                rank = rank_of((at[a], at[b]))
                if rank is not None:
                    heappush(heap, (rank, a))
        return [symbol for symbol in at if symbol], merges

    def explain(self, text: str) -> list[Piece]:
        """How `encode` comes to its ids: every piece in order, and every merge in it."""
        _check_text(text)
        pieces = []
        for piece in _pieces(text):
            symbols = to_symbols(piece)
            tokens, merges = self._merge(symbols)
            ids = [self._words[token] for token in tokens]
            pieces.append(Piece(piece, symbols, [Merge(*merge) for merge in merges], tokens, ids))
        return pieces

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The bytes that ids stand for (a list, an array). Raises EncoderError for one that is none."""
        try:
            symbols = "".join(map(self.decoder.__getitem__, map(index, ids)))
        except KeyError as error:
            raise EncoderError(f"no token has the id {error}; ids are 0 to {self.n_vocab - 1}") from None
        except TypeError as error:
            raise EncoderError(f"ids are a sequence of whole numbers, but {error}") from None
        return symbols.translate(BYTE_OF_SYMBOL).encode("latin-1")

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text that ids stand for. What is not UTF-8, like half of a character, becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `encoder.json` and `vocab.bpe` into a directory, in OpenAI's form to the byte.

        Raises EncoderError for a special token that looks like a word: those files could not tell.
        """
        if words := [text for text in self.special_tokens if len(PATTERN.findall(text)) < 2]:
            raise EncoderError(f"encoder.json and vocab.bpe cannot say that {words[0]!r} is a special token")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary = json.dumps({self.decoder[i]: i for i in range(self.n_vocab)})
        merges = "".join(f"{left} {right}\n" for left, right in self.bpe_ranks)
        for name, content in (("encoder.json", vocabulary), ("vocab.bpe", "#version: 0.2\n" + merges)):
            unfinished = directory / f"{name}.part"
            try:
                unfinished.write_bytes(content.encode("utf-8"))
                unfinished.replace(directory / name)
            finally:  # a full disk leaves half of it
                unfinished.unlink(missing_ok=True)


class StreamDecoder:
    """Gives out text once its characters are whole. All that it returns, joined, is `decode` of all the ids."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: SupportsIndex) -> str:
        """The characters that this id completes: often a word, sometimes none."""
        return self._utf8.decode(self._encoder.decode_bytes([token_id]))

    def flush(self) -> str:
        """What is left after the last id: U+FFFD if it ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        cut = ALWAYS_CUT.search(text, start + CHUNK)
        end = cut.start() if cut else len(text)
        yield from PATTERN.findall(text, start, end)
        start = end


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise EncoderError(f"the text is {text!r:.40}: give a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = f"character {error.start} of the text is {text[error.start]!a}"
        raise EncoderError(f"{lone}, half a surrogate pair, which UTF-8 cannot hold: replace it") from None


def get_encoder(model_dir: str | os.PathLike[str] | None = None) -> Encoder:
    """The encoder of a model directory (the first of LAYOUTS that is there), or, by default, GPT-2's.

    Raises EncoderError for files that are missing, damaged, or of another kind than GPT-2's byte-level BPE.
    """
    directory = Path(__file__).with_name("vocabulary") if model_dir is None else Path(model_dir)
    for layout in LAYOUTS:
        files = [directory / name for name in layout.split(" + ")]
        if files[0].exists():
            try:
                return Encoder(*(_read_pair(*files) if len(files) == 2 else _read_tokenizer_json(*files)))
            except (EncoderError, AttributeError, KeyError, TypeError, ValueError) as error:
                said = error if isinstance(error, EncoderError) else f"not laid out as it should be: {error!r}"
                raise EncoderError(f"{directory} ({layout}): {said!s:.400}") from None
    raise EncoderError(f"{directory} holds no vocabulary: it needs {', or '.join(LAYOUTS)}")


def _read_pair(vocabulary: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]], Collection[str]]:
    lines = _read(merges).rstrip().split("\n")
    added = vocabulary.with_name("added_tokens.json")  # Hugging Face's, for tokens that came after training
    special_tokens = _read(added) if added.exists() else {}
    encoder = _with_added(_read(vocabulary), special_tokens)
    return encoder, _pairs(lines[lines[0].startswith("#version") :]), special_tokens.keys()


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], Collection[str]]:
    content = _read(path)
    for setting, allowed in TOKENIZER_JSON.items():
        part, name = setting.split(".")
        found = (content.get(part) or {}).get(name)
        if found not in allowed:
            raise EncoderError(f"{setting} is {found!r}, but only {allowed[-1]!r} is GPT-2's byte-level BPE")
    added = content.get("added_tokens") or []
    special_tokens = {token["content"]: token["id"] for token in added}
    if any(token.get(name) for token in added for name in ("single_word", "lstrip", "rstrip")):
        raise EncoderError("an added token has single_word, lstrip or rstrip: GPT-2's take nothing beside them")
    encoder = _with_added(content["model"]["vocab"], special_tokens)
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return encoder, _pairs(lines), special_tokens.keys()


def _with_added(vocabulary: dict[str, int], added: dict[str, int]) -> dict[str, int]:
    for text, i in added.items():
        if vocabulary.get(text, i) != i:
            raise EncoderError(
                f"{text!r} has the id {vocabulary[text]!r:.40}, and as an added token {i!r:.40}: keep one"
            )
    return vocabulary | {to_symbols(text): i for text, i in added.items()}


def _pairs(lines: list[str]) -> list[tuple[str, str]]:
    pairs: list[Any] = [tuple(line.split()) for line in lines]
    if set(map(len, pairs)) - {2}:
        wrong = next(line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2)
        raise EncoderError(f"the merge {wrong!r} is not two symbols with a space between")
    return pairs


def _read(path: Path) -> Any:
    """What a .json file holds, or the text of another. In UTF-8, whatever the platform prefers."""
    try:
        if (path.exists() and not path.is_file()) or path.stat().st_size > MOST_BYTES:
            raise ValueError("it is no file, or too large")  # a pipe would keep us waiting
        text = path.read_bytes().decode("utf-8")
        return json.loads(text) if path.suffix == ".json" else text
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"cannot read {path.name}: {error}") from None


def _show(piece: Piece, colour: bool) -> str:
    """How a piece becomes ids, with a line for each merge and its rank if the piece is short."""
    paint = "\x1b[1;32m{}\x1b[0m" if colour else "{}"
    row = dict(enumerate(piece.symbols))
    lines = [("bytes", " ".join(piece.symbols))]
    for rank, start, left, right in piece.merges if len(row) <= 64 else ():
        del row[start + len(left)]
        row[start] = left + right
        symbols = (paint.format(symbol) if i == start else symbol for i, symbol in row.items())
        lines.append((f"merge {rank}", " ".join(symbols)))
    lines += [("tokens", " ".join(map(paint.format, piece.tokens))), ("ids", " ".join(map(str, piece.ids)))]
    return "\n".join([repr(piece.text), *(f"  {name:<11} {row}" for name, row in lines)]) + "\n"


def main() -> int:
    """`python -m picogpt.encoder TEXT [MODEL_DIR]`: show TEXT becoming ids. `-`, or a pipe: standard input."""
    from picogpt.command import UsageError, colours, exit_status, read, write

    def command() -> None:
        text, *model_dir = sys.argv[1:] or ["-"]
        if len(model_dir) > 1 or (len(sys.argv) == 1 and sys.stdin is not None and sys.stdin.isatty()):
            raise UsageError('usage: python -m picogpt.encoder "TEXT" [MODEL_DIR]')
        colour = colours() > 0
        for piece in get_encoder(*model_dir).explain(read() if text == "-" else text):
            write(_show(piece, colour))

    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
