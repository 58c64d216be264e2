"""A small Hub on loopback, over real HTTP: endpoints to create, upload and load a model, and to load a kernel.

Repositories live in memory, one linear history each. Faults can be put in: `fail_next` answers that many requests with 503,
`fail` spoils requests to one endpoint, `forbid` plays permissions, `slow_upload` sleeps before it takes a large file.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Prints nothing for a client that disconnects during an answer: it is no fault of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.private: set[str] = set()
        self.trusted_kernel_publishers: set[str] = set()
        self.faults: list[list] = []
        self.fail_next = 0
        self.forbid = False
        self.slow_upload = 0.0
        self.required_metadata = ("license", "library_name", "pipeline_tag")  # stricter than the Hub, which warns
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, folder, token: str | None = "hf_good") -> dict[str, str]:
        """Returns the environment of a process that uses this server as the Hub and `folder` as its cache."""
        result = {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        }
        return {**result, "HF_TOKEN": token} if token is not None else result

    def fail(self, request: str, answer: int | str, times: int = 1_000_000) -> None:
        """Makes the next requests fail whose method and path match the pattern.

        Args:
            request: regular expression, searched in `"PUT /lfs/..."`.
            answer: a status; `"reset"` ends the connection; `"html"` is a page in place of JSON.
            times: how many requests.
        """
        self.faults.append([re.compile(request), answer, times])

    def revision(self, repository: str) -> str:
        return self.commits[repository][-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def answer(self, status: int, content=None, headers=None, body: bytes | None = None):
        if body is None:
            body = json.dumps(content).encode() if content is not None else b""
        self.send_response(status)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self):
        path = self.path.partition("?")[0]
        body = self.body()
        hub = self.hub
        hub.requests.append(f"{self.command} {path}")
        if hub.fail_next:
            hub.fail_next -= 1
            return self.answer(503, {"error": "try again"})
        for fault in hub.faults:
            pattern, answer, times = fault
            if times and pattern.search(f"{self.command} {path}"):
                fault[2] -= 1
                if answer == "reset":  # with this option, closing sends a reset instead of an orderly end
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.close_connection = True
                    return self.connection.close()
                if answer == "html":
                    return self.answer(200, headers={"Content-Type": "text/html"}, body=b"<html>log in first</html>")
                return self.answer(answer, {"error": f"fault {answer}"})
        writes = self.command in ("POST", "PUT") and not path.endswith("validate-yaml")
        if writes and not path.startswith("/lfs/"):
            if self.headers.get("Authorization") != "Bearer hf_good":
                return self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
            if hub.forbid:
                return self.answer(403, {"error": "Forbidden"}, {"X-Error-Message": "you have no rights"})
        for method, pattern, action in (
            ("POST", r"/api/repos/create", self.create),
            ("POST", r"/api/validate-yaml", self.validate),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            ("PUT", r"/lfs/(\w+)", self.lfs_upload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.commit),
            ("GET", r"/api/(?:models|kernels)/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", self.tree),
            ("GET", r"/api/(?:models|kernels)/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.info),
            ("GET", r"/api/organizations/([^/]+)/overview", self.organization),
            ("GET", r"(?:/kernels)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ):
            match = re.fullmatch(pattern, path)
            if match and (self.command == method or (method == "GET" and self.command == "HEAD")):
                with hub.lock if method != "PUT" else threading.Lock():
                    return action(body, *match.groups())
        return self.answer(404, {"error": f"no such endpoint: {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, body):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = {}
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(name)
        self.hub.commits[name] = [hashlib.sha1(name.encode()).hexdigest()]
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self, body):
        """Checks a model card's metadata by the Hub's documented rules: known keys with values of the right types."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        data = yaml.safe_load(match[1]) if match else {}
        errors = [f"missing {key}" for key in self.hub.required_metadata if key not in data]
        errors += [
            f"{key} must be a list" for key in ("tags", "datasets") if key in data and not isinstance(data[key], list)
        ]
        for result in data.get("model-index", []):
            if "name" not in result or not all({"task", "dataset", "metrics"} <= r.keys() for r in result["results"]):
                errors.append("model-index is not complete")
        return self.answer(400 if errors else 200, {"errors": [{"message": e} for e in errors], "warnings": []})

    def known(self, repository):
        if repository in self.hub.repositories:
            return True
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return False

    def preupload(self, body, repository):
        if self.known(repository):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files, "commitOid": self.hub.revision(repository)})

    def lfs_batch(self, body, repository):
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        time.sleep(self.hub.slow_upload)
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "wrong content"})
        self.hub.blobs[oid] = body
        return self.answer(200)

    def commit(self, body, repository):
        if not self.known(repository):
            return None
        changed, deleted = {}, []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                changed[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        self.hub.repositories[repository].update(changed)
        for name in deleted:
            del self.hub.repositories[repository][name]
        oid = hashlib.sha1(self.hub.revision(repository).encode() + body).hexdigest()
        self.hub.commits[repository].append(oid)
        url = f"{self.hub.url}/{repository}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, body, repository):
        if self.known(repository):
            files = [{"rfilename": name} for name in self.hub.repositories[repository]]
            content = {
                "id": repository,
                "modelId": repository,
                "sha": self.hub.revision(repository),
                "siblings": files,
            }
            self.answer(
                200, {**content, "private": repository in self.hub.private, "tags": [], "downloads": 0, "likes": 0}
            )

    def tree(self, body, repository, folder):
        """The files below a folder, and with a folder its subfolders: what `recursive` asks for and what lists variants."""
        if self.known(repository):
            prefix = f"{folder}/" if folder else ""
            files = {name: data for name, data in self.hub.repositories[repository].items() if name.startswith(prefix)}
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            below = {name.removeprefix(prefix).split("/")[0] for name in files if "/" in name.removeprefix(prefix)}
            if folder:
                entries += [
                    {"type": "directory", "path": prefix + name, "oid": hashlib.sha1(name.encode()).hexdigest()}
                    for name in sorted(below)
                ]
            self.answer(200, entries)

    def organization(self, body, name):
        trusted = name in self.hub.trusted_kernel_publishers
        self.answer(200, {"name": name, "fullname": name, "avatarUrl": "", "trustedKernelPublisher": trusted})

    def resolve(self, body, repository, revision, name):
        if not self.known(repository):
            return None
        commit = self.hub.revision(repository)
        data = self.hub.repositories[repository].get(name)
        if data is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self.answer(404, {"error": "Entry not found"}, headers)
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"}
        return self.answer(200, headers=headers, body=data)
