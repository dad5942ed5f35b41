"""Bad input for everything that is read, and who else reads it: for fuzz.py and test_bad_input.py.

Each target makes inputs that are nearly right: a JSON value of a wrong type, a number too large, tensors that
overlap, a protocol buffer changed under a CRC that is made right again. Each input must be refused in one
printable line (a PicogptError), or be read just as somebody else's program reads it: TensorFlow, safetensors,
tokenizers, transformers, json.
"""

import atexit
import copy
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from models import random_params, transformers_names, tree_map
from picogpt import PicogptError, leveldb_table
from picogpt.__main__ import main as picogpt
from picogpt.checkpoint import load_encoder_hparams_and_params, load_hparams_and_params, save_checkpoint
from picogpt.encoder import SYMBOL_OF_BYTE, Encoder, get_encoder
from picogpt.hugging_face import read_safetensors_header
from picogpt.tensor_bundle import read_bundle, read_tensors

LONGEST_MESSAGE = 1000  # characters
HUGE = 0.0  # how often a file is as large as may be read at all; fuzz.py changes it
HPARAMS = {"n_vocab": 257, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
NUMBERS = [0, 1, 2, 3, 7, 14, 19, 127, 128, 513, *(1 << n for n in (24, 31, 32, 53, 60, 63, 64)), (1 << 63) - 1]
RAW = ["1e400", "-0", "1E5", "01", "9" * 5000, "0." + "3" * 99, "NaN", "-Infinity", "1.0e", "'a'", "nul", ""]
RAW += [open_ * n + close * n for open_, close in ("[]", ('{"":', "}")) for n in (10, 900, 985, 10**5)]
TEXTS = [
    "", " ", "model/a", "F32", "wte.weight", "he", "\ud800", "a\nb", "\x1b[2J", "../x", "a\0b", "é😀\u2028",
    "y" * 5000,
]  # fmt: skip
JUNK = [None, True, False, -1, 1.0, 4.0, 1e-5, float("nan"), 10**400, [], {}, [[]], {"": 0}, *NUMBERS, *TEXTS]
JUNK += [f"@raw@{n}@" for n in range(len(RAW))] * 2


class Finding(Exception):
    """What must not happen."""


class Target(NamedTuple):
    """`write` makes a case in an empty directory, `read` lets picogpt read it, `oracle` another program."""

    write: Callable[[Random, Path], Any]
    read: Callable[[Path], Any]
    oracle: Callable[[Path], Any]


def judge(target: Target, directory: Path) -> str:
    """Return refused, equal, or alone (accepted where the oracle refuses); raise Finding."""
    try:
        ours = target.read(directory)
    except PicogptError as error:
        said = str(error).replace(str(directory), "")
        if not said.isprintable() or len(said) > LONGEST_MESSAGE:
            raise Finding(f"no line to read, of {len(said)} characters: {said[:150]!a}") from error
        return "refused"
    try:
        theirs = target.oracle(directory)
    except ImportError:
        raise
    except Exception:  # each library has its own
        return "alone"
    if ours != theirs:
        raise Finding(f"read {ours!r:.300} where the oracle reads {theirs!r:.300}")
    return "equal"


# Mutations


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x20, 0x0A))
            case 2:
                data[at:at] = data[at:end]
            case 3:
                del data[at : at + rng.choice((1, 2, 8, end - at))]
            case 4:
                data[at:at] = rng.choice(
                    (b"\xff" * 9, b"\0" * 4, b'"', b"{", b"\xc3(", b"\r\n", b"\xef\xbb\xbf")
                )
            case 5 if rng.random() < 0.2:
                del data[at:]
    return bytes(data)


