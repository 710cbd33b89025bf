"""Contracts: every fault of a file is found and worded, hostile YAML is harmless, violations name the right rows, any raw array is read."""
import copy
import datetime as dt
import json
import time

import numpy as np
import pytest
import yaml
from generators import contents, contracts, examples, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from riskscore.contract import ROWS_NAMED, Contract, check_frame, check_record, load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.features import feature_expressions

GOOD = '''\
name: loans
title: Loans
version: 2
currency: EUR
split: {by: time, future: 0.2}
cv: {by: stratified, folds: 5, seed: 42}
amount: credit
value:
  approve: {good: 0.10, bad: -0.55}
  refer:   {good: 0.09, bad: -0.30, fixed: -20}
  decline: {good: 0, bad: 0}
rare: {min_count: 50}
nulls: ['', nan, NA, null, None, -999]
derived:
  ratio: credit / income
columns:
  loan:    {kind: integer, role: id}
  day:     {kind: date, role: time, range: [2020-01-01, 2030-12-31]}
  credit:  {kind: number, unit: EUR, range: [100, 1000], hard: [0, null], null: false, words: {en: Credit, es: Crédito}}
  income:  {kind: number, special: [-1, none]}
  sex:     {kind: category, levels: ['1', '2'], role: protected}
  branch:  {kind: category, levels: [001, 010, 7, 10:30], closed: true, special: [999]}
  car:     {kind: flag, levels: ['N', 'Y'], temporal: true, group: assets, note: 'seen 2024'}
  paid:    {kind: flag, role: target, bad: 0}
'''


@pytest.fixture
def read(tmp_path):
    "Writes a contract file and loads it."
    def load(content: str | bytes, name: str = 'loans.yaml') -> Contract:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return load_contract(tmp_path / name)
    return load


def changed(before: str, after: str) -> str:
    assert GOOD.count(before) == 1, before
    return GOOD.replace(before, after)


def test_a_good_contract_is_read_as_written(read):
    contract = read(GOOD)
    column = contract.columns
    assert (contract.name, contract.version, contract.currency, contract.amount) == ('loans', 2, 'EUR', 'credit')
    assert contract.nulls == ('', 'nan', 'NA', 'null', 'None', '-999')
    assert (contract.target.name, contract.target.bad, contract.id.name, contract.time.name) == ('paid', '0', 'loan', 'day')
    assert [c.name for c in contract.feature_columns] == ['credit', 'income', 'branch', 'car']
    assert column['day'].range == ((dt.date(2020, 1, 1) - dt.date(1970, 1, 1)).days, (dt.date(2030, 12, 31) - dt.date(1970, 1, 1)).days)
    assert (column['credit'].null, column['credit'].hard, column['credit'].words['es']) == (False, (0, None), 'Crédito')
    assert column['branch'].levels == ('001', '010', '7', '10:30'), 'YAML alone would read 1, 8, 7 and 630'
    assert (column['car'].levels, column['paid'].levels) == (('N', 'Y'), ('0', '1'))
    assert contract.digest == read(GOOD + '# a comment changes nothing\n').digest != read(changed('folds: 5', 'folds: 4')).digest


def test_null_may_be_written_in_every_way(read):
    for word in ('null: false', '"null": false', "'null': no", 'null: False', '~: false'):
        assert read(changed('null: false', word)).columns['credit'].null is False


