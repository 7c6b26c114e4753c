"""docs/explorer.html is up to date, computes what the library computes, and is accessible."""

import dataclasses
import importlib.util
import json
import re
import sys
import urllib.parse
from pathlib import Path

import pytest

from jax_lora.finetune.settings import TrainSettings
from jax_lora.plan.arithmetic import Step
from jax_lora.plan.methods import side_by_side
from jax_lora.plan.planned_model import plan_shape, with_dtype
from jax_lora.plan.planning import method_of
from jax_lora.plan.units import show_bytes, show_count
from tests.browser import open_browser, requested_urls, resize

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explorer.html"


@pytest.fixture(scope="module")
def builder():
    sys.path.insert(0, str(ROOT / "scripts"))
    path = ROOT / "scripts" / "build_explorer.py"
    spec = importlib.util.spec_from_file_location("build_explorer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


# -------------------------------------------------------------------------------------------------
# The file
# -------------------------------------------------------------------------------------------------


def test_the_page_is_up_to_date(builder):
    assert PAGE.read_text(encoding="utf-8") == builder.build(), "run scripts/build_explorer.py"


def test_the_page_loads_nothing():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(|https?://|fetch\(""", text
    )


@pytest.mark.parametrize(
    "line",
    [
        "def f(x): return [y for y in x]",
        "def f(x): x += 1",
        "def f(x): return x @ x",
        "while True: pass",
    ],
)
def test_unsupported_python_stops_the_build(builder, line, tmp_path):
    (tmp_path / "formulas.py").write_text(line + "\n")
    spec = importlib.util.spec_from_file_location("formulas", tmp_path / "formulas.py")
    assert spec is not None
    with pytest.raises(SyntaxError, match="line 1: .* has no translation"):
        builder.translate(_loaded(spec, run=not line.startswith("while")))


def _loaded(spec, *, run):
    module = importlib.util.module_from_spec(spec)
    if run:
        spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------------
# In a browser
# -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def open_page(browser, **state):
    browser.get("about:blank")
    browser.get(f"{PAGE.as_uri()}#{urllib.parse.urlencode(state)}")
    return json.loads(browser.execute_script("return document.documentElement.dataset.numbers"))


FIELDS = ("model", "targets", "rank", "precision", "optimizer", "rows", "length", "remat")
CASES = [
    ("gpt3-175b", "q and v", 4, 2, "adamw", 1, 2048, 1),
    ("llama-2-7b", "all-linear", 8, 2, "lion", 4, 1024, 0),
    ("llama-3-70b", "mlp", 100, 4, "adamw", 2, 8192, 1),
    ("qwen3-0.6b", "attention", 1024, 4, "sgd", 3, 77, 0),
    ("gemma-2-2b", "q and v", 1, 2, "adafactor", 16, 512, 1),
    ("gpt2", "q and v", 16, 4, "adamw", 8, 1024, 0),
    ("roberta-base", "q and v", 8, 4, "rmsprop", 32, 128, 0),
    ("mixtral-8x7b", "all-linear", 4, 2, "adamw", 1, 4096, 1),
]
STATES = [dict(zip(FIELDS, case, strict=True)) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES, ids=[state["model"] for state in STATES])
def test_it_computes_what_the_library_computes(builder, browser, state):
    got = open_page(browser, **state)
    dtype = {2: "bfloat16", 4: "float32"}[state["precision"]]
    model = with_dtype(plan_shape(state["model"], None), dtype)
    targets = builder.targets_of(state["model"], state["targets"])
    settings = TrainSettings(rank=state["rank"], targets=targets, optimizer=state["optimizer"])
    method = dataclasses.replace(
        method_of(model, settings), on_cpu=False
    )  # the page is of accelerators
    length = state["length"]
    step = Step(batch_size=state["rows"], length=length, targets=length, remat=bool(state["remat"]))
    expected = side_by_side(method, step)

    assert got["trained"] == method.trainable
    for name, estimate in expected.items():
        numbers = {key: value for key, value in estimate.as_dict().items() if key != "total"}
        assert got["columns"][name] == pytest.approx(numbers, rel=1e-12), name
        shown = browser.find_element("css selector", f'[data-method="{name}"]')
        assert float(shown.get_attribute("data-value")) == pytest.approx(estimate.total, rel=1e-12)
        assert shown.text == show_bytes(estimate.total)
    assert browser.find_element("id", "trained").text == f"{method.trainable:,}"
    assert browser.find_element("id", "adapter-size").text == show_bytes(4 * method.trainable)
    assert browser.find_element("id", "flops").text == show_count(expected["LoRA"].flops)


@pytest.mark.slow
def test_the_kernel_of_the_paper(browser):
    open_page(browser, model="llama-2-7b", kernel="layers/attn/q_proj/kernel", rank=8)
    headline = browser.find_element("id", "headline")
    assert headline.text == "65,536 parameters instead of 16,777,216: 99.61% fewer"
    pair, whole, spared = json.loads(headline.get_attribute("data-value"))
    assert (pair, whole, spared) == (65536, 16777216, 1 - 65536 / 16777216)


@pytest.mark.slow
def test_the_matrices_are_drawn_to_scale(browser):
    open_page(browser, model="llama-3-8b", kernel="layers/mlp/down_proj/kernel", rank=1024)
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('#picture rect')]"
        ".map(r => [+r.getAttribute('height'), +r.getAttribute('width')])"
    )
    unit = boxes[0][0] / 14336
    for box, shape in zip(boxes, [(14336, 4096), (14336, 1024), (1024, 4096)], strict=True):
        assert box == pytest.approx([unit * size for size in shape])


