"""What a trial of the search costs beyond LightGBM's own training.

    python benchmarks/hpo.py [--trials 8] [--rows 30000] [--threads 1]

Synthetic Home Credit, five folds. Each trial of the search is timed as a whole: drawing parameters, preparing folds, growing, looking, reporting to the
study, pruning, scoring, writing the trial to SQLite. Then the same parameters are trained again for as many rounds by plain LightGBM: the same five
binned folds, ready in memory, `Booster.update` and, every 25 trees, LightGBM's own AUC of the rows left out (`eval_valid`). Trial and replay alternate, so
that a slow moment of the machine hits both. The ratio of the sums, and the median of the ratios, say what the search adds.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import lightgbm as lgb
import numpy as np

import riskscore.feature_sets  # noqa: F401  # the features that the contract names
from riskscore.boosting import LightGBM
from riskscore.contract import load_contract
from riskscore.datasets import read_table
from riskscore.features import fit_plan
from riskscore.ingest import ingest
from riskscore.matrix import DATASET_PARAMS, Prepared, prepare_dataset, write_features
from riskscore.models import EVERY
from riskscore.monotone import constrain
from riskscore.split import Folds, cv_folds
from riskscore.synthetic import write_home_credit
from riskscore.tuning import Trial, search

ROOT = Path(__file__).resolve().parents[1]
SEED = 42
Parts = list[tuple[lgb.Dataset, lgb.Dataset]]


def prepare(folder: Path, rows: int, threads: int) -> Prepared:
    "Binned features of a synthetic table."
    contract = load_contract(ROOT / 'data/contracts/home_credit.yaml')
    write_home_credit(folder / 'raw.parquet', rows)
    ingest(folder / 'raw.parquet', contract, folder / 'table.parquet')
    found = constrain(contract, fit_plan(contract, read_table(folder / 'table.parquet', contract)))
    write_features(folder / 'features.parquet', found.plan, contract, read_table(folder / 'table.parquet', contract))
    return prepare_dataset(folder / 'features.parquet', found.plan, contract.target.name, folder / 'features.bin', threads, found.directions)


def pure_seconds(data: Prepared, parts: Parts, params: dict, rounds: int, threads: int) -> float:
    "LightGBM alone: the same trees in the same folds, its own AUC every 25 trees."
    settings = {'objective': 'binary', 'metric': 'auc', 'deterministic': True, 'force_row_wise': True, 'seed': SEED, 'num_threads': threads,
                'monotone_constraints': list(data.directions), **DATASET_PARAMS, **params}
    begin = time.perf_counter()
    for learn, check in parts:
        booster = lgb.Booster(settings, learn).add_valid(check, 'check')
        for i in range(1, rounds + 1):
            booster.update()
            if i % EVERY == 0:
                booster.eval_valid()
    return time.perf_counter() - begin


def measure(data: Prepared, folds: Folds, folder: Path, trials: int, threads: int) -> list[tuple[Trial, float, float]]:
    "Each trial, its seconds and those of LightGBM alone."
    whole = data.open(threads)
    parts = [tuple(whole.subset(rows.tolist(), DATASET_PARAMS).construct() for rows in fold) for fold in folds]
    defaults, found = LightGBM().defaults(len(data.target), len(data.names)), []
    clock = [time.perf_counter()]

    def close(trial: Trial) -> None:
        seconds = time.perf_counter() - clock[0]
        grown = grown_rounds(trial)
        found.append((trial, seconds, pure_seconds(data, parts, defaults | trial.params, grown, threads)))
        print(f'  trial {trial.number} {trial.state}: {grown} rounds, {seconds:.1f} s, LightGBM alone {found[-1][2]:.1f} s', file=sys.stderr)
        clock[0] = time.perf_counter()

    search(LightGBM(), data, folds, n_trials=trials, study=folder / 'study.db', seed=SEED, threads=threads, report=close)
    return found


def grown_rounds(trial: Trial) -> int:
    "How far a trial grew: to its best look and four more, or to where it was pruned."
    return trial.rounds + 4 * EVERY if trial.state == 'complete' else trial.rounds


def main() -> None:
    "Measures and prints."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, default=8)
    parser.add_argument('--rows', type=int, default=30_000)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = prepare(folder, args.rows, args.threads)
        rows = measure(data, cv_folds(data.target, {'folds': 5, 'seed': SEED}), folder, args.trials, args.threads)
    print(f'{args.rows:,} rows, {len(data.names)} features, 5 folds, {args.threads} thread(s)')
    print(f'{"trial":>6}{"state":>10}{"rounds":>8}{"trial s":>10}{"LightGBM alone s":>18}{"ratio":>8}')
    for trial, seconds, pure in rows:
        print(f'{trial.number:6}{trial.state:>10}{grown_rounds(trial):8}{seconds:10.2f}{pure:18.2f}{seconds / pure:8.3f}')
    total, alone = np.sum([[seconds, pure] for _, seconds, pure in rows], axis=0)
    print(f'all trials: {total:.1f} s, LightGBM alone {alone:.1f} s, ratio {total / alone:.3f}; median of the ratios {median(s / p for _, s, p in rows):.3f}')


if __name__ == '__main__':
    main()
