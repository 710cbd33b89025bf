"""Any file becomes the same typed table: formats, readings, faults, full disks, memory, related tables."""
import csv
import datetime as dt
import gzip
import io
import json
import os
import resource
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from generators import LEVELS, MONEY, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from riskscore.contract import check_record, load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.datasets import arrow_frame, read_frames, read_table, stored_batch
from riskscore.ingest import check_source, ingest, with_related
from riskscore.sources import download_home_credit, read_raw, source_files, source_fingerprint

LOANS = {'name': 'loans', 'value': MONEY, 'columns': {
    'loan': {'kind': 'integer', 'role': 'id'},
    'age': {'kind': 'integer', 'range': [18, 75], 'hard': [0, 130], 'special': [999]},
    'salary': {'kind': 'number', 'hard': [0, None]},
    'job': {'kind': 'category', 'levels': ['clerk', 'nurse']},
    'signed': {'kind': 'date', 'role': 'time'},
    'owner': {'kind': 'flag', 'levels': ['N', 'Y']},
    'paid': {'kind': 'flag', 'role': 'target', 'bad': 0}}}
HEADER = 'loan,age,salary,job,signed,owner,paid'
ROWS = ['1,31,1200.5,clerk,2026-01-31,N,1', '2,,900,nurse,2026-02-01,Y,0', '3,45,,,,,1']


@pytest.fixture
def contract():
    return parse_contract(LOANS)


def write(path: Path, *rows: str, header: str = HEADER) -> Path:
    "A CSV file."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    return path


def frame_of(source, contract, **options):
    "All rows of a source as one frame."
    batches = list(read_frames(source, contract, **options))
    return {name: np.concatenate([b.frame[name] for b in batches]) for name in contract.columns}


def assert_same(one, other):
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def run(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    "A fresh process."
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


# ---------------------------------------------------------------- formats

def test_every_format_gives_the_same_frame(tmp_path, contract):
    plain = write(tmp_path / 'plain.csv', *ROWS)
    text = plain.read_text()
    packed = tmp_path / 'packed.csv.gz'
    packed.write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / 'zipped.zip', 'w') as archive:
        archive.writestr('folder/loans.csv', text)
    tabs = tmp_path / 'tabs.tsv'
    tabs.write_text(text.replace(',', '\t'))
    excel = tmp_path / 'excel.csv'  # as a Spanish Excel writes it: byte order mark, semicolons, decimal comma, CRLF
    excel.write_bytes(b'\xef\xbb\xbf' + text.replace(',', ';').replace('1200.5', '1200,5').replace('\n', '\r\n').encode())
    names, *rows = csv.reader(io.StringIO(text))
    typed = [[int(r[0]), int(r[1]) if r[1] else None, float(r[2]) if r[2] else None, r[3] or None,
              dt.datetime.fromisoformat(r[4]) if r[4] else None, r[5] or None, int(r[6])] for r in rows]
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*typed, strict=True)), strict=True))), tmp_path / 'table.parquet')
    import openpyxl
    book = openpyxl.Workbook()
    for row in [names, *typed, [None] * 7]:
        book.active.append(row)
    book.save(tmp_path / 'book.xlsx')
    for i, row in enumerate(ROWS):
        write(tmp_path / 'parts' / f'part-{i}.csv', row)
    expected = frame_of(plain, contract)
    np.testing.assert_array_equal(expected['signed'], [20484, 20485, np.nan])
    np.testing.assert_array_equal(expected['paid'], [0, 1, 0])
    for source in ('packed.csv.gz', 'zipped.zip', 'tabs.tsv', 'excel.csv', 'table.parquet', 'book.xlsx', 'parts', 'parts/part-*.csv'):
        assert_same(frame_of(tmp_path / source, contract), expected)
        assert not [v for b in read_frames(tmp_path / source, contract) for v in b.violations], source


def test_the_stored_table_reads_back_as_it_was(tmp_path, contract):
    source = write(tmp_path / 'loans.csv', *ROWS)
    ingest(source, contract, tmp_path / 'out' / 'table.parquet')
    stored = list(read_table(tmp_path / 'out' / 'table.parquet', load_contract(tmp_path / 'out' / 'contract.json')))
    assert_same({n: np.concatenate([f[n] for f in stored]) for n in stored[0]}, frame_of(source, contract))
    types = {f.name: str(f.type) for f in pq.ParquetFile(tmp_path / 'out' / 'table.parquet').schema_arrow}
    levels = 'dictionary<values=string, indices=int32, ordered=0>'
    assert types == {'loan': 'int64', 'age': 'int64', 'salary': 'double', 'job': levels, 'signed': 'timestamp[ms]', 'owner': levels, 'paid': levels}


