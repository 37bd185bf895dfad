"""Executed notebooks as single HTML files that open offline, and the index of a run.

Cells are rendered with nbconvert's filters, but on a page of our own: its templates fetch
require.js, MathJax, jQuery and widgets from the network and leave plotly figures blank. Here
plotly.js stands once in the page, formulas are MathML, widgets show the static text that they
carry, and a content security policy keeps the browser from fetching anything.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from latex2mathml.converter import convert
from nbconvert.filters import Highlight2HTML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

from .claims import CLAIM_MIME, claim_html, number_text
from .execution import plain

__all__ = ["notebook_page", "index_page", "mathml"]

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
NO_KERNEL = "Interactive part: open the notebook in JupyterLab to use it."
NO_ALT = "Figure without a description"

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data:; worker-src blob:"
)

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1b1b; --soft: #fafbfc; --line: #c9ced6; --link: #0b57a4;
  --ok: #1b6e20; --bad: #b3171b; --maybe: #7a5c00; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --fg: #e8e8e8; --soft: #1d2127; --line: #454c57;
  --link: #8ab8ff; --ok: #7fce86; --bad: #ff8f8a; --maybe: #e6c15a; } }
body { margin: 0; background: var(--bg); color: var(--fg); font: 1.05rem/1.55 system-ui, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 1rem; }
a { color: var(--link); } nav { max-width: 58rem; margin: 0 auto; padding: .6rem 1rem 0; }
h1, h2, h3 { line-height: 1.25; } h1 { font-size: 1.9rem; } h2 { margin-top: 2.2rem; }
.anchor-link { visibility: hidden; margin-left: .3em; text-decoration: none; }
h1:hover .anchor-link, h2:hover .anchor-link, h3:hover .anchor-link, .anchor-link:focus { visibility: visible; }
pre, code, .tex { font-family: ui-monospace, Consolas, Menlo, monospace; font-size: .92em; }
pre { overflow-x: auto; padding: .6rem .8rem; margin: 0; white-space: pre; }
.code { margin: 1rem 0 .4rem; }
.code .highlight, .markdown pre { background: var(--soft); border: 1px solid var(--line); border-radius: 4px; }
.output { margin: .2rem 0 .8rem 1rem; overflow-x: auto; } .output pre { padding: .2rem 0; }
.stderr { border-left: 4px solid var(--maybe); } .stderr pre, .error pre { padding: .4rem .8rem; }
.error { border-left: 4px solid var(--bad); }
table { border-collapse: collapse; border: 0; display: block; overflow-x: auto; max-width: 100%; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } img, svg { max-width: 100%; }
blockquote { border-left: 4px solid var(--line); margin-left: 0; padding-left: 1rem; }
details { border: 1px solid var(--line); border-radius: 4px; padding: .4rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; } :focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.status { font-weight: 700; } .ok { color: var(--ok); } .failed, .timeout { color: var(--bad); }
math[display="block"] { margin: .8rem 0; overflow-x: auto; }
math [mathvariant="bold"], math [mathvariant="bold-italic"] { font-weight: bold; text-transform: none; }
""".strip()

DRAW = """
for (const box of document.querySelectorAll("figure.plotly")) {
  const spec = JSON.parse(box.querySelector("script").textContent);
  spec.config = {responsive: true, displayModeBar: false};
  Plotly.newPlot(box.querySelector(".plot"), spec).catch((e) => { box.append(String(e)); });
}
""".strip()

STATUS = {"ok": "✓ ok", "failed": "✗ failed", "timeout": "✗ timeout", "": "not run"}


