"""Somebody on the network who knows the server's address and its certificate, and has no key.

Arguments: HOST:PORT of the server, the file of certificates. Prints what each path answers.
"""

from __future__ import annotations

import ssl
import sys

import httpx

CLOSED = (
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/health",
    "/docs",
    "/openapi.json",
)
SIGNED = ("pull-messages", "push-messages", "activate-node", "get-fab")
PROTOBUF = {"content-type": "application/protobuf"}

if __name__ == "__main__":
    server, trust = sys.argv[1:]
    context = ssl.create_default_context(cafile=trust)
    with httpx.Client(verify=context, base_url=f"https://{server}", timeout=30) as outside:
        for path in CLOSED:
            for method in ("GET", "POST"):
                answer = outside.request(method, path, headers=PROTOBUF, content=b"")
                print("closed", method, path, answer.status_code)
        for call in SIGNED:
            answer = outside.post(f"/v1/fleet/{call}", headers=PROTOBUF, content=b"")
            print("signed", call, answer.status_code)