def mutate_json(rng: Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        containers = [value] if value and isinstance(value, dict | list) else []
        for container in containers:
            children = container.values() if isinstance(container, dict) else container
            containers += [child for child in children if child and isinstance(child, dict | list)]
        if not containers:
            break
        container, other = rng.choice(containers), rng.choice(containers)
        key = rng.choice([*container] if isinstance(container, dict) else range(len(container)))
        new = rng.choice([*other.values()] if isinstance(other, dict) else other)
        match rng.randrange(6):
            case 0 | 1:
                container[key] = copy.deepcopy(rng.choice(JUNK))
            case 2:
                container[key] = copy.deepcopy(new)
            case 3 if type(container[key]) is int:
                container[key] += rng.choice((-4, -1, 1, 4, 8))
            case 4 if isinstance(container, dict):
                container[rng.choice((f"{key}@twice", f"{key}@twice", rng.choice(TEXTS)))] = copy.deepcopy(
                    rng.choice((new, rng.choice(JUNK)))
                )
            case _:
                del container[key]
    return value


def as_text(value: Any, **options: Any) -> str:
    """JSON in which a marked string is something that is none, and a marked name comes twice."""
    text = json.dumps(value, **options)
    return re.sub(r'"@raw@(\d+)@"', lambda match: RAW[int(match[1])], text).replace('@twice":', '":')


def json_bytes(rng: Random, value: Any) -> bytes:
    """The JSON of a mutant of `value`, in one of the forms that JSON comes in, or nearly."""
    text = as_text(mutate_json(rng, value), ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, None, 1)))
    text = rng.choice([text] * 12 + [text.replace("\n", "\r\n"), f" {text}\n", f"\ufeff{text}", text + "x", ""])
    data = text.encode(rng.choice(["utf-8"] * 20 + ["utf-16", "utf-32-le"]), "surrogatepass")
    if rng.random() < HUGE:  # as much as is read at all
        return b'{"a": [' + b"[]," * ((4 << 20) // 3 - 5) + b"0]}"
    return mutate_bytes(rng, data) if rng.random() < 0.15 else data


# TensorFlow's index: entries become protocol buffers, blocks with a CRC, a table; every layer may be wrong


def varint(number: int) -> bytes:
    return leveldb_table.encode_varint(number % (1 << 64))


def message(rng: Random, fields: list, wrong: float) -> bytes:
    """A protocol buffer of (field, wire type, a number or bytes or a list of fields)."""
    data = b""
    for field, wire, value in fields:
        value = message(rng, value, wrong) if isinstance(value, list) else value
        if rng.random() < wrong:
            wire, value = (
                rng.choice((0, 0, 0, 1, 2, 3, 5)),
                rng.choice((*NUMBERS, b"", b"\x08\x01", b"\x08" + b"\xff" * 9 + b"\1")),
            )
        raw = value if isinstance(value, bytes) else varint(value)
        fixed = int.from_bytes(value, "little") if isinstance(value, bytes) else value
        data += varint(field << 3 | wire) + {
            0: varint(fixed), 2: varint(len(raw)) + raw,
            1: (fixed % (1 << 64)).to_bytes(8, "little"), 5: (fixed % (1 << 32)).to_bytes(4, "little"),
        }.get(wire, b"")  # fmt: skip
    return mutate_bytes(rng, data) if rng.random() < wrong / 4 else data


def block(rng: Random, pairs: list[tuple[bytes, bytes]], wrong: float) -> bytes:
    """A sealed block: whatever is wrong in it, its CRC is (nearly always) right."""
    data, last, restarts = bytearray(), b"", []
    for n, (key, value) in enumerate(pairs):
        shared = len(os.path.commonprefix([last, key])) if n % 4 else 0  # noqa: RUF071 (bytes are meant)
        restarts += [] if n % 4 else [len(data)]
        numbers = [shared, len(key) - shared, len(value)]
        if rng.random() < wrong:
            numbers[rng.randrange(3)] += rng.choice((-1, 1, *NUMBERS))
        data += b"".join(map(varint, numbers)) + key[shared:] + value
        last = key
    data = mutate_bytes(rng, data) if rng.random() < wrong else bytes(data)
    data += struct.pack(
        f"<{len(restarts) + 1}I", *restarts, rng.choice(NUMBERS[:12]) if rng.random() < wrong else len(restarts)
    )
    data += bytes([rng.choice((1, 7)) if rng.random() < wrong / 4 else 0])
    return data + struct.pack("<I", leveldb_table.masked_crc32c(data) ^ (rng.random() < wrong / 4))


def table(rng: Random, pairs: list[tuple[bytes, bytes]], wrong: float) -> bytes:
    data, index = bytearray(), []

    def handle(start: int, size: int) -> bytes:
        numbers = [start, size - 5]
        if rng.random() < wrong / 2:
            numbers[rng.randrange(2)] = rng.choice((*NUMBERS, numbers[0] + 1, numbers[1] - 1))
        return b"".join(map(varint, numbers))

    step = rng.choice((len(pairs), 2, 3)) or 1
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        sealed = block(rng, part, wrong)
        index.append((part[-1][0], handle(len(data), len(sealed))))
        data += sealed
    footer = b""
    for sealed in (block(rng, [], wrong), block(rng, index * (1 + (rng.random() < wrong / 4)), wrong / 2)):
        footer += handle(len(data), len(sealed))
        data += sealed
    return bytes(data) + footer.ljust(40, b"\0")[:40] + bytes.fromhex("57fb808b247547db")


def write_index(rng: Random, directory: Path) -> None:
    wrong, pairs, data = rng.choice((0, 0.02, 0.1)), [], [b"", b""]
    for name, dtype, shape in (
        ("a", 1, (3, 5)),
        ("a/b", 19, (7,)),
        ("model/c", 14, (1, 2, 3)),
        ("n", 1, ()),
        ("o", 1, (0, 4)),
    ):
        shard = rng.randrange(2)
        values = np.arange(float(np.prod(shape)), dtype="<f4").view("<u2")
        raw = (
            values[1::2] if dtype == 14 else values.view("<f4").astype("<f2") if dtype == 19 else values
        ).tobytes()
        numbers = [dtype, shard, len(data[shard]), len(raw), leveldb_table.masked_crc32c(raw)]
        if rng.random() < 3 * wrong:
            numbers[at] = rng.choice(
                (*NUMBERS, numbers[at := rng.randrange(5)] + rng.choice((-4, -1, 1, 4, 8)))
            )
        axes = [
            (2, 2, [(1, 0, n)])
            for n in (rng.choice(((), (*shape, 1), (2, *shape))) if rng.random() < wrong else shape)
        ]
        fields = [
            (1, 0, numbers[0]), (2, 2, axes), (3, 0, numbers[1]), (4, 0, numbers[2]), (5, 0, numbers[3]),
            (6, 5, numbers[4]),
        ]  # fmt: skip
        extra = (
            (7, 2, [(1, 2, b"")]),
            (9, 2, b"x"),
            (2, 2, [(3, 0, 1)]),
            (2, 2, axes and [axes[0]]),
            rng.choice(fields),
        )
        fields += [rng.choice(extra)] if rng.random() < wrong else []
        key = rng.choice(TEXTS).encode("utf-8", "surrogatepass") if rng.random() < wrong else name.encode()
        pairs.append((key[:600], message(rng, fields, wrong / 3)))
        data[shard] += raw
    header = message(rng, [(1, 0, 2), (3, 2, [(1, 0, 1)])], wrong / 3)
    pairs = sorted(pairs) if rng.random() < 0.8 else rng.sample(pairs, len(pairs))
    content = table(rng, [(b"", header), *pairs], wrong)
    if rng.random() < HUGE:  # as many tensors as the size allows
        content = table(rng, [(b"", header), *((f"{n:06x}".encode(), b"") for n in range(400_000))], 0)
    directory.joinpath("x.index").write_bytes(mutate_bytes(rng, content) if rng.random() < 0.1 else content)
    for shard in range(2):
        raw = mutate_bytes(rng, data[shard]) if rng.random() < 0.05 else data[shard]
        directory.joinpath(f"x.data-{shard:05d}-of-00002").write_bytes(raw)


def by_name(tensors: dict) -> dict:
    return {name: (np.shape(array), np.asarray(array, np.float32).tobytes()) for name, array in tensors.items()}


def tensorflow_reads(directory: Path) -> dict:
    from tensorflow.train import load_checkpoint

    reader = load_checkpoint(str(directory / "x"))
    return by_name({name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})


# safetensors, and a model directory in either layout


def write_safetensors(rng: Random, directory: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a.b": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "c": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
        "d": {"dtype": "BF16", "shape": [], "data_offsets": [32, 34]},
        "e": {"dtype": "F32", "shape": [0, 7], "data_offsets": [34, 34]},
    }
    text = json_bytes(rng, header)
    length = rng.choice(NUMBERS) if rng.random() < 0.03 else len(text) + rng.choice([0] * 30 + [-1, 1])
    data = np.arange(17, dtype="<f2").tobytes() + bytes(rng.choice([0] * 30 + [1, 4]))
    content = (length % (1 << 64)).to_bytes(8, "little") + text + data
    directory.joinpath("x").write_bytes(mutate_bytes(rng, content) if rng.random() < 0.1 else content)


def safetensors_reads(path: Path) -> dict:
    from ml_dtypes import bfloat16
    from safetensors import deserialize

    dtypes = {"F32": "<f4", "F16": "<f2", "BF16": bfloat16}
    return by_name({
        name: np.frombuffer(bytes(info["data"]), dtypes[info["dtype"]]).reshape(info["shape"])
        for name, info in deserialize(path.read_bytes())
    })  # fmt: skip


def write_model(rng: Random, directory: Path, wrong: str, prefix: str = "transformer.") -> None:
    """A whole Hugging Face directory, in which the file `wrong` is a mutant: one file of weights, or three."""
    config = {
        "model_type": "gpt2", "vocab_size": 257, "n_positions": 16, "n_embd": 8, "n_head": 2, "n_layer": 2,
    }  # fmt: skip
    config |= {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "tie_word_embeddings": True,
    }
    config |= {name: 2 for name in ("num_attention_heads",) if wrong == "config.json" and rng.random() < 0.1}
    tensors, weight_map = list(weights().items()), {}
    sharded = wrong == "model.safetensors.index.json"
    for n in range(3 if sharded else 1):
        name = f"model-{n}.safetensors" if sharded else "model.safetensors"
        part = dict(tensors[n::3] if sharded else tensors)
        weight_map |= dict.fromkeys(part, name)
        if n:  # a second tensor of the same name, which the index does not mean
            part |= {first: array + 1 for first, array in tensors[:1]}
        save_safetensors(part, directory / name)
    directory.joinpath("config.json").write_text(json.dumps(config))
    value = {"metadata": {"total_size": 1}, "weight_map": weight_map} if sharded else config
    if wrong:
        directory.joinpath(wrong).write_bytes(json_bytes(rng, value))


def save_safetensors(tensors: dict[str, np.ndarray], path: Path) -> None:
    header, end = {}, 0
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [end, end := end + array.nbytes]}
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values())
    )


