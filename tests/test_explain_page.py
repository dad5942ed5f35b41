"""explain.html in a real browser: what it shows is what the JSON says, for mouse, keyboard, ear and paper."""

import base64
import copy
import re

import browser
import numpy as np
import pytest
from browser import grave_findings, overflow

from picogpt.checkpoint import load_encoder_hparams_and_params
from picogpt.explain import explain, page
from picogpt.sampling import probabilities

pytestmark = pytest.mark.browser
chromium, visit = browser.chromium, browser.visit  # the fixtures

TEXT = "Friends, Romans, countrymen, lend me your ears;\nÉtude"
PIXELS = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
ENCODER, HPARAMS, PARAMS = load_encoder_hparams_and_params("shakespeare")


def visible(text: str) -> str:
    return text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def number(text: str) -> float:
    return float(re.search(r"-?[\d.]+(e[-+]?\d+)?", text.replace("\u2212", "-"))[0])


def share(text: str) -> float:
    """The share that a percentage shows; what is below the last shown place is 0."""
    return 0.0 if text.startswith("<") else number(text) / 100


def array(data, name):
    packed = data["arrays"][name]
    return np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])


def packed(values) -> dict:
    values = np.asarray(values, "<f4")
    return {"shape": [*values.shape], "dtype": "float32", "data": base64.b64encode(values.tobytes()).decode()}


@pytest.fixture(scope="session")
def data():
    return explain(ENCODER.encode(TEXT), PARAMS, HPARAMS, encoder=ENCODER, text=TEXT, name="shakespeare")


@pytest.fixture
def show(visit, tmp_path):
    """Open a page with this data."""

    def show(data, **how):
        path = tmp_path / "page.html"
        path.write_text(page(data), encoding="utf-8")
        return visit(path, **how)

    return show


def test_the_template_is_whole_before_it_is_filled(visit, tmp_path):
    (tmp_path / "empty.html").write_text(page({}), encoding="utf-8")
    shown = visit(tmp_path / "empty.html")
    assert "picogpt.explain" in shown.locator("#lede").inner_text()
    assert not shown.locator("main").is_visible()


def test_the_headline_says_model_text_and_the_guess(show, data):
    shown = show(data)
    assert "shakespeare" in shown.title() and "Friends, Romans," in shown.locator("h1").inner_text()
    facts = dict(zip(shown.locator("dt").all_inner_texts(), shown.locator("dd").all_inner_texts(), strict=True))
    assert facts == {"model": "shakespeare", "tokens": str(len(data["ids"]))} | {
        key: f"{value:,}" for key, value in HPARAMS.items()
    }
    best = data["lens"]["ids"][-1][-1][0], data["lens"]["probabilities"][-1][-1][0]
    assert (
        f"“{visible(data['vocab'][str(best[0])])}” ({100 * best[1]:.1f} %)"
        in shown.locator("#lede").inner_text()
    )
    assert shown.locator("#tokens bdi").all_inner_texts() == [visible(token) for token in data["tokens"]]
    assert not shown.locator("#sampled").is_visible()
    assert "float16" in shown.locator("footer").inner_text()


def test_every_panel_stands_beside_its_lines_of_source(show, data):
    shown = show(data)
    for box, panels in zip(
        shown.locator("section .sources").all(),
        (["tokens"], ["embeddings", "residual"], ["attention"], ["lens"], ["sampling"]),
        strict=True,
    ):
        lines = box.locator(".line").evaluate_all(
            "all => all.map(line => [line.dataset.number, line.textContent])"
        )
        marked = box.locator("mark").evaluate_all("all => all.map(line => +line.dataset.number)")
        quoted = [data["source"][panel] for panel in panels]
        expected = [[str(q["first"] + i), line] for q in quoted for i, line in enumerate(q["lines"])]
        assert [[n, "".join(text.split())] for n, text in lines] == [
            [n, "".join(text.split())] for n, text in expected
        ]
        assert marked == [n for q in quoted for n in q["mark"]] and marked
        assert [
            q["file"] in text for q, text in zip(quoted, box.locator("summary").all_inner_texts(), strict=True)
        ]


