"""Out-of-fold AUC and calibration on the real Home Credit sample: plain LightGBM, each of our families, and the champion that is chosen.

    RISKSCORE_DATA=../shared/data python benchmarks/auc.py [--candidates lightgbm,logistic] [--trials 8] [--threads 2]

All rows, stratified 5-fold, seed 42 throughout. Everything is nested: inside each outer training fold the feature plan is fitted and bound to the
contract's directions, inner folds are made, the candidates are compared on them, the winner is searched, numbers of rounds are chosen, models are
fitted and the calibration is learnt from inner margins out of fold; the outer fold is only predicted. Plain LightGBM is 100 trees at a learning
rate of 0.1, everything else as the library has it, on the columns of the contract and four ratios; it sees the same rows, folds and categories.
Intervals and paired differences are DeLong's, 95%, over the pooled predictions of all five folds (their calibrated log-odds; plain: its margins).
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
from riskscore.calibration import fit_calibration
from riskscore.candidates import compare, load_candidates
from riskscore.contract import Contract, load_contract
from riskscore.core import Frame
from riskscore.datasets import read_table
from riskscore.features import fit_plan
from riskscore.ingest import ingest
from riskscore.matrix import prepare_dataset, write_features
from riskscore.metrics import jeffreys_interval, metric_set
from riskscore.monotone import constrain
from riskscore.ranking import auc, auc_difference, auc_interval
from riskscore.reliability import calibration_table
from riskscore.split import Folds, cv_folds

ROOT = Path(__file__).resolve().parents[1]
RATIOS = ['credit_to_income', 'annuity_to_income', 'term', 'employed_share']
PLAIN, CHAMPION = 'plain LightGBM', 'ours: the champion'
SEED = 42
Scores = dict[str, npt.NDArray[np.float64]]


def read_all(contract: Contract, source: Path, folder: Path) -> Frame:
    "The whole table, typed."
    ingest(source, contract, folder / 'table.parquet')
    blocks = list(read_table(folder / 'table.parquet', contract))
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def take(frame: Frame, rows: npt.NDArray[np.int64]) -> Frame:
    "Some rows of a frame."
    return {name: values[rows] for name, values in frame.items()}


def plain_scores(contract: Contract, learn: Frame, check: Frame, threads: int) -> npt.NDArray[np.float64]:
    "Margins of the usual first model."
    plan, target = fit_plan(contract, [learn]), contract.target.name
    columns = [i for i, name in enumerate(plan.names) if name in contract.columns or name in RATIOS]
    params = {'objective': 'binary', 'learning_rate': 0.1, 'verbosity': -1, 'num_threads': threads, 'deterministic': True, 'seed': SEED}
    data = lgb.Dataset(plan.frame(learn)[:, columns], learn[target], categorical_feature=[columns.index(i) for i in plan.categorical])
    return np.asarray(lgb.train(params, data, 100).predict(plan.frame(check)[:, columns], raw_score=True))


def our_scores(contract: Contract, learn: Frame, check: Frame, folder: Path, args: Any) -> tuple[Scores, str]:
    "Calibrated log-odds of each candidate for one outer fold, learnt from its training rows only; and what the champion was."
    found = constrain(contract, fit_plan(contract, [learn]))
    write_features(folder / 'features.parquet', found.plan, contract, [learn])
    data = prepare_dataset(folder / 'features.parquet', found.plan, contract.target.name, folder / 'features.bin', args.threads, found.directions)
    inner, features = cv_folds(data.target, contract.cv | {'seed': SEED}), found.plan.frame(check)
    wishes = load_candidates(ROOT / 'data/candidates', args.candidates)
    begin = time.perf_counter()
    entries = compare(wishes, data, inner, n_trials=args.trials, seed=SEED, threads=args.threads,
                      report=lambda what: print(f'  {what}, {time.perf_counter() - begin:.0f} s', file=sys.stderr))
    scores = {}
    for entry in entries:
        line = fit_calibration(entry.cv.margins, data.target)
        scores[entry.candidate.name] = line.intercept + line.slope * entry.predictor.margin(features, args.threads)
    best = entries[0]
    return scores | {CHAMPION: scores[best.candidate.name]}, f'{best.candidate.name}{" tuned" if best.chosen else ""}'


def show(target: npt.NDArray[np.float64], folds: Folds, scores: Scores) -> None:
    "The table of AUCs."
    print(f'{"model":22}{"AUC":>8}{"95% interval":>20}{"mean of folds":>15}{"over plain":>12}{"95% interval":>22}{"champion over it":>18}{"95% interval":>22}')
    for name, values in sorted(scores.items(), key=lambda item: -auc(target, item[1])):
        area = auc_interval(target, values)
        cells = [f'{name:22}{area.value:8.4f}{f"{area.low:.4f} to {area.high:.4f}":>20}{np.mean([auc(target[c], values[c]) for _, c in folds]):15.4f}']
        for other, gap, width in ((PLAIN, auc_difference(target, values, scores[PLAIN]), 12), (CHAMPION, auc_difference(target, scores[CHAMPION], values), 18)):
            cells.append(f'{gap.value:>+{width}.4f}{f"{gap.low:+.4f} to {gap.high:+.4f}":>22}' if name != other else ' ' * (width + 22))
        print(''.join(cells).rstrip())


def show_calibration(target: npt.NDArray[np.float64], scores: Scores) -> None:
    "Whether the champion's probabilities mean what they say, by tenths."
    pd = 1 / (1 + np.exp(-scores[CHAMPION]))
    found, table = metric_set(target, pd), calibration_table(target, pd, interval=jeffreys_interval)
    slope, shift = ([found[f'calibration_{name}{end}'] for end in ('', '_low', '_high')] for name in ('slope', 'intercept'))
    print(f'\nCalibration of the champion: slope {slope[0]:.3f} ({slope[1]:.3f} to {slope[2]:.3f}), '
          f'intercept {shift[0]:+.3f} ({shift[1]:+.3f} to {shift[2]:+.3f}), '
          f'ECE {found["ece"]:.4f}, by chance {found["ece_noise"]:.4f}')
    print(f'{"tenth":>6}{"mean pd":>10}{"bad rate":>10}{"Jeffreys 95%":>20}')
    for row in zip(*(table[name] for name in ('bin', 'pd', 'bad_rate', 'low', 'high', 'inside')), strict=True):
        print(f'{row[0]:6}{row[1]:10.4f}{row[2]:10.4f}{f"{row[3]:.4f} to {row[4]:.4f}":>20}{"" if row[5] else "  outside"}')


def main() -> None:
    "Reads, scores five folds, prints."
    env = yaml.safe_load((ROOT / 'env.home_credit.yaml').read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--candidates', default=env['candidates'], help='files of data/candidates, with commas (default: as in env.home_credit.yaml)')
    parser.add_argument('--trials', type=int, default=env['n_trials'], help='of each search (default: as in env.home_credit.yaml)')
    parser.add_argument('--threads', type=int, default=env['threads'])
    args = parser.parse_args()
    if 'RISKSCORE_DATA' not in os.environ:
        sys.exit(f'Set RISKSCORE_DATA to the folder that holds {env["data_path"]}.')
    contract, begin = load_contract(ROOT / env['contract']), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        frame = read_all(contract, Path(os.environ['RISKSCORE_DATA']) / env['data_path'], Path(folder))
        target = frame[contract.target.name]
        folds, scores, chosen = cv_folds(target, {'by': 'stratified', 'folds': 5, 'seed': SEED}), {}, []
        for i, (learn, check) in enumerate(folds, start=1):
            print(f'outer fold {i} of {len(folds)}, {time.perf_counter() - begin:.0f} s', file=sys.stderr)
            rows, unseen = take(frame, learn), take(frame, check)
            ours, best = our_scores(contract, rows, unseen, Path(folder), args)
            chosen.append(best)
            for name, values in (ours | {PLAIN: plain_scores(contract, rows, unseen, args.threads)}).items():
                scores.setdefault(name, np.empty(len(target)))[check] = values
    print(f'{len(target):,} rows, {int(target.sum()):,} bad; {args.trials} trials of the winner in each fold; champions: {", ".join(chosen)}; '
          f'{time.perf_counter() - begin:.0f} s')
    show(target, folds, scores)
    show_calibration(target, scores)


if __name__ == '__main__':
    main()
