"""`python -m dit_fast.cli` is `dit-fast`."""

import sys

from dit_fast.cli import main

sys.exit(main())