def test_a_row_and_a_dial_light_up_the_line_that_computes_them(show, data):
    shown = show(data)
    shown.locator("#strips tr", has_text="+ MLP").first.hover()
    assert "hook_mlp_out" in shown.locator(".now").inner_text()
    shown.mouse.move(0, 0)
    shown.locator("#top-p").focus()
    assert "< top_p" in shown.locator(".now").inner_text()


def test_merges_are_stepped_through_by_button_and_key(show, data):
    shown = show(data)
    stage, say = shown.locator("#stage"), shown.locator("#merge-say")
    merges = [(piece, k) for piece in data["pieces"] for k in range(len(piece["ranks"]))]
    assert stage.locator("small").all_inner_texts() == [str(i) for i in data["ids"]]
    slider = shown.locator("#merge-step")
    slider.focus()
    slider.press("Home")
    assert stage.locator("bdi").all_inner_texts() == [symbol for p in data["pieces"] for symbol in p["rows"][0]]
    assert shown.locator("#merge-back").is_disabled()
    for done, (piece, k) in enumerate(merges[:-1], start=1):
        shown.locator("#merge-next").click()
        row, at = piece["rows"][k + 1], piece["at"][k]
        assert row in [p.locator("bdi").all_inner_texts() for p in stage.locator(".piece").all()]
        assert stage.locator(".fresh bdi").all_inner_texts() == [row[at]]
        said = say.inner_text()
        assert said.startswith(f"Merge {done} of {len(merges)}:") and said.endswith(
            f"is {piece['ranks'][k]:,}."
        )
        assert "“{}” and “{}”".format(*piece["rows"][k][at : at + 2]) in said
        if done == 12:
            break
    slider.press("End")
    assert stage.locator("bdi").count() == len(data["ids"]) and shown.locator("#merge-next").is_disabled()
    shown.locator("#merge-details summary").click()
    written = shown.locator("#merges").inner_text()
    assert all(f"merge {rank}" in written for piece in data["pieces"] for rank in piece["ranks"])


def test_every_float16_is_read_as_numpy_reads_it(show, data):
    halves = np.arange(2**16, dtype="<u2").view("<f2")
    packed = {"shape": [2**16], "dtype": "float16", "data": base64.b64encode(halves.tobytes()).decode()}
    read = show(data).evaluate("packed => [...decode(packed)]", packed)
    np.testing.assert_array_equal(np.array(read), halves.astype(float))


def test_the_vector_of_the_chosen_token(show, data):
    shown = show(data)
    token, column = 3, 17
    shown.locator("#tokens input").nth(token).check()
    shown.locator("#column").fill(str(column))
    rows = {row.get_attribute("title"): row for row in shown.locator("#strips tbody tr").all()}
    expected = [name for name in data["arrays"] if "hook_pattern" not in name]
    kept = [name for name in expected if not name.endswith("hook_resid_pre") or name.startswith("blocks.0.")]
    assert sorted(rows) == sorted(kept)
    for name, row in rows.items():
        assert number(row.locator(".length b").inner_text()) == pytest.approx(
            data["norms"][name][token], rel=5e-3
        )
        assert number(row.locator(".value").inner_text()) == pytest.approx(
            array(data, name)[token, column], rel=5e-3
        )
    pixels = [strip.evaluate(PIXELS) for strip in shown.locator("#strips canvas").all()]
    for name, row in zip(rows, pixels, strict=True):
        x, (red, _, blue, ink) = array(data, name)[token].astype(float), np.array(row).reshape(-1, 4).T
        seen = ink > 40
        assert (np.where(blue > red, 1, -1)[seen] == np.sign(x)[seen]).all() and seen.mean() > 0.5
        assert np.corrcoef(ink, np.abs(x))[0, 1] > 0.9
    shown.locator("section", has=shown.locator("#strips")).locator("summary", has_text="table").click()
    table = dict(row.split("\t") for row in shown.locator("#norm-table tbody").inner_text().splitlines())
    assert {name: float(value) for name, value in table.items()} == {
        n: v[token] for n, v in data["norms"].items()
    }


