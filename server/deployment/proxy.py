"""The reverse proxy in front of the SuperLink: sites reach Flower's Fleet interface only.

TLS and node keys do not protect Flower's Control interface, which is on the same port: anyone who reaches it
can start a run, and a run is code at every site. Only this machine may therefore reach the SuperLink's port,
and the proxy forwards no other path. The one exception is gRPC's health check, which returns a status only.
"""

from __future__ import annotations

from fedsigma.common.config.schema import split_address
from fedsigma.server.deployment.home import ServerHome

__all__ = ["proxy_files", "write_proxy_files"]

_NGINX = """\
# Written by fedsigma from server.yaml; changes here are lost at the next `fedsigma server up`.
daemon off;
pid {run}/nginx.pid;
error_log stderr warn;
worker_processes auto;
events {{ worker_connections 1024; }}
http {{
  # A node sends about one request a second: successful ones are not logged.
  map $status $worth_a_line {{ ~^[23] 0; default 1; }}
  access_log /dev/stdout combined if=$worth_a_line;
  server_tokens off;
  client_body_temp_path {run}/body;
  proxy_temp_path {run}/proxy;
  fastcgi_temp_path {run}/fastcgi;
  uwsgi_temp_path {run}/uwsgi;
  scgi_temp_path {run}/scgi;
  # Limits of connections and requests for one site; a node sends about one request a second.
  limit_conn_zone $binary_remote_addr zone=sites:1m;
  limit_req_zone $binary_remote_addr zone=asks:1m rate=50r/s;
  server {{
    listen {listen} ssl http2;
    ssl_certificate {tls}/outer.crt;
    ssl_certificate_key {tls}/outer.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    client_max_body_size {megabytes}m;
    client_body_timeout 60s;
    limit_conn sites 64;
    limit_req zone=asks burst=200 nodelay;
    location /v1/fleet/ {{
      proxy_pass https://{superlink};
      proxy_ssl_trusted_certificate {tls}/ca.crt;
      proxy_ssl_verify on;
      proxy_ssl_name {inner};
      proxy_ssl_server_name on;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_connect_timeout 5s;
      proxy_read_timeout 120s;
      # Forwarded as it arrives, so that nothing of the sites is written to the proxy's disk.
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
    }}
    location = /grpc.health.v1.Health/Check {{
      grpc_pass grpc://{health};
    }}
    location / {{ return 404; }}
  }}
}}
"""

_CADDY = """\
# Written by fedsigma from server.yaml; changes here are lost at the next `fedsigma server up`.
{{
	admin off
	auto_https off
	storage file_system {run}/caddy
	log {{
		output stdout
	}}
}}
https://{host}:{port} {{
	bind {bind}
	tls {tls}/outer.crt {tls}/outer.key
	request_body {{
		max_size {megabytes}MB
	}}
	handle /v1/fleet/* {{
		reverse_proxy https://{superlink} {{
			transport http {{
				tls_trusted_ca_certs {tls}/ca.crt
				tls_server_name {inner}
				read_timeout 120s
			}}
		}}
	}}
	handle /grpc.health.v1.Health/Check {{
		reverse_proxy h2c://{health}
	}}
	handle {{
		respond 404
	}}
}}
"""


def proxy_files(home: ServerHome) -> dict[str, str]:
    """Return nginx.conf, for nginx 1.18 and newer, and the Caddyfile, for Caddy 2, by name."""
    config = home.config
    host, _ = split_address(config.address, where="address")
    bind, port = split_address(config.listen, where="listen")
    values = {
        "run": home.path / "proxy" / "run",
        "tls": home.path / "tls",
        "listen": config.listen,
        "host": host,
        "bind": bind,
        "port": port,
        "superlink": home.control,
        "inner": config.names[0],
        "health": config.health,
        "megabytes": config.largest_message,
    }
    return {"nginx.conf": _NGINX.format(**values), "Caddyfile": _CADDY.format(**values)}


def write_proxy_files(home: ServerHome) -> None:
    """Write both files into proxy/, and create the folders that they name."""
    (home.path / "proxy" / "run" / "body").mkdir(parents=True, exist_ok=True)
    for name, text in proxy_files(home).items():
        (home.path / "proxy" / name).write_text(text, encoding="utf-8")