def test_the_typed_table_keeps_its_own_contract(tmp_path, contract):
    source = write(tmp_path / 'loans.csv', *ROWS)
    ingest(source, contract, tmp_path / 'table.parquet')
    ingest(tmp_path / 'table.parquet', contract, tmp_path / 'again.parquet')
    assert_same(frame_of(tmp_path / 'table.parquet', contract), frame_of(source, contract))
    assert pq.ParquetFile(tmp_path / 'again.parquet').read().equals(pq.ParquetFile(tmp_path / 'table.parquet').read())


def test_equal_input_gives_equal_bytes(tmp_path, contract):
    source = write(tmp_path / 'loans.csv', *ROWS)
    digests = {ingest(source, contract, tmp_path / name / 'table.parquet')['table_digest'] for name in 'ab'}
    assert len(digests) == 1


def test_a_partition_is_named_and_hidden_files_are_passed_over(tmp_path, contract):
    write(tmp_path / 'months' / '2026-02.csv', ROWS[1].replace('900', 'abc'))
    write(tmp_path / 'months' / '2026-01.csv', ROWS[0], ROWS[2])
    for name in ('.2026-03.csv', '~$book.xlsx', '2026-04.csv.part', '_SUCCESS'):
        (tmp_path / 'months' / name).write_text('half')
    assert [p.name for p in source_files(tmp_path / 'months')] == ['2026-01.csv', '2026-02.csv']
    with pytest.raises(RiskError, match=r"2026-02.csv: column salary: 1 value unreadable in row 1, for example 'abc'"):
        ingest(tmp_path / 'months', contract, tmp_path / 'table.parquet')


def test_excel_with_numbers_among_words(tmp_path, contract):
    import openpyxl
    book = openpyxl.Workbook()
    book.active.append(HEADER.split(','))
    book.active.append([1, 31, 'high', 3, dt.date(2026, 1, 31), 'N', 1])
    book.active.append([2, 40.0, 900, 'nurse', '2026-02-01', 'Y', 0])
    book.save(tmp_path / 'book.xlsx')
    batch, = read_frames(tmp_path / 'book.xlsx', contract)
    np.testing.assert_array_equal(batch.frame['salary'], [np.nan, 900])
    assert batch.frame['job'].tolist() == ['3', 'nurse']
    np.testing.assert_array_equal(batch.frame['signed'], [20484, 20485])
    assert [(v.column, v.rule, v.rows) for v in batch.violations] == [('salary', 'type', (1,)), ('job', 'unseen', (1,))]


def test_times_with_a_zone_are_read_as_utc(tmp_path, contract):
    moment = dt.datetime(1970, 1, 2, 1, tzinfo=dt.timezone(dt.timedelta(hours=1)))
    stamps = pa.array([moment], pa.timestamp('ns', tz='Europe/Madrid'))
    pq.write_table(pa.table({'signed': stamps, 'loan': [1]}), tmp_path / 'zone.parquet')
    assert frame_of(tmp_path / 'zone.parquet', contract)['signed'].tolist() == [1.0]
    write(tmp_path / 'zone.csv', '1970-01-02T01:00:00+01:00', header='signed')
    assert frame_of(tmp_path / 'zone.csv', contract)['signed'].tolist() == [1.0]


def test_long_ids_keep_their_digits(tmp_path, contract):
    write(tmp_path / 'loans.csv', '9007199254740993,31,,,,,1', '9007199254740992,31,,,,,0')
    ingest(tmp_path / 'loans.csv', contract, tmp_path / 'table.parquet')
    assert pq.ParquetFile(tmp_path / 'table.parquet').read().column('loan').to_pylist() == [9007199254740993, 9007199254740992]


# ---------------------------------------------------------------- the same reading as a record

def as_text(value) -> str:
    "A value as a CSV file holds it."
    if isinstance(value, dt.date):
        return value.isoformat()
    return '' if value is None else repr(value) if isinstance(value, float) else str(value)