@cache
def params() -> dict:
    return random_params(**HPARAMS, dtype=np.float32)


@cache
def weights() -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in transformers_names(params()).items()}


def read_model(directory: Path) -> tuple:
    hparams, params = load_hparams_and_params(directory)
    return hparams, by_name(transformers_names(params))


def config_of_transformers(directory: Path) -> tuple:
    from transformers import GPT2Config

    theirs = GPT2Config(**json.loads(directory.joinpath("config.json").read_bytes()))
    if theirs.activation_function not in ("gelu_new", "gelu_pytorch_tanh") or theirs.layer_norm_epsilon != 1e-5:
        raise ValueError("other mathematics")
    if not theirs.scale_attn_weights or theirs.scale_attn_by_inverse_layer_idx or theirs.add_cross_attention:
        raise ValueError("other mathematics")
    if theirs.n_inner not in (None, 4 * theirs.n_embd) or theirs.model_type != "gpt2":
        raise ValueError("other mathematics")
    names = ("vocab_size", "n_positions", "n_embd", "n_head", "n_layer")
    return {ours: getattr(theirs, name) for ours, name in zip(HPARAMS, names, strict=True)}, by_name(weights())


def shards_of_safetensors(directory: Path) -> tuple:
    """Each tensor from the file that the index names, or the only one that has it, as the library reads it."""
    weight_map = json.loads(directory.joinpath("model.safetensors.index.json").read_bytes())["weight_map"]
    found: dict[str, list] = {}
    for file in set(weight_map.values()):
        for name, tensor in safetensors_reads(directory / file).items():
            found.setdefault(name, []).extend([tensor] if weight_map.get(name, file) == file else [])
    return HPARAMS, {name: tensor for name, (tensor,) in found.items()}


