"""The Hugging Face hub on loopback: its API as huggingface_hub uses it, with Git LFS and without xet.

Repositories of models with branches and commits, users with tokens and roles, large files by LFS in one part, the
check of a card's front matter, and downloads. Everything is in memory.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import yaml
from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server

# Files of so many bytes go by LFS, as do those with these endings.
LARGE = 10_000
LFS_ENDINGS = (".safetensors", ".bin")
Files = dict[str, bytes]


@dataclass
class Repo:
    """commits: the files of each.  branches: the commit of each; a repository begins with the hub's own file."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """The files become those of a branch. Returns the commit."""
        text = repr((sorted(files.items()), self.branches.get(branch)))
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


@dataclass
class Hub:
    """What the server holds.

    users: by token what whoami says.  repos: by name.  stored: large files by hash.
    requests: method and path of each request.  uploads: hash of each large file that was sent whole.
    before: called with method and path before each request is answered; what it returns is the answer, if anything.
    """

    users: dict[str, dict] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    before: Callable[[str, str], Response | None] = lambda method, path: None
    url: str = ""

    def add_user(self, token: str, name: str, role: str = "write", **orgs: str) -> None:
        """orgs: the user's role in each."""
        self.users[token] = {
            "type": "user", "name": name, "orgs": [{"name": org, "roleInOrg": r} for org, r in orgs.items()],
            "auth": {"type": "access_token", "accessToken": {"displayName": "a", "role": role}},
        }  # fmt: skip

    def may(self, repo: str, write: bool) -> bool:
        """Whether the user of the present request may read or write a repository."""
        user = self.users.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        owner = repo.partition("/")[0]
        if user is None:
            return not write and not self.repos[repo].private
        roles = {user["name"]: "admin"} | {org["name"]: org["roleInOrg"] for org in user["orgs"]}
        if write:
            return user["auth"]["accessToken"]["role"] != "read" and roles.get(owner, "read") != "read"
        return not self.repos[repo].private or owner in roles


@contextmanager
def served() -> Iterator[Hub]:
    """A hub that answers at its url, until the end of the block."""
    hub = Hub()
    server = make_server("127.0.0.1", 0, make_app(hub), threaded=True)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()


