"""What tests/distributed/test_processes.py runs in a process of its own.

python -m tests.distributed.process_worker WHAT [MORE]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time

import torch

IMPORTED = os.getpid()


def main(what: str, *more: str) -> None:
    if what == "tell":
        facts = {
            "arguments": more,
            "variables": [os.environ.get(name) for name in ("UNISD_TEST_TOLD", "MPLBACKEND")],
            "folder": os.getcwd(),
            "threads": [torch.get_num_threads(), threading.active_count()],
            "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "group": os.getpgid(0) == os.getpid(),
            "imported_by": sys.modules["tests.distributed.process_worker"].IMPORTED if more else None,
        }
        print(json.dumps(facts))
    elif what == "raise":
        os.write(2, b"said by a library\n")
        raise RuntimeError("said by the module")
    elif what == "exit":
        sys.exit(int(more[0]) if more[0].isdigit() else more[0])
    elif what == "hang":
        child = os.fork()
        if child:
            print(child, flush=True)
            with open(more[0], "w") as file:
                file.write(str(child))
        time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
