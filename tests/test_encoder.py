"""The tokenizer against tiktoken, Hugging Face's tokenizers, and ids and counts that others have recorded."""

import copy
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picogpt import PicogptError, encoder
from picogpt.encoder import Encoder, EncoderError, get_encoder

VOCABULARY = Path(encoder.__file__).with_name("vocabulary")
TEXTS = "text/tinyshakespeare_input.txt text/the-verdict.txt text/alice_pg11-0.txt eval/lambada_test.jsonl "
TEXTS += "eval/wikitext-2-test.txt eval/wikitext-2-valid.txt"
# What the pattern, the merges and UTF-8 each treat in a way of their own.
FRAGMENTS = [
    "'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", " the", "Hello", "x", " a", "0", "007", " 1234567",
    "½", "²", "٣", "!", " ?!", "...", "====", "_", "-", "<|endoftext|>", "<|", "zjqfl", "aaaaaaa",
    "é", "e\u0301", "ß", "ﬁ", "你好", "日本語", "한국어", "ไทย", "עִ", "हिन्दी", "😀", "👩\u200d👧", "🏳️",
    "\u200b", "\ufeff", "\ufffd", "\x00", "\x7f", " ", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\xa0",
    "\u3000", "\u2028", "\x1c", "\x85",
]  # fmt: skip

slow_but_right = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def texts() -> st.SearchStrategy[str]:
    """Any Unicode text, but for characters newer than Python's tables: those, tiktoken may not know either."""
    fragments = st.binary(max_size=10).map(
        lambda numbers: "".join(FRAGMENTS[n % len(FRAGMENTS)] for n in numbers)
    )
    return fragments | st.text(st.characters(exclude_categories=["Cs", "Cn"]))


@pytest.fixture(scope="module")
def gpt2() -> Encoder:
    return get_encoder()


@pytest.fixture(scope="module")
def oracle():
    """tiktoken's gpt2, made from the packaged files as tiktoken makes it from the downloaded ones."""
    return tiktoken_from(VOCABULARY)


def tiktoken_from(directory: Path):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would take the file of another directory for this one
        ranks = data_gym_to_mergeable_bpe_ranks(str(directory / "vocab.bpe"), str(directory / "encoder.json"))
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


# Ids


@pytest.mark.parametrize("name", TEXTS.split())
def test_ids_of_whole_texts_are_tiktokens(gpt2, oracle, assets, name):
    text = (assets / name).read_text(encoding="utf-8")
    ids = gpt2.encode(text)
    assert ids == oracle.encode_ordinary(text)
    assert gpt2.decode(ids) == text
    assert gpt2.encode(text) == ids  # now from memory


@settings(slow_but_right, max_examples=10_000)
@given(text=texts())
def test_ids_of_any_text_are_tiktokens(gpt2, oracle, text):
    ids = gpt2.encode(text)
    assert ids == oracle.encode_ordinary(text)
    assert gpt2.decode(ids) == text
    assert gpt2.encode(text, allowed_special="all") == oracle.encode(text, allowed_special="all")


