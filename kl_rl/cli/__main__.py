"""``python -m kl_rl.cli``."""

import sys

from kl_rl.cli import main

sys.exit(main())