def values_of(column):
    "Values that a CSV file can hold without loss."
    codes = st.sampled_from([None, *[c for c in column.special if not isinstance(c, str)]])
    if column.role == 'target':
        return st.sampled_from([*(column.levels or ('0', '1')), 'x'])
    return {'number': codes | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-1000, 1000),
            'integer': codes | st.integers(-1000, 1000), 'date': st.none() | st.dates(dt.date(1890, 1, 1), dt.date(2210, 1, 1)),
            'category': codes | st.sampled_from(LEVELS), 'flag': codes | st.sampled_from([*column.levels, '?'])}[column.kind]


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(content=contents(derived=0), data=st.data())
def test_a_file_is_read_as_its_records_are(tmp_path, content, data):
    contract = parse_contract(content | {'nulls': ['']})
    count = data.draw(st.integers(1, 5))
    records = [{n: data.draw(values_of(c)) for n, c in contract.columns.items()} for _ in range(count)]
    path = tmp_path / 'random.csv'
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, quoting=csv.QUOTE_MINIMAL)
        writer.writerow(contract.columns)
        writer.writerows([as_text(v) for v in r.values()] for r in records)
    if all(as_text(v) == '' for r in records for v in r.values()) and len(contract.columns) == 1:
        return  # a file of empty lines has no rows
    batch, = read_frames(path, contract)
    broken = set()
    for i, record in enumerate(records):
        typed, violations = check_record(contract, record)
        for name, value in typed.items():
            np.testing.assert_equal(batch.frame[name][i], value, err_msg=f'{name}: {record[name]!r}')
        broken |= {(v.column, v.rule, i + 1) for v in violations}
    assert {(v.column, v.rule, row) for v in batch.violations for row in v.rows} == broken
    kept = arrow_frame(stored_batch(batch, contract), contract)
    assert_same(kept, batch.frame)


@pytest.mark.parametrize(('text', 'limit'), [
    ('5.00E+05', 500000.0), ('1e5', 100000.0), (' 12 ', 12.0), ('+3', 3.0), ('1,5', None), ('1_000', None), ('0x10', None),
    ('inf', None), ('1e400', None), ('١٢', None), ('12 EUR', None), ('NaN', 'null')])
def test_what_is_a_number_in_a_text_file(tmp_path, text, limit):
    contract = parse_contract(LOANS | {'columns': {'limit': {'kind': 'integer'}, 'x': {}}})
    write(tmp_path / 'a.csv', f'"{text}",1', '7,2', header='limit,x')
    batch, = read_frames(tmp_path / 'a.csv', contract)
    np.testing.assert_array_equal(batch.frame['limit'], [np.nan if limit in (None, 'null') else limit, 7])
    assert [v.rows for v in batch.violations] == ([(1,)] if limit is None else [])


def test_a_word_far_down_changes_nothing_of_the_rest(tmp_path, contract):
    rows = [f'{i},{i % 90},{i / 7!r},clerk,2026-01-01,N,{i % 2}' for i in range(1, 60_001)]
    rows[20_000] = '7'
    clean = frame_of(write(tmp_path / 'clean.csv', *rows), contract)
    rows[50_000] = rows[50_000].replace(',clerk', '?,clerk')
    dirty = list(read_frames(write(tmp_path / 'dirty.csv', *rows), contract, batch_rows=4000))
    kinds = {str(b.raw.schema.field('salary').type) for b in dirty}
    assert kinds == {'double', 'string'}, 'both ways of reading are met'
    assert [(v.column, v.rule, v.rows) for b in dirty for v in b.violations if v.severity == 'hard'] == [
        ('(whole line)', 'type', (20_001,)), ('salary', 'type', (50_001,))]
    assert [n for b in dirty for n in b.rows.tolist()] == [n for n in range(1, 60_001) if n != 20_001]
    clean['salary'][49_999] = np.nan
    assert_same({n: np.concatenate([b.frame[n] for b in dirty]) for n in clean}, clean)


def test_codes_that_pandas_wrote_as_floats(tmp_path):
    contract = parse_contract(LOANS | {'columns': {'region': {'kind': 'category', 'levels': [1, 2]}, 'phone': {'kind': 'flag'}, 'x': {}}})
    write(tmp_path / 'a.csv', '1.0,0.0,1', '2.0,1.0,2', ',,3', '3.0,,4', header='region,phone,x')
    batch, = read_frames(tmp_path / 'a.csv', contract)
    assert batch.frame['region'].tolist() == ['1', '2', None, '3.0']
    np.testing.assert_array_equal(batch.frame['phone'], [0, 1, np.nan, np.nan])
    assert [(v.column, v.rule) for v in batch.violations] == [('region', 'unseen')]


def test_row_numbers_hold_among_ragged_lines_and_quoted_line_breaks(tmp_path):
    contract = parse_contract(LOANS | {'columns': {'x': {}, 'note': {'kind': 'category'}}})
    random, lines, ragged, words = np.random.default_rng(0), [], [], []
    for row in range(1, 60_001):
        kind = random.choice(4, p=[0.97, 0.01, 0.01, 0.01])
        lines.append([f'{row},text {row}', f'{row},"two\nlines {row}"', f'{row}', f'word{row},text'][kind])
        ragged += [row] * (kind == 2)
        words += [row] * (kind == 3)
    write(tmp_path / 'a.csv', *lines, header='x,note')
    found_ragged, found_words, rows = [], [], 0
    for batch in read_frames(tmp_path / 'a.csv', contract, batch_rows=5000):
        found_ragged += [n for n, _ in batch.ragged]
        found_words += batch.rows[batch.bad_rows].tolist()
        good = ~np.isnan(batch.frame['x'])
        np.testing.assert_array_equal(batch.frame['x'][good], batch.rows[good])
        rows += len(batch.rows)
    assert (found_ragged, found_words, rows) == (ragged, words, 60_000 - len(ragged))


