"""Out-of-fold AUC on the real Home Credit sample: plain LightGBM, our default parameters, our default search.

    RISKSCORE_DATA=../shared/data python benchmarks/auc.py [--trials 12] [--threads 2]

All rows, stratified 5-fold, seed 42 throughout. The search is nested: inside each outer training fold the feature plan is fitted, the
inner folds are made, parameters and number of trees are chosen and the model is fitted; the outer fold is only predicted. Plain
LightGBM is 100 trees at a learning rate of 0.1, everything else as the library has it, on the columns of the contract and four
ratios; it sees the same rows, folds and categories. Intervals and the paired difference are DeLong's, 95%, over the pooled margins
of all five folds.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
import yaml

import riskscore.feature_sets  # noqa: F401  # the features that the contract names
from riskscore.contract import Contract, load_contract
from riskscore.core import Frame
from riskscore.datasets import read_table
from riskscore.features import fit_plan
from riskscore.ingest import ingest
from riskscore.models import default_params, prepare_dataset, train, write_features
from riskscore.ranking import auc, auc_difference, auc_interval
from riskscore.split import Folds, cv_folds
from riskscore.tuning import search

ROOT = Path(__file__).resolve().parents[1]
RATIOS = ['credit_to_income', 'annuity_to_income', 'term', 'employed_share']
PLAIN, DEFAULT, SEARCH = 'plain LightGBM', 'ours, default parameters', 'ours, default search'
SEED = 42


def read_all(contract: Contract, source: Path, folder: Path) -> Frame:
    "The whole table, typed."
    ingest(source, contract, folder / 'table.parquet')
    blocks = list(read_table(folder / 'table.parquet', contract))
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def take(frame: Frame, rows: npt.NDArray[np.int64]) -> Frame:
    "Some rows of a frame."
    return {name: values[rows] for name, values in frame.items()}


def score_fold(contract: Contract, learn: Frame, check: Frame, folder: Path, trials: int, threads: int) -> tuple[dict[str, Any], int]:
    "Margins of each model for one outer fold, learnt from its training rows only, and the trial that the search kept."
    plan = fit_plan(contract, [learn])
    features, target = plan.frame(check), contract.target.name
    columns = [i for i, name in enumerate(plan.names) if name in contract.columns or name in RATIOS]
    params = {'objective': 'binary', 'learning_rate': 0.1, 'verbosity': -1, 'num_threads': threads, 'deterministic': True, 'seed': SEED}
    data = lgb.Dataset(plan.frame(learn)[:, columns], learn[target], categorical_feature=[columns.index(i) for i in plan.categorical])
    margins = {PLAIN: lgb.train(params, data, 100).predict(features[:, columns], raw_score=True)}

    write_features(folder / 'features.parquet', plan, contract, [learn])
    prepared = prepare_dataset(folder / 'features.parquet', plan, target, folder / 'features.bin', threads)
    inner = cv_folds(prepared.target, contract.cv | {'seed': SEED})
    found = search(prepared, inner, n_trials=trials, seed=SEED, threads=threads, report=lambda trial: print(f'  {trial}', file=sys.stderr))
    start = default_params(len(prepared.target), len(prepared.names))
    for name, model in [(DEFAULT, train(prepared, inner, start, cv=None if found.chosen else found.cv, seed=SEED, threads=threads)),
                        (SEARCH, train(prepared, inner, found.params, cv=found.cv, seed=SEED, threads=threads))]:
        margins[name] = lgb.Booster(model_str=model.model_text).predict(features, raw_score=True, num_threads=threads)
    return margins, found.chosen


def show(target: npt.NDArray[np.float64], folds: Folds, margins: dict[str, npt.NDArray[np.float64]]) -> None:
    "The table."
    print(f'{"model":28}{"AUC":>8}{"95% interval":>20}{"mean of folds":>15}{"over plain":>12}{"95% interval":>22}')
    for name, values in margins.items():
        area, gain = auc_interval(target, values), auc_difference(target, values, margins[PLAIN])
        mean = np.mean([auc(target[check], values[check]) for _, check in folds])
        paired = f'{gain.value:>+12.4f}{f"{gain.low:+.4f} to {gain.high:+.4f}":>22}' if name != PLAIN else ''
        print(f'{name:28}{area.value:8.4f}{f"{area.low:.4f} to {area.high:.4f}":>20}{mean:15.4f}{paired}')


def main() -> None:
    "Reads, scores five folds, prints."
    env = yaml.safe_load((ROOT / 'env.home_credit.yaml').read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, default=env['n_trials'], help='of each search (default: as in env.home_credit.yaml)')
    parser.add_argument('--threads', type=int, default=env['threads'])
    args = parser.parse_args()
    if 'RISKSCORE_DATA' not in os.environ:
        sys.exit(f'Set RISKSCORE_DATA to the folder that holds {env["data_path"]}.')
    contract, begin = load_contract(ROOT / env['contract']), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        frame = read_all(contract, Path(os.environ['RISKSCORE_DATA']) / env['data_path'], Path(folder))
        target = frame[contract.target.name]
        folds, margins, kept = cv_folds(target, {'by': 'stratified', 'folds': 5, 'seed': SEED}), {}, []
        for i, (learn, check) in enumerate(folds, start=1):
            print(f'outer fold {i} of {len(folds)}, {time.perf_counter() - begin:.0f} s', file=sys.stderr)
            scored, chosen = score_fold(contract, take(frame, learn), take(frame, check), Path(folder), args.trials, args.threads)
            kept.append(chosen)
            for name, values in scored.items():
                margins.setdefault(name, np.empty(len(target)))[check] = values
    print(f'{len(target):,} rows, {int(target.sum()):,} bad; {args.trials} trials a search, which kept the default in {kept.count(0)} of 5 folds; '
          f'{time.perf_counter() - begin:.0f} s')
    show(target, folds, margins)


if __name__ == '__main__':
    main()
