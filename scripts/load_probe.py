"""Asks for /health four times a second and prints when, its status (0: none) and how long it took, until it is ended.

python scripts/load_probe.py HOST PORT

A process of its own, since one with a thousand streams to read would measure itself.
"""

from __future__ import annotations

import http.client
import sys
import time

EVERY_SECONDS = 0.25
PATIENCE_SECONDS = 30.0


def ask(host: str, port: int) -> int:
    """The status."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def main() -> None:
    """See above."""
    host, port = sys.argv[1], int(sys.argv[2])
    while True:
        begin = time.monotonic()
        status = ask(host, port)
        print(begin, status, time.monotonic() - begin, flush=True)
        time.sleep(EVERY_SECONDS)


if __name__ == "__main__":
    main()
