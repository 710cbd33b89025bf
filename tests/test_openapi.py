"The schema takes exactly what the contract takes, its examples are scored, and the document is valid OpenAPI."
import datetime as dt
import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
from generators import contents
from generators import examples as times
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_bundle import small_contract

from riskscore.contract import check_record, load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.fast import Reader, Refused, _unnamed
from riskscore.openapi import application_schema, column_schema, describe, examples, schemas

ROOT = Path(__file__).resolve().parents[1]
NAMES = ['home_credit', 'pi_m5', 'taiwan', 'small']
CONTRACTS = {n: small_contract() if n == 'small' else load_contract(ROOT / f'data/contracts/{n}.yaml') for n in NAMES}
VALIDATORS = {n: jsonschema.Draft202012Validator(application_schema(c)) for n, c in CONTRACTS.items()}
DAY = re.compile(r'\d{4}-\d\d-\d\d')
ODD = [None, '', ' ', 'NA', 'nan', True, False, 0, 1, -1, 0.5, 3.0, 10**15, 10**400, 1e300, float('inf'), float('-inf'), '1', '1.0', '0', 'True', 'other',
       [], [1], {}, {'a': 1}, '2026-01-31', '2023-02-29', '1899-12-31', '1900-01-01', '2199-12-31', '2200-01-01', 99991231, '99991231', 'null']


def raw_values(column):
    "Values of all kinds, most of them close to what the contract speaks of."
    near = [v for code in column.special for v in (code, str(code))] + [v for level in column.levels for v in (level, level.lower(), level + ' ')]
    for text in [*column.levels, *map(str, column.special)]:
        try:
            near += [float(text), int(float(text))]
        except (ValueError, OverflowError):
            continue
    for limit in (*column.range, *column.hard):
        if limit is not None:
            near += [limit, limit - 1, limit + 1, float(limit), limit + 0.5, math.nextafter(limit, math.inf), math.nextafter(limit, -math.inf)]
    if column.kind == 'date':
        near += [(dt.date(1970, 1, 1) + dt.timedelta(days=int(v))).isoformat() for v in near if isinstance(v, (int, float)) and abs(v) < 1e5]
    options = [st.sampled_from(ODD), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.dates().map(dt.date.isoformat)]
    return st.one_of(*([st.sampled_from(near)] * 3 if near else []), *options)


def refused(contract, record) -> bool:
    return any(v.severity == 'hard' for v in check_record(contract, record)[1]) or bool(_unnamed(contract, record))


def wrong_with(contract, column, value) -> list:
    "The hard rules that a value of one column breaks."
    record = {column.name: value}
    return [v for v in check_record(contract, record)[1] if v.column == column.name and v.severity == 'hard'] + _unnamed(contract, record)


def is_other_spelling(column, value) -> bool:
    "A date in another form than the one that the schema shows."
    return column.kind == 'date' and isinstance(value, str) and not DAY.fullmatch(value) and value not in column.codes and value != ''


