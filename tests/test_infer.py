"Drafts of contracts load, validate the very file they came from, and come close to what a person committed."
import csv
import datetime as dt
import gzip
import os
import string
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from riskscore.contract import Contract, load_contract, parse_contract
from riskscore.core import RiskError
from riskscore.datasets import read_frames
from riskscore.infer import infer_contract

ROOT = Path(__file__).resolve().parents[1]


def inferred(source: Path, target: str, **options) -> tuple[str, Contract]:
    "The text of a draft and the contract it is."
    text = infer_contract(source, target, **options)
    return text, parse_contract(yaml.safe_load(text), 'draft')


def violations(source: Path, contract: Contract) -> list[tuple[str, str, str]]:
    return [(v.column, v.rule, v.severity) for batch in read_frames(source, contract) for v in batch.violations]


def by_role(contract: Contract, role: str) -> set[str]:
    return {c.name for c in contract.columns.values() if c.role == role}


def write_csv(path: Path, columns: dict[str, list]) -> Path:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


# ---------------------------------------------------------------- any table

ROWS = 40
NAMES = st.text(alphabet=string.ascii_letters + '_ .-:#{}[]\'"&*!|>%@`áéñ€信用0123456789', min_size=1, max_size=12).map(str.strip)
WORDS = st.sampled_from([
    'a', 'b', 'No', 'yes', 'null', '1', '007', '-', '?', ' ', 'ñandú', "it's", '#1', '=1+1', '2026-01-31', '31/12/2025', 'x: y'])
VALUES = {
    'codes': st.integers(0, 4), 'whole': st.integers(-10**6, 10**6), 'large': st.integers(-2**62, 2**62),
    'flag': st.sampled_from('NY'),
    'number': st.floats(-1e9, 1e9, allow_nan=False).map(lambda v: f'{v:.6g}'), 'words': WORDS,
    'mixed': st.one_of(st.integers(0, 99), WORDS),
    'free': st.text(max_size=8).filter(lambda t: '\0' not in t), 'empty': st.just(''),
    'placeholder': st.sampled_from([999999, 1, 2, 3, 4, 5, 6, 7]),
    'iso': st.dates(dt.date(1950, 1, 1), dt.date(2050, 1, 1)).map(str),
    'european': st.dates(dt.date(1950, 1, 1)).map(lambda d: f'{d:%d/%m/%Y}')}


