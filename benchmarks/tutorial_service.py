"""The scoring service of the usual tutorial, written with care: what benchmarks/api.py and benchmarks/record.py compare with.

    python benchmarks/tutorial_service.py history.csv.gz TARGET --trees 600 --leaves 8 --port 8001

FastAPI, a pydantic model of the application, a DataFrame of one row, a scikit-learn pipeline (impute, one-hot, LightGBM with one thread), a `def`
endpoint, one uvicorn worker (uvloop and httptools). /predict answers with the pd and a decision; /predict_explain adds the four features that
weigh most by shap.TreeExplainer. It keeps no log. The pipeline is fitted when the process begins, so that nothing has to be unpickled.
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
from sklearn.preprocessing import OneHotEncoder

RATE = 0.05


def make_pipeline_of(table: pd.DataFrame, target: str, trees: int, leaves: int) -> Pipeline:
    "Imputes, encodes and fits, as tutorials do."
    features = table.drop(columns=target)
    numbers, text = (features.select_dtypes(**{how: 'number'}).columns.tolist() for how in ('include', 'exclude'))
    encode = ColumnTransformer([
        ('numbers', SimpleImputer(strategy='median', keep_empty_features=True), numbers),
        ('text', make_pipeline(SimpleImputer(strategy='most_frequent', keep_empty_features=True), OneHotEncoder(handle_unknown='ignore', sparse_output=False)),
         text)])
    model = lgb.LGBMClassifier(n_estimators=trees, num_leaves=leaves, learning_rate=RATE, n_jobs=1, verbosity=-1)
    return Pipeline([('encode', encode), ('model', model)]).fit(features, table[target])


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
    pipeline = make_pipeline_of(table, target, trees, leaves)
    encode, names = pipeline['encode'], pipeline['encode'].get_feature_names_out()
    explainer = shap.TreeExplainer(pipeline['model'])
    app = FastAPI()

    def answer(default: float) -> dict[str, Any]:
        return {'pd': default, 'decision': 'approve' if default < 0.1 else 'decline'}

    @app.post('/predict')
    def predict(application: Application) -> dict[str, Any]:
        return answer(float(pipeline.predict_proba(one_row(application.model_dump()))[0, 1]))

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