# ---------------------------------------------------------------- bad input

def faults(tmp_path):
    "Sources that must be refused, and what the error must say."
    packed = gzip.compress(('\n'.join([HEADER, *ROWS * 2000]) + '\n').encode())
    (tmp_path / 'cut.csv.gz').write_bytes(packed[:-50])
    (tmp_path / 'plain.csv.gz').write_text(HEADER)
    (tmp_path / 'nothing.csv').write_bytes(b'')
    (tmp_path / 'latin.csv').write_bytes('\n'.join([HEADER, ROWS[0].replace('clerk', 'Peña')]).encode('latin-1'))
    (tmp_path / 'late_latin.csv').write_bytes('\n'.join([HEADER, *ROWS * 20_000, ROWS[0].replace('clerk', 'Peña')]).encode('latin-1'))
    (tmp_path / 'utf16.csv').write_bytes(HEADER.encode('utf-16'))
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1 not really')
    (tmp_path / 'broken.xlsx').write_bytes(b'not a workbook')
    (tmp_path / 'broken.zip').write_bytes(b'not an archive')
    with zipfile.ZipFile(tmp_path / 'several.zip', 'w') as archive:
        archive.writestr('train.csv', HEADER)
        archive.writestr('test.csv', HEADER)
    (tmp_path / 'loans.docx').write_bytes(b'')
    (tmp_path / 'void').mkdir()
    write(tmp_path / 'quote.csv', '1,31,"900,clerk', *['2,31,900,clerk,,N,1'] * 100_000)
    write(tmp_path / 'twice.csv', ROWS[0] + ',5', header=HEADER + ',age')
    write(tmp_path / 'spaces.csv', *[r.replace(',', ' ') for r in ROWS])
    return {
        'absent.csv': 'There is no data at', 'nothing.csv': 'nothing.csv is empty', 'cut.csv.gz': 'ends too early',
        'plain.csv.gz': 'not compressed at all', 'latin.csv': r'line 2 holds bytes of another encoding.*iconv',
        'late_latin.csv': r'line 60,002 holds bytes of another encoding', 'utf16.csv': 'not UTF-8 text',
        'broken.parquet': 'not a Parquet file', 'broken.xlsx': 'broken.xlsx is damaged',
        'broken.zip': 'broken.zip is damaged', 'several.zip': 'holds 2: train.csv, test.csv',
        'loans.docx': 'Cannot tell the format of loans.docx', 'void': 'holds no data file', 'quote.csv': 'quote .* never closed',
        'twice.csv': 'two columns are called age', 'none-*.csv': 'There is no data at', 'spaces.csv': 'whole line'}


def test_a_file_that_cannot_be_read_says_why(tmp_path, contract):
    for name, expected in faults(tmp_path).items():
        with pytest.raises(RiskError, match=expected):
            ingest(tmp_path / name, contract, tmp_path / 'out' / 'table.parquet')
    assert not list((tmp_path / 'out').glob('*')), 'nothing is left behind'


@pytest.mark.parametrize(('rows', 'expected'), [
    ([], 'holds no rows of data'),
    (['1,31,,,,,1', '2,31,,,,,1'], 'column paid: there must be good and bad outcomes to learn from, but all 2 usable rows are good'),
    (['1,31,,,,,1', '2,31,,,,,0', '1,31,,,,,0'], 'column loan: 1 value given more than once in row 3, for example 1'),
    (['1,31,,,,,1', '2,abc,,,,,0'], "column age: 1 value unreadable in row 2, for example 'abc'"),
    (['1,31,,,,,1', '2,200,-5,,,,0'], 'column salary: 1 value impossible in row 2, for example -5'),
    (['1,31,,,,,1', '2,31,,,,,'], 'column paid: 1 value missing but required in row 2'),
    (['1,31,,,,,1', '2,31,,,,,7'], 'column paid: 1 value not a known level in row 2'),
    (['1,31,,,,,1', '2,31,,,,', '3,31,,,,,0'], r'1 value unreadable in row 2, for example .*6 fields instead of 7')])
def test_rows_that_cannot_be_learnt_from(tmp_path, contract, rows, expected):
    with pytest.raises(RiskError, match=expected):
        ingest(write(tmp_path / 'loans.csv', *rows), contract, tmp_path / 'table.parquet')
    assert [p.name for p in tmp_path.iterdir()] == ['loans.csv']