def notebook_page(notebook: NotebookNode, *, title: str, folder: Path | None = None, error: str = "") -> str:
    """An executed notebook as one HTML page that needs nothing else.

    Parameters
    ----------
    title : title of the page.
    folder : where images named in the text lie.
    error : one line on why the notebook failed; shown on top.
    """
    body = [_cell(cell, number, folder) for number, cell in enumerate(notebook.cells, 1)]
    banner = f'<p class="error output" role="alert"><b>This notebook failed.</b> {escape(error)}</p>' if error else ""
    scripts = ""
    if any('<figure class="plotly"' in part for part in body):
        scripts = f"<script>{_plotly_js()}</script>\n<script>{DRAW}</script>"
    nav = '<nav><a href="../index.html">All notebooks of this run</a></nav>'
    return _page(title, nav, banner + "\n".join(body), _code_style(), scripts)


def index_page(run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]],
               results: Sequence[Mapping[str, Any]]) -> str:  # fmt: skip
    """The index of a run.

    Parameters
    ----------
    run : the ``run`` block of results.json.
    rows : one per notebook: ``name``, ``title``, ``status`` (empty: not run), ``seconds``,
        ``peak_rss_mb``, ``error``, ``parameters``.
    claims, results : as collected from the notebooks, with every field that was shown.
    """
    verdicts = {v: sum(c["verdict"] == v for c in claims) for v in ("holds", "fails", "inconclusive")}
    state = "Interrupted" if run["interrupted"] else "Finished" if run["complete"] else "Not finished"
    parts = [
        "<h1>pllm run</h1>",
        f"<p>{state}. Profile {escape(run['profile'])}, started {escape(run['started'])}, "
        f"{run['seconds']:.0f} s, {run['threads']} threads, {escape(run['machine']['system'])}, "
        f"Python {escape(run['versions']['python'])}. Claims: {verdicts['holds']} hold, {verdicts['fails']} fail, "
        f'{verdicts["inconclusive"]} inconclusive. All numbers: <a href="results.json">results.json</a>.</p>',
        '<h2 id="notebooks">Notebooks</h2>',
        _table(
            ("Notebook", "Status", "Seconds", "Peak memory, MB", "Parameters"),
            [_notebook_row(row) for row in rows],
            numbers=(2, 3),
        ),
    ]
    for row in rows:
        mine = [c for c in claims if c["notebook"] == row["name"]]
        numbers = [r for r in results if r["notebook"] == row["name"]]
        if not (mine or numbers):
            continue
        parts.append(f"<h2>{escape(row['title'])}</h2>")
        if mine:
            parts += ["<h3>Claims</h3>", *(claim_html(c) for c in mine)]
        if numbers:
            cells = [
                (
                    f"<code>{escape(r['name'])}</code>",
                    escape(number_text(r)),
                    str(r["n"]),
                    escape(", ".join(map(str, r["seeds"])) or "–"),
                )
                for r in numbers
            ]
            parts += ["<h3>Results</h3>", _table(("Name", "Value", "n", "Seeds"), cells, numbers=(2,))]
    return _page("pllm run", "", "\n".join(parts), "", "")


def _notebook_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    status, name = row["status"], escape(row["name"])
    ran = bool(status)
    href = quote(f"html/{row['name']}.html")
    link = f'<a href="{href}">{escape(row["title"])}</a>' if ran else escape(row["title"])
    error = f"<br>{escape(row['error'])}" if row["error"] else ""
    values = ", ".join(f"{k} = {v!r}" for k, v in row["parameters"].items())
    return (
        f"{link}<br><code>{name}</code>",
        f'<span class="status {status}">{STATUS[status]}</span>{error}',
        f"{row['seconds']:.1f}" if ran else "–",
        f"{row['peak_rss_mb']:,.0f}" if ran else "–",
        f"<code>{escape(values)}</code>" if values else "–",
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def kind(i: int) -> str:
        return ' class="number"' if i in numbers else ""

    top = "".join(f'<th scope="col"{kind(i)}>{escape(text)}</th>' for i, text in enumerate(head))
    body = "\n".join("<tr>" + "".join(f"<td{kind(i)}>{x}</td>" for i, x in enumerate(row)) + "</tr>" for row in rows)
    return f'<table tabindex="0"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'


def _page(title: str, nav: str, body: str, style: str, scripts: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}\n{style}</style>\n</head>\n<body>\n"
        f"{nav}\n<main>\n{body}\n</main>\n{scripts}\n</body>\n</html>\n"
    )


