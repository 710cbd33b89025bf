"""Streaming batch scoring against predict on a matrix in memory, and against the usual pandas and scikit-learn pipeline.

    python benchmarks/batch.py --rows 100000 --threads 1

All paths run in turn, several times, in one process, with the same number of trees, leaves and model threads; medians are shown.
`share` is the rate as a share of predict's. Reading, checking and features run in a thread beside the model: with a processor to spare
they cost hardly any time. Where every processor is given to the model, or is busy with something else, they compete with it, and
`cpu us`, the processor time for a row, says what remains: its ratio is the share to expect then.
"""
import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import lightgbm as lgb
import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder

import riskscore.feature_sets  # noqa: F401  # the features that the contract names
from riskscore.batch import score_batch
from riskscore.bundle import Scorer, load_bundle, write_bundle
from riskscore.calibration import Calibration
from riskscore.contract import load_contract
from riskscore.datasets import read_frames
from riskscore.features import fit_plan
from riskscore.policy import fit_policy
from riskscore.synthetic import write_home_credit
from riskscore.trees import Trees

CONTRACT = Path(__file__).parents[1] / 'data' / 'contracts' / 'home_credit.yaml'
MODEL = {'num_leaves': 63, 'learning_rate': 0.05, 'verbosity': -1}
TREES, HISTORY = 300, 20_000


def make_scorer(history: Path, folder: Path) -> Scorer:
    "A bundle trained on the history."
    contract = load_contract(CONTRACT)
    frames = [batch.frame for batch in read_frames(history, contract)]
    plan = fit_plan(contract, frames)
    bad = np.concatenate([f[contract.target.name] for f in frames])
    data = lgb.Dataset(np.concatenate([plan.frame(f) for f in frames]), bad, categorical_feature=plan.categorical, params=MODEL)
    booster = lgb.train(MODEL | {'objective': 'binary'}, data, TREES)
    amount = np.concatenate([f[contract.amount] for f in frames])
    policy = fit_policy(contract, np.full(len(amount), bad.mean()), amount)
    return load_bundle(write_bundle(folder / 'models', Trees('lightgbm', booster.model_to_string()), plan, Calibration(0.0, 1.0), policy, contract, {}, {}))


def make_usual(history: Path, target: str, threads: int) -> Pipeline:
    "The pipeline that most tutorials show."
    table = pd.read_csv(history)
    text = table.select_dtypes(exclude='number').columns.tolist()
    encode = ColumnTransformer([('text', OneHotEncoder(handle_unknown='ignore', sparse_output=False), text)], remainder='passthrough')
    model = lgb.LGBMClassifier(n_estimators=TREES, n_jobs=threads, **MODEL)
    return make_pipeline(encode, model).fit(table.drop(columns=target), table[target])


def score_usual(pipeline: Pipeline, target: str, source: Path, out: Path) -> None:
    "Read, predict, write, each with the whole table in memory."
    table = pd.read_csv(source)
    default = pipeline.predict_proba(table.drop(columns=target))[:, 1]
    pd.DataFrame({'SK_ID_CURR': table['SK_ID_CURR'], 'pd': default}).to_csv(out, index=False)


def measured(paths: dict[str, Callable[[], object]], repeat: int) -> dict[str, tuple[float, float]]:
    "Seconds and processor seconds of each path, medians over rounds in which each runs once."
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for _ in range(repeat):
        for name, run in paths.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: (median(w for w, _ in times), median(p for _, p in times)) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=100_000)
    parser.add_argument('--threads', type=int, default=1, help='of the model, in all paths')
    parser.add_argument('--repeat', type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings('ignore', message='X does not have valid feature names')
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_home_credit(folder / 'history.csv', HISTORY, seed=1)
        for end in ('csv', 'parquet'):
            write_home_credit(folder / f'applications.{end}', args.rows, seed=2)
        scorer = make_scorer(folder / 'history.csv', folder)
        target = scorer.contract.target.name
        usual = make_usual(folder / 'history.csv', target, args.threads)
        matrix = np.concatenate([scorer.plan.frame(b.frame) for b in read_frames(folder / 'applications.parquet', scorer.contract)])
        parquet, text, out = folder / 'applications.parquet', folder / 'applications.csv', folder / 'out'
        times = measured({
            'predict on a ready matrix in memory': lambda: scorer.predictor.booster.predict(matrix, num_threads=args.threads),
            'score_batch, Parquet to Parquet': lambda: score_batch(parquet, scorer, out.with_suffix('.parquet'), args.threads),
            'score_batch, CSV to CSV': lambda: score_batch(text, scorer, out.with_suffix('.csv'), args.threads),
            'pandas + one-hot pipeline, CSV to CSV': lambda: score_usual(usual, target, text, out),
        }, args.repeat)
    show(times, f'{args.rows:,} applications, {matrix.shape[1]} features, {TREES} trees of {MODEL["num_leaves"]} leaves, '
                f'{args.threads} model thread(s), {os.cpu_count()} processors, medians of {args.repeat}', args.rows)


def show(times: dict[str, tuple[float, float]], title: str, rows: int) -> None:
    "Prints the table; the first path is the reference."
    print(f'{title}\n{"path":40s}{"rows/s":>10s}{"share":>8s}{"us/row":>8s}{"cpu us":>8s}')
    reference = next(iter(times.values()))[0]
    for path, (wall, processor) in times.items():
        print(f'{path:40s}{rows / wall:10,.0f}{reference / wall:8.0%}{wall / rows * 1e6:8.1f}{processor / rows * 1e6:8.1f}')


if __name__ == '__main__':
    main()
