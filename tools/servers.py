"""The servers of the tests and of the demo, and how they are configured."""

from __future__ import annotations

import textwrap
from pathlib import Path

from programs import GUNICORN, LOOPBACK, PYTHON, UVICORN, Policy, Program, Programs

APPS = Path(__file__).resolve().parent.parent / "tests/apps"
WORKERS = 2
GUNICORN_SETTINGS = f"""\
bind = "{LOOPBACK}:{{port}}"
workers = {WORKERS}
worker_class = "{{worker_class}}"
threads = {{threads}}
pythonpath = "{APPS}"
graceful_timeout = 10
keepalive = 30
control_socket_disable = True
"""


def http_server(apps: Programs, policy: Policy | None, port: int, site: Path) -> Program:
    """Python's own, one thread for each connection."""
    return apps.serve(
        [PYTHON, "-m", "http.server", "--bind", LOOPBACK, "--directory", str(site), str(port)], policy, port
    )


def nginx(apps: Programs, policy: Policy | None, port: int, site: Path, *, reuseport: bool = False) -> Program:
    """Two workers that run as another user than their master."""
    prefix = apps.directory / f"nginx-{port}"
    prefix.mkdir()
    prefix.chmod(0o755)
    (prefix / "nginx.conf").write_text(textwrap.dedent(f"""\
        daemon off;
        worker_processes 2;
        pid nginx.pid;
        error_log stderr notice;
        events {{ worker_connections 512; }}
        http {{
            access_log off;
            sendfile on;
            keepalive_requests 1000000;
            client_body_temp_path temp;
            proxy_temp_path temp;
            fastcgi_temp_path temp;
            uwsgi_temp_path temp;
            scgi_temp_path temp;
            server {{
                listen {LOOPBACK}:{port}{" reuseport" if reuseport else ""};
                root {site};
            }}
        }}
        """))
    argv = ["/usr/sbin/nginx", "-e", "stderr", "-p", str(prefix), "-c", "nginx.conf"]
    return apps.serve(argv, policy, port)


def redis(apps: Programs, policy: Policy | None, port: int) -> Program:
    """Keeps its dump in the directory of its port, and saves only when told to."""
    directory = apps.directory / f"redis-{port}"
    directory.mkdir(exist_ok=True)
    argv = ["redis-server", "--port", str(port), "--bind", LOOPBACK, "--dir", str(directory), "--save", ""]
    return apps.serve(argv, policy, port)


def iperf3(apps: Programs, policy: Policy | None, port: int) -> Program:
    """Listens on the dual-stack wildcard, as it does unless told otherwise."""
    return apps.serve(["iperf3", "--server", "--forceflush", "--port", str(port)], policy, port)


def iperf2(apps: Programs, policy: Policy | None, port: int) -> Program:
    """A thread for each stream."""
    return apps.serve(["iperf", "--server", "--port", str(port)], policy, port)


def socat(apps: Programs, policy: Policy | None, port: int, to: int) -> Program:
    """Hands each connection on to the port `to`, in a child of its own, which waits for the end of both directions."""
    listen = f"TCP-LISTEN:{port},bind={LOOPBACK},reuseaddr,fork,backlog=64"
    return apps.serve(["socat", "-t", "30", listen, f"TCP:{LOOPBACK}:{to}"], policy, port)


def node(apps: Programs, policy: Policy | None, port: int, site: Path, *, cluster: str = "", ring: bool = False,
         companion: bool = True) -> Program:
    """One process, or with `cluster` a primary and two workers: "rr", where the primary accepts and passes connections
    on, or "none", where the workers listen on a descriptor that they got. `ring`: libuv may use io_uring."""
    argv = ["env", f"UV_USE_IO_URING={int(ring)}", "node", str(APPS / "node_server.js"), str(port), str(site)]
    if cluster:
        argv += [cluster, str(WORKERS)]
    return apps.serve(argv, policy, port, companion=companion,
                      processes=1 + WORKERS if cluster else 1)


def gunicorn(apps: Programs, policy: Policy | None, port: int, site: Path, worker_class: str) -> Program:
    """A master that listens, and two workers that accept."""
    settings = apps.directory / f"gunicorn-{port}.conf.py"
    threads = 1 if worker_class == "sync" else 8
    settings.write_text(GUNICORN_SETTINGS.format(port=port, worker_class=worker_class, threads=threads))
    argv = [str(GUNICORN), "--config", str(settings), "--chdir", str(site), "web_app:wsgi"]
    return apps.serve(argv, policy, port, processes=1 + WORKERS)


def uvicorn(apps: Programs, policy: Policy | None, port: int, site: Path, workers: int) -> Program:
    """One process; or a parent that only binds, and workers that it starts anew with the bound socket."""
    application = ["--app-dir", str(APPS), "--no-access-log", "web_app:asgi"]
    argv = ["env", f"--chdir={site}", str(UVICORN), "--host", LOOPBACK, "--port", str(port), "--workers", str(workers)]
    # The parent, a process that watches over shared resources, and the workers.
    return apps.serve([*argv, *application], policy, port,
                      processes=1 if workers == 1 else 2 + workers)
