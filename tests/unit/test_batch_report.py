"""HTML pages: what they show, and that a browser without network shows it too."""

import re
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer

import nbformat
import pytest

from pllm_helpers.batch.claims import CLAIM_MIME
from pllm_helpers.batch.report import PLOTLY, WIDGET, index_page, mathml, notebook_page

FORMULAS = r"""# EOE & <IDD>: $H_\pi$
Inline $p_i = \lVert e_i \rVert_2$, code `$not math$`, and

$$\mathrm{EOE}(E) = -\frac{1}{\log n}\sum_{i=1}^{n} p_i \log p_i$$

\begin{align*} a &= b \\ c &= d \end{align*}

```python
x = "$y$"
```
See [next](01_next.ipynb#part), [web](https://example.org/a.ipynb) and [here](#part).
"""


def _notebook(*outputs, markdown=()):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_markdown_cell(text) for text in markdown]
    cell = nbformat.v4.new_code_cell("x = 1  # a comment")
    cell.outputs = list(outputs)
    notebook.cells.append(cell)
    return notebook


def _show(data, metadata=None):
    return nbformat.v4.new_output("display_data", data=data, metadata=metadata or {})


def _figure(text="bar"):
    return {
        PLOTLY: {"data": [{"type": "bar", "x": [text, "b"], "y": [1, 2]}], "layout": {"title": {"text": "Two bars"}}},
        "text/plain": "Figure()",
    }


def _body(page):
    return page.partition("<main>")[2].partition("</main>")[0]


class _Loads(HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            fetched = name in ("src", "srcset", "poster", "data") or (tag == "link" and name == "href")
            if fetched and not (value or "").startswith("data:"):
                self.found.append((tag, name, value))


def test_formulas_become_mathml_and_code_stays():
    body = _body(notebook_page(_notebook(markdown=[FORMULAS]), title="t"))
    assert body.count("<math ") == 4 and 'class="tex"' not in body
    assert "<code>$not math$</code>" in body and "$y$" in re.sub(r"<[^>]+>", "", body)
    assert re.search(r'<math tabindex="0" alttext="[^"]*EOE[^"]*" [^>]*display="block"', body)
    assert (
        'href="01_next.html#part"' in body and 'href="https://example.org/a.ipynb"' in body and 'href="#part"' in body
    )


@pytest.mark.parametrize(
    ("tex", "part"),
    [
        (r"\begin{aligned} a &= b \\ c &= d \end{aligned}", "<mtable"),
        (r"\arg\min_\theta L", "argmin"),
        (r"\operatorname*{arg\,max}_x f", "argmax"),
        (r"\operatorname*{IDD}_x", "IDD"),
        (r"\bigl\|x\bigr\|_2", "‖"),
        (r"\Big\lVert x\Big\rVert", "‖"),
        (r"x < y", "&#x0003C;"),
    ],
)
def test_formulas_that_need_help(tex, part):
    markup = mathml(tex, block=True)
    assert markup.startswith("<math ") and part in re.sub(r"&#x0200[0-9A-F];", "", markup)
    assert "\\" not in re.sub(r'alttext="[^"]*"', "", markup)


@pytest.mark.parametrize("tex", [r"\unheardof{x} < 1", r"a & b", r"\frac{"])
def test_formulas_that_cannot_be_converted_stay_readable(tex):
    markup = mathml(tex)
    assert markup.startswith('<code class="tex">') or "<math" in markup
    assert "\\unheardof" not in markup or "&lt; 1" in markup
    assert not re.search(r"&(?!#?\w+;)", markup)


def test_texts_of_every_kind_are_escaped():
    nasty = "</script><script>alert(1)</script>"
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=nasty),
        nbformat.v4.new_output("stream", name="stderr", text=nasty),
        nbformat.v4.new_output("error", ename="E", evalue=nasty, traceback=[f"\x1b[31m{nasty}\x1b[0m"]),
        _show({"text/plain": nasty}),
        _show(_figure(nasty), {PLOTLY: {"alt": f'"{nasty}'}}),
        _show({CLAIM_MIME: {"claim": nasty, "verdict": "fails", "kind": "statistical", "bound": nasty, "value": 1.0,
                            "low": 1.0, "high": 1.0, "unit": nasty, "n": 1, "paper": nasty}}),
    ]  # fmt: skip
    page = notebook_page(_notebook(*outputs), title=nasty, error=nasty)
    assert "<script>alert" not in page and "\x1b" not in page


def test_streams_show_what_a_terminal_shows():
    pieces = [
        nbformat.v4.new_output("stream", name="stderr", text=t) for t in ("\r 10%", "\r 90%", "\rdone\n", "next\r")
    ]
    body = re.sub(r"<[^>]+>", "", _body(notebook_page(_notebook(*pieces), title="t")))
    assert "done\nnext" in body and "%" not in body


def test_widgets_show_the_text_they_carry_or_say_that_they_need_a_kernel():
    view = {"model_id": "m", "version_major": 2, "version_minor": 0}
    page = notebook_page(
        _notebook(_show({WIDGET: view, "text/html": "<p>three metrics</p>"}), _show({WIDGET: view})), title="t"
    )
    assert _body(page).count("<p>three metrics</p>") == 1 and _body(page).count("open the notebook in JupyterLab") == 1
    both = notebook_page(_notebook(_show({WIDGET: view, "text/html": "<p>text</p>", **_figure()})), title="t")
    assert "<p>text</p>" in both and 'class="plotly"' in both