@pytest.mark.parametrize("chunk", [1, 1 << 16])
def test_ids_of_all_pairs_of_fragments_whole_and_cut_into_chunks(gpt2, oracle, chunk, monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK", chunk)
    for text in ("a" + first + second for first in FRAGMENTS for second in FRAGMENTS):
        assert gpt2.encode(text) == oracle.encode_ordinary(text), repr(text)
        assert [piece.text for piece in gpt2.explain(text)] == encoder.PATTERN.findall(text)


def test_every_character_is_a_letter_or_a_number_where_tiktoken_has_it_so(gpt2, oracle):
    characters = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    text = "".join(f"a{c}1{c}" for c in characters)
    assert gpt2.encode(text) == oracle.encode_ordinary(text)


def test_recorded_ids_and_counts(gpt2, assets):
    text = (assets / "text/tinyshakespeare_input.txt").read_text(encoding="utf-8")
    ninety_percent = int(len(text) * 0.9)
    assert len(gpt2.encode(text)) == 338_025
    assert len(gpt2.encode(text[:ninety_percent])) == 301_966  # nanoGPT, data/shakespeare/prepare.py
    assert len(gpt2.encode(text[ninety_percent:])) == 36_059
    assert len(gpt2.encode((assets / "text/the-verdict.txt").read_text(encoding="utf-8"))) == 5_145

    # llm.c, dev/data/tinyshakespeare.py: the end-of-text token before every speech; 32,768 ids for validation
    ids = gpt2.encode(
        "<|endoftext|>" + text.replace("\n\n", "\n\n<|endoftext|>"), allowed_special={"<|endoftext|>"}
    )
    assert len(ids) == 338_028
    recorded = np.load(assets / "reference/llmc_batches.npz")
    assert ids[:1281] == recorded["val_first1281"].tolist()
    assert ids[32_768:][:257] == recorded["train_first257"].tolist()


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Not all heroes wear capes.", [3673, 477, 10281, 5806, 1451, 274, 13]),  # the article
        ("hello world", [31373, 995]),  # tiktoken's tests
        ("hello <|endoftext|>", [31373, 1279, 91, 437, 1659, 5239, 91, 29]),
        ("Alan Turing theorized that computers would one day become",  # picoGPT's README
         [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]),
        ("The Eiffel Tower is in the city of", [464, 412, 733, 417, 8765, 318, 287, 262, 1748, 286]),  # nnsight
        ("Data visualization empowers users to", [6601, 32704, 795, 30132, 2985, 284]),  # Transformer Explainer
        ("", []),
    ],
)  # fmt: skip
def test_published_ids(gpt2, text, ids):
    assert gpt2.encode(text) == ids
    assert gpt2.decode(ids) == text


def test_published_ids_of_zeros(gpt2):
    of_zeros = [
        [15],
        [405],
        [830],
        [2388],
        [20483],
        [10535],
        [24598],
        [8269],
        [10535, 830],
        [8269, 405],
        [8269, 830],
    ]
    of_zeros += [[8269, 2388], [8269, 20483], [8269, 10535], [8269, 24598], [25645], [8269, 10535, 830]]
    assert [gpt2.encode("0" * n) for n in range(1, 18)] == of_zeros


def test_attributes_as_in_the_article(gpt2):
    assert [gpt2.decoder[i] for i in gpt2.encode("Not all heroes wear capes.")] == [
        "Not", "Ġall", "Ġheroes", "Ġwear", "Ġcap", "es", "."
    ]  # fmt: skip
    assert [gpt2.decoder[i] for i in gpt2.encode("zjqfl")] == ["z", "j", "q", "fl"]
    assert gpt2.encoder["Ġheroes"] == 10281
    assert (gpt2.n_vocab, gpt2.end_of_text, gpt2.special_tokens) == (50257, 50256, {"<|endoftext|>": 50256})


def test_special_tokens_only_when_allowed(gpt2, oracle):
    text = "one<|endoftext|> two <|endoftext|><|endoftext|>"
    assert 50256 not in gpt2.encode(text)
    assert gpt2.encode("hello <|endoftext|>", allowed_special="all") == [31373, 220, 50256]  # tiktoken's tests
    for allowed in ("all", {"<|endoftext|>"}, ["<|endoftext|>"]):
        assert gpt2.encode(text, allowed_special=allowed) == oracle.encode(text, allowed_special="all")
    assert gpt2.decode(gpt2.encode(text, allowed_special="all")) == text
    for wrong in ({"<|pad|>"}, "<|endoftext|>"):  # the second would be allowing its letters
        with pytest.raises(EncoderError, match="is no special token here"):
            gpt2.encode(text, allowed_special=wrong)


def test_of_special_tokens_that_begin_alike_the_longest_counts():
    encoder_ = Encoder(BYTES | {"<|a|>": 256, "<|a|>b": 257, "<|a|>bc": 258}, [])
    assert encoder_.encode("<|a|>bcd<|a|>", "all") == [258, BYTES["d"], 256]
    assert encoder_.encode("<|a|>bcd", {"<|a|>", "<|a|>b"}) == [257, BYTES["c"], BYTES["d"]]


