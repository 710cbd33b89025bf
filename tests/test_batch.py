"""Batch scoring: equal to the record and the frame bit for bit, nothing lost, hostile cells, faults, concurrent runs, bounded memory."""
import csv
import datetime as dt
import gzip
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_bundle import applications, small_bundle, small_contract

from riskscore.batch import LOG_COLUMNS, append_log, newest_file, rejected_path, score_batch
from riskscore.bundle import load_bundle
from riskscore.contract import check_frame
from riskscore.core import RiskError
from riskscore.results import read_result
from riskscore.value import business_value, value_totals


@pytest.fixture(scope='module')
def scorer(tmp_path_factory):
    return load_bundle(small_bundle(tmp_path_factory.mktemp('bundle')))


def write_csv(path: Path, raw: dict[str, list], delimiter: str = ',') -> Path:
    "Raw applications as a text file; null is an empty cell."
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, lineterminator='\n')
    writer.writerow(raw)
    writer.writerows(zip(*([('' if v is None else v) for v in column] for column in raw.values()), strict=True))
    path.write_text(text.getvalue(), encoding='utf-8')
    return path


def write_any(path: Path, raw: dict[str, list]) -> Path:
    "Raw applications in the format of the name."
    if path.name.endswith('.csv.gz'):
        path.write_bytes(gzip.compress(write_csv(path.with_name('plain.csv'), raw).read_bytes()))
        path.with_name('plain.csv').unlink()
    elif path.suffix == '.zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.write(write_csv(path.with_name('plain.csv'), raw), 'plain.csv')
        path.with_name('plain.csv').unlink()
    elif path.suffix == '.parquet':
        pq.write_table(pa.table(raw), path)
    elif path.suffix == '.xlsx':
        import openpyxl
        book = openpyxl.Workbook()
        book.active.append(list(raw))
        for row in zip(*raw.values(), strict=True):
            book.active.append(row)
        book.save(path)
    else:
        write_csv(path, raw)
    return path


def same(answers: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    "The same bits in every answer."
    for name in ('pd', 'score', 'decision', 'value'):
        np.testing.assert_array_equal(answers[name], expected[name], err_msg=name)


# --- one answer, however it is asked for ---

@pytest.mark.parametrize('name', ['in.csv', 'in.csv.gz', 'in.zip', 'in.parquet', 'in.xlsx'])
@pytest.mark.parametrize('out', ['out.csv', 'out.parquet'])
def test_batch_equals_record_equals_frame_bit_for_bit(scorer, tmp_path, name, out):
    raw = applications(300, seed=5)
    run = score_batch(write_any(tmp_path / name, raw), scorer, tmp_path / out)
    assert (run.rows, run.scored, run.rejected) == (300, 300, 0)
    answers = read_result(tmp_path / out, text=['app'])
    same(answers, scorer.frame(check_frame(scorer.contract, raw).frame))
    assert answers['app'].tolist() == raw['app']
    assert answers['outcome'].tolist() == raw['bad']
    for i in range(0, 300, 17):
        one = scorer.record({n: values[i] for n, values in raw.items()})
        assert {n: answers[n][i] for n in ('pd', 'score', 'decision', 'value')} == {n: one[n] for n in ('pd', 'score', 'decision', 'value')}


odd = st.one_of(st.none(), st.floats(-1e6, 1e6).map(lambda v: round(v, 3)), st.sampled_from([999, 0, -1, 1e308, 99, 1000.5]))
odd_text = st.one_of(st.none(), st.sampled_from(['clerk', 'nurse', 'pilot', 'web', 'shop', 'N', 'Y', '=1+1', 'münchen', ' x', '1', 'a"b,']))
odd_row = st.fixed_dictionaries({'amount': odd, 'income': odd, 'tenure': odd, 'job': odd_text, 'channel': odd_text, 'owner': odd_text,
                                 'asked_on': st.one_of(st.none(), st.sampled_from(['2026-02-03', '1999-12-31', 'soon', '2026-13-01']))})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(odd_row, min_size=1, max_size=12))