def test_figures_have_a_name():
    named = [{PLOTLY: {"alt": "Bars rise"}}, {"alt": "Bars rise"}]
    for metadata in named:
        assert 'role="img" aria-label="Bars rise"' in notebook_page(_notebook(_show(_figure(), metadata)), title="t")
    assert 'aria-label="Two bars"' in notebook_page(_notebook(_show(_figure())), title="t")
    png = _show({"image/png": "iVBORw0KGgo=\n"}, {"image/png": {"alt": 'a "dot"'}})
    assert '<img src="data:image/png;base64,iVBORw0KGgo=" alt="a &quot;dot&quot;">' in notebook_page(
        _notebook(png), title="t"
    )


def test_images_of_the_text_are_put_into_the_page(tmp_path):
    (tmp_path / "map.png").write_bytes(b"\x89PNG")
    page = notebook_page(_notebook(markdown=["![the map](map.png)"]), title="t", folder=tmp_path)
    assert 'src="data:image/png;base64,' in page and 'alt="the map"' in page


def test_plotly_is_in_the_page_once_and_only_where_needed():
    two = notebook_page(_notebook(_show(_figure()), _show(_figure())), title="t")
    none = notebook_page(_notebook(markdown=["text"]), title="t")
    assert two.count("plotly.js v") == 1 and len(none) < 50_000
    assert _Loads(two.partition("<script>")[0]).found == [] and _Loads(none).found == []


RUN = {
    "profile": "quick", "started": "2026-01-01", "seconds": 3.0, "threads": 2, "complete": True, "interrupted": None,
    "machine": {"system": "Linux"}, "versions": {"python": "3.11"},
}  # fmt: skip


def test_the_index_lists_everything_escaped():
    row = {"title": "<T>", "seconds": 1.25, "peak_rss_mb": 1234.5, "error": "", "parameters": {"user": "<u>"}}
    rows = [
        {**row, "name": "00_a", "status": "ok"},
        {**row, "name": "01_é b#", "status": "failed", "error": "<E>"},
        {**row, "name": "02_c", "status": ""},
    ]
    estimate = {"notebook": "00_a", "value": 0.5, "low": -1.0, "high": 2.0, "n": 9, "unit": "s"}
    claim = {**estimate, "claim": "<c>", "verdict": "inconclusive", "kind": "statistical", "bound": "", "paper": ""}
    result = {**estimate, "name": "<r>", "seeds": []}
    page = index_page(RUN, rows, [claim], [result])
    assert not re.search("<(T|u|E|c|r)>", page)
    for text in (
        "✓ ok",
        "✗ failed",
        "not run",
        "1,234",
        "1.2",
        "Claim inconclusive",
        "0.5 [-1, 2]",
        "&lt;E&gt;",
    ):
        assert text in page
    assert 'href="html/00_a.html"' in page and 'href="html/01_%C3%A9%20b%23.html"' in page and "02_c.html" not in page
    assert "Finished" in page and "Interrupted" in index_page({**RUN, "interrupted": "x"}, rows, [], [])


@pytest.fixture
def open_page(chromium):
    """``open_page(path, offline=…)`` in Chromium: the page, what it asked for, and what it complained of."""
    contexts = []

    def show(path, offline):
        contexts.append(chromium.new_context(offline=offline))
        page = contexts[-1].new_page()
        requests, problems = [], []
        page.on("request", lambda r: requests.append(r.url))
        page.on("console", lambda m: problems.append(m.text))
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.goto(path.as_uri())
        page.wait_for_load_state("load")
        return page, requests, problems

    yield show
    for context in contexts:
        context.close()


@pytest.mark.browser
def test_a_browser_without_network_shows_figures_and_formulas(tmp_path, open_page):
    path = tmp_path / "page.html"
    notebook = _notebook(_show(_figure()), _show(_figure("</script>")), markdown=[FORMULAS])
    path.write_text(notebook_page(notebook, title="Übung"), encoding="utf-8")
    page, requests, problems = open_page(path, offline=True)
    page.wait_for_selector("figure.plotly:nth-of-type(1) svg.main-svg", state="attached")
    assert page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.data[0].y)") == [[1, 2], [1, 2]]
    assert page.evaluate("document.querySelectorAll('.plot')[1].data[0].x[0]") == "</script>"
    assert page.get_by_role("img", name="Two bars").count() == 2
    assert (page.title(), page.get_attribute("html", "lang")) == ("Übung", "en")
    assert page.evaluate("document.querySelector('math[display=block]').getBoundingClientRect().height") > 15
    assert requests == [path.as_uri()] and problems == []


@pytest.mark.browser
def test_what_an_output_would_fetch_is_stopped_by_the_page(tmp_path, open_page):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        html = f'<img src="{host}/x.png"><script src="{host}/x.js"></script><link rel="stylesheet" href="{host}/x.css">'
        html += f'<script>fetch("{host}/fetched")</script>'
        (tmp_path / "bare.html").write_text(html, encoding="utf-8")
        page = notebook_page(_notebook(_show({"text/html": html})), title="t")
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        open_page(tmp_path / "bare.html", offline=False)[0].wait_for_timeout(200)
        assert {"/x.png", "/x.js", "/x.css", "/fetched"} <= set(asked)  # it would
        asked.clear()
        page, _, problems = open_page(tmp_path / "page.html", offline=False)
        page.wait_for_timeout(200)
        server.shutdown()
    assert asked == []
    assert any("Content Security Policy" in text for text in problems)
