"Uploads: any pieces give the same rows, bounded memory, and the readings and refusals of the batch path."
import asyncio
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from generators import contents, examples, portfolio
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_bundle import applications, small_contract

from riskscore.batch import _flags
from riskscore.bulk import RESULT_COLUMNS, Results, Row, _parts, result_body, rows
from riskscore.contract import RULES, check_record, load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.datasets import read_frames

CONTRACT = small_contract()
OPENINGS = {'json': b'[', 'ndjson': b'', 'csv': b'app,amount\n'}
SCRAPS = ['"', '""', ',', '\n', '\r\n', '\r', '{', '}', '[', ']', '\\', '\\"', ' ', 'a', '1', '{"amount":5}', 'x,5', '"x\ny",5', 'é',
          '\ufeff', '\ufeff\ufeff[', 'long ' * 9]


def taken_apart(form: str, pieces, limit: int = 40, contract=CONTRACT) -> list[Row] | str:
    "All rows, or the error of the file as a whole."
    parts = _parts(form, contract, limit)
    try:
        return [row for piece in pieces for row in parts.feed(piece)] + parts.close()
    except RiskError as error:
        return str(error)


def of_stream(data: bytes, form: str, contract=CONTRACT, size: int = 50_000, **options) -> list[Row]:
    "All rows of a stream; in blocks that are not too large."
    async def pieces():
        for i in range(0, len(data), size):
            yield data[i:i + size]

    async def read():
        return [block async for block in rows(pieces(), form, contract, **options)]

    blocks = asyncio.run(read())
    assert all(0 < len(block) <= 512 for block in blocks)
    return list(itertools.chain(*blocks))


# ---------------------------------------------------------------- pieces

@settings(max_examples=examples(400))
@given(st.sampled_from(['json', 'ndjson', 'csv']), st.lists(st.sampled_from(SCRAPS), max_size=40), st.booleans(), st.lists(st.integers(1, 30), min_size=1))
def test_pieces_of_any_size_give_the_same_rows(form, scraps, opened, sizes):
    data = (OPENINGS[form] if opened else b'') + ''.join(scraps).encode()
    whole, pieces, at = taken_apart(form, [data]), [], 0
    for size in itertools.cycle(sizes):
        pieces.append(data[at:at + size])
        at += size
        if at >= len(data):
            break
    assert taken_apart(form, pieces) == whole
    assert taken_apart(form, [data[i:i + 1] for i in range(len(data))]) == whole


def test_a_long_csv_is_cut_anywhere_and_gives_the_same_rows():
    "Longer than the 256 KB that tell how it is written, with line breaks in quotes."
    data = ('app,job,amount\r\n' + ''.join(f'A{i},"{i}\r\n{"x" * (i % 900)}",{i}\r\n' for i in range(3000))).encode()
    whole = of_stream(data, 'csv', size=len(data))
    assert [row.number for row in whole] == list(range(1, 3001)) and not any(row.problem for row in whole)
    assert json.loads(whole[899].body) == {'app': 'A899', 'job': '899\r\n' + 'x' * 899, 'amount': 899}
    for size in (999, 65_535, 65_537, 262_143):
        assert of_stream(data, 'csv', size=size) == whole


# ---------------------------------------------------------------- JSON

NESTED = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


@settings(max_examples=examples(200))
@given(st.lists(NESTED, max_size=8), st.sampled_from([None, 1, '\t']), st.booleans(), st.booleans())
def test_an_array_comes_apart_into_its_elements(values, indent, plain, mark):
    data = (b'\xef\xbb\xbf' if mark else b'') + json.dumps(values, indent=indent, ensure_ascii=plain).encode('utf-8', 'surrogatepass')
    found = of_stream(data, 'json')
    assert [row.number for row in found] == list(range(1, len(values) + 1))
    assert [json.loads(row.body.decode('utf-8', 'surrogatepass')) for row in found] == values


@settings(max_examples=examples(200))
@given(st.lists(NESTED, max_size=8), st.sampled_from(['\n', '\r\n', '\n\n', ' \n\t\n']), st.booleans())
def test_lines_come_apart_into_their_values(values, end, last):
    data = end.join(json.dumps(v) for v in values) + (end if last else '')
    found = of_stream(data.encode(), 'ndjson')
    assert [row.number for row in found] == list(range(1, len(values) + 1))
    assert [json.loads(row.body) for row in found] == values


