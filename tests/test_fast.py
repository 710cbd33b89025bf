"""The record path reads and scores exactly as the contract and the model's table path do, and refuses exactly the same."""
import json

import numpy as np
import pytest
from generators import contracts, examples, raw_values
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundle import applications, small_contract, small_scorer
from test_skew import bits, plain_rows

from riskscore.contract import Contract, _text, check_frame, check_record, load_contract
from riskscore.fast import Application, FastScorer, Reader, Refused
from riskscore.feature_sets import feature  # noqa: F401  # declares the features that contracts name
from riskscore.ingest import with_related

PLAIN = (str, int, float, bool, type(None))
ODD = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
                st.dictionaries(st.text(max_size=2), st.none(), max_size=2), st.sampled_from(['', 'NaN', '0', '1', 0, 1, 1.0, -0.0, 1e308, 10**400, 2**63]))


def unnamed(contract: Contract, record: dict) -> list[tuple[str, str]]:
    "An id that could not be asked for in an address."
    name = contract.id and contract.id.name
    text = record.get(name)
    return [(name, 'type')] if isinstance(text, str) and (len(text) > 400 or any(ord(c) < 32 or ord(c) == 127 for c in text)) else []


def read_both(reader: Reader, record: dict) -> Application | None:
    "Reads a record as bytes and holds the result against check_record; None where both refuse."
    body = json.dumps(record).encode()
    typed, violations = check_record(reader.contract, json.loads(body, parse_constant=lambda _: object()))
    hard = [(v.column, v.rule) for v in violations if v.severity == 'hard'] + unnamed(reader.contract, record)
    try:
        found = reader.read(body)
    except Refused as refused:
        if '\\ud' in body.decode() and not refused.violations:  # half of a surrogate pair is no text at all
            with pytest.raises(UnicodeEncodeError):
                json.dumps(record, ensure_ascii=False, default=repr).encode()
        else:
            assert [(v.column, v.rule) for v in refused.violations] == hard and hard
        return None
    assert not hard
    again = check_record(reader.contract, json.loads(found.content))
    assert not again[1] or sorted((v.column, v.rule) for v in again[1]) == sorted(found.flags)
    assert {n: bits(v) for n, v in again[0].items()} == {n: bits(v) for n, v in typed.items()}  # what is stored is what was read
    assert {n: bits(v) for n, v in found.typed.items()} == {n: bits(v) for n, v in typed.items()}
    assert sorted(found.flags) == sorted((v.column, v.rule) for v in violations)
    known = reader.contract.id and record.get(reader.contract.id.name)
    assert found.applicant == (None if known is None or known == '' or known != known else _text(known))
    assert found.missing == [c.name for c in reader.contract.feature_columns if bits(typed[c.name]) in (None, 'null')]
    return found


@st.composite
def cases(draw):
    contract = draw(contracts())
    record = {}
    for name, column in contract.columns.items():
        usual = raw_values(column.kind).filter(lambda v: type(v) in PLAIN)
        levels = [st.sampled_from([*column.levels, *column.special])] if column.levels or column.special else []
        if draw(st.integers(0, 9)):
            record[name] = draw(st.one_of(usual, *levels, ODD) if draw(st.integers(0, 3)) == 0 else st.one_of(usual, *levels))
    return contract, record | ({'stranger': 1} if draw(st.integers(0, 19)) == 0 else {})


@settings(max_examples=examples(400))
@given(cases())
def test_any_record_is_read_as_the_contract_reads_it(case):
    contract, record = case
    read_both(Reader(contract), record)


@given(st.data())
def test_every_kind_and_role(data):
    contract = small_contract()
    record = {n: data.draw(st.one_of(ODD, st.sampled_from([1, '1', 'N', 'Y', 999, 'nurse', 'web', '2026-05-12', 500]))) for n in contract.columns}
    read_both(Reader(contract), record | {'amount': data.draw(st.sampled_from([500, -1, 50, None, 'x']))})


def contract_of(name: str, root) -> Contract:
    return with_related(load_contract(root / f'data/contracts/{name}.yaml'), None)[0]


@pytest.mark.parametrize(('name', 'file'), [('home_credit', 'home_credit_sample/application_train.csv.gz'), ('taiwan', 'taiwan/UCI_Credit_Card.csv')])
def test_real_rows(name, file, real_data, root):
    reader, accepted = Reader(contract_of(name, root)), 0
    for record in plain_rows(real_data / file)[::15]:
        accepted += read_both(reader, {n: v for n, v in record.items() if n in reader.contract.columns}) is not None
    assert accepted > 1000


def test_a_table_and_its_records_have_the_same_answers(tmp_path):
    scorer = small_scorer(tmp_path)
    raw = applications(300, seed=5, target=False)
    table = scorer.frame(check_frame(scorer.contract, raw).frame)
    fast = FastScorer(scorer)
    for i in range(300):
        answer = fast.answer(fast.reader.read(json.dumps({n: v[i] for n, v in raw.items()}).encode()), 'r', 't', explain=False)
        assert (answer.pd, answer.score, answer.decision) == (table['pd'][i], table['score'][i], table['decision'][i])
        assert answer.value == table['value'][i]


@pytest.mark.parametrize('body', [b'', b'{', b'{}x', b'\x00', b'{"amount": 1' + b'0' * 5000 + b'}', b'[{}]', b'"a"', b'1', b'null', b'\xef\xbb\xbf{}',
                                  b'{"amount": 500, "app": "\\ud800"}', b'{"a":' * 50_000, '{"amount": 500}'.encode('utf-16')])
def test_what_is_no_application_is_refused_with_one_sentence(body):
    with pytest.raises(Refused) as refused:
        Reader(small_contract()).read(body)
    assert refused.value.violations == [] and refused.value.message.endswith(('.', '?')) and len(refused.value.message) < 300


@pytest.mark.parametrize(('name', 'taken'), [('A 1', True), ('Zoé\u00a0B', True), ('a' * 400, True), ('a' * 401, False), ('a\0', False), ('\x1f', False),
                                           (10**300, True), ('', True)])
def test_an_applicant_has_a_name_that_can_be_stored_and_asked_for(name, taken):
    assert (read_both(Reader(small_contract()), {'amount': 500, 'app': name}) is not None) == taken


def test_very_many_strangers_are_refused_by_the_first_of_them():
    record = {f'x{i}': i for i in range(3000)} | {'amount': -1}
    with pytest.raises(Refused) as refused:
        Reader(small_contract()).read(json.dumps(record).encode())
    rules = [(v.column, v.rule) for v in refused.value.violations]
    assert rules == [(f'x{i}', 'unknown') for i in range(500)] + [('amount', 'hard_range')]


def test_the_fast_road_is_taken_by_what_is_usual(monkeypatch):
    import riskscore.fast as fast

    def never(*_):
        raise AssertionError('the slow road')

    monkeypatch.setattr(fast, 'check_record', never)
    reader, raw = Reader(small_contract()), applications(200, target=False)
    found = [reader.read(json.dumps({n: v[i] for n, v in raw.items()} | {'income': 9000.5, 'job': 'diver'}).encode()) for i in range(200)]
    assert all(f.flags == [('income', 'range'), ('job', 'unseen')] for f in found)
    assert np.isnan([f.typed['tenure'] for f in found]).any()
