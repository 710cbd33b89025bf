"""The reports as files: executed by papermill as Ploomber does it, looked at as text, as XML and in a browser."""
import functools
import http.server
import re
import shutil
import subprocess
import threading
from xml.etree import ElementTree

import nbformat
import numpy as np
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from ploomber.tasks.notebook import NotebookConverter

from riskscore.exporter import ReportExporter
from riskscore.model_plots import calibration_figure, gain_figure, ks_figure, lift_figure, pr_figure, roc_figure, score_figure
from riskscore.plots import COLOURS, bar_figure, folds_figure, null_figure, to_svg, tuning_figure
from riskscore.reports import escape, key_figures, show_figure, show_table, show_value
from riskscore.value_plots import decision_figure, pd_figure, profit_figure, value_figure

HOSTILE = '<script>alert(1)</script> " onmouseover="x" $x^$ & ä'


def notebook():
    "A task notebook: parameters, headline, noise, a table, a figure, the conclusion."
    return new_notebook(metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}, cells=[
        new_markdown_cell('# Test: does it work?\n\nA question.'),
        new_code_cell('code = None', metadata={'tags': ['parameters']}),
        new_code_cell('import sys\nfrom riskscore.reports import *\nfrom riskscore.plots import folds_figure\ntop = headline()'),
        new_markdown_cell('## Folds'),
        new_code_cell("print('NOISE', file=sys.stderr)\nkey_figures({'AUC': 0.75})"),
        new_code_cell("show_figure(folds_figure([0.74, 0.76]), 'Both folds agree.')"),
        new_code_cell("show_table({'a<b>': ['<img src=x onerror=alert(1)>'], 'n': [1200]})"),
        new_code_cell("top.conclude('**It works.** SECRET_CODE'.replace('SECRET_CODE', 'All is well.'), tone='good')"),
    ])


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    "The report of that notebook, made the way Ploomber makes it."
    folder = tmp_path_factory.mktemp('reports')
    nbformat.write(notebook(), folder / 'in.ipynb')
    papermill.execute_notebook(folder / 'in.ipynb', folder / '10_test.ipynb', {'code': 'ab' * 32}, progress_bar=False)
    report = folder / '10_test.html'
    shutil.copy(folder / '10_test.ipynb', report)
    NotebookConverter(report, 'riskscore.exporter.ReportExporter', {'pages': {'10_test': 'Test', '20_next': 'Next'}}).convert()
    return report


def test_the_conclusion_stands_on_top_and_nothing_distracts(page):
    text = page.read_text()
    assert text.index('<h1') < text.index('It works.') < text.index('<h2')
    assert 'has not finished' not in text and 'rs-headline good' in text
    for hidden in ('NOISE', 'SECRET_CODE', 'import sys', 'folds_figure(', 'code = None', 'Out[', 'In&nbsp;['):
        assert hidden not in text, hidden
    for shown in ('Both folds agree.', '1,200', '<title>Test: does it work?</title>', 'aria-current=page>Test</a>', 'href="20_next.html"',
                  'riskscore 0', 'code abababababab', ' UTC'):
        assert shown in text, shown


def test_the_page_is_small_and_needs_no_network(page):
    text = page.read_text()
    assert len(text) < 60_000
    assert not re.search(r'https?:|//[a-z]+\.|<script|<link|@import|url\((?!#)|<iframe', text)


def test_hostile_names_stay_text(page):
    assert '<img' not in page.read_text() and '&lt;img src=x onerror=alert(1)&gt;' in page.read_text()


def test_an_error_is_not_hidden():
    broken = notebook()
    broken.cells[4].outputs = [nbformat.v4.new_output('error', ename='RiskError', evalue='no target', traceback=['RiskError: no target'])]
    assert 'RiskError: no target' in ReportExporter().from_notebook_node(broken)[0]