def refusal(status: int, message: str, code: str = "") -> Response:
    """An error as the hub gives it: huggingface_hub reads the headers."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Response(json.dumps({"error": message}), status, headers, content_type="application/json")


def make_app(hub: Hub) -> Flask:
    app = Flask("hub")

    def find(name: str, revision: str = "main", write: bool = False) -> tuple[Repo, str] | Response:
        """A repository and a commit of it, or why there is none."""
        repo = hub.repos.get(name)
        if repo is None or not hub.may(name, write=False):
            return refusal(404, "Repository not found", "RepoNotFound")
        if write and not hub.may(name, write=True):
            return refusal(403, "You don't have the rights to do this")
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            return refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    @app.before_request
    def look() -> Response | None:
        if answer := hub.before(request.method, request.path):
            return answer
        hub.requests.append((request.method, request.path))
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in hub.users:
            return refusal(401, "Invalid credentials in Authorization header")
        return None

    @app.get("/api/whoami-v2")
    def whoami() -> Response:
        return jsonify(hub.users[request.headers["Authorization"].removeprefix("Bearer ")])

    @app.post("/api/validate-yaml")
    def validate_yaml() -> Response:
        try:
            front = yaml.safe_load(request.json["content"].split("---")[1])
        except (yaml.YAMLError, IndexError) as error:
            return Response(json.dumps({"errors": [{"message": str(error)}], "warnings": []}), 400)
        missing = [] if "license" in front else [{"message": "no license"}]
        return Response(json.dumps({"errors": missing, "warnings": []}), 400 if missing else 200)

    @app.post("/api/repos/create")
    def create() -> Response:
        given = request.json
        name = f"{given['organization']}/{given['name']}"
        if not hub.may(name, write=True):
            return refusal(403, f"You don't have the rights to create a model under the namespace {name}")
        if name in hub.repos:
            return refusal(409, "You already created this model repo")
        hub.repos[name] = Repo(private=given.get("visibility") == "private" or bool(given.get("private")))
        hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return jsonify(url=f"{hub.url}/{name}", name=name, id=name)

    @app.get("/api/models/<org>/<name>")
    @app.get("/api/models/<org>/<name>/revision/<path:revision>")
    def info(org: str, name: str, revision: str = "main") -> Response:
        found = find(f"{org}/{name}", revision)
        if isinstance(found, Response):
            return found
        repo, commit = found
        files = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        return jsonify(id=f"{org}/{name}", sha=commit, private=repo.private, siblings=files)

    @app.get("/api/models/<org>/<name>/auth-check/write")
    def may_write(org: str, name: str) -> Response:
        found = find(f"{org}/{name}", write=True)
        return found if isinstance(found, Response) else jsonify(ok=True)

    @app.get("/api/models/<org>/<name>/tree/<revision>")
    @app.get("/api/models/<org>/<name>/tree/<revision>/<path:folder>")
    def tree(org: str, name: str, revision: str, folder: str = "") -> Response:
        found = find(f"{org}/{name}", revision)
        if isinstance(found, Response):
            return found
        files = found[0].commits[found[1]]
        below = [describe(path, files[path]) for path in sorted(files) if path.startswith(folder)]
        return jsonify(below) if below or not folder else refusal(404, "Entry not found", "EntryNotFound")

    @app.post("/api/models/<org>/<name>/preupload/<path:revision>")
    def preupload(org: str, name: str, revision: str) -> Response:
        found = find(f"{org}/{name}", revision, write=True)
        if isinstance(found, Response):
            return found
        files = found[0].commits[found[1]]
        answer = []
        for file in request.json["files"]:
            mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if (data := files.get(file["path"])) is not None:
                answer[-1]["oid"] = hashlib.sha256(data).hexdigest() if mode == "lfs" else git_hash(data)
        return jsonify(files=answer)

    @app.post("/<org>/<name>.git/info/lfs/objects/batch")
    def batch(org: str, name: str) -> Response:
        found = find(f"{org}/{name}", write=True)
        if isinstance(found, Response):
            return found
        objects = []
        for wanted in request.get_json(force=True)["objects"]:
            upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}?signature=secret"}}
            objects.append(wanted if wanted["oid"] in hub.stored else wanted | {"actions": upload})
        return jsonify(transfer="basic", objects=objects)

    @app.put("/lfs/<sha>")
    def store(sha: str) -> Response:
        data = request.get_data()
        if hashlib.sha256(data).hexdigest() != sha:
            return refusal(400, "the contents are not of this hash")
        hub.stored[sha] = data
        hub.uploads.append(sha)
        return Response("")

    @app.post("/api/models/<org>/<name>/commit/<path:revision>")
    def commit(org: str, name: str, revision: str) -> Response:
        found = find(f"{org}/{name}", revision, write=True)
        if isinstance(found, Response):
            return found
        files = dict(found[0].commits[found[1]])
        for line in request.get_data().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = found[0].commit(files, revision)
        return jsonify(commitUrl=f"{hub.url}/{org}/{name}/commit/{sha}", commitOid=sha)

    @app.get("/<org>/<name>/resolve/<revision>/<path:path>")  # and HEAD, which Flask answers by GET
    def resolve(org: str, name: str, revision: str, path: str) -> Response:
        found = find(f"{org}/{name}", revision)
        if isinstance(found, Response):
            return found
        repo, commit = found
        if repo.gated:
            return refusal(403, "Access to this model is restricted", "GatedRepo")
        if path not in repo.commits[commit]:
            return refusal(404, "Entry not found", "EntryNotFound")
        data = repo.commits[commit][path]
        etag = hashlib.sha256(data).hexdigest() if is_large(path, len(data)) else git_hash(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        return Response(data, headers=headers)

    return app


def is_large(path: str, size: int) -> bool:
    """Whether a file goes by LFS."""
    return size >= LARGE or path.endswith(LFS_ENDINGS)


def git_hash(data: bytes) -> str:
    """The name of a file's contents in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def describe(path: str, data: bytes) -> dict:
    """An entry of a tree."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
    if is_large(path, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry
