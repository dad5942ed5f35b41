"""The decode loop against the article's, which reads everything anew for every token, and transformers'."""

import subprocess
import sys
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import LONG, astype, jax_params, random_ids, random_params, rounding_noise, transformers_model
from picogpt import PicogptError, generation
from picogpt.cache import KVCache, packed, with_attend
from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.encoder import get_encoder
from picogpt.generation import GenerationError, generate, stream, stream_text, streams
from picogpt.model import gpt2, with_taps
from picogpt.sampling import SamplingError

ROOT = Path(__file__).parents[1]
HPARAMS = {"n_vocab": 61, "n_ctx": 48, "n_embd": 32, "n_head": 4, "n_layer": 2}
N_HEAD, N_CTX = HPARAMS["n_head"], HPARAMS["n_ctx"]
PARAMS = random_params(**HPARAMS)
PROMPT = [3, 1, 4, 1, 5]


def article(inputs, params, n_head, n_tokens_to_generate):
    """The article's `generate`, without its side effect, and cropped as the lecture crops: the new ids, and how
    far each was ahead of the second best."""
    ids, margins, n_ctx = list(inputs), [], len(params["wpe"])
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids[-n_ctx:], **params, n_head=n_head)
        second, first = np.sort(logits[-1])[-2:]
        margins.append(first - second)
        ids.append(int(np.argmax(logits[-1])))
    return ids[len(ids) - n_tokens_to_generate :], margins


def packed_greedy(prompts, params, n_head, n_tokens_to_generate):
    """All prompts in one batch of packed rows, each with its own cache."""
    caches = [[KVCache(4) for _ in params["blocks"]] for _ in prompts]
    texts, new = [list(prompt) for prompt in prompts], prompts
    for _ in range(n_tokens_to_generate):
        lengths = [len(ids) for ids in new]
        attends = [packed(of_block, lengths) for of_block in zip(*caches, strict=True)]
        positions = [np.arange(len(text) - n, len(text)) for text, n in zip(texts, lengths, strict=True)]
        last_rows = np.cumsum(lengths) - 1
        logits = gpt2(
            [*chain(*new)],
            **with_attend(params, attends),
            n_head=n_head,
            position_ids=np.concatenate(positions),
            logits_to_keep=last_rows,
        )
        new = [[int(row.argmax())] for row in logits]
        texts = [text + ids for text, ids in zip(texts, new, strict=True)]
    return [text[-n_tokens_to_generate:] for text in texts]


def up_to_a_tie(ids, margins, noise):
    """What every right program must give: the ids before the first whose lead is within the noise."""
    return ids[: next((i for i, margin in enumerate(margins) if margin <= noise), len(ids))]