def test_batch_sets_aside_exactly_what_a_record_is_refused_for(scorer, tmp_path, rows):
    raw = {name: [row[name] for row in rows] for name in rows[0]}
    path = write_csv(tmp_path / 'odd.csv', {'app': [f'A{i}' for i in range(len(rows))], **raw})
    run = score_batch(path, scorer, tmp_path / 'out.parquet')
    answers = read_result(tmp_path / 'out.parquet')
    got = {app: i for i, app in enumerate(answers['app'].tolist())}
    with open(rejected_path(tmp_path / 'out.parquet'), newline='') as file:
        refused = {line['id'] for line in csv.DictReader(file)}
    assert run.rows == len(rows) == len(got) + len(refused) and not set(got) & refused
    for i, row in enumerate(rows):
        try:
            one = scorer.record({'app': f'A{i}', **row})
        except RiskError:
            assert f'A{i}' in refused
            continue
        j = got[f'A{i}']
        assert answers['pd'][j] == one['pd'] and answers['decision'][j] == one['decision'] and answers['score'][j] == one['score']
        flagged = sum(message.count('usual range') + message.count('unknown level') for message in one['flags'])
        assert len((answers['flags'][j] or '').split('; ')) == flagged or (flagged == 0 and answers['flags'][j] is None)


def test_many_batches_and_threads_change_no_bit(scorer, tmp_path):
    raw = applications(40_000, seed=9)
    raw['amount'][20_000] = -1.0
    path = write_csv(tmp_path / 'many.csv', raw)
    one, two = (score_batch(path, scorer, tmp_path / f'{t}.parquet', threads=t) for t in (1, 2))
    assert (one.rows, one.scored, one.rejected) == (two.rows, two.scored, two.rejected) == (40_000, 39_999, 1)
    assert (tmp_path / '1.parquet').read_bytes() == (tmp_path / '2.parquet').read_bytes()
    raw = {n: [v for i, v in enumerate(values) if i != 20_000] for n, values in raw.items()}
    same(read_result(tmp_path / '1.parquet'), scorer.frame(check_frame(scorer.contract, raw).frame))
    assert rejected_path(tmp_path / '1.parquet').read_text() == 'row,id,reasons\n20001,A020001,amount: impossible\n'
    assert one.value == pytest.approx(np.nansum(read_result(tmp_path / '1.parquet')['value']))


# --- which file ---

def test_a_folder_gives_its_newest_file_and_says_so(scorer, tmp_path):
    inbox = tmp_path / 'inbox'
    inbox.mkdir()
    for age, (name, rows) in enumerate({'monday.csv': 5, 'friday.csv': 7, 'tuesday.csv': 6}.items()):
        os.utime(write_csv(inbox / name, applications(rows)), (1e9 + age * 60,) * 2)
    run = score_batch(inbox, scorer, inbox / 'out.csv')
    assert (run.source.name, run.rows) == ('tuesday.csv', 6)
    assert run.notes == [f'tuesday.csv is the newest of 3 files in {inbox}']
    assert score_batch(inbox, scorer, inbox / 'out.csv').source.name == 'tuesday.csv', 'its own answers are no applications'
    assert newest_file(f'{inbox}/*day.csv')[0].name == 'tuesday.csv'


def test_no_file_and_no_folder(scorer, tmp_path):
    (tmp_path / 'empty').mkdir()
    for source, said in ((tmp_path / 'nowhere.csv', 'no data'), (tmp_path / 'empty', 'no data file')):
        with pytest.raises(RiskError, match=said):
            score_batch(source, scorer, tmp_path / 'out.csv')


# --- columns ---

