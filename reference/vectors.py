"""The vectors: what an implementation of GPT-2 must give, ready for JSON. build.py stores and compares them."""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from picogpt import get_encoder
from picogpt.encoder import Encoder, regex
from picogpt.formula import HPARAMS, WEIGHTS, formula_encoder, formula_params, write_model
from picogpt.generation import Decoder, generate
from picogpt.model import gpt2, softmax
from picogpt.recording import record
from picogpt.sampling import draw, probabilities
from picogpt.trace import tree_map

VERSION = 1

END_OF_TEXT = "<|endoftext|>"
TEXT = f"{END_OF_TEXT}The cat's in the heat; on \xe92"  # what the trace is of
OTHER = "and then: stars"
TEXTS = [
    *("", "a", " ", "Hello world", "hello <|endoftext|>", "The quick brown fox jumps over the lazy dog."),
    *("I'm we're they've she'll he'd it's can't", "I'M WE'RE IT'S", "'s 's''s", "don\u2019t", "rock'n'roll's"),
    *("0", "00000000000000000", "3.14159 1,000,000", "x1y2z3", "½ ² ٣ Ⅷ 四", "2024-01-31T23:59:59Z"),
    *("  two  spaces  ", "a   b", "tab\tand\t\ttabs", "line\nline\n\nline\n", "crlf\r\ncrlf\r\n", " \n \n  x"),
    *(
        "\xa0no\xa0break",
        "\u3000wide\u2028line",
        "zero\u200bwidth\ufeff",
        "bell\x07 nul\x00 del\x7f",
        "\x1cfs\x85nel",
    ),
    *("naïve café", "nai\u0308ve cafe\u0301", "Straße ﬁn İ", "Привет, мир", "Ελληνικά", "שָׁלוֹם", "السلام عليكم"),
    *(
        "你好\uff0c世界",
        "日本語のテキスト",
        "한국어",
        "ไทย",
        "हिन्दी",
        "\U0001d518\U0001d52b1",
        "\U00020000\U0002a6d6",
    ),
    *("😀", "👍🏽", "👩\u200d👩\u200d👧", "🏳️\u200d🌈 🇺🇳", "e\u0301\u0323\u20dd", "\u0301alone", "\ufffd", "\r"),
    *(
        "===== -----",
        "int main(void) {\n\treturn 0;\n}\n",
        "https://a.bc/?d=e&f=%20#g",
        "a_b-c.d/e",
        " the the the",
    ),
    *("aaaaaaaaaaaaaaaaaaaaaaaa", "antidisestablishmentarianism", "zjqflkxw", "SolidGoldMagikarp"),
]
# Ids of which some are no whole characters, alone or together.
DECODED = [
    *([15496, 995], [47249, 222], [222], [47249], [47249, 65], [41840, 235, 8582, 237, 121]),
    *([30266, 109], [39820, 9099], [50256], [187, 187], [0, 255, 187], [178, 65]),
]
LOGITS = [1.5, 0.25, -1.0, 3.0, 2.75, -0.5, 2.0, 0.0, -2.25, 1.0]
TIED = [2.0, 1.0, 2.0, 0.5, 1.0, 1.0, -1.0, 2.0]
SETTINGS = [  # logits, temperature, top_k (0: all), top_p (1: all)
    *((LOGITS, 0, 0, 1), (LOGITS, 1, 0, 1), (LOGITS, 0.5, 0, 1), (LOGITS, 1.7, 0, 1), (LOGITS, 0.1, 0, 1)),
    *((LOGITS, 1, 1, 1), (LOGITS, 1, 3, 1), (LOGITS, 1, 10, 1), (LOGITS, 1, 50, 1), (LOGITS, 0.8, 5, 1)),
    *(
        (LOGITS, 1, 0, 0.1),
        (LOGITS, 1, 0, 0.5),
        (LOGITS, 1, 0, 0.7),
        (LOGITS, 1, 0, 0.9),
        (LOGITS, 1, 0, 0.999),
    ),
    *((LOGITS, 0.8, 5, 0.9), (LOGITS, 2.0, 4, 0.5), (LOGITS, 0.5, 0, 0.7), (TIED, 0, 0, 1), (TIED, 1, 2, 1)),
    *((TIED, 1, 4, 1), (TIED, 1, 3, 0.7), ([4.0, 3.0], 1, 0, 0.5), ([4.0, 3.0], 1, 0, 0.8), ([7.0], 1, 0, 0.5)),
]
UNIFORMS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def build() -> dict[str, Any]:
    """Return everything by its path: a Recording, an object for JSON, bytes."""
    hparams, params = formula_params()
    encoder, gpt2s = formula_encoder(), get_encoder()
    ids, other = (encoder.encode(text, allowed_special="all") for text in (TEXT, OTHER))
    about = {"text": TEXT, "token_bytes": [encoder.decode_bytes([i]).hex() for i in ids]}
    exact = tree_map(lambda w: w.astype(np.float64), params)
    vectors = {
        "version": VERSION,
        "model": {"hparams": hparams, "weights": {kind: list(values) for kind, values in WEIGHTS.items()}},
        "tokenizer": [tokenized(gpt2s, text) for text in TEXTS],
        "special": [tokenized(gpt2s, text, special=True) for text in TEXTS if END_OF_TEXT in text],
        "decode": [decoded(gpt2s, ids) for ids in DECODED],
        "sampler": [sampled(*setting) for setting in SETTINGS],
        "cache": [
            cached(exact, ids, cuts) for cuts in ([1] * len(ids), [4, 1, 1, 1], [2, 3, 1, 4, 1], [13, 1])
        ],
        "another_text": {"text": OTHER, **cached(exact, other, [4, 1, 2], every_logit=True)},
        "greedy": [greedy(exact, ids[:n]) for n in (1, 5, len(ids))],
        "loss": [loss(exact, ids), loss(exact, other), loss(exact, greedy(exact, ids[:5])["ids"])],
    }
    return {
        "trace": record(ids, params, hparams["n_head"], name="reference/model", about=about),
        "vectors.json": vectors,
        "tokens.bin": tokens(gpt2s),
        "unicode_classes.txt": unicode_classes().encode(),
        **model_files(),
    }


