"""Contracts and tables that nobody has seen, end to end: from a file to decisions, and no column name in the code."""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightgbm as lgb
import numpy as np
import pytest
import yaml
from generators import portfolio

from riskscore.batch import score_batch
from riskscore.bundle import load_bundle, write_bundle, write_pointer
from riskscore.calibration import fit_calibration
from riskscore.contract import check_frame, load_contract
from riskscore.core import RiskError
from riskscore.datasets import read_table
from riskscore.features import fit_plan
from riskscore.ingest import ingest
from riskscore.policy import fit_policy
from riskscore.trees import Trees

ROWS = 1_200


def write_csv(path: Path, raw: dict[str, list]) -> Path:
    "A raw table as a CSV file; null is an empty cell."
    with open(path, 'w', encoding='utf-8', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(raw)
        rows.writerows(zip(*raw.values(), strict=True))
    return path


def write_contract(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding='utf-8')
    return path


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tolist() == b.tolist() if a.dtype == object else np.array_equal(a, b, equal_nan=True)


def train(folder: Path, contract, frame, seed: int) -> Path:
    "A bundle: plan, small model, calibration on held-out rows and cut-offs."
    plan = fit_plan(contract, [frame])
    matrix, bad = plan.frame(frame), frame[contract.target.name]
    half = np.arange(len(bad)) % 2 == 0
    settings = {'objective': 'binary', 'num_leaves': 7, 'learning_rate': 0.2, 'verbosity': -1, 'num_threads': 1, 'seed': seed, 'deterministic': True}
    data = lgb.Dataset(matrix[half], bad[half], categorical_feature=plan.categorical, params={'verbosity': -1})
    booster = lgb.train(settings, data, 20)
    margin = np.asarray(booster.predict(matrix[~half], raw_score=True))
    calibration = fit_calibration(margin, bad[~half])
    amount = frame[contract.amount][~half] if contract.amount else np.ones(len(margin))
    policy = fit_policy(contract, calibration.pd(margin), amount)
    return write_bundle(folder, Trees('lightgbm', booster.model_to_string()), plan, calibration, policy, contract, {'rows': len(bad)}, {'seconds': 1.0})


@pytest.mark.parametrize('seed', range(12))
def test_from_a_file_to_decisions(tmp_path, seed):
    content, raw = portfolio(seed, ROWS)
    contract = load_contract(write_contract(tmp_path / 'contract.yaml', content))
    history, future = ({n: v[part] for n, v in raw.items()} for part in (slice(0, 900), slice(900, ROWS)))
    checked = check_frame(contract, history, need_target=True)
    assert not checked.hard and not checked.bad_rows.any(), [v.message for v in checked.hard]

    summary = ingest(write_csv(tmp_path / 'history.csv', history), contract, tmp_path / 'table.parquet')
    assert summary['rows'] == 900
    tables = list(read_table(tmp_path / 'table.parquet', contract))
    assert all(same(np.concatenate([t[n] for t in tables]), checked.frame[n]) for n in contract.columns), 'file and memory read alike'

    path = train(tmp_path / 'models', contract, checked.frame, seed)
    assert train(tmp_path / 'again', contract, checked.frame, seed).name == path.name, 'same inputs, same version'
    write_pointer(tmp_path / 'champion.json', path)
    scorer = load_bundle(tmp_path / 'champion.json')
    assert scorer.contract == contract

    table = check_frame(contract, future)
    scores = scorer.frame(table.frame)
    bad = table.frame['outcome'] == 1
    ranks = np.argsort(np.argsort(scores['pd'])) + 1
    auc = (ranks[bad].sum() - bad.sum() * (bad.sum() + 1) / 2) / (bad.sum() * (~bad).sum())
    assert auc > 0.6, 'the outcome depends on the columns, so the model must find something'
    assert ((scores['pd'] >= 0) & (scores['pd'] <= 1)).all() and set(scores['decision']) <= {'approve', 'refer', 'decline'}

    for i in range(0, 300, 7):
        answer = scorer.record({n: v[i] for n, v in future.items() if v[i] is not None and n != 'outcome'})
        assert (answer['pd'], answer['score'], answer['decision']) == (scores['pd'][i], scores['score'][i], scores['decision'][i])

    run = score_batch(write_csv(tmp_path / 'future.csv', future), scorer, tmp_path / 'answers.csv')
    assert (run.rows, run.scored) == (300, 300)
    with open(tmp_path / 'answers.csv', encoding='utf-8', newline='') as file:
        answers = list(csv.DictReader(file))
    assert [float(a['pd']) for a in answers] == scores['pd'].tolist()
    assert [a['decision'] for a in answers] == scores['decision'].tolist()


@pytest.mark.parametrize('seed', range(3))
def test_a_foreign_table_is_refused(tmp_path, seed):
    "A table of one contract under another: every foreign and every missing column is named."
    content, raw = portfolio(seed, 50)
    contract = load_contract(write_contract(tmp_path / 'contract.yaml', portfolio(seed + 100, 10)[0]))
    with pytest.raises(RiskError) as caught:
        ingest(write_csv(tmp_path / 'table.csv', raw), contract, tmp_path / 'table.parquet')
    foreign = [n for n in raw if n not in contract.columns]
    assert foreign and all(f'column {n} is not in the contract' in str(caught.value) for n in foreign)
    assert not (tmp_path / 'table.parquet').exists()


# ---------------------------------------------------------------- through the real tasks

def copy_checkout(root: Path, folder: Path) -> Path:
    "The project's files without what is produced, so that a build disturbs nothing."
    listed = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=root, capture_output=True, check=True).stdout.decode().split('\0')
    for name in filter(None, listed):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder


def build(checkout: Path, **parameters) -> subprocess.CompletedProcess:
    "ploomber build with parameters on the command line."
    arguments = [a for k, v in parameters.items() for a in (f'--env--{k}', str(v))]
    command = [str(Path(sys.executable).with_name('ploomber')), 'build', *arguments]
    paths = os.pathsep.join([str(checkout), *filter(None, [os.environ.get('PYTHONPATH')])])
    found = os.environ | {'PYTHONPATH': paths, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    return subprocess.run(command, cwd=checkout, env=found, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2, 7])  # by time, with a target in words; in order, without amounts
def test_an_unknown_table_builds_without_a_change_of_code(tmp_path, root, seed):
    checkout = copy_checkout(root, tmp_path)
    content, raw = portfolio(seed, 3_000)
    for settings_ in content['columns'].values():
        settings_.setdefault('note', 'known on the day of the decision')  # some have names that the leakage gate asks about
    write_contract(checkout / 'mine.yaml', content)
    write_csv(checkout / 'mine.csv', raw)
    done = build(checkout, contract='mine.yaml', data_path='mine.csv', out='data/mine', reports='reports/mine', n_trials=1, future=0.25)
    assert done.returncode == 0, f'{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
    reports = sorted(p.name for p in (checkout / 'reports/mine').glob('*.html'))
    assert [r[:2] for r in reports] == ['10', '20', '30', '35', '40', '45', '50', '52', '53', '54', '56', '58', '60', '70']
    scorer = load_bundle(checkout / 'data/mine/train/bundle.json')
    assert scorer.contract.name == content['name']
    answer = scorer.record({n: v[0] for n, v in raw.items() if v[0] is not None})
    assert answer['decision'] in ('approve', 'refer', 'decline')
    changed = subprocess.run(['git', '-C', str(root), 'status', '--porcelain', '--', 'data/mine', 'reports/mine'], capture_output=True, text=True).stdout
    assert not changed, 'the checkout itself is left alone'
