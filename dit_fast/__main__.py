"""`python -m dit_fast` is `dit-fast`."""

import sys

from dit_fast.cli import main

sys.exit(main())