def tokenized(encoder: Encoder, text: str, special: bool = False) -> dict[str, Any]:
    """From bytes (hex) to pieces, merge by merge, to ids. A special token is a piece of its own."""
    parts = text.partition(END_OF_TEXT) if special else (text,)
    pieces: list[dict[str, Any]] = []
    for part in parts:
        if special and part == END_OF_TEXT:
            pieces.append({"bytes": part.encode().hex(), "merges": [], "ids": [encoder.end_of_text]})
            continue
        for piece in encoder.explain(part):
            raw = piece.text.encode()
            merges = [merged(raw, *merge) for merge in piece.merges]
            pieces.append({"bytes": raw.hex(), "merges": merges, "ids": piece.ids})
    ids = [i for piece in pieces for i in piece["ids"]]
    return {"text": text, "bytes": text.encode().hex(), "ids": ids, "pieces": pieces}


def merged(raw: bytes, rank: int, start: int, left: str, right: str) -> list[Any]:
    """One merge: its rank, the byte of the piece where it begins, and the two parts in hex."""
    middle = start + len(left)
    return [rank, start, raw[start:middle].hex(), raw[middle : middle + len(right)].hex()]


def decoded(encoder: Encoder, ids: list[int]) -> dict[str, Any]:
    """The bytes, their text, and the text that becomes whole with each id, and at the end."""
    stream = encoder.stream_decoder()
    parts = [stream.feed(i) for i in ids] + [stream.flush()]
    return {"ids": ids, "bytes": encoder.decode_bytes(ids).hex(), "text": encoder.decode(ids), "stream": parts}


