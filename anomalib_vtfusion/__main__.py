"""Anomalib's command line with plugins, also where start-up files are not read: ``python -m anomalib_vtfusion train``.

Python reads start-up files in site-packages only, so not after ``pip install --target`` or under ``python -S``.
"""

import sys

from anomalib_vtfusion.plugin import install


def main() -> None:
    """Run the ``anomalib`` command with the arguments of this process."""
    install()
    from anomalib.cli.cli import main as anomalib_main

    sys.argv[0] = "python -m anomalib_vtfusion"  # the program's name in usage and error messages
    anomalib_main()


if __name__ == "__main__":
    main()
