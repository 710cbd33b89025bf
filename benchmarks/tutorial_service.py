"""The scoring service of the usual tutorial, written with care: what benchmarks/api.py and benchmarks/record.py compare with.

    python benchmarks/tutorial_service.py history.csv.gz TARGET --trees 600 --leaves 8 --port 8001

FastAPI, a pydantic model of the application, a DataFrame of one row, a scikit-learn pipeline (features, impute, one-hot, LightGBM with one thread), a
`def` endpoint, one uvicorn worker (uvloop and httptools). /predict answers with the pd and a decision; /predict_explain adds the four features that
weigh most by shap.TreeExplainer; /predict_plain asks a second pipeline that has the columns of the table alone. It keeps no log. The pipelines are
fitted when the process begins, so that nothing has to be unpickled.

A model that decides by engineered features needs them computed for each application. `engineered` computes those of Home Credit as a notebook does,
and in the quick way: whole columns, one assignment, nothing by `apply` or `eval`. benchmarks/record.py holds its values against the feature plan's.
"""
import argparse
import logging
from typing import Any

import lightgbm as lgb
import numpy as np
import pandas as pd
import pydantic
import shap
import uvicorn
from fastapi import FastAPI
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder

RATE = 0.05


def engineered(table: pd.DataFrame) -> pd.DataFrame:
    "The table of Home Credit with the features that the other service's model has."
    if 'EXT_SOURCE_1' not in table:
        return table
    age, job = table['DAYS_BIRTH'], table['DAYS_EMPLOYED'].where(table['DAYS_EMPLOYED'] != 365243)
    credit, annuity, income, goods = table['AMT_CREDIT'], table['AMT_ANNUITY'], table['AMT_INCOME_TOTAL'], table['AMT_GOODS_PRICE']
    family, phone = table['CNT_FAM_MEMBERS'], table['DAYS_LAST_PHONE_CHANGE']
    ext = table[['EXT_SOURCE_1', 'EXT_SOURCE_2', 'EXT_SOURCE_3']]
    mean, filled, null = ext.mean(axis=1), ext.fillna(0.5), ext.isna()
    seen = table['OBS_30_CNT_SOCIAL_CIRCLE']
    enquiries = table[[f'AMT_REQ_CREDIT_BUREAU_{span}' for span in ('HOUR', 'DAY', 'WEEK', 'MON', 'QRT', 'YEAR')]]
    term, surcharge = credit / annuity, credit / goods
    features = {
        'credit_to_income': credit / income, 'annuity_to_income': annuity / income, 'term': term, 'credit_to_goods': surcharge,
        'credit_less_goods': credit - goods, 'goods_to_income': goods / income, 'goods_to_annuity': goods / annuity, 'employed_share': job / age,
        'age_when_employed': job - age, 'registration_share': table['DAYS_REGISTRATION'] / age, 'document_share': table['DAYS_ID_PUBLISH'] / age,
        'phone_share': phone / age, 'phone_to_employed': phone / job, 'car_age_share': -365.25 * table['OWN_CAR_AGE'] / age, 'ext_mean': mean,
        'ext_lowest': ext.min(axis=1), 'ext_highest': ext.max(axis=1), 'ext_spread': ext.std(axis=1, ddof=0), 'ext_weighted': filled @ [2.0, 2.0, 3.0],
        'ext_product': filled.prod(axis=1), 'ext_missing': null @ [1, 2, 4], 'ext_1_to_age': -10_000 * ext['EXT_SOURCE_1'] / age,
        'ext_2_to_age': -10_000 * ext['EXT_SOURCE_2'] / age, 'ext_3_to_age': -10_000 * ext['EXT_SOURCE_3'] / age, 'ext_times_term': mean * term,
        'ext_times_employed': mean * job, 'surcharge_to_ext': surcharge / mean, 'ext_to_credit': 1_000_000 * mean / credit,
        'ext_to_annuity': 10_000 * mean / annuity, 'income_per_person': income / family, 'children_share': table['CNT_CHILDREN'] / family,
        'income_to_age': -income / age, 'defaults_around': (table['DEF_30_CNT_SOCIAL_CIRCLE'] / seen).where(seen != 0, 0),
        'enquiries': enquiries.sum(axis=1, min_count=1), 'documents': table.filter(like='FLAG_DOCUMENT_').sum(axis=1, min_count=1)}
    return pd.concat([table, pd.DataFrame(features)], axis=1)