FAULTS = {  # what is changed, into what, and what must be said
    'typo in a key': ('range: [100, 1000]', 'rnage: [100, 1000]', "column credit: unknown key 'rnage'. Did you mean 'range'?"),
    'typo at the top': ('currency: EUR', 'curency: EUR', "contract: unknown key 'curency'. Did you mean 'currency'?"),
    'typo in a kind': ('kind: integer', 'kind: intger', "kind 'intger' is not one of number, integer, category, flag, date. Did you mean"),
    'typo in a role': ('role: protected', 'role: protcted', "Did you mean 'protected'?"),
    'typo in a decision': ('approve:', 'aprove:', "value: unknown key 'aprove'. Did you mean 'approve'?"),
    'typo in an outcome': ('{good: 0.10,', '{god: 0.10,', "value approve: unknown key 'god'. Did you mean 'good'?"),
    'typo in split': ('future: 0.2', 'futur: 0.2', "split: unknown key 'futur'. Did you mean 'future'?"),
    'typo in cv': ('folds: 5', 'fold: 5', "cv: unknown key 'fold'. Did you mean 'folds'?"),
    'typo in rare': ('min_count', 'mincount', "rare: unknown key 'mincount'. Did you mean 'min_count'?"),
    'typo in split by': ('by: time', 'by: tme', "split: by 'tme' is not one of random, time, order. Did you mean 'time'?"),
    'typo in cv by': ('by: stratified', 'by: stratfied', "Did you mean 'stratified'?"),
    'no way to split': ('by: time, ', '', "split: by 'None' is not one of random, time, order"),
    'typo in amount': ('amount: credit', 'amount: credt', "amount: there is no column 'credt'. Did you mean 'credit'?"),
    'quoted boolean': ('null: false', 'null: "false"', "column credit: null must be true or false, without quotes; got 'false'"),
    'quoted closed': ('closed: true', "closed: 'yes'", "column branch: closed must be true or false, without quotes; got 'yes'"),
    'boolean as number': ('temporal: true', 'temporal: 1', 'column car: temporal must be true or false, without quotes; got 1'),
    'levels yes and no': ("levels: ['N', 'Y']", 'levels: [No, Yes]', "words that YAML takes for true and false ('Yes', 'No') must be"),
    'nulls with no': ('[\'\', nan, NA', '[no, NA', "contract: nulls must be a list of text and numbers, and words that YAML takes"),
    'levels as text': ("levels: ['N', 'Y']", 'levels: N', "column car: levels must be a list [a, b]; got 'N'"),
    'levels twice': ("levels: ['1', '2']", "levels: ['1', 1]", 'column sex: levels names 1 more than once'),
    'empty level': ("levels: ['1', '2']", "levels: ['1', ]\n", None),
    'null level': ("levels: ['1', '2']", "levels: ['1', null]", 'column sex: levels must be a list of text and numbers'),
    'nested level': ("levels: ['1', '2']", "levels: ['1', ['2']]", 'column sex: levels must be a list of text and numbers'),
    'one level of a flag': ("levels: ['N', 'Y']", "levels: ['N']", "column car: a flag has two levels, [no, yes]; got ['N']"),
    'three levels of a flag': ("levels: ['N', 'Y']", "levels: ['N', 'Y', 'M']", 'column car: a flag has two levels'),
    'special as number': ('special: [-1, none]', 'special: -1', 'column income: special must be a list [a, b]; got -1'),
    'special as mapping': ('special: [-1, none]', 'special: [{a: 1}]', "column income: special must be a list of text and numbers"),
    'special infinite': ('special: [-1, none]', 'special: [.inf]', 'column income: special must be a list of text and numbers'),
    'range backwards': ('range: [100, 1000]', 'range: [1000, 100]', 'column credit: range must be [lowest, highest] such as [0, 100]'),
    'range of one': ('range: [100, 1000]', 'range: [100]', 'got [100]'),
    'range of three': ('range: [100, 1000]', 'range: [1, 2, 3]', 'got [1, 2, 3]'),
    'range as number': ('range: [100, 1000]', 'range: 100', 'column credit: range must be a list [a, b]; got 100'),
    'range as mapping': ('range: [100, 1000]', 'range: {low: 1, high: 2}', 'column credit: range must be a list'),
    'range of text': ('range: [100, 1000]', 'range: ["100", 1000]', "got ['100', 1000]"),
    'range of booleans': ('range: [100, 1000]', 'range: [no, yes]', 'got [False, True]'),
    'range of nan': ('range: [100, 1000]', 'range: [.nan, 1000]', 'got [nan, 1000]'),
    'range without end': ('range: [100, 1000]', 'range: [100, .inf]', 'got [100, inf]'),
    'hard backwards': ('hard: [0, null]', 'hard: [0, -1]', 'column credit: hard must be [lowest, highest]'),
    'date range of words': ('[2020-01-01, 2030-12-31]', '[yesterday, null]',
    'column day: range must be [lowest, highest] such as [2020-01-01, null]'),
    'date range backwards': ('[2020-01-01, 2030-12-31]', '[2030-12-31, 2020-01-01]', 'column day: range must be'),
    'date range of codes': ('[2020-01-01, 2030-12-31]', '[20200101, null]', 'column day: range must be'),
    'range of a category': ("levels: ['1', '2']", "levels: ['1', '2'], range: [1, 2]", 'column sex: a category has levels and no range'),
    'closed without levels': ('closed: true', 'closed: true}\n  c: {kind: category, closed: true', 'column c: closed needs the levels'),
    'two targets': ('role: protected', 'role: target, bad: 1', 'more than one column has the role target: sex, paid'),
    'two ids': ('role: protected', 'role: id', 'more than one column has the role id: loan, sex'),
    'two times': ('role: protected', 'role: time', 'more than one column has the role time: day, sex'),
    'no bad': ('role: target, bad: 0', 'role: target', 'column paid: the target must say which value means default, for example bad: 1'),
    'bad unknown': ('role: target, bad: 0', 'role: target, bad: 2', "column paid: bad '2' is not one of its levels 0, 1"),
    'bad as boolean': ('role: target, bad: 0', 'role: target, bad: no', 'column paid: bad must be text or a number'),
    'bad elsewhere': ('role: protected', 'bad: 1', 'column sex: bad belongs to the target only'),
    'time without time': ('role: time', 'role: excluded', 'split: by time needs a column with the role time'),
    'no feature': ('columns:', 'columns: {paid: {role: target, bad: 1}}\nnothing:', 'no column has the role feature'),
    'value missing': ('  decline: {good: 0, bad: 0}\n', '', 'value: the decision decline is missing'),
    'value of text': ('bad: -0.55', 'bad: "-0.55"', "value approve: bad must be a number, got '-0.55'"),
    'value of nothing': ('bad: -0.55', 'bad:', 'value approve: bad must be a number, got None'),
    'value infinite': ('bad: -0.55', 'bad: -.inf', 'value approve: bad must be a number, got -inf'),
    'value without bad': (', bad: -0.55', '', 'value approve: bad is missing'),
    'value as number': ('{good: 0, bad: 0}', '0', 'value decline: expected {good: 0.1, bad: -0.5}, got 0'),
    'share of nothing': ('future: 0.2', 'future: -1', 'split: future must be at least 0; got -1'),
    'share as text': ('future: 0.2', 'future: 20%', "split: future must be a number; got '20%'"),
    'one fold': ('folds: 5', 'folds: 1', 'cv: folds must be at least 2; got 1'),
    'half a fold': ('folds: 5', 'folds: 2.5', 'cv: folds must be a whole number; got 2.5'),
    'seed as text': ('seed: 42', 'seed: forty-two', "cv: seed must be a whole number; got 'forty-two'"),
    'cv as number': ('cv: {by: stratified, folds: 5, seed: 42}', 'cv: 5', 'contract: cv must be a mapping {key: value}; got 5'),
    'rare as number': ('rare: {min_count: 50}', 'rare: 50', 'contract: rare must be a mapping'),
    'rare as text': ('min_count: 50', 'min_count: fifty', "rare: min_count must be a whole number; got 'fifty'"),
    'version as text': ('version: 2', 'version: two', "contract: version must be a whole number; got 'two'"),
    'nulls as text': ("nulls: ['', nan, NA, null, None, -999]", 'nulls: NA', "contract: nulls must be a list [a, b]; got 'NA'"),
    'features as text': ('rare:', 'features: home_credit\nrare:', "contract: features must be a list [a, b]; got 'home_credit'"),
    'features of numbers': ('rare:', 'features: [1]\nrare:', 'features: expected text, got 1'),
    'derived as list': ('derived:\n  ratio: credit / income', 'derived: [credit / income]', 'contract: derived must be a mapping'),
    'derived as number': ('ratio: credit / income', 'ratio: 5', "derived: 'ratio' must be a name with an expression as text; got 5"),
    'words as text': ('{en: Credit, es: Crédito}', 'Credit', "column credit: words must be a mapping {key: value}; got 'Credit'"),
    'words in norwegian': ('{en: Credit, es: Crédito}', '{no: Kreditt}', "column credit: words must be text by language"),
    'words of numbers': ('{en: Credit, es: Crédito}', '{en: 5}', "got 'en': 5"),
    'unit as number': ('unit: EUR', 'unit: 5', 'column credit: unit must be text; got 5'),
    'column called no': ('  sex:', '  no:', 'column False: YAML does not read this name as text; put it in quotes'),
    'column called 1.10': ('  sex:', '  1.10:', 'column 1.1: YAML does not read this name as text; put it in quotes'),
    'column of text': ("{kind: category, levels: ['1', '2'], role: protected}", 'category',
    'column sex: expected settings such as {kind: number}'),
    'amount of words': ('amount: credit', 'amount: branch', 'amount: column branch must be a number, and not the target'),
    'amount is the target': ('amount: credit', 'amount: paid', 'amount: column paid must be a number, and not the target'),
    'key twice': ('kind: integer, role: id', 'kind: integer, role: id, kind: number',
    'A key stands twice in the contract: kind (lines 17, 17). Keep one.'),
    'column twice': ('  income:', '  credit:', 'stands twice in the contract: credit (lines 19, 20)'),
    'column twice with quotes': ('  sex:', '  7: {}\n  "7":', 'stands twice'),
    'merge key': ('  sex:', '  other: {<<: *all}\n  sex:', 'is not valid YAML'),
}