@st.composite
def tables(draw) -> dict[str, list]:
    "A target, an honest column, and some of any kind, each with gaps."
    columns: dict[str, list] = {'honest': [i % 7 / 7 for i in range(ROWS)], 'bad': [i % 5 // 4 for i in range(ROWS)]}
    for name in draw(st.lists(NAMES.filter(bool), max_size=5, unique=True)):
        values = VALUES[draw(st.sampled_from(sorted(VALUES)))]
        gaps = draw(st.booleans())
        columns.setdefault(name, draw(st.lists(st.one_of(values, st.just('')) if gaps else values, min_size=ROWS, max_size=ROWS)))
    return columns


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_a_draft_fits_its_own_file_and_refuses_nothing(table, tmp_path):
    source = write_csv(tmp_path / 'table.csv', table)
    text, contract = inferred(source, 'bad', sample_rows=20)
    assert list(contract.columns) == list(table)
    assert contract.target is not None and contract.target.bad == '1'
    found = violations(source, contract)
    assert [v for v in found if v[2] == 'hard'] == []
    assert [v for v in found if v[1] == 'range'] == []
    columns = yaml.safe_load(text)['columns']
    assert not any({'hard', 'closed', 'null'} & set(spec) for spec in columns.values())  # inference sets soft limits only


def test_the_same_file_gives_the_same_draft(tmp_path):
    rng = np.random.default_rng(1)
    source = write_csv(tmp_path / 't.csv', {'x': rng.normal(size=500).tolist(), 'bad': (rng.random(500) < 0.2).astype(int).tolist()})
    assert infer_contract(source, 'bad', sample_rows=50) == infer_contract(source, 'bad', sample_rows=50)


# ---------------------------------------------------------------- any format

COLUMNS = {
    'loan_id': list(range(7, 407)), 'opened': [dt.datetime(2025, 1 + i % 12, 1 + i % 28) for i in range(400)],
    'amount': [1000.5 + 7 * i for i in range(400)], 'kids': [None if i % 9 == 0 else i % 4 for i in range(400)],
    'job': [('nurse', 'clerk', 'cook')[i % 3] for i in range(400)], 'owner': [i % 2 == 0 for i in range(400)],
    'defaulted': [int(i % 10 == 0) for i in range(400)]}


def write_everywhere(folder: Path) -> dict[str, Path]:
    "One table in all formats."
    path = {name: folder / name for name in ('t.csv', 't.csv.gz', 't.zip', 't.parquet', 't.xlsx', 'parts')}
    write_csv(path['t.csv'], COLUMNS)
    path['t.csv.gz'].write_bytes(gzip.compress(path['t.csv'].read_bytes()))
    with zipfile.ZipFile(path['t.zip'], 'w') as archive:
        archive.write(path['t.csv'], 't.csv')
    pq.write_table(pa.table(COLUMNS), path['t.parquet'])
    book = openpyxl.Workbook()
    for row in [list(COLUMNS), *zip(*COLUMNS.values(), strict=True)]:
        book.active.append(row)
    book.save(path['t.xlsx'])
    path['parts'].mkdir()
    for i in range(2):
        write_csv(path['parts'] / f'{i}.csv', {name: values[i * 200:i * 200 + 200] for name, values in COLUMNS.items()})
    return path


def test_every_format_gives_the_same_columns(tmp_path):
    for name, source in write_everywhere(tmp_path).items():
        _, contract = inferred(source, 'defaulted')
        assert {n: (c.kind, c.role) for n, c in contract.columns.items()} == {
            'loan_id': ('integer', 'id'), 'opened': ('date', 'time'), 'amount': ('number', 'feature'), 'kids': ('integer', 'feature'),
            'job': ('category', 'feature'), 'owner': ('flag', 'feature'), 'defaulted': ('flag', 'target')}, name
        assert contract.columns['owner'].levels == ('False', 'True')
        assert (contract.amount, contract.split['by'], contract.cv['by']) == ('amount', 'time', 'time')
        assert violations(source, contract) == [], name


def test_types_of_parquet(tmp_path):
    rows = 60
    table = pa.table({
        'decided': pa.array([dt.datetime(2025, 1, 1 + i % 9) for i in range(rows)], pa.timestamp('ns', tz='Europe/Madrid')),
        'key': pa.array(range(2**60, 2**60 + rows)), 'level': pa.array(['a', 'b'] * (rows // 2)).dictionary_encode(),
        'rate': pa.array([None, 1.25] * (rows // 2)).cast(pa.decimal128(9, 2)), 'nothing': pa.nulls(rows),
        'age': pa.array([20.0 + i % 9 for i in range(rows)], pa.float32()), 'bad': [i % 4 == 0 for i in range(rows)]})
    pq.write_table(table, tmp_path / 't.parquet')
    _, contract = inferred(tmp_path / 't.parquet', 'bad')
    kinds = {n: (c.kind, c.role) for n, c in contract.columns.items()}
    assert kinds['level'] == ('category', 'feature') and kinds['age'] == ('integer', 'feature') and kinds['bad'] == ('flag', 'target')
    assert kinds['key'][1] == 'id' and kinds['decided'] == ('date', 'time')
    assert kinds['nothing'][1] == kinds['rate'][1] == 'excluded'  # empty; always 1.25
    assert [v for v in violations(tmp_path / 't.parquet', contract) if v[2] == 'hard'] == []
    pq.write_table(table.append_column('tags', [[[1, 2]] * rows]), tmp_path / 't.parquet')
    with pytest.raises(RiskError, match="Column 'tags' holds lists or records"):
        infer_contract(tmp_path / 't.parquet', 'bad')


def test_a_european_file(tmp_path):
    lines = ['Fecha alta;Ingresos mensuales;Estado civil;Impagado']
    lines += [f'{1 + i % 28:02}/0{1 + i % 9}/2025;{900 + i},5;{"SC"[i % 2]};{"SN"[i % 7 > 0]}' for i in range(300)]
    (tmp_path / 't.csv').write_text('\n'.join(lines), encoding='utf-8')
    text, contract = inferred(tmp_path / 't.csv', 'Impagado')
    assert (contract.target.bad, contract.target.levels) == ('S', ('N', 'S'))
    assert contract.time.name == 'Fecha alta' and '%d/%m/%Y' in contract.time.note
    assert contract.columns['Ingresos mensuales'].kind == 'number'
    assert contract.columns['Estado civil'].role == 'protected'
    assert '1. the outcome Impagado: S is taken for default' in text
    assert violations(tmp_path / 't.csv', contract) == []


def test_what_was_written_after_the_decision_stays_out(tmp_path):
    rng, rows = np.random.default_rng(5), 2_000
    bad = rng.random(rows) < 0.1
    amount = rng.integers(1_000, 30_000, rows)
    months = np.array(['Jan-2015', 'Jul-2015', 'Mar-2016'])
    table = {
        'issue_d': months[rng.integers(0, 3, rows)], 'loan_amnt': amount, 'int_rate': [f'{v:.2f}%' for v in rng.uniform(5, 25, rows)],
        'delinq_2yrs': rng.integers(0, 4, rows), 'number_of_times_past_due': rng.integers(0, 9, rows),
        'fico': rng.normal(700 - 60 * bad, 40).round(),
        'total_pymnt': (amount * np.where(bad, rng.uniform(0, 1.05, rows), 1.1)).round(2), 'recoveries': np.where(bad, 55.5, 0.0),
        'last_pymnt_d': months[rng.integers(0, 3, rows)],
        'agency': np.where(bad & (rng.random(rows) < 0.99), np.array(['Collectors Ltd', 'Cobros SA'])[rng.integers(0, 2, rows)], ''),
        'loan_status': np.where(bad, 'Charged Off', np.where(rng.random(rows) < 0.5, 'Fully Paid', 'Current'))}
    text, contract = inferred(write_csv(tmp_path / 't.csv', {n: list(v) for n, v in table.items()}), 'loan_status')
    assert by_role(contract, 'leak') == {'total_pymnt', 'recoveries', 'last_pymnt_d', 'agency'}
    assert by_role(contract, 'feature') == {'loan_amnt', 'delinq_2yrs', 'number_of_times_past_due', 'fico'}
    assert (contract.time.name, contract.amount, contract.target.bad) == ('issue_d', 'loan_amnt', 'Charged Off')
    assert 'Fully Paid, Current all count as good' in text or 'Current, Fully Paid all count as good' in text
    assert "numbers written as text, for example" in text


# ---------------------------------------------------------------- clear errors

@pytest.mark.parametrize(('table', 'target', 'said'), [
    ({'x': [1, 2], 'y': [0, 1]}, 'z', "There is no column 'z'"),
    ({'x': [1, 2], 'y': [0, 0]}, 'y', "must hold two outcomes, good and bad"),
    ({'x': [1, 2, 3], 'y': ['', '', '']}, 'y', 'found no value'),
    ({'x': list(range(50)), 'y': list(range(50))}, 'y', 'found many'),
    ({'x': [5, 5, 5], 'y': [0, 1, 0]}, 'y', 'No column of t.csv is of use as a feature'),
    ({'x': [], 'y': []}, 'y', 'has no rows'),
])
def test_what_cannot_be_learnt_from_is_said(table, target, said, tmp_path):
    with pytest.raises(RiskError, match=said.replace('.', r'\.')):
        infer_contract(write_csv(tmp_path / 't.csv', table), target)


def test_rows_that_cannot_be_read_are_counted_in_the_agenda(tmp_path):
    (tmp_path / 't.csv').write_text('x,bad\n' + ''.join(f'{i / 7},{i % 3 // 2}\n' for i in range(90)) + '1,2,3\n')
    assert '1 lines have the wrong number of fields' in infer_contract(tmp_path / 't.csv', 'bad')


# ---------------------------------------------------------------- bounded

def test_it_needs_no_pandas(tmp_path):
    source = write_everywhere(tmp_path)['t.csv']
    code = f"from riskscore.infer import infer_contract; infer_contract({str(source)!r}, 'defaulted')"
    code += "; import sys; sys.exit('pandas' in sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


def peak_of(source: Path) -> int:
    "Peak memory in MB of a fresh process that drafts a contract."
    code = (f"import resource; from riskscore.infer import infer_contract; infer_contract({str(source)!r}, 'bad');"
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)')
    environment = os.environ | {'OMP_NUM_THREADS': '1', 'ARROW_DEFAULT_MEMORY_POOL': 'system'}
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return int(done.stdout)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    rng = np.random.default_rng(0)
    header = ','.join([*(f'n{i}' for i in range(30)), 'bad']) + '\n'
    block = ''.join(','.join([*(f'{v:.6f}' for v in row), str(int(row[0] > 1))]) + '\n' for row in rng.normal(size=(50_000, 30)))
    for name, times in (('one', 1), ('four', 4)):
        (tmp_path / f'{name}.csv').write_text(header + block * times)
    assert peak_of(tmp_path / 'four.csv') <= 1.1 * peak_of(tmp_path / 'one.csv')


# ---------------------------------------------------------------- the committed contracts, and the real tables

COMMITTED = {
    'home_credit': ('home_credit_sample/application_train.csv.gz', 'TARGET'),
    'taiwan': ('taiwan/UCI_Credit_Card.csv', 'default.payment.next.month'),
    'pi_m5': ('pi_m5/Base_de_datos.xlsx', 'Pago_atiempo')}


@pytest.fixture(scope='module')
def drafts():
    "Drafts that were made already."
    return {}


@pytest.fixture(params=COMMITTED)
def pair(request, real_data, drafts) -> tuple[Contract, Contract, Path, str]:
    "The committed contract, the draft, the file and the draft's text, of each real table."
    file, target = COMMITTED[request.param]
    if request.param not in drafts:
        drafts[request.param] = inferred(real_data / file, target)
    text, draft = drafts[request.param]
    return load_contract(ROOT / f'data/contracts/{request.param}.yaml'), draft, real_data / file, text


def test_drafts_of_real_tables_come_close_to_the_committed_contracts(pair):
    committed, draft, _, _ = pair
    assert list(draft.columns) == list(committed.columns)
    for role in ('target', 'id', 'time', 'leak', 'protected'):
        assert by_role(draft, role) == by_role(committed, role), role
    assert draft.target.bad == committed.target.bad
    assert draft.amount == committed.amount
    assert (draft.split['by'], draft.cv['by']) == (committed.split['by'], committed.cv['by'])
    features = [n for n, c in draft.columns.items() if c.role == 'feature']
    other = [n for n in features if draft.columns[n].kind != committed.columns[n].kind]
    assert len(other) <= 0.1 * len(features), other
    for name in features:
        if draft.columns[name].kind == committed.columns[name].kind == 'category':
            assert draft.columns[name].known <= committed.columns[name].known


def test_drafts_of_real_tables_flag_nothing_but_numbers_among_words(pair):
    _, draft, source, _ = pair
    assert {(rule, severity) for _, rule, severity in violations(source, draft)} <= {('unseen', 'soft')}


def test_special_code_of_home_credit(real_data, drafts):
    file, target = COMMITTED['home_credit']
    drafts.setdefault('home_credit', inferred(real_data / file, target))
    assert {n: c.special for n, c in drafts['home_credit'][1].columns.items() if c.special} == {'DAYS_EMPLOYED': (365243,)}


def test_committed_contracts_refuse_no_row_of_their_tables(pair):
    committed, _, source, _ = pair
    assert [v for v in violations(source, committed) if v[2] == 'hard'] == []


@pytest.mark.parametrize('name', COMMITTED)
def test_committed_contracts_can_be_told_to_a_customer(name):
    contract = load_contract(ROOT / f'data/contracts/{name}.yaml')
    assert contract.target is not None and contract.title and contract.currency
    for column in contract.feature_columns:
        assert set(column.words) == {'en', 'es'}, column.name
        assert column.group, column.name
    told = [c.words['en'] for c in contract.feature_columns]
    assert len(told) == len(set(told))  # one name, one column


def test_home_credit_names_all_columns_and_keeps_outside_scores_apart():
    contract = load_contract(ROOT / 'data/contracts/home_credit.yaml')
    assert len(contract.columns) == 122
    groups = [contract.columns[f'EXT_SOURCE_{i}'].group for i in (1, 2, 3)]
    alone = [c.name for c in contract.columns.values() if c.group in groups]
    assert len(set(groups)) == 3 and len(alone) == 3
    assert by_role(contract, 'protected') == {'CODE_GENDER', 'NAME_FAMILY_STATUS'}
    assert {c.name for c in contract.columns.values() if c.temporal} == {'WEEKDAY_APPR_PROCESS_START', 'HOUR_APPR_PROCESS_START'}