@pytest.mark.parametrize('slip', [b'{"amount": }', b'{"amount": 1', b'"open', b'nonsense', b'{"a": "\xff"}', b'{"a": 1}}'])
@pytest.mark.parametrize('form', ['json', 'ndjson'])
def test_a_slip_costs_one_row_or_says_that_the_rest_is_lost(form, slip):
    "Rows before it are there; those after it too, unless a bracket or a quote swallowed them, and then the last row says so."
    good = b'{"amount": 5}'
    data = b'\n'.join([good, slip, good]) if form == 'ndjson' else b'[' + b','.join([good, slip, good]) + b']'
    found = of_stream(data, form)
    assert found[0] == Row(1, good)
    if form == 'json' and slip in (b'{"amount": 1', b'"open'):
        assert found[-1] == Row(2, None, 'the array is cut short here: its end is missing')
    else:
        assert found == [Row(1, good), Row(2, slip), Row(3, good)]


# ---------------------------------------------------------------- memory

@pytest.mark.parametrize('form, opening, filling', [
    ('ndjson', b'', b'x'), ('ndjson', b'', b'\n'), ('json', b'[', b'"'), ('json', b'[{"a":"', b'x'), ('json', b'[', b'[{' + b' ' * 61), ('json', b'[', b'1'),
    ('json', b'', b' '), ('json', b'[1]', b'x'), ('csv', b'app,amount\n', b'x'), ('csv', b'app,amount\n"', b'x\n'), ('csv', b'app,amount\n', b'\r'),
    ('csv', b'app,amount\n', b'"",')])