@pytest.mark.parametrize('name', NAMES)
def test_the_schema_takes_exactly_what_the_contract_takes(name):
    contract, validator = CONTRACTS[name], VALIDATORS[name]
    whole, names = examples(contract)['complete']['value'], list(contract.columns)

    @settings(max_examples=times(80), suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        record = dict(whole)
        for changed in data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
            record[changed] = data.draw(raw_values(contract.columns[changed]))
            assume(not is_other_spelling(contract.columns[changed], record[changed]))
        for left_out in data.draw(st.lists(st.sampled_from(names), max_size=2)):
            record.pop(left_out, None)
        if data.draw(st.integers(0, 9)) == 0:
            record[data.draw(st.sampled_from(['unknown', '', names[0] + '_']))] = 1
        assert validator.is_valid(record) != refused(contract, record), record
    check()


@pytest.mark.parametrize('name', NAMES)
def test_each_odd_value_of_each_column(name):
    contract = CONTRACTS[name]
    for column in contract.columns.values():
        validator = jsonschema.Draft202012Validator(column_schema(column))
        for value in ODD + list(column.levels) + list(column.special):
            if not is_other_spelling(column, value) or not _reads(column, value):
                hard = wrong_with(contract, column, value)
                assert validator.is_valid(value) == (not hard), (column, value)


def _reads(column, value) -> bool:
    try:
        column.read(value)
    except (ValueError, OverflowError):
        return False
    return True


@settings(max_examples=times(80), suppress_health_check=list(HealthCheck))
@given(contents(derived=0), st.data())
def test_contracts_that_nobody_has_seen(content, data):
    try:
        contract = parse_contract(content)
    except RiskError:
        assume(False)
    for column in contract.columns.values():
        value = data.draw(raw_values(column))
        if is_other_spelling(column, value):
            continue
        hard = wrong_with(contract, column, value)
        assert jsonschema.Draft202012Validator(column_schema(column)).is_valid(value) == (not hard), (column, value)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('seed', range(5))
def test_examples_are_scored_by_the_service(name, seed):
    contract, validator = CONTRACTS[name], VALIDATORS[name]
    made = examples(contract, seed)
    for kind, example in made.items():
        text = json.dumps(example['value'], allow_nan=False)
        assert validator.is_valid(json.loads(text)), kind
        application = Reader(contract).read(text.encode())
        assert bool(application.flags) == (kind == 'unusual')
    assert set(made['gaps']['value']) < set(made['complete']['value'])
    assert made == examples(contract, seed) and (made != examples(contract, seed + 100))
    target = contract.target.name
    assert all(target not in e['value'] for e in made.values())


def test_what_the_schema_refuses_the_service_refuses():
    contract = CONTRACTS['small']
    read = Reader(contract).read
    for body, taken in [(b'{"amount": 5}', True), (b'{"amount": 5, "tenure": 3.0}', True), (b'{"amount": 5, "tenure": 3.5}', False),
                        (b'{"amount": "5"}', False), (b'{"amount": -1}', False), (b'{"amount": null}', False), (b'{}', False),
                        (b'{"amount": 5, "tenure": "999"}', True), (b'{"amount": 5, "channel": "web"}', True), (b'{"amount": 5, "channel": "fax"}', False),
                        (b'{"amount": 5, "job": 7}', True), (b'{"amount": 5, "job": [7]}', False), (b'{"amount": 1e400}', False)]:
        assert VALIDATORS['small'].is_valid(json.loads(body)) == taken, body
        try:
            read(body)
        except Refused:
            assert not taken, body
        else:
            assert taken, body


def test_a_day_of_the_calendar():
    column = CONTRACTS['small'].columns['asked_on']
    validator = jsonschema.Draft202012Validator(column_schema(column))
    for year in (1899, 1900, 1904, 1999, 2000, 2024, 2026, 2100, 2199, 2200):
        for n in range(365):
            assert validator.is_valid((dt.date(year, 1, 1) + dt.timedelta(days=n)).isoformat()) == (1900 <= year <= 2199)
        assert validator.is_valid(f'{year}-12-31') == (1900 <= year <= 2199)
    for text in ('2023-02-29', '2100-02-29', '2026-04-31', '2026-13-01', '2026-1-1', '0026-01-01', ' 2026-01-01'):
        assert not validator.is_valid(text) and not _reads(column, text)


def test_the_document_is_valid_and_the_answer_fits(root):
    document = describe({'openapi': '3.1.0', 'info': {'title': 'riskscore', 'version': '1'}, 'paths': {
        '/predict_batch': {'post': {'responses': {'200': {'description': 'ok'}}}}}}, CONTRACTS['small'])
    for name, schema in document['components']['schemas'].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert name == schema['title']
    named = set(re.findall(r'#/components/schemas/(\w+)', json.dumps(document)))
    assert named <= set(document['components']['schemas'])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    given_examples = document['paths']['/predict']['post']['requestBody']['content']['application/json']['examples']
    assert given_examples == examples(CONTRACTS['small'])


ANSWER = {
    'request_id': '0' * 32, 'received_at': '2026-11-20T14:21:24.000123Z', 'purpose': 'decision', 'status': 'scored', 'pd': 0.12, 'score': 590,
    'decision': 'refer', 'knockout': None, 'value': 12.5, 'currency': 'EUR', 'reasons': [
        {'group': 'income', 'direction': 'lower', 'feature': 'income', 'en': 'Income', 'es': 'Ingresos'}],
    'completeness': {'share': 0.8333, 'given': 5, 'fields': 6, 'missing': ['job']}, 'flags': [{'column': 'amount', 'rule': 'range'}],
    'model_version': 'm', 'policy_version': 'p', 'supersedes': None}


@pytest.mark.parametrize('change', [{}, {'reasons': None, 'pd': None, 'score': None, 'value': None, 'status': 'stopped'}, {'supersedes': '1' * 32}])
def test_an_answer_fits_its_schema(change):
    assert _of('Answer').is_valid({**ANSWER, **change})


@pytest.mark.parametrize('change', [{'pd': 1.5}, {'decision': 'perhaps'}, {'extra': 1}, {'request_id': 'x'}, {'score': 1.5}, {'reasons': [{}]},
                                    {'flags': [{'column': 'a', 'rule': 'type'}]}])
def test_what_is_no_answer_does_not(change):
    assert not _of('Answer').is_valid({**ANSWER, **change})
    assert all(not _of('Answer').is_valid({k: v for k, v in ANSWER.items() if k != name}) for name in ANSWER)


def _of(name):
    parts = schemas(CONTRACTS['small'])
    return jsonschema.Draft202012Validator({'$ref': f'#/components/schemas/{name}', 'components': {'schemas': parts}})
