"""A Hub of a few repositories on 127.0.0.1, with the requests that `huggingface_hub` sends."""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_token"
READ_ONLY = "hf_of_a_reader"


@dataclasses.dataclass
class Repository:
    """Files of every commit, and the commits of the branches."""

    private: bool = False
    gated: bool = False
    commits: dict = dataclasses.field(default_factory=dict)
    branches: dict = dataclasses.field(default_factory=dict)

    def commit(self, files, branch="main", start="main"):
        """Add or replace files, and return the commit."""
        before = self.commits.get(self.branches.get(branch, self.branches.get(start)), {})
        state = {**before, **files}
        known = json.dumps([len(self.commits), sorted(state)])
        sha = hashlib.sha1(known.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = state, sha
        return sha

    def find(self, revision):
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else (None, None)


class Hub:
    """The server; `repositories` can be changed while it runs.

    `log` has a line for every request. A file whose name is in `cuts` is cut off in its middle the
    given number of times.
    """

    def __init__(self):
        self.repositories, self.log, self.cuts = {}, [], {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, name, files, **options):
        """Create a repository, and return its first commit."""
        self.repositories[name] = Repository(**options)
        return self.repositories[name].commit(files)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Refused(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format, *args):
        pass

    def _serve(self):
        path = unquote(urlsplit(self.path).path)
        range_ = self.headers.get("Range", "")
        self.hub.log.append(f"{self.command} {path} {range_}".strip())
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return answer(self, **match.groupdict())
            self._refuse(404, "EntryNotFound")
        except _Refused:
            pass

    do_GET = do_HEAD = do_POST = _serve

    # ---------------------------------------------------------------------------------------------

    def _refuse(self, status, code):
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})
        raise _Refused

    def _send(self, status, content, headers=(), cut=None):
        self.send_response(status)
        headers = {"Content-Length": str(len(content)), **dict(headers)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _writer(self):
        if self._token() != TOKEN:
            self._refuse(403 if self._token() == READ_ONLY else 401, None)

    def _repository(self, name):
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token() != TOKEN):
            self._refuse(404 if self._token() else 401, "RepoNotFound")
        return found

    def _at(self, name, revision):
        sha, files = self._repository(name).find(revision or "main")
        if files is None:
            self._refuse(404, "RevisionNotFound")
        return sha, files

    # ---------------------------------------------------------------------------------------------

    def _info(self, name, revision=None):
        sha, files = self._at(name, revision)
        siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
        private = self.hub.repositories[name].private
        self._json({"id": name, "sha": sha, "private": private, "siblings": siblings})

    def _tree(self, name, revision):
        _, files = self._at(name, revision)
        self._json(
            [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                for file, data in files.items()
            ]
        )

    def _resolve(self, name, revision, file):
        sha, files = self._at(name, revision)
        if self.hub.repositories[name].gated and self._token() != TOKEN:  # its files can be listed
            self._refuse(403 if self._token() else 401, "GatedRepo")
        if file not in files:
            self._refuse(404, "EntryNotFound")
        data = files[file]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = None
        if self.command == "GET" and self.hub.cuts.get(file, 0) > 0:
            self.hub.cuts[file] -= 1
            cut = (len(data) - begin) // 2
        self._send(206 if begin else 200, data[begin:], headers, cut)

    def _create(self):
        self._writer()
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        address = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._json(address, 409)
        self.hub.add(name, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        self._json(address)

    def _branch(self, name, revision):
        self._writer()
        repository = self._repository(name)
        if revision in repository.branches:
            return self._json({}, 409)
        repository.commit({}, branch=revision)
        self._json({})

    def _preupload(self, name, revision):
        self._writer()
        self._at(name, revision)
        files = [
            {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
            for each in json.loads(self.body)["files"]
        ]
        self._json({"files": files})

    def _commit(self, name, revision):
        self._writer()
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        sha = self._repository(name).commit(files, branch=revision)
        address = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": address})

    def _card(self):
        self._json({"errors": [], "warnings": []})


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPOSITORY = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/models/{_REPOSITORY}"
_ROUTES = (
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", _Handler._tree),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", _Handler._info),
    ("GET", _API, _Handler._info),
    ("GET HEAD", rf"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler._resolve),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._card),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", _Handler._branch),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler._preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler._commit),
)