@pytest.mark.parametrize('before, after, words', FAULTS.values(), ids=FAULTS)
def test_every_fault_is_found_and_worded(read, before, after, words):
    if words is None:
        assert read(changed(before, after)).columns
        return
    with pytest.raises(RiskError) as caught:
        read(changed(before, after))
    assert words in str(caught.value)
    assert 'loans.yaml' in str(caught.value)


def test_all_faults_are_told_at_once(read):
    content = GOOD
    chosen = ['typo in a key', 'typo in a role', 'quoted boolean', 'one level of a flag', 'bad unknown', 'value without bad', 'one fold',
              'version as text', 'date range of words', 'words as text', 'derived as number']
    for name in chosen:
        content = content.replace(*FAULTS[name][:2])
    with pytest.raises(RiskError) as caught:
        read(content)
    assert len(caught.value.problems) == len(chosen)
    assert all(FAULTS[name][2] in str(caught.value) for name in chosen)
    assert f'has {len(chosen)} problems; correct and try again' in str(caught.value)


@pytest.mark.parametrize('content, words', [
    (b'', 'is no contract'), (b'# nothing', 'is no contract'), (b'[1, 2]', 'is no contract'), (b'text', 'is no contract'),
    (b'columns: [a]', 'is no contract'),
    (b'name: x', 'is no contract'), (b'columns: {}', 'no column has the role feature'), (b'columns: {a: 5}', 'expected settings such as'),
    (b'a: b: c', 'is not valid YAML'), (b'columns:\n\t- a', 'is not valid YAML'), (b'{', 'is not valid YAML'), (b'a: 1\n---\nb: 2',
    'is not valid YAML'),
    (b'\x00', 'is not valid YAML'), (b'a: \xff', 'is not UTF-8'), ('name: año'.encode('latin-1'), 'is not UTF-8'),
    ('name: x'.encode('utf-16'), 'is not UTF-8'),
    (b'a: 2020-13-01', 'is not valid YAML'), (b'a: !!int abc', 'is not valid YAML'), (b'a: !!float abc', 'is not valid YAML'),
    (b'a: ' + b'9' * 5000, 'is not valid YAML'),
    (b'a: *nowhere', 'is not valid YAML'), (b'? [a, b]\n: c', 'is not valid YAML'), (b'? {a: b}\n: c', 'is not valid YAML'),
    (b'[' * 5000, 'is not valid YAML'),
    (b'a: ' + b'[' * 5000 + b']' * 5000, 'is not valid YAML'), (b'a: ' + b'{b: ' * 300 + b'}' * 300, 'is no contract'),
    (b'a: &a [*a]\ncolumns: {b: {}}', 'nested more than 20 levels'), (b'a: &a {b: *a}\ncolumns: {b: {}}', 'is no contract'),
    (b'base: &b {kind: number}\ncolumns: {a: {<<: *b}}', 'no merge keys'), (b'%YAML 9.9\n---\na: 1', 'is not valid YAML'),
    (b'!!set {a, b}', 'is no contract'),
])
def test_files_that_are_no_contract(read, content, words):
    with pytest.raises(RiskError, match='loans.yaml') as caught:
        read(content)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize('tag', [
    '!!python/object/apply:os.system ["touch owned"]', '!!python/object/new:os.system ["touch owned"]', '!!python/name:os.system',
    '!!python/module:os',
    '!!python/object:riskscore.contract.Column {name: x}', '!!python/tuple [1, 2]', '!!python/none',
    '!!python/object/apply:builtins.eval ["1"]', '!custom {}',
])
def test_tags_build_nothing(read, tag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (tag, f'columns: {{a: {tag}}}', f'columns: {{a: {{special: [{tag}]}}}}', f'? {tag}\n: 1'):
        with pytest.raises(RiskError, match='is not valid YAML'):
            read(content)
    assert [p.name for p in tmp_path.iterdir()] == ['loans.yaml']


def laughs(levels: int, width: int = 10, opening: str = '[', closing: str = ']') -> str:
    "A few lines that stand for width ** levels values."
    lines = [f'a0: &a0 {opening}{", ".join(["x"] * width)}{closing}']
    lines += [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * width)}]' for i in range(1, levels)]
    return '\n'.join(lines)