def test_no_target_and_unknown_columns(tmp_path, contract):
    write(tmp_path / 'loans.csv', '1,31,5', header='loan,agee,salary')
    with pytest.raises(RiskError) as error:
        ingest(tmp_path / 'loans.csv', contract, tmp_path / 'table.parquet')
    assert error.value.problems == ["column agee is not in the contract. Did you mean 'age'?", 'column paid is required and missing.']
    with pytest.raises(RiskError, match='column paid is required'):
        ingest(tmp_path / 'loans.csv', contract, tmp_path / 'table.parquet', bad_rows='set_aside')


def test_one_error_names_the_faults_of_all_files(tmp_path, contract):
    write(tmp_path / 'p' / '1.csv', ROWS[0].replace(',31,', ',x,'))
    (tmp_path / 'p' / '2.csv.gz').write_bytes(gzip.compress(('\n'.join([HEADER, *ROWS * 2000])).encode())[:-20])
    write(tmp_path / 'p' / '3.csv', ROWS[0])
    with pytest.raises(RiskError) as error:
        ingest(tmp_path / 'p', contract, tmp_path / 'table.parquet')
    text = str(error.value)
    assert '2.csv.gz' in text and 'ends too early' in text
    assert '1.csv: column age: 1 value unreadable' in text
    assert '3.csv: column loan: 1 value given more than once in row 1, for example 1' in text


def test_files_of_one_name_are_told_apart(tmp_path, contract):
    write(tmp_path / '2025' / 'part.csv', ROWS[0], '7,x,,,,,1')
    write(tmp_path / '2026' / 'part.csv', ROWS[1], ROWS[0])
    summary = ingest(tmp_path / '*' / 'part.csv', contract, tmp_path / 'table.parquet', bad_rows='set_aside')
    assert (summary['rows'], summary['set_aside']) == (2, 2)
    assert list(summary['files'].values()) == [2, 2]
    with open(tmp_path / 'rejects.csv', newline='', encoding='utf-8') as file:
        rejects = [(Path(r['reject_file']).parent.name, r['reject_row'], r['reject_reason']) for r in csv.DictReader(file)]
    assert rejects == [('2025', '2', 'age: unreadable'), ('2026', '2', 'loan: given more than once')]


def test_odd_types_in_parquet_are_faults_and_no_crash(tmp_path, contract):
    odd = {'loan': [1, 2], 'age': [[31], None], 'salary': pa.array(['1.5', 'x']).dictionary_encode(), 'job': [{'a': 1}, None],
           'signed': [True, False], 'owner': pa.array([b'N', b'\xff']), 'paid': [True, False]}
    pq.write_table(pa.table(odd), tmp_path / 'odd.parquet')
    summary = check_source(tmp_path / 'odd.parquet', contract)
    assert {(v.column, v.rule, v.rows) for v in summary.violations.values()} == {
        ('age', 'type', (1,)), ('salary', 'type', (2,)), ('job', 'type', (1,)), ('signed', 'type', (1, 2)), ('owner', 'level', (1, 2))}
    with pytest.raises(RiskError, match='column age: 1 value unreadable in row 1'):
        ingest(tmp_path / 'odd.parquet', contract, tmp_path / 'table.parquet')


def test_rows_set_aside_are_kept_with_their_reason(tmp_path, contract):
    rows = [*ROWS, '4,-3,x,clerk,,N,1', '2,50,,nurse,,N,1', '5,50', '6,50,,pilot,2026-13-01,N,0']
    summary = ingest(write(tmp_path / 'loans.csv', *rows), contract, tmp_path / 'table.parquet', bad_rows='set_aside')
    assert (summary['rows'], summary['set_aside'], summary['files']) == (3, 4, {'loans.csv': 7})
    kept = next(read_table(tmp_path / 'table.parquet', contract))
    assert kept['loan'].tolist() == [1, 2, 3]
    with open(tmp_path / 'rejects.csv', newline='', encoding='utf-8') as file:
        rejects = list(csv.DictReader(file))
    assert [(r['reject_row'], r['reject_reason']) for r in rejects] == [
        ('4', 'age: impossible; salary: unreadable'), ('5', 'loan: given more than once'), ('7', 'signed: unreadable'),
        ('6', '2 fields instead of 7: 5,50')]
    assert rejects[0]['age'] == '-3'
    assert check_source(tmp_path / 'loans.csv', contract).rows == 7


def test_a_refused_table_leaves_the_old_one(tmp_path, contract):
    ingest(write(tmp_path / 'good.csv', *ROWS), contract, tmp_path / 'table.parquet')
    before = (tmp_path / 'table.parquet').read_bytes()
    with pytest.raises(RiskError):
        ingest(write(tmp_path / 'bad.csv', '1,x,,,,,1'), contract, tmp_path / 'table.parquet')
    assert (tmp_path / 'table.parquet').read_bytes() == before