def test_the_chart_of_lengths_is_drawn_from_the_norms(show, data):
    shown = show(data)
    token, n_layer = len(data["ids"]) - 1, HPARAMS["n_layer"]
    points = re.findall(r"[ML](\S+) ([\d.]+)", shown.locator("#norms path.stream").get_attribute("d"))
    names = ["hook_embed", *(f"blocks.{i}.hook_resid_{at}" for i in range(n_layer) for at in ("pre", "mid"))]
    norms = np.array([data["norms"][name][token] for name in [*names, f"blocks.{n_layer - 1}.hook_resid_post"]])
    heights = 100 - np.array([float(y) for _, y in points])
    assert heights == pytest.approx(norms / norms.max() * heights.max(), abs=0.02)
    assert [float(x) for x, _ in points] == [*range(2 * n_layer + 2)]


def looked_at(shown) -> tuple[str, list[tuple[int, float]]]:
    """Who looks, and at which tokens with which weight, the strongest first."""
    answer = shown.locator("#looks-say")
    notes = [
        re.fullmatch(r"(.+ %) \((\d+)\)", note).groups() for note in answer.locator(".number").all_inner_texts()
    ]
    return answer.locator("h3").inner_text(), [(int(i), share(weight)) for weight, i in notes]


def check_looks(shown, data, layer, head, query):
    pattern = array(data, f"blocks.{layer}.attn.hook_pattern")[head, query, : query + 1].astype(float)
    said, pairs = looked_at(shown)
    assert said == (f"Layer {layer}, head {head}: token {query}, “{visible(data['tokens'][query])}”, looks at")
    assert [i for i, _ in pairs] == np.argsort(-pattern, kind="stable")[:5].tolist()
    assert [weight for _, weight in pairs] == pytest.approx(pattern[[i for i, _ in pairs]], abs=6e-4)
    cells = shown.locator("#looks li")
    weights = [share(text) if text else None for text in cells.locator("small").all_inner_texts()]
    assert all(w is None or w == pytest.approx(pattern[i], abs=6e-4) for i, w in enumerate(weights))
    assert all(weights[i] is not None for i in np.flatnonzero(pattern > 0.0051))
    assert cells.locator("bdi").all_inner_texts() == [visible(token) for token in data["tokens"]]
    assert shown.locator("#looks .future").count() == len(data["ids"]) - query - 1


def test_attention_by_choice_of_head_by_pointer_and_by_key(show, data):
    shown = show(data)
    n, last = len(data["ids"]), HPARAMS["n_layer"] - 1
    check_looks(shown, data, last, 0, n - 1)
    assert shown.locator("#heads input").count() == HPARAMS["n_layer"] * HPARAMS["n_head"]
    shown.get_by_label("layer 1, head 2").check()
    check_looks(shown, data, 1, 2, n - 1)
    shown.keyboard.press("ArrowRight")
    check_looks(shown, data, 1, 3, n - 1)

    shown.locator("#rows label").nth(6).hover()
    check_looks(shown, data, 1, 3, 6)
    shown.locator("#h-attention").hover()
    check_looks(shown, data, 1, 3, n - 1)
    box = shown.locator("#pattern").bounding_box()
    cell = box["width"] / n, box["height"] / n
    shown.locator("#pattern").hover(position={"x": 2.5 * cell[0], "y": 8.5 * cell[1]})
    check_looks(shown, data, 1, 3, 8)
    assert shown.locator("#looks .pointed bdi").inner_text() == visible(data["tokens"][2])
    shown.locator("#h-attention").hover()
    check_looks(shown, data, 1, 3, n - 1)

    shown.locator("#rows input").nth(5).focus()
    shown.keyboard.press("Space")
    for query in (6, 7):
        shown.keyboard.press("ArrowDown")
        check_looks(shown, data, 1, 3, query)
    assert shown.locator("#tokens input").nth(7).is_checked()  # all panels follow
    assert "(token 7)" in shown.locator("#cell h3").inner_text()
    assert shown.locator("#looks-say").get_attribute("aria-live") == "polite"


def test_pointing_moves_nothing_from_under_the_pointer(show, data):
    """Else the answer changes, what is pointed at moves, the answer changes again, and the page flickers."""
    shown = show(data)
    for pointed in ("#rows label", "#lens-grid tbody button"):
        places = set()
        for n in (1, 4, 9, 13):
            shown.locator(pointed).nth(n).hover()
            places.add(
                shown.locator(pointed).first.evaluate("node => node.getBoundingClientRect().top + scrollY")
            )
        assert len(places) == 1


