"What every test shares: quiet tools, no network, and the folder of real data when there is one."
import os
import signal
import socket
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores Ctrl-C, and its children would too

os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
os.environ.update(PLOOMBER_STATS_ENABLED='false', PLOOMBER_VERSION_CHECK_DISABLED='true')
os.environ.update(MLFLOW_DISABLE_TELEMETRY='true', DO_NOT_TRACK='true')

settings.register_profile('gate', deadline=None, derandomize=True, print_blob=True)
settings.register_profile('nightly', deadline=None, max_examples=1000, print_blob=True)
settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'gate'))


_LONGEST = ('test_pipeline.py', 'test_loop.py', 'test_service_faults.py')  # started first, so that no process has them left when the others are through


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Orders the files; the tests of one file run in one process and in their order."
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture
def root() -> Path:
    "The folder of the checkout."
    return ROOT


@pytest.fixture
def real_data() -> Path:
    "The folder RISKSCORE_DATA; tests that ask for it are skipped without one."
    folder = os.environ.get('RISKSCORE_DATA')
    if not folder or not Path(folder).is_dir():
        pytest.skip('RISKSCORE_DATA names no folder with the real data sets')
    return Path(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    "The project works air-gapped: a test that reaches for another machine fails."
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ('127.0.0.1', '::1', 'localhost'):
            raise AssertionError(f'a test tried to reach {address[0]}:{address[1]}')
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', refuse)
