"""A process that has imported nnU-Net and forks for every command: commands without their seconds of importing.

Reads a JSON line per command from its standard input: "argv", "environment", "output" (file), and maybe "file_limit"
(bytes a file may have). Answers with the process' id, and, when it has ended, with its return code.
"""

import json
import os
import resource
import sys


def child(order: dict) -> None:
    for name in [name for name in os.environ if name.startswith("HYSPARK_")]:
        del os.environ[name]
    os.environ.update(order["environment"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if "file_limit" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"],) * 2)
    sys.argv = order["argv"]
    from nnunetv2.run.run_training import run_training_entry

    run_training_entry()


def main() -> None:
    import nnunetv2.run.run_training  # noqa: F401

    import hyspark_nnunet.training.hyspark  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            sys.stdin = open(os.devnull)
            child(order)
            return  # as a command ends: with what Python does at its exit
        print(json.dumps({"process": process}), flush=True)
        _, status = os.waitpid(process, 0)
        print(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