def write_openai(rng: Random, directory: Path, wrong: str) -> None:
    """OpenAI's layout, in which hparams.json or `checkpoint` is a mutant; two checkpoints to choose between."""
    shutil.copytree(openai_model(), directory, dirs_exist_ok=True)
    if wrong == "hparams.json":
        directory.joinpath(wrong).write_bytes(json_bytes(rng, HPARAMS | {"dropout": 0.1}))
        return
    path, other = rng.sample(
        ("model.ckpt", "second.ckpt", "/else/where/model.ckpt", "C:\\models\\second.ckpt"), 2
    )
    path = rng.choice([path] * 9 + [rng.choice(TEXTS)[:300], ".", "..", "model.ckpt.index", "a b"])
    lines = [
        f'model_checkpoint_path: "{path}"',
        f'all_model_checkpoint_paths: "{other}"',
        "# x",
        "",
        "last_preserved_timestamp: 1",
    ]
    lines = [lines[0], *rng.choices(lines, k=rng.randrange(4))]
    rng.shuffle(lines)
    text = rng.choice(("\n", "\n", "\n", "\r\n", " ")).join(lines) + rng.choice(("\n", ""))
    text = text.replace('"', "'") if rng.random() < 0.05 else text
    content = text.encode("utf-8", "surrogatepass")
    directory.joinpath(wrong).write_bytes(mutate_bytes(rng, content) if rng.random() < 0.3 else content)


