"""The servers of the tests and of the demo, and how they are configured."""

from __future__ import annotations

import textwrap
from pathlib import Path

from programs import LOOPBACK, PYTHON, Policy, Program, Programs


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