def _cell(cell: NotebookNode, number: int, folder: Path | None) -> str:
    if cell.cell_type == "markdown":
        return (
            f'<div class="markdown" id="cell-{number}">{_markdown(cell.source, folder, cell.get("attachments"))}</div>'
        )
    if cell.cell_type != "code" or not (cell.source.strip() or cell.outputs):
        return ""
    code = _highlighter()(cell.source).replace("<pre>", '<pre tabindex="0">') if cell.source.strip() else ""
    tags = cell.metadata.get("tags", [])
    if "hide-input" in tags or cell.metadata.get("jupyter", {}).get("source_hidden"):
        code = f"<details><summary>Code</summary>{code}</details>"
    outputs = "\n".join(_output(o, folder) for o in _joined(cell.outputs))
    return f'<div class="code" id="cell-{number}">{code}</div>\n{outputs}'


def _joined(outputs: Sequence[NotebookNode]) -> list[Mapping[str, Any]]:
    """Outputs with neighbouring pieces of one stream put together."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("output_type") == "stream" and last.get("name") == output.name:
            joined[-1] = {**last, "text": last["text"] + output.text}
        else:
            joined.append(output)
    return joined


def _output(output: Mapping[str, Any], folder: Path | None) -> str:
    kind = output["output_type"]
    if kind == "stream":
        text = "\n".join(_last_return(line) for line in plain(output["text"]).split("\n"))
        return _pre(text, "stderr" if output["name"] == "stderr" else "stdout")
    if kind == "error":
        text = plain("\n".join(output["traceback"])) or f"{output['ename']}: {output['evalue']}"
        return _pre(text, "error")
    html = _rich(output.get("data", {}), output.get("metadata", {}), folder)
    return f'<div class="output">{html}</div>' if html else ""


def _last_return(line: str) -> str:
    """What a terminal shows of a line that was overwritten with carriage returns (progress bars)."""
    return next((part for part in reversed(line.split("\r")) if part), "")


def _pre(text: str, kind: str) -> str:
    return f'<div class="output {kind}"><pre tabindex="0">{escape(text.rstrip())}</pre></div>' if text.strip() else ""


def _rich(data: Mapping[str, Any], metadata: Mapping[str, Any], folder: Path | None) -> str:
    if WIDGET in data:
        parts = [data["text/html"]] if "text/html" in data else []
        parts += [_figure(data[PLOTLY], _alt(metadata, PLOTLY))] if PLOTLY in data else []
        return "\n".join(parts) or f"<p><em>{NO_KERNEL}</em></p>"
    if PLOTLY in data:
        return _figure(data[PLOTLY], _alt(metadata, PLOTLY))
    if CLAIM_MIME in data:
        return claim_html(data[CLAIM_MIME])
    if "text/html" in data:
        return data["text/html"]
    if "text/markdown" in data:
        return _markdown(data["text/markdown"], folder, None)
    if "text/latex" in data:
        return _latex(data["text/latex"])
    for mime in ("image/png", "image/jpeg", "image/gif", "image/webp"):
        if mime in data:
            payload = re.sub(r"\s", "", data[mime])
            alt = escape(_alt(metadata, mime) or NO_ALT)
            return f'<img src="data:{escape(mime)};base64,{escape(payload)}" alt="{alt}">'
    if "image/svg+xml" in data:
        label = escape(_alt(metadata, "image/svg+xml") or NO_ALT)
        return f'<div role="img" aria-label="{label}">{data["image/svg+xml"]}</div>'
    if "text/plain" in data:
        return f'<pre tabindex="0">{escape(plain(data["text/plain"]))}</pre>'
    return ""


def _alt(metadata: Mapping[str, Any], mime: str) -> str:
    own = metadata.get(mime)
    return str((own.get("alt") if isinstance(own, Mapping) else "") or metadata.get("alt") or "")


def _figure(spec: Mapping[str, Any], alt: str) -> str:
    layout = spec.get("layout", {})
    if not alt:
        title = layout.get("title", "")
        alt = str((title.get("text") if isinstance(title, Mapping) else title) or NO_ALT)
    kept = {key: spec[key] for key in ("data", "layout", "frames") if key in spec}
    # no "<" inside the script, so that no text in a figure can end it
    data = json.dumps(kept, ensure_ascii=False).replace("<", "\\u003c")
    height = layout.get("height") or 450
    return (
        f'<figure class="plotly" role="img" aria-label="{escape(alt)}">'
        f'<div class="plot" style="min-height:{float(height):.0f}px"></div>'
        f'<script type="application/json">{data}</script><noscript>{escape(alt)}</noscript></figure>'
    )


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML and links between notebooks that fit the HTML files."""

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def block_math(self, body: str) -> str:
        return mathml(body, block=True)

    def latex_environment(self, name: str, body: str) -> str:
        return mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", block=True)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if not re.match(r"[a-z][a-z0-9+.-]*:|/|#", url):
            url = re.sub(r"^(?:\./)?([^/#?]+)\.ipynb(?=$|#)", r"\1.html", url)
        return super().link(text, url, title)