def test_the_pattern_is_painted_as_it_is(show, data):
    shown = show(data)
    shown.get_by_label("layer 0, head 1").check()
    rgba = shown.locator("#pattern").evaluate(PIXELS)
    ink = np.reshape(rgba, (-1, 4))[:, 3]
    expected = array(data, "blocks.0.attn.hook_pattern")[1].astype(float)
    assert np.abs(np.reshape(ink, expected.shape) / 255 - np.sqrt(expected)).max() < 0.51 / 255


def test_the_lens_and_the_details_of_a_cell(show, data):
    shown = show(data)
    lens, rows = data["lens"], shown.locator("#lens-grid tbody tr")
    assert rows.count() == len(data["ids"])
    for t, row in enumerate(rows.all()):
        tops = [data["vocab"][str(lens["ids"][depth][t][0])] for depth in range(HPARAMS["n_layer"] + 1)]
        truth = data["tokens"][t + 1 : t + 2]
        texts = row.locator("bdi").all_inner_texts()
        assert texts == [visible(text) for text in (data["tokens"][t], *tops, *truth)]
        shares = [number(text) for text in row.locator("small").all_inner_texts()]
        assert shares == pytest.approx([100 * p[t][0] for p in lens["probabilities"]], abs=0.501)
        right = [lens["ids"][depth][t][0] == (data["ids"] + [None])[t + 1] for depth in range(len(tops))]
        assert row.locator("td.right").count() == sum(right)

    def check(t, depth):
        cell = shown.locator("#cell")
        assert f"After “{visible(data['tokens'][t])}” (token {t})" in cell.locator("h3").inner_text()
        assert cell.locator("bdi").all_inner_texts() == [
            visible(data["vocab"][str(i)]) for i in lens["ids"][depth][t]
        ]
        shares = [share(text) for text in cell.locator(".number").all_inner_texts()]
        assert shares == pytest.approx(lens["probabilities"][depth][t], abs=6e-4)
        assert share(cell.locator(".say").inner_text().split("got ")[1]) == pytest.approx(
            lens["next"][depth][t], abs=6e-4
        )

    rows.nth(4).locator("button").nth(1).hover()
    check(4, 1)
    rows.nth(4).locator("button").nth(1).focus()
    for key, t, depth in (("ArrowRight", 4, 2), ("ArrowDown", 5, 2), ("ArrowLeft", 5, 1), ("ArrowUp", 4, 1)):
        shown.keyboard.press(key)
        check(t, depth)
    assert shown.locator("#lens-grid button[tabindex='0']").count() == 1
    shown.keyboard.press("Enter")
    assert shown.locator("#tokens input").nth(4).is_checked()


LOGITS = {
    "embedded": None,
    "ties": [1.0, 3, 3, 3, -2, 3, 0, 0, 0, 1] * 4,
    "all equal": [0.5] * 10,
    "far apart": [-3e38, 3e38, 0, 1e-30, 88, -88],
    "one": [7.0],
}
SETTINGS = [
    (temperature, top_k, top_p)
    for temperature in (1e-320, 0.3, 1.0, 1e6)
    for top_k in (None, 1, 3, 40)
    for top_p in (None, 1e-9, 0.5, 0.9, 1 - 1e-12)
]


@pytest.mark.parametrize("name", LOGITS)
def test_what_is_drawn_from_equals_the_packages(show, data, name):
    logits = np.asarray(LOGITS[name] or np.frombuffer(base64.b64decode(data["logits"]["data"]), "<f4"), "f4")
    shown = show(data)
    found = shown.evaluate(
        "([x, settings]) => settings.map(s => [...probabilities(Float32Array.from(x), ...s)])",
        [logits.tolist(), SETTINGS],
    )
    for setting, p in zip(SETTINGS, found, strict=True):
        np.testing.assert_allclose(
            p, probabilities(logits, *setting), rtol=1e-6, atol=1e-300, err_msg=str(setting)
        )


