"""`riskscore drift`: two files in, a verdict, a page and a document out; faults in words."""
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_bundle import applications, small_bundle, small_contract

from riskscore.cli import main
from riskscore.drift_report import drift_page

VOID = {'meta', 'br', 'wbr', 'hr', 'img', 'input', 'link', 'path', 'use', 'stop'}


def write_csv(path: Path, raw: dict[str, list]) -> None:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(raw)
        writer.writerows(['' if v is None else v for v in row] for row in zip(*raw.values(), strict=True))


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    "A contract, a model, and applications: as before, with a dead column, with another unit, with another kind of customer."
    place = tmp_path_factory.mktemp('drift')
    (place / 'small.json').write_text(small_contract().to_json())
    small_bundle(place)
    raw, rng = applications(700, seed=3), np.random.default_rng(5)
    files = {'before': applications(1500, seed=2), 'calm': raw, 'few': {name: values[:60] for name, values in raw.items()},
             'dead': raw | {'income': [None if dead else v for dead, v in zip(rng.random(700) < 0.6, raw['income'], strict=True)]},
             'unit': raw | {'amount': [1000 * v for v in raw['amount']]},
             'moved': raw | {'job': ['pilot'] * 350 + raw['job'][350:], 'owner': ['Y'] * 350 + raw['owner'][350:]},
             'hostile': raw | {'job': ['<script>alert(1)</script>'] * 350 + raw['job'][350:]}}
    for name, columns in files.items():
        write_csv(place / f'{name}.csv', columns)
    return place


def drift(folder: Path, now: str, *options: str, before: str = 'before.csv'):
    return CliRunner().invoke(main, ['drift', str(folder / before), str(folder / now), '--contract', str(folder / 'small.json'), *options])


def document(folder: Path, now: str, *options: str) -> dict:
    path = folder / 'found.json'
    done = drift(folder, now, *options, '--json', str(path))
    assert done.exit_code in (0, 1, 3) and path.exists(), done.output
    found = json.loads(path.read_text(encoding='utf-8'))
    path.unlink()
    assert done.exit_code == (3 if found['stop'] else found['flag'])
    return found


class Page(HTMLParser):
    "Tags that are not closed, addresses, scripts and charts without words."

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.lights, self.charts, self.headings = [], [], [], 0, []
        self.feed(text)
        self.wrong += [f'{tag} is not closed' for tag in self.open]

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.wrong += [f'{tag} {name}={value}' for name, value in attrs if re.search(r'https?:|//|javascript:', value or '') or name.startswith('on')]
        if tag in ('script', 'link', 'iframe', 'object', 'base') or given.get('src'):
            self.wrong.append(f'<{tag}>')
        if tag == 'svg':
            self.charts += 1
            if given.get('role') != 'img' or len(given.get('aria-label') or '') < 10:
                self.wrong.append('a chart without words')
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID and (not self.open or self.open.pop() != tag):
            self.wrong.append(f'</{tag}> closes another tag')

    def handle_data(self, data):
        if self.open and self.open[-1] == 'span' and re.match('[✕▲●○…] ', data):
            self.lights.append(data)
        if self.open and self.open[-1] == 'h2':
            self.headings.append(data)


def test_calm_flag_and_stop_are_exit_codes(folder):
    "0, 1 and 2, and the words say which column."
    calm, moved, dead = drift(folder, 'calm.csv'), drift(folder, 'moved.csv'), drift(folder, 'dead.csv')
    assert (calm.exit_code, moved.exit_code, dead.exit_code) == (0, 1, 3), (calm.output, moved.output, dead.output)
    assert calm.output.startswith('○') and 'look like history' in calm.output
    assert moved.output.startswith('▲') and 'material  job' in moved.output and 'material  owner' in moved.output and 'broken' not in moved.output
    assert dead.output.startswith('✕') and 'broken    income' in dead.output and 'Do not' not in calm.output


def test_another_unit_stops(folder):
    "An amount in cents is no customer."
    found = document(folder, 'unit.csv')
    assert found['stop'] and found['broken'] == ['amount'] and found['columns'][0]['outside']['now'] > 0.9
    assert found['advice']['action'] == 'stop'


def test_too_few_are_not_judged(folder):
    "Sixty applications give no flag and no stop, and the page says so."
    found = document(folder, 'few.csv')
    assert found['drift_share'] is None and (found['flag'], found['stop'], found['advice']['action']) == (0, False, 'wait')
    assert drift(folder, 'few.csv').output.startswith('… 60 applications are too few')
    small = drift(folder, 'calm.csv', '--by', '9' * 30, before='few.csv')
    assert small.exit_code == 0 and 'The reference holds 60 applications' in small.output


@pytest.fixture(scope='module')
def full(folder) -> tuple[dict, str]:
    "The document and the page with everything in it."
    page = folder / 'full.html'
    found = document(folder, 'dead.csv', '--by', '200', '--segment', 'channel', '--model', str(folder / 'champion.json'), '-o', str(page))
    return found, page.read_text(encoding='utf-8')