@cache
def openai_model() -> Path:
    """Two checkpoints in one directory: model.ckpt, and second.ckpt with every weight larger by 1."""
    directory = temporary_directory()
    save_checkpoint(directory, HPARAMS, tree_map(lambda array: array + 1, params()))
    for path in directory.glob("model.ckpt.*"):
        path.rename(path.with_name(path.name.replace("model", "second")))
    save_checkpoint(directory, HPARAMS, params())
    return directory


def temporary_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="picogpt-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def hparams_of_json(directory: Path) -> tuple:
    said = json.loads(directory.joinpath("hparams.json").read_bytes())
    return {name: said[name] for name in HPARAMS}, by_name(weights())


def checkpoint_of_tensorflow(directory: Path) -> tuple:
    from tensorflow.train import get_checkpoint_state

    path = get_checkpoint_state(str(directory)).model_checkpoint_path
    more = {"model.ckpt": 0, "second.ckpt": 1}[re.split(r"[/\\]", path)[-1]]
    return HPARAMS, by_name({name: array + np.float32(more) for name, array in weights().items()})


# Vocabularies

TOKENS = {symbol: i for i, symbol in enumerate(sorted(SYMBOL_OF_BYTE.values()))}
MERGES = ["h e", "he l", "l o", "hel lo", "Ġ t", "Ġt he", "i n", "in g", "Ċ Ċ", "1 2", "a b"]
TOKENS |= {merge.replace(" ", ""): 256 + n for n, merge in enumerate(MERGES)}
END = {"<|endoftext|>": len(TOKENS)}
PROBES = [
    "",
    "hello the thing, lo!",
    " the\n\n 12 hel  héllo",
    "naïve 😀 don't\tinghe",
    "".join(map(chr, range(300))),
]
PROBES += ["he<|endoftext|> lo <pad>hello zebras 1 <|endoftext|>"]


def write_vocabulary(rng: Random, directory: Path) -> None:
    vocabulary, merges = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))[
        added := rng.randrange(2)
    ]
    lines = rng.choice((["#version: 0.2"], [])) + MERGES
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(lines))
        new = rng.choice(
            (lines[at], rng.choice(lines), "a  b", "a b ", "a", "", "a b c", "\u2028 b", "h el", *TEXTS)
        )
        lines[at : at + rng.randrange(2)] = [new] * rng.randrange(2)
    if rng.random() < 0.1:
        rng.shuffle(lines)
    text = rng.choice(("\n", "\n", "\n", "\r\n")).join(lines) + rng.choice(("\n", "\n", ""))
    content = text.encode("utf-8", "surrogatepass")
    directory.joinpath(merges).write_bytes(mutate_bytes(rng, content) if rng.random() < 0.2 else content)
    right = TOKENS | END if rng.random() < 0.8 else TOKENS
    content = json_bytes(rng, right) if rng.random() < 0.5 else json.dumps(right).encode()
    directory.joinpath(vocabulary).write_bytes(content)
    if added and rng.random() < 0.7:
        words = {"<pad>": len(right), "zebra": len(right) + 1, "<|im end|>": len(right) + 2}
        directory.joinpath("added_tokens.json").write_bytes(json_bytes(rng, words))