def test_the_dials_show_what_is_drawn_and_what_is_cut(show, data):
    shown = show(data)
    logits = np.frombuffer(base64.b64decode(data["logits"]["data"]), "<f4").astype(float)
    order = np.argsort(-logits, kind="stable")[:30]

    def check(temperature, top_k, top_p):
        p = probabilities(logits, temperature, top_k, top_p)
        chances, rows = p / p.sum(), shown.locator("#bars li")
        assert rows.locator("bdi").all_inner_texts() == [visible(data["vocab"][str(i)]) for i in order]
        for i, text in zip(order, rows.locator(".number").all_inner_texts(), strict=True):
            assert (
                text.startswith("cut by top-")
                if p[i] == 0
                else share(text) == pytest.approx(chances[i], abs=6e-4)
            )
        entropy = -(chances[p > 0] * np.log2(chances[p > 0])).sum()
        said = shown.locator("#choice-say").inner_text()
        assert said.startswith(f"{(p > 0).sum():,} of 1,024 tokens") and f"Entropy {entropy:.2f} bits" in said
        rest = np.setdiff1d(np.arange(len(p)), order)
        assert f"{(p[rest] > 0).sum()} of them can be drawn" in shown.locator("#rest").inner_text()

    check(1.0, None, None)
    shown.locator("#temperature").fill("1.5")
    check(1.5, None, None)
    shown.locator("#top-k").fill("11")
    check(1.5, int(shown.locator("#top-k-out").inner_text()), None)
    assert "cut by top-k" in shown.locator("#bars").inner_text()
    shown.locator("#top-p").fill("0.8")
    check(1.5, int(shown.locator("#top-k-out").inner_text()), 0.8)
    assert "cut by top-p" in shown.locator("#bars").inner_text()

    shown.get_by_role("button", name="Greedy").click()
    assert shown.locator("#bars .number").all_inner_texts() == ["100.0 %"] + ["not the largest"] * 29
    shown.get_by_role("button", name="Greedy").click()  # once more changes nothing
    assert shown.locator("#temperature-out").inner_text() == "0, greedy"
    shown.get_by_role("button", name="Reset").click()
    check(1.0, None, None)
    shown.locator("#temperature").focus()
    shown.keyboard.press("ArrowRight")
    check(1.05, None, None)


def test_a_tie_is_greedily_the_smallest_id(show, data):
    tied = copy.deepcopy(data) | {
        "logits": packed([0, 2, 1, 2, 2]),
        "vocab": {str(i): f"t{i}" for i in range(1024)},
    }
    shown = show(tied)
    shown.get_by_role("button", name="Greedy").click()
    assert shown.locator("#bars bdi").all_inner_texts() == ["t1", "t3", "t4", "t2", "t0"]
    assert shown.locator("#bars .number").first.inner_text() == "100.0 %"


def test_a_page_of_ids_has_no_merges_but_all_the_rest(show):
    shown = show(explain([3, 1, 4, 1, 5], PARAMS, HPARAMS, name="shakespeare"))
    assert "5 token ids" in shown.locator("h1").inner_text()
    assert (
        not shown.locator("#merge-controls").is_visible() and not shown.locator("#merge-details").is_visible()
    )
    assert shown.locator("#stage small").all_inner_texts() == ["3", "1", "4", "1", "5"]
    assert shown.locator("#bars li").count() == 30


def test_one_token_alone_is_a_page_too(show):
    shown = show(explain([37], PARAMS, HPARAMS, encoder=ENCODER, text="F", name="shakespeare"))
    assert looked_at(shown) == ("Layer 2, head 0: token 0, “F”, looks at", [(0, 1.0)])


def explained(text: str) -> dict:
    ids = ENCODER.encode(text, allowed_special={"<|endoftext|>"})
    return explain(ids, PARAMS, HPARAMS, encoder=ENCODER, text=text)


@pytest.mark.parametrize("text", ["a", "é", "<|endoftext|>", "x" * 90], ids=ascii)
def test_where_nothing_is_to_be_merged_nothing_can_be_stepped_through(show, text):
    shown = show(explained(text))
    assert shown.locator("#merge-say").inner_text().startswith("Nothing to merge:")
    assert not shown.locator("#merge-controls, #merge-details").filter(visible=True).count()
    assert shown.locator("#byte-hint").is_visible() == (text == "é")