def test_control_c_leaves_nothing_half_done(tmp_path, contract):
    source = write(tmp_path / 'loans.csv', *(f'{i},31,900,clerk,,N,{i % 2}' for i in range(60_000)))

    def interrupt(rows):
        if rows > 20_000:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        ingest(source, contract, tmp_path / 'out' / 'table.parquet', progress=interrupt)
    assert not list((tmp_path / 'out').iterdir())
    assert ingest(source, contract, tmp_path / 'out' / 'table.parquet')['rows'] == 60_000


# ---------------------------------------------------------------- a disk that fills up

@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 1 MB where we may mount one."
    place = tmp_path / 'disk'
    place.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a small file system needs root')
    yield place
    done = subprocess.run(['umount', str(place)], capture_output=True, text=True)
    if done.returncode:
        subprocess.run(['umount', '-l', str(place)], check=True)
        pytest.fail(f'a file was left open: {done.stderr}')


def long_table(path: Path, rows: int) -> Path:
    "A table that does not compress."
    random = np.random.default_rng(0)
    return write(path, *(f'{i},31,{v!r},clerk,,N,{i % 2}' for i, v in enumerate(random.random(rows).tolist())))


def test_a_full_disk_is_said_and_leaves_no_half_file(tmp_path, contract, small_disk):
    source = long_table(tmp_path / 'loans.csv', 300_000)
    with pytest.raises(RiskError, match=r'Could not write .*table.parquet: No space left on device. Free space'):
        ingest(source, contract, small_disk / 'table.parquet')
    assert not list(small_disk.iterdir())


def test_a_file_size_limit_is_said_and_leaves_no_half_file(tmp_path):
    "The same without root: the system refuses files over 500 KB."
    long_table(tmp_path / 'loans.csv', 300_000)
    (tmp_path / 'out').mkdir()
    done = run('''
        import json, sys
        from riskscore.contract import parse_contract
        from riskscore.core import RiskError
        from riskscore.ingest import ingest
        try:
            ingest(sys.argv[2], parse_contract(json.loads(sys.argv[1])), sys.argv[3])
        except RiskError as error:
            print(error)
        ''', json.dumps(LOANS), tmp_path / 'loans.csv', tmp_path / 'out' / 'table.parquet',
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)))
    assert 'Could not write' in done.stdout and 'File too large' in done.stdout, done.stdout + done.stderr
    assert not list((tmp_path / 'out').iterdir())


# ---------------------------------------------------------------- memory

MEASURE = '''
    import json, sys
    from riskscore.contract import parse_contract
    from riskscore.ingest import ingest
    from riskscore.datasets import read_table
    from riskscore.split import split_history
    from pathlib import Path
    contract, out = parse_contract(json.loads(sys.argv[1])), Path(sys.argv[3])
    ingest(sys.argv[2], contract, out / 'table.parquet')
    split_history(out / 'table.parquet', contract, out / 'history.parquet', out / 'future.parquet')
    rows = sum(len(f['loan']) for f in read_table(out / 'history.parquet', contract))
    assert 'pandas' not in sys.modules, 'pandas was imported'
    peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))
    print(rows, peak)
    '''


def peak(source: Path, content: dict, out: Path) -> int:
    "Peak memory in KB of ingest, split and reading in a fresh process."
    done = run(MEASURE, json.dumps(content), source, out)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[1])


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_memory_does_not_grow_with_rows_and_pandas_stays_out(tmp_path):
    wide = [f'x{i}' for i in range(12)]
    content = LOANS | {'columns': LOANS['columns'] | {name: {} for name in wide}}
    values = ','.join(f'{v:.4f}' for v in np.random.default_rng(0).random(12))
    peaks = []
    for rows in (200_000, 800_000):
        lines = (f'{i},31,900,clerk,2026-01-01,N,{i % 2},{values}' for i in range(rows))
        source = write(tmp_path / f'{rows}.csv', *lines, header=','.join([HEADER, *wide]))
        peaks.append(peak(source, content, tmp_path))
        source.unlink()
    assert peaks[1] <= 1.1 * peaks[0], peaks


