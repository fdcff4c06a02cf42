"""Sees within seconds that a process of the group has ended, whatever the others are at.

A collective that waits for a dead process may hang, and one that computes alone for
minutes would not look. So every process keeps a connection to the main one, which the
kernel closes when a process ends, however it ends; a thread waits for that, and ends its
own process. Through the same connections a mistake that one process meets ends all, with
one line and one exit code.
"""
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time

from .collectives import from_main, rank, world_size

_CONNECTING = 120  # seconds
_PATIENCE = 30  # seconds that the main process has to print a line before another does
# A machine that vanishes closes nothing: the kernel asks after 10 s, and 4 times, 5 s apart.
_KEEPALIVE = dict(TCP_KEEPIDLE=10, TCP_KEEPINTVL=5, TCP_KEEPCNT=4)


class Watch:
    """The connections of one process, and the thread that listens to them.

    Args:
        peers (dict[int, tuple[socket, str]]): connection and description by rank; the main
            process has all others, they have the main one.
        program (str): its name, for the line.
        advice (str): put behind the line that says that a process has died.
    """

    def __init__(self, peers, program, advice):
        self.peers = {number: peer for number, (peer, _) in peers.items()}
        self.names = {number: name for number, (_, name) in peers.items()}
        self.program, self.advice = program, advice
        self.rank, self.size = rank(), world_size()
        self._leaving = threading.Event()
        self._ending = threading.Lock()  # the first to end the process keeps it
        # a data loading process must not keep connections open when its parent dies
        os.register_at_fork(after_in_child=self._close)
        self._thread = threading.Thread(target=self._listen, name='watch', daemon=True)
        self._thread.start()

    @classmethod
    def start_all(cls, program, advice):
        """Connect all processes of the group; called by each of them."""
        server = None
        if rank() == 0:
            server = _server()
        port, token = from_main(
            lambda: (server.getsockname()[1], secrets.token_hex(16)))
        me = dict(rank=rank(), token=token, name=f'pid {os.getpid()} on {socket.gethostname()}')
        if server is None:
            peer = socket.create_connection((os.environ['MASTER_ADDR'], port), _CONNECTING)
            _send(peer, me)
            peers = {0: (peer, _first_line(peer)['name'])}
        else:
            with server:
                peers = _accept(server, token, world_size() - 1)
            for peer, _ in peers.values():
                _send(peer, me)
        for peer, _ in peers.values():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                if hasattr(socket, name):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        return cls(peers, program, advice)

    def leave(self):
        """End the watch: all work is done, here and everywhere."""
        self._leaving.set()
        for peer in self.peers.values():
            _send(peer, dict(bye=True))
        self._thread.join(_PATIENCE)  # until the others have said so too
        self._close()

    def end(self, line, code, seconds=0.0):
        """End this process and all others; does not return."""
        time.sleep(seconds)  # another's end may be the cause, and the thread's to tell
        if self.rank == 0:
            self._end_all(line, code)
        _send(self.peers[0], dict(line=line, code=code))
        time.sleep(_PATIENCE)
        self._exit(line, code)

    def _listen(self):
        selector = selectors.DefaultSelector()
        for number, peer in self.peers.items():
            selector.register(peer, selectors.EVENT_READ, (number, bytearray()))
        open_peers = len(self.peers)
        while open_peers:
            for key, _ in selector.select():
                number, held = key.data
                data = _receive(key.fileobj)
                held += data
                *lines, rest = bytes(held).split(b'\n')
                held[:] = rest
                said = [json.loads(line) for line in lines]
                for message in said:
                    if 'line' in message:
                        self._told(message)
                if not data or any('bye' in message for message in said):
                    selector.unregister(key.fileobj)
                    open_peers -= 1
                    if not any('bye' in message for message in said):
                        self._lost(number)

    def _told(self, message):
        """Another process has met its end, and says why."""
        if self.rank == 0:
            self._end_all(message['line'], message['code'])
        self._exit(message['line'] if message.get('everyone') else None, message['code'])

    def _lost(self, number):
        """A connection broke without a word."""
        line = (f'process {number} of {self.size} ({self.names[number]}) has died'
                f'{self.advice}')
        if self.rank == 0:
            self._end_all(line, 1, everyone=True)
        self._exit(line, 1)

    def _end_all(self, line, code, everyone=False):
        """The main process's end of all: print, tell the others, wait for them, exit."""
        self._ending.acquire()
        self._print(line)
        for peer in self.peers.values():
            _send(peer, dict(line=line, code=code, everyone=everyone))
        # what is still unread would make the kernel drop what was just sent
        deadline = time.monotonic() + 5
        for peer in self.peers.values():
            peer.settimeout(max(0.01, deadline - time.monotonic()))
            while _receive(peer):
                pass
        os._exit(code)

    def _exit(self, line, code):
        self._ending.acquire()
        if line is not None:
            self._print(line)
        # no clean-up: the main thread may be in a collective that never ends
        os._exit(code)

    def _print(self, line):
        try:
            sys.stdout.flush()
            print(f'{self.program}: error: {line}', file=sys.stderr, flush=True)
        except (OSError, ValueError):
            pass  # nobody reads it any more; the process has to end all the same

    def _close(self):
        for peer in self.peers.values():
            peer.close()


def _server():
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError:
            pass  # IPv6 is compiled in, and switched off
    return socket.create_server(('', 0))


def _accept(server, token, count):
    """The connections of the other processes by rank; strangers are turned away."""
    peers = {}
    server.settimeout(_CONNECTING)
    while len(peers) < count:
        peer, _ = server.accept()
        peer.settimeout(_CONNECTING)
        try:
            said = _first_line(peer)
            if not secrets.compare_digest(said['token'], token):
                raise ValueError
            peers[int(said['rank'])] = (peer, said['name'])
        except (OSError, ValueError, KeyError, TypeError):
            peer.close()
    return peers


def _first_line(peer):
    held = b''
    while not held.endswith(b'\n') and len(held) < 4096:
        data = peer.recv(1)
        if not data:
            break
        held += data
    return json.loads(held)


def _send(peer, message):
    try:
        peer.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
        pass  # it is gone already, which the thread sees


def _receive(peer):
    try:
        return peer.recv(65536)
    except OSError:
        return b''