def test_a_billion_laughs_are_refused_at_once(read):
    begin = time.perf_counter()
    for content in (laughs(9) + '\ncolumns: {b: {}}', laughs(30, 2) + '\ncolumns: {b: {}}',
                    laughs(9) + '\nname: x\ncolumns: {b: {kind: number, special: *a8}}', laughs(9) + '\ncolumns: *a8'):
        with pytest.raises(RiskError, match='is no contract: more than 200,000 values'):
            read(content)
    assert time.perf_counter() - begin < 20


def test_an_alias_is_fine_where_it_is_short(read):
    contract = read(changed("levels: ['1', '2']", "levels: &codes ['1', '2']").replace("levels: ['N', 'Y']", 'levels: *codes'))
    assert contract.columns['car'].levels == ('1', '2')


@pytest.mark.parametrize('name', ['nowhere.yaml', 'folder', 'deep/none.yaml'])
def test_a_missing_file_is_said(tmp_path, name):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(RiskError, match='Cannot read the contract .*riskscore contract infer'):
        load_contract(tmp_path / name)


@pytest.mark.parametrize('name', ['home_credit', 'taiwan', 'pi_m5'])
def test_committed_contracts(root, name):
    contract = load_contract(root / f'data/contracts/{name}.yaml')
    assert contract.name == name and contract.target and contract.title
    assert all(set(c.words) == {'en', 'es'} for c in contract.feature_columns)
    assert parse_contract(contract.to_dict()) == contract


