"""Whether real weights give what others have published: `python -m picogpt.check --model_size 124M`.

First the files, as verify.py checks them, with the CRC of every tensor. Then, of the 124M, outputs that other
programs printed and their authors published, each with its source; what came from programs with another GELU is
left out. Of the other sizes nothing comparable is published that needs no more than the weights.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from picogpt.checkpoint import download_command, load_encoder, load_hparams_and_params
from picogpt.command import UsageError, exit_status, write
from picogpt.encoder import END_OF_TEXT, Encoder
from picogpt.generation import generate
from picogpt.model import gpt2, softmax
from picogpt.model_dirs import OPENAI_SIZES, find_model_dir, model_dirs
from picogpt.trace import run_with_trace, with_outs
from picogpt.verify import verify


class Model(NamedTuple):
    """What a fact is about."""

    encoder: Encoder
    params: dict[str, Any]
    n_head: int


class Fact(NamedTuple):
    """Something published: what was done, who says so, how to do it here, and what came out there."""

    title: str
    source: str  # repository, file
    measure: Callable[[Model], Any]  # text, ids or numbers, as `expected` is
    expected: Any
    tolerance: float = 0.0  # of numbers: the source's own, or what its printed digits and float32 imply


def ids_of(text: str, special: bool = False) -> Callable[[Model], list[int]]:
    """The ids of a text; `special`: with <|endoftext|> in it as one."""
    return lambda model: model.encoder.encode(text, "all" if special else ())


def continued(prompt: str | list[int], n_tokens: int) -> Callable[[Model], str | list[int]]:
    """Greedy text of `n_tokens` after a text, or all ids, with the prompt's, after ids."""

    def measure(model: Model) -> str | list[int]:
        ids = model.encoder.encode(prompt) if isinstance(prompt, str) else prompt
        new = generate(ids, model.params, model.n_head, n_tokens)
        return model.encoder.decode(new) if isinstance(prompt, str) else [*prompt, *new]

    return measure


def logits(text: str, rows: Sequence[int], columns: Sequence[int]) -> Callable[[Model], list[float]]:
    """Some columns of the logits after some of a text's tokens, a row after the other."""

    def measure(model: Model) -> list[float]:
        return _logits(model, model.encoder.encode(text))[np.ix_(rows, columns)].ravel().tolist()

    return measure


def likeliest(text: str) -> Callable[[Model], list[int]]:
    """The likeliest id after each of a text's tokens."""
    return lambda model: _logits(model, model.encoder.encode(text)).argmax(axis=-1).tolist()


def final_norm(ids: list[int], n: int) -> Callable[[Model], list[float]]:
    """The first n numbers of what the last layer norm returns at the first position."""

    def measure(model: Model) -> list[float]:
        _, trace = run_with_trace(ids, model.params, model.n_head)
        return with_outs(trace, model.params)["ln_final.hook_out"][0, :n].tolist()

    return measure


def loss(text: str) -> Callable[[Model], list[float]]:
    """The mean loss of a text after <|endoftext|>."""
    return lambda model: [_loss(model, *_shifted(_with_start(model, text)))]


def loss_without_head(text: str, layer: int, head: int) -> Callable[[Model], list[float]]:
    """The same when a head's values, with their bias, are 0."""

    def silence(value, hook):  # [n_head, n_seq, d] -> [n_head, n_seq, d]
        return value * (np.arange(len(value)) != head)[:, None, None]

    def measure(model: Model) -> list[float]:
        inputs, targets = _shifted(_with_start(model, text))
        hooks = [(f"blocks.{layer}.attn.hook_v", silence)]
        found, _ = run_with_trace(inputs, model.params, model.n_head, fwd_hooks=hooks)
        return [float(_nats(found, targets).mean())]

    return measure


def loss_of_batch(text: str, n_rows: int, n_seq: int) -> Callable[[Model], list[float]]:
    """The mean loss of the rows of llm.c's first batch: <|endoftext|>, a section of the text, and so on."""

    def measure(model: Model) -> list[float]:
        ids = [i for section in text.split("\n\n") for i in _with_start(model, section + "\n\n")]
        inputs, targets = _shifted(ids[: n_rows * n_seq + 1])
        rows = [slice(at, at + n_seq) for at in range(0, n_rows * n_seq, n_seq)]
        return [float(np.mean([_loss(model, inputs[row], targets[row]) for row in rows]))]

    return measure


def _with_start(model: Model, text: str) -> list[int]:
    return model.encoder.encode(END_OF_TEXT, "all") + model.encoder.encode(text)


def _shifted(ids: list[int]) -> tuple[list[int], list[int]]:
    return ids[:-1], ids[1:]


def _logits(model: Model, ids: list[int]):
    return gpt2(ids, **model.params, n_head=model.n_head)


def _loss(model: Model, inputs: list[int], targets: list[int]) -> float:
    return float(_nats(_logits(model, inputs), targets).mean())