def write_tokenizer_json(rng: Random, directory: Path) -> None:
    token = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    merges = list(MERGES) if rng.random() < 0.5 else [merge.split(" ") for merge in MERGES]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [token | {"id": i, "content": s} for i, s in enumerate([*END, "<pad>"], len(TOKENS))],
        "pre_tokenizer": level | {"add_prefix_space": False}, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": TOKENS | END, "merges": merges},
    }  # fmt: skip
    model = content["model"]
    if rng.random() < 0.5:  # most of what the file holds is the vocabulary: leave that alone
        content["model"] = model | {"vocab": {}, "merges": []}
        content = mutate_json(rng, content)
        if isinstance(content, dict) and isinstance(content.get("model"), dict):
            content["model"] |= {name: model[name] for name in ("vocab", "merges") if name in content["model"]}
        data = as_text(content).encode()
    else:
        rng.random() < 0.3 and rng.shuffle(merges)
        data = json_bytes(rng, content)
    directory.joinpath("tokenizer.json").write_bytes(data)


def read_vocabulary(directory: Path) -> tuple:
    encoder, allowed = get_encoder(directory), ()
    if (path := directory / "tokenizer.json").exists():
        words = allowed = [
            token["content"] for token in json.loads(path.read_bytes()).get("added_tokens") or ()
        ]
    else:
        words = json.loads(added.read_bytes()) if (added := directory / "added_tokens.json").exists() else ()
    if [encoder.decode(encoder.encode(text)) for text in PROBES] != PROBES:
        raise Finding("a text is not its ids' text")
    return {word: encoder.special_tokens[word] for word in words}, [
        encoder.encode(text, allowed) for text in PROBES
    ]


def vocabulary_of_tokenizers(directory: Path) -> tuple:
    from tokenizers import Tokenizer, models, pre_tokenizers

    if (path := directory / "tokenizer.json").exists():
        theirs = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        theirs.no_truncation(), theirs.no_padding()
        words = {token.content: i for i, token in theirs.get_added_tokens_decoder().items()}
    else:
        names = (
            ("encoder.json", "vocab.bpe")
            if (directory / "vocab.bpe").exists()
            else ("vocab.json", "merges.txt")
        )
        theirs = Tokenizer(models.BPE.from_file(*(str(directory / name) for name in names)))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        added = directory / "added_tokens.json"
        words = json.loads(added.read_bytes()) if added.exists() else {}
    return words, [theirs.encode(text, add_special_tokens=False).ids for text in PROBES]


# Directories in which files are something else, with a program in every pickle