def test_extra_columns_are_passed_over_and_renamed_ones_noticed(scorer, tmp_path):
    raw = applications(5)
    extra = write_csv(tmp_path / 'extra.csv', {**raw, 'branch': list(range(5)), 'clerk name': ['x'] * 5})
    run = score_batch(extra, scorer, tmp_path / 'out.csv')
    assert run.notes == ['ignored columns that are not in the contract: branch, clerk name'] and run.scored == 5
    renamed = {('incom' if n == 'income' else n): v for n, v in raw.items()}
    with pytest.raises(RiskError, match=r"income is missing\. Did you mean 'incom'\?"):
        score_batch(write_csv(tmp_path / 'renamed.csv', renamed), scorer, tmp_path / 'out.csv')
    run = score_batch(tmp_path / 'renamed.csv', scorer, tmp_path / 'out.csv', ignore_unknown=True)
    assert run.scored == 5 and any('read as missing values: income' in note for note in run.notes)
    required = {n: v for n, v in raw.items() if n != 'amount'}
    with pytest.raises(RiskError, match='amount is required and missing'):
        score_batch(write_csv(tmp_path / 'required.csv', required), scorer, tmp_path / 'out.csv', ignore_unknown=True)


def test_a_file_without_id_is_numbered_by_row(scorer, tmp_path):
    raw = {n: v for n, v in applications(4).items() if n not in ('app', 'bad', 'arrears', 'sex')}
    raw['amount'][1] = -1
    score_batch(write_csv(tmp_path / 'in.csv', raw), scorer, tmp_path / 'out.csv')
    answers = read_result(tmp_path / 'out.csv')
    assert answers['row'].tolist() == [1, 3, 4] and 'outcome' not in answers


def test_long_ids_keep_their_digits(tmp_path):
    scorer = load_bundle(small_bundle(tmp_path, trees=2, contract=small_contract(app={'kind': 'integer'})))
    raw = applications(3) | {'app': [9007199254740993, 9007199254740995, 123456789012345678]}
    for name in ('in.csv', 'in.parquet'):
        for out in ('out.csv', 'out.parquet'):
            score_batch(write_any(tmp_path / name, raw), scorer, tmp_path / out)
            assert read_result(tmp_path / out)['app'].tolist() == raw['app'], (name, out)


def test_ids_with_leading_zeros_stay_text(scorer, tmp_path):
    raw = applications(2) | {'app': ['0007', '1e5']}
    score_batch(write_csv(tmp_path / 'in.csv', raw), scorer, tmp_path / 'out.csv')
    assert read_result(tmp_path / 'out.csv', text=['app'])['app'].tolist() == ['0007', '1e5']


# --- hostile cells ---

HOSTILE = ['=HYPERLINK("http://x")', '+1+cmd|\' /C calc\'!A0', '-2+3', '@SUM(A1)', '\t=1', '\r=1', '＝1', '=a,"b"\n=c']