def _nats(found, targets: list[int]):  # [n_seq, n_vocab] -> [n_seq]
    """Cross-entropy of each target."""
    return -np.log(softmax(found.astype(np.float64))[np.arange(len(targets)), targets])


PICOGPT = "jaymody/picoGPT, README.md"
TRANSFORMERS = "huggingface/transformers, tests/models/gpt2/test_modeling_gpt2.py"
NNSIGHT = "nnsight's documentation"
KERAS_HUB = "keras-team/keras-hub, gpt2_backbone_test.py"
LLM_C = "karpathy/llm.c, test_gpt2.c"
LENS = "TransformerLensOrg/TransformerLens, tests/acceptance/test_hooked_transformer.py"
BRIDGE = "TransformerLensOrg/TransformerLens, tests/integration/model_bridge/test_weight_processing.py"
TIKTOKEN = "openai/tiktoken, tests/test_encoding.py"

TURING = "Alan Turing theorized that computers would one day become"
TURING_GOES_ON = (
    " the most powerful machines on the planet.\n\nThe computer is a machine that can perform complex "
    "calculations, and it can perform these calculations in a way that is very similar to the human brain.\n"
)
DOG = [464, 3290]
DOG_GOES_ON = [
    *(373, 1043, 287, 257, 2214, 1474, 262, 16246, 286),
    *(2688, 290, 2688, 27262, 13, 198, 198, 464, 3290),
]
EIFFEL = "The Eiffel Tower is in the city of"
EIFFEL_ROWS = [0, 1, 2, 7, 8, 9]
EIFFEL_COLUMNS = [0, 1, 2, -3, -2, -1]
EIFFEL_LOGITS = [
    *(-36.2874, -35.0114, -38.0793, -40.5163, -41.3759, -34.9193),
    *(-68.8886, -70.1562, -71.8408, -80.4195, -78.2552, -71.1206),
    *(-82.2950, -81.6519, -83.9941, -94.4878, -94.5194, -85.6998),
    *(-113.8675, -111.8628, -113.6634, -116.7652, -114.8267, -112.3621),
    *(-81.8531, -83.3006, -91.8192, -92.9943, -89.8382, -85.6898),
    *(-103.9307, -102.5054, -105.1563, -109.3099, -110.4195, -103.1395),
]
NATURAL = (
    "Natural language processing tasks, such as question answering, machine translation, reading "
    "comprehension, and summarization, are typically approached with supervised learning on taskspecific "
    "datasets."
)
SHAKESPEARE = (  # as much as llm.c's first batch of tiny_shakespeare_val.bin has
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\nFirst "
    "Citizen:\nYou are all resolved rather to die than to famish?\n\nAll:\nResolved. resolved.\n\nFirst "
    "Citizen:\nFirst, you know Caius Marcius is chief enemy to the people.\n\nAll:\nWe know't, we "
    "know't.\n\nFirst Citizen:\nLet us kill him, and we'll have corn at our own price.\nIs't a "
    "verdict?\n\nAll:\nNo more talking on't; let it be done: away, away!\n\nSecond Citizen:\nOne word, good "
    "citizens.\n\nFirst Citizen:\nWe are accounted poor citizens, the patricians good.\nWhat authority "
    "surfeits on would relieve us: if they\nwould yield us but the superfluity, while it were\nwholesome, we "
    "might guess they relieved us humanely;\nbut they think we are too dear: the leanness that\nafflicts us, "
    "the object of our misery, is as an\ninventory to particularise their abundance; our\nsufferance is a "
    "gain to them Let us revenge this with\nour pikes"
)
ZEROS = [  # of 1 to 17 zeros
    *([15], [405], [830], [2388], [20483], [10535], [24598], [8269], [10535, 830], [8269, 405], [8269, 830]),
    *([8269, 2388], [8269, 20483], [8269, 10535], [8269, 24598], [25645], [8269, 10535, 830]),
]

