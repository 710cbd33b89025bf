"Reads settings.ini, which nbdev reads too, so that every fact about the package is written once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
cfg = config['DEFAULT']
extras = {name: cfg[f'{name}_requirements'].split() for name in cfg['extras'].split()}
extras['all'] = sorted({r for name, wanted in extras.items() if name != 'torch' for r in wanted})  # torch is gigabytes: asked for by name

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=cfg['author'],
    author_email=cfg['author_email'],
    url=cfg['git_url'],
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=cfg['keywords'],
    packages=[cfg['lib_path']],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Financial and Insurance Industry', 'Operating System :: POSIX :: Linux',
                 *(f'Programming Language :: Python :: {v}' for v in ['3', *cfg['python_versions'].split()])],
)