def test_an_endless_row_is_not_held(form, opening, filling):
    def peak(size: int) -> int:
        async def pieces():
            yield opening
            for _ in range(size // 8_190):
                yield filling * (8_190 // len(filling))

        async def read():
            return [len(block) async for block in rows(pieces(), form, CONTRACT, limit=50_000)]

        tracemalloc.start()
        try:
            with contextlib.suppress(RiskError):
                asyncio.run(read())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10_000)
    assert peak(1_600_000) < 1.5 * peak(500_000)


# ---------------------------------------------------------------- the same as the batch path

def bits(value) -> object:
    "A typed value that can be compared to the bit; all nulls are alike."
    return value if value is None or isinstance(value, str) else 'null' if value != value else struct.pack('d', value)


def by_batch(path: Path, contract) -> dict[int, tuple | str]:
    "Of each row of a file its typed values, refusals and flags, as the batch command finds them."
    found: dict[int, tuple | str] = {}
    for batch in read_frames(path, contract):
        flags = _flags(batch, contract)
        columns = {name: column.tolist() for name, column in batch.frame.items()}
        for i, number in enumerate(batch.rows.tolist()):
            found[number] = ({n: bits(c[i]) for n, c in columns.items()}, sorted(batch.reasons.get(i, [])), sorted(flags[i].split('; ') if flags[i] else []))
        found |= {number: f'wrong number of fields: {what.split(":")[0]}' for number, what in batch.ragged}
    return dict(sorted(found.items()))


def by_upload(path: Path, contract) -> dict[int, tuple | str]:
    "The same of an upload, read by the check of the single application."
    found: dict[int, tuple | str] = {}
    for row in of_stream(path.read_bytes(), 'csv', contract):
        if row.body is None:
            found[row.number] = row.problem
            continue
        typed, violations = check_record(contract, json.loads(row.body))
        found[row.number] = ({n: bits(v) for n, v in typed.items()}, sorted(f'{v.column}: {RULES[v.rule]}' for v in violations if v.severity == 'hard'),
                             sorted(f'{v.column} {v.rule}' for v in violations if v.severity == 'soft'))
    return found


def assert_as_in_batch(path: Path, contract) -> int:
    "How many rows were compared."
    expected = by_batch(path, contract)
    assert by_upload(path, contract) == expected
    return len(expected)


def written(path: Path, names, lines, delimiter: str = ',') -> Path:
    "A CSV file."
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(names)
        writer.writerows(lines)
    return path


def head_of(source: Path, path: Path, count: int) -> Path:
    "The first lines of a real file."
    with gzip.open(source, 'rb') if source.suffix == '.gz' else open(source, 'rb') as file:
        path.write_bytes(b''.join(itertools.islice(file, count + 1)))
    return path


@pytest.mark.parametrize('name, source, count', [
    ('taiwan', 'taiwan/UCI_Credit_Card.csv', 1500), ('home_credit', 'home_credit_sample/application_train.csv.gz', 400),
    ('home_credit', 'home_credit_sample/application_test.csv.gz', 300)])
def test_real_rows_are_read_as_in_a_batch(real_data, root, tmp_path, name, source, count):
    contract = load_contract(root / f'data/contracts/{name}.yaml')
    assert assert_as_in_batch(head_of(real_data / source, tmp_path / 'head.csv', count), contract) == count


@pytest.mark.slow
@pytest.mark.parametrize('name, source', [('taiwan', 'taiwan/UCI_Credit_Card.csv'), ('home_credit', 'home_credit_sample/application_train.csv.gz')])
def test_all_real_rows_are_read_as_in_a_batch(real_data, root, tmp_path, name, source):
    contract = load_contract(root / f'data/contracts/{name}.yaml')
    assert assert_as_in_batch(head_of(real_data / source, tmp_path / 'all.csv', 10**9), contract) > 10_000


def test_rows_of_a_small_table_are_read_as_in_a_batch(tmp_path):
    raw = applications(300)
    lines = [['' if v is None else v for v in row] for row in zip(*raw.values(), strict=True)]
    lines[3][2], lines[5][2], lines[7][5], lines[8][6], lines[9][7], lines[11][4] = '-1', '1e999', 'diver', 'post', '2', '3.5'
    lines[12] = lines[12][:4]
    path = written(tmp_path / 'small.csv', raw, lines)
    assert assert_as_in_batch(path, CONTRACT) == 300
    refused = [number for number, found in by_upload(path, CONTRACT).items() if isinstance(found, str) or found[1]]
    assert refused == [4, 6, 9, 10, 12, 13]


@pytest.mark.parametrize('seed', range(6))
def test_generated_tables_are_read_as_in_a_batch(tmp_path, seed):
    content, raw = portfolio(seed, 120)
    lines = [['' if v is None else v for v in row] for row in zip(*raw.values(), strict=True)]
    assert assert_as_in_batch(written(tmp_path / 'generated.csv', raw, lines, ',;\t|'[seed % 4]), parse_contract(content)) == 120


TEXTS = ['', ' ', '0', '-0', '-0.0', '1', '1.0', ' 7 ', '+5', '5.', '.5', '1e3', '1E-2', '00012', '9' * 16, '9' * 25, '123456789.123456789', '0.1', '1_000',
         '1,5', '1.5', '1.234,5', '365243', '-1', '99', '9', '9.0', 'XNA', 'NA', 'nan', 'NULL', 'None', ' NA ', 'abc', 'inf', '1e999', '-1e999', '0x10', 'true',
         'True', 'False', 'Y', 'N', 'N ', 'nurse', 'clerk', '2', '2.0', '0.5', '=1+1', 'a "b"', 'España', 'x\ny', 'Ñ', 'a b', '?', 'never', '2026-01-31',
         '2020-01-01T12:00', '2020-13-01', '1900-01-01', '2199-12-31', '20240115', '99991231', '31/01/2026', 'long ' * 20, '٣', '1²']


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture])
@given(st.data(), contents(derived=0), st.sampled_from([',', ',', ';', '\t', '|']))
def test_any_text_in_a_cell_is_read_as_in_a_batch(tmp_path, data, content, delimiter):
    contract = parse_contract(content)
    names = [n for n, c in contract.columns.items() if c.role != 'target']
    assume(not any(n != n.strip() or set(n) & set(',;\t|') for n in names))  # in a header they could mean something else
    lines = data.draw(st.lists(st.tuples(*[st.sampled_from(TEXTS) for _ in names]), min_size=1, max_size=8))
    path = written(tmp_path / 'any.csv', names, lines, delimiter)
    assert assert_as_in_batch(path, contract) == len(lines)


# ---------------------------------------------------------------- the file as a whole

