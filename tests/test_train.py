"""Training: the loss against torch, what dropout and weight decay touch, a run that resumes as it stopped."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from picogpt import train
from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.encoder import get_encoder
from picogpt.model import gpt2, with_taps

HPARAMS = {"n_vocab": 300, "n_ctx": 16, "n_embd": 24, "n_head": 3, "n_layer": 2}
TEXT = "\n\n".join(
    f"Speaker {i % 7}:\nIt is said {i} times that {i * i} is more than enough of it." for i in range(300)
)
SMALL = {"n_vocab": 300, "n_ctx": 16, "n_embd": 24, "n_head": 3, "n_layer": 1, "batch_size": 4, "eval_every": 5}


@pytest.fixture
def params():
    return train.init_params(HPARAMS, seed=1)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_loss_is_torchs_cross_entropy(params):
    torch = pytest.importorskip("torch")
    ids = np.random.default_rng(0).integers(300, size=17)
    logits = torch.tensor(gpt2(ids[:-1], **params, n_head=3))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])).item()
    assert float(train.lm_loss(params, jax.numpy.asarray(ids), 3)) == pytest.approx(expected, rel=1e-5)


def test_initial_parameters_follow_openais_rule(params):
    small = 0.02 / 2  # sqrt(2 n_layer) is 2
    block = params["blocks"][1]
    for array, std in [
        (params["wte"], 0.02),
        (params["wpe"], 0.01),
        (block["attn"]["c_attn"]["w"], 0.02),
        (block["attn"]["c_proj"]["w"], small),
        (block["mlp"]["c_fc"]["w"], 0.02),
        (block["mlp"]["c_proj"]["w"], small),
    ]:
        assert array.dtype == np.float32
        assert array.std() == pytest.approx(std, rel=0.15)
    assert (block["ln_1"]["g"] == 1).all() and (block["mlp"]["c_fc"]["b"] == 0).all()


def test_dropout_drops_its_share_in_four_kinds_of_places_and_keeps_the_mean(params):
    tap = train.dropout(0.25, jax.random.key(0))
    dropped = []

    def spy(name, x):
        y = tap(name, jax.numpy.ones_like(x))
        if y.min() == 0:
            dropped.append(name)
        return x

    gpt2(list(range(16)), **with_taps(params, spy), n_head=3)
    inside = [
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.hook_pattern", "hook_attn_out", "hook_mlp_out")
    ]
    assert dropped == ["blocks.0.hook_resid_pre", *inside]

    y = tap("blocks.0.hook_attn_out", jax.numpy.ones(100_000))
    assert float((y == 0).mean()) == pytest.approx(0.25, abs=0.01)
    assert float(y.mean()) == pytest.approx(1, abs=0.01)
    assert (tap("blocks.1.hook_attn_out", jax.numpy.ones(100_000)) != y).any()


def test_weight_decay_touches_matrices_only(params):
    optimizer = train.make_optimizer(1e-2, weight_decay=0.5, n_steps=100)
    state = optimizer.init(params)
    zeros = jax.tree.map(np.zeros_like, params)
    _, state = optimizer.update(zeros, state, params)  # the warm-up begins at a rate of 0
    updates, _ = optimizer.update(zeros, state, params)
    assert (updates["ln_f"]["g"] == 0).all()
    assert np.allclose(updates["wte"], -0.5 * 1e-2 / 10 * params["wte"], rtol=1e-4, atol=0)


def test_windows_are_a_function_of_seed_and_step(params):
    encoder = train.train_encoder(TEXT, 300)
    ids = encoder.encode(TEXT)
    windows = train.Windows(ids, encoder, 16, 50, seed=3)
    batch = windows.batch(7)
    assert batch.shape == (50, 17)
    assert (batch == train.Windows(ids, encoder, 16, 50, seed=3).batch(7)).all()
    assert (batch != windows.batch(8)).any()
    opened = [row for row in batch if row[0] == encoder.encoder["<|endoftext|>"]]
    assert 0 < len(opened) < 20
    assert all(encoder.decode(row[1:].tolist()).startswith("Speaker") for row in opened)


def test_vocabulary_gives_the_tokenizers_librarys_ids():
    from tokenizers import ByteLevelBPETokenizer

    encoder = train.train_encoder(TEXT, 300)
    peer = ByteLevelBPETokenizer(vocab=dict(encoder.encoder), merges=list(encoder.bpe_ranks))
    assert len(encoder.encoder) == 300 and encoder.encoder["<|endoftext|>"] == 299
    assert encoder.encode(TEXT) == peer.encode(TEXT).ids


def test_a_model_that_knows_nothing_scores_log_n_vocab(params):
    encoder = train.train_encoder(TEXT, 300)
    ids = encoder.encode(TEXT)
    nothing = jax.tree.map(np.zeros_like, params)
    whole = len(ids) // 16 * 16
    expected = whole * np.log(300) / len(encoder.decode(ids[:whole]))
    assert train.nats_per_character(nothing, ids, encoder, 16, 3) == pytest.approx(expected, rel=1e-5)


def test_training_learns_and_leaves_a_model_directory(text_file, tmp_path):
    best = train.train(text_file, str(tmp_path / "out"), n_steps=40, learning_rate=1e-2, average=0.5, **SMALL)
    encoder, hparams, params = load_encoder_hparams_and_params(str(tmp_path / "out"))
    assert hparams["n_vocab"] == 300
    border = len(TEXT) * 9 // 10
    ids = encoder.encode(TEXT[border:])
    assert train.nats_per_character(params, ids, encoder, 16, 3) == pytest.approx(best, rel=1e-5)
    untrained = train.init_params(hparams, seed=0)
    assert best < 0.8 * train.nats_per_character(untrained, ids, encoder, 16, 3)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(text_file, tmp_path, monkeypatch):
    def run(name):
        return train.train(text_file, str(tmp_path / name), n_steps=15, learning_rate=1e-2, **SMALL)

    through = run("through")
    batch = train.Windows.batch

    def interrupted(self, step):
        if step == 12:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Windows, "batch", interrupted)
        run("twice")
    assert run("twice") == through
    ours, theirs = (
        (tmp_path / name / "model.ckpt.data-00000-of-00001").read_bytes() for name in ("twice", "through")
    )
    assert ours == theirs


def test_a_state_of_another_run_or_a_damaged_one_is_refused(text_file, tmp_path):
    state = tmp_path / "out" / "training_state.npz"
    train.train(text_file, str(tmp_path / "out"), n_steps=5, **SMALL)
    for changes in ({"n_embd": 12}, {"n_head": 4}, {"seed": 1}, {"learning_rate": 1e-2}):
        with pytest.raises(train.TrainingError, match="of another run"):
            train.train(text_file, str(tmp_path / "out"), **{"n_steps": 5, **SMALL, **changes})
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(train.TrainingError, match="damaged"):
        train.train(text_file, str(tmp_path / "out"), n_steps=5, **SMALL)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--n_head", "0"], 2, "n_head is 0: it must be at least 1"),
        (["--dropout_rate", "1"], 2, "dropout_rate is 1.0"),
        (["--learning_rate", "abc"], 2, "invalid float value: 'abc'"),
        (["--foo", "3"], 2, "unrecognized arguments: --foo 3"),
        (["--n_ctx", "100000"], 2, "less than one window"),
    ],
)
def test_command_line_refuses_in_a_line(flags, status, message, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", text_file, "--output", str(tmp_path / "out"), *flags])
    try:
        assert train.main() == status
    except SystemExit as error:
        assert error.code == status
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_in_a_line(text_file, tmp_path):
    output = tmp_path / "out"
    for text, changes, message in [
        (str(tmp_path / "none.txt"), {}, "cannot read"),
        (text_file, {"n_head": 5}, "n_embd 24 is no multiple of n_head 5"),
        (text_file, {"n_ctx": 10_000}, "less than one window of 10000"),
    ]:
        with pytest.raises(train.TrainingError, match=message):
            train.train(text, str(output), **{**SMALL, **changes})
    assert not output.exists()


def test_training_encoder_survives_its_own_files(tmp_path):
    encoder = train.train_encoder(TEXT, 300)
    encoder.save(tmp_path)
    assert get_encoder(tmp_path).encode(TEXT) == encoder.encode(TEXT)


def test_the_loop_that_docs_questions_shows_tunes_a_model(tmp_path, monkeypatch):
    checkout = Path(__file__).parents[1]
    page = (checkout / "docs" / "questions.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    text = "Wherefore art thou Romeo? Because I am not Juliet.\n" * 60
    (tmp_path / "my.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"124M"', '"shakespeare"'), {})

    def loss(model):
        encoder, hparams, params = load_encoder_hparams_and_params(model)
        return train.lm_loss(
            jax.tree.map(np.asarray, params), np.array(encoder.encode(text)[:200]), hparams["n_head"]
        )

    assert loss("models/mine") < loss("shakespeare") - 0.5
