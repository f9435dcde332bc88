"""``python -m dcache.evaluation``: the harness's own command line, where ``--model dcache`` is known.

Versions of lm_eval that look for entry points know it anyway, and ``lm_eval`` does; those up to 0.4.13 do not look.
"""

import sys

from dcache.errors import DCacheError
from dcache.evaluation.run import INSTALL
from dcache.text import printable


def main() -> int:
    """Run ``lm_eval`` with the arguments of this process; an error of dcache is one line, and exit code 2."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from dcache.evaluation.harness import register
    except ImportError as error:
        print(f"error: lm-evaluation-harness cannot be imported ({error}); {INSTALL}", file=sys.stderr)
        return 2
    register()
    try:
        cli_evaluate()
    except DCacheError as error:
        print(f"error: {printable(' '.join(str(error).splitlines()))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