@pytest.mark.slow
def test_it_works_with_the_keyboard_only(browser):
    from selenium.webdriver.common.keys import Keys

    open_page(browser)
    reached = []
    body = browser.find_element("tag name", "body")
    body.send_keys(Keys.TAB)
    for _ in range(16):
        focused = browser.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.tag_name)
        outline = browser.execute_script(
            "return getComputedStyle(arguments[0]).outlineStyle", focused
        )
        assert outline != "none", reached
        if reached[-1] == "summary":
            break
        focused.send_keys(Keys.TAB)
    assert reached[:2] == ["rank", "rank-number"]
    controls = {"model", "kernel", "targets", "precision", "optimizer", "rows", "length", "remat"}
    assert controls <= set(reached) and reached.count("button") == 3 and reached[-1] == "summary"

    slider = browser.find_element("id", "rank")
    slider.send_keys(Keys.HOME)
    assert browser.find_element("id", "headline").text.startswith("8,192 parameters")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert slider.get_attribute("aria-valuetext") == "rank 2"
    slider.send_keys(Keys.END)
    assert browser.find_element("id", "headline").text.endswith("100.00% more")
    browser.find_element("id", "model").send_keys("gpt3")
    assert browser.find_element("id", "share").text.endswith("of 174,604,259,328")
    browser.find_element("id", "remat").send_keys(Keys.SPACE)
    assert "remat=0" in browser.current_url
    browser.find_element("tag name", "summary").send_keys(Keys.ENTER)
    assert browser.find_element("id", "table").is_displayed()


@pytest.mark.slow
def test_every_control_has_a_name(browser):
    open_page(browser)
    for control in browser.find_elements("css selector", "input, select, button"):
        assert control.accessible_name.strip()


@pytest.mark.slow
def test_an_invalid_url_shows_valid_values(browser):
    got = open_page(
        browser,
        model="none",
        rank="-7",
        rows="x",
        length="1e99",
        optimizer="constructor",
        kernel="<b>",
    )
    assert got["trained"] > 0
    assert browser.find_element("id", "rank-number").get_attribute("value") == "1"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light")])
def test_it_fits_the_screen_with_readable_contrast(browser, width, scheme):
    resize(browser, width, scheme=scheme)
    for state in STATES:
        open_page(browser, **state)
        browser.execute_script("document.querySelector('details').open = true")
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, state
    for selector in (
        "h1",
        "header p",
        ".note",
        "dt",
        "dd small",
        ".headline .less",
        "footer p",
        "label",
        ".total",
    ):
        assert contrast(browser, selector) >= 4.5, selector


def contrast(browser, selector):
    """Compute the WCAG contrast ratio of a text and its background."""
    script = """
        const e = document.querySelector(arguments[0]);
        let b = e;
        while (getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(b).backgroundColor];
    """
    text, behind = (luminance(colour) for colour in browser.execute_script(script, selector))
    return (max(text, behind) + 0.05) / (min(text, behind) + 0.05)


def luminance(colour):
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.slow
def test_it_makes_no_requests_and_logs_no_errors(browser):
    for log in ("browser", "performance"):  # discard entries of earlier tests
        browser.get_log(log)
    open_page(browser)
    assert browser.get_log("browser") == []
    # The browser's own start page, which a file cannot request, may still be loading.
    asked = (url for url in requested_urls(browser) if not url.startswith("chrome:"))
    assert {url.split("#")[0] for url in asked} - {"about:blank", "data:,"} == {PAGE.as_uri()}