def _markdown(source: str, folder: Path | None, attachments: Any) -> str:
    renderer = _Renderer(
        escape=False,
        attachments=attachments or {},
        embed_images=folder is not None,
        path=str(folder) if folder is not None else "",
    )
    return MarkdownWithMath(renderer=renderer).render(source)


def _latex(text: str) -> str:
    body = text.strip()
    for opening, closing in (("$$", "$$"), ("\\[", "\\]"), ("$", "$"), ("\\(", "\\)")):
        if body.startswith(opening) and body.endswith(closing) and len(body) > len(opening) + len(closing):
            return mathml(body[len(opening) : -len(closing)], block=opening in ("$$", "\\["))
    return mathml(body, block=True)


# what the converter lacks, by what it has
TEX = (
    (r"\\(begin|end)\{aligned\}", r"\\\1{align*}"),
    (r"\\operatorname\*?\{arg\s*(?:\\,)?\s*(min|max)\}", r"\\arg\1"),
    (r"\\operatorname\*", r"\\operatorname"),
    (r"\\arg\s*\\(min|max)(?![a-z])", r"\\arg\1"),
    (r"(\\[bB]igg?[lrm]?)\s*\\(?:\||[lr]?Vert\b)", r"\1‖"),
    (r"(\\[bB]igg?[lrm]?)\s*\\[lr]?vert\b", r"\1|"),
    (r"(\\[bB]igg?[lrm]?)\s*\\langle\b", r"\1⟨"),
    (r"(\\[bB]igg?[lrm]?)\s*\\rangle\b", r"\1⟩"),
)


def mathml(tex: str, block: bool = False) -> str:
    """TeX as MathML, readable by screen readers; as code where it cannot be converted."""
    source = tex.strip()
    text = source
    for pattern, new in TEX:
        text = re.sub(pattern, new, text)
    try:
        markup = convert(text, display="block" if block else "inline")
    except Exception:
        markup = ""
    # an unknown command comes through as it is, and so does a stray ampersand
    if not markup or re.search(r">\\|\\<|&(?!#?\w+;)", markup):
        return f'<code class="tex">{escape(source)}</code>'
    focus = 'tabindex="0" ' if block else ""  # a wide formula scrolls
    return markup.replace("<math ", f'<math {focus}alttext="{escape(source)}" ', 1)


@functools.cache
def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


@functools.cache
def _highlighter() -> Any:
    return Highlight2HTML(pygments_lexer="ipython3")


@functools.cache
def _code_style() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    keep = re.compile(r"(?m)^\.highlight \..*$")
    return (
        "\n".join(keep.findall(light))
        + "\n@media (prefers-color-scheme: dark) {\n"
        + "\n".join(keep.findall(dark))
        + "\n}\n.highlight .o, .highlight .ow { color: inherit; }"
    )