@settings(max_examples=examples(50))
@given(contents())
def test_plain_types_and_yaml_round_trip(content):
    contract = parse_contract(content)
    of_yaml = yaml.safe_load(yaml.safe_dump(content, allow_unicode=True))
    for stored in (contract.to_dict(), json.loads(json.dumps(contract.to_dict())), of_yaml):
        again = parse_contract(stored)
        assert again == contract and again.digest == contract.digest
    assert parse_contract(contract.to_dict()).to_dict() == contract.to_dict()


@settings(max_examples=examples(30))
@given(contents())
def test_what_a_pipeline_stores_is_the_contract(tmp_path_factory, content):
    "In its order, too: a derived feature may use those before it, and the model's columns are the contract's."
    contract, path = parse_contract(content), tmp_path_factory.getbasetemp() / 'stored.json'
    path.write_text(contract.to_json(), encoding='utf-8')
    again = load_contract(path)
    assert again == contract and again.to_json() == contract.to_json()
    assert list(again.columns) == list(contract.columns) and list(again.derived) == list(contract.derived)
    assert list(feature_expressions(again)) == list(feature_expressions(contract))


@pytest.mark.parametrize('content', ['', '{', '[]', '[' * 100_000, '{"columns": {}}', 'name: x', '\x00', '{"columns": {"a": {"range": [0, 1e999]}}}'])
def test_stored_files_that_are_no_contract(tmp_path, content):
    (tmp_path / 'contract.json').write_text(content)
    with pytest.raises(RiskError, match='contract.json'):
        load_contract(tmp_path / 'contract.json')