@pytest.mark.parametrize('form, data, said', [
    ('csv', b'', 'empty'), ('csv', b'app,amuont\n', "Did you mean 'amount'?"), ('csv', b'app,app,amount\n', 'two columns are called app'),
    ('csv', b'app\n1\n', 'column amount is required and missing'), ('csv', 'app,amount\n'.encode('utf-16'), 'UTF-16'), ('csv', b'PK\x03\x04\0\0', 'not UTF-8'),
    ('csv', b'amount,' + b'x' * 200_000 + b'\n1,2\n', 'header'),
    ('json', b'{"amount": 5}', 'Expected a JSON array'), ('json', b'', 'empty'), ('json', b'\n', 'empty')])
def test_a_file_that_is_none_is_refused_as_a_whole(form, data, said):
    with pytest.raises(RiskError, match=re.escape(said)) as caught:
        of_stream(data, form)
    assert len(str(caught.value)) < 2000


def test_rows_beyond_the_allowed_number_are_not_taken_but_read():
    data, seen = b'{"amount":5}\n' * 20_000, hashlib.sha256()
    assert len(of_stream(data, 'ndjson', max_rows=10, digest=seen)) == 11 and seen.hexdigest() == hashlib.sha256(data).hexdigest()
    data = data[:2000 * 13]
    assert of_stream(data, 'ndjson', max_rows=2000)[-1] == Row(2000, b'{"amount":5}')
    found = of_stream(data, 'ndjson', max_rows=1024)
    assert [row.number for row in found] == list(range(1, 1026)) and found[-1].problem.startswith('a batch has at most 1,024 rows')
    assert found[-1].body is None and found[-2].body


# ---------------------------------------------------------------- results

ANSWER = {'request_id': '0a', 'received_at': '2026-01-31T00:00:00.000000Z', 'purpose': 'decision', 'status': 'scored', 'pd': 0.1 + 0.2, 'score': -7,
          'decision': 'decline', 'knockout': None, 'value': -1e-05, 'currency': 'EUR',
          'reasons': [{'group': 'g', 'direction': 'up', 'feature': 'f', 'en': '=BAD()', 'es': 'Ñandú, "x"'}],
          'completeness': {'share': 0.5, 'given': 1, 'fields': 2, 'missing': ['=a', 'b']}, 'flags': [], 'model_version': 'm', 'policy_version': 'p',
          'supersedes': None}


def results_of(form: str, language: str = 'en') -> str:
    results = Results(form, language)
    for number in range(1, 2001):
        if number % 3:
            results.add(number, json.dumps(ANSWER, ensure_ascii=False), name='@id')
        else:
            errors = ['=cmd', {'column': 'amount', 'rule': 'type', 'message': 'no "number"\nat all'}]
            results.refuse(number, errors, status='failed' if number % 2 else 'refused')
    body = b''.join(result_body(results, {'batch': 'b'})).decode()
    assert results.file.closed
    assert results.counts == {'rows': 2000, 'scored': 1334, 'decline': 1334, 'refused': 333, 'failed': 333}
    return body


def test_results_keep_order_and_every_digit():
    as_json, as_lines = json.loads(results_of('json')), [json.loads(line) for line in results_of('ndjson').splitlines()]
    assert as_json['results'] == as_lines and [r['row'] for r in as_lines] == list(range(1, 2001))
    assert as_lines[0] == {'row': 1, 'id': '@id', **ANSWER}
    assert as_json['summary'] == {
        'batch': 'b', 'rows': 2000, 'scored': 1334, 'stopped': 0, 'refused': 333, 'failed': 333, 'approve': 0, 'refer': 0, 'decline': 1334}


@pytest.mark.parametrize('language, reason', [('en', "'=BAD()"), ('es', 'Ñandú, "x"')])
def test_results_as_csv_are_lines_that_a_spreadsheet_does_not_run(language, reason):
    header, *lines = csv.reader(io.StringIO(results_of('csv', language), newline=''))
    assert header == list(RESULT_COLUMNS) and {len(line) for line in lines} == {len(header)}
    first, third = (dict(zip(header, lines[i], strict=True)) for i in (0, 2))
    assert (first['id'], first['reasons'], first['missing'], first['pd'], first['score']) == ("'@id", reason, "'=a; b", repr(0.1 + 0.2), '-7')
    assert third['errors'] == "'=cmd; no \"number\"\nat all" and (third['status'], lines[5][2]) == ('failed', 'refused')


def test_an_answer_that_holds_nothing_is_no_summary():
    assert json.loads(b''.join(result_body(Results('json'), {})))['results'] == []
