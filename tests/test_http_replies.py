"""What HTTP servers may answer, and clients do: a connection is lent on only if both sides are through with the request. The cap is one all the time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import urllib3
from urllib3.exceptions import MaxRetryError

from mppool import shell
from mppool.integrations.httpx import AsyncHTTPTransport, HTTPTransport
from mppool.integrations.requests import HTTPAdapter
from mppool.integrations.urllib3 import PoolManager, ProxyManager
from tests.helpers.daemons import daemon
from tests.helpers.nginx import Nginx, needs_nginx, nginx
from tests.helpers.processes import BrokerProcess, Child, eventually, fork
from tests.helpers.speaker import Script, Speaker, Talk, digest, reply, speaker


class Client:
    """One connection, whichever client it is."""

    failure: type[Exception]  # what it raises if the server does not keep to HTTP
    lateness: type[Exception]
    of_http_client = True  # else of h11

    def ask(self, method: str, url: str, body: Any = None, timeout: float = 20.0) -> tuple[int, str]:
        """Status and text of the reply. ``body`` may be an iterator of bytes."""
        raise NotImplementedError

    def begin(self, url: str) -> Any:
        """The reply, of which ten bytes were read."""
        raise NotImplementedError

    def stop(self, response: Any) -> None:
        response.close()

    def end(self) -> None:
        raise NotImplementedError


class ByUrllib3(Client):
    failure = urllib3.exceptions.HTTPError
    lateness = urllib3.exceptions.HTTPError  # ReadTimeoutError, or in MaxRetryError

    def __init__(self, path: str) -> None:
        self.manager = PoolManager(maxsize=1, shared={"broker": path})

    def ask(self, method: str, url: str, body: Any = None, timeout: float = 20.0) -> tuple[int, str]:
        response = self.manager.request(method, url, body=body, timeout=timeout, redirect=True, retries=urllib3.Retry(3, connect=0, read=0, other=0))
        return response.status, response.data.decode()

    def begin(self, url: str) -> Any:
        response = self.manager.request("GET", url, preload_content=False)
        response.read(10)
        return response

    def end(self) -> None:
        self.manager.clear()


class ByRequests(Client):
    failure = requests.exceptions.RequestException
    lateness = requests.exceptions.RequestException  # ReadTimeout, or ConnectionError in mid-body

    def __init__(self, path: str) -> None:
        self.session = requests.Session()
        self.session.mount("http://", HTTPAdapter(pool_maxsize=1, shared={"broker": path}))

    def ask(self, method: str, url: str, body: Any = None, timeout: float = 20.0) -> tuple[int, str]:
        response = self.session.request(method, url, data=body, timeout=timeout)
        return response.status_code, response.text

    def begin(self, url: str) -> Any:
        response = self.session.get(url, stream=True)
        next(response.iter_content(10))
        return response

    def end(self) -> None:
        self.session.close()


class ByHttpx(Client):
    failure = httpx.TransportError
    lateness = httpx.ReadTimeout
    of_http_client = False

    def __init__(self, path: str) -> None:
        self.client = httpx.Client(transport=HTTPTransport(max_connections=1, broker=path), timeout=20, follow_redirects=True)

    def ask(self, method: str, url: str, body: Any = None, timeout: float = 20.0) -> tuple[int, str]:
        response = self.client.request(method, url, content=body, timeout=httpx.Timeout(20, read=timeout))
        return response.status_code, response.text

    def begin(self, url: str) -> Any:
        response = self.client.send(self.client.build_request("GET", url), stream=True)
        next(response.iter_raw(10))
        return response

    def end(self) -> None:
        self.client.close()


class ByAsyncHttpx(Client):
    failure = httpx.TransportError
    lateness = httpx.ReadTimeout
    of_http_client = False

    def __init__(self, path: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.client = httpx.AsyncClient(transport=AsyncHTTPTransport(max_connections=1, broker=path), timeout=20, follow_redirects=True)

    def ask(self, method: str, url: str, body: Any = None, timeout: float = 20.0) -> tuple[int, str]:
        async def parts() -> AsyncIterator[bytes]:
            for part in body:
                yield part

        content = parts() if isinstance(body, Iterator) else body
        response = self.loop.run_until_complete(self.client.request(method, url, content=content, timeout=httpx.Timeout(20, read=timeout)))
        return response.status_code, response.text

    def begin(self, url: str) -> Any:
        async def begun() -> Any:
            response = await self.client.send(self.client.build_request("GET", url), stream=True)
            async for _ in response.aiter_raw(10):
                break
            return response

        return self.loop.run_until_complete(begun())

    def stop(self, response: Any) -> None:
        self.loop.run_until_complete(response.aclose())

    def end(self) -> None:
        self.loop.run_until_complete(self.client.aclose())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


@pytest.fixture(autouse=True)
def let_go(socket_path: str) -> Iterator[None]:
    """The process's end does it, for those that are not closed."""
    yield
    shell._leave_all()