def test_half_a_surrogate_pair_is_named_with_its_place(gpt2):
    with pytest.raises(EncoderError, match=r"character 5 of the text is '\\ud83d'"):
        gpt2.encode("hello\ud83d!")
    with pytest.raises(EncoderError, match=r"character 0 of the text is '\\udc00'"):
        gpt2.explain("\udc00")


@pytest.mark.parametrize("text", ["a" * 4000, "zq" * 2000, "😀" * 1000, "=" * 4000], ids=lambda text: text[:2])
def test_the_work_grows_with_the_length_not_with_its_square(gpt2, text):
    class Counted(dict):
        looked_up = 0

        def get(self, *arguments):
            self.looked_up += 1
            return super().get(*arguments)

    def work(text: str) -> int:
        vocabulary = copy.copy(gpt2)
        vocabulary.bpe_ranks = Counted(gpt2.bpe_ranks)
        vocabulary.encode(text)
        return vocabulary.bpe_ranks.looked_up

    assert work(text + text) < 2.1 * work(text) < 2.1 * 10 * len(text.encode())


def test_memory_of_words_is_bounded(gpt2, oracle, monkeypatch):
    monkeypatch.setattr(encoder, "MOST_KNOWN", 50)
    small = Encoder(gpt2.encoder, list(gpt2.bpe_ranks))
    text = " ".join(str(n) for n in range(1000)) + " " + "x" * 1000
    assert small.encode(text) == small.encode(text) == oracle.encode_ordinary(text)
    assert 0 < len(small._known) <= 50
    assert max(map(len, small._known)) <= encoder.LONGEST_KNOWN


# Decoding


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_numpy_ids(gpt2, dtype):
    ids = np.array([15496, 995], dtype=dtype)
    assert gpt2.decode(ids) == gpt2.decode(list(ids)) == "Hello world"
    assert gpt2.stream_decoder().feed(ids[0]) == "Hello"
    assert gpt2.decode_bytes(ids) == b"Hello world"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 50257], "no token has the id 50257; ids are 0 to 50256"),
        (np.array([-1]), "no token has the id -1"),
        ([1.0], "'float' object cannot be interpreted as an integer"),
        (["a"], "'str' object"),
        ([None], "'NoneType' object"),
        (5, "'int' object is not iterable"),
        ([[1, 2]], "'list' object"),
    ],
)
def test_what_is_no_id_is_refused(gpt2, ids, message):
    with pytest.raises(EncoderError, match=message):
        gpt2.decode(ids)


def id_lists():
    """Ids of any tokens, the 256 single bytes more often: they make every kind of broken UTF-8."""
    return st.lists(st.integers(0, 255) | st.sampled_from(range(94, 256)) | st.integers(0, 50256), max_size=30)


@settings(slow_but_right, max_examples=1000)
@given(ids=id_lists())
def test_streamed_text_is_the_decoded_text(gpt2, oracle, ids):
    stream = gpt2.stream_decoder()
    pieces = [stream.feed(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == gpt2.decode(ids) == oracle.decode(ids)
    assert gpt2.decode_bytes(ids) == oracle.decode_bytes(ids)
    assert stream.feed(15496) + stream.flush() == "Hello"  # after flush, ready for more


def test_streaming_waits_for_whole_characters_and_no_longer(gpt2):
    text = "naïve 👩‍👩‍👧 日本語 😀 ok"
    ids = gpt2.encode(text)
    stream = gpt2.stream_decoder()
    seen = ""
    for n, i in enumerate(ids, 1):
        seen += stream.feed(i)
        assert seen == gpt2.decode_bytes(ids[:n]).decode("utf-8", "ignore")
    assert (seen, stream.flush()) == (text, "")


# Showing the work


def replayed(piece) -> list[str]:
    row = dict(enumerate(piece.symbols))
    for merge in piece.merges:
        assert (row[merge.start], row.pop(merge.start + len(merge.left))) == (merge.left, merge.right)
        row[merge.start] = merge.left + merge.right
    return list(row.values())


@settings(slow_but_right, max_examples=500)
@given(text=texts())
def test_explained_merges_lead_to_the_ids(gpt2, oracle, text):
    pieces = gpt2.explain(text)
    assert "".join(piece.text for piece in pieces) == text
    assert [i for piece in pieces for i in piece.ids] == oracle.encode_ordinary(text)
    for piece in pieces:
        assert replayed(piece) == piece.tokens == [gpt2.decoder[i] for i in piece.ids]
        assert all(gpt2.bpe_ranks[merge.left, merge.right] == merge.rank for merge in piece.merges)


def test_explain_gives_the_merges_in_order(gpt2):
    (piece,) = gpt2.explain(" capes")
    assert piece.symbols == "Ġcapes"
    assert [(merge.left, merge.right) for merge in piece.merges] == [
        ("Ġ", "c"),
        ("e", "s"),
        ("a", "p"),
        ("Ġc", "ap"),
    ]
    assert (piece.tokens, piece.ids) == (["Ġcap", "es"], [1451, 274])


def test_merging_ends_in_the_word_that_encode_looks_up(gpt2):
    """`encode` takes a word of the vocabulary without merging. That is right only if merging ends there."""
    ends = {token: gpt2._merge(token)[0] for token in gpt2._words}
    assert {token: end for token, end in ends.items() if end != [token]} == {}


# Vocabulary files


def test_save_writes_openais_files_to_the_byte(gpt2, tmp_path):
    gpt2.save(tmp_path / "new" / "model")
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "new" / "model" / name).read_bytes() == (VOCABULARY / name).read_bytes()
    assert len(list((tmp_path / "new" / "model").iterdir())) == 2


def small_tokenizer(special_tokens=()):
    """A vocabulary of 400 learnt by the `tokenizers` library, and that library's own tokenizer for it."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator(
        text, vocab_size=400, special_tokens=list(special_tokens), show_progress=False
    )
    return tokenizer


def test_small_vocabulary_round_trip(tmp_path):
    tokenizer = small_tokenizer()
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"] | {"<|endoftext|>": 400}
    Encoder(vocabulary, [tuple(merge) for merge in model["merges"]]).save(tmp_path)
    small, theirs = get_encoder(tmp_path), tiktoken_from(tmp_path)
    text = "def test_the_work():\n    return 'naïve 😀'  # <|endoftext|>"
    assert small.encode(text) == theirs.encode_ordinary(text) == tokenizer.encode(text).ids
    assert small.encode(text, "all") == theirs.encode(text, allowed_special="all")
    assert small.decode(small.encode(text, "all")) == text
    assert (small.n_vocab, small.end_of_text, small.special_tokens) == (401, 400, {"<|endoftext|>": 400})


def test_vocabulary_without_end_of_text(tmp_path):
    small_tokenizer().save_model(str(tmp_path))
    assert get_encoder(tmp_path).end_of_text is None
    assert get_encoder(str(tmp_path)).encode("<|endoftext|>", "all") == get_encoder(tmp_path).encode(
        "<|endoftext|>"
    )


def test_vocab_json_and_merges_txt_of_the_tokenizers_library(tmp_path):
    tokenizer = small_tokenizer(["<|endoftext|>", "<pad>"])
    tokenizer.save_model(str(tmp_path))
    (tmp_path / "added_tokens.json").write_text('{"<|im start|>": 400, "zebra": 401}', encoding="utf-8")
    small = get_encoder(tmp_path)
    assert small.special_tokens == {"<|endoftext|>": 0, "<pad>": 1, "<|im start|>": 400, "zebra": 401}
    assert small.encode("import pytest") == tokenizer.encode("import pytest").ids
    assert small.encode("zebra") == tokenizer.encode("zebra").ids
    assert small.encode("<|im start|>zebra<pad>", "all") == [400, 401, 1]
    assert small.decode([400, 401, 1]) == "<|im start|>zebra<pad>"
    with pytest.raises(EncoderError, match="cannot say that 'zebra' is a special token"):
        small.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tokenizer_json_of_the_tokenizers_library(tmp_path):
    tokenizer = small_tokenizer(["<|endoftext|>"])
    tokenizer.add_special_tokens(["<pad>", "two words"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    small = get_encoder(tmp_path)
    text = "<pad>import two words<|endoftext|>pytest"
    assert small.encode(text, "all") == tokenizer.encode(text).ids
    assert small.decode(small.encode(text, "all")) == text


def test_merges_of_a_tokenizer_json_as_strings_and_as_lists(tmp_path):
    for merges in (["h e", "he l"], [["h", "e"], ["he", "l"]]):
        model = TOKENIZER_JSON["model"] | {"vocab": BYTES | TOKENS, "merges": merges}
        content = TOKENIZER_JSON | {"model": model, "added_tokens": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        assert get_encoder(tmp_path).encode("hello") == [257, BYTES["l"], BYTES["o"]]


def test_directory_that_transformers_saved(gpt2, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer(vocab=gpt2.encoder, merges=list(gpt2.bpe_ranks))
    theirs.add_special_tokens({"pad_token": "<pad>"})
    theirs.save_pretrained(tmp_path)
    ours = get_encoder(tmp_path)
    text = "Hello, 世界!\n\n  <|endoftext|> I'm <pad> done\t "
    assert ours.encode(text, "all") == theirs.encode(text)
    assert (ours.n_vocab, ours.end_of_text, ours.special_tokens["<pad>"]) == (50258, 50256, 50257)


BYTES = {symbol: i for i, symbol in enumerate(sorted(encoder.SYMBOL_OF_BYTE.values()))}


def write_pair(directory: Path, tokens, merges: str | bytes) -> None:
    """The two files of a vocabulary. `tokens`, if a dict, come after the bytes; else they are encoder.json."""
    tokens = json.dumps(BYTES | tokens) if isinstance(tokens, dict) else tokens
    for name, content in (("encoder.json", tokens), ("vocab.bpe", merges)):
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


TOKENS, MERGES = {"he": 256, "hel": 257}, "#version: 0.2\nh e\nhe l\n"


@pytest.mark.parametrize("merges", [MERGES, "h e\nhe l\n", "h e\nhe l", MERGES.replace("\n", "\r\n")])
def test_merges_with_and_without_header_and_line_ends(tmp_path, merges):
    write_pair(tmp_path, TOKENS, merges)
    assert get_encoder(tmp_path).encode("hello") == [257, BYTES["l"], BYTES["o"]]


@pytest.mark.parametrize(
    ("tokens", "merges", "message"),
    [
        ('{"!": 0', MERGES, "cannot read encoder.json: Expecting"),
        ("", MERGES, "cannot read encoder.json"),
        ("[" * 100_000, MERGES, "cannot read encoder.json"),
        (b'{"\xff": 0}', MERGES, "cannot read encoder.json.*0xff in position 2"),
        (TOKENS, b"h e\nhe \xc4", "cannot read vocab.bpe.*0xc4 in position 7"),
        ("[1, 2]", MERGES, "not laid out as it should be"),
        ("null", MERGES, "not laid out as it should be"),
        ({"he": [256], "hel": 257}, MERGES, "not laid out as it should be"),
        ({"he": 256, "hel": 256}, MERGES, "'he' has id 256: ids are 0 to 257, each once"),
        ({"he": 256, "hel": 258}, MERGES, "'hel' has id 258"),
        ({"he": 256, "hel": -1}, MERGES, "'hel' has id -1"),
        ({"he": 256, "hel": "257"}, MERGES, "'hel' has id '257'"),
        ({"he": 256, "hel": 257.0}, MERGES, r"'hel' has id 257\.0"),
        ({"!": False, **TOKENS}, MERGES, "'!' has id False"),
        ("{}", MERGES, "lacks '!', the symbol of a byte"),
        (json.dumps({symbol.replace("A", "he"): i for symbol, i in BYTES.items()}), "h e\n", "lacks 'A'"),
        ({"he": 256}, MERGES, "merge 1, 'he l', makes no token of the vocabulary"),
        (TOKENS | {"lo": 258}, MERGES, "no merge makes the token 'lo': is the list of merges cut short"),
        (TOKENS | {"▁lo!": 258}, MERGES, "no merge makes the token '▁lo!'"),
        (TOKENS | {"": 258}, MERGES, "no merge makes the token ''"),
        (TOKENS | {"ð!": 258}, MERGES, "no merge makes the token 'ð!'"),
        (TOKENS, "#version: 0.2\nh e\n", "no merge makes the token 'hel'"),
        (TOKENS, "", "the merge '' is not two symbols"),
        (TOKENS, "#version: 0.2\nh e\nhel\n", "the merge 'hel' is not two symbols"),
        (TOKENS, "#version: 0.2\nh e\n\nhe l\n", "the merge '' is not two symbols"),
        (TOKENS, "#version: 0.2\nh e\nh e l\n", "the merge 'h e l' is not two symbols"),
        (TOKENS, MERGES + "l o\n", "merge 2, 'l o', makes no token"),
        (TOKENS, MERGES + "h e\n", "'h e', is in the list twice"),
        (TOKENS, "<!DOCTYPE html>\n", "'<!DOCTYPE html>', makes no token"),
    ],
)
def test_damaged_files_are_named_with_what_is_wrong(tmp_path, tokens, merges, message):
    write_pair(tmp_path, tokens, merges)
    with pytest.raises(EncoderError, match=message) as raised:
        get_encoder(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, PicogptError)


def test_missing_files_are_named(tmp_path):
    for directory in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EncoderError, match=f"{directory} holds no vocabulary: it needs encoder.json"):
            get_encoder(directory)
    write_pair(tmp_path, TOKENS, MERGES)
    (tmp_path / "vocab.bpe").unlink()
    with pytest.raises(EncoderError, match=r"cannot read vocab.bpe: .*No such file"):
        get_encoder(tmp_path)


TOKENIZER_JSON = {
    "added_tokens": [{"id": 257, "content": "<|endoftext|>", "special": True}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "vocab": BYTES | {"he": 256}, "merges": ["h e"]},
}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", {"type": "WordPiece"}, "model.type is 'WordPiece'"),
        ("model", {"type": "Unigram"}, "model.type is 'Unigram'"),
        ("model", {"dropout": 0.1}, "model.dropout is 0.1"),
        ("model", {"byte_fallback": True}, "model.byte_fallback is True"),
        ("model", {"end_of_word_suffix": "</w>"}, "model.end_of_word_suffix is '</w>'"),
        ("model", {"continuing_subword_prefix": "##"}, "model.continuing_subword_prefix is '##'"),
        ("model", {"merges": None}, "not laid out"),
        ("model", {"merges": [["h", "e", "l"]]}, "the merge 'h e l' is not two symbols"),
        ("model", {"merges": [["", "he"]]}, "the merge ' he' is not two symbols"),
        ("model", {"vocab": None}, "not laid out"),
        ("normalizer", {"type": "NFC"}, "normalizer.type is 'NFC'"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}, "pre_tokenizer.type is 'Sequence'"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer.type is 'Whitespace'"),
        ("pre_tokenizer", {"add_prefix_space": True}, "pre_tokenizer.add_prefix_space is True"),
        ("pre_tokenizer", {"use_regex": False}, "pre_tokenizer.use_regex is False"),
        ("pre_tokenizer", None, "pre_tokenizer.type is None"),
        ("added_tokens", [{"id": 300, "content": "<pad>"}], "'<pad>' has id 300"),
        ("added_tokens", [{"id": 256, "content": "<pad>"}], "'he' has id 256"),
        ("added_tokens", ["<pad>"], "not laid out"),
        ("added_tokens", [{"id": 257, "content": "\ud800"}], "not laid out"),
        ("model", None, "not laid out"),
    ],
)  # fmt: skip
def test_tokenizer_json_of_another_kind_is_refused_by_name(tmp_path, part, change, message):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(TOKENIZER_JSON), encoding="utf-8")
    assert get_encoder(tmp_path).encode("he<|endoftext|>", "all") == [256, 257]
    new = (TOKENIZER_JSON[part] or {}) | change if isinstance(change, dict) else change
    file.write_text(json.dumps(TOKENIZER_JSON | {part: new}), encoding="utf-8")
    with pytest.raises(EncoderError, match=message) as raised:
        get_encoder(tmp_path)
    assert "tokenizer.json" in str(raised.value)
    assert "\n" not in str(raised.value)


# The command


def command(*arguments: str, stdin: str | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "picogpt.encoder", *arguments],
        input=stdin.encode() if stdin is not None else None,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
    )


CAPES = """\
' capes'
  bytes       Ġ c a p e s
  merge 13    Ġc a p e s
  merge 18    Ġc a p es
  merge 243   Ġc ap es
  merge 1195  Ġcap es
  tokens      Ġcap es
  ids         1451 274
"""


def test_command_in_utf8_whatever_the_platform_says():
    old_platform = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    result = command(" capes", **old_platform)
    assert (result.returncode, result.stdout.decode("utf-8"), result.stderr) == (0, CAPES, b"")
    assert command("-", stdin=" capes\n", **old_platform).stdout.decode("utf-8") == CAPES
    assert command(stdin=" capes").stdout.decode("utf-8") == CAPES


@pytest.mark.parametrize("text", ["--help", "1e3", "[1, 2]", "None", "😀", ""])
def test_text_is_text_whatever_it_looks_like(gpt2, text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encoder", text])
    assert encoder.main() == 0
    ids = [line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ids")]
    assert [int(i) for row in ids for i in row] == gpt2.encode(text)


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["encoder", " capes"])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")  # empty is not set: no-color.org
    assert encoder.main() == 0
    assert capsys.readouterr().out == CAPES
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert encoder.main() == 0
    coloured = capsys.readouterr().out
    assert "\n  merge 243   Ġc \x1b[1;32map\x1b[0m es\n" in coloured
    assert coloured.replace("\x1b[1;32m", "").replace("\x1b[0m", "") == CAPES
    for name, value in ("NO_COLOR", "1"), ("TERM", "dumb"):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            assert encoder.main() == 0
            assert capsys.readouterr().out == CAPES


def test_command_errors_are_one_line(tmp_path):
    for arguments, stdin, message in [
        (["a", str(tmp_path)], None, "holds no vocabulary"),
        (["several", "words", "bare"], None, "usage"),
    ]:
        result = command(*arguments, stdin=stdin)
        assert (result.returncode, result.stdout) == (2, b"")
        assert message in result.stderr.decode() and result.stderr.count(b"\n") == 1


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "picogpt.encoder", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    running = subprocess.Popen(command, cwd=Path(__file__).parents[1], **pipes)
    running.stdin.write(b"word " * 20_000)
    running.stdin.close()
    assert running.stdout.readline() == b"'word'\n"
    running.stdout.close()
    assert running.stderr.read() == b"" and running.wait() == 0


def test_import_is_light():
    script = "import sys, picogpt.encoder; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    heavy = {
        "numpy",
        "requests",
        "tiktoken",
        "tokenizers",
        "transformers",
        "tensorflow",
        "torch",
        "jax",
        "fire",
        "tqdm",
    }
    assert "regex" in result.stdout.split() and not heavy & set(result.stdout.split())


@pytest.mark.skipif(os.name == "nt", reason="POSIX redirections")
@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        ("text >/dev/full", "cannot write to standard output: No space left on device\n"),
        ("text >&-", "standard output is closed: there is nowhere to write to\n"),
        ("- <&-", "standard input is closed: give the text as an argument\n"),
    ],
)
def test_streams_that_cannot_be_used(redirection, message):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = f'"{sys.executable}" -m picogpt.encoder {redirection}'
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (result.returncode, result.stderr) == (2, f"picogpt: {message}")
