"""Train a small GPT-2 on a text: `python -m picogpt.train data/tinyshakespeare.txt --output models/mine`.

The loss is the article's, the forward pass is model.py run by JAX, the optimizer is AdamW from optax. The
vocabulary is byte-level BPE, learned from the training part of the text by the `tokenizers` library. What
comes out is a model directory in OpenAI's layout. Needs jax, optax and tokenizers.
"""

import argparse
import inspect
import json
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from tqdm import trange

from picogpt import PicogptError
from picogpt.checkpoint import save_checkpoint
from picogpt.encoder import END_OF_TEXT, Encoder, get_encoder
from picogpt.model import gpt2, with_taps
from picogpt.tensor_bundle import new_file

try:
    import jax
    import jax.numpy as jnp
    import optax
    from tokenizers import ByteLevelBPETokenizer
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"training needs {error.name}: pip install jax optax tokenizers", file=sys.stderr)
    sys.exit(2)

LEAST = {"n_vocab": 257, "seed": 0, "learning_rate": 0, "weight_decay": 0, "dropout_rate": 0, "average": 0}
NOT_OF_THE_RUN = ("eval_every", "patience")  # what may change when a run goes on


class TrainingError(PicogptError):
    """A text or a shape that cannot be trained on, or a run that does not belong to the output directory."""


def lm_loss(params, inputs, n_head):  # [n_seq + 1] -> []
    """Mean cross-entropy, in nats a token, of predicting each of the inputs from those before it."""
    x, y = inputs[:-1], inputs[1:]
    log_probabilities = jax.nn.log_softmax(gpt2(x, **params, n_head=n_head))
    return -jnp.take_along_axis(log_probabilities, y[:, None], axis=-1).mean()


def dropout(rate: float, key):
    """A tap that zeroes a share `rate` of the embeddings, the patterns and what each half of a block adds,
    and scales up the rest: the four places of OpenAI's GPT (Radford et al. 2018, section 4.1)."""

    def tap(name, x):
        if not name.endswith(("blocks.0.hook_resid_pre", "hook_pattern", "hook_attn_out", "hook_mlp_out")):
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(key, crc32(name.encode())), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0.0)

    return tap


def init_params(hparams: dict[str, int], seed: int) -> dict[str, Any]:
    """Random float32 parameters by OpenAI's rule: normal, standard deviation 0.02 (wpe 0.01), what writes to
    the residual stream divided by sqrt(2 n_layer) (Radford et al. 2019, section 2.3)."""
    rng = np.random.default_rng(seed)
    n_embd, n_layer = hparams["n_embd"], hparams["n_layer"]

    def normal(*shape, std=0.02):
        return (std * rng.standard_normal(shape)).astype(np.float32)

    def conv1d(n_in, n_out, std=0.02):
        return {"w": normal(n_in, n_out, std=std), "b": np.zeros(n_out, np.float32)}

    def norm():
        return {"g": np.ones(n_embd, np.float32), "b": np.zeros(n_embd, np.float32)}

    def block():
        small = 0.02 / (2 * n_layer) ** 0.5
        return {
            "ln_1": norm(),
            "attn": {"c_attn": conv1d(n_embd, 3 * n_embd), "c_proj": conv1d(n_embd, n_embd, small)},
            "ln_2": norm(),
            "mlp": {"c_fc": conv1d(n_embd, 4 * n_embd), "c_proj": conv1d(4 * n_embd, n_embd, small)},
        }

    return {
        "wte": normal(hparams["n_vocab"], n_embd),
        "wpe": normal(hparams["n_ctx"], n_embd, std=0.01),
        "blocks": [block() for _ in range(n_layer)],
        "ln_f": norm(),
    }