TOKENIZER = [
    Fact("ids of 'hello world'", TIKTOKEN, ids_of("hello world"), [31373, 995]),
    Fact("ids of 'hello <|endoftext|>'", TIKTOKEN, ids_of("hello <|endoftext|>", True), [31373, 220, 50256]),
    *(Fact(f"ids of {n} zeros", TIKTOKEN, ids_of("0" * n), ids) for n, ids in enumerate(ZEROS, 1)),
]
# Logits near 100 differ by some 1e-4 between two right float32 programs, and were printed with four digits.
# llm.c's test allows 1e-2, but its C and its CUDA program print 5.270007 and 5.270009.
OUTPUTS_OF_124M = [
    Fact("greedy text after 'Alan Turing theorized ...'", PICOGPT, continued(TURING, 40), TURING_GOES_ON),
    Fact("greedy ids after 464, 3290", TRANSFORMERS, continued(DOG, 18), DOG + DOG_GOES_ON),
    Fact(
        "greedy text after 'Hello, my dog is a little'",
        TRANSFORMERS,
        continued("Hello, my dog is a little", 13),
        " bit of a mess. I'm not sure if he's going",
    ),
    Fact(
        "greedy text after 'Today, I'",
        TRANSFORMERS,
        continued("Today, I", 13),
        "'m going to be doing a lot of research on this. I",
    ),
    Fact(f"logits of '{EIFFEL}'", NNSIGHT, logits(EIFFEL, EIFFEL_ROWS, EIFFEL_COLUMNS), EIFFEL_LOGITS, 2e-3),
    Fact(
        f"likeliest ids of '{EIFFEL}'",
        NNSIGHT,
        likeliest(EIFFEL),
        [198, 12, 417, 8765, 318, 257, 262, 3504, 7372, 6342],
    ),
    Fact(
        "output of ln_f",
        KERAS_HUB,
        final_norm([1169, 2068, 7586, 21831, 13], 5),
        [-0.1116, -0.0375, -0.2624, 0.00891, -0.0061],
        0.01,
    ),
    Fact("loss of the first batch", LLM_C, loss_of_batch(SHAKESPEARE, 4, 64), [5.270007133], 2e-5),
    Fact("loss of 'Hello world!'", LENS, loss("Hello world!"), [5.331855773925781], 4e-5),
    Fact("loss of 'Natural language ...'", BRIDGE, loss(NATURAL), [3.999], 0.01),
    Fact("the same without head 8 of layer 0", BRIDGE, loss_without_head(NATURAL, 0, 8), [4.117], 0.01),
]


def check(fact: Fact, model: Model) -> tuple[bool, str]:
    """Return whether a fact is so, and a line on what was expected and what was found."""
    found = fact.measure(model)
    if isinstance(fact.expected, str) or not fact.tolerance:
        right, said = found == fact.expected, _parted(fact.expected, found)
    else:
        wanted, differences = fact.expected, np.abs(np.subtract(found, fact.expected))
        worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
        right = bool((differences <= fact.tolerance).all())
        said = f"expected {wanted[worst]:.9g} within {fact.tolerance:g}, found {found[worst]:.9g}"
        said += f" (the worst of {len(wanted)})" if len(wanted) > 1 else ""
    return right, f"{fact.title} ({fact.source}): {said}"


def _parted(expected: Any, found: Any) -> str:
    """What was expected and found of a text or of ids: all, or, if they are long, from where they part."""
    same = [a == b for a, b in zip(expected, found, strict=False)]
    n = same.index(False) if False in same else (0 if found == expected else len(same))
    start = max(0, n - 8) if len(expected) > 24 else 0
    unit = "character" if isinstance(expected, str) else "id"
    where = f" from {unit} {start} on" if start else ""
    return f"expected{where} {_short(expected[start:])}, found {_short(found[start:])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def report(model_size: str, models_dir: str | None = None) -> int:
    """Write a line for each thing as it is checked; return 0 if all is right, else 1."""
    directory = find_model_dir(model_size, models_dir)
    if directory is None:
        missing = model_dirs(models_dir)[0] / model_size
        raise UsageError(f"{missing} is not there, or not whole: `{download_command(missing)}` gets it")
    n_wrong = 0

    def tell(right: bool, said: str) -> None:
        nonlocal n_wrong
        n_wrong += not right
        write(f"{'right' if right else 'WRONG'}  {said}\n")

    for finding in verify(directory):
        tell(finding.right, f"{finding.part}: {finding.said}")
    if n_wrong:
        write("The files are wrong: what they compute is not looked at.\n")
        return 1
    hparams, params = load_hparams_and_params(directory)
    model = Model(load_encoder(directory, hparams), params, hparams["n_head"])
    is_124m = hparams == OPENAI_SIZES["124M"]
    facts = TOKENIZER if model.encoder.n_vocab == 50257 else []
    for fact in [*facts, *(OUTPUTS_OF_124M if is_124m else [])]:
        tell(*check(fact, model))
    if not is_124m:
        write("Only of the 124M are outputs published: this model was not run.\n")
    write(f"{n_wrong} of them wrong.\n" if n_wrong else "All is right.\n")
    return int(n_wrong > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m picogpt.check --model_size 124M`: exit status 0 if all is right, 1 if not, or 2."""
    parser = argparse.ArgumentParser(
        prog="python -m picogpt.check", description="Check real weights against what others have published."
    )
    parser.add_argument(
        "--model_size", default="124M", help="a model's name, or its directory; 124M by default"
    )
    parser.add_argument("--models_dir", help="where models are looked for by name")
    args = parser.parse_args(argv)
    return exit_status(lambda: report(args.model_size, args.models_dir), unread=2)


if __name__ == "__main__":
    sys.exit(main())
