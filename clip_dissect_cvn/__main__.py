"""``python -m clip_dissect_cvn`` is ``clip-dissect-cvn``."""

import sys

from .cli import main

sys.exit(main())
