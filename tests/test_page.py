"""The page: what it opens with, where its links lead, what it looks like, and what a browser makes of it."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import fields, quickstart_records, records

from sslbench.report.html import inline
from sslbench.report.page import write_page

# What stands in the page itself: drawings have ids of their own.
DRAWN = re.compile(r"<svg.*?</svg>", re.S)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(the page of three seeds under four protocols with the papers' tables, its records)."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLBENCH_HOME", str(folder))
        rows = quickstart_records(3)
        write_page(rows, folder, "html", papers=True)
    return (folder / "report.html").read_text(), rows


def test_it_opens_with_who_leads(home, tmp_path):
    write_page(records(fields(40), fields(30, "mae"), fields(29, "untrained")), tmp_path, "html")
    page = (tmp_path / "report.html").read_text()
    finding = page.partition('<p class="finding">')[2].partition("</p>")[0]
    assert finding.startswith("k-NN, cls: ocl leads with 40.0") and page.index(finding) < page.index("<h2>")


def test_every_link_leads_somewhere_and_the_contents_to_every_section(whole):
    page = DRAWN.sub("", whole[0])
    ids = re.findall(r'<[^>]* id="(.*?)"', page)
    assert len(set(ids)) == len(ids) and {*re.findall(r'href="#(.*?)"', page)} <= {*ids}
    contents = re.findall('<a href="#(.*?)">', page[page.index("<nav") : page.index("</nav>")])
    assert {*re.findall('<section id="(.*?)">', page)} < {*contents} and "ocl-yang-et-al.-2025" in contents


def test_a_number_leads_to_all_that_is_behind_it_said_once(whole):
    """What is of a run or of a machine is not repeated number by number."""
    page, rows = whole
    provenance = page[page.index('<section id="provenance"') :]
    assert provenance.count("<h3>r, seed") == 7 * 3 and provenance.count("code cccccccccccc; device cpu; torch 2") == 1
    for r in rows:
        own = re.search(f'<details id="{r.id}">(.*?)</details>', provenance, re.S)[1]
        assert f"{r.metric} {r.value:.2f} %" in own and '<a href="#environment-1">' in own
    links = re.findall(r'<td[^>]*><a href="#(\w+)" data-also="([\w ]+)"', page)
    assert len(links) >= 7 * 4 and {i for first, also in links for i in (first, *also.split())} == {r.id for r in rows}


def test_a_papers_table_opens_with_how_much_of_it_is_measured(whole):
    page, _ = whole
    assert 'none">0 of 23 measured</b> ocl_t6' in page and 'none">none to measure</b> ocl_t1' in page
    assert "<details open><summary><b" not in page


def test_a_drawing_within_the_page_does_not_change_with_the_last_digits_of_its_layout():
    """Two drawings of one table, as matplotlib wrote them: but for the names of what clips they are the same."""
    shape = '<clipPath id="{0}">\n   <rect x="32.3" y="{1}"/>\n  </clipPath>'
    svg = '<?xml?>\n<svg>\n <g id="axes_1" clip-path="url(#{0})"/><defs>' + shape + "</defs></svg>"
    one, again, other = (
        inline(svg.format(*of).encode()) for of in (("p2856b7bac4", 15), ("p434a13395e", 15), ("p1", 9))
    )
    assert one == again != other and "axes_1" not in one
    assert re.findall(r"#(\w+)", one) == re.findall(r'id="(\w+)"', one) != []


def test_every_figure_says_what_it_shows_to_those_who_do_not_see_it(whole):
    page, _ = whole
    drawings = re.findall('<div class="drawing" role="img" aria-label="(.*?)"><svg', page)
    assert len(drawings) == page.count("<svg") > 2 and all(len(alt) > 20 for alt in drawings)


# ---------------------------------------------------------------------------------------------------------- a browser

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=3000",
         "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
WIDTHS = (1300, 390)
TELL = """<script>onload = () => {
  for (const d of document.querySelectorAll("details")) d.open = true;
  const page = document.documentElement, fetched = performance.getEntriesByType("resource").map(r => r.name);
  parent.postMessage([innerWidth, page.scrollWidth - page.clientWidth, fetched], "*");
}</script>"""
FRAMES = "".join(f'<iframe src="page.html" width="{w}" height="800" style="border: 0"></iframe>' for w in WIDTHS)
LISTEN = (
    "<script>const seen = []; onmessage = e => { seen.push(e.data); document.title = JSON.stringify(seen); }</script>"
)


def opened(folder, page, address=""):
    """(what the console said, the document after its scripts), of a page opened at an address such as `?a=b`."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    (folder / "opened.html").write_text(page)
    url = (folder / "opened.html").as_uri() + address
    command = [chromium, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


def browse(folder, page):
    """(what the console said, [width, pixels that do not fit, what was fetched] at each of WIDTHS, all unfolded)."""
    (folder / "page.html").write_text(page + TELL)
    said, dom = opened(folder, f"<title></title>{LISTEN}{FRAMES}")
    return said, sorted(json.loads(re.search("<title>(.*?)</title>", dom)[1]), reverse=True)


def test_the_page_renders_in_a_browser_without_errors_requests_or_sideways_scrolling(whole, tmp_path):
    assert browse(tmp_path, whole[0]) == ([], [[w, 0, []] for w in WIDTHS])


def test_the_browser_would_have_told(tmp_path):
    image = "http://example.com/x.png"
    bad = f'<img src="{image}"><div style="width: 500px">wide</div><script>nothing()</script>'
    said, ((_, fits, fetched), (_, wide, _)) = browse(tmp_path, bad)
    assert "ReferenceError" in said[0] and fits == 0 and wide > 100 and fetched == [image]


TABLE = "builtin-vit_mini4-pre-trained-on-builtin-tiny-scale-table"
ADDRESS = f"?sort.{TABLE}=linear%2C+mean&filter.{TABLE}=m"
CLICK = f"""<script>onload = () => {{
  const table = document.getElementById("{TABLE}");
  table.querySelector("th button").click();
  table.querySelector("tr:not([hidden]) td a").click();
  document.body.append(location.search);
}}</script>"""


def rows_shown(dom):
    table = dom[dom.index(f'<table id="{TABLE}"') :].partition("</table>")[0]
    return re.findall(r'<tr data-at="\d+"(?: class="base")?><td [^>]*>(.*?)</td>', table)


def test_a_table_is_sorted_and_filtered_as_the_address_says(whole, tmp_path):
    said, dom = opened(tmp_path, whole[0], ADDRESS)
    assert said == [] and rows_shown(dom) == ["ccmim", "macrl", "mae", "mocov3"]
    assert 'aria-sort="ascending"' in dom and ">4 of 7 rows<" in dom and "<dialog open" not in dom


def test_a_click_sorts_and_is_kept_in_the_address_and_a_number_opens_what_is_behind_it(whole, tmp_path):
    page, rows = whole
    said, dom = opened(tmp_path, page + CLICK, ADDRESS)
    assert said == [] and rows_shown(dom) == ["mocov3", "mae", "macrl", "ccmim"]  # by name, from the last on
    assert f"sort.{TABLE}=-method&amp;filter.{TABLE}=m" in dom
    dialog = re.search(r"<dialog [^>]*open.*?</dialog>", dom, re.S)[0]
    mocov3 = [r.value for r in rows if (r.method, r.protocol.name) == ("mocov3", "knn_cls")]
    assert all(f"knn_top1 {value:.2f} %" in dialog for value in mocov3) and len(mocov3) == 3
    assert dialog.count("mocov3hash") == 3 and dialog.count("device cpu; torch 2") == 3