def test_the_document_holds_the_verdict_and_all_that_the_page_shows(full):
    "Its first level is the verdict; windows add up to it; parts add up to the change; and the page can be made from it."
    found, page = full
    assert {'rows', 'reference', 'reference_rows', 'watched', 'note', 'columns', 'answers', 'approval', 'material', 'drift_share', 'flag', 'broken',
            'stop_share', 'stop', 'words'} <= set(found)
    assert [w['rows'] for w in found['windows']] == [200, 200, 200, 100] and all(w['broken'] == ['income'] for w in found['windows'])
    for figure in ('log_odds', 'approval_rate', 'expected_loss'):
        told = found['money'][figure]
        assert abs(sum(told['parts'].values()) - told['change']) < 1e-9 and abs(told['reference'] + told['change'] - told['now']) < 1e-9
    segments = {s['segment']: s for s in found['segments']['rows']}
    assert set(segments) == {'web', 'shop'} and sum(s['rows'] for s in segments.values()) == found['rows'] == 700
    assert all(s['broken'] == ['income'] for s in segments.values())
    assert page == drift_page(found)


def test_the_page_needs_nothing_else_and_is_no_riddle(full):
    "No script, no address, every tag closed, every chart with words, every light a mark and a word, all questions in order, small."
    read = Page(full[1])
    assert read.wrong == [] and len(full[1]) < 1_500_000
    assert read.charts >= 5 and '✕ broken, high' in read.lights and '○ noise' in read.lights
    assert [h for h in read.headings if h.endswith('?')] == [
        'Which columns have changed?', 'What do they look like?', 'Since when?', 'What does it cost?', 'Does the model decide as before?', 'Which customers?',
        'Is the model still right?', 'What is to be done?', 'How was it judged?']


def test_what_is_checked_of_a_page_can_fail():
    assert Page('<p>').wrong == ['p is not closed'] and Page('<p></div></p>').wrong
    for text in ('<script src="x.js"></script>', '<a href="https://x"></a>', '<svg></svg>', '<p onload="x"></p>'):
        assert Page(text).wrong, text


def test_names_from_a_file_stay_text(folder):
    "A level that is a script is shown in tables and charts, not run."
    page = folder / 'page.html'
    drift(folder, 'calm.csv', '-o', str(page), before='hostile.csv')
    text = page.read_text(encoding='utf-8')
    assert '<script' not in text and text.count('&lt;script&gt;') >= 3 and Page(text).wrong == []


def test_a_file_is_the_same_in_any_format(folder):
    table = pa.csv.read_csv(folder / 'dead.csv')
    pq.write_table(table, folder / 'dead.parquet')
    first, second = document(folder, 'dead.csv'), document(folder, 'dead.parquet')
    assert {k: v for k, v in first.items() if k != 'name'} == {k: v for k, v in second.items() if k != 'name'}


def test_a_column_that_is_not_there_is_named(folder):
    raw = applications(300, seed=4)
    write_csv(folder / 'lacking.csv', {name: values for name, values in raw.items() if name != 'income'})
    found = document(folder, 'lacking.csv')
    assert found['broken'] == ['income'] and any('lacks these columns' in note and 'income' in note for note in found['notes'])


def test_a_column_that_was_always_empty_has_a_page(folder):
    "Nobody ever filled it, or somebody does now: neither keeps the report from being written."
    raw, page = applications(700, seed=6), folder / 'empty.html'
    write_csv(folder / 'empty.csv', raw | {'income': [None] * 700})
    for now, code in (('empty.csv', 0), ('calm.csv', 3)):
        done = drift(folder, now, '-o', str(page), before='empty.csv')
        assert done.exit_code == code and Page(page.read_text(encoding='utf-8')).wrong == [], done.output


def test_two_files_that_nobody_has_described(tmp_path, monkeypatch):
    "Without a contract that fits, the outcome's name is enough, and is asked for."
    monkeypatch.chdir(tmp_path)
    for name, shift in (('then', 0), ('now', 40)):
        rng = np.random.default_rng(shift)
        write_csv(tmp_path / f'{name}.csv', {'height': rng.normal(170 + shift, 10, 400).round(1).tolist(), 'late': rng.integers(0, 2, 400).tolist()})
    asked = CliRunner().invoke(main, ['drift', 'then.csv', 'now.csv'])
    assert asked.exit_code == 2 and '--contract' in asked.output and '--target' in asked.output
    told = CliRunner().invoke(main, ['drift', 'then.csv', 'now.csv', '--target', 'late'])
    assert told.exit_code == 3 and 'broken    height' in told.output  # four standard deviations taller: another unit, not other people


@pytest.mark.parametrize(('now', 'options', 'words'), [
    ('nothing.csv', (), 'nothing.csv'),
    ('calm.csv', ('--segment', 'jobb'), "Did you mean 'job'?"),
    ('calm.csv', ('--by', 'fortnight'), 'hour, day, month'),
    ('calm.csv', ('--by', '²'), 'hour, day, month'),
    ('calm.csv', ('--contract', 'nobody'), "no contract 'nobody'"),
    ('calm.csv', ('--model', 'nowhere.json'), 'nowhere.json'),
    ('calm.csv', ('--log', 'data/serving'), 'Name two files'),
])
def test_faults_are_told_in_words(folder, now, options, words):
    done = drift(folder, now, *options)
    assert done.exit_code == 2 and words in done.output and 'Traceback' not in done.output


def test_a_log_that_is_not_there_is_not_made(folder):
    done = CliRunner().invoke(main, ['drift', '--log', str(folder / 'serving'), '--model', str(folder / 'champion.json')])
    assert done.exit_code == 2 and 'no drift reference' in done.output and not (folder / 'serving').exists()