@pytest.mark.parametrize('name', ['loans.parquet', 'loans.xlsx'])
def test_pandas_stays_out_whatever_the_format(tmp_path, name):
    typed = {'loan': [1, 2, 3, 4], 'age': [31, None, 40, 50], 'salary': [1.5, None, 2.0, 3.0], 'job': ['clerk', None, 'nurse', 'clerk'],
             'signed': [dt.datetime(2026, 1, d) for d in (1, 2, 3, 4)], 'owner': ['N', 'Y', None, 'N'], 'paid': [1, 0, 1, 0]}
    if name.endswith('parquet'):
        pq.write_table(pa.table(typed), tmp_path / name)
    else:
        import openpyxl
        book = openpyxl.Workbook()
        for row in [list(typed), *zip(*typed.values(), strict=True)]:
            book.active.append(list(row))
        book.save(tmp_path / name)
    peak(tmp_path / name, LOANS | {'split': {'by': 'order', 'future': 2}}, tmp_path)


# ---------------------------------------------------------------- related tables

RELATED = [{'table': 'bureau', 'key': 'loan', 'columns': {'debt': ['count', 'mean', 'max', 'min', 'sum']}},
           {'table': 'bureau', 'name': 'open', 'key': 'loan', 'where': {'state': ['open', 'late']}, 'columns': {'debt': 'sum'}}]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(-50, 50), st.sampled_from(['open', 'late', 'closed', ''])),
                     min_size=1, max_size=60))
def test_related_rows_are_reduced_by_applicant(tmp_path, rows):
    contract = parse_contract(LOANS | {'related': RELATED})
    write(tmp_path / 'bureau.csv', *(f'{i},{"" if d is None else d},{s}' for i, d, s in rows), header='loan,debt,state')
    if not any(s in ('open', 'late') for _, _, s in rows):
        return
    effective, join = with_related(contract, tmp_path)
    write(tmp_path / 'loans.csv', *(f'{i},31,,,,,1' for i in range(1, 7)))
    frame = frame_of(tmp_path / 'loans.csv', effective, join=join)
    for i in range(1, 7):
        mine = [(d, s) for n, d, s in rows if n == i]
        debts = [d for d, _ in mine if d is not None]
        due = [d for d, s in mine if d is not None and s in ('open', 'late')]
        expected = {'bureau_count': len(mine), 'bureau_debt_count': len(debts), 'bureau_debt_sum': sum(debts) if debts else np.nan,
                    'bureau_debt_mean': sum(debts) / len(debts) if debts else np.nan, 'bureau_debt_max': max(debts, default=np.nan),
                    'bureau_debt_min': min(debts, default=np.nan), 'open_debt_sum': sum(due) if due else np.nan,
                    'open_count': sum(s in ('open', 'late') for _, s in mine)}
        np.testing.assert_equal({n: frame[n][i - 1] for n in expected}, expected)


def test_partial_results_add_up_over_batches(tmp_path, monkeypatch):
    import riskscore.ingest
    monkeypatch.setattr(riskscore.ingest, '_MERGE_ROWS', 10)
    contract = parse_contract(LOANS | {'related': RELATED[:1]})
    random = np.random.default_rng(0)
    ids, debts = random.integers(1, 50, 50_000), random.integers(-99, 99, 50_000)
    write(tmp_path / 'bureau.csv', *(f'{i},{d}' for i, d in zip(ids, debts, strict=True)), header='loan,debt')
    _, join = with_related(contract, tmp_path)
    write(tmp_path / 'loans.csv', *(f'{i},31,,,,,1' for i in range(1, 50)))
    found = join(next(read_raw(tmp_path / 'loans.csv')))
    np.testing.assert_array_equal(found['bureau_debt_sum'], np.bincount(ids, debts)[1:50])
    np.testing.assert_array_equal(found['bureau_count'], np.bincount(ids)[1:50])
    np.testing.assert_array_equal(found['bureau_debt_max'], [debts[ids == i].max() for i in range(1, 50)])


@pytest.mark.parametrize(('spec', 'content', 'expected'), [
    ({'table': 'bureau', 'key': 'loan', 'columns': {'debt': ['median']}}, 'loan,debt\n1,1', "'median' is not one of count"),
    ({'table': 'bureau', 'key': 'loan', 'columns': {'debts': ['sum']}}, 'loan,debt\n1,1', "debts. Did you mean 'debt'?"),
    ({'table': 'bureau', 'key': 'loan', 'columns': {'debt': ['sum']}}, 'loan,debt\n1,much', 'bureau.csv: column debt: 1 value unreadable'),
    ({'table': 'bureaux', 'key': 'loan', 'columns': {'debt': ['sum']}}, 'loan,debt\n1,1', "Did you mean 'bureau.csv'?"),
    ({'table': 'bureau', 'columns': {'debt': ['sum']}}, 'loan,debt\n1,1', 'expected {table'),
    ({'table': 'bureau', 'key': 'loan', 'columns': {'debt': ['sum']}}, 'loan,debt', 'has no rows')])
