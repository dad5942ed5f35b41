"""A GPT-2 in plain Python that speaks the protocol of docs/conform.md: `python port.py MODEL_DIR [FAULT]`.

It shares nothing with picogpt: it reads Hugging Face's files itself, one token at a time, in Python's floats.
With FAULT it makes one mistake, or several with + between them; `fault("name")` marks each place.
"""

import json
import math
import struct
import sys
import time
import unicodedata
from itertools import pairwise
from operator import add, mul
from pathlib import Path

directory, planted = Path(sys.argv[1]), [*sys.argv, ""][2].split("+")
EPS = 1e-5
FLOATS = ("logits", "all_logits", "start", "step")


def fault(name):
    return name in planted


def read_weights():
    data = (directory / "model.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    weights = {}
    for name, entry in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            flat = struct.unpack(f"<{(stop - start) // 4}f", data[8 + n + start : 8 + n + stop])
            *matrix, width = entry["shape"]
            if not matrix:
                weights[name] = flat
            elif name.startswith("w"):
                weights[name] = [flat[i : i + width] for i in range(0, len(flat), width)]
            else:  # stored [in, out]: by column, each output is one dot product
                weights[name] = [flat[i::width] for i in range(width)]
    return weights


def dot(a, b):
    return sum(map(mul, a, b))


def plus(a, b):
    return [*map(add, a, b)]


# The tokenizer.


def symbols_of_bytes():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def kind(c):
    if c.isspace() and c not in "\x1c\x1d\x1e\x1f":
        return "blank"
    category = unicodedata.category(c)[0]
    if fault("ascii_letters") and ord(c) > 127:
        return "other"
    return {"L": "letter", "N": "number"}.get(category, "other")


def pieces(text):
    i = 0
    while i < len(text):
        lower = text.lower() if fault("capital_contractions") else text
        found = [s for s in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if lower.startswith(s, i)]
        start = j = i + (text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "blank")
        while j < len(text) and kind(text[j]) == kind(text[start]):
            j += 1
        # A run of blanks leaves its last one to what follows.
        if kind(text[start]) == "blank" and j < len(text) and j > i + 1 and not fault("greedy_blanks"):
            j -= 1
        j = i + len(found[0]) if found else j
        yield text[i:j]
        i = j


def encode(text):
    if fault("special_tokens") and text == "<|endoftext|>":
        return [vocabulary[text]]
    ids = []
    for piece in pieces(text):
        word = [symbols[b] for b in piece.encode()]
        while pairs := [(ranks[p], i) for i, p in enumerate(pairwise(word)) if p in ranks]:
            _, i = min(pairs, key=lambda pair: pair[1]) if fault("leftmost_merge") else min(pairs)
            word[i : i + 2] = [word[i] + word[i + 1]]
        ids += [vocabulary[symbol] for symbol in word]
    return ids


def decode(ids):
    text = "".join(tokens[i] for i in ids)
    return [*text.encode()] if fault("decode_symbols") else [byte_of[c] for c in text]


# The network, one token at a time: the keys and values so far are in `cache`, a pair of lists a layer.


def linear(x, name):
    return plus([dot(x, w) for w in weights[f"{name}.weight"]], weights[f"{name}.bias"])


def layer_norm(x, name):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / (len(x) - fault("variance_n_minus_1"))
    scale = math.sqrt(variance + (1e-6 if fault("eps_1e-6") else EPS))
    x = map(mul, [(v - mean) / scale for v in x], weights[f"{name}.weight"])
    return plus(x, weights[f"{name}.bias"])


def gelu(x, layer):
    if fault("erf_gelu") or fault(f"erf_gelu_{layer}"):
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    largest = max(x)
    e = [math.exp(v - largest) for v in x]
    total = sum(e)
    return [v / total for v in e]


def attention(qkv, keys, values):
    n, d = len(qkv) // 3, len(qkv) // 3 // n_head
    keys.append(qkv[n : 2 * n])
    values.append(qkv[2 * n :])
    z = []
    for h in range(n_head):
        part = slice(h * d, (h + 1) * d)
        seen = len(keys) - (fault("mask_off_by_one") and len(keys) > 1)
        scale = 1 if fault("no_scale") else math.sqrt(d)
        scores = [dot(qkv[part], key[part]) / scale for key in keys[:seen]]
        pattern = softmax(scores)
        z += [dot(pattern, [value[i] for value in values]) for i in range(n)[part]]
    return z


def step(token, cache, position=None):
    position = len(cache[0][0]) + fault("positions_from_1") if position is None else position
    x = plus(weights["wte.weight"][token], weights["wpe.weight"][position % n_ctx])
    for i, (keys, values) in enumerate(cache):
        z = attention(linear(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), keys, values)
        x = plus(x, linear(z, f"h.{i}.attn.c_proj"))
        a = linear(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        n = fault("gelu_starts_at_1")
        a = a[:n] + [gelu(v, i) for v in a[n:]]
        x = plus(x, linear(a, f"h.{i}.mlp.c_proj"))
    if fault("late") and position > 20:
        x[0] += 1
    x = layer_norm(x, "ln_f")
    logits = [dot(x, row) for row in weights["wte.weight"]]
    if fault("log_probabilities"):
        logits = [math.log(p) for p in softmax(logits)]
    return logits[:256] if fault("another_model") else logits


def new_cache():
    return [([], []) for _ in range(n_layer)]


def run(ids):
    cache = new_cache()
    return [step(i, cache) for i in ids]


def argmax(x):
    return len(x) - 1 - x[::-1].index(max(x)) if fault("last_of_ties") else x.index(max(x))


def greedy(n, ids):
    cache, found = new_cache(), []
    rows = [step(i, cache) for i in ids]
    logits = rows[-2] if fault("row_before_last") and len(rows) > 1 else rows[-1]
    for _ in range(n):
        found.append(argmax(logits))
        if len(found) < n:
            logits = step(found[-2] if fault("fed_late") and len(found) > 1 else found[-1], cache)
    return found


def sample(temperature, top_k, top_p, u, logits):
    if temperature == 0:
        return argmax(logits)
    temperature = 1 / temperature if fault("temperature_upside_down") else temperature
    x = [(v - max(logits)) / temperature for v in logits]
    if 0 < top_k < len(x):
        bar = sorted(x)[-int(top_k)]
        x = [v if v >= bar else -math.inf for v in x]
        if fault("top_k_cuts_ties"):
            kept = sorted(range(len(x)), key=lambda i: -x[i])[: int(top_k)]
            x = [v if i in kept else -math.inf for i, v in enumerate(x)]
    p = softmax(x)
    order, before = sorted(range(len(p)), key=lambda i: -p[i]), 0
    for n, i in enumerate(order if top_p < 1 else ()):
        share = p[i]
        if n and (before + share * fault("top_p_of_openai") >= top_p):
            p[i] = 0
        before += share
    total = 1 if fault("not_normalized") else sum(p)
    running = 0
    for i in order if fault("by_probability") else range(len(p)):
        running += p[i]
        if running > u * total or (fault("border") and running >= u * total):
            return i
    return len(p) - 1


# The protocol.


def answer(word, x):
    global cache
    ids = [int(v) for v in x]
    if fault(f"dies_at_{word}"):
        sys.exit("port.py: out of luck")
    if word == "encode":
        return encode(bytes(ids).decode())
    if word == "decode":
        return decode(ids)
    if word == "logits":
        return run(ids)[-1]
    if word == "all_logits":
        rows = run(ids)
        rows = rows[1:] + rows[:1] if fault("rows_shifted") else rows
        return [v for row in rows for v in row]
    if word == "start":
        cache = cache if fault("cache_kept") else new_cache()
        return [step(i, cache) for i in ids][-1]
    if word == "step":
        n = len(cache[0][0])
        return step(ids[0], cache, 0 if fault("cache_position_0") else n - fault("position_late"))
    if word == "greedy":
        return greedy(ids[0], ids[1:])
    if word == "sample":
        return [sample(*x[:4], x[4:])]
    return None


def misbehave(line, n_asked):
    """The third answer of a program that does not keep to the protocol."""
    if n_asked != 3:
        return line
    if fault("dies"):
        sys.exit("port.py: out of luck")
    if fault("hangs"):
        time.sleep(1000)
    wrong = {
        "not_utf8": b"\xff\xfe\n",
        "chatter": b"loading the model, please wait\n" + line,
        "floats_for_ids": b"1.5 2.5\n",
        "extra_line": line + b"\n",
        "no_end": b"1 2 3",
        "unknown_late": b"?\n",
        "nothing": b"\n",
        "nan": b"-nan " + line.partition(b" ")[2],
        "one_less": line.partition(b" ")[2],
        "one_more": b"0 " + line,
    }
    return b"1 " * (1 << 25) if fault("endless") else wrong.get(planted[0], line)


config = json.loads((directory / "config.json").read_text())
n_ctx, n_head, n_layer = config["n_positions"], config["n_head"], config["n_layer"]
weights = read_weights()
symbols = symbols_of_bytes()
byte_of = {c: b for b, c in symbols.items()}
vocabulary = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
tokens = {i: token for token, i in vocabulary.items()}
merges = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}
cache = new_cache()
unknown = [word for name in planted for word in name.partition(":")[2].split(",")]  # unknown:encode,sample
form = "%.4g" if fault("four_digits") else "%.4f" if fault("four_decimals") else "%.9g"

if __name__ == "__main__":
    for n_asked, line in enumerate(sys.stdin, 1):
        word, n, *numbers = line.split()
        if int(n) != len(numbers):
            sys.exit(f"{n} numbers promised, {len(numbers)} came")
        found = None if word in unknown or fault("unknown") else answer(word, [float(v) for v in numbers])
        text = "?" if found is None else " ".join((form if word in FLOATS else "%d") % v for v in found)
        sys.stdout.buffer.write(misbehave(text.encode() + b"\n", n_asked))
        if not fault("no_flush"):
            sys.stdout.flush()