@settings(max_examples=examples(60))
@given(contents(derived=0))
def test_parsing_changes_nothing_it_is_given(content):
    before = copy.deepcopy(content)
    parse_contract(content)
    assert content == before


keys = st.text(max_size=4) | st.none() | st.booleans() | st.integers()
junk = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6)
SETTINGS = ['split', 'cv', 'nulls', 'features', 'related', 'version', 'title', 'words', 'unit', 'note', 'group', 'closed', 'range', 'hard',
            'levels', 'special']


@settings(max_examples=examples(120))
@given(contents(derived=1), st.data())
def test_any_content_gives_a_contract_or_a_risk_error(content, data):
    "Settings replaced by anything, anywhere in a good contract."
    content = copy.deepcopy(content)
    places = [content, *content['columns'].values(), content['value'], *content['value'].values()]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        place[data.draw(st.sampled_from([*map(str, place), *SETTINGS]))] = data.draw(junk)
    try:
        contract = parse_contract(content)
    except RiskError as error:
        assert str(error)
        return
    assert parse_contract(contract.to_dict()).digest == contract.digest
    checked = check_frame(contract, data.draw(tables(contract, 2)))
    assert all(v.message for v in checked.violations)


# ---------------------------------------------------------------- violations

LOANS = parse_contract({
    'name': 'loans', 'value': {d: {'good': 1, 'bad': -1} for d in ('approve', 'refer', 'decline')},
    'columns': {'loan': {'kind': 'integer', 'role': 'id'}, 'age': {'kind': 'integer', 'range': [18, 75], 'hard': [0, 130], 'unit': 'years'},
                'income': {'kind': 'number', 'null': False}, 'job': {'kind': 'category', 'levels': ['clerk', 'nurse']},
                'branch': {'kind': 'category', 'levels': ['a', 'b'], 'closed': True}, 'car': {'kind': 'flag'},
                'day': {'kind': 'date', 'range': ['2020-01-01', '2025-12-31'], 'hard': [None, '2030-01-01']},
                'paid': {'kind': 'flag', 'role': 'target', 'bad': 0}}})
