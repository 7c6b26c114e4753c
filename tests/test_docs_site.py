"""The documentation site: it builds strictly and has every public name; its links work."""

import functools
import http.server
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.browser import open_browser, requested_urls, resize

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
MODULES = ("jax_lora", "jax_lora.models", "jax_lora.peft", "jax_lora.finetune")
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


def build(folder, root=ROOT):
    """Build the site as `make docs` does."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@functools.cache
def docs_site():
    """Return the module of the hooks."""
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return hooks


class Page(HTMLParser):
    """Collects what a page loads, what it links to, and its anchors."""

    def __init__(self, file):
        super().__init__()
        self.loads, self.links, self.anchors = [], [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors.add(values.get("id"))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif values.get(LOADED.get(tag, "")):
            self.loads.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file) for file in site.rglob("*.html") if file.name != "explorer.html"}


# -------------------------------------------------------------------------------------------------
# The API
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_the_page_of_its_module(module, site, pages):
    page = site / "api" / f"{module.removeprefix('jax_lora.')}.html"
    names = getattr(importlib.import_module(module), "__all__", ())
    missing = {name for name in names if f"{module}.{name}" not in pages[page].anchors}
    assert not missing


def test_a_new_public_name_appears_by_itself(monkeypatch):
    peft = importlib.import_module("jax_lora.peft")
    monkeypatch.setattr(peft, "__all__", [*peft.__all__, "Keys"])
    monkeypatch.setattr(
        peft, "Keys", type("Keys", (), {"__doc__": "Names of tensors."}), raising=False
    )
    text = docs_site().public_names("jax_lora.peft")
    assert "| [`Keys`](#jax_lora.peft.Keys) | Names of tensors. |" in text
    assert '<a id="jax_lora.peft.Keys"></a>' in text


# -------------------------------------------------------------------------------------------------
# Links, and what is loaded
# -------------------------------------------------------------------------------------------------


def test_every_link_leads_to_a_page_and_an_anchor(pages):
    broken = []
    for file, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or file.name == "404.html":
                continue
            target = (file.parent / url.path).resolve() if url.path else file
            anchor = urllib.parse.unquote(url.fragment)
            anchors = pages[target].anchors if target in pages else {anchor}
            if not target.exists() or (anchor and anchor not in anchors):
                broken.append((file.name, link))
    assert not broken


def test_nothing_is_loaded_from_another_host(site, pages):
    for file, page in pages.items():
        hosts = [
            url for url in page.loads if "//" in url.split("?")[0] and not url.startswith("data:")
        ]
        assert not hosts, file
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"@import|url\([\"']?https?:", sheet.read_text(encoding="utf-8")), (
            sheet
        )


def test_a_broken_link_or_anchor_stops_the_build(tmp_path):
    """The settings and hooks of the site, with a few pages: no other warning stops this build."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    settings, nav, _ = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    assert nav
    (tmp_path / "mkdocs.yml").write_text(settings)
    for page in (*docs_site().MARKDOWN, "docs/api/jax_lora.md", "docs/index.md", "docs/idea.md"):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text("# A page\n")
    text = "# Evidence\n\n[x](no_such_page.md), [y](idea.md#no-such-heading)\n"
    (tmp_path / "docs" / "evidence.md").write_text(text)
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode != 0
    assert "'no_such_page.md'" in done.stderr
    assert "'#no-such-heading'" in done.stderr
    assert "Aborted with 2 warnings in strict mode" in done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------
# In a browser
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    with open_browser(tmp_path) as driver:  # one for each test: the pages remember their theme
        yield driver


def wait_for(browser, condition, message=""):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30, 0.1).until(lambda _: condition(), message)


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_every_page_fits_narrow_and_wide_screens_and_can_be_dark(browser, address, site, pages):
    for file in pages:
        resize(browser, 390, scheme="dark")
        browser.get(address + file.relative_to(site).as_posix())
        for width in (390, 1440):
            resize(browser, width, scheme="dark")
            # The drawer of narrow screens takes a moment to go.
            fits = functools.partial(content_fits, browser, width)
            wait_for(browser, fits, f"{file} on a screen of {width} pixels")
        wait_for(browser, lambda: theme(browser) == "slate")


def content_fits(browser, width):
    return browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_reader_of_light_pages_has_light_pages(browser, address):
    resize(browser, 1440, scheme="light")
    browser.get(address + "index.html")
    wait_for(browser, lambda: theme(browser) == "default")


def theme(browser):
    return browser.execute_script("return document.body.dataset.mdColorScheme")


@pytest.mark.parametrize("served", [True, False], ids=["served", "from disk"])
def test_search_finds_a_public_name_and_asks_no_other_host(browser, address, site, served):
    start = address if served else site.as_uri() + "/"
    resize(browser, 1440)
    requested_urls(browser)
    browser.get(start + "index.html")
    browser.execute_script("document.querySelector('[data-md-toggle=search]').click()")
    browser.find_element("css selector", "input.md-search__input").send_keys("find_kernels")
    results = ".md-search-result__item a"
    found = wait_for(browser, lambda: browser.find_elements("css selector", results))
    assert any("api/jax_lora.html" in link.get_attribute("href") for link in found)
    asked = {url for url in requested_urls(browser) if url.startswith(("http", "file"))}
    assert asked and all(url.startswith(start) for url in asked)
