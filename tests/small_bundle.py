"""A small contract with every kind and role, tables that fit it, and a trained bundle of it."""
from pathlib import Path

import lightgbm as lgb
import numpy as np

from riskscore.bundle import Scorer, load_bundle, write_bundle, write_pointer
from riskscore.calibration import Calibration
from riskscore.contract import Contract, check_frame, parse_contract
from riskscore.features import fit_plan
from riskscore.policy import Policy
from riskscore.reasons import fit_reasons
from riskscore.trees import Trees

VALUE = {'approve': {'good': 0.1, 'bad': -0.5}, 'refer': {'good': 0.05, 'bad': -0.1, 'fixed': -1.0}, 'decline': {'good': 0.0, 'bad': 0.0}}
COLUMNS = {
    'app': {'kind': 'category', 'role': 'id'},
    'asked_on': {'kind': 'date', 'role': 'time'},
    'amount': {'kind': 'number', 'hard': [0, None], 'range': [100, 1000], 'null': False},
    'income': {'kind': 'number', 'range': [0, 5000]},
    'tenure': {'kind': 'integer', 'special': [999]},
    'job': {'kind': 'category', 'levels': ['clerk', 'nurse', 'pilot']},
    'channel': {'kind': 'category', 'levels': ['web', 'shop'], 'closed': True},
    'owner': {'kind': 'flag', 'levels': ['N', 'Y']},
    'sex': {'kind': 'category', 'role': 'protected'},
    'arrears': {'kind': 'number', 'role': 'leak'},
    'bad': {'kind': 'flag', 'role': 'target', 'bad': '1'},
}


def small_contract(**changes) -> Contract:
    "The contract; named columns may be given other settings."
    columns = {name: settings | changes.get(name, {}) for name, settings in COLUMNS.items()}
    derived = {'burden': 'amount / income', 'nurse': "job == 'nurse'", 'month': 'month(asked_on)', 'no_tenure': 'isnull(tenure)'}
    return parse_contract({'name': 'small', 'currency': 'EUR', 'amount': 'amount', 'value': VALUE, 'rare': {'min_count': 5},
                           'columns': columns, 'derived': derived})


def applications(rows: int, seed: int = 0, target: bool = True) -> dict[str, list]:
    "Raw applications as they stand in a file, with nulls and special codes."
    rng = np.random.default_rng(seed)

    def some(values, null):
        return [None if n else v for v, n in zip(values, rng.random(rows) < null, strict=True)]

    income = rng.uniform(10, 5000, rows).round(2)
    raw = {
        'app': [f'A{i:06d}' for i in range(1, rows + 1)],
        'asked_on': [f'2026-{m:02d}-{d:02d}' for m, d in zip(rng.integers(1, 13, rows), rng.integers(1, 29, rows), strict=True)],
        'amount': rng.uniform(100, 1000, rows).round(2).tolist(),
        'income': some(income.tolist(), 0.1),
        'tenure': [999 if r < 0.1 else int(t) for r, t in zip(rng.random(rows), rng.integers(0, 40, rows), strict=True)],
        'job': some(rng.choice(['clerk', 'nurse', 'pilot'], rows).tolist(), 0.05),
        'channel': rng.choice(['web', 'shop'], rows).tolist(),
        'owner': some(rng.choice(['N', 'Y'], rows).tolist(), 0.02),
        'sex': rng.choice(['F', 'M'], rows).tolist(),
        'arrears': rng.uniform(0, 10, rows).round(1).tolist(),
    }
    bad = rng.random(rows) < np.where(income < 1500, 0.6, 0.1)
    return raw | ({'bad': bad.astype(int).tolist()} if target else {})


def small_bundle(folder: Path, trees: int = 20, contract: Contract | None = None, explains: bool = False, pointer: str = 'champion.json') -> Path:
    "Trains a bundle below `folder`/models, points `folder`/champion.json to it, and gives its directory."
    contract = contract or small_contract()
    typed = check_frame(contract, applications(600)).frame
    plan = fit_plan(contract, [typed])
    data = lgb.Dataset(plan.frame(typed), typed['bad'], categorical_feature=plan.categorical, params={'verbosity': -1})
    booster = lgb.train({'objective': 'binary', 'num_leaves': 7, 'verbosity': -1, 'num_threads': 1, 'seed': 1}, data, trees)
    policy = Policy(0.2, 0.5, contract.value, contract.currency, contract.amount)
    model, features = Trees('lightgbm', booster.model_to_string()), plan.frame(typed)
    reasons = fit_reasons(contract, plan, features, model.contributions(features)) if explains else None
    path = write_bundle(folder / 'models', model, plan, Calibration(-0.1, 1.1), policy, contract, {'rows': 600}, {'seconds': 0.5}, reasons)
    write_pointer(folder / pointer, path)
    return path


def small_scorer(folder: Path) -> Scorer:
    "The bundle, loaded."
    return load_bundle(small_bundle(folder))