FITS = {'loan': 1, 'age': 30, 'income': 100.0, 'job': 'clerk', 'branch': 'a', 'car': 1, 'day': '2024-02-29', 'paid': 1}
BREAKS = [  # column, value, rule, severity, words
    ('age', 17, 'range', 'soft', 'outside the usual range in row {}, for example 17; expected a whole number from 18 up to 75 years.'),
    ('age', -1, 'hard_range', 'hard', 'impossible in row {}, for example -1; expected a whole number from 0 up to 130 years.'),
    ('age', 30.5, 'type', 'hard', 'unreadable in row {}, for example 30.5; expected a whole number'),
    ('age', '30', 'type', 'hard', "unreadable in row {}, for example '30'; expected a whole number"),
    ('age', True, 'type', 'hard', 'unreadable in row {}, for example True'), ('age', np.inf, 'type', 'hard', 'for example inf'),
    ('income', None, 'null', 'hard', 'missing but required in row {}; expected a value in every row.'), ('income', '', 'null', 'hard',
    'missing but'),
    ('income', float('nan'), 'null', 'hard', 'missing but required'), ('income', 'n' * 200, 'type', 'hard', 'nnn...nnn'),
    ('job', 'pilot', 'unseen', 'soft', "of an unknown level in row {}, for example 'pilot'; expected one of clerk, nurse."),
    ('branch', 'c', 'level', 'hard', "not a known level in row {}, for example 'c'; expected one of a, b."),
    ('car', 2, 'level', 'hard', 'not a known level in row {}, for example 2; expected one of 0, 1.'), ('paid', 'maybe', 'level',
    'hard', "'maybe'"),
    ('day', '2019-12-31', 'range', 'soft', 'expected a date such as 2026-01-31 from 2020-01-01 up to 2025-12-31.'),
    ('day', '2031-01-01', 'hard_range', 'hard', 'up to 2030-01-01.'), ('day', '31/12/2024', 'type', 'hard', "for example '31/12/2024'"),
    ('day', 20240115, 'type', 'hard', 'for example 20240115'), ('day', dt.timedelta(5), 'type', 'hard', 'unreadable'),
    ('loan', 10**5000, 'type', 'hard', 'a number of thousands of digits'), ('job', list(range(10_000)), 'type', 'hard',
    '[0, 1, 2, 3, 4, 5, ...]'),
]


@pytest.mark.parametrize('column, value, rule, severity, words', BREAKS, ids=range(len(BREAKS)))
def test_a_violation_says_what_where_and_what_was_expected(column, value, rule, severity, words):
    raw = {n: [v] * 5 for n, v in FITS.items()}
    assert not check_frame(LOANS, raw).violations
    raw[column] = raw[column][:3] + [value] + raw[column][4:]
    for start in (1, 1001):
        checked = check_frame(LOANS, raw, start=start)
        found, = checked.violations
        assert (found.column, found.rule, found.severity, found.count, found.rows) == (column, rule, severity, 1, (start + 3,))
        assert words.format(f'{start + 3}') in found.message and len(found.message) < 300
        assert checked.bad_rows.tolist() == [False] * 3 + [severity == 'hard', False]
    of_record, = check_record(LOANS, FITS | {column: value})[1]
    assert (of_record.column, of_record.rule, of_record.severity, of_record.rows) == (column, rule, severity, ())


def test_many_rows_are_counted_and_the_first_named():
    ages = [200 if i % 3 == 0 else 30 for i in range(3000)]
    checked = check_frame(LOANS, {n: [v] * 3000 for n, v in FITS.items()} | {'age': ages}, start=501)
    found, = checked.violations
    assert found.count == 1000 and found.rows == tuple(range(501, 501 + 3 * ROWS_NAMED, 3))
    assert 'column age: 1,000 values impossible in rows 501, 504, 507, 510, 513 and 995 more, for example 200' in found.message
    assert np.flatnonzero(checked.bad_rows).tolist() == list(range(0, 3000, 3))