def test_hostile_cells_are_text_in_csv_and_untouched_in_parquet(scorer, tmp_path):
    raw = applications(len(HOSTILE)) | {'app': HOSTILE}
    path = tmp_path / 'in.parquet'
    pq.write_table(pa.table(raw), path)
    score_batch(path, scorer, tmp_path / 'out.parquet')
    assert read_result(tmp_path / 'out.parquet')['app'].tolist() == HOSTILE
    score_batch(path, scorer, tmp_path / 'out.csv')
    with open(tmp_path / 'out.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['app'] for row in rows] == ["'" + h for h in HOSTILE]
    for row in rows:
        for name, cell in row.items():
            assert cell[:1] not in '=+@\t\r＝' or cell == '', (name, cell)


def test_negative_amounts_stay_numbers(tmp_path):
    scorer = load_bundle(small_bundle(tmp_path, trees=2, contract=small_contract(amount={'hard': [None, None]})))
    raw = applications(3) | {'amount': [-5.5, -1e-7, 100.0]}
    score_batch(write_csv(tmp_path / 'in.csv', raw), scorer, tmp_path / 'out.csv')
    lines = list(csv.DictReader((tmp_path / 'out.csv').read_text().splitlines()))
    assert [float(line['amount']) for line in lines] == [-5.5, -1e-7, 100.0]
    assert read_result(tmp_path / 'out.csv', text=['app'])['amount'].dtype == np.float64


def test_hostile_ids_of_refused_rows_are_neutral_too(scorer, tmp_path):
    raw = applications(2) | {'app': ['=1+1', '@x'], 'amount': [-1, -2]}
    run = score_batch(write_csv(tmp_path / 'in.csv', raw), scorer, tmp_path / 'out.csv')
    assert (run.scored, run.rejected) == (0, 2)
    assert rejected_path(tmp_path / 'out.csv').read_text() == "row,id,reasons\n1,'=1+1,amount: impossible\n2,'@x,amount: impossible\n"
    assert read_result(tmp_path / 'out.csv')['pd'].tolist() == []


# --- faults ---

def test_header_only_zero_bytes_and_a_truncated_gzip(scorer, tmp_path):
    (tmp_path / 'header.csv').write_text('app,amount\n')
    (tmp_path / 'zero.csv').write_bytes(b'')
    whole = gzip.compress(write_csv(tmp_path / 'whole.csv', applications(3000)).read_bytes())
    (tmp_path / 'cut.csv.gz').write_bytes(whole[:len(whole) // 2])
    for name, said in (('header.csv', 'holds no applications'), ('zero.csv', 'empty'), ('cut.csv.gz', 'cut short')):
        with pytest.raises(RiskError, match=said):
            score_batch(tmp_path / name, scorer, tmp_path / 'out.csv')
    assert not [p for p in tmp_path.iterdir() if 'out' in p.name]


@pytest.mark.parametrize('delimiter', [';', '\t', '|'])
def test_other_delimiters_are_read(scorer, tmp_path, delimiter):
    run = score_batch(write_csv(tmp_path / 'in.csv', applications(20), delimiter), scorer, tmp_path / 'out.csv')
    assert (run.rows, run.scored) == (20, 20)


def test_an_unknown_delimiter_is_told_by_its_missing_columns(scorer, tmp_path):
    with pytest.raises(RiskError, match='amount is required and missing'):
        score_batch(write_csv(tmp_path / 'in.csv', applications(20), '~'), scorer, tmp_path / 'out.csv')


def test_lines_with_the_wrong_number_of_fields_are_set_aside(scorer, tmp_path):
    lines = write_csv(tmp_path / 'in.csv', applications(4)).read_text().splitlines()
    lines[2] += ',more'
    lines.insert(4, 'short')
    (tmp_path / 'in.csv').write_text('\n'.join(lines) + '\n')
    run = score_batch(tmp_path / 'in.csv', scorer, tmp_path / 'out.csv')
    assert (run.rows, run.scored, run.rejected) == (5, 3, 2) and run.reasons['wrong number of fields'] == 2
    refused = list(csv.DictReader(rejected_path(tmp_path / 'out.csv').open()))
    assert [line['row'] for line in refused] == ['2', '4']


def test_a_format_that_cannot_be_written_is_refused_before_any_work(scorer, tmp_path):
    with pytest.raises(RiskError, match='.csv or .parquet'):
        score_batch(tmp_path / 'does_not_matter.csv', scorer, tmp_path / 'out.xlsx')


def test_the_applications_are_never_overwritten(scorer, tmp_path):
    path = write_csv(tmp_path / 'in.csv', applications(3))
    (tmp_path / 'link.csv').symlink_to(path)
    before = path.read_bytes()
    for out in (path, tmp_path / 'link.csv', tmp_path / 'x' / '..' / 'in.csv'):
        with pytest.raises(RiskError, match='would destroy them'):
            score_batch(path, scorer, out)
    assert path.read_bytes() == before


class _Interrupt(BaseException):
    "Stands for Ctrl-C."


@pytest.mark.parametrize('error', [_Interrupt, KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_and_the_earlier_answers(scorer, tmp_path, error):
    path = write_csv(tmp_path / 'in.csv', applications(40_000))
    (tmp_path / 'out.csv').write_text('earlier')
    rejected_path(tmp_path / 'out.csv').write_text('earlier')

    def stop(rows):
        raise error

    with pytest.raises(error):
        score_batch(path, scorer, tmp_path / 'out.csv', archive=tmp_path / 'batches', progress=stop)
    assert (tmp_path / 'out.csv').read_text() == rejected_path(tmp_path / 'out.csv').read_text() == 'earlier'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.csv', 'out.csv', 'out.rejected.csv']


def test_a_killed_run_shows_no_answers(tmp_path, scorer):
    bundle = small_bundle(tmp_path / 'bundle')
    path = write_csv(tmp_path / 'in.csv', applications(40_000))
    code = ('import os, signal\nfrom riskscore.batch import score_batch\n'
            f'score_batch({str(path)!r}, {str(bundle)!r}, {str(tmp_path / "out.csv")!r}, '
            'progress=lambda n: os.kill(os.getpid(), signal.SIGKILL))')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / 'out.csv').exists() and not rejected_path(tmp_path / 'out.csv').exists()
    assert score_batch(path, scorer, tmp_path / 'out.csv').scored == 40_000, 'and the next run works'


def test_a_full_disk_is_told_in_words(scorer, tmp_path, monkeypatch):
    from riskscore.results import ResultWriter

    def full(self, batch):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(ResultWriter, 'write', full)
    with pytest.raises(RiskError, match='No space left on device'):
        score_batch(write_csv(tmp_path / 'in.csv', applications(3)), scorer, tmp_path / 'out.csv')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['in.csv']


# --- on record ---

def test_each_run_is_kept_and_logged(scorer, tmp_path):
    path = write_csv(tmp_path / 'my applications (1).csv', applications(50) | {'amount': [-1.0] + [200.0] * 49})
    runs = [score_batch(path, scorer, tmp_path / out, archive=tmp_path / 'batches') for out in ('a.csv', 'b.parquet')]
    log = list(csv.DictReader((tmp_path / 'batches' / 'log.csv').open()))
    assert tuple(log[0]) == LOG_COLUMNS and len(log) == 2
    for run, line in zip(runs, log, strict=True):
        assert run.kept.name.endswith('Z_my_applications__1_')
        assert (run.kept / f'predictions{run.out.suffix}').read_bytes() == run.out.read_bytes()
        assert (run.kept / 'predictions.rejected.csv').read_bytes() == run.rejected_out.read_bytes()
        assert Path(line['output']).exists() and line['model_version'] == scorer.version and line['digest'] == run.digest
        assert line['policy_version'] == scorer.policy.version
        assert (int(line['rows']), int(line['scored']), int(line['rejected'])) == (50, 49, 1)
        assert int(line['approved']) + int(line['referred']) + int(line['declined']) == 49
        assert float(line['value']) == pytest.approx(run.value, abs=0.01) and line['currency'] == 'EUR'
        assert dt.datetime.fromisoformat(line['time']).tzinfo is not None
    runs[0].out.write_text('edited')
    assert (runs[0].kept / 'predictions.csv').read_text() != 'edited'


def test_a_log_of_an_earlier_version_keeps_its_columns_and_loses_no_line(scorer, tmp_path):
    old = [name for name in LOG_COLUMNS if name != 'policy_version']
    log = tmp_path / 'batches' / 'log.csv'
    log.parent.mkdir()
    log.write_text(','.join(old) + '\n' + ','.join(f'old-{name}' for name in old) + '\n')
    path = write_csv(tmp_path / 'in.csv', applications(5))
    run = score_batch(path, scorer, tmp_path / 'out.csv', archive=log.parent)
    first, second = csv.DictReader(log.open())
    assert list(first) == old and first['output'] == 'old-output'
    assert list(second) == old and second['model_version'] == scorer.version and second['output'] == str(run.kept / 'predictions.csv')


def _add_lines(path, worker, count):
    for i in range(count):
        append_log(path, dict.fromkeys(LOG_COLUMNS, f'{worker}-{i}-{"x" * 200}'))


def test_concurrent_runs_lose_no_line_of_the_log(tmp_path):
    path = tmp_path / 'batches' / 'log.csv'
    workers = [multiprocessing.get_context('spawn').Process(target=_add_lines, args=(path, w, 40)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = list(csv.reader(path.open()))
    assert lines[0] == list(LOG_COLUMNS) and lines.count(list(LOG_COLUMNS)) == 1
    assert sorted(line[0].rsplit('-', 1)[0] for line in lines[1:]) == sorted(f'{w}-{i}' for w in range(4) for i in range(40))
    assert all(len(line) == len(LOG_COLUMNS) and len(set(line)) == 1 for line in lines[1:])


def test_a_line_that_a_crash_cut_does_not_spoil_the_next(tmp_path):
    path = tmp_path / 'log.csv'
    append_log(path, dict.fromkeys(LOG_COLUMNS, 'a'))
    path.write_bytes(path.read_bytes()[:-5])
    append_log(path, dict.fromkeys(LOG_COLUMNS, 'b'))
    assert path.read_text().splitlines()[-1] == ','.join('b' * len(LOG_COLUMNS))


# --- value ---

def test_value_adds_up_and_agrees_with_the_batch(scorer, tmp_path):
    run = score_batch(write_csv(tmp_path / 'in.csv', applications(500, 3)), scorer, tmp_path / 'out.parquet')
    values = business_value(read_result(tmp_path / 'out.parquet'), scorer.contract)
    np.testing.assert_array_equal(values['expected_value'], read_result(tmp_path / 'out.parquet')['value'])
    for by in ('decision', 'risk_tenth'):
        totals = value_totals(values, by)
        for name in ('applications', 'share', 'amount', 'expected_value', 'value_if_approved', 'gain', 'outcomes', 'realised_value'):
            assert totals[name][:-1].sum() == pytest.approx(totals[name][-1]), (by, name)
    assert totals['expected_value'][-1] == pytest.approx(run.value)
    assert len(totals['risk_tenth']) == 11
    assert (np.diff(totals['mean_pd'][:-1]) > 0).all()


def test_expected_and_realised_value_agree_on_average(scorer):
    "Outcomes drawn from the pds themselves: the realised value lies around the expected one."
    rng = np.random.default_rng(1)
    pd, amount = rng.uniform(0, 0.6, 20_000), rng.uniform(100, 1000, 20_000)
    decision = scorer.policy.decide(pd)
    outcome = (rng.random(20_000) < pd).astype(float)
    scored = {'row': np.arange(20_000), 'pd': pd, 'amount': amount, 'decision': decision, 'outcome': outcome}
    totals = value_totals(business_value(scored, scorer.contract))
    spread = 0.6 * np.sqrt((amount[decision != 'decline']**2).sum()) / 2
    assert abs(totals['realised_value'][-1] - totals['expected_value'][-1]) < 3 * spread


# --- memory ---

@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    bundle, peaks = small_bundle(tmp_path), []
    header, rows = write_csv(tmp_path / 'part.csv', applications(50_000)).read_text().split('\n', 1)
    for factor in (1, 4):
        (tmp_path / 'in.csv').write_text(header + '\n' + rows * (factor * 2))
        code = ('import resource, sys\nfrom riskscore.batch import score_batch\n'
                f'run = score_batch({str(tmp_path / "in.csv")!r}, {str(bundle)!r}, {str(tmp_path / "out.csv")!r})\n'
                'print(run.scored, [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")][0])')
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
        scored, peak = map(int, done.stdout.split())
        assert scored == factor * 100_000
        peaks.append(peak)
    assert peaks[1] <= 1.1 * peaks[0]
