"""A real git repository on this machine, served over HTTP by git's own http-backend, and a clone to push from."""

from __future__ import annotations

import base64
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENVIRONMENT = {
    **os.environ,
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.org",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.org",
}


def git(folder: Path, *arguments: str, given: bytes | None = None) -> str:
    """Run git as a person would; its output."""
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=ENVIRONMENT, input=given, capture_output=True, check=False
    )
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout.decode().strip()


class Remote:
    """A bare repository with a branch `main`, its server, and a working copy in `work`.

    `token`: what must come as the password. `answers` False: the server closes every connection without a word."""

    def __init__(self, folder: Path, *, token: str | None = None) -> None:
        self.root = folder
        self.bare = folder / "r.git"
        self.work = folder / "work"
        self.token = token
        self.answers = True
        self.redirect = ""
        self.requests: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(self.bare))
        git(folder, "clone", "--quiet", str(self.bare), str(self.work))
        git(self.work, "checkout", "--quiet", "-b", "main")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/r.git"

    def write(self, **files: str) -> None:
        """Write files of the working copy; `__` in a name is `/`, a dot and `yaml` are added."""
        for name, text in files.items():
            path = self.work / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def push(self, subject: str = "a change", *options: str) -> str:
        """Commit all that there is, and push it; the commit."""
        git(self.work, "add", "--all")
        git(self.work, "commit", "--quiet", "--allow-empty", "-m", subject, *options)
        git(self.work, "push", "--quiet", "--force", "origin", "HEAD:main")
        return self.head

    @property
    def head(self) -> str:
        return git(self.work, "rev-parse", "HEAD")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(remote: Remote) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            remote.requests.append(self.path)
            if remote.redirect:
                self.send_response(301)
                self.send_header("Location", remote.redirect + self.path.partition("/r.git")[2])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if not remote.answers:
                self.close_connection = True
                return
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length)
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = self._chunks()
            if remote.token is not None and not self._knows(remote.token):
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="r"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path, _, query = self.path.partition("?")
            variables = {
                **ENVIRONMENT,
                "GIT_PROJECT_ROOT": str(remote.root),
                "GIT_HTTP_EXPORT_ALL": "1",
                "PATH_INFO": path,
                "QUERY_STRING": query,
                "REQUEST_METHOD": self.command,
                "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                "CONTENT_LENGTH": str(len(body)),
                "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                "REMOTE_ADDR": "127.0.0.1",
            }
            done = subprocess.run(
                ["git", "http-backend"], env=variables, input=body, capture_output=True, check=False
            )
            head, _, content = done.stdout.partition(b"\r\n\r\n")
            headers = [line.split(": ", 1) for line in head.decode().splitlines() if ": " in line]
            status = next((int(value.split()[0]) for name, value in headers if name == "Status"), 200)
            self.send_response(status)
            for name, value in headers:
                if name != "Status":
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _chunks(self) -> bytes:
            found = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def _knows(self, token: str) -> bool:
            scheme, _, pair = self.headers.get("Authorization", "").partition(" ")
            return scheme == "Basic" and base64.b64decode(pair).decode().partition(":")[2] == token

        do_GET = do_POST = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Tests say what they want to see."""

    return Handler
