"""reference/: every vector against somebody else's program, and a value that moves is noticed."""

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from test_encoder import VOCABULARY, tiktoken_from

from models import transformers_model, tree_map
from picogpt.encoder import PATTERN
from picogpt.formula import HPARAMS, WEIGHTS, formula, formula_params, formula_tensors
from picogpt.recording import Recording

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def vectors():
    return json.loads((REFERENCE / "vectors.json").read_bytes())


@pytest.fixture(scope="module")
def trace():
    return Recording.load(REFERENCE / "trace")


@pytest.fixture(scope="module")
def tiktoken():
    return tiktoken_from(VOCABULARY)


@pytest.fixture(scope="module")
def oracle():
    """transformers' GPT-2 with the formula's weights, in float64."""
    torch = pytest.importorskip("torch")
    model = transformers_model(tree_map(lambda w: w.astype(np.float64), formula_params()[1]), 2)

    def logits(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    logits.model = model
    return logits


@pytest.fixture(scope="module")
def build():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REFERENCE))
        patch.delitem(sys.modules, "vectors", raising=False)
        import build

        yield build
    for name in ("build", "vectors"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def built(build):
    return build.build()


class TestTokenizer:
    def test_ids_are_tiktokens(self, vectors, tiktoken):
        assert len(vectors["tokenizer"]) >= 50
        for vector in vectors["tokenizer"]:
            text = bytes.fromhex(vector["bytes"]).decode()
            assert text == vector["text"]
            assert vector["ids"] == tiktoken.encode_ordinary(text), text
        assert len(vectors["special"]) == 1
        for vector in vectors["special"]:
            assert vector["ids"] == tiktoken.encode(vector["text"], allowed_special="all")
            assert 50256 in vector["ids"]

    def test_pieces_and_merges_are_those_of_the_tokenizers_library(self, vectors):
        tokenizers = pytest.importorskip("tokenizers")
        library = tokenizers.ByteLevelBPETokenizer(
            str(VOCABULARY / "encoder.json"), str(VOCABULARY / "vocab.bpe")
        )
        for vector in vectors["tokenizer"]:
            assert vector["ids"] == library.encode(vector["text"]).ids
            cut = library.pre_tokenizer.pre_tokenize_str(vector["text"]) if vector["text"] else []
            assert [len(symbols) for symbols, _ in cut] == [len(p["bytes"]) // 2 for p in vector["pieces"]]
            assert "".join(piece["bytes"] for piece in vector["pieces"]) == vector["bytes"]

    def test_merges_lead_to_the_ids_by_the_file_of_merges(self, vectors):
        """Each merge is the line of its rank, is where it is said to be, and no lower one was left out."""
        from picogpt.encoder import SYMBOL_OF_BYTE

        lines = (VOCABULARY / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
        ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines) if line}
        ids = json.loads((VOCABULARY / "encoder.json").read_bytes())

        def symbols(hexadecimal):
            return "".join(SYMBOL_OF_BYTE[byte] for byte in bytes.fromhex(hexadecimal))

        for piece in (piece for vector in vectors["tokenizer"] for piece in vector["pieces"]):
            row = [*symbols(piece["bytes"])]
            for rank, start, left, right in piece["merges"]:
                pairs = [ranks.get(pair, 1 << 30) for pair in pairwise(row)]
                at = pairs.index(min(pairs))
                assert (pairs[at], row[at], row[at + 1]) == (rank, symbols(left), symbols(right))
                assert len("".join(row[:at])) == start
                row[at : at + 2] = [row[at] + row[at + 1]]
            assert all(pair not in ranks for pair in pairwise(row))
            assert [ids[symbol] for symbol in row] == piece["ids"]

    def test_decoding(self, vectors, tiktoken):
        for vector in vectors["decode"]:
            assert bytes.fromhex(vector["bytes"]) == tiktoken.decode_bytes(vector["ids"])
            assert vector["text"] == tiktoken.decode(vector["ids"]) == "".join(vector["stream"])
            assert len(vector["stream"]) == len(vector["ids"]) + 1
        streams = {tuple(vector["ids"]): vector["stream"] for vector in vectors["decode"]}
        assert streams[47249, 222] == ["", "😀", ""] and streams[47249,] == ["", "\ufffd"]

    def words(self):
        content, at, words = (REFERENCE / "tokens.bin").read_bytes(), 0, []
        while at < len(content):
            words.append(content[at + 1 : at + 1 + content[at]])
            at += 1 + content[at]
        return words

    def test_every_token(self, tiktoken):
        assert len(self.words()) == 50257
        assert self.words() == [tiktoken.decode_single_token_bytes(i) for i in range(50257)]

    def test_tokens_bin_is_enough_to_encode(self, vectors):
        """By the rule in the README: join the pair that makes the token with the lowest id, the leftmost."""
        id_of = {word: i for i, word in enumerate(self.words()[:50256])}
        for piece in (piece for vector in vectors["tokenizer"] for piece in vector["pieces"]):
            row = [bytes([byte]) for byte in bytes.fromhex(piece["bytes"])]
            while len(row) > 1:
                joined = [id_of.get(a + b, 1 << 30) for a, b in pairwise(row)]
                at = joined.index(min(joined))
                if joined[at] == 1 << 30:
                    break
                row[at : at + 2] = [row[at] + row[at + 1]]
            assert [id_of[word] for word in row] == piece["ids"]

    def test_the_classes_of_characters_are_pythons(self, build):
        """For all that Python's tables know; `regex`, which made them, has its own."""
        classes = build.parse_classes((REFERENCE / "unicode_classes.txt").read_text(encoding="utf-8"))
        for c in range(0x110000):
            category = unicodedata.category(chr(c))
            if category != "Cn":
                assert [c in classes["L"], c in classes["N"]] == [category[0] == "L", category[0] == "N"], hex(
                    c
                )
        # PropList.txt, White_Space
        spaces = {
            *range(9, 14),
            0x20,
            0x85,
            0xA0,
            0x1680,
            *range(0x2000, 0x200B),
            0x2028,
            0x2029,
            0x202F,
            0x205F,
            0x3000,
        }
        assert classes["s"] == spaces

    def test_the_pattern_in_the_readme_is_the_pattern(self):
        assert f"    {PATTERN.pattern}\n" in (REFERENCE / "README.md").read_text(encoding="utf-8")


class TestSampler:
    def kept_by(self, torch, vector, rule):
        """Which ids the published rules leave: Hugging Face's by its own classes, OpenAI's in torch."""
        process = pytest.importorskip("transformers").generation.logits_process
        scores = torch.tensor([vector["logits"]], dtype=torch.float64)
        if vector["temperature"] == 0:
            p = torch.zeros_like(scores)
            p[0, scores.argmax()] = 1
            return p[0]
        scores = process.TemperatureLogitsWarper(float(vector["temperature"]))(None, scores)
        if vector["top_k"]:
            scores = process.TopKLogitsWarper(vector["top_k"])(None, scores)
        if vector["top_p"] < 1 and rule == "hugging_face":
            scores = process.TopPLogitsWarper(vector["top_p"])(None, scores)
        elif vector["top_p"] < 1:
            falling = scores.sort(descending=True).values
            count = (falling.softmax(-1).cumsum(-1) <= vector["top_p"]).sum(-1)
            bar = falling[0, max(int(count) - 1, 0)]
            scores = scores.masked_fill(scores < bar, -float("inf"))
        return scores.softmax(-1)[0]

    @pytest.mark.parametrize("rule", ["hugging_face", "openai"])
    def test_what_is_kept_and_drawn(self, vectors, rule):
        torch = pytest.importorskip("torch")
        for vector in vectors["sampler"]:
            p = self.kept_by(torch, vector, rule)
            assert vector[rule]["kept"] == p.nonzero()[:, 0].tolist(), vector
            np.testing.assert_allclose(vector[rule]["p"], p[p > 0].numpy(), rtol=1e-14, atol=1e-16)
            running = p.cumsum(-1)
            assert len(vector[rule]["draws"]) >= 4
            for uniform, drawn in vector[rule]["draws"]:
                assert int((running > uniform).nonzero()[0, 0]) == drawn

    def test_the_rules_are_told_apart(self, vectors):
        kept = [[vector[rule]["kept"] for rule in ("hugging_face", "openai")] for vector in vectors["sampler"]]
        differ = [pair for pair in kept if pair[0] != pair[1]]
        assert len(differ) >= 5 and any(len(a) == 2 and len(b) == 1 for a, b in differ)
        assert all(set(b) < set(a) for a, b in differ)

    def test_float32_gives_the_same_ids(self, vectors):
        """No top_p, and no random number, is so near to a sum that rounding decides."""
        for vector in vectors["sampler"]:
            if vector["temperature"]:
                scores = np.array(vector["logits"]) / vector["temperature"]
                bar = np.sort(scores)[::-1][: vector["top_k"] or None][-1]
                p = np.exp(scores - scores.max()) * (scores >= bar)
                sums = np.cumsum(np.sort(p / p.sum())[::-1])
                assert vector["top_p"] == 1 or np.abs(sums - vector["top_p"]).min() > 1e-4, vector
            for rule in ("hugging_face", "openai"):
                borders = np.cumsum(vector[rule]["p"])
                assert all(u == 0 or np.abs(borders - u).min() > 5e-5 for u, _ in vector[rule]["draws"])


class TestModel:
    def test_the_weights_are_the_formulas(self, vectors):
        assert vectors["model"] == {"hparams": HPARAMS, "weights": {k: list(v) for k, v in WEIGHTS.items()}}
        numpy_file = pytest.importorskip("safetensors.numpy")
        tensors = numpy_file.load_file(REFERENCE / "model" / "model.safetensors")
        assert len(tensors) == 28
        assert np.array_equal(tensors["h.1.mlp.c_proj.weight"], formula(24, (32, 8), 0, 3 / 32))

    def test_the_table_in_the_readme(self):
        rows = re.findall(
            r"(\d+) \| `([^`]*)` \| ([\d, ]+) \| ([\d/]+) \| ([\d/]+) \|",
            (REFERENCE / "README.md").read_text("utf-8"),
        )
        tensors = [*formula_tensors().items()]
        assert len(rows) == 16
        for number, name, shape, base, scale in rows:
            theirs, tensor = tensors[int(number)]
            assert theirs == f"model/{name}"
            assert tensor.shape == tuple(int(n) for n in shape.split(", "))
            top, _, bottom = scale.partition("/")
            assert (int(base), int(top) / int(bottom or 1)) == WEIGHTS[name.removeprefix("h0/")]
        first = re.search(r"wte\[0\] = (.*), \.\.\.\.", (REFERENCE / "README.md").read_text("utf-8"))[1]
        assert [float(x) for x in first.split(", ")] == tensors[0][1][0, :3].tolist()

    def test_the_ids_are_those_of_its_vocabulary(self, trace, vectors):
        tokenizers = pytest.importorskip("tokenizers")
        files = (str(REFERENCE / "model" / name) for name in ("vocab.json", "merges.txt"))
        library = tokenizers.ByteLevelBPETokenizer(*files)
        library.add_special_tokens(["<|endoftext|>"])
        ids = trace.manifest["ids"]
        assert library.encode(trace.manifest["text"]).ids == ids and 12 <= len(ids) <= 16
        bytes_of_tokens = b"".join(map(bytes.fromhex, trace.manifest["token_bytes"]))
        assert (
            bytes_of_tokens.decode() == trace.manifest["text"] == library.decode(ids, skip_special_tokens=False)
        )
        other = vectors["another_text"]
        assert library.encode(other["text"]).ids == [*chain(*other["chunks"])]

    def test_logits_of_the_trace_are_transformers(self, trace, oracle):
        theirs = oracle(trace.manifest["ids"])
        np.testing.assert_allclose(trace.tensors["logits"], theirs, rtol=0, atol=1e-13 * np.abs(theirs).max())

    def test_intermediates_of_the_trace_are_transformers(self, trace, oracle):
        torch = pytest.importorskip("torch")
        with torch.no_grad():
            out = oracle.model(
                torch.tensor([trace.manifest["ids"]]), output_hidden_states=True, output_attentions=True
            )
        theirs = {f"blocks.{i}.hook_resid_pre": out.hidden_states[i][0] for i in range(2)}
        theirs |= {f"blocks.{i}.attn.hook_pattern": out.attentions[i][0] for i in range(2)}
        theirs["ln_final.hook_out"] = out.hidden_states[2][0]
        for name, value in theirs.items():
            np.testing.assert_allclose(
                trace.tensors[name], value.numpy(), rtol=0, atol=1e-13 * 32, err_msg=name
            )

    def test_a_float32_run_of_transformers_is_within_the_bands(self, trace):
        torch = pytest.importorskip("torch")
        model = transformers_model(formula_params()[1], 2)
        with torch.no_grad():
            logits = model(torch.tensor([trace.manifest["ids"]])).logits[0].numpy()
        strays = np.abs(logits - trace.tensors["logits"]).max()
        assert 0 < strays <= trace.manifest["tensors"]["logits"]["band"]["float32"]

    def test_cache(self, vectors, trace, oracle):
        ids = trace.manifest["ids"]
        assert {len(case["chunks"]) for case in vectors["cache"]} >= {2, len(ids)}
        for case in vectors["cache"]:
            read = [*chain(*case["chunks"])]
            assert read == ids[: len(read)]
            assert [sum(map(len, case["chunks"][: n + 1])) - 1 for n in range(len(case["rows"]))] == case[
                "rows"
            ]
            theirs = oracle(ids)[case["rows"]]
            assert case["argmax"] == theirs.argmax(axis=-1).tolist()
            np.testing.assert_allclose(case["first_logits"], theirs[:, :4], rtol=0, atol=1e-12)

    def test_another_text(self, vectors, oracle):
        case = vectors["another_text"]
        theirs = oracle([*chain(*case["chunks"])])[case["rows"]]
        assert np.shape(case["logits"]) == (len(case["chunks"]), 512)
        np.testing.assert_allclose(case["logits"], theirs, rtol=0, atol=1e-12)

    def test_greedy_text(self, vectors, oracle):
        for case in vectors["greedy"]:
            ids, n = case["ids"], len(case["prompt"])
            assert len(ids) == 64 and ids[:n] == case["prompt"]
            logits = oracle(ids)[n - 1 : -1]
            assert ids[n:] == logits.argmax(axis=-1).tolist()
            two = np.sort(logits, axis=-1)[:, -2:]
            np.testing.assert_allclose(case["smallest_margin"], (two[:, 1] - two[:, 0]).min(), rtol=1e-9)
            assert case["smallest_margin"] > 1e-4  # no tie for float32
            assert len(set(ids)) >= 8

    def test_loss(self, vectors, oracle):
        torch = pytest.importorskip("torch")
        assert len(vectors["loss"]) == 3 and len(vectors["loss"][2]["ids"]) == 64
        for case in vectors["loss"]:
            ids = torch.tensor([case["ids"]])
            with torch.no_grad():
                mean = float(oracle.model(ids, labels=ids).loss)
            logits = torch.tensor(oracle(case["ids"])[:-1])
            nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            np.testing.assert_allclose(case["nats"], nats.numpy(), rtol=1e-12)
            assert abs(case["mean"] - mean) < 1e-6  # transformers computes the loss in float32
            assert abs(case["mean"] - nats.mean()) < 1e-13


class TestBuild:
    def test_nothing_has_moved(self, build, built):
        assert build.compare(REFERENCE, built) == []

    def test_everything_is_there_and_small(self, built):
        files = {
            path.relative_to(REFERENCE).as_posix(): path for path in REFERENCE.rglob("*") if path.is_file()
        }
        files = {name: path for name, path in files.items() if "__pycache__" not in name}
        expected = {name for name in built if name != "trace"} | {"README.md", "build.py", "vectors.py"}
        assert files.keys() == expected | {"trace/manifest.json", "trace/trace.safetensors"}
        assert sum(path.stat().st_size for path in files.values()) < 1_000_000

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            (
                "mean",
                lambda v: v["loss"][1].__setitem__("mean", v["loss"][1]["mean"] * (1 + 3e-12)),
                "vectors.json/loss[1]/mean: ",
            ),
            (
                "id",
                lambda v: v["tokenizer"][3]["ids"].__setitem__(1, 996),
                "vectors.json/tokenizer[3]/ids[1]: 995 has become 996",
            ),
            (
                "draw",
                lambda v: v["sampler"][1]["openai"]["draws"].pop(),
                "vectors.json/sampler[1]/openai/draws: ",
            ),
            ("key", lambda v: v.pop("greedy"), "vectors.json: {"),
            (
                "logit",
                lambda v: v["another_text"]["logits"][0].__setitem__(7, 0.0),
                "vectors.json/another_text/logits[0][7]: ",
            ),
        ],
    )
    def test_a_value_that_moves_is_named(self, build, built, name, value, said):
        moved = json.loads(json.dumps(built["vectors.json"]))
        value(moved)
        faults = build.compare(REFERENCE, {"vectors.json": moved})
        assert len(faults) == 1 and faults[0].startswith(said), (name, faults)

    def test_the_last_bits_are_no_move(self, build, built):
        def nudge(x):
            if isinstance(x, dict):
                return {key: nudge(value) for key, value in x.items()}
            return (
                [nudge(value) for value in x]
                if isinstance(x, list)
                else x * (1 + 4e-16)
                if type(x) is float
                else x
            )

        nudged = nudge(json.loads(json.dumps(built["vectors.json"])))
        assert nudged != built["vectors.json"]
        assert build.compare(REFERENCE, {"vectors.json": nudged}) == []

    def test_a_tensor_that_moves_is_named(self, build, built, trace):
        for name, at in (("blocks.1.mlp.hook_pre", (3, 4)), ("blocks.0.attn.hook_attn_scores", (1, 5, 2))):
            tensor = trace.tensors[name].copy()
            tensor[at] += 3e-12 * np.abs(tensor[np.isfinite(tensor)]).max()
            moved = Recording(trace.manifest, {**trace.tensors, name: tensor})
            faults = build.compare(REFERENCE, {"trace": moved})
            assert len(faults) == 1 and faults[0].startswith(f"trace/{name}{list(at)}: ")
        short = Recording(trace.manifest, {**trace.tensors, "logits": trace.tensors["logits"][:-1]})
        assert "logits: the shape" in build.compare(REFERENCE, {"trace": short})[0]
        fewer = Recording(trace.manifest, dict([*trace.tensors.items()][:-1]))
        assert "the names" in build.compare(REFERENCE, {"trace": fewer})[0]
        says = {
            **trace.manifest["tensors"],
            "logits": {**trace.manifest["tensors"]["logits"], "projection": 0.5},
        }
        changed = Recording({**trace.manifest, "tensors": says, "text": "x"}, trace.tensors)
        assert [fault.partition(":")[0] for fault in build.compare(REFERENCE, {"trace": changed})] == [
            "trace/text",
            "trace/logits/projection",
        ]

    def test_characters_that_unicode_adds_are_no_move(self, build, built):
        lines = built["unicode_classes.txt"].decode()
        assert (
            build.compare(REFERENCE, {"unicode_classes.txt": (lines + "{'L', 0x3fff0, 0x3fff1},\n").encode()})
            == []
        )
        fewer = re.sub(r"\{'N'.*\n", "", lines, count=1).encode()
        assert build.compare(REFERENCE, {"unicode_classes.txt": fewer})[0].startswith("unicode_classes.txt: ")

    def test_the_command(self, build, built, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(build, "build", lambda: built)
        directory = tmp_path / "reference"
        directory.mkdir()
        assert build.main(directory) == 0 and "is written" in capsys.readouterr().out
        written = {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        assert written["tokens.bin"] == (REFERENCE / "tokens.bin").read_bytes()
        assert build.main(directory) == 0 and "nothing has moved" in capsys.readouterr().out
        path = directory / "vectors.json"
        path.write_bytes(path.read_bytes().replace(b"[15496, 995]", b"[15496, 994]", 1))
        assert build.main(directory) == 1
        assert "vectors.json/tokenizer[3]/ids[1]: 994 has become 995" in capsys.readouterr().err
        assert b"[15496, 994]" in path.read_bytes()  # and stays as it is
        path.write_bytes(path.read_bytes().replace(b'"version": 1', b'"version": 0', 1))
        assert build.main(directory) == 0 and path.read_bytes() == written["vectors.json"]
        shutil.copy(REFERENCE / "README.md", path)
        assert build.main(directory) == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, cc")
def test_the_classes_of_characters_in_c(build, tmp_path):
    """As the file itself and its README say: included in an initializer, and read with sscanf."""
    classes = REFERENCE / "unicode_classes.txt"
    source = f"""#include <stdio.h>
static const struct {{ char name; int first, last; }} CLASSES[] = {{
#include "{classes.as_posix()}"
}};
int main(void) {{
    int n = 0, at = 0; char line[200], name; unsigned first, last;
    for (size_t i = 0; i < sizeof CLASSES / sizeof *CLASSES; i++) n += CLASSES[i].last - CLASSES[i].first + 1;
    FILE *file = fopen("{classes.as_posix()}", "r");
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "{{'%c', %x, %x}}", &name, &first, &last) == 3) {{
            if (CLASSES[at].name != name || CLASSES[at].first != (int)first) return 1;
            if (CLASSES[at].last != (int)last) return 1;
            at++;
        }}
    printf("%d %d", n, at == sizeof CLASSES / sizeof *CLASSES);
    return 0;
}}"""
    (tmp_path / "c.c").write_text(source)
    subprocess.run(["cc", "-o", tmp_path / "c", tmp_path / "c.c"], check=True)
    printed = subprocess.run([tmp_path / "c"], capture_output=True, text=True, check=True).stdout
    parsed = build.parse_classes(classes.read_text(encoding="utf-8"))
    assert printed == f"{sum(map(len, parsed.values()))} 1"
