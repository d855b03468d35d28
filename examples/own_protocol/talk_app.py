"""Four processes take turns with two sessions of a server that makes every login wait.

$ python talk_app.py
4 processes, 2 sessions: 400 leases, 2 logins
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from talk_driver import TalkDriver

import mppool

HERE = os.path.dirname(os.path.abspath(__file__))


def work(pool: mppool.Pool, me: int) -> None:
    for n in range(100):
        with pool.connection() as client:
            client.ask(f"SET who {me}")
            assert client.ask("GET who") == str(me)
            assert client.ask(f"ECHO {me}-{n}") == f"{me}-{n}"


def main() -> None:
    server = subprocess.Popen([sys.executable, f"{HERE}/talk_server.py", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        try:
            port = int(server.stdout.readline().split()[-1])
            driver = TalkDriver(("127.0.0.1", port), "app", "secret")
            pool = mppool.Pool(driver=driver, name="talk", max_size=2, broker=f"{directory}/broker.sock", autostart=True)
            children = []
            for me in range(4):
                pid = os.fork()
                if pid == 0:
                    work(pool, me)
                    pool.close()
                    os._exit(0)
                children.append(pid)
            codes = [os.waitpid(pid, 0)[1] for pid in children]
            logins = pool.get_stats()["dials"]
            pool.close()
            print(f"{len(children)} processes, {pool.options.max_size} sessions: {100 * len(children)} leases, {logins} logins")
            sys.exit(any(codes))
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


if __name__ == "__main__":
    main()