def train_encoder(text: str, n_vocab: int) -> Encoder:
    """Byte-level BPE of `n_vocab` tokens: 256 bytes, merges learned from `text`, and `<|endoftext|>` last."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=n_vocab - 1, min_frequency=2, show_progress=False)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return Encoder({**model["vocab"], END_OF_TEXT: len(model["vocab"])}, merges)


class Windows:
    """Batches of n_ctx + 1 ids cut at random places; every batch is a function of (seed, step) alone.

    A window that begins where a speech begins is given `<|endoftext|>` first, so that the model learns to
    open a text as well as to continue one.
    """

    def __init__(self, ids: list[int], encoder: Encoder, n_ctx: int, batch_size: int, seed: int):
        self.ids = np.array(ids, dtype=np.int32)
        self.n_ctx, self.batch_size, self.seed = n_ctx, batch_size, seed
        self.end_of_text = encoder.end_of_text
        blank = self.ids[: -n_ctx - 1] == encoder.encode("\n")[0]
        self.openings = np.flatnonzero(blank[:-1] & blank[1:]) + 2

    def batch(self, step: int) -> np.ndarray:  # -> [batch_size, n_ctx + 1]
        rng = np.random.default_rng((self.seed, step))
        starts = rng.integers(len(self.ids) - self.n_ctx, size=self.batch_size)
        windows = self.ids[starts[:, None] + np.arange(self.n_ctx + 1)]
        opened = np.flatnonzero(rng.random(self.batch_size) < 0.1)
        for row in opened if len(self.openings) else ():
            start = rng.choice(self.openings)
            windows[row] = [self.end_of_text, *self.ids[start : start + self.n_ctx]]
        return windows


def nats_per_character(params, ids: list[int], encoder: Encoder, n_ctx: int, n_head: int) -> float:
    """Loss on a text that begins with `<|endoftext|>`: whole windows of n_ctx without overlap, the total nats
    of their predictions over the characters they predict (what is left at the end, under a window, is not)."""
    n_windows = len(ids) // n_ctx
    sequence = np.array([encoder.end_of_text, *ids], dtype=np.int32)
    windows = sequence[np.arange(n_windows)[:, None] * n_ctx + np.arange(n_ctx + 1)]
    nats = sum(
        float(_window_losses(params, rows, n_head).sum())
        for rows in np.array_split(windows, n_windows // 16 + 1)
    )
    return nats * n_ctx / len(encoder.decode(ids[: n_windows * n_ctx]))


@partial(jax.jit, static_argnames="n_head")
def _window_losses(params, windows, n_head):  # [n_windows, n_ctx + 1] -> [n_windows]
    return jax.vmap(lm_loss, in_axes=(None, 0, None))(params, windows, n_head)


def make_optimizer(learning_rate: float, weight_decay: float, n_steps: int) -> optax.GradientTransformation:
    """AdamW with GPT-3's settings (Brown et al. 2020, appendix B): linear warm-up, cosine decay to a tenth,
    gradients clipped to norm 1, weight decay on matrices only (gains and biases are there to be large)."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, n_steps // 10), n_steps, end_value=learning_rate / 10
    )
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=weight_decay, mask=matrices),
    )


def make_step(optimizer: optax.GradientTransformation, n_head: int, dropout_rate: float, average: float):
    """One jitted update: `(state, windows, key) -> state, loss`. `state["average"]` is the moving average of
    the parameters, which generalizes better than the last of them (Polyak & Juditsky 1992)."""

    def mean_loss(params, windows, key):
        def one(window, key):
            return lm_loss(with_taps(params, dropout(dropout_rate, key)), window, n_head)

        return jax.vmap(one)(windows, jax.random.split(key, len(windows))).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state, windows, key):
        loss, gradients = jax.value_and_grad(mean_loss)(state["params"], windows, key)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        averaged = jax.tree.map(lambda a, p: average * a + (1 - average) * p, state["average"], params)
        return {"params": params, "average": averaged, "optimizer": optimizer_state}, loss

    return step