@pytest.fixture(params=[ByUrllib3, ByRequests, ByHttpx, ByAsyncHttpx])
def client(request: pytest.FixtureRequest, socket_path: str) -> Iterator[Client]:
    it = request.param(socket_path)
    yield it
    it.end()


def head(*headers: str, status: str = "200 OK") -> str:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""])


def chunked(talk: Talk) -> None:
    talk.say(head("Transfer-Encoding: chunked"))
    for part in (str(talk.number), " ", talk.nonce):
        talk.say(f"{len(part):x}\r\n{part}\r\n")
    talk.say("0\r\n\r\n")


def trailers(talk: Talk) -> None:
    talk.say(head("Transfer-Encoding: chunked", "Trailer: X-Sum") + f"1;note=1\r\n{talk.number}\r\n0\r\nX-Sum: 7\r\n\r\n")


def after(first: str) -> Script:
    """A reply before the reply; the real one is said when the client says more, or has ended."""

    def script(talk: Talk) -> None:
        talk.say(first)
        talk.hear()
        talk.say(reply(talk))

    return script


def ending(text: str) -> Script:
    """Say this (with the connection's number for {}), and end."""

    def script(talk: Talk) -> None:
        talk.say(text.replace("{}", str(talk.number)))
        talk.end()

    return script


def saying(*headers: str, **how: str) -> Script:
    return lambda talk: talk.say(reply(talk, *headers, **how))


def upload(talk: Talk) -> None:
    body = digest(talk.read_body())
    talk.say(head(f"Content-Length: {len(body)}") + body)


def last(*headers: str, **how: str) -> Script:
    """A reply, and the end."""

    def script(talk: Talk) -> None:
        talk.say(reply(talk, *headers, **how))
        talk.end()

    return script


def more_later(talk: Talk) -> None:
    talk.say(reply(talk))
    talk.go.wait(20)
    talk.say("HTTP/1.1 200 OK\r\n")


def moved_with_body(talk: Talk) -> None:
    talk.read_body()
    talk.say(reply(talk, "Location: /upload", status="307 Temporary Redirect"))


def stalling(text: str) -> Script:
    """Say this, and no more until the client ends."""

    def script(talk: Talk) -> None:
        talk.say(text)
        talk.hear()

    return script


SOUND: dict[str, Script] = {  # the connection is used again
    "/chunked": chunked,
    "/trailers": trailers,
    "/continue": lambda talk: talk.say(head(status="100 Continue") + reply(talk)),
    "/nothing": lambda talk: talk.say(head(status="204 No Content")),
    "/unmodified": lambda talk: talk.say(head("Content-Length: 77", status="304 Not Modified")),
    "/empty": lambda talk: talk.say(head("Content-Length: 0")),
    "/error": saying(status="500 Internal Server Error"),
}
LAST: dict[str, Script] = {  # it is closed
    "/close": last("Connection: close"),
    "/close-chunked": ending(head("Transfer-Encoding: chunked", "Connection: close") + "1\r\n{}\r\n0\r\n\r\n"),
    "/close-kept-open": saying("Connection: close"),
    "/until-the-end": ending(head() + "{}"),
    "/old": last(version="1.0"),
    "/old-kept-open": saying(version="1.0"),
}
WRONG: dict[str, Script] = {  # an error, and it is closed
    "/short": ending(head("Content-Length: 100") + "{}"),
    "/bad-chunk": lambda talk: talk.say(head("Transfer-Encoding: chunked") + "nonsense\r\n"),
    "/short-chunk": ending(head("Transfer-Encoding: chunked") + "64\r\n{}"),
    "/no-head": ending("HTTP/1.1"),
    "/garbage": ending("what do you want?\r\n\r\n"),
    "/nothing-at-all": ending(""),
}
OTHERS: dict[str, Script] = {
    "/echo": saying(),
    "/upload": upload,
    "/twice": lambda talk: talk.say(reply(talk) + reply(talk).replace("x", "y")),
    "/more-later": more_later,
    "/hints": after(head("Link: </style.css>", status="103 Early Hints")),
    "/switched": after(head("Upgrade: talk", "Connection: Upgrade", status="101 Switching Protocols")),
    "/refused": last("Connection: close", status="413 Content Too Large"),
    "/moved": saying("Location: /echo?nonce=moved", status="302 Found"),
    "/moved-with-body": moved_with_body,
    "/silent": stalling(""),
    "/stalls": stalling(head("Content-Length: 100") + "some of it."),
    "/long": stalling(head("Content-Length: 100000") + "x" * 50000),
    "/old-kept": saying("Connection: keep-alive", version="1.0"),
}


@pytest.fixture
def server() -> Iterator[Speaker]:
    with speaker({**SOUND, **LAST, **WRONG, **OTHERS}) as it:
        yield it


def echoed(client: Client, server: Speaker, nonce: str) -> int:
    """Ask with a nonce: the connection's number."""
    status, text = client.ask("GET", f"{server.url}/echo?nonce={nonce}")
    number, said = text.split()
    assert (status, said) == (200, nonce)
    return int(number)


def test_a_connection_goes_on_after_a_whole_reply(client: Client, server: Speaker) -> None:
    """However its length is told, and whatever its status."""
    for path in (*SOUND, *SOUND):
        client.ask("GET", f"{server.url}{path}?nonce=x")
        assert echoed(client, server, f"after{path}") == 1


def test_heads_have_no_body(client: Client, server: Speaker) -> None:
    """Whatever length they tell."""
    for n in range(3):
        assert client.ask("HEAD", f"{server.url}/unmodified") == (304, "")
        assert client.ask("HEAD", f"{server.url}/empty") == (200, "")
        assert echoed(client, server, f"y{n}") == 1


def test_a_connection_that_ends_with_its_reply_is_not_lent_on(client: Client, server: Speaker) -> None:
    """Even if the server says so, and then does not close it."""
    for number, path in enumerate((*LAST, *LAST), 1):
        assert echoed(client, server, f"before{path}") == number
        assert client.ask("GET", f"{server.url}{path}?nonce=x")[1].split()[0] == str(number)
    assert echoed(client, server, "last") == number + 1


def test_old_servers_may_keep_connections(client: Client, server: Speaker) -> None:
    """HTTP/1.0 with ``Connection: keep-alive``: http.client goes on, h11 does not."""
    for n in range(3):
        assert client.ask("GET", f"{server.url}/old-kept?nonce=x") == (200, f"{1 if client.of_http_client else n + 1} x")


def test_a_broken_reply_costs_its_connection_and_no_permit(client: Client, server: Speaker) -> None:
    """An error of the client's own; the next request has a new connection, at once."""
    for number, path in enumerate((*WRONG, *WRONG), 1):
        assert echoed(client, server, f"before{path}") == number
        with pytest.raises(client.failure):
            client.ask("GET", f"{server.url}{path}")
    assert echoed(client, server, "last") == number + 1


def test_an_interim_reply_is_not_the_end_of_it(client: Client, server: Speaker) -> None:
    """What follows a 103 (to http.client that is a reply), or a 101, never becomes the answer to the next request."""
    for status, path in ((103, "/hints"), (101, "/switched")):
        if client.of_http_client:
            assert client.ask("GET", f"{server.url}{path}?nonce=x")[0] == status
        else:  # httpx goes on to wait, or does not take what nobody asked for
            with pytest.raises(client.failure):
                client.ask("GET", f"{server.url}{path}?nonce=x", timeout=0.05)
        echoed(client, server, f"after{path}")


@pytest.mark.parametrize("path", ["/twice", "/more-later"])
def test_what_nobody_asked_for_reaches_nobody(client: Client, server: Speaker, path: str) -> None:
    """A server that says more than its reply, in the same packet, or when that was read."""
    for n in range(3):
        assert client.ask("GET", f"{server.url}{path}?nonce=x{n}")[1].split()[1] == f"x{n}"
        server.go.set()
        while server.finished.get(timeout=10) != path:
            pass
        server.go.clear()
        assert echoed(client, server, f"z{n}") == (1 if client.of_http_client and path == "/twice" else n + 2)


def test_a_reply_that_comes_late_or_never_costs_no_permit(client: Client, server: Speaker) -> None:
    """Timeouts before a reply, and in the middle of one."""
    for number, path in enumerate(("/silent", "/stalls", "/silent", "/stalls"), 1):
        assert echoed(client, server, f"before{path}") == number
        with pytest.raises(client.lateness):
            client.ask("GET", f"{server.url}{path}", timeout=0.05)
    assert echoed(client, server, "last") == number + 1


def test_a_reply_that_is_given_up_costs_no_permit(client: Client, server: Speaker) -> None:
    """Closed before its end."""
    for n in range(1, 4):
        client.stop(client.begin(f"{server.url}/long"))
        assert echoed(client, server, "x") == n + 1


def test_a_urllib3_response_that_is_only_closed_or_dropped_costs_no_permit(server: Speaker, socket_path: str) -> None:
    """``with`` closes a response and does not release its connection; and some forget even that."""
    client = ByUrllib3(socket_path)
    with client.manager.request("GET", f"{server.url}/long", preload_content=False) as response:
        response.read(10)
    assert echoed(client, server, "a") == 2
    with client.manager.request("GET", f"{server.url}/until-the-end", preload_content=False) as response:
        assert response.read() == b"2"
    assert echoed(client, server, "b") == 3
    response = client.begin(f"{server.url}/long")
    del response
    gc.collect()
    assert echoed(client, server, "c") == 4
    response = client.begin(f"{server.url}/echo?nonce=is-read-to-its-end")
    response.read()
    assert echoed(client, server, "d") == 4


@needs_nginx
def test_a_forked_child_that_closes_a_response_takes_nothing_from_its_parent(socket_path: str, broker: BrokerProcess) -> None:
    """Of a connection that the parent has: the parent reads on, and gives it back."""
    with nginx() as web:
        client = ByUrllib3(socket_path)
        response = client.begin(f"{web.url}/big/file")

        def work(child: Child) -> int:
            response.close()
            return len(client.ask("GET", f"{web.url}/echo?nonce=child", timeout=10)[1].split())

        with fork(work) as (child,):
            assert 10 + len(response.read()) == 3_200_000
            assert child.result() == 2
        first = client.ask("GET", f"{web.url}/echo?nonce=parent")[1].split()
        assert first[1] == "parent"


def test_a_requests_response_that_is_only_dropped_costs_no_permit(server: Speaker, socket_path: str) -> None:
    """As many programs do with a streamed one."""
    client = ByRequests(socket_path)
    response = client.begin(f"{server.url}/long")
    del response
    gc.collect()
    assert echoed(client, server, "c") == 2


def test_uploads(client: Client, server: Speaker) -> None:
    """Bodies of a known length and of none, on one connection. One that is given up half-way costs it, and so does one that the server does not want."""
    for body in (b"", b"x" * 3_000_000):
        assert client.ask("POST", f"{server.url}/upload", body) == (200, digest(body))
    assert client.ask("PUT", f"{server.url}/upload", iter([b"part"] * 1000)) == (200, digest(b"part" * 1000))
    assert echoed(client, server, "x") == 1

    def breaking() -> Iterator[bytes]:
        yield b"some"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        client.ask("POST", f"{server.url}/upload", breaking())
    assert echoed(client, server, "x") == 2
    assert client.ask("POST", f"{server.url}/refused", b"x" * 3_000_000)[0] == 413
    assert echoed(client, server, "x") == 3


def test_redirects(client: Client, server: Speaker) -> None:
    """Followed on the same connection, with the body where it is to be sent again; one to another origin has a connection of that one's pool."""
    assert client.ask("GET", f"{server.url}/moved?nonce=x") == (200, "1 moved")
    assert client.ask("POST", f"{server.url}/moved-with-body?nonce=x", b"body") == (200, digest(b"body"))
    assert echoed(client, server, "x") == 1
    with speaker({"/away": saying(f"Location: {server.url}/echo?nonce=back", status="302 Found")}) as other:
        for _ in range(3):
            assert client.ask("GET", f"{other.url}/away?nonce=x") == (200, "1 back")
        assert other.connections == 1


def test_a_connection_that_ends_as_a_request_sets_out(socket_path: str) -> None:
    """urllib3 repeats what has no effect, as ever, and nothing else; the repetition has a new connection."""
    dropped: list[str] = []

    def drop_first(talk: Talk) -> None:
        if not dropped:
            dropped.append(talk.method)
            talk.end()
        else:
            talk.say(reply(talk))

    with speaker({"/echo": saying(), "/drops": drop_first}) as it:
        manager = PoolManager(maxsize=1, shared={"broker": socket_path})
        manager.request("GET", f"{it.url}/echo")
        assert manager.request("GET", f"{it.url}/drops?nonce=x").data == b"2 x"
        dropped.clear()
        with pytest.raises((urllib3.exceptions.ProtocolError, MaxRetryError)):
            manager.request("POST", f"{it.url}/drops?nonce=x")
        assert [method for _, method, path in it.asked if path == "/drops"] == ["GET", "GET", "POST"]
        assert manager.request("GET", f"{it.url}/echo?nonce=x").data == b"3 x"


def tunnel(talk: Talk) -> None:
    """What a proxy does when it is told to CONNECT."""
    host, _, port = talk.path.partition(":")
    with socket.create_connection((host, int(port)), 20) as far:
        talk.say("HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=relay, args=(far, talk.sock), daemon=True)
        back.start()
        relay(talk.sock, far)
        back.join(20)


def relay(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
        other.shutdown(socket.SHUT_WR)


@needs_nginx
def test_proxies_of_requests(socket_path: str) -> None:
    """Connections to a proxy for http are shared and go on; a tunnel for https is resident. Each counts in the cap of what it leads to."""
    with nginx() as web, speaker({"/echo": saying(), "CONNECT": tunnel}) as proxy, requests.Session() as session:
        session.trust_env = False
        session.proxies = {"http": proxy.url, "https": proxy.url}
        session.verify = web.certificate
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=1, shared={"broker": socket_path}))
        assert [session.get(f"http://nowhere.invalid/echo?nonce=x{n}").text for n in range(3)] == ["1 x0", "1 x1", "1 x2"]
        assert session.get("http://elsewhere.invalid/echo?nonce=x").text == "1 x"
        assert len({session.get(f"{web.secure}/echo?nonce=x").text for _ in range(3)}) == 1
        assert [method for _, method, _ in proxy.asked].count("CONNECT") == 1


@needs_nginx
def test_a_proxy_behind_tls(socket_path: str) -> None:
    """For http it is asked as any proxy is, without a tunnel."""
    with nginx() as web:
        for manager in (
            urllib3.ProxyManager(web.secure, ca_certs=web.certificate),
            ProxyManager(web.secure, ca_certs=web.certificate, shared={"broker": socket_path}),
        ):
            replies = {manager.request("GET", "http://nowhere.invalid/echo?nonce=x", retries=False).data for _ in range(3)}
            assert len(replies) == 1  # one connection
            manager.clear()


@pytest.mark.parametrize("proxy", ["", "http", "https"])
@pytest.mark.parametrize("trouble", ["refuses", "is silent", "talks nonsense"])
def test_what_keeps_a_connection_from_being_made_is_said_as_by_requests(socket_path: str, trouble: str, proxy: str) -> None:
    """Refused, silent or no TLS there: the same exceptions as with requests' own adapter, also where it is the proxy that fails."""

    def outcome(adapter: requests.adapters.HTTPAdapter, scheme: str, address: str) -> str:
        with requests.Session() as session:
            session.trust_env = False
            session.mount(f"{scheme}://", adapter)
            proxies = {scheme: f"{proxy}://{address}"} if proxy else {}
            with pytest.raises(requests.RequestException) as raised:
                session.get(f"{scheme}://{address}/", proxies=proxies, timeout=(0.2, 0.2)).raise_for_status()
            return type(raised.value).__name__

    with socket.socket() as listener, ExitStack() as ends:
        listener.bind(("127.0.0.1", 0))
        if trouble != "refuses":
            listener.listen()
        if trouble == "talks nonsense":
            ends.callback(listener.shutdown, socket.SHUT_RDWR)
            threading.Thread(target=talk_nonsense, args=(listener,), daemon=True).start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for scheme in ("http", "https"):
            theirs = outcome(requests.adapters.HTTPAdapter(), scheme, address)
            assert (scheme, outcome(HTTPAdapter(shared={"broker": socket_path}), scheme, address)) == (scheme, theirs)


def talk_nonsense(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                sock.sendall(b"HTTP/1.1 400 What?\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def answered(client: Client, url: str) -> bool:
    try:
        return client.ask("GET", f"{url}/echo?nonce=x")[1].split()[1] == "x"
    except client.failure:
        return False


@needs_nginx
def test_a_server_that_is_restarted(client: Client) -> None:
    """While it is down every request fails at once; soon afterwards all is well, with the same client."""
    with tempfile.TemporaryDirectory(prefix="mppool-nginx-") as directory:
        web = Nginx(Path(directory))
        for _ in range(2):
            with daemon(web.command, web.port, Path(directory) / "log", stop="SIGTERM"):
                eventually(lambda: answered(client, web.url))  # nobody asks while the pool holds back from a server that was down
                for n in range(3):
                    assert client.ask("GET", f"{web.url}/echo?nonce=x{n}")[1].split()[1] == f"x{n}"
            for _ in range(2):
                with pytest.raises(client.failure):
                    client.ask("GET", f"{web.url}/echo?nonce=x")
