"""A stand-in of the Hugging Face hub on this machine: repositories are made, committed to and read.

Only what huggingface_hub and transformers ask for, over HTTP, with files in memory.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class Hub:
  """Repositories by name: whether private, messages of commits, and files."""

  def __init__(self):
    self.repositories = {}

  @contextlib.contextmanager
  def served(self):
    """Gives its address."""
    handler = type("Handler", (_Handler,), {"hub": self})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}"
    finally:
      server.shutdown()
      thread.join()
      server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  hub: Hub

  def log_message(self, *_):
    pass

  def _answer(self, status, body=b"", **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(status)
    for name, value in {"Content-Length": len(body), **headers}.items():
      self.send_header(name.replace("_", "-"), str(value))
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
      return self._answer(401, {"error": "Invalid username or password."})
    path = urllib.parse.urlparse(self.path).path
    if path == "/api/repos/create":
      wanted = json.loads(body)
      name = f"{wanted['organization']}/{wanted['name']}"
      address = f"http://{self.headers['Host']}/{name}"
      if name in self.hub.repositories:
        return self._answer(409, {"url": address, "error": "You already created this repo"})
      private = wanted.get("private", wanted.get("visibility") == "private")
      made = {"private": private, "commits": [], "files": {}}
      self.hub.repositories[name] = made
      return self._answer(200, {"url": address, "name": name})
    if path == "/api/validate-yaml":
      return self._answer(200, {"errors": [], "warnings": []})
    name = "/".join(path.split("/")[3:5])
    if path.endswith("/preupload/main"):
      files = [
        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
        for f in json.loads(body)["files"]
      ]
      return self._answer(200, {"files": files})
    assert path.endswith("/commit/main"), path
    repository = self.hub.repositories[name]
    for line in map(json.loads, body.splitlines()):
      if line["key"] == "header":
        repository["commits"].append(line["value"]["summary"])
      else:
        assert line["key"] == "file", line
        content = base64.b64decode(line["value"]["content"])
        repository["files"][line["value"]["path"]] = content
    address = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
    return self._answer(200, {"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})

  def do_GET(self):
    parts = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
    if parts[:2] == ["api", "models"]:
      name = "/".join(parts[2:4])
      if name not in self.hub.repositories:
        return self._answer(404, X_Error_Code="RepoNotFound")
      files = self.hub.repositories[name]["files"]
      if "tree" in parts:
        under = "/".join(parts[6:])
        rows = [{"type": "file", "path": p, "size": len(c), "oid": "0"} for p, c in files.items()]
        return self._answer(200, [r for r in rows if r["path"].startswith(under)])
      siblings = [{"rfilename": path} for path in files]
      return self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings})
    repository = self.hub.repositories.get("/".join(parts[:2]))
    content = (repository or {"files": {}})["files"].get("/".join(parts[4:]))
    if content is None:
      return self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    return self._answer(200, content, X_Repo_Commit=COMMIT, ETag=etag)

  do_HEAD = do_GET
