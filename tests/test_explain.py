"""picogpt.explain: every number in the page is read back out of the HTML, and is the model's."""

import base64
import errno
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import SMALL, nano_sort_recorded, random_ids, random_params, transformers_model
from picogpt import explain as room
from picogpt.checkpoint import load_encoder_hparams_and_params, load_hparams_and_params, save_checkpoint
from picogpt.encoder import SYMBOL_OF_BYTE, Encoder, get_encoder, to_symbols
from picogpt.explain import ExplainError, cut, excerpt, explain, main, page, sample, spread
from picogpt.generation import GenerationError
from picogpt.model import gpt2, transformer_block
from picogpt.sampling import probabilities
from picogpt.tensor_files import write_safetensors
from picogpt.trace import run_with_trace

ROOT = Path(__file__).parents[1]
TEXT = "Friends, Romans,<|endoftext|>lend me your cafés 🙂"
NASTY = "</script><!--<script>\u2028\u2029\x00\x1b[2J\\u003c]]>&lt;\"'\r\n"
ENCODER, HPARAMS, PARAMS = load_encoder_hparams_and_params("shakespeare")
NANO_SORT = {  # in the recorded run -> in the page
    "tok_emb": "hook_embed",
    "x": "blocks.0.hook_resid_pre",
    "attSm": "blocks.0.attn.hook_pattern",
    "yProj": "blocks.0.hook_attn_out",
    "attnResid": "blocks.0.hook_resid_mid",
    "mlp": "blocks.0.hook_mlp_out",
    "block0": "blocks.0.hook_resid_post",
    "block1": "blocks.1.hook_resid_post",
    "block2": "blocks.2.hook_resid_post",
}
MARKED = {  # panel -> what the marked lines say
    "tokens": ["heappop(heap)", "merges.append", "left + right"],
    "embeddings": ["wte[inputs]", "wpe[xp.asarray(position_ids)]"],
    "residual": ["mha(layer_norm(", "ffn(layer_norm("],
    "attention": ["@ k.mT", "softmax(", "@ v"],
    "lens": ["for block in blocks", "layer_norm(x", "@ head.T"],
    "sampling": ["/ temperature", "-np.inf", "softmax(logits)", "top_p"],
}
STREAM = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
HALF = 2.0**-11  # what rounding to float16 changes at the most, as a part of the number
TINY = 2.0**-25  # and of numbers so small that float16 has fewer bits for them


def data_of(html):
    """The JSON in a page."""
    (line,) = re.findall(r'^\s*<script type="application/json" id="data">(.*)</script>\s*$', html, re.MULTILINE)
    return json.loads(line)


def array(stored):
    x = np.frombuffer(base64.b64decode(stored["data"]), np.dtype(stored["dtype"]).newbyteorder("<"))
    return x.reshape(stored["shape"])


def made(path, *args):
    """What the command puts into a page."""
    assert main([*args, "-o", str(path / "page.html")]) == 0
    return data_of((path / "page.html").read_text(encoding="utf-8"))


def embedded(text):
    return explain(ENCODER.encode(text), PARAMS, HPARAMS, encoder=ENCODER, text=text)


def assert_is_the_trace(data, trace):
    """All arrays in float16, and norms in 5 digits."""
    assert_arrays(data, trace)
    everywhere = {name for name in trace if name.endswith(("embed", *STREAM))}
    assert data["norms"].keys() == everywhere
    for name, norms in data["norms"].items():
        expected = (trace[name].astype(np.float64) ** 2).sum(-1) ** 0.5
        np.testing.assert_allclose(norms, expected, rtol=5.1e-5)


def assert_arrays(data, trace):
    layers, heads, columns = data["layers"], data["heads"], data["columns"]
    names = ["hook_embed", "hook_pos_embed", *(f"blocks.{i}.{hook}" for i in layers for hook in STREAM)]
    patterns = [f"blocks.{i}.attn.hook_pattern" for i in layers]
    assert sorted(data["arrays"]) == sorted(names + patterns)
    for name in names:
        close_to_half(data["arrays"][name], trace[name][:, columns])
    for name in patterns:
        close_to_half(data["arrays"][name], trace[name][heads])