def figures():
    "Every figure of the package with small data and hostile names."
    rng = np.random.default_rng(0)
    pd = 1 / (1 + np.exp(2 - rng.normal(size=3000)))
    y = rng.random(3000) < pd
    points, decisions = 600 - 30 * np.log(pd / (1 - pd)), np.where(pd < 0.2, 'approve', 'decline')
    samples, gain = {'<b>$x^$ & ä</b>': (y, pd), 'Future': (y[::2], pd[::2])}, 1e5 * (0.1 - pd)
    return {
        'roc': roc_figure(samples), 'pr': pr_figure(samples), 'gain': gain_figure(samples), 'ks': ks_figure(y, pd),
        'lift': lift_figure(y, pd), 'calibration': calibration_figure(y, pd), 'score': score_figure(y, points, 600, 650),
        'pd': pd_figure(pd, decisions), 'decision': decision_figure({'approve': 3, 'refer': 2, 'decline': 1}),
        'value': value_figure(pd, gain, HOSTILE), 'profit': profit_figure(pd, gain, 0.6), 'bars': bar_figure({HOSTILE: 0.2, 'b': 0.1}, 'x'),
        'nulls': null_figure({HOSTILE: 0.5}), 'folds': folds_figure([0.7, 0.8]), 'tuning': tuning_figure([0.7, 0.8], [False, True]),
    }


@pytest.mark.parametrize('name, figure', figures().items())
def test_every_figure_is_small_valid_labelled_and_repeatable(name, figure):
    svg = to_svg(figure)
    root = ElementTree.fromstring(svg)  # well formed, so nothing hostile broke out
    assert {element.tag for element in root.iter()} <= {'svg', 'g', 'path', 'defs', 'style', 'text', 'clipPath', 'rect', 'use', 'tspan'}
    assert len(svg) < 30_000 and 'http' not in svg and svg == to_svg(figure)
    axes = figure.axes[0]
    assert axes.get_xlabel() and (axes.get_ylabel() or not axes.get_yticks().size or name in ('bars', 'nulls'))
    assert 'var(--figure-muted' in svg and COLOURS['muted'] in svg


def test_degenerate_figures_do_not_fail():
    flat = np.full(40, 0.1)
    y = np.arange(40) % 2
    one = {'a': (y, flat)}
    for figure in (roc_figure(one), pr_figure(one), gain_figure(one), ks_figure(y, flat), calibration_figure(y, flat), lift_figure(y, flat),
                   score_figure(y, flat, 0, 1), pd_figure(flat), value_figure(flat, flat), profit_figure([], [], 0)):
        assert to_svg(figure).endswith('</svg>')


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_harmless(text):
    parsed = ElementTree.fromstring(f'<p>{escape(re.sub("[^ -퟿]", "", text))}</p>')
    assert {element.tag for element in parsed.iter()} <= {'p', 'strong'}


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_any_value_can_be_shown(value):
    assert isinstance(show_value(value), str)
    assert '<td' in show_table({'x': [value, 0.5]}, bars=['x']).data
    assert escape(show_value(value)) in key_figures({'x': value}).data


def test_tables_take_pandas_and_arrow():
    pandas, arrow = pytest.importorskip('pandas'), pytest.importorskip('pyarrow')
    columns = {'grade': ['A', 'B'], 'share': [0.25, None]}
    plain = show_table(columns).data
    assert plain == show_table(arrow.table(columns)).data == show_table(pandas.DataFrame(columns)).data
    assert show_table({}).data.count('<td') == 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


CHROMIUM = ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-sync',
            '--no-first-run', '--disable-component-update', '--virtual-time-budget=3000', '--dump-dom']
FRAME = '''<iframe src="10_test.html" style="width:390px;height:800px;border:0"></iframe><script>onload = () => {
const page = document.querySelector('iframe').contentDocument, root = page.documentElement;
const top = page.querySelector('.rs-headline').getBoundingClientRect().top;
document.title = [root.scrollWidth, root.clientWidth, Math.round(top)].join(' ')
}</script>'''


@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium')
def test_nothing_sticks_out_on_a_phone(page, tmp_path):
    (page.parent / 'frame.html').write_text(FRAME)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(page.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = [*CHROMIUM, f'--user-data-dir={tmp_path}', f'http://127.0.0.1:{server.server_port}/frame.html']
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    finally:
        server.shutdown()
    needed, given_, headline = map(int, re.search(r'<title>(\d+) (\d+) (\d+)', shown).groups())
    assert needed <= given_ <= 390 and headline < 400  # no sideways scrolling, and the conclusion is on the first screen


def test_the_note_is_the_alternative_text():
    assert 'aria-label="Lift falls."' in show_figure(folds_figure([0.7]), 'Lift falls.').data