@settings(max_examples=examples(40))
@given(contracts(derived=0), st.data())
def test_counts_rows_and_bad_rows_agree(contract, data):
    raw = data.draw(tables(contract))
    checked = check_frame(contract, raw)
    rows = len(next(iter(raw.values())))
    one_by_one = [check_frame(contract, {n: v[i:i + 1] for n, v in raw.items()}, start=i + 1) for i in range(rows)]
    for violation in (v for v in checked.violations if v.rule not in ('unknown', 'missing')):
        which = violation.column, violation.rule
        alone = [i + 1 for i, one in enumerate(one_by_one) if which in {(v.column, v.rule) for v in one.violations}]
        assert violation.count == len(alone) and violation.rows == tuple(alone)
    assert checked.bad_rows.tolist() == [bool(one.bad_rows[0]) for one in one_by_one]


def test_unknown_and_missing_columns():
    raw = {n: [v] for n, v in FITS.items() if n not in ('income', 'age', 'paid')} | {'incme': [1.0]}
    assert [v.message for v in check_frame(LOANS, raw).violations] == [
        "column incme is not in the contract. Did you mean 'income'?", 'column income is required and missing.']
    wanted = [v.column for v in check_frame(LOANS, raw, need_target=True).violations]
    assert wanted == ['incme', 'income', 'paid']
    typed = check_frame(LOANS, raw).frame
    assert np.isnan(typed['age']).all() and list(typed) == list(LOANS.columns)
    assert [v.rule for v in check_record(LOANS, {n: v[0] for n, v in raw.items()})[1]] == ['unknown', 'missing']


@pytest.mark.parametrize('role', ['leak', 'excluded', 'target', 'protected', 'feature'])
def test_what_is_known_later_is_not_required(role):
    "Left out, null in a table or null in an application is one thing, refused or not."
    settings_ = {'kind': 'flag', 'role': role, 'null': False} | ({'bad': 1} if role == 'target' else {})
    contract = parse_contract({'name': 'x', 'value': {d: {'good': 1, 'bad': -1} for d in ('approve', 'refer', 'decline')},
                               'columns': {'a': {}, 'late': settings_}})
    refused = role in ('protected', 'feature')
    assert check_frame(contract, {'a': [1], 'late': [None]}).bad_rows.tolist() == [refused]
    assert bool(check_frame(contract, {'a': [1]}).hard) == refused
    for record in ({'a': 1}, {'a': 1, 'late': None}, {'a': 1, 'late': ''}):
        assert bool(check_record(contract, record)[1]) == refused


@pytest.mark.parametrize('raw', [{'age': [1, 2], 'job': ['clerk']}, {'age': np.ones((2, 2))}, {'age': np.array([1.0]), 'income': []}])
def test_what_is_no_table(raw):
    with pytest.raises(RiskError, match='columns of one length'):
        check_frame(LOANS, raw)


@pytest.mark.parametrize('record', [None, [], 'text', 5, [('age', 5)]])
def test_what_is_no_application(record):
    with pytest.raises(RiskError, match='mapping of field names to values'):
        check_record(LOANS, record)


@pytest.mark.parametrize('name', [None, 5, 'x' * 100_000, '\ud800', ('a', 'b')])
def test_any_name_of_a_field_is_refused_in_words(name):
    begin = time.perf_counter()
    found, = check_record(LOANS, FITS | {name: 1})[1]
    assert found.rule == 'unknown' and time.perf_counter() - begin < 1
    many = check_record(LOANS, FITS | {f'field {i}': 1 for i in range(5_000)})[1]
    assert len(many) == 5_000 and time.perf_counter() - begin < 5


def test_two_readings_do_not_touch_each_other():
    "A contract keeps no state, and an array that is given is not changed."
    ages = np.array([30.0, 999.0, np.nan])
    raw = {n: [v] * 3 for n, v in FITS.items()} | {'age': ages}
    first = check_frame(LOANS, raw)
    first.frame['age'][:] = -5
    again = check_frame(LOANS, raw)
    assert [v.message for v in again.violations] == [v.message for v in first.violations]
    np.testing.assert_array_equal(ages, [30.0, 999.0, np.nan])