def test_one_merge_is_no_merges_and_not_every_symbol_is_a_byte(show):
    shown = show(explained("th<|endoftext|>"))
    assert shown.locator("#merge-say").inner_text().startswith("After 1 merge: 2 tokens.")
    shown.locator("#merge-back").click()
    assert shown.locator("#stage bdi").all_inner_texts() == ["t", "h", "<|endoftext|>"]
    assert "a byte, or a token that is shown whole" in shown.locator("#merge-say").inner_text()


@pytest.mark.parametrize(
    ("text", "title"),
    [
        (" " + "w" * 70, " " + "w" * 55 + "…"),
        ("word " * 20, "word " * 10 + "word…"),
        ("a" + "🙂" * 70, "a" + "🙂" * 55 + "…"),
        ("\u202egnol\x00 \u2066x" + "y" * 60, "\\u{202e}gnol\\u{0}…"),
        ("\u202e\u05d0\u05d1", "\\u{202e}\u05d0\u05d1"),
    ],
    ids=["one long word", "words", "emoji", "signs that turn lines around", "right to left"],
)
def test_whatever_the_text_its_beginning_is_the_headline(show, data, text, title):
    shown = show(copy.deepcopy(data) | {"text": text})
    assert shown.locator("h1 bdi").evaluate("bdi => bdi.textContent") == title
    assert shown.locator("h1").evaluate("h1 => h1.textContent") == f"What shakespeare makes of “{title}”"
    assert f"“{' '.join(title.split())}" in " ".join(shown.title().split()).replace("“ ", "“")
    assert "\u202e" not in shown.locator("#text").evaluate("text => text.textContent")


@pytest.mark.parametrize("width", [390, 1300])
def test_many_heads_stand_in_rows_beside_or_below_the_name_of_their_layer(show, data, width):
    many = copy.deepcopy(data) | {"heads": [*range(20)]}
    for i in range(HPARAMS["n_layer"]):
        name = f"blocks.{i}.attn.hook_pattern"
        many["arrays"][name] = packed(np.tile(array(data, name), (5, 1, 1)))
    shown = show(many, width=width)
    layer = shown.locator(".layer").nth(1)
    name, *heads = (node.bounding_box() for node in (layer.locator("b"), *layer.locator(".chip").all()))
    assert len({head["x"] for head in heads}) == (6 if width == 390 else 10)
    assert len({round(head["width"]) for head in heads}) == 1
    if width == 390:
        assert all(head["y"] >= name["y"] + name["height"] for head in heads)
    else:
        assert all(head["x"] >= name["x"] + name["width"] for head in heads)


@pytest.mark.parametrize("width", [390, 1300])
def test_the_pattern_of_many_tokens_is_nearly_square_and_names_the_row_one_is_at(show, width):
    n = 120
    shown = show(explain([*range(n)], PARAMS, HPARAMS, encoder=ENCODER), width=width)
    box = shown.locator("#pattern").bounding_box()
    assert 0.9 < box["height"] / box["width"] < 1.5
    shown.locator("#rows input").nth(60).focus()
    shown.keyboard.press("Space")
    shown.keyboard.press("ArrowDown")
    named = [i for i, name in enumerate(shown.locator("#rows bdi").all()) if name.is_visible()]
    row, label = shown.locator(".map i").bounding_box(), shown.locator("#rows bdi").nth(61).bounding_box()
    assert named == [61] and label["height"] > 12
    assert abs(row["y"] + row["height"] / 2 - label["y"] - label["height"] / 2) < 2
    assert overflow(shown) == 0


def test_cells_and_labels_agree_on_their_size(show):
    """Else larger labels leave less room for cells, smaller cells want smaller labels, and the page shivers."""
    shown = show(explained("To be, or not to be, that is the question: whether " * 3))
    heights = shown.evaluate(
        """async () => {
            const heights = new Set(), box = document.getElementById("matrix");
            for (let frame = 0; frame < 20; frame++) {
                await new Promise(requestAnimationFrame);
                if (frame > 5) heights.add(box.clientHeight);
            }
            return [...heights];
        }"""
    )
    assert len(heights) == 1