class Payload:
    """What a pickle of this does when it is loaded: make the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


def pickles(marker: Path) -> list[bytes]:
    """A program as a pickle, old and new, as torch.save's zip, as NumPy's arrays of objects."""
    raw = [pickle.dumps(Payload(marker), protocol) for protocol in (0, 2, 4)]
    torch, npz, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(torch, "w") as file:
        file.writestr("archive/data.pkl", raw[1])
    array = np.empty(1, object)
    array[0] = Payload(marker)
    np.save(npy, array, allow_pickle=True)
    np.savez(npz, array=array)
    return [*raw, *(buffer.getvalue() for buffer in (torch, npz, npy))]


NAMES = "pytorch_model.bin pytorch_model-00001-of-00002.bin model.pkl model.pt model.pth model.npy weights.npz "
NAMES += "training_args.bin optimizer.pt encoder.pkl checkpoint hparams.json model.ckpt.index model.ckpt.meta "
NAMES += "model.ckpt.data-00000-of-00001 encoder.json vocab.bpe config.json model.safetensors tokenizer.json"
NAMES += " vocab.json model.safetensors.index.json merges.txt added_tokens.json tokenizer_config.json model.py"


def write_directory(rng: Random, directory: Path) -> None:
    shutil.copytree(successor_model(), directory, dirs_exist_ok=True)
    if rng.random() < 0.4:
        for name in ("hparams.json", "checkpoint", "encoder.json", "vocab.bpe"):
            (directory / name).unlink()
        write_model(rng, directory, "")
    for name in rng.sample(NAMES.split(), rng.choice((1, 2, 3, 8))):
        path = directory / name
        path.unlink(missing_ok=True)
        match rng.randrange(3 * (os.name == "nt"), 12):  # Windows has no such links, pipes and holes
            case 0:
                path.mkdir()
            case 1:
                path.symlink_to(rng.choice(("nowhere", name, "/dev/zero", "/dev/null", "..", "/proc/self/mem")))
            case 2:
                os.mkfifo(path)
            case 3:
                with path.open("wb") as file:
                    file.truncate(1 << 40)  # a hole: it takes no room
            case 4:
                path.write_bytes(
                    rng.choice((b"", b"<!DOCTYPE html>\n", b"version https://git-lfs.github.com/spec/v1\n"))
                )
            case 5:
                pass  # missing
            case _:
                path.write_bytes(rng.choice(pickles(directory / "PWNED")))


def read_directory(directory: Path) -> tuple:
    try:
        encoder, hparams, _ = load_encoder_hparams_and_params(str(directory), verify=True)
        return hparams["n_vocab"], encoder.encode("hello")
    finally:
        if (directory / "PWNED").exists():
            raise Finding("a pickle was loaded")


# The command line


@cache
def successor_model() -> Path:
    """A model that knows one thing: after a byte comes the next, and after byte 255 <|endoftext|>."""
    directory, hparams = temporary_directory(), HPARAMS | {"n_embd": 64, "n_layer": 1, "n_ctx": 64}
    Encoder({symbol: byte for byte, symbol in SYMBOL_OF_BYTE.items()} | {"<|endoftext|>": 256}, []).save(
        directory
    )
    weights = tree_map(np.zeros_like, random_params(**hparams, dtype=np.float32, lm_head=True))
    weights["ln_f"]["g"] += 1  # blocks of zeros add nothing: a token's vector passes through to the head
    weights["wte"][:] = np.random.default_rng(0).normal(size=(257, 64))
    weights["lm_head"][:] = np.roll(weights["wte"], 1, axis=0)
    save_checkpoint(directory, hparams, weights)
    return directory


PROMPTS = [
    "a", "1e3", "None", "[1, 2]", "-x", "---", "--help me", "{'a': 1}", "'", '"""', "é😀", "a\nb", "\t",
    "x" * 50, "#",
]  # fmt: skip
VALUES = [
    "", "0", "1", "-1", "2.5", "1e400", "nan", "None", "True", "[1]", "(1,", "-" * 9000 + "1", "(" * 300,
    "[" * 9000, "0x" + "f" * 9000,
]  # fmt: skip
VALUES += [
    "9" * 5000, "1" + "0" * 400, "1_0", "0o17", "1j", "'a'", "é", "\x1b[2J", "\udcff", "a\nb", "--seed",
    "{}", "{1: 2}", "b''", "1;2", "\\", "x" * 9000,
]  # fmt: skip
FLAGS = [
    "n_tokens_to_generate", "model_size", "models_dir", "temperature", "top_k", "top_p", "seed", "stop",
    "num_samples",
]  # fmt: skip
FLAGS += ["context", "show", "backend", "threads", "prompt", "help", "h", "tokens", "x-y", "é"]


