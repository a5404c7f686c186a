"""`unisd bench`: the benchmarks of the repository, as `python -m bench` runs them there. They are not in the wheel."""

from __future__ import annotations

from unisd.cli.errors import CommandError

_INSTALL = '`pip install -e ".[bench,peers]"`'


def main(arguments: list[str]) -> int:
    """Run the benchmarks.

    Raises:
        CommandError: the benchmarks, or a package that they need, are not there.
    """
    try:
        from bench.__main__ import main as run

        return run(arguments)
    except ImportError as error:
        if error.name in ("bench", "bench.__main__"):
            raise CommandError(
                "there are no benchmarks here: they are the folder bench of the repository, which is not in the wheel. "
                f"Clone it, run {_INSTALL} in it, then `unisd bench` again ({error})"
            ) from error
        if error.name is None or error.name.partition(".")[0] in ("bench", "unisd", "unisd_kernels"):
            raise
        raise CommandError(
            f"{error.name} is not installed: run {_INSTALL} in the repository; the cases on SmolLM2's hidden states "
            "and TRL's kernels also need the extra `train`"
        ) from error