@pytest.fixture(scope="module")
def shakespeare():
    """Encoder, hparams and params of the model that comes with the project, and 50 lines it has not seen."""
    if not (ROOT / "models" / "shakespeare" / "hparams.json").exists():
        pytest.skip("needs models/shakespeare")
    encoder, hparams, params = load_encoder_hparams_and_params("shakespeare", ROOT / "models")
    lines = (ROOT / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8").splitlines()
    return encoder, hparams, params, [line for line in lines[-3000:] if line][::40][:50]


@pytest.fixture
def passes(monkeypatch):
    """How many tokens each forward pass of the decode loop reads, and how many rows of logits it makes."""
    seen = []

    def spy(inputs, *args, **kwargs):
        logits = gpt2(inputs, *args, **kwargs)
        seen.append((len(inputs), len(logits)))
        return logits

    monkeypatch.setattr(generation, "gpt2", spy)
    return seen


class TestGreedy:
    @pytest.mark.parametrize("lm_head", [False, True], ids=["tied", "lm_head"])
    def test_cached_and_packed_equal_the_article_on_50_prompts(self, lm_head):
        params, n = random_params(**HPARAMS, lm_head=lm_head, seed=1), 20
        prompts = [random_ids(1 + i % 25, HPARAMS["n_vocab"], seed=i) for i in range(50)]
        expected, margins = zip(*(article(prompt, params, N_HEAD, n) for prompt in prompts), strict=True)
        assert min(chain(*margins)) > 1e-9 and len(set(chain(*expected))) > 20
        assert [generate(prompt, params, N_HEAD, n) for prompt in prompts] == list(expected)
        assert packed_greedy(prompts, params, N_HEAD, n) == list(expected)

    def test_the_same_on_the_model_that_comes_with_the_project(self, shakespeare):
        encoder, hparams, params, lines = shakespeare
        n, prompts, n_compared = 12, [encoder.encode(line) for line in lines], 0

        def plain(params):
            return gpt2(prompts[0], **params, n_head=hparams["n_head"])

        noise = 8 * rounding_noise(plain, params)  # four times, for the first and for the second
        in_a_batch = packed_greedy(prompts, params, hparams["n_head"], n)
        for prompt, from_batch in zip(prompts, in_a_batch, strict=True):
            expected = up_to_a_tie(*article(prompt, params, hparams["n_head"], n), noise)
            assert generate(prompt, params, hparams["n_head"], n)[: len(expected)] == expected
            assert from_batch[: len(expected)] == expected
            n_compared += len(expected)
        assert len(prompts) == 50 and n_compared > 0.9 * n * len(prompts)

    def test_transformers_generate(self):
        torch = pytest.importorskip("torch")
        oracle = transformers_model(PARAMS, N_HEAD)
        for seed in range(5):
            prompt = random_ids(1 + 4 * seed, HPARAMS["n_vocab"], seed)
            settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            tokens = torch.tensor([prompt])
            ids = oracle.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[0].tolist()
            assert min(article(prompt, PARAMS, N_HEAD, 20)[1]) > 1e-9
            assert generate(prompt, PARAMS, N_HEAD, 20) == ids[len(prompt) :]

    def test_jax(self):
        pytest.importorskip("jax")
        params = astype(PARAMS, np.float32)
        noise = 8 * rounding_noise(lambda params: gpt2(PROMPT, **params, n_head=N_HEAD), params)
        expected = up_to_a_tie(*article(PROMPT, params, N_HEAD, 50), noise)
        ids = generate(PROMPT, jax_params(params), N_HEAD, 50, context="slide")
        assert len(expected) == 50 and ids == expected

    def test_taps_ride_along(self):
        def without_a_head(name, x):
            return x * np.array([1, 0, 1, 1])[:, None, None] if name.endswith("hook_z") else x

        tapped = with_taps(PARAMS, without_a_head)
        ids = generate(PROMPT, tapped, N_HEAD, 20)
        assert ids == article(PROMPT, tapped, N_HEAD, 20)[0] != generate(PROMPT, PARAMS, N_HEAD, 20)


class TestPromises:
    @pytest.mark.parametrize("inputs", [PROMPT, tuple(PROMPT), np.array(PROMPT), np.array(PROMPT, np.uint16)])
    def test_inputs_stay_as_they_are(self, inputs):
        before = list(inputs)
        ids = generate(inputs, PARAMS, N_HEAD, 7)
        assert list(inputs) == before
        assert ids == article(PROMPT, PARAMS, N_HEAD, 7)[0] and {type(i) for i in ids} == {int}

    @pytest.mark.parametrize("n", [0, 1, 2, 43])
    def test_exactly_so_many(self, n):
        assert (
            len(generate(PROMPT, PARAMS, N_HEAD, n)) == n == len(generate(PROMPT, PARAMS, N_HEAD, np.int64(n)))
        )

    def test_stop_ids_end_the_text_and_are_not_part_of_it(self):
        ids = generate(PROMPT, PARAMS, N_HEAD, 20)
        for i in (0, 5):
            until = ids.index(ids[i])
            for stop_ids in ([ids[i]], {ids[i], 60}, (60, ids[i])):
                assert generate(PROMPT, PARAMS, N_HEAD, 20, stop_ids=stop_ids) == ids[:until]
        never = set(range(HPARAMS["n_vocab"])) - set(ids)
        assert generate(PROMPT, PARAMS, N_HEAD, 20, stop_ids=never) == ids

    def test_what_is_already_in_the_prompt_does_not_stop(self):
        ids = generate(PROMPT, PARAMS, N_HEAD, 1)
        assert generate([*ids, *PROMPT], PARAMS, N_HEAD, 5, stop_ids=PROMPT[-1:]) != []


class TestCost:
    def test_prefill_makes_one_row_of_logits_and_a_step_reads_one_token(self, passes):
        generate(PROMPT, PARAMS, N_HEAD, 10)
        assert passes == [(5, 1)] + [(1, 1)] * 9

    def test_ids_come_when_they_are_asked_for(self, passes):
        ids = stream(PROMPT, PARAMS, N_HEAD, 3)
        assert passes == []
        for expected in ([(5, 1)], [(5, 1), (1, 1)], [(5, 1), (1, 1), (1, 1)]):
            next(ids)
            assert passes == expected
        assert list(ids) == [] and len(passes) == 3

    def test_nothing_is_read_for_no_tokens(self, passes):
        assert generate(PROMPT, PARAMS, N_HEAD, 0) == [] == passes

    def test_nothing_is_read_after_a_stop(self, passes):
        first = generate(PROMPT, PARAMS, N_HEAD, 1)
        passes.clear()
        assert generate(PROMPT, PARAMS, N_HEAD, 9, stop_ids=first) == []
        assert passes == [(5, 1)]

    def test_several_samples_share_the_prefill(self, passes):
        samples = [
            list(ids) for ids in streams(PROMPT, PARAMS, N_HEAD, 4, num_samples=3, temperature=1, seed=0)
        ]
        assert [len(ids) for ids in samples] == [4, 4, 4]
        assert passes == [(5, 1)] + [(1, 1)] * 9

    def test_past_the_window_everything_is_read_anew(self, passes):
        generate([0] * (N_CTX - 2), PARAMS, N_HEAD, 5, context="slide")
        assert passes == [(N_CTX - 2, 1), (1, 1), (1, 1), (N_CTX, 1), (N_CTX, 1)]


SETTINGS = {"temperature": 1.5, "top_k": 30, "top_p": 0.95}


class TestSamples:
    def test_the_i_th_draws_with_seed_plus_i(self):
        alone = [generate(PROMPT, PARAMS, N_HEAD, 12, seed=7 + i, **SETTINGS) for i in range(3)]
        several = streams(PROMPT, PARAMS, N_HEAD, 12, num_samples=3, seed=7, **SETTINGS)
        assert [list(ids) for ids in several] == alone
        assert alone[0] != alone[1] != alone[2]

    def test_they_may_be_read_in_any_order(self):
        def several():
            return streams(PROMPT, PARAMS, N_HEAD, 12, num_samples=3, seed=7, **SETTINGS)

        one_after_the_other = [list(ids) for ids in several()]
        assert [list(ids) for ids in zip(*several(), strict=True)] == [
            *map(list, zip(*one_after_the_other, strict=True))
        ]
        assert [list(ids) for ids in reversed(several())] == one_after_the_other[::-1]

    def test_the_plain_loop_with_the_same_draws(self):
        sample, ids = generation.make_sampler(**SETTINGS, seed=3), list(PROMPT)
        for _ in range(20):
            ids.append(sample(gpt2(ids, **PARAMS, n_head=N_HEAD)[-1]))
        assert generate(PROMPT, PARAMS, N_HEAD, 20, seed=3, **SETTINGS) == ids[5:]

    def test_jax(self):
        pytest.importorskip("jax")
        params = astype(PARAMS, np.float32)
        ours, theirs = (
            [list(ids) for ids in streams(PROMPT, tree, N_HEAD, 12, num_samples=2, seed=7, **SETTINGS)]
            for tree in (params, jax_params(params))
        )
        assert ours == theirs


class TestContext:
    @pytest.mark.parametrize("n_prompt", [1, N_CTX - 3, N_CTX - 1, N_CTX, N_CTX + 1, N_CTX + 9, 3 * N_CTX])
    def test_slide_is_the_lectures_crop_at_every_step(self, n_prompt):
        prompt = random_ids(n_prompt, HPARAMS["n_vocab"])
        expected, margins = article(prompt, PARAMS, N_HEAD, N_CTX + 5)
        assert min(margins) > 1e-9
        assert generate(prompt, PARAMS, N_HEAD, N_CTX + 5, context="slide") == expected

    def test_several_samples_slide_each_by_itself(self):
        several = streams(PROMPT, PARAMS, N_HEAD, N_CTX, num_samples=2, seed=7, context="slide", **SETTINGS)
        alone = [
            generate(PROMPT, PARAMS, N_HEAD, N_CTX, seed=7 + i, context="slide", **SETTINGS) for i in range(2)
        ]
        assert [list(ids) for ids in several] == alone

    def test_truncate_keeps_the_end_of_the_prompt(self):
        prompt = random_ids(N_CTX + 9, HPARAMS["n_vocab"])
        expected = generate(prompt[19:], PARAMS, N_HEAD, 10)
        assert generate(prompt, PARAMS, N_HEAD, 10, context="truncate") == expected
        assert generate(PROMPT, PARAMS, N_HEAD, 5, context="truncate") == generate(PROMPT, PARAMS, N_HEAD, 5)

    def test_the_whole_window_can_be_used(self):
        for context in ("error", "truncate", "slide"):
            assert len(generate([0] * (N_CTX - 1), PARAMS, N_HEAD, 1, context=context)) == 1


def test_taps_see_jax_generate_as_they_see_numpy():
    jax = pytest.importorskip("jax")
    seen = {}

    def look(name, x):
        seen.setdefault(len(x), []).append(name)
        return x

    arrays = jax.tree.map(jax.numpy.asarray, PARAMS)
    assert generate(PROMPT, with_taps(arrays, look), N_HEAD, 4) == generate(PROMPT, PARAMS, N_HEAD, 4)
    on_jax, seen = seen, {}
    generate(PROMPT, with_taps(PARAMS, look), N_HEAD, 4)
    assert on_jax == seen


def test_a_tap_may_generate_and_so_may_a_forked_process(monkeypatch):
    """Neither waits for the lock that the token being computed holds."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    params = random_params(**LONG, dtype=np.float32)
    prompt = random_ids(250, LONG["n_vocab"])
    expected = generate(prompt, params, LONG["n_head"], 3)
    seen = []

    def tap(name, x):
        if name == "ln_final.hook_scale":
            seen.append(generate(prompt, params, LONG["n_head"], 3))
        return x

    assert generate(prompt, with_taps(params, tap), LONG["n_head"], 3) == expected
    assert seen == [expected] * 3


class TestThreads:
    """A BLAS with several threads: long prompts are shared among as many."""

    LONG = random_params(**{**HPARAMS, "n_ctx": 400})
    IDS = random_ids(301, HPARAMS["n_vocab"])

    @pytest.fixture(autouse=True)
    def three_threads(self, monkeypatch):
        monkeypatch.setattr(generation, "blas_threads", lambda: 3)
        monkeypatch.setattr(generation, "ROWS_PER_THREAD", 100)

    def test_the_same_ids(self, passes):
        ids = generate(self.IDS, self.LONG, N_HEAD, 20)
        reads, n_rows = zip(*passes, strict=True)
        assert len(reads) == 3 + 19 and sum(reads[:3]) == 301 and sum(n_rows[:3]) == 1
        expected, margins = article(self.IDS, self.LONG, N_HEAD, 20)
        assert min(margins) > 1e-9 and ids == expected

    def test_a_tap_is_shown_whole_arrays(self):
        lengths = []

        def look(name, x):
            lengths.append(len(x))
            return x

        generate(self.IDS, with_taps({**self.LONG, "blocks": []}, look), N_HEAD, 1)
        assert lengths[:2] == [301, 301]

    def test_an_error_in_one_of_them_ends_all(self):
        """In a process of its own, which can be ended if the other threads wait for ever."""
        program = """
from models import random_ids, random_params
from picogpt import generation
from picogpt.cache import KVCache

def part(self, start, stop, wait, share=KVCache.part):
    def fail(q, k, v, tap):
        raise ValueError("in one of three threads")
    return fail if 0 < start and stop < 301 else share(self, start, stop, wait)

KVCache.part = part
generation.blas_threads, generation.ROWS_PER_THREAD = lambda: 3, 100
params = random_params(n_vocab=61, n_ctx=400, n_embd=32, n_layer=2)
generation.generate(random_ids(301, 61), params, 4, 20)
"""
        run = [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n{program}",
        ]
        result = subprocess.run(run, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1 and result.stderr.endswith("ValueError: in one of three threads\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "the prompt is empty: give at least one token, such as <|endoftext|>"),
        ({"inputs": "text"}, "the prompt is an array of <U4, shape (): give a list of token ids"),
        ({"inputs": [[1, 2]]}, "the prompt is an array of int64, shape (1, 2): give a list of token ids"),
        ({"inputs": [1.0]}, "the prompt is an array of float64, shape (1,): give a list of token ids"),
        ({"inputs": [[1], [2, 3]]}, "give a list of token ids"),
        ({"inputs": [1, 61]}, "token id 61 is not in the model's vocabulary: ids go from 0 to 60"),
        ({"inputs": [-1, 1]}, "token id -1 is not in the model's vocabulary: ids go from 0 to 60"),
        ({"n_tokens_to_generate": -1}, "n_tokens_to_generate is -1: give a whole number from 0"),
        ({"n_tokens_to_generate": 1.5}, "n_tokens_to_generate is 1.5: give a whole number from 0"),
        ({"num_samples": 0}, "num_samples is 0: give a whole number from 1"),
        ({"num_samples": True}, "num_samples is True: give a whole number from 1"),
        ({"context": "crop"}, 'context is \'crop\': give "error", "truncate" or "slide"'),
        (
            {"n_tokens_to_generate": 46},
            "5 tokens of prompt and 46 new ones are 3 more than the model's 48 positions: "
            'shorten the prompt, ask for fewer, or set context to "truncate" or "slide"',
        ),
        (
            {"n_tokens_to_generate": 48, "context": "truncate"},
            "5 tokens of prompt and 48 new ones are 5 more than the model's 48 positions, "
            'and truncating leaves no prompt: ask for fewer, or set context to "slide"',
        ),
        ({"temperature": -1}, "temperature is -1: give 0 (greedy) or more, such as 0.8"),
        ({"seed": -1}, "seed is -1: give a whole number from 0, or leave it out"),
        ({"seed": "abc"}, "seed is 'abc': give a whole number from 0, or leave it out"),
        ({"seed": True}, "seed is True: give a whole number from 0, or leave it out"),
    ],
    ids=str,
)
def test_errors_come_at_the_call(change, message):
    arguments = {
        "inputs": PROMPT,
        "params": PARAMS,
        "n_head": N_HEAD,
        "n_tokens_to_generate": 5,
        "num_samples": 1,
    }
    with pytest.raises((GenerationError, SamplingError)) as caught:
        streams(**{**arguments, **change})
    assert str(caught.value).endswith(message) and "\n" not in str(caught.value)
    assert isinstance(caught.value, PicogptError)


ENCODER = get_encoder()
ID_OF_BYTE = {byte: ENCODER.encode(chr(byte))[0] for byte in range(128)}


def up_to_stop(text, stop):
    """What `stream_text` promises, letter by letter: the text before the stop string that is complete first."""
    for read in accumulate(text, initial=""):
        ends = [len(s) for s in stop if read.endswith(s)]
        if ends:
            return read[: len(read) - max(ends)]
    return text


class TestStreamText:
    def test_without_stop_strings_text_comes_token_by_token(self):
        ids = ENCODER.encode("To be, or not to be")
        assert "".join(stream_text(ids, ENCODER)) == "To be, or not to be"
        pieces = stream_text(iter(ids), ENCODER)
        assert [next(pieces), next(pieces)] == ["To", " be"]

    def test_the_stop_string_is_not_part_of_it(self):
        assert "".join(stream_text(ENCODER.encode("yes\n\nno"), ENCODER, ["\n\n"])) == "yes"
        assert "".join(stream_text(ENCODER.encode("\n\nno"), ENCODER, ["\n\n"])) == ""
        assert "".join(stream_text(ENCODER.encode("yes. no"), ENCODER, ["?", "."])) == "yes"

    def test_no_more_ids_are_asked_for_than_needed(self):
        ids = iter(ENCODER.encode("one two three four five"))
        assert "".join(stream_text(ids, ENCODER, [" three"])) == "one two"
        assert ENCODER.decode(list(ids)) == " four five"

    def test_split_over_tokens(self):
        ids = [ID_OF_BYTE[byte] for byte in b"wherefore art thou"]
        pieces = list(stream_text(ids, ENCODER, ["art thou"]))
        assert "".join(pieces) == "wherefore " and pieces[:10] == list("wherefore ")

    def test_what_only_began_like_a_stop_string_is_given_out_at_once(self):
        ids = [ID_OF_BYTE[byte] for byte in b"ababac"]
        pieces = [piece for piece in stream_text(ids, ENCODER, ["abac!"]) if piece]
        assert pieces == ["ab", "abac"]
        assert [piece for piece in stream_text(ids[:3], ENCODER, ["abac!"]) if piece] == ["aba"]

    def test_characters_come_whole(self):
        """Four tokens for an emoji, none of them a character; then half of one at the end."""
        ids = [*ENCODER.encode("é🏳👩"), *ENCODER.encode("🏳")[:1]]
        pieces = [piece for piece in stream_text(ids, ENCODER) if piece]
        assert pieces == ["é", "🏳", "👩", "\ufffd"]
        assert "".join(stream_text(ids, ENCODER, ["👩"])) == "é🏳"

    def test_invalid_utf_8(self):
        broken = ENCODER.encode("🏳")[0]
        assert "".join(stream_text([broken, *ENCODER.encode("ok"), broken], ENCODER)) == "\ufffdok\ufffd"
        assert "".join(stream_text([broken, *ENCODER.encode("ok"), broken], ENCODER, ["k\ufffd"])) == "\ufffdo"

    @settings(deadline=None)
    @given(
        st.lists(st.text("ab", min_size=1, max_size=4), max_size=8),
        st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    )
    def test_it_does_not_matter_how_the_text_is_cut(self, pieces, stop):
        ids = [*chain(*map(ENCODER.encode, pieces))]
        assert "".join(stream_text(ids, ENCODER, stop)) == up_to_stop("".join(pieces), stop)
