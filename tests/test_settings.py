"Settings: any environment is read or refused, workers get the same, and no secret or applicant data comes out."
import dataclasses
import json
import logging
import logging.config

import pytest
from hypothesis import given
from hypothesis import strategies as st

from riskscore.core import RiskError
from riskscore.settings import SafeFormatter, Settings, is_loopback, keys_text, log_config, settings_from, settings_help, shown, to_env

SECRET = 'Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4'


def test_every_setting_is_documented_and_read_back_from_its_default():
    for variable, default, note in settings_help():
        assert note
        if default:
            assert settings_from({variable: default}) == Settings(), variable
    assert len(settings_help()) == len(dataclasses.fields(Settings))


@given(st.dictionaries(st.sampled_from([v for v, _, _ in settings_help()]), st.text(st.characters(exclude_characters='\x00', codec='utf-8'), max_size=20),
                       max_size=6))
def test_any_environment_is_read_or_refused(environ):
    try:
        settings = settings_from(environ)
    except RiskError as error:
        assert error.problems
    else:
        assert settings_from(to_env(settings, environ)) == settings


@given(port=st.integers(0, 65535), workers=st.integers(1, 64), body=st.integers(1024, 10**7), timeout=st.floats(0.05, 3600).map(lambda x: round(x, 6)),
       origins=st.lists(st.from_regex(r'https://[a-z]{1,8}\.example', fullmatch=True), max_size=3), access=st.booleans(), folder=st.sampled_from(['a', 'b/c']))
def test_workers_read_the_same_settings(port, workers, body, timeout, origins, access, folder):
    settings = Settings(port=port, workers=workers, max_body=body, header_timeout=timeout, cors_origins=tuple(origins), access_log=access, folder=folder)
    assert settings_from(to_env(settings, {'RISKSCORE_PORT': '1', 'RISKSCORE_MODEL': 'other'})) == settings


def test_the_command_line_wins_over_a_secret_by_file(tmp_path):
    (tmp_path / 'url').write_text('postgresql://me:pa55word@db/risk\n')
    environ = {'RISKSCORE_STORE_FILE': str(tmp_path / 'url')}
    by_file = settings_from(environ)
    assert by_file.store == 'postgresql://me:pa55word@db/risk'
    assert 'pa55word' not in str(to_env(by_file, environ)) and settings_from(to_env(by_file, environ)) == by_file
    assert settings_from(environ, store='sqlite:///x.db').store == 'sqlite:///x.db'
    with pytest.raises(RiskError, match='both set'):
        settings_from(environ | {'RISKSCORE_STORE': 'sqlite:///x.db'})


def test_secrets_are_nowhere_to_be_seen():
    settings = Settings(api_keys=f'desk score {SECRET}', ledger_key=SECRET, store=f'postgresql://me:{SECRET}@db:5432/risk?password={SECRET}')
    for text in (repr(settings), str(shown(settings)), str(log_config(settings))):
        assert SECRET not in text
    for environ in ({'RISKSCORE_STORE': f'mysql://me:{SECRET}@db'}, {'RISKSCORE_STORE': SECRET}, {'RISKSCORE_LEDGER_KEY': SECRET, 'RISKSCORE_PORT': 'x'}):
        with pytest.raises(RiskError) as caught:
            settings_from(environ)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize('host', ['', '0.0.0.0', '::', '192.168.1.7', 'scoring.bank.example'])
def test_without_keys_only_this_machine_is_served(host):
    if host:
        with pytest.raises(RiskError, match='API keys are needed'):
            settings_from({'RISKSCORE_HOST': host})
        with pytest.raises(RiskError, match='API keys are needed'):
            settings_from({'RISKSCORE_HOST': host, 'RISKSCORE_API_KEYS': '  '})
        assert settings_from({'RISKSCORE_HOST': host, 'RISKSCORE_API_KEYS': f'desk score {SECRET}'}).host == host
    assert not is_loopback(host)


def test_a_file_of_keys_must_be_readable_at_the_start(tmp_path):
    with pytest.raises(RiskError, match='No such file'):
        settings_from({'RISKSCORE_API_KEYS_FILE': str(tmp_path / 'none')})
    (tmp_path / 'keys').write_text('')
    assert keys_text(settings_from({'RISKSCORE_API_KEYS_FILE': str(tmp_path / 'keys')})) == '' # which parse_keys refuses


@given(st.text(max_size=60))
def test_a_host_is_this_machine_only_by_its_own_names(text):
    if is_loopback(text):
        assert text.strip().lower().startswith(('localhost', '127.', '::1', '[::1]', '[127.', '0:', '::ffff:127.', '[::ffff:127.'))


def test_an_unhandled_error_leaves_no_applicant_data_in_the_log(tmp_path):
    before = logging.root.handlers[:], logging.root.level
    path = tmp_path / 'log'
    try:
        logging.config.dictConfig(log_config(Settings(log_file=str(path), access_log=True, log_level='debug')))
        try:
            try:
                float('Calle 12')
            except ValueError as error:
                raise KeyError('Ana Torres') from error
        except KeyError as error:
            logging.getLogger('uvicorn.error').error('Exception in ASGI application\n', exc_info=error)
        logging.getLogger('uvicorn.access').info('%s - "%s %s HTTP/%s" %d', '127.0.0.1:9', 'GET', '/decisions?applicant=Ana', '1.1', 200)
        logging.getLogger('asyncio').error("Task exception was never retrieved\nfuture: <Task exception=ValueError('Calle 12')>")
        logging.getLogger('sqlalchemy.engine').info('[parameters] Calle 12')
        logging.getLogger('riskscore.x').warning('wrong %s %s', 'arguments')
        for name in (None, 'uvicorn.access'):
            for handler in logging.getLogger(name).handlers:
                handler.close()
    finally:
        logging.root.handlers[:], logging.root.level = before
        logging.config.dictConfig({'version': 1, 'disable_existing_loggers': False,
                                   'loggers': {n: {'handlers': [], 'propagate': True, 'level': 'NOTSET'} for n in
                                               ('uvicorn', 'uvicorn.error', 'uvicorn.access', 'sqlalchemy', 'asyncio')}})
    text = path.read_text(encoding='utf-8')
    lines = [json.loads(line) for line in text.splitlines()]
    assert 'Calle' not in text and 'Ana' not in text
    assert [line['logger'] for line in lines] == ['uvicorn.error', 'uvicorn.access', 'asyncio', 'riskscore.x']
    assert lines[0]['error'] == 'KeyError < ValueError' and lines[0]['where'][0].startswith('tests/test_settings.py:')


@given(st.text(max_size=80), st.sampled_from(['json', 'text']))
def test_a_log_line_is_one_line(text, form):
    line = SafeFormatter(form).format(logging.LogRecord('x', 20, 'x.py', 1, text, (), None))
    assert not set(line) & set('\n\r\x0b\x0c\x00\x1b')
    if form == 'json':
        assert json.loads(line)['level'] == 'INFO'