def sampled(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[str, Any]:
    """Which ids are left by either rule for top_p, their probabilities (which add up to 1), and ids drawn."""
    asked = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    for rule, crossing in (("hugging_face", True), ("openai", False)):
        p = np.zeros(len(logits))
        if temperature == 0:
            p[int(np.argmax(logits))] = 1
        elif crossing or top_p == 1:
            p = probabilities(logits, temperature, top_k or None, top_p)
        else:
            p = without_the_crossing(probabilities(logits, temperature, top_k or None), top_p)
        p /= p.sum()
        draws = [[u, draw(p, u)] for u in UNIFORMS if clear_of_borders(p, u)]
        asked[rule] = {"kept": np.flatnonzero(p).tolist(), "p": p[p > 0].tolist(), "draws": draws}
    return asked


def without_the_crossing(p, top_p: float):  # [n_vocab] -> [n_vocab]
    """OpenAI's rule (openai/gpt-2, src/sample.py, top_p_logits): the bar is the last probability, in falling
    order, up to which the sum is at most top_p, or else the largest; what equals the bar stays."""
    falling = np.sort(p)[::-1]
    within = int((np.cumsum(falling) <= top_p).sum())
    return np.where(p < falling[max(within - 1, 0)], 0.0, p)


def clear_of_borders(p, u: float) -> bool:
    """Whether float32 draws the same id: a vector must not depend on the last bit. 0 is no such border."""
    return u == 0 or bool(np.abs(np.cumsum(p) / p.sum() - u).min() > 1e-4)


def cached(params, ids: list[int], cuts: list[int], every_logit: bool = False) -> dict[str, Any]:
    """Read ids in chunks, the cache empty before the first; the logits after each chunk's last id."""
    edges = np.cumsum([0, *cuts]).tolist()
    chunks = [ids[start:stop] for start, stop in pairwise(edges)]
    decoder = Decoder(params, HPARAMS["n_head"], edges[-1])
    rows = [decoder(chunk) for chunk in chunks]
    shown = [row.tolist() if every_logit else row[:4].tolist() for row in rows]
    says = {
        "chunks": chunks,
        "rows": [stop - 1 for stop in edges[1:]],
        "argmax": [int(row.argmax()) for row in rows],
    }
    return says | {"logits" if every_logit else "first_logits": shown}


def greedy(params, prompt: list[int]) -> dict[str, Any]:
    """Greedy text to the end of the context, and how far ahead the likeliest id is where it is least."""
    n_head = HPARAMS["n_head"]
    new = generate(prompt, params, n_head, HPARAMS["n_ctx"] - len(prompt))
    two = np.sort(gpt2([*prompt, *new][:-1], **params, n_head=n_head)[len(prompt) - 1 :], axis=-1)[:, -2:]
    return {"prompt": prompt, "ids": [*prompt, *new], "smallest_margin": float((two[:, 1] - two[:, 0]).min())}


def loss(params, ids: list[int]) -> dict[str, Any]:
    """Cross-entropy of each id but the first, given those before it, in nats, and their mean."""
    p = softmax(gpt2(ids[:-1], **params, n_head=HPARAMS["n_head"]))
    nats = -np.log(p[np.arange(len(ids) - 1), ids[1:]])
    return {"ids": ids, "nats": nats.tolist(), "mean": float(nats.mean())}


def tokens(encoder: Encoder) -> bytes:
    """Each token in order of id: one byte with its length, then its bytes."""
    words = [encoder.decode_bytes([i]) for i in range(encoder.n_vocab)]
    return b"".join(bytes([len(word)]) + word for word in words)


def unicode_classes() -> str:
    """The letters (L), numbers (N) and blanks (s) of PATTERN as ranges, in lines that C can include."""
    lines = [
        r"// \p{L}, \p{N} and \s of GPT-2's splitting pattern: class, first and last code point, inclusive.",
        "// In C: static const struct { char name; int first, last; } CLASSES[] = {",
        '// #include "unicode_classes.txt"',
        "// };",
    ]
    characters = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    for letter, pattern in (("L", r"\p{L}+"), ("N", r"\p{N}+"), ("s", r"\s+")):
        for found in regex.finditer(pattern, characters):
            lines.append(f"{{'{letter}', 0x{ord(found[0][0]):05x}, 0x{ord(found[0][-1]):05x}}},")
    return "\n".join(lines) + "\n"


def model_files() -> dict[str, bytes]:
    """The formula model as files."""
    with TemporaryDirectory() as directory:
        write_model(directory)
        return {f"model/{path.name}": path.read_bytes() for path in sorted(Path(directory).iterdir())}