def make_pipeline_of(table: pd.DataFrame, target: str, trees: int, leaves: int, plain: bool = False) -> Pipeline:
    "Computes features, imputes, encodes and fits, as tutorials do; a plain one has the columns of the table alone."
    raw = table.drop(columns=target)
    features = raw if plain else engineered(raw)
    numbers, text = (features.select_dtypes(**{how: 'number'}).columns.tolist() for how in ('include', 'exclude'))
    encode = ColumnTransformer([
        ('numbers', SimpleImputer(strategy='median', keep_empty_features=True), numbers),
        ('text', make_pipeline(SimpleImputer(strategy='most_frequent', keep_empty_features=True), OneHotEncoder(handle_unknown='ignore', sparse_output=False)),
         text)])
    model = lgb.LGBMClassifier(n_estimators=trees, num_leaves=leaves, learning_rate=RATE, n_jobs=1, verbosity=-1)
    steps = [] if plain else [('features', FunctionTransformer(engineered))]
    return Pipeline([*steps, ('encode', encode), ('model', model)]).fit(raw, table[target])


def application_model(table: pd.DataFrame, target: str) -> type[pydantic.BaseModel]:
    "What a tutorial writes by hand: a field for each column, with its type, which may be null."
    fields = {name: (float | None if pd.api.types.is_numeric_dtype(kind) else str | None, None) for name, kind in table.dtypes.items() if name != target}
    return pydantic.create_model('Application', **fields)


def one_row(application: dict[str, Any]) -> pd.DataFrame:
    "A DataFrame of one application, with NaN for null."
    return pd.DataFrame([{name: np.nan if value is None else value for name, value in application.items()}])


def create_app(table: pd.DataFrame, target: str, trees: int, leaves: int) -> FastAPI:
    "The service."
    Application = application_model(table, target)
    pipeline, plain = (make_pipeline_of(table, target, trees, leaves, plain=only) for only in (False, True))
    encode, names = pipeline[:-1], pipeline['encode'].get_feature_names_out()
    explainer = shap.TreeExplainer(pipeline['model'])
    app = FastAPI()

    def answer(default: float) -> dict[str, Any]:
        return {'pd': default, 'decision': 'approve' if default < 0.1 else 'decline'}

    @app.post('/predict')
    def predict(application: Application) -> dict[str, Any]:
        return answer(float(pipeline.predict_proba(one_row(application.model_dump()))[0, 1]))

    @app.post('/predict_plain')
    def predict_plain(application: Application) -> dict[str, Any]:
        return answer(float(plain.predict_proba(one_row(application.model_dump()))[0, 1]))

    @app.post('/predict_explain')
    def predict_explain(application: Application) -> dict[str, Any]:
        features = encode.transform(one_row(application.model_dump()))
        values = explainer.shap_values(features)[0]
        top = np.argsort(-np.abs(values))[:4]
        return answer(float(pipeline['model'].predict_proba(features)[0, 1])) | {'reasons': [{'feature': names[i], 'value': float(values[i])} for i in top]}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', help='a CSV file to learn from')
    parser.add_argument('target', help='its outcome column')
    parser.add_argument('--trees', type=int, default=600)
    parser.add_argument('--leaves', type=int, default=8)
    parser.add_argument('--port', type=int, default=8001)
    args = parser.parse_args()
    logging.getLogger('shap').setLevel(logging.ERROR)
    app = create_app(pd.read_csv(args.table), args.target, args.trees, args.leaves)
    uvicorn.run(app, host='127.0.0.1', port=args.port, loop='uvloop', http='httptools', access_log=False, log_level='warning')


if __name__ == '__main__':
    main()