def read_and_split(path: str) -> tuple[str, str]:
    """The first 90 % of the characters of a text file, and the rest."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {path} as UTF-8 text: {error}") from None
    border = len(text) * 9 // 10
    return text[:border], text[border:]


def check(settings: dict[str, Any]) -> None:
    """Refuse numbers that nothing can be trained with."""
    for name, value in settings.items():
        if not value >= LEAST.get(name, 1) or (name in ("dropout_rate", "average") and value >= 1):
            raise TrainingError(
                f"{name} is {value}: it must be at least {LEAST.get(name, 1)}, and a rate below 1"
            )
    if settings["n_embd"] % settings["n_head"]:
        raise TrainingError(
            f"n_embd {settings['n_embd']} is no multiple of n_head {settings['n_head']}: make it one"
        )


def save_state(path: Path, state, **progress) -> None:
    """Write everything a later run needs to go on, whole or not at all."""
    leaves: Any = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    with new_file(path) as file:
        np.savez(file, **leaves, **progress)


def load_state(path: Path, state, run: str):
    """The state that `save_state` wrote in the same `run`, in the form of `state`, and its progress."""
    leaves, tree = jax.tree.flatten(state)
    try:
        with np.load(path, allow_pickle=False) as file:
            progress = {name: file[name].item() for name in file.files if not name.startswith("leaf")}
            if progress["run"] == run:
                saved = [jnp.asarray(file[f"leaf{i}"]) for i in range(len(leaves))]
                return jax.tree.unflatten(tree, saved), progress
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TrainingError(f"{path} is damaged ({error}): delete it to train anew") from None
    raise TrainingError(
        f"{path} is of another run, {progress['run']}: repeat its settings, or choose another --output"
    )


def train(
    text: str,
    output: str,
    n_vocab: int = 1024,
    n_ctx: int = 256,
    n_embd: int = 256,
    n_head: int = 4,
    n_layer: int = 3,
    batch_size: int = 16,
    n_steps: int = 1800,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    dropout_rate: float = 0.1,
    average: float = 0.99,
    eval_every: int = 100,
    patience: int = 8,
    seed: int = 0,
) -> float:
    """Train on the first 90 % of the file `text`, validate on the rest, keep the best model in `output`.

    Stops after `n_steps`, or when `patience` evaluations in a row have not improved. An interrupted run goes
    on where it was saved last when it is started again. Returns the best loss in nats a character.
    """
    settings = {name: value for name, value in locals().items() if name not in ("text", "output")}
    check(settings)
    directory = Path(output)
    state_path = directory / "training_state.npz"
    train_text, valid_text = read_and_split(text)
    digest = crc32((train_text + valid_text).encode())
    run = json.dumps(
        {**{k: v for k, v in settings.items() if k not in NOT_OF_THE_RUN}, "crc32_of_text": digest}
    )
    resuming = state_path.exists()
    encoder = get_encoder(directory) if resuming else train_encoder(train_text, n_vocab)
    train_ids, valid_ids = encoder.encode(train_text), encoder.encode(valid_text)
    if len(valid_ids) < n_ctx:
        raise TrainingError(
            f"{text}: the last tenth has {len(valid_ids)} tokens, less than one window of {n_ctx}"
        )
    if not resuming:
        encoder.save(directory)
    hparams = {
        "n_vocab": encoder.n_vocab,
        "n_ctx": n_ctx,
        "n_embd": n_embd,
        "n_head": n_head,
        "n_layer": n_layer,
    }

    windows = Windows(train_ids, encoder, n_ctx, batch_size, seed)
    optimizer = make_optimizer(learning_rate, weight_decay, n_steps)
    step = make_step(optimizer, n_head, dropout_rate, average)
    params = jax.tree.map(jnp.asarray, init_params(hparams, seed))
    state = {"params": params, "average": jax.tree.map(jnp.copy, params), "optimizer": optimizer.init(params)}
    progress: dict[str, Any] = {"run": run, "done": 0, "best": float("inf"), "best_at": 0}
    if resuming:
        state, progress = load_state(state_path, state, run)

    key = jax.random.key(seed, impl="rbg")
    bar = trange(progress["done"], n_steps, initial=progress["done"], total=n_steps, desc="training")
    for done in bar:
        state, loss = step(state, jnp.asarray(windows.batch(done)), jax.random.fold_in(key, done))
        progress["done"] = done + 1
        if progress["done"] % eval_every and progress["done"] != n_steps:
            continue
        valid = nats_per_character(state["average"], valid_ids, encoder, n_ctx, n_head)
        if valid < progress["best"]:
            progress["best"], progress["best_at"] = valid, done + 1
            save_checkpoint(directory, hparams, state["average"])
        bar.write(
            f"step {done + 1}: training {float(loss):.4f} nats a token, validation {valid:.4f} nats a character"
        )
        save_state(state_path, state, **progress)
        if done + 1 - progress["best_at"] >= patience * eval_every:
            break
    return progress["best"]


def main() -> int:
    """The command line: a flag for each argument of `train`."""
    usage = "python -m picogpt.train TEXT --output DIRECTORY [--flag value]... (--help lists the flags)"
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    for name, parameter in inspect.signature(train).parameters.items():
        if name == "text":
            parser.add_argument(name, help="the text, a UTF-8 file")
        elif name == "output":
            parser.add_argument("--output", required=True, help="the model directory to write")
        else:
            parser.add_argument(
                f"--{name}", type=parameter.annotation, default=parameter.default, help="%(default)s"
            )
    try:
        train(**vars(parser.parse_args()))
        return 0
    except KeyboardInterrupt:
        print("picogpt.train: interrupted; the same command goes on from the last evaluation", file=sys.stderr)
        return 130
    except PicogptError as error:
        print(f"picogpt.train: {error}", file=sys.stderr)
    except OSError as error:
        print(f"picogpt.train: {error.filename or 'output'}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
