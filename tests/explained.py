"""Bundles with reasons and recourse: a LightGBM of any data set, trained on its first rows, with the applications that it has not seen."""
from dataclasses import dataclass
from pathlib import Path

import lightgbm as lgb
import numpy as np

import riskscore.feature_sets  # noqa: F401  # declares the sets that contracts ask for
from riskscore.bundle import Scorer, load_bundle, write_bundle
from riskscore.calibration import fit_calibration
from riskscore.contract import Contract
from riskscore.core import Frame
from riskscore.datasets import read_frames
from riskscore.features import fit_plan
from riskscore.policy import fit_policy
from riskscore.reasons import fit_reasons
from riskscore.recourse import fit_recourse
from riskscore.trees import Trees


@dataclass(frozen=True)
class Explained:
    "A bundle and who it was not trained on."
    scorer: Scorer
    history: Frame
    future: Frame

    def by_decision(self, decision: str, of: str = 'future', by_rule: bool = False) -> Frame:
        "Applications with a decision of the model, or of its rules."
        typed = getattr(self, of)
        answer = self.scorer.frame(typed)
        fired = np.array([name is not None for name in answer['knockout']])
        return take(typed, (answer['decision'] == decision) & (fired == by_rule))


def take(frame: Frame, rows) -> Frame:
    "Some rows of a frame."
    return {name: values[rows] for name, values in frame.items()}


def one(frame: Frame, row: int) -> dict:
    "One application, as check_record gives it."
    return {name: values[row] for name, values in frame.items()}


def explained(folder: Path, source: Path, contract: Contract, rows: int = 8000, trees: int = 80) -> Explained:
    "Trains on three quarters of the rows, and explains the rest."
    parts = []
    for batch in read_frames(source, contract, batch_rows=rows):
        parts.append(take(batch.frame, ~batch.bad_rows))
        break
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(len(parts[0][contract.target.name]))
    learn, check = np.split(shuffled, [3 * len(shuffled) // 4])
    history, future = take(parts[0], learn), take(parts[0], check)
    plan = fit_plan(contract, [history])
    features, bad = plan.frame(history), history[contract.target.name]
    half = len(bad) // 2

    def fit(part):
        data = lgb.Dataset(features[part], bad[part], categorical_feature=plan.categorical, params={'verbosity': -1})
        settings = {'objective': 'binary', 'learning_rate': 0.06, 'num_leaves': 15, 'min_data_in_leaf': 50, 'feature_fraction': 0.3, 'lambda_l2': 10,
                    'cat_smooth': 50, 'verbosity': -1, 'num_threads': 1, 'seed': 1}
        return Trees('lightgbm', lgb.train(settings, data, trees).model_to_string())

    model, unseen = fit(slice(None)), fit(slice(half)).margin(features[half:])
    calibration = fit_calibration(unseen, bad[half:])
    policy = fit_policy(contract, calibration.pd(unseen), history[contract.amount][half:])
    approved = features[policy.decide(calibration.pd(model.margin(features)), history) == 'approve'][:4000]
    reasons = fit_reasons(contract, plan, approved, model.contributions(approved))
    path = write_bundle(folder, model, plan, calibration, policy, contract, {}, {}, reasons, fit_recourse(contract, history).to_dict())
    return Explained(load_bundle(path), history, future)
