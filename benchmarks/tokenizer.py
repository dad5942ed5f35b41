"""How fast text becomes ids: picogpt, OpenAI's published algorithm and tiktoken, in turns, on the same English.

    python benchmarks/tokenizer.py [TEXT_FILE ...]

Times are CPU seconds of this process (all three use one thread), the best of the rounds. "Cold" remembers no
word, "warm" has seen the text; tiktoken remembers nothing. The ids are checked to be equal.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import regex
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from picogpt.encoder import bytes_to_unicode, get_encoder

ROOT = Path(__file__).parents[1]
VOCABULARY = ROOT / "picogpt" / "vocabulary"
N_BYTES, N_ROUNDS = 5_000_000, 5


class OpenAIEncoder:
    """OpenAI's `src/encoder.py` as published, for its speed."""

    def __init__(self) -> None:
        self.encoder = json.loads((VOCABULARY / "encoder.json").read_text(encoding="utf-8"))
        merges = (VOCABULARY / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        self.bpe_ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
        self.byte_encoder = bytes_to_unicode()
        self.cache: dict[str, str] = {}
        self.pat = regex.compile(
            r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
        )

    @staticmethod
    def get_pairs(word: tuple[str, ...]) -> set[tuple[str, str]]:
        pairs = set()
        prev_char = word[0]
        for char in word[1:]:
            pairs.add((prev_char, char))
            prev_char = char
        return pairs

    def bpe(self, token: str) -> str:
        if token in self.cache:
            return self.cache[token]
        word = tuple(token)
        pairs = self.get_pairs(word)
        if not pairs:
            return token
        while True:
            bigram = min(pairs, key=lambda pair: self.bpe_ranks.get(pair, float("inf")))
            if bigram not in self.bpe_ranks:
                break
            first, second = bigram
            new_word: list[str] = []
            i = 0
            while i < len(word):
                try:
                    j = word.index(first, i)
                    new_word.extend(word[i:j])
                    i = j
                except ValueError:
                    new_word.extend(word[i:])
                    break
                if word[i] == first and i < len(word) - 1 and word[i + 1] == second:
                    new_word.append(first + second)
                    i += 2
                else:
                    new_word.append(word[i])
                    i += 1
            word = tuple(new_word)
            if len(word) == 1:
                break
            pairs = self.get_pairs(word)
        self.cache[token] = " ".join(word)
        return self.cache[token]

    def encode(self, text: str) -> list[int]:
        bpe_tokens: list[int] = []
        for token in regex.findall(self.pat, text):
            token = "".join(self.byte_encoder[b] for b in token.encode("utf-8"))
            bpe_tokens.extend(self.encoder[bpe_token] for bpe_token in self.bpe(token).split(" "))
        return bpe_tokens


def tiktoken_gpt2() -> tiktoken.Encoding:
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    ranks = data_gym_to_mergeable_bpe_ranks(str(VOCABULARY / "vocab.bpe"), str(VOCABULARY / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def read(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":  # LAMBADA
        return "\n".join(json.loads(line)["text"] for line in text.splitlines())
    return text


def timed(encode: Callable[[str], list[int]], text: str) -> tuple[float, list[int]]:
    start = time.process_time()
    ids = encode(text)
    return time.process_time() - start, ids


def measure_english(text: str) -> None:
    n_bytes = len(text.encode("utf-8"))
    seconds: dict[str, list[float]] = {}
    expected = tiktoken_gpt2().encode_ordinary(text)
    for _ in range(N_ROUNDS):
        start = time.process_time()
        ours = get_encoder()
        loading = time.process_time() - start
        openai = OpenAIEncoder()
        seconds.setdefault("loading", []).append(loading)
        for name, encode in (
            ("picogpt, cold", ours.encode),
            ("OpenAI's algorithm, cold", openai.encode),
            ("tiktoken", tiktoken_gpt2().encode_ordinary),
            ("picogpt, warm", ours.encode),
            ("OpenAI's algorithm, warm", openai.encode),
        ):
            elapsed, ids = timed(encode, text)
            seconds.setdefault(name, []).append(elapsed)
            assert ids == expected, f"{name}: the ids differ"
    print(f"{len(expected):,} ids; the best of {N_ROUNDS} rounds:")
    print(f"  {'picogpt, loading':25} {min(seconds.pop('loading')) * 1e3:6.1f} ms")
    for name, times in seconds.items():
        print(f"  {name:25} {n_bytes / min(times) / 1e6:6.1f} MB/s")


def measure_long_words() -> None:
    rng = random.Random(0)
    ours, theirs = get_encoder(), tiktoken_gpt2()
    for name, text in (
        ("letters, at random", "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=100_000))),
        ("times a", "a" * 100_000),
        ("emoji, at random", "".join(chr(rng.randrange(0x1F600, 0x1F650)) for _ in range(100_000))),
        ("times one emoji", "\N{GRINNING FACE}" * 100_000),
    ):
        our_time, ids = timed(ours.encode, text)
        their_time, expected = timed(theirs.encode_ordinary, text)
        assert ids == expected, f"{name}: the ids differ"
        print(f"  100,000 {name:19} picogpt {our_time:.2f} s, tiktoken {their_time:.2f} s")


def main() -> None:
    assets = ROOT.parent / "shared" / "assets"
    files = [Path(name) for name in sys.argv[1:]]
    files = files or sorted(
        [*ROOT.glob("data/*.txt"), *assets.glob("[et]*/*.txt"), *assets.glob("eval/*.jsonl")]
    )
    texts = list(dict.fromkeys(map(read, files)))
    text = "\n".join(texts).encode("utf-8")[:N_BYTES].decode("utf-8", "ignore")
    if not text:
        sys.exit("no text found: name some files")
    print(f"{len(text.encode('utf-8')):,} bytes of {', '.join(file.name for file in files)}")
    measure_english(text)
    measure_long_words()


if __name__ == "__main__":
    main()
