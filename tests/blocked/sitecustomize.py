"Put this folder on PYTHONPATH: every Python process then refuses to reach another machine and writes down that it tried."
import os
import socket

LOCAL = ('127.0.0.1', '::1', 'localhost', '0.0.0.0', '')
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


def _refuse(host):
    with open(os.environ['BLOCKED_LOG'], 'a', encoding='utf-8') as log:
        log.write(f'{host}\n')
    raise OSError(f'blocked: {host}')


def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
        _refuse(address[0])
    return _connect(self, address)


def getaddrinfo(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    if name and name not in LOCAL:
        _refuse(name)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