def close_to_half(stored, expected):
    assert stored["dtype"] == "float16"
    assert array(stored).shape == expected.shape
    np.testing.assert_allclose(array(stored).astype(np.float64), expected, rtol=HALF, atol=TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return made(tmp_path_factory.mktemp("page"), TEXT)


@pytest.fixture(scope="module")
def run():
    ids = ENCODER.encode(TEXT, allowed_special="all")
    return ids, *run_with_trace(ids, PARAMS, HPARAMS["n_head"])


class TestNumbers:
    """The embedded model on a text, by the command."""

    def test_what_it_is_of(self, data, run):
        keys = (
            "format picogpt model hparams text ids tokens pieces layers heads sampling arrays norms lens logits"
        )
        assert data.keys() == {*keys.split(), "vocab", "columns", "source"}
        assert (data["format"], data["model"], data["text"]) == ("picogpt explain 1", "shakespeare", TEXT)
        assert (data["hparams"], data["ids"], data["sampling"]) == (HPARAMS, run[0], "")
        assert (data["layers"], data["heads"]) == ([0, 1, 2], [0, 1, 2, 3])
        assert data["columns"] == [*range(256)]

    def test_arrays_and_norms_are_the_trace(self, data, run):
        assert_is_the_trace(data, run[2])
        assert np.array_equal(array(data["logits"]), run[1][-1])
        assert data["logits"]["dtype"] == "float32"

    def test_the_lens_is_the_model_with_fewer_blocks(self, data, run):
        ids, logits, _ = run
        lens = data["lens"]
        assert len(lens["ids"]) == len(lens["probabilities"]) == len(lens["next"]) == 4
        for depth in range(4):
            shallow = {**PARAMS, "blocks": PARAMS["blocks"][:depth]}
            for row, x in enumerate(gpt2(ids, **shallow, n_head=4).astype(np.float64)):
                p = np.exp(x) / np.exp(x).sum()
                best = sorted(range(len(p)), key=lambda i: -p[i])[:5]
                assert lens["ids"][depth][row] == best
                np.testing.assert_allclose(lens["probabilities"][depth][row], p[best], rtol=5.1e-4)
                if row + 1 < len(ids):
                    np.testing.assert_allclose(lens["next"][depth][row], p[ids[row + 1]], rtol=5.1e-4)
            assert lens["next"][depth][len(ids) - 1] is None
            assert len(lens["next"][depth]) == len(ids)
        own = probabilities(logits[-1])
        assert lens["probabilities"][3][-1] == [float(f"{own[i]:.4g}") for i in lens["ids"][3][-1]]

    def test_every_token_that_is_named_has_its_text(self, data, run):
        named = {*run[0], *(i for depth in data["lens"]["ids"] for row in depth for i in row)}
        named |= {*np.argsort(-run[1][-1], kind="stable")[:300].tolist()}
        assert data["vocab"].keys() == set(map(str, named))
        assert data["tokens"] == [data["vocab"][str(i)] for i in run[0]]
        for i, text in data["vocab"].items():
            raw = re.sub(rb"\\x(..)", lambda found: bytes.fromhex(found[1].decode()), text.encode())
            assert raw == ENCODER.decode_bytes([int(i)])
        assert any(token.startswith("\\xf0") for token in data["tokens"])  # the first part of 🙂

    def test_ids_in_place_of_a_text(self, data, run, tmp_path):
        again = made(tmp_path, "--ids", *map(str, run[0]))
        assert (again.pop("text"), again.pop("pieces")) == (None, None)
        assert again == {key: value for key, value in data.items() if key not in ("text", "pieces")}

    def test_one_token(self):
        data = data_of(page(embedded("O")))
        assert (data["tokens"], data["lens"]["next"]) == (["O"], [[None]] * 4)
        assert array(data["arrays"]["blocks.2.attn.hook_pattern"]).tolist() == [[[1.0]]] * 4


class TestMerges:
    @pytest.mark.parametrize("text", [TEXT, "thethethe banananana eeeeeeee\n\n\n  -- ---- 'll", "日本語", ""])
    def test_lead_from_the_bytes_to_the_ids(self, text):
        pieces, ranks = cut(text, ENCODER), ENCODER.bpe_ranks
        assert "".join(piece["text"] for piece in pieces) == text
        assert [i for piece in pieces for i in piece["ids"]] == ENCODER.encode(text, allowed_special="all")
        for piece in pieces:
            if piece["text"] == "<|endoftext|>":
                assert (piece["rows"], piece["ids"]) == ([["<|endoftext|>"]], [ENCODER.end_of_text])
                continue
            rows = piece["rows"]
            assert rows[0] == [*to_symbols(piece["text"])]
            for (before, after), rank, at in zip(pairwise(rows), piece["ranks"], piece["at"], strict=True):
                pair = before[at], before[at + 1]
                assert after == [*before[:at], "".join(pair), *before[at + 2 :]]
                assert rank == ranks[pair] == min(ranks.get(two, 1 << 30) for two in pairwise(before))
                assert at == [*pairwise(before)].index(pair)  # of equals the leftmost
            assert [ENCODER.encoder[symbol] for symbol in rows[-1]] == piece["ids"]

    def test_are_in_the_page(self, data):
        assert data["pieces"] == cut(TEXT, ENCODER)
        assert sum(len(piece["ranks"]) for piece in data["pieces"]) > 10


@pytest.fixture(scope="module")
def nano_sort(assets, tmp_path_factory):
    """A model directory as transformers would write it, but for a vocabulary."""
    directory = tmp_path_factory.mktemp("nano-sort")
    arrays = dict(np.load(assets / "small-models" / "nano-sort" / "gpt2_layout.npz"))
    write_safetensors(directory / "model.safetensors", arrays, {})
    sizes = {"vocab_size": 3, "n_positions": 11, "n_embd": 48, "n_head": 3, "n_layer": 3}
    config = {"model_type": "gpt2", "tie_word_embeddings": False, "activation_function": "gelu_new"}
    (directory / "config.json").write_text(json.dumps(config | sizes))
    return directory


class TestNanoSort:
    """minGPT's model that sorts six digits, as PyTorch ran it (bbycroft/llm-viz). It has no vocabulary."""

    @pytest.mark.parametrize("row", range(3))
    def test_the_page_has_the_published_activations(self, assets, nano_sort, tmp_path, row):
        _, published = nano_sort_recorded(assets)
        ids = published["idx"][row].astype(int).tolist()
        data = made(tmp_path, "--model_size", str(nano_sort), "--ids", *map(str, ids))
        assert (data["tokens"], data["vocab"]) == ([f"#{i}" for i in ids], {"0": "#0", "1": "#1", "2": "#2"})
        for theirs, ours in NANO_SORT.items():
            expected = published[theirs][row].astype(np.float64)
            # the float16 of the page, and the noise of two float32 programs
            atol = 4e-6 * np.abs(expected).max()
            found = array(data["arrays"][ours]).astype(np.float64)
            np.testing.assert_allclose(found, expected, rtol=HALF, atol=atol, err_msg=ours)
            if ours in data["norms"]:
                norms = (expected**2).sum(-1) ** 0.5
                np.testing.assert_allclose(data["norms"][ours], norms, rtol=5.1e-5, atol=atol, err_msg=ours)
        np.testing.assert_allclose(array(data["logits"]), published["lm_head"][row, -1], rtol=0, atol=2e-5)
        probs, lens = published["probs"][row], data["lens"]
        for p, ids_of, p_of in zip(probs, lens["ids"][3], lens["probabilities"][3], strict=True):
            assert ids_of == np.argsort(-p).tolist()
            np.testing.assert_allclose(p_of, p[ids_of], rtol=6e-4)

    def test_a_text_needs_a_vocabulary(self, nano_sort, tmp_path, capfd):
        assert main(["0 1", "--model_size", str(nano_sort), "-o", str(tmp_path / "page.html")]) == 2
        assert "has no vocabulary" in capfd.readouterr().err


class TestLensOracle:
    @pytest.mark.parametrize("lm_head", [False, True])
    def test_transformers_says_the_same_at_every_depth(self, lm_head):
        params = random_params(**SMALL, dtype=np.float32, lm_head=lm_head)
        self.compare(params, SMALL, random_ids(11, SMALL["n_vocab"]))

    def test_of_the_embedded_model(self):
        self.compare(PARAMS, HPARAMS, ENCODER.encode("Speak, speak.\n\nSecond Citizen:\nWe are"))

    def compare(self, params, hparams, ids):
        torch = pytest.importorskip("torch")
        model = transformers_model(params, hparams["n_head"])
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            *shallow, last = (h[0] for h in hidden)  # the last has been through ln_f
            depths = [model.lm_head(h) for h in (*map(model.transformer.ln_f, shallow), last)]
            p = torch.stack(depths).double().softmax(-1).numpy()
        lens = explain(ids, params, hparams)["lens"]
        assert len(depths) == len(lens["ids"]) == hparams["n_layer"] + 1
        found = np.array(lens["probabilities"])
        best = np.array(lens["ids"])
        np.testing.assert_allclose(found, np.take_along_axis(p, best, -1), rtol=6e-4)
        np.testing.assert_allclose(found, -np.sort(-p)[..., :5], rtol=6e-4)
        for row, i in enumerate(ids[1:]):
            np.testing.assert_allclose([depth[row] for depth in lens["next"]], p[:, row, i], rtol=6e-4)


class TestSizes:
    def test_of_64_tokens_through_the_embedded_model(self):
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        data = explain(ENCODER.encode(text)[:64], PARAMS, HPARAMS, encoder=ENCODER)
        assert (data["sampling"], len(data["columns"])) == ("", 256)
        assert len(page(data).encode()) < 2_000_000

    def test_of_64_tokens_through_the_shapes_of_124m(self):
        """But for the vocabulary, of which the page has 4 bytes each; and one block stands for all twelve."""
        hparams = {"n_vocab": 8192, "n_ctx": 64, "n_embd": 768, "n_head": 12, "n_layer": 12}
        params = random_params(**hparams | {"n_layer": 1}, dtype=np.float32)
        params["blocks"] *= 12
        ids = random_ids(64, 8192)
        data = explain(ids, params, hparams, encoder=get_encoder())
        assert 1_700_000 < len(page(data).encode()) < 2_000_000
        layers, columns = data["layers"], data["columns"]
        assert 4 <= len(layers) < 12 and 64 <= len(columns) < 768 and data["heads"] == [*range(12)]
        assert (layers[0], layers[-1], columns[0], columns[-1]) == (0, 11, 0, 767)
        said = f"{len(layers)} of 12 layers, {len(columns)} of 768 columns, evenly spaced"
        assert said in data["sampling"]
        assert_is_the_trace(data, run_with_trace(ids, params, 12)[1])

    @pytest.mark.parametrize(
        ("n_layer", "n_head", "n_embd"), [(12, 12, 768), (48, 25, 1600), (3, 4, 256), (1, 1, 8)]
    )
    @pytest.mark.parametrize("n_seq", [1, 64, 128])
    @pytest.mark.parametrize("space", [500_000, 1_500_000])
    def test_the_sample_keeps_to_its_room(self, n_layer, n_head, n_embd, n_seq, space):
        names = [
            "hook_embed",
            "hook_pos_embed",
            *(f"blocks.{i}.{hook}" for i in range(n_layer) for hook in STREAM),
        ]
        trace = {name: np.zeros((n_seq, n_embd), np.float32) for name in names}
        pattern = np.zeros((n_head, n_seq, n_seq), np.float32)
        trace |= {f"blocks.{i}.attn.hook_pattern": pattern for i in range(n_layer)}
        lengths = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
        of = {"n_layer": "layers", "n_head": "heads", "n_embd": "columns"}
        found = sample(trace, lengths, space)
        size = sum(len(stored["data"]) for stored in found["arrays"].values())
        assert size <= space + 4 * len(found["arrays"])  # of which each is filled up to 4 characters
        for key, n in lengths.items():
            share = f"{len(found[of[key]])} of {n} {of[key]}"
            assert (share in found["sampling"]) == (len(found[of[key]]) < n)
        assert len(found["layers"]) >= min(n_layer, 4)
        if len(found["heads"]) < n_head:  # one more would not have fitted
            assert (len(found["heads"]) + 1) * min(n_layer, 4) * n_seq**2 * 2 > space * 3 / 4 / 2
        assert size > 0.9 * space or not found["sampling"]

    def test_what_is_sampled_are_the_layers_heads_and_columns_that_are_named(self):
        params = random_params(n_vocab=9, n_ctx=8, n_embd=40, n_layer=7, dtype=np.float32)
        trace = run_with_trace([1, 2, 3], params, 10)[1]
        found = sample(trace, {"n_layer": 7, "n_head": 10, "n_embd": 40}, 800)
        assert (found["layers"], found["heads"], len(found["columns"])) == ([0, 2, 4, 6], [0, 3, 6, 9], 16)
        assert_arrays(found, trace)

    def test_a_long_piece_is_shown_without_its_merges(self):
        data = embedded("e" * 65)
        (piece,) = data["pieces"]
        assert (piece["ranks"], piece["at"], piece["rows"]) == (
            [],
            [],
            [[ENCODER.decoder[i] for i in data["ids"]]],
        )
        assert data["sampling"].startswith("Pieces of more than 64 bytes")
        assert embedded("e" * 64)["sampling"] == ""
        (piece,) = cut("e" * 64, ENCODER)
        assert piece["rows"][0] == ["e"] * 64


class TestSmallThings:
    @given(st.integers(1, 2000), st.integers(1, 300))
    def test_spread(self, n, most):
        found = spread(n, most)
        assert len(set(found)) == len(found) == min(n, most)
        assert found[0] == 0 and (found[-1] == n - 1 or most == 1)
        gaps = np.diff(found)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1

    def test_a_stream_that_float16_cannot_hold_is_float32_and_keeps_to_its_room(self):
        ids, room_of = list(range(128)), {}
        for largest, dtype in ((60000.0, "float16"), (-66000.0, "float32")):
            wpe = PARAMS["wpe"].copy()
            wpe[3, 0] = largest
            data = explain(ids, {**PARAMS, "wpe": wpe}, HPARAMS, encoder=ENCODER)
            assert {stored["dtype"] for stored in data["arrays"].values()} == {dtype}
            found = array(data["arrays"]["hook_pos_embed"])
            assert abs(found).max() == pytest.approx(abs(largest), rel=HALF)
            room_of[dtype] = len(page(data))
        assert max(room_of.values()) < 2_000_000

    def test_ids_past_the_vocabulary_are_shown_as_numbers(self):
        """Tables of embeddings are padded to round lengths."""
        assert room.token_text(1023, ENCODER) == ENCODER.decode([1023]) != "#1023"
        assert room.token_text(1024, ENCODER) == "#1024"

    def test_a_directory_without_a_vocabulary_has_gpt2_s_if_it_has_as_many_tokens(self, tmp_path):
        hparams = {"n_vocab": 50257, "n_ctx": 8, "n_embd": 2, "n_head": 1, "n_layer": 1}
        save_checkpoint(tmp_path, hparams, random_params(**hparams, dtype=np.float32))
        assert made(tmp_path, "--ids", "464 3290", "--model_size", str(tmp_path))["tokens"] == ["The", " dog"]

    def test_a_vocabulary_without_end_of_text(self, tmp_path):
        """Of bytes alone: then <|endoftext|> is text, in three pieces."""
        hparams = {"n_vocab": 300, "n_ctx": 32, "n_embd": 8, "n_head": 2, "n_layer": 1}  # padded
        save_checkpoint(tmp_path, hparams, random_params(**hparams, dtype=np.float32))
        Encoder({SYMBOL_OF_BYTE[i]: i for i in range(256)}, []).save(tmp_path)
        data = made(tmp_path, "<|endoftext|>", "--model_size", str(tmp_path))
        assert [piece["text"] for piece in data["pieces"]] == ["<|", "endoftext", "|>"]
        assert "".join(data["tokens"]) == "<|endoftext|>"
        assert len(data["vocab"]) == 300
        assert (data["vocab"]["65"], data["vocab"]["200"], data["vocab"]["299"]) == ("A", "\\xc8", "#299")

    def test_too_many_and_none(self):
        with pytest.raises(ExplainError, match="129 tokens are too many to look at: give at most 128"):
            explain([1] * 129, PARAMS, HPARAMS)
        assert len(explain([1] * 128, PARAMS, HPARAMS)["tokens"]) == 128
        with pytest.raises(GenerationError, match="the prompt is empty"):
            explain([], PARAMS, HPARAMS)


class TestSource:
    def test_is_that_of_the_files_and_the_marked_lines_are_those_that_compute(self):
        source = embedded("O")["source"]
        assert source.keys() == MARKED.keys()
        for panel, shown in source.items():
            lines = (ROOT / shown["file"]).read_text(encoding="utf-8").split("\n")
            first, end = shown["first"], shown["first"] + len(shown["lines"])
            assert shown["lines"] == lines[first - 1 : end - 1]
            for number, code in zip(shown["mark"], MARKED[panel], strict=True):
                assert first <= number < end
                assert code in lines[number - 1], panel

    @pytest.mark.parametrize("quoted", ["x = nothing", "x = x +"])
    def test_a_quote_that_is_gone_or_stands_twice_is_an_error(self, quoted):
        with pytest.raises(ValueError, match="values to unpack"):
            excerpt(transformer_block, quoted, "", ())


class Scripts(HTMLParser):
    """The script elements of a page."""

    def __init__(self, html):
        super().__init__()
        self.found, self.errors = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            self.found.append(attrs)


class TestPage:
    def test_the_template_has_one_place_for_the_numbers(self):
        template = room.TEMPLATE.read_text(encoding="utf-8")
        assert template.count(room.SLOT) == 1
        assert [line.strip() for line in template.split("\n")].count(room.SLOT) == 1

    def test_all_but_the_numbers_is_the_template(self):
        html = page({"a": 1})
        assert html.replace('{"a":1}', "{}") == room.TEMPLATE.read_text(encoding="utf-8")

    @pytest.mark.parametrize("text", [NASTY, "<", "é" * 20, "\ufeff x", "".join(map(chr, range(1, 40)))])
    def test_no_text_gets_out_of_its_place(self, text, tmp_path):
        data = embedded(text)
        data["model"] = text + "\udcff"  # a directory may be called anything
        html = page(data)
        assert html.encode() and data_of(html) == data
        template = room.TEMPLATE.read_text(encoding="utf-8")
        assert len(html.split("\n")) == len(template.split("\n"))
        assert Scripts(html).found == Scripts(template).found
        assert html.replace(room.as_json(data), "{}") == template
        assert room.as_json(data).isascii() and "<" not in room.as_json(data)


class TestCommand:
    def run(self, *args, **options):
        command = [sys.executable, "-m", "picogpt.explain", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", **options)

    @pytest.mark.parametrize("args", [(), ("-",)])
    def test_reads_standard_input(self, tmp_path, args):
        ran = self.run(*args, "-o", tmp_path / "page.html", input="Café\n")
        assert (ran.returncode, ran.stdout) == (0, "")
        assert re.fullmatch(r"picogpt: .*page.html: \d tokens through shakespeare, 0.\d\d MB\n", ran.stderr)
        assert data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["text"] == "Café"
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("",), "the prompt is empty"),
            (("a b " * 70,), "are too many to look at: give at most 128"),
            (("a b " * 200,), "do not fit into the model's 256 positions"),
            (("\udcff",), "half a surrogate pair"),
            (("--ids", "1,x"), "'1,x' are not token ids"),
            (("--ids", "5,1024"), "token id 1024 is not in the model's vocabulary"),
            (("O", "--ids", "5"), "a text and --ids were given"),
            (("O", "--model_size", "nowhere"), "nowhere"),
            (("O", "-o", "-"), "-o - is no file to write to: give one, such as page.html"),
            (("--ids", "9" * 30), "are not token ids"),
            (("O", "-o", ""), "is no file to write to: give one, such as page.html"),
            (("O", "-o", "{}"), "is no file to write to: give one, such as page.html"),
            (("O", "-o", "{}/missing/page.html"), "there is no directory"),
            (("O", "-o", "{}/page.html/page.html"), "there is no directory"),
            pytest.param(
                ("O", "-o", "{}/" + "x" * 300),
                "File name too long",
                marks=pytest.mark.skipif(os.name == "nt", reason="Windows says it in other words"),
            ),
        ],
    )
    def test_what_a_careless_user_gives(self, capfd, tmp_path, args, message):
        (tmp_path / "page.html").write_text("as it was")
        args = [arg.replace("{}", str(tmp_path)) for arg in args]
        assert main(["-o", str(tmp_path / "page.html"), *args]) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
        assert (tmp_path / "page.html").read_text() == "as it was"

    def test_what_is_wrong_with_the_input_is_said_before_a_model_is_loaded(self, capfd, tmp_path):
        for args in (["O", "--ids", "5"], ["--ids", "x"]):
            assert main(["-o", str(tmp_path / "page.html"), "--model_size", "nowhere", *args]) == 2
            assert "nowhere" not in capfd.readouterr().err

    @pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
    def test_a_link_stays_and_what_it_leads_to_is_written(self, tmp_path):
        (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
        assert main(["O", "-o", str(tmp_path / "link.html")]) == 0
        assert (tmp_path / "link.html").is_symlink() and b"<html" in (tmp_path / "page.html").read_bytes()

    def test_at_a_terminal_it_asks_for_a_text(self, capfd, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        assert main(["-o", str(tmp_path / "page.html")]) == 2
        assert "there is no text: give it as an argument, or - to type it" in capfd.readouterr().err

    def test_without_an_output(self, capfd):
        with pytest.raises(SystemExit) as stopped:
            main(["O"])
        assert stopped.value.code == 2
        assert "required: -o" in capfd.readouterr().err

    def test_a_disk_that_is_full_leaves_the_old_page(self, capfd, tmp_path, monkeypatch):
        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        (tmp_path / "page.html").write_text("as it was")
        assert main(["O", "-o", str(tmp_path / "page.html")]) == 2
        assert re.fullmatch(r"picogpt: cannot write .*page.html: No space left.*\n", capfd.readouterr().err)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]

    def test_weights_so_large_that_a_variance_overflows_are_no_page(self, capfd, tmp_path):
        """Normalized rows become 0, and the logits stay finite."""
        params = random_params(**SMALL, dtype=np.float32)
        save_checkpoint(tmp_path / "model", SMALL, {**params, "wpe": params["wpe"] * np.float32(1e25)})
        args = ["--model_size", str(tmp_path / "model"), "-o", str(tmp_path / "page.html")]
        assert main([*args, "--ids", "1", "2"]) == 2
        assert re.fullmatch("picogpt: .* its weights are damaged; fetch them again\n", capfd.readouterr().err)

    def test_damaged_weights(self, capfd, tmp_path):
        params = random_params(**SMALL, dtype=np.float32)
        wpe = params["wpe"].copy()
        wpe[1, 0] = np.inf
        save_checkpoint(tmp_path / "model", SMALL, {**params, "wpe": wpe})
        args = ["--model_size", str(tmp_path / "model"), "-o", str(tmp_path / "page.html")]
        assert main([*args, "--ids", "1", "2"]) == 2
        out, err = capfd.readouterr()
        assert "its weights are damaged" in err and (out, err.count("\n")) == ("", 1)
        assert not (tmp_path / "page.html").exists()
        assert main([*args, "--ids", "1"]) == 0  # which does not touch them
        assert load_hparams_and_params(tmp_path / "model")[0] == SMALL