def test_a_share_that_rounds_to_nothing_is_not_said_to_be_nothing(show, data):
    small = copy.deepcopy(data)
    pattern = np.zeros_like(array(data, "blocks.2.attn.hook_pattern"))  # as float16 has what is below 3e-8
    pattern[:, -1, 0] = 1
    small["arrays"]["blocks.2.attn.hook_pattern"] = packed(pattern)
    small["lens"]["probabilities"][0][0] = [0.0034] * 5
    small["logits"] = packed([1000, *[0] * 40])
    shown = show(small)
    assert shown.locator("#looks-say .number").nth(1).inner_text().startswith("< 0.01 %")
    assert shown.locator("#lens-grid small").first.inner_text() == "<1"
    assert "that of 1 equally likely token " in shown.locator("#choice-say").inner_text()
    assert "had < 0.01 % together and now have nothing" in shown.locator("#rest").inner_text()


def test_the_chart_fits_the_other_tokens_or_says_that_it_does_not(show, data):
    shown = show(data)

    def highest():
        drawn = [path.get_attribute("d") for path in shown.locator("#norms path.other").all()]
        return min(float(y) for points in drawn for y in re.findall(r" (-?[\d.]+)", points))

    assert highest() >= 0 and "above" not in shown.locator("#norm-keys").inner_text()
    tall = copy.deepcopy(data)
    for norms in tall["norms"].values():
        norms[0] *= 50
    shown = show(tall)
    assert (
        highest() < 0 and "tokens; 1 of them far above this scale" in shown.locator("#norm-keys").inner_text()
    )


@pytest.fixture
def sampled(data):
    """As of a large model: the second layer, two heads and most columns left out."""
    less, columns = copy.deepcopy(data), [0, 100, 255]
    less |= {"layers": [0, 2], "heads": [1, 3], "columns": columns, "sampling": "It shows 2 of 3 layers."}
    for name in data["arrays"]:
        if name.startswith("blocks.1."):
            del less["arrays"][name]
        else:
            x = array(data, name)
            less["arrays"][name] = packed(x[[1, 3]] if "pattern" in name else x[:, columns])
    return less


def test_a_sampled_page_says_so_and_names_what_it_shows(show, data, sampled):
    shown = show(sampled)
    assert shown.locator("#sampled").inner_text() == "It shows 2 of 3 layers."
    assert "every" not in shown.locator("#lede").inner_text()
    assert "3 of its 256 numbers" in shown.locator("#strips-caption").inner_text()
    steps = [row.get_attribute("title") for row in shown.locator("#strips tbody tr").all()]
    assert "blocks.2.hook_resid_pre" in steps and not any(name.startswith("blocks.1.") for name in steps)
    shown.get_by_label("layer 2, head 3").check()
    _, pairs = looked_at(shown)
    pattern = array(data, "blocks.2.attn.hook_pattern")[3, -1]
    assert pairs[0] == (pattern.argmax(), pytest.approx(pattern.max(), abs=6e-4))
    shown.locator("#column").fill("1")
    assert shown.locator("#value-title").inner_text() == "no. 100"
    value = shown.locator("#strips tbody .value").first.inner_text()
    assert number(value) == pytest.approx(array(data, "hook_embed")[-1, 100], rel=5e-3)
    assert shown.locator("#norm-table tbody tr").count() == len(data["norms"])  # lengths are of all layers


@pytest.fixture
def wide(data):
    """What could burst a page: long tokens without a place to break, signs that print nothing, markup."""
    hard = copy.deepcopy(data)
    tokens = [" " * 128, "w" * 128, "\u202egnol\x00\x1b", "</script><b>", "🙂", "\\xe2\\x80"]
    hard["tokens"] = [tokens[i % 6] for i in range(len(data["ids"]))]
    hard["text"] = "".join(hard["tokens"])
    hard["vocab"] = {i: tokens[int(i) % 6] for i in data["vocab"]}
    hard["model"] = "m" * 80
    hard["pieces"][0] |= {"text": tokens[1], "rows": [list(tokens[1][:64])], "ranks": [], "at": []}
    return hard


