"""Stores and servers that fail in the ways that real ones do, for a set number of times."""

import asyncio
import errno
import threading
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path

from aiohttp import web
from zarr.storage import WrapperStore


class FaultyStore(WrapperStore):
    """A store whose objects fail: ``faults`` gives, for a key and the number of the attempt, an error or None."""

    def __init__(self, store, faults):
        super().__init__(store)
        self.faults, self.asked = faults, {}

    def _with_store(self, store):
        return FaultyStore(store, self.faults)

    async def get(self, key, prototype, byte_range=None):
        number = self.asked[key] = self.asked.get(key, 0) + 1
        fault = self.faults(key, number)
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        elif fault is not None:
            raise fault
        return await self._store.get(key, prototype, byte_range)


def _transport(request: web.Request) -> asyncio.Transport:
    """The connection of a request that is being answered."""
    assert request.transport is not None
    return request.transport


@contextmanager
def serving(folder: Path, fault="", times=10**9, only="", latency=0.0):  # noqa: C901  one branch per fault
    """Serve a folder on loopback, with a fault for the first requests of the objects whose path ends so.

    Each request takes ``latency`` seconds at least.

    Yields the address, and the number of requests for each object.
    """
    asked: dict[str, int] = {}

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.path
        if latency:
            await asyncio.sleep(latency)
        asked[path] = asked.get(path, 0) + 1
        file = folder / path.lstrip("/")
        body = file.read_bytes() if file.is_file() else b""
        if path.endswith(only) and asked[path] <= times:
            if fault == "token":
                return web.Response(status=403, text="<Code>ExpiredToken</Code> The provided token has expired.")
            if fault.isdigit():
                return web.Response(status=int(fault))
            if fault == "reset":
                _transport(request).abort()
                return web.Response()
            if fault == "truncated" and body:
                response = web.StreamResponse(headers={"Content-Length": str(len(body))})
                await response.prepare(request)
                await response.write(body[: len(body) // 2])
                _transport(request).close()
                return response
            if fault == "silence":
                await asyncio.sleep(30)
            if fault == "drip":
                response = web.StreamResponse(headers={"Content-Length": str(len(body))})
                await response.prepare(request)
                with suppress(ConnectionError):  # the client may close the connection
                    for byte in body:
                        await response.write(bytes([byte]))
                        await asyncio.sleep(0.05)
                return response
        if not file.is_file():
            return web.Response(status=404)
        if fault == "no ranges":
            return web.Response(body=body)
        return web.FileResponse(file)

    with running(answer) as address:
        yield address, asked


def transient():
    """An error of a network file system that passes."""
    return OSError(errno.ESTALE, "Stale file handle")


class Control:
    """Refused and requested objects of a server of `forbidding`.

    Attributes:
        asked: number of requests for each path.
        refused: paths for which this returns True are forbidden, although they exist.
    """

    def __init__(self):
        self.asked: dict[str, int] = {}
        self.refused = lambda path: False


@contextmanager
def forbidding(folder: Path):
    """Serve a folder on loopback as S3 does where nothing may be listed: "forbidden" for what does not exist.

    Yields the address and a `Control`. Below the address it can be read by HTTP, or by S3 as the bucket of that name.
    """
    control = Control()

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.path
        control.asked[path] = control.asked.get(path, 0) + 1
        file = folder / path.lstrip("/")
        if control.refused(path) or not file.is_file():
            body = "<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            return web.Response(status=403, text=body, content_type="application/xml")
        if not file.stat().st_size:
            if "Range" in request.headers:
                return web.Response(status=416, text="<Error><Code>InvalidRange</Code></Error>")
            return web.Response(body=b"")
        return web.FileResponse(file)

    with running(answer) as address:
        yield address, control


class Described:
    """Answers and requests of a server of `describing`.

    Attributes:
        sends: headers that tell versions of a file apart, of ``ETag`` and ``Last-Modified``.
        status: of responses to HEAD, and ``times`` for how many of them; afterwards 200.
        asked: method and path of each request.
        most: HEAD requests that were answered at the same time at most.
    """

    def __init__(self):
        self.sends, self.status, self.times = ("ETag", "Last-Modified"), 200, 10**9
        self.latency, self.asked, self.most, self.busy = 0.0, [], 0, 0

    def heads(self):
        """Paths that were asked for with HEAD, and start again."""
        found = sorted(path for method, path in self.asked if method == "HEAD")
        self.asked.clear()
        return found


@contextmanager
def describing(folder: Path):
    """Serve a folder on loopback; yields the address and a `Described`."""
    control = Described()

    async def answer(request: web.Request) -> web.StreamResponse:
        control.asked.append((request.method, request.path))
        file = folder / request.path.lstrip("/")
        if request.method == "HEAD":
            control.busy += 1
            control.most = max(control.most, control.busy)
            await asyncio.sleep(control.latency)
            control.busy -= 1
            control.times -= 1
            if control.status != 200 and control.times >= 0:
                return web.Response(status=control.status)
        if not file.is_file():
            return web.Response(status=404)
        if request.method == "GET":
            return web.FileResponse(file)
        status = file.stat()
        values = {"ETag": f'"{status.st_ino}-{status.st_ctime_ns}"', "Last-Modified": formatdate(status.st_mtime)}
        headers = {name: values[name] for name in control.sends}
        return web.Response(body=file.read_bytes(), headers=headers)

    with running(answer) as address:
        yield address, control


@contextmanager
def running(answer, most=1 << 20):
    """Run a server on loopback, of requests of at most so many bytes; yields its address."""
    loop = asyncio.new_event_loop()
    ready, port, end = threading.Event(), [0], asyncio.Event()

    async def serve() -> None:
        app = web.Application(client_max_size=most)
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port[0] = runner.addresses[0][1]
        ready.set()
        await end.wait()
        await runner.cleanup()
        # Handlers of requests that were given up; the end of the loop would report them as pending.
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), name="test-server")
    thread.start()
    try:
        assert ready.wait(120)
        yield f"http://127.0.0.1:{port[0]}"
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(120)
        loop.close()