def test_a_wrong_related_table_says_why(tmp_path, spec, content, expected):
    (tmp_path / 'bureau.csv').write_text(content)
    with pytest.raises(RiskError) as error:
        with_related(parse_contract(LOANS | {'related': [spec]}), tmp_path)
    assert expected in str(error.value)


def test_real_bureau_rows(tmp_path, real_data):
    folder = real_data / 'home_credit_sample' / 'related'
    statistics = {'AMT_CREDIT_SUM': ['mean', 'max', 'sum'], 'DAYS_CREDIT': ['count', 'min', 'max']}
    spec = {'table': 'bureau', 'key': 'SK_ID_CURR', 'columns': statistics}
    contract = load_contract(Path(__file__).parents[1] / 'data' / 'contracts' / 'home_credit.yaml')
    contract = parse_contract(contract.to_dict() | {'related': [spec]})
    summary = ingest(folder / 'application_train_5000.zip', contract, tmp_path / 'table.parquet', related=folder)
    assert (summary['rows'], summary['columns']) == (5000, 122 + 7)
    with zipfile.ZipFile(folder / 'bureau.zip') as archive:
        bureau = list(csv.DictReader(io.TextIOWrapper(archive.open('bureau.csv'), encoding='utf-8')))
    by_id: dict[int, list] = {}
    for row in bureau:
        by_id.setdefault(int(row['SK_ID_CURR']), []).append(row)
    frames = list(read_table(tmp_path / 'table.parquet', load_contract(tmp_path / 'contract.json')))
    for frame in frames:
        for i, applicant in enumerate(frame['SK_ID_CURR'].astype(int)):
            sums = [float(r['AMT_CREDIT_SUM']) for r in by_id.get(applicant, []) if r['AMT_CREDIT_SUM']]
            assert frame['bureau_count'][i] == len(by_id.get(applicant, []))
            np.testing.assert_allclose(frame['bureau_AMT_CREDIT_SUM_sum'][i], sum(sums) if sums else np.nan, rtol=1e-12)
            np.testing.assert_equal(frame['bureau_AMT_CREDIT_SUM_max'][i], max(sums, default=np.nan))


# ---------------------------------------------------------------- real tables

@pytest.mark.parametrize(('name', 'path', 'rows', 'columns', 'bad_rate'), [
    ('home_credit', 'home_credit_sample/application_train.csv.gz', 30_752, 122, 0.0796),
    ('taiwan', 'taiwan/UCI_Credit_Card.csv', 30_000, 25, 0.2212), ('pi_m5', 'pi_m5/Base_de_datos.xlsx', 10_763, 23, 0.0475)])
def test_real_tables_keep_their_contracts(tmp_path, monkeypatch, real_data, name, path, rows, columns, bad_rate):
    monkeypatch.setenv('RISKSCORE_DATA', str(real_data))
    contract = load_contract(Path(__file__).parents[1] / 'data' / 'contracts' / f'{name}.yaml')
    summary = ingest(path, contract, tmp_path / 'table.parquet')
    assert (summary['rows'], summary['columns'], round(summary['bad_rate'], 4)) == (rows, columns, bad_rate)
    assert not summary['hard']


# ---------------------------------------------------------------- small things

def test_a_changed_file_has_another_fingerprint(tmp_path):
    path = write(tmp_path / 'loans.csv', *ROWS)
    before = source_fingerprint(path)
    os.utime(path, ns=(1, 1))
    assert source_fingerprint(path) != before
    with pytest.raises(RiskError, match='There is no data'):
        source_fingerprint(tmp_path / 'absent.csv')


def test_kaggle_without_credentials_says_what_to_set(tmp_path, monkeypatch):
    for name in ('KAGGLE_USERNAME', 'KAGGLE_KEY', 'KAGGLE_API_TOKEN'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('KAGGLE_CONFIG_DIR', str(tmp_path))
    with pytest.raises(RiskError, match=r'KAGGLE_USERNAME and KAGGLE_KEY.*kaggle.json.*by hand'):
        download_home_credit(tmp_path)


def test_kaggle_that_refuses_says_what_to_do(tmp_path, monkeypatch):
    import kagglehub
    monkeypatch.setenv('KAGGLE_USERNAME', 'ana')
    monkeypatch.setenv('KAGGLE_KEY', 'x')

    def refuse(handle, path):
        raise RuntimeError('403 Client Error')
    monkeypatch.setattr(kagglehub, 'competition_download', refuse)
    with pytest.raises(RiskError, match='403 Client Error. Accept the rules'):
        download_home_credit(tmp_path)
    monkeypatch.setattr(kagglehub, 'competition_download', lambda handle, path: str(write(tmp_path / 'cache' / path, *ROWS)))
    assert download_home_credit(tmp_path / 'raw').read_text().startswith(HEADER)