@pytest.fixture
def huge(data):
    """Numbers of twenty digits."""
    large = copy.deepcopy(data)
    large["norms"] = {name: [1e19 * norm for norm in norms] for name, norms in data["norms"].items()}
    for name in data["arrays"]:
        if "pattern" not in name:
            large["arrays"][name] = packed(1e19 * array(data, name).astype(float))
    return large


@pytest.mark.parametrize("which", ["data", "wide", "huge"])
@pytest.mark.parametrize("width", [320, 390, 1300])
def test_nothing_is_wider_than_the_window(show, request, which, width):
    shown = show(request.getfixturevalue(which), width=width)
    assert overflow(shown) == 0
    shown.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    assert overflow(shown) == 0
    shown.emulate_media(media="print")
    assert overflow(shown) == 0


def test_markup_and_silent_signs_are_shown_as_text(show, wide):
    shown = show(wide)
    tokens = shown.locator("#tokens bdi").all_inner_texts()
    assert tokens[2:4] == ["\\u{202e}gnol\\u{0}\\u{1b}", "</script><b>"] and tokens[0] == "␣" * 128


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_grave(show, dark):
    ids = ENCODER.encode("O Romeo,")
    shown = show(explain(ids, PARAMS, HPARAMS, encoder=ENCODER, text="O Romeo,", name="shakespeare"), dark=dark)
    shown.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    shown.locator("#top-k").fill("5")
    shown.locator("#strips tbody tr").nth(3).hover()
    shown.locator("#tokens input").nth(1).check()
    assert grave_findings(shown) == []


def test_dark_and_light_follow_the_reader_and_paper_is_always_light(show, data):
    def paper_and_ink(shown):
        style = shown.locator("body").evaluate(
            "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
        )
        return [sum(map(int, re.findall(r"\d+", colour))) / 3 for colour in style]

    shown = show(data, dark=True)
    paper, ink = paper_and_ink(shown)
    assert paper < 40 and ink > 200
    for media in ({"color_scheme": "light"}, {"color_scheme": "dark", "media": "print"}):
        shown.emulate_media(**media)
        paper, ink = paper_and_ink(shown)
        assert paper > 240 and ink < 40


def test_paper_gets_what_is_folded_away(show, data):
    shown = show(data)
    folded = shown.locator("details:not([open])").count()
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded and shown.locator("details:not([open])").count() == 0
    shown.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown.locator("details:not([open])").count() == folded
    shown.emulate_media(media="print")
    assert shown.evaluate("getComputedStyle(document.querySelector('.scroll')).maxHeight") == "none"
    assert len(shown.pdf()) > 50_000


def test_paper_asks_for_nothing_and_breaks_no_heading(show, data):
    deep = copy.deepcopy(data)
    deep["lens"] = {key: values[:1] * 9 + values for key, values in data["lens"].items()}
    shown = show(deep, width=680)  # an A4 sheet between its margins
    asked = ("Choose a token", "Choose one", "Point at a row", "Arrow keys move")
    assert all(said in shown.locator("body").inner_text() for said in asked)
    shown.emulate_media(media="print")
    assert not any(said in shown.locator("body").inner_text() for said in asked)
    heights = shown.locator("#lens-grid thead th").evaluate_all(
        "all => all.map((th) => { const range = new Range(); range.selectNodeContents(th);"
        " return range.getClientRects().length; })"
    )
    assert heights == [1] * 15


FOCUSED = """() => {
    const element = document.activeElement;
    const ring = element.matches(".chip input") ? element.nextSibling : element;
    return [element.name || element.id || element.tagName, getComputedStyle(ring).outlineStyle];
}"""


def test_everything_is_reached_by_keyboard_with_a_ring_around_it(show, data):
    shown = show(data)
    seen = []
    for _ in range(60):
        shown.keyboard.press("Tab")
        seen.append(shown.evaluate(FOCUSED))
    assert {ring for name, ring in seen if name != "BODY"} == {"solid"}
    wanted = {"token", "head", "row", "merge-step", "merge-back", "column", "temperature", "top-k", "top-p"}
    assert wanted | {"greedy", "reset"} <= {name for name, _ in seen}
