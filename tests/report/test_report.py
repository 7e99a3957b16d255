"""The report: what is collected is right, and what is drawn is whole, safe and readable without a network."""

import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from typer.testing import CliRunner

import flatquant
from flatquant import report
from flatquant.cli import app
from flatquant.errors import ModelError
from flatquant.evaluate.collect import collect
from flatquant.recipes import rtn
from flatquant.report import plots
from flatquant.runtime.artifact import load
from flatquant.runtime.folder import Folder
from tests.laws import calibrated, quick
from tests.tiny_models import tiny_family, tiny_llama, tiny_tokenizer

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
SHAPE = {"hidden": 36, "heads": 4, "kv_heads": 2, "head_dim": 10, "intermediate": 42}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`original` and `quantised`, with everything that a report can show."""
    path = tmp_path_factory.mktemp("report")
    model, tokenizer = tiny_llama(**SHAPE), tiny_tokenizer()
    model.save_pretrained(path / "original")
    tokenizer.save_pretrained(path / "original")
    (path / "text.txt").write_text("the cat sat on the mat. " * 60)
    tokens = torch.randint(0, 120, (4, 16), generator=torch.Generator().manual_seed(0))
    flatquant.quantize(model, quick("w4a4kv4"), tokens, tokenizer=tokenizer, output=path / "quantised", device="cpu")
    return path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    folder, text = place / "quantised", place / "text.txt"
    run("evaluate", folder, "--perplexity", text, "--seqlen", 64, "--windows", 2, "--save",
        "--divergence-from", place / "original", "--device", "cpu")  # fmt: skip
    run("report", folder, "--collect", place / "original", "--text", text, "--tokens", 64, "--figures", place / "svg",
        "--device", "cpu")  # fmt: skip
    return folder


class _Page(HTMLParser):
    """Whether tags are balanced, and what the page would fetch or run."""

    VOID = ("meta", "link", "br", "hr", "img", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "img")
        assert not any(name.startswith("on") for name, _ in attrs)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    assert page.open == []
    assert page.fetched == []
    return page


# --------------------------------------------------------------------------------------------- the page


def test_the_page_is_one_safe_file(whole: Path) -> None:
    html = (whole / report.FILE).read_text()
    text = " ".join(parsed(html).text)
    assert html.count("<figure>") == 11
    for part in ("How flat it is", "Where errors arise", "How the fit went", "smaller than 16 bit", "w4a4kv4"):
        assert part in text
    assert "url(" not in html
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    assert "prefers-color-scheme:dark" in html
    assert "NaN" not in html
    assert "nan," not in html


def test_figures_are_files_too(whole: Path) -> None:
    names = {file.stem for file in (whole.parent / "svg").iterdir()}
    assert {"flatness-activations", "flatness-weights", "peaks-weights", "surface", "alone", "conditions"} <= names
    for name in names:
        root = ET.parse(whole.parent / "svg" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        pixels = imread(whole.parent / "svg" / f"{name}.png")  # (height, width, 4), 0..1
        assert pixels.shape == (2 * int(root.get("height", 0)), 2 * int(root.get("width", 0)), 4)
        assert (pixels[0, 0] == 1).all()
        assert (pixels[..., :3] < 0.5).any()


def test_a_png_has_the_colours_of_the_svg_in_their_places() -> None:
    for figure in (
        plots.bars([1.0, 3.0, 0.5], "t", "x", "y"),
        plots.shares({"a $ b": 1.0, "c": 2.0}, "t", "s"),
        plots.heat([[1.0, 10.0], [100.0, 1e3]], "t", "x", "y"),
    ):
        pixels = imread(io.BytesIO(report.png(figure)))
        rectangles = ET.fromstring(figure).findall(".//{*}rect")
        assert rectangles
        for r in rectangles:
            x, y, w, h = (float(r.get(key, 0)) for key in ("x", "y", "width", "height"))
            colour = (r.get("fill") or r.get("style", "").removeprefix("fill:")).removeprefix("#")
            want = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
            got = pixels[round(2 * y + h), round(2 * x + w), :3]  # the middle, at two pixels for one
            assert abs(got - want).max() < 0.02, (r.attrib, got, want)


def test_a_png_s_text_stands_where_the_svg_s_does() -> None:
    svg = '<text x="{}" y="40.0" text-anchor="{}">mmmm</text>'
    for anchor, left, right in (("start", 50, 110), ("middle", 20, 80), ("end", -10, 50)):
        pixels = imread(io.BytesIO(report.png(plots.svg(svg.format(50, anchor), "t", 120, 60))))
        rows, columns = (pixels[..., 0] < 0.5).nonzero()
        assert left * 2 - 4 <= columns.min() <= columns.max() <= right * 2 + 4
        assert 28 * 2 <= rows.min() <= rows.max() <= 41 * 2


def test_without_matplotlib_only_png_is_missing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = CliRunner().invoke(app, ["report", str(whole), "--figures", str(tmp_path)])
    assert done.exit_code == 1
    assert "flatquant[plot]" in done.output
    run("report", whole, "--figures", tmp_path, "--no-png")
    assert {file.suffix for file in tmp_path.iterdir()} == {".svg"}


@pytest.mark.parametrize(
    "low, high", [(1.09, 7.6), (0.286, 4.55), (1.07, 1.61), (2.0, 2.9), (1e-7, 1e-1), (0.3, 700.0)]
)
def test_ticks_of_a_logarithmic_axis_are_round(low: float, high: float) -> None:
    figure = plots.lines({"a": [low, high]}, "t", "x", "y", log=True)
    texts = [t.text or "" for t in ET.fromstring(figure).findall(".//{*}text") if t.get("text-anchor") == "end"]
    assert 2 <= len(texts) <= 9
    for text in texts:
        assert float(text) == float(f"{float(text):.2g}")
        assert low <= float(text) <= max(high, 1.5 * low)  # an axis spans a little at least


def test_figures_have_visible_titles_and_the_scheme_is_put_in_words(whole: Path) -> None:
    text = " ".join(parsed((whole / report.FILE).read_text()).text)
    assert "Condition numbers of the transforms." in text
    assert "Weights, activations, keys and values in 4 bits." in text
    spec = {"weights": {"bits": 3}, "activations": None, "keys": {"bits": 4}, "values": {"bits": 4}}
    page = report.page("out", {"scheme": "w3kv4"}, {"recipe": {"scheme": spec}, "model": {"name": "org/m"}}, None, None)
    assert "Weights in 3 bits, keys and values in 4 bits and activations in 16 bits." in page
    assert "--divergence-from org/m" in page


def test_a_mixture_s_experts_are_drawn() -> None:
    blocks = [{"block": 0, "experts": {"tokens": [3, 0, 96], "rare": [1]}}, {"block": 1}]
    drawn = report.figures({"blocks": blocks}, None)
    assert "Calibration tokens by expert" in drawn["experts"][1]
    assert "experts" not in report.figures({"blocks": [{"block": 1}]}, None)


VERDICT = {
    "word": "destroyed",
    "kl": 3.25,
    "top1": 0.125,
    "perplexity": {"original": 18.8, "quantised": 719593.0},
    "windows": 4,
    "seqlen": 256,
    "source": "wikitext2",
    "kept_back": True,
    "bounds": {"degraded": 2.0, "excellent": 0.05, "good": 0.35},
    "packed": {"tokens": 16, "kl": 0.0, "equal": True},
    "blame": [
        {"kind": "keys", "block": None, "site": None, "kl": 0.21},
        {"kind": "keys", "block": 0, "site": None, "kl": 0.31},
        {"kind": "weights", "block": None, "alone": 0.11},
    ],
    "proposal": {"scheme": "w4a4kv4,0.k8", "kl": 0.22, "before": 3.1},
    "texts": [{"prompt": "The ocean is", "original": " wide & deep", "quantised": ",,, the_"}],
}


def test_the_page_opens_with_the_verdict() -> None:
    html = report.page(
        "out", {"scheme": "w4a4kv4"}, {"verdict": VERDICT, "model": {"title": "Qwen2.5-1.5B"}}, None, None
    )
    text = " ".join(parsed(html).text)
    assert text.index("Qwen2.5-1.5B, w4a4kv4") < text.index("destroyed") < text.index("Quality")
    for part in (
        "4 windows of 256 tokens of wikitext2, kept back from calibration",
        "18.8 → 719,593",
        "3.25 nats per token",
        "with keys in 16 bits, KL 0.21 remains; with those of one block only: block 0 (0.31)",
        "try --scheme w4a4kv4,0.k8: with these parts at 8 bits, KL 3.1 -> 0.22",
        "The ocean is",
        "wide & deep",
        ",,, the_",
    ):
        assert part in text
    assert "Not measured yet" not in text
    good = {**VERDICT, "word": "good", "kl": 0.2, "blame": [], "proposal": None, "texts": [], "packed": None}
    text = " ".join(parsed(report.page("out", {}, {"verdict": good}, None, None)).text)
    assert "What is to blame" not in text
    assert "What both write" not in text


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"end_to_end": {"losses": [0.2, 0.1], "undone": False}}, ""),
        ({"end_to_end": {"losses": [0.2, 0.1], "undone": True}}, "end-to-end fit was undone"),
        ({"end_to_end": {"losses": [], "plain": 4e-4, "undone": True}}, "plain rounding loses"),
        ({"blocks": [{"block": 0}, {"block": 3, "undone": True}]}, "fit of block 3 was undone"),
    ],
)
def test_the_page_says_what_was_not_kept(found: dict, said: str) -> None:
    text = " ".join(parsed(report.page("out", {}, found, None, None)).text)
    sentences = ("was undone", "Nothing was fitted")
    assert said in text if said else not any(s in text for s in sentences)


@pytest.mark.parametrize("kl", [0.0, 1e-9, 0.05, 0.2, 1.0, 7.0, 1e9, None])
def test_the_scale_marks_its_value_within_its_zone(kl: float | None) -> None:
    figure = plots.scale(kl, VERDICT["bounds"], "destroyed", "KL", "nats")
    root = ET.fromstring(figure)
    space = "{http://www.w3.org/2000/svg}"
    zones = [(float(z.get("x")), float(z.get("width"))) for z in root.iter(f"{space}rect")]
    assert len(zones) == 4
    assert all(width > 0 for _, width in zones)
    mark = float(root.findall(f"{space}path")[1].get("d").split()[0].removeprefix("M"))
    zone = 3 if kl is None else sum(kl > bound for bound in VERDICT["bounds"].values())
    assert zones[zone][0] - 0.2 <= mark <= sum(zones[zone]) + 0.2


def test_without_collection_and_evaluation_it_says_how_to_get_them(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "quantised"))
    for name in ("flatquant_collection.json", "flatquant_evaluation.json", "flatquant_report.json"):
        (folder / name).unlink()
    run("report", folder)
    text = " ".join(parsed((folder / report.FILE).read_text()).text)
    assert "--collect ORIGINAL" in text
    assert "Not measured yet" in text


def test_names_from_files_are_text_and_not_markup(whole: Path) -> None:
    evil = "<script>alert(1)</script>"
    html = report.page(
        evil,
        {"scheme": evil, "recipe": evil, "architecture": evil, "bytes_by_kind": {evil: 3}},
        {
            "recipe": {evil: evil},
            "versions": {evil: evil},
            "timing": {"seconds": {evil: 1.0}},
            "model": {"title": evil},
            "verdict": VERDICT
            | {"word": evil, "source": evil, "proposal": {"scheme": evil, "kl": None, "before": 1.0}}
            | {"texts": [{"prompt": evil, "original": evil, "quantised": evil}]},
        },
        {"perplexity": {evil: {"value": 3.0}}, "tasks": {evil: {"value": 0.5, "stderr": 0.1, "metric": evil}}},
        {"transforms": [{"block": 0, "where": evil, "condition": 2.0}]},
    )
    assert evil not in html
    parsed(html)


def test_damaged_json_is_an_error_in_one_line(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "quantised"))
    (folder / "flatquant_collection.json").write_text('{"flatness": [3]}')
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 1
    assert "damaged" in done.output


def test_the_card_has_the_evaluation(whole: Path) -> None:
    assert "KL divergence from the original" in (whole / "README.md").read_text()
    load(whole)  # what was added is not hashed


@pytest.mark.parametrize("width, dark", [(1280, False), (390, False), (390, True)])
def test_a_browser_shows_it_without_complaint(whole: Path, tmp_path: Path, width: int, dark: bool) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = tmp_path / "page.html"
    # The page itself has no script: a copy reports whether anything is wider than the window.
    probe = "<script>document.title=document.documentElement.scrollWidth+' of '+innerWidth</script>"
    page.write_text((whole / report.FILE).read_text().replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found, done.stderr
    assert int(found[1]) <= int(found[2])


# --------------------------------------------------------------------------------------------- what is collected


def test_collection_measures_what_it_says(whole: Path) -> None:
    found = json.loads((whole / "flatquant_collection.json").read_text())
    blocks = len(Folder.open(whole).plan.blocks)
    assert len(found["flatness"]) == 4 * blocks
    assert len(found["surface"]) == len(found["alone"]) == blocks
    assert found["kl"] > 0
    assert all(v > 0 for v in found["alone"])
    assert all(v >= 1 for v in (t["condition"] for t in found["transforms"]))
    assert len(found["transforms"]) == blocks * (2 + 1 + 2 + 2 + 1)  # attn_out's right factor is with its writer
    for entry in found["flatness"]:
        for kind in ("activations", "weights"):
            for base in entry[kind].values():
                assert base["curve"] == sorted(base["curve"], reverse=True)
                assert base["curve"][0] == base["peak"] >= 1


def test_nothing_quantised_is_nothing_different() -> None:
    original = tiny_llama(**SHAPE)
    model, plan, _ = calibrated(original, rtn("w16"))
    before = {k: v.clone() for k, v in original.state_dict().items()}
    tokens = torch.randint(0, 120, (2, 12), generator=torch.Generator().manual_seed(1))
    found = collect(model, original, plan, tokens)
    assert abs(found["kl"]) < 1e-6
    assert all(abs(v) < 1e-6 for v in found["alone"])
    assert all(v < 1e-4 for row in found["surface"] for v in row)
    for entry in found["flatness"]:
        assert entry["weights"]["none"] == entry["weights"]["quantised"]
    # The original is as it was.
    assert original.config._attn_implementation == "sdpa"
    assert before.keys() == original.state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in original.state_dict().items())


def test_another_model_is_an_error() -> None:
    model, plan, _ = calibrated(tiny_llama(**SHAPE), rtn("w4"))
    with pytest.raises(ModelError, match="other blocks"):
        collect(model, tiny_llama(layers=3), plan, torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ModelError, match="other embeddings"):
        collect(model, tiny_llama(**{**SHAPE, "vocab": 64}), plan, torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ModelError, match="the original is a mixtral, the quantised model a llama"):
        collect(model, tiny_family("mixtral", hidden_size=24), plan, torch.ones(1, 8, dtype=torch.long))
    with pytest.raises(ModelError, match="itself quantised"):
        collect(model, calibrated(tiny_llama(**SHAPE), rtn("w4"))[0], plan, torch.ones(1, 8, dtype=torch.long))