def write_command(rng: Random, directory: Path) -> None:
    """Arguments, and what stands on standard input; half of the time nothing is wrong and the text known."""
    prompt, n = rng.choice(PROMPTS), rng.choice((0, 1, 5))
    argv = [f"--n_tokens_to_generate={n}", *rng.choice(([f"--prompt={prompt}"], ["-"], ["--", prompt]))]
    expected = None
    if rng.random() < 0.5:
        last = prompt.encode()[-1]
        expected = bytes(range(last + 1, min(last + 1 + n, 256))).decode("utf-8", "replace") + "\n"
    elif rng.random() < 0.5:
        del argv[0]  # so that another --n_tokens_to_generate is not one too many
    model = bool(expected) or rng.random() < 0.7
    for _ in range(0 if expected else rng.choice((1, 1, 2, 3))):
        flag, value = rng.choice(FLAGS), rng.choice(VALUES)
        if flag in ("num_samples", "n_tokens_to_generate") and value[:2] in ("0x", "10"):
            continue  # so many samples, or tokens, would be no fault
        new = rng.choice(([f"--{flag}={value}"], [f"--{flag}", value], [f"--{flag}"], [value], ["--"], ["-"]))
        at = rng.randrange(len(argv) + 1)
        argv[at:at] = new
    stdin = (
        prompt.encode()
        if expected
        else rng.choice((prompt.encode(), b"", b"\xff", b"\0", b"\xef\xbb\xbfa\r\n"))
    )
    process = rng.random() < 0.01
    if process:
        argv = [word.replace("\0", "") for word in argv]
    case = {
        "argv": argv,
        "stdin": stdin.decode("latin-1"),
        "expected": expected,
        "process": process,
        "model": model,
    }
    directory.joinpath("case.json").write_text(json.dumps(case))


def run_command(directory: Path) -> str:
    case = json.loads(directory.joinpath("case.json").read_text())
    argv = ["--model_size", str(successor_model()), *case["argv"]] if case["model"] else case["argv"]
    stdin = case["stdin"].encode("latin-1")
    if case["process"]:
        command = [os.fsencode(word) for word in (sys.executable, "-m", "picogpt", *argv)]
        done = subprocess.run(command, input=stdin, capture_output=True, cwd=Path(__file__).parents[1])
        status, out, err = done.returncode, done.stdout.decode(), done.stderr.decode()
    else:
        streams = sys.stdin, sys.stdout, sys.stderr
        sys.stdin, *outputs = (
            io.TextIOWrapper(io.BytesIO(data), "utf-8", "backslashreplace") for data in (stdin, b"", b"")
        )
        sys.stdout, sys.stderr = outputs
        try:
            status = picogpt(argv)
        finally:
            sys.stdin, sys.stdout, sys.stderr = streams
        for stream in outputs:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode() for stream in outputs)
    lines = err.splitlines()
    if status not in (0, 2) or not all(re.match(r"picogpt: |$", line) for line in lines) or len(lines) > 2:
        raise Finding(f"status {status}, {err[-300:]!a}")
    if status == 2:
        raise PicogptError(lines[-1][:LONGEST_MESSAGE])  # what was typed may be longer
    return out


def known_text(directory: Path) -> str:
    expected = json.loads(directory.joinpath("case.json").read_text())["expected"]
    if expected is None:
        raise LookupError("nobody else knows")
    return expected


TARGETS = {
    "index": Target(write_index, lambda path: by_name(read_bundle(path / "x", verify=True)), tensorflow_reads),
    "safetensors": Target(
        write_safetensors,
        lambda path: by_name(read_tensors(read_safetensors_header(path / "x"))),
        lambda path: safetensors_reads(path / "x"),
    ),
    "config.json": Target(partial(write_model, wrong="config.json"), read_model, config_of_transformers),
    "model.safetensors.index.json": Target(
        partial(write_model, wrong="model.safetensors.index.json"), read_model, shards_of_safetensors
    ),
    "hparams.json": Target(partial(write_openai, wrong="hparams.json"), read_model, hparams_of_json),
    "checkpoint": Target(partial(write_openai, wrong="checkpoint"), read_model, checkpoint_of_tensorflow),
    "vocabulary": Target(write_vocabulary, read_vocabulary, vocabulary_of_tokenizers),
    "tokenizer.json": Target(write_tokenizer_json, read_vocabulary, vocabulary_of_tokenizers),
    "directory": Target(write_directory, read_directory, lambda path: (257, [*b"hello"])),
    "command line": Target(write_command, run_command, known_text),
}
