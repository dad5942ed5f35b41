"""Figures of the chapter on files: a tiny index byte by byte, and the map of a model's data file."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from figures.common import BLUE, ORANGE
from matplotlib.figure import Figure

from picogpt.leveldb_table import varint
from picogpt.model_dirs import find_model_dir
from picogpt.tensor_bundle import read_index, write_bundle

INK, FAINT, WHITE = "#1a1a1a", "#555555", "#ffffff"
COLOURS = {  # fill and text, told apart by lightness too
    "lengths of key and value": ("#d9d9d9", INK),
    "key": ("#fbd9bd", INK),
    "header": ("#8c6d9e", WHITE),
    "type and shape": ("#bcd9f2", INK),
    "where the tensor lies": (BLUE, WHITE),
    "checksum": ("#ffe98a", INK),
    "where a block lies": (ORANGE, WHITE),
    "restart points, compression": ("#f2f2f2", INK),
    "zeros, magic number": (WHITE, INK),
}

_mono = {"family": "monospace", "fontsize": 11, "ha": "center", "va": "center"}
_edge = {"edgecolor": "#777777", "lw": 0.6}


def index_bytes():
    """The index of the chapter's example: 16 bytes a row, coloured by what they are."""
    tensors = {"model/wpe": np.arange(6).reshape(2, 3), "model/wte": np.arange(12).reshape(4, 3) / 2}
    with TemporaryDirectory() as folder:
        prefix = Path(folder, "model.ckpt")
        write_bundle(prefix, {name: tensor.astype(np.float32) for name, tensor in tensors.items()})
        index = Path(f"{prefix}.index").read_bytes()
    n_rows = (len(index) + 15) // 16
    figure = Figure(figsize=(5.6, 5))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1.2, 16.1), ylim=(n_rows + 5.3, -0.9))
    axes.set_axis_off()
    for start, stop, meaning in _fields(index):
        fill, ink = COLOURS[meaning]
        for row in range(start // 16, (stop - 1) // 16 + 1):  # a field may go on in the next row
            first, last = max(start, 16 * row), min(stop, 16 * row + 16)
            axes.broken_barh([(first % 16, last - first)], (row, 0.86), facecolor=fill, **_edge)
            for at in range(first, last):
                axes.text(at % 16 + 0.5, row + 0.45, f"{index[at]:02x}", color=ink, **_mono)
    for column in range(16):
        axes.text(column + 0.5, -0.4, f"{column:x}", color=FAINT, **_mono)
    for row in range(n_rows):
        axes.text(-0.6, row + 0.45, f"{16 * row:02x}", color=FAINT, **_mono)
    for i, (meaning, (fill, _)) in enumerate(COLOURS.items()):
        x, y = 8.6 * (i // 5) - 0.9, n_rows + 0.6 + 0.95 * (i % 5)
        axes.broken_barh([(x, 0.8)], (y, 0.6), facecolor=fill, **_edge)
        axes.text(x + 1.1, y + 0.32, meaning, fontsize=11, va="center")
    return figure


def _fields(index):
    """Where every field begins, where it ends, and what it is."""
    footer = len(index) - 48
    metaindex, at = varint(index, footer)
    metaindex_size, at = varint(index, at)
    top, at = varint(index, at)
    top_size, at = varint(index, at)
    data, middle = varint(index, top + 4)  # behind three lengths and a key of one byte
    data_size, _ = varint(index, middle)
    fields = [(footer, at, "where a block lies"), (at, len(index), "zeros, magic number")]
    for start, size in ((data, data_size), (metaindex, metaindex_size), (top, top_size)):
        fields += _block(index, start, size)
    return fields


def _block(index, start, size):
    """The fields of a block: its entries, their restart points, a checksum."""
    entries_end = start + size - 4 - 4 * int.from_bytes(index[start + size - 4 : start + size], "little")
    fields, at = [], start
    while at < entries_end:
        begin = at
        _, at = varint(index, at)
        unshared, at = varint(index, at)
        length, at = varint(index, at)
        fields += [(begin, at, "lengths of key and value"), (at, at + unshared, "key")]
        at += unshared
        fields += _value(index, at, at + length)
        at += length
    after = start + size + 1
    fields += [(entries_end, after, "restart points, compression"), (after, after + 4, "checksum")]
    return [field for field in fields if field[0] < field[1]]


def _value(index, at, end):
    """The fields of what an entry says: of a block, of the whole file, or of a tensor."""
    if index[at] != 0x08:
        return [(at, end, "where a block lies")]
    if index[at + 2] == 0x1A:
        return [(at, end, "header")]
    shape_end = at + 4 + index[at + 3]
    return [
        (at, shape_end, "type and shape"),
        (shape_end, end - 5, "where the tensor lies"),
        (end - 5, end, "checksum"),
    ]


def data_map():
    """The data file of the embedded model, a bar for each block, in the order of the file."""
    entries = read_index(find_model_dir("shakespeare") / "model.ckpt")
    rows = {}
    for name, entry in entries.items():
        _, part, *rest = name.split("/")
        row = part if rest and part != "ln_f" else "the rest"
        rows.setdefault(row, []).append(("/".join(rest) if row == part else name[6:], entry))
    figure = Figure(figsize=(5.6, 4.4))
    axes = figure.add_axes((0.13, 0.13, 0.86, 0.86))
    shades = {"attn": (BLUE, WHITE), "mlp": (ORANGE, WHITE), "wpe": ("#bcd9f2", INK), "wte": ("#fbd9bd", INK)}
    for y, tensors in enumerate(rows.values()):
        begin = tensors[0][1].offset
        for name, entry in tensors:
            x, width = (entry.offset - begin) / 1e6, entry.size / 1e6
            matrix = len(entry.shape) > 1
            fill, ink = shades[name.split("/")[0]] if matrix else (INK, WHITE)
            edge = WHITE if matrix else INK  # a vector is all edge
            axes.broken_barh([(x, width)], (y - 0.35, 0.7), facecolor=fill, edgecolor=edge, lw=0.7)
            if matrix:
                label, upright = name.replace("/", "/\n", 1), width < 0.3 and "/" in name
                how = {"rotation": 90, "fontsize": 9} if upright else {"fontsize": 10}
                axes.text(x + width / 2, y, label, color=ink, ha="center", va="center", **how)
        axes.text(0, y - 0.39, f"from byte {begin:,}", fontsize=10, va="bottom", color=FAINT)
    axes.set_yticks(range(len(rows)), rows, fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.set_xlim(0, 1.01 * axes.dataLim.xmax)
    axes.set_xlabel("megabytes", fontsize=10)
    axes.tick_params(labelsize=10, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure
