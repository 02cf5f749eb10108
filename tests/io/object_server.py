"""A server that stores objects by the protocol of S3, with faults on demand.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API. Signatures are not checked.
"""

import asyncio
import re
from contextlib import contextmanager
from hashlib import md5
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from aiohttp import web

from tests.io.faults import running

#: What the tests pass as storage_options, beside the address of the server. botocore itself does not retry.
OPTIONS = {
    "key": "AKIAEXAMPLE12345", "secret": "wJalrXUtnFEMIexampleSECRETkey",
    "config_kwargs": {"retries": {"max_attempts": 0}},
}  # fmt: skip


class Bucket:
    """The objects of a server, and the faults of its answers.

    Attributes:
        objects: content of each object, by bucket and key.
        requests: method and path of each request.
        fault: for method, path and the number of the request, a status to answer with, -1 for no answer at all, or 0.
        conditional: whether ``If-None-Match`` is understood, and ``names_condition`` whether an error names it.
    """

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault = lambda method, path, number: 0
        self.conditional = self.names_condition = True

    def under(self, prefix):
        """The objects below a prefix, by the rest of their keys."""
        return {
            key.removeprefix(f"{prefix}/"): body for key, body in self.objects.items() if key.startswith(f"{prefix}/")
        }

    def answer(self, method, path, query, headers, body):
        """Status, headers and body of the answer to a request."""
        self.requests.append((method, path))
        status = self.fault(method, path, self.requests.count((method, path)))
        if status < 0:
            return status, {}, ""
        if status:
            code = {403: "AccessDenied", 503: "ServiceUnavailable", 500: "InternalError"}[status]
            return status, {}, _error(code)
        if method == "GET" and "list-type" in query:
            return 200, {}, self._listing(path, query)
        if method == "POST" and "delete" in query:
            for node in ET.fromstring(body).iter():
                if node.tag.endswith("Key"):
                    self.objects.pop(f"{path}/{node.text}", None)
            return 200, {}, "<DeleteResult/>"
        if method == "PUT":
            if self.conditional and headers.get("If-None-Match") == "*" and path in self.objects:
                return (
                    412,
                    {},
                    _error("PreconditionFailed", "<Condition>If-None-Match</Condition>" * self.names_condition),
                )
            self.objects[path] = body
            return 200, {"ETag": f'"{md5(body).hexdigest()}"'}, ""
        if method == "DELETE":
            self.objects.pop(path, None)
            return 204, {}, ""
        if path not in self.objects:
            return 404, {}, _error("NoSuchKey")
        return self._content(path, headers)

    def _content(self, path, headers):
        body = self.objects[path]
        given = {"ETag": f'"{md5(body).hexdigest()}"', "Last-Modified": "Sat, 28 Nov 2026 00:00:00 GMT"}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("Range", ""))
        if not match:
            return 200, given, body
        first, last = match[1], match[2]
        start = int(first) if first else max(0, len(body) - int(last))
        stop = min(int(last) + 1, len(body)) if first and last else len(body)
        if start >= len(body):
            return 416, {}, _error("InvalidRange")
        return 206, given | {"Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}, body[start:stop]

    def _listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys, folders = [], set()
        for name in sorted(self.objects):
            key = name.removeprefix(f"{bucket}/")
            if not name.startswith(f"{bucket}/") or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                keys.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[f'{bucket}/{key}'])}</Size>"
            "<LastModified>2026-11-28T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
            for key in keys
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in sorted(folders))
        return (
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false</IsTruncated>"
            f"<KeyCount>{len(keys) + len(folders)}</KeyCount>{contents}{common}</ListBucketResult>"
        )


def _error(code, more=""):
    return f"<Error><Code>{code}</Code><Message>{code}</Message>{more}</Error>"


@contextmanager
def storing():
    """Run the server on loopback; yields the ``storage_options`` of its addresses, and a `Bucket`."""
    bucket = Bucket()

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        status, headers, text = bucket.answer(
            request.method, request.path.strip("/"), request.query, request.headers, body
        )
        if status < 0:
            await asyncio.sleep(600)
        if request.method == "HEAD":
            headers |= {"Content-Length": str(len(text))}
            return web.Response(status=status, headers=headers)
        content = text if isinstance(text, bytes) else text.encode()
        kind = None if isinstance(text, bytes) else "application/xml"
        return web.Response(status=status, headers=headers, body=content, content_type=kind)

    with running(answer, most=1 << 28) as address:
        yield OPTIONS | {"endpoint_url": address}, bucket
