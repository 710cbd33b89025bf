"""What training costs: a Dataset for each trial of a search, and peak memory against scikit-learn's one-hot pipeline.

    python benchmarks/training.py [--rows 307511] [--trees 50] [--threads 2] [--folder /tmp/training-benchmark]

Synthetic Home Credit, ingested once to typed Parquet, which is where all candidates start; each is a fresh process. First table:
seconds until LightGBM has a Dataset that it can train on, medians of three; the binary file is made once for a whole search, which
is shown apart. Second table: peak resident memory and seconds from the typed table to a model of so many trees, with the same
leaves, learning rate and threads. Ours is measured twice: one fit, which is what the pipeline of scikit-learn does, and all that
the train task does: five folds in step, margins out of fold, final fit.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = ROOT / 'data' / 'contracts' / 'home_credit.yaml'
MODEL = {'num_leaves': 31, 'learning_rate': 0.05}
DATASETS = PANDAS, MATRIX, BINARY = 'pandas frame with categories', 'float32 matrix in memory', 'binary file'
FITS = ONE_HOT, ONE_FIT, ALL = 'scikit-learn one-hot + LGBMClassifier', 'riskscore, one fit', 'riskscore, five folds, margins, fit'


def make_table(folder: Path, rows: int) -> None:
    "The typed table, the features file and the binary file."
    import riskscore.feature_sets  # noqa: F401
    from riskscore.contract import load_contract
    from riskscore.ingest import ingest
    from riskscore.synthetic import write_home_credit
    write_home_credit(folder / 'raw.parquet', rows)
    ingest(folder / 'raw.parquet', load_contract(CONTRACT), folder / 'table.parquet')


def prepare(folder: Path, threads: int) -> Any:
    "Our way from the typed table to binned features."
    import riskscore.feature_sets  # noqa: F401
    from riskscore.contract import load_contract
    from riskscore.datasets import read_table
    from riskscore.features import fit_plan
    from riskscore.matrix import prepare_dataset, write_features
    contract, table = load_contract(CONTRACT), folder / 'table.parquet'
    plan = fit_plan(contract, read_table(table, contract))
    write_features(folder / 'features.parquet', plan, contract, read_table(table, contract))
    begin = time.perf_counter()
    prepared = prepare_dataset(folder / 'features.parquet', plan, contract.target.name, folder / 'features.bin', threads)
    (folder / 'build.json').write_text(json.dumps([time.perf_counter() - begin, plan.categorical]))
    return prepared


def source(name: str, folder: Path) -> dict[str, Any]:
    "What a Dataset is made from, in memory."
    if name == BINARY:
        return {'data': folder / 'features.bin'}
    import numpy as np
    import pandas as pd
    frame = pd.read_parquet(folder / 'features.parquet').drop(columns='SK_ID_CURR')
    target, categorical = frame.pop('TARGET').to_numpy(), json.loads((folder / 'build.json').read_text())[1]
    if name == MATRIX:
        return {'data': frame.to_numpy(np.float32), 'label': target, 'categorical_feature': categorical}
    names = frame.columns[categorical]
    return {'data': frame.astype(dict.fromkeys(names, 'Int64')).astype(dict.fromkeys(names, 'category')), 'label': target}


def time_dataset(name: str, folder: Path, threads: int) -> float:
    "Median seconds to a Dataset."
    import lightgbm as lgb

    from riskscore.matrix import DATASET_PARAMS
    given, seconds = source(name, folder), []
    for _ in range(3):
        begin = time.perf_counter()
        lgb.Dataset(**given, params={**DATASET_PARAMS, 'num_threads': threads}).construct()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def fit_usual(folder: Path, trees: int, threads: int) -> None:
    "The pipeline that most tutorials show."
    import lightgbm as lgb
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder
    table = pd.read_parquet(folder / 'table.parquet')
    target = table.pop('TARGET')
    text = table.select_dtypes(exclude='number').columns.tolist()
    encode = ColumnTransformer([('text', OneHotEncoder(handle_unknown='ignore', sparse_output=False), text)], remainder='passthrough')
    make_pipeline(encode, lgb.LGBMClassifier(n_estimators=trees, n_jobs=threads, verbosity=-1, **MODEL)).fit(table, target)


def fit_ours(folder: Path, trees: int, threads: int, folds: int) -> None:
    "From the typed table to model text, streaming; without folds only the final fit."
    import numpy as np

    from riskscore.boosting import LightGBM
    from riskscore.models import EVERY, CrossValidation, cross_validate, train
    from riskscore.split import cv_folds
    prepared = prepare(folder, threads)
    parts = cv_folds(prepared.target, {'folds': folds}) if folds else []
    without = CrossValidation(trees, np.empty((trees // EVERY, 0)), np.empty(0))
    cv = cross_validate(LightGBM(), prepared, parts, MODEL, max_rounds=trees, threads=threads) if folds else without
    train(LightGBM(), prepared, parts, MODEL, cv=cv, threads=threads)


def work(name: str, folder: Path, trees: int, threads: int) -> None:
    "One measurement; prints seconds and peak megabytes."
    begin = time.perf_counter()
    if name in DATASETS:
        seconds = time_dataset(name, folder, threads)
    else:
        fit_usual(folder, trees, threads) if name == ONE_HOT else fit_ours(folder, trees, threads, folds=5 if name == ALL else 0)
        seconds = time.perf_counter() - begin
    peak = next(line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    print(json.dumps([seconds, int(peak) / 1024]))


def measure(name: str, args: argparse.Namespace) -> tuple[float, float]:
    "Seconds and peak megabytes of a fresh process."
    print(f'{name} ...', file=sys.stderr)
    options = {'work': name, 'folder': args.folder, 'trees': args.trees, 'threads': args.threads}
    command = [sys.executable, __file__, *(f'--{key}={value}' for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'{name} failed:\n{done.stderr}')
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def run(args: argparse.Namespace) -> None:
    "Makes the table and prints both comparisons."
    print('synthetic table ...', file=sys.stderr)
    make_table(args.folder, args.rows)
    fits = {name: measure(name, args) for name in FITS}
    datasets = {name: measure(name, args) for name in DATASETS}
    once = json.loads((args.folder / 'build.json').read_text())[0]
    print(f'{args.rows:,} rows, {args.threads} thread(s), {os.cpu_count()} processors')
    print(f'\n{"Dataset for a trial":42}{"seconds":>9}{"pandas = 1":>12}')
    for name, (seconds, _) in datasets.items():
        print(f'{name:42}{seconds:9.3f}{seconds / datasets[PANDAS][0]:12.3f}')
    print(f'{"(binary file, made once, streaming)":42}{once:9.3f}')
    print(f'\n{f"training, {args.trees} trees":42}{"seconds":>9}{"peak MB":>12}{"one-hot = 1":>13}')
    for name, (seconds, peak) in fits.items():
        print(f'{name:42}{seconds:9.1f}{peak:12,.0f}{peak / fits[ONE_HOT][1]:13.2f}')


def main() -> None:
    "Measures, or does the work of one measurement."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=307_511)
    parser.add_argument('--trees', type=int, default=50)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--work', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work, args.folder, args.trees, args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        run(args)


if __name__ == '__main__':
    main()
